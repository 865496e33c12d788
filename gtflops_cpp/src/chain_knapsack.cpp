#include "gtflops/chain_knapsack.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <string>

// The answer is the best over *depths*: with the deepest selected tensor fixed, its dy are a fixed cost and
// what is left is a plain 0/1 knapsack over the tensors above it. Few depths need solving:
//
// 1. the LP relaxation of every depth, from one structure that lets items in as the depth grows;
// 2. a greedy selection at each depth that its bound leaves open;
// 3. at the depths still open, best bound first, an exact search: dynamic programming over a core that grows
//    around the break item, as in D. Pisinger, "A minimal algorithm for the 0-1 knapsack problem" (1997).
//
// Sums of weights and of values stay below 2^63 and 2^62, so their products and the sum of two of those fit
// 128 bits: no bound is ever rounded the wrong way.

namespace gtflops {
namespace {

// The standard name, `std::int128_t`, does not exist; the extension does, on GCC and Clang.
__extension__ typedef __int128 Wide;

constexpr std::int64_t kMaxInt64 = std::numeric_limits<std::int64_t>::max();

struct Item {
    std::int64_t weight;   // dw, in units of the common divisor of all weights
    std::int64_t value;    // importance in fixed point, in units of the common divisor of all values; > 0
    std::uint32_t tensor;  // index in backward order
};

/// Orders items by value per weight, highest first; items that weigh nothing come before all others.
bool denser(const Item& a, const Item& b) {
    const Wide left = Wide{a.value} * b.weight;
    const Wide right = Wide{b.value} * a.weight;
    if (left != right) return left > right;
    if (a.weight != b.weight) return a.weight > b.weight;  // large ones first, small ones fill the gaps
    return a.tensor < b.tensor;
}

std::int64_t floor_divide(Wide numerator, std::int64_t denominator) {
    const Wide quotient = numerator / denominator;
    return static_cast<std::int64_t>(quotient - (numerator % denominator < 0 ? 1 : 0));
}

// ---------------------------------------------------------------------------------------------- the instance

/// Importances as integers: round(importance * 2^shift) / divisor.
struct FixedPoint {
    int shift;
    std::int64_t divisor = 1;
    std::int64_t num_rounded = 0;  // each of these may have lost up to one unit of 2^-shift

    /// A double that no sum of importances exceeds whose fixed-point value is at most `bound`.
    double upper(std::int64_t bound) const {
        const double raised = std::ldexp(static_cast<double>(bound * divisor + num_rounded), -shift);
        return std::nextafter(raised, std::numeric_limits<double>::infinity());
    }
};

/// The knapsack that is left when no tensor below `deepest` may be selected.
struct Depth {
    std::int64_t capacity;  // what weights may sum to, once dy is paid
    std::int64_t bound;     // no selection that reaches a member is worth more
    std::uint32_t deepest;  // the deepest of the members
    bool single;            // else several tensors in a row share this capacity, for the same dy
};

/// A problem after its check, without the tensors that no good selection can hold.
struct Instance {
    std::vector<Item> items;             // in backward order
    std::vector<std::int64_t> capacity;  // what is left for weights when item i is the deepest
    FixedPoint values;
};

void check(const ChainProblem& problem) {
    const std::size_t n = problem.dw.size();
    if (problem.dy.size() != n || problem.importance.size() != n) {
        throw std::invalid_argument("dw, dy and importance have " + std::to_string(n) + ", " +
                                    std::to_string(problem.dy.size()) + " and " +
                                    std::to_string(problem.importance.size()) +
                                    " elements; expected one element a tensor in each");
    }
    if (n > std::numeric_limits<std::uint32_t>::max()) {
        throw std::invalid_argument("more than 2^32 - 1 tensors are not supported");
    }
    if (problem.capacity < 0) {
        throw std::invalid_argument("capacity is " + std::to_string(problem.capacity) +
                                    "; expected 0 or more");
    }
    std::int64_t cost = 0;
    double worth = 0;
    for (std::size_t k = 0; k < n; ++k) {
        for (const auto& [name, value] : {std::pair{"dw", problem.dw[k]}, std::pair{"dy", problem.dy[k]}}) {
            const auto where = [&, name = name] { return std::string(name) + '[' + std::to_string(k) + ']'; };
            if (value < 0) {
                throw std::invalid_argument(where() + " is " + std::to_string(value) +
                                            "; expected 0 or more");
            }
            if (value > kMaxInt64 - cost) {
                throw std::overflow_error("sum(dw) + sum(dy) does not fit int64: it overflows at " + where());
            }
            cost += value;
        }
        if (!std::isfinite(problem.importance[k])) {
            throw std::invalid_argument("importance[" + std::to_string(k) + "] is " +
                                        std::to_string(problem.importance[k]) + "; expected a finite number");
        }
        worth += std::max(problem.importance[k], 0.0);
        if (!std::isfinite(worth)) {
            throw std::overflow_error("the sum of the positive importances overflows float64 at importance[" +
                                      std::to_string(k) + "]");
        }
    }
}

FixedPoint scale_values(std::span<const double> importance, std::vector<Item>& items) {
    // Relative to the largest, so that neither the sum nor the scaling can leave the range of a double.
    double largest = 0;
    for (const Item& item : items) largest = std::max(largest, importance[item.tensor]);
    const int exponent = std::ilogb(largest);
    double relative_sum = 0;
    for (const Item& item : items) relative_sum += std::ldexp(importance[item.tensor], -exponent);

    FixedPoint fixed{.shift = 60 - exponent - std::ilogb(relative_sum)};  // the sum is below 2^61
    std::int64_t divisor = 0;
    for (Item& item : items) {
        const double scaled = std::ldexp(importance[item.tensor], fixed.shift);
        item.value = std::max<std::int64_t>(std::llround(scaled), 1);  // what is positive stays positive
        if (static_cast<double>(item.value) != scaled) ++fixed.num_rounded;
        divisor = std::gcd(divisor, item.value);
    }
    fixed.divisor = divisor;
    for (Item& item : items) item.value /= divisor;
    return fixed;
}

Instance prepare(const ChainProblem& problem) {
    Instance instance{};
    std::int64_t left = problem.capacity;
    std::int64_t divisor = 0;
    for (std::size_t k = 0; k < problem.dw.size(); ++k) {
        if (problem.dy[k] > left) break;
        left -= problem.dy[k];
        // What does not fit as the deepest fits at no greater depth either.
        if (problem.importance[k] <= 0 || problem.dw[k] > left) continue;
        instance.items.push_back({problem.dw[k], 0, static_cast<std::uint32_t>(k)});
        instance.capacity.push_back(left);
        divisor = std::gcd(divisor, problem.dw[k]);
    }
    if (instance.items.empty()) return instance;
    instance.values = scale_values(problem.importance, instance.items);
    // Only multiples of the divisor can be spent: dropping the rest of a capacity tightens its bounds.
    if (divisor > 1) {
        for (Item& item : instance.items) item.weight /= divisor;
        for (std::int64_t& capacity : instance.capacity) capacity /= divisor;
    }
    return instance;
}

// -------------------------------------------------------------------------------------------------- bounds

/// The LP relaxation over a growing set of items, O(log n) a step: a Fenwick tree over the density order.
class Relaxation {
  public:
    explicit Relaxation(std::span<const Item> by_density)
        : by_density_(by_density), sums_(by_density.size() + 1) {}

    void insert(std::size_t rank) {
        const Item& item = by_density_[rank];
        for (std::size_t i = rank + 1; i < sums_.size(); i += i & -i) {
            sums_[i].weight += item.weight;
            sums_[i].value += item.value;
        }
    }

    /// The most that the inserted items can be worth within the capacity, were the last one divisible.
    std::int64_t bound(std::int64_t capacity) const {
        std::size_t num_whole = 0;
        std::int64_t value = 0;
        for (std::size_t step = std::bit_floor(by_density_.size()); step != 0; step /= 2) {
            const std::size_t next = num_whole + step;
            if (next < sums_.size() && sums_[next].weight <= capacity) {
                num_whole = next;
                capacity -= sums_[next].weight;
                value += sums_[next].value;
            }
        }
        if (num_whole == by_density_.size()) return value;
        const Item& broken = by_density_[num_whole];
        return value + floor_divide(Wide{capacity} * broken.value, broken.weight);
    }

  private:
    struct Sum {
        std::int64_t weight = 0;
        std::int64_t value = 0;
    };
    std::span<const Item> by_density_;
    std::vector<Sum> sums_;
};

/// Every depth that a selection can have, with its bound; highest bound first.
std::vector<Depth> bounded_depths(const Instance& instance, std::span<const Item> by_density) {
    std::vector<std::size_t> rank(instance.items.back().tensor + std::size_t{1});
    for (std::size_t i = 0; i < by_density.size(); ++i) rank[by_density[i].tensor] = i;

    std::vector<Depth> depths;
    Relaxation above(by_density);
    for (std::size_t i = 0; i < instance.items.size(); ++i) {
        const Item& item = instance.items[i];
        const std::int64_t capacity = instance.capacity[i];
        const std::int64_t bound = item.value + above.bound(capacity - item.weight);
        above.insert(rank[item.tensor]);
        // One knapsack serves a row of tensors with the same capacity: that of the deepest holds the others.
        if (!depths.empty() && depths.back().capacity == capacity) {
            depths.back() = {capacity, std::max(depths.back().bound, bound), item.tensor, false};
        } else {
            depths.push_back({capacity, bound, item.tensor, true});
        }
    }
    std::ranges::stable_sort(depths, std::ranges::greater{}, &Depth::bound);
    return depths;
}

// ---------------------------------------------------------------------------------- one depth's 0/1 knapsack

/// One depth's items by density; those before the break item fit together.
struct Knapsack {
    std::vector<Item> items;
    std::int64_t capacity;
    std::optional<Item>
        forced;  // the only tensor that can be the deepest: its weight is taken off the capacity
    std::size_t break_index = 0;
    std::int64_t break_weight = 0;
    std::int64_t break_value = 0;  // with the forced item's

    Knapsack(const Depth& depth, std::span<const Item> by_density) : capacity(depth.capacity) {
        for (const Item& item : by_density) {
            if (item.tensor < depth.deepest || (item.tensor == depth.deepest && !depth.single)) {
                items.push_back(item);
            } else if (item.tensor == depth.deepest) {
                forced = item;
                capacity -= item.weight;
                break_value = item.value;
            }
        }
        std::erase_if(items, [this](const Item& item) { return item.weight > capacity; });
        while (break_index < items.size() && items[break_index].weight <= capacity - break_weight) {
            break_weight += items[break_index].weight;
            break_value += items[break_index].value;
            ++break_index;
        }
    }
};

/// The best selection so far.
struct Incumbent {
    std::int64_t value = 0;
    std::vector<std::uint32_t> tensors;
};

void improve_greedily(const Knapsack& knapsack, Incumbent& incumbent) {
    std::int64_t left = knapsack.capacity;
    std::int64_t value = knapsack.forced ? knapsack.forced->value : 0;
    std::vector<std::uint32_t> tensors;
    if (knapsack.forced) tensors.push_back(knapsack.forced->tensor);
    for (const Item& item : knapsack.items) {
        if (item.weight > left) continue;
        left -= item.weight;
        value += item.value;
        tensors.push_back(item.tensor);
    }
    if (value > incumbent.value) incumbent = {value, std::move(tensors)};
}

/// Asks the caller now and then whether to go on.
class Patience {
  public:
    explicit Patience(const std::function<bool()>& interrupted) : interrupted_(interrupted) {}

    void spend(std::size_t steps) {
        spent_ += steps;
        if (spent_ < kStepsBetweenQuestions) return;
        spent_ = 0;
        if (interrupted_ && interrupted_()) throw Interrupted();
    }

  private:
    static constexpr std::size_t kStepsBetweenQuestions = std::size_t{1} << 19;  // a few milliseconds
    const std::function<bool()>& interrupted_;
    std::size_t spent_ = 0;
};

/// Exact search around the break item. A state is a set of items that differs from the break solution within
/// the core only; the core grows by the next item to add after it, and the next to remove before it, in turn.
/// The list of states is ordered by weight and holds no state that another one beats in both weight and
/// value, nor one that cannot become better than the incumbent.
class CoreSearch {
  public:
    CoreSearch(std::size_t max_states, Patience& patience)
        : states_left_(std::min<std::size_t>(max_states, kRoot)), patience_(patience) {}  // nodes are 32 bits

    /// Raises the incumbent, at least the greedy selection, to the best of this knapsack if that is better.
    /// Returns a bound of what the knapsack's selections are worth: no more than the incumbent, unless
    /// `max_states` ended the search.
    std::int64_t run(const Knapsack& knapsack, Incumbent& incumbent) {
        if (knapsack.break_index == knapsack.items.size())
            return incumbent.value;  // greedily, all were taken
        knapsack_ = &knapsack;
        best_ = incumbent.value;
        best_node_ = kRoot;
        changes_.clear();
        states_.assign(1, {knapsack.break_weight, knapsack.break_value, kRoot});
        add_ = next_to_add(knapsack.break_index);
        remove_ = next_to_remove(knapsack.break_index);

        bool completed = true;
        for (bool adding = true; !states_.empty() && (add_ != kNone || remove_ != kNone); adding = !adding) {
            std::size_t& next = adding ? add_ : remove_;
            if (next == kNone) continue;
            if (states_.size() > states_left_) {
                completed = false;
                break;
            }
            const std::size_t position = next;
            next = adding ? next_to_add(position + 1) : next_to_remove(position);
            grow(position, adding ? +1 : -1);
        }
        if (best_node_ != kRoot) incumbent = {best_, selection(best_node_)};
        return completed ? best_ : frontier_bound();
    }

  private:
    struct State {
        std::int64_t weight;
        std::int64_t value;
        std::uint32_t node;  // how it differs from the break solution
    };
    struct Change {
        std::uint32_t position;  // the item that was added or removed,
        std::uint32_t parent;    // and the change before that
    };
    static constexpr std::uint32_t kRoot = std::numeric_limits<std::uint32_t>::max();
    static constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();

    const Item& item(std::size_t position) const { return knapsack_->items[position]; }

    /// Whether even the LP relaxation does not beat the incumbent once this item is added (sign +1) or
    /// removed
    /// (-1) against the break solution.
    bool settled(std::size_t position, int sign) const {
        const Item& changed = item(position);
        const Item& broken = item(knapsack_->break_index);
        const std::int64_t missing = best_ + 1 - knapsack_->break_value - sign * changed.value;
        const std::int64_t left = knapsack_->capacity - knapsack_->break_weight - sign * changed.weight;
        return Wide{left} * broken.value < Wide{missing} * broken.weight;
    }

    std::size_t next_to_add(std::size_t position) const {
        while (position < knapsack_->items.size() && settled(position, +1)) ++position;
        return position < knapsack_->items.size() ? position : kNone;
    }

    std::size_t next_to_remove(std::size_t end) const {
        while (end > 0 && settled(end - 1, -1)) --end;
        return end > 0 ? end - 1 : kNone;
    }

    /// The items outside the core exchange value for weight at these rates at best: what is left is filled
    /// with the next item to add, and what is too heavy gives up the next item to remove.
    Item fill_rate() const { return add_ == kNone ? Item{1, 0, 0} : item(add_); }
    Item relief_rate() const { return remove_ == kNone ? Item{0, 1, 0} : item(remove_); }

    /// Merges the list with itself, one item added to or removed from each state.
    void grow(std::size_t position, int sign) {
        const std::int64_t weight_change = sign * item(position).weight;
        const std::int64_t value_change = sign * item(position).value;
        const Item fill = fill_rate();
        const Item relief = relief_rate();
        const std::size_t num_changes = changes_.size();

        merged_.clear();
        std::int64_t highest_value = -1;
        for (auto kept = states_.cbegin(), changed = kept;
             kept != states_.cend() || changed != states_.cend();) {
            patience_.spend(1);
            const auto changed_is_next = [&] {
                if (kept == states_.cend() || changed == states_.cend()) return kept == states_.cend();
                const std::int64_t weight = changed->weight + weight_change;
                if (weight != kept->weight) return weight < kept->weight;
                return changed->value + value_change > kept->value;
            };
            const bool is_new = changed_is_next();
            State state = is_new ? *changed++ : *kept++;
            if (is_new) {
                state.weight += weight_change;
                state.value += value_change;
            }
            if (state.value <= highest_value) continue;
            highest_value = state.value;

            const std::int64_t left = knapsack_->capacity - state.weight;
            const bool better = left >= 0 && state.value > best_;
            if (better) best_ = state.value;
            const Item& rate = left >= 0 ? fill : relief;
            const bool hopeless = Wide{left} * rate.value < Wide{best_ + 1 - state.value} * rate.weight;
            if (hopeless && !better) continue;
            if (is_new) {
                changes_.push_back({static_cast<std::uint32_t>(position), state.node});
                state.node = static_cast<std::uint32_t>(changes_.size() - 1);
            }
            if (better) best_node_ = state.node;
            if (!hopeless) merged_.push_back(state);
        }
        states_.swap(merged_);
        states_left_ -= changes_.size() - num_changes;
    }

    /// What the best completion of any state in the list can be worth.
    std::int64_t frontier_bound() const {
        std::int64_t bound = best_;
        for (const State& state : states_) {
            const std::int64_t left = knapsack_->capacity - state.weight;
            const Item rate = left >= 0 ? fill_rate() : relief_rate();
            if (rate.weight == 0) continue;  // too heavy, and nothing that weighs anything is left to remove
            bound = std::max(bound, state.value + floor_divide(Wide{left} * rate.value, rate.weight));
        }
        return bound;
    }

    std::vector<std::uint32_t> selection(std::uint32_t node) const {
        std::vector<bool> selected(knapsack_->items.size());
        std::fill_n(selected.begin(), knapsack_->break_index, true);
        for (; node != kRoot; node = changes_[node].parent) selected[changes_[node].position].flip();

        std::vector<std::uint32_t> tensors;
        if (knapsack_->forced) tensors.push_back(knapsack_->forced->tensor);
        for (std::size_t position = 0; position < selected.size(); ++position) {
            if (selected[position]) tensors.push_back(item(position).tensor);
        }
        return tensors;
    }

    std::size_t states_left_;
    Patience& patience_;
    const Knapsack* knapsack_ = nullptr;
    std::size_t add_ = kNone;     // the next item to add,
    std::size_t remove_ = kNone;  // and the next to remove, at the edges of the core
    std::int64_t best_ = 0;
    std::uint32_t best_node_ = kRoot;
    std::vector<State> states_;
    std::vector<State> merged_;
    std::vector<Change> changes_;
};

Solution summed(const ChainProblem& problem, const Incumbent& incumbent) {
    const std::size_t n = problem.dw.size();
    Solution solution{std::vector<std::uint8_t>(n), 0, 0, 0, true};
    for (const std::uint32_t tensor : incumbent.tensors) solution.mask[tensor] = 1;
    std::int64_t dy_so_far = 0;
    std::int64_t dy_paid = 0;
    for (std::size_t k = 0; k < n; ++k) {
        dy_so_far += problem.dy[k];
        if (solution.mask[k] == 0) continue;
        solution.value += problem.importance[k];
        solution.cost += problem.dw[k];
        dy_paid = dy_so_far;
    }
    solution.cost += dy_paid;
    solution.upper_bound = solution.value;
    return solution;
}

}  // namespace

Solution solve_chain(const ChainProblem& problem, const SolveOptions& options) {
    check(problem);
    const Instance instance = prepare(problem);
    Incumbent incumbent;
    if (instance.items.empty()) return summed(problem, incumbent);

    std::vector<Item> by_density = instance.items;
    std::ranges::sort(by_density, denser);
    const std::vector<Depth> depths = bounded_depths(instance, by_density);
    Patience patience(options.interrupted);
    for (const Depth& depth : depths) {
        if (depth.bound <= incumbent.value) break;
        patience.spend(by_density.size());
        improve_greedily(Knapsack(depth, by_density), incumbent);
    }

    CoreSearch search(options.max_states, patience);
    for (std::size_t i = 0; i < depths.size() && depths[i].bound > incumbent.value; ++i) {
        const std::int64_t bound =
            std::min(depths[i].bound, search.run(Knapsack(depths[i], by_density), incumbent));
        if (bound <= incumbent.value) continue;
        // The states ran out: the depths not searched are open up to their bounds, the next one's the
        // highest.
        Solution solution = summed(problem, incumbent);
        const std::int64_t next_bound = i + 1 < depths.size() ? depths[i + 1].bound : 0;
        solution.upper_bound = std::max(solution.value, instance.values.upper(std::max(bound, next_bound)));
        solution.optimal = false;
        return solution;
    }
    return summed(problem, incumbent);
}

}  // namespace gtflops

#include "plan_search.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "patience.hpp"

// The answer is the best over the *walks* of a plan: with what a walk pays for in common taken off the
// capacity, a multiple-choice knapsack over its groups is left. Few walks need solving:
//
// 1. the LP relaxation of every walk, from one structure that lets groups in and out on the way;
// 2. a greedy choice for each walk that its bound leaves open;
// 3. for the walks still open, best bound first, an exact search: dynamic programming over a core that grows
//    around the break step, as in D. Pisinger, "A minimal algorithm for the 0-1 knapsack problem" (1997) and
//    "A minimal algorithm for the multiple-choice knapsack problem" (1995).
//
// Where a plan has too many walks for the first of these, they are enumerated under a Lagrangian bound.
//
// Sums of weights and of values stay below 2^63 and 2^62, so their products and the sum of two of those fit
// 128 bits: no bound is ever rounded the wrong way.

namespace gtflops {
namespace {

// The standard name, `std::int128_t`, does not exist; the extension does, on GCC and Clang.
__extension__ typedef __int128 Wide;

/// One way to choose from a group: none, or some of its tensors.
struct Option {
    std::int64_t weight;  // what it costs, in units of the common divisor of all weights
    std::int64_t value;   // what it is worth, in fixed point, in units of the common divisor of all values
    std::uint32_t group;
    std::uint8_t members;  // bit i: the i-th tensor of the group
};

/// From one option of a group to the next better one that the LP relaxation uses: the upper hull over the
/// options that fit the walk with the most room. On a walk with less, a step may lead to an option that does
/// not fit, over one that does; it is used as long as there is such a one, and never taken whole. Values per
/// weight fall from step to step of a group, so that in the order of density each comes after those that it
/// builds on.
struct Step {
    std::int64_t weight;
    std::int64_t value;
    std::uint32_t option;  // where it leads
    std::int64_t
        usable_from;  // the weight of the lightest option that it passes or leads to: with less, it is none
};

/// Orders steps by value per weight, highest first; steps that weigh nothing come before all others.
bool denser(const Step& a, const Step& b) {
    const Wide left = Wide{a.value} * b.weight;
    const Wide right = Wide{b.value} * a.weight;
    if (left != right) return left > right;
    if (a.weight != b.weight) return a.weight > b.weight;  // large ones first, small ones fill the gaps
    return a.option < b.option;
}

/// The quotient rounded down; 2^62, which no sum of values reaches, where it is that or more.
std::int64_t floor_divide(Wide numerator, std::int64_t denominator) {
    constexpr Wide kMost = Wide{1} << 62;
    const Wide quotient = numerator / denominator - (numerator % denominator < 0 ? 1 : 0);
    return static_cast<std::int64_t>(std::clamp(quotient, -kMost, kMost));
}

// ---------------------------------------------------------------------------------------------- the instance

/// The greatest common divisor so far and of one more: a division decides most, as few numbers change it.
std::int64_t common_divisor(std::int64_t so_far, std::int64_t next) {
    if (so_far == 0) return next;
    const std::int64_t rest = next % so_far;
    return rest == 0 ? so_far : std::gcd(so_far, rest);
}

/// Importances as integers: round(importance * 2^shift) / divisor.
struct FixedPoint {
    int shift = 0;
    std::int64_t divisor = 1;
    std::int64_t num_rounded = 0;  // each of these may have lost up to one unit of 2^-shift
    std::int64_t num_used = 0;

    /// A double that no sum of importances exceeds whose fixed-point value is at most `bound`.
    double upper(std::int64_t bound) const {
        const double raised = std::ldexp(static_cast<double>(bound * divisor + num_rounded), -shift);
        return std::nextafter(raised, std::numeric_limits<double>::infinity());
    }

    /// The highest value that sums of doubles cannot tell from `value`: each addition, and each importance
    /// itself, is rounded to 53 bits. No more than `value` where the importances are small integers.
    std::int64_t indistinct_from(std::int64_t value) const {
        return value + static_cast<std::int64_t>(Wide{value} * num_used >> 53);
    }
};

/// A plan with numbers: what can be chosen from each group, for given importances and capacity.
struct Instance {
    const Plan& plan;
    FixedPoint values{};
    std::int64_t divisor = 1;                   // of all weights
    std::vector<Option> options{};              // group by group; the first of each is to choose nothing
    std::vector<std::uint32_t> option_begin{};  // of each group, and the end
    std::vector<Step> steps{};                  // by density
    std::vector<std::uint32_t> ranks{};         // positions in `steps`, group by group
    std::vector<std::uint32_t> rank_begin{};    // of each group, and the end
    std::vector<std::int64_t> tensor_values{};  // in fixed point

    std::span<const Option> options_of(std::uint32_t group) const {
        return std::span(options).subspan(option_begin[group], option_begin[group + 1] - option_begin[group]);
    }
    std::span<const std::uint32_t> ranks_of(std::uint32_t group) const {
        return std::span(ranks).subspan(rank_begin[group], rank_begin[group + 1] - rank_begin[group]);
    }
    const Option& led_to(const Step& step) const { return options[step.option]; }
};

/// The least that any walk pays in common before it has each group; -1 for groups that no walk can afford.
std::vector<std::int64_t> cheapest_access(const Plan& plan, std::int64_t capacity) {
    constexpr std::int64_t kNever = -1;
    std::vector<std::int64_t> of_group(plan.groups.size(), kNever);
    std::vector<std::int64_t> of_node(plan.nodes.size(), kNever);
    const auto follow = [&](std::int64_t paid, const Plan::Arc& arc) {
        if (arc.cost > capacity - paid) return;
        paid += arc.cost;
        const auto lower = [paid](std::int64_t& least) {
            if (least == kNever || paid < least) least = paid;
        };
        for (const std::uint32_t group : plan.groups_of(arc)) lower(of_group[group]);
        for (const std::uint32_t group : plan.open_groups_of(arc)) lower(of_group[group]);
        if (arc.next != Plan::kEnd) lower(of_node[arc.next]);
    };
    follow(0, plan.start);
    for (std::size_t node = plan.nodes.size(); node-- > 0;) {
        if (of_node[node] == kNever) continue;
        follow(of_node[node], plan.nodes[node].exclude);
        follow(of_node[node], plan.nodes[node].include);
    }
    return of_group;
}

/// Fixed-point values of the importances of `used` tensors, 0 for the others.
FixedPoint scale_values(std::span<const double> importance, const std::vector<bool>& used,
                        std::vector<std::int64_t>& values) {
    // Relative to the largest, so that neither the sum nor the scaling can leave the range of a double.
    double largest = 0;
    for (std::size_t k = 0; k < used.size(); ++k) {
        if (used[k]) largest = std::max(largest, importance[k]);
    }
    values.assign(importance.size(), 0);
    if (largest == 0) return {};
    const int exponent = std::ilogb(largest);
    double relative_sum = 0;
    for (std::size_t k = 0; k < used.size(); ++k) {
        if (used[k]) relative_sum += std::ldexp(importance[k], -exponent);
    }
    FixedPoint fixed{.shift = 60 - exponent - std::ilogb(relative_sum)};  // the sum is below 2^61
    std::int64_t divisor = 0;
    for (std::size_t k = 0; k < used.size(); ++k) {
        if (!used[k]) continue;
        const double scaled = std::ldexp(importance[k], fixed.shift);
        values[k] = std::max<std::int64_t>(std::llround(scaled), 1);  // what is positive stays positive
        if (static_cast<double>(values[k]) != scaled) ++fixed.num_rounded;
        ++fixed.num_used;
        divisor = common_divisor(divisor, values[k]);
    }
    fixed.divisor = divisor;
    for (std::int64_t& value : values) value /= divisor;
    return fixed;
}

/// What some members of a group cost.
std::int64_t weight_of(std::span<const Plan::Piece> pieces, unsigned members) {
    std::int64_t weight = 0;
    for (const Plan::Piece& piece : pieces) weight += (piece.members & members) != 0 ? piece.cost : 0;
    return weight;
}

/// Which tensors are worth something and fit by themselves on some walk.
std::vector<bool> affordable_tensors(const Plan& plan, std::span<const double> importance,
                                     std::span<const std::int64_t> room) {
    std::vector<bool> affordable(importance.size());
    for (std::size_t group = 0; group < plan.groups.size(); ++group) {
        const std::span<const std::uint32_t> tensors = plan.tensors_of(plan.groups[group]);
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            if (importance[tensors[i]] <= 0) continue;
            if (weight_of(plan.pieces_of(plan.groups[group]), 1U << i) <= room[group])
                affordable[tensors[i]] = true;
        }
    }
    return affordable;
}

/// Appends the options of a group that fit `room`, by weight, without those that another one beats.
void add_options(const Plan& plan, std::uint32_t group, std::span<const std::int64_t> values,
                 std::int64_t room, std::vector<Option>& options) {
    const std::span<const std::uint32_t> tensors = plan.tensors_of(plan.groups[group]);
    const std::span<const Plan::Piece> pieces = plan.pieces_of(plan.groups[group]);
    unsigned wanted = 0;
    for (std::size_t i = 0; i < tensors.size(); ++i) wanted |= values[tensors[i]] > 0 ? 1U << i : 0U;

    options.push_back({0, 0, group, 0});
    const std::size_t begin = options.size();
    for (unsigned members = wanted; members != 0; members = (members - 1) & wanted) {  // all subsets but none
        const std::int64_t weight = weight_of(pieces, members);
        if (weight > room) continue;
        std::int64_t value = 0;
        for (std::size_t i = 0; i < tensors.size(); ++i)
            value += (members >> i & 1) != 0 ? values[tensors[i]] : 0;
        options.push_back({weight, value, group, static_cast<std::uint8_t>(members)});
    }
    if (options.size() - begin < 2) return;
    std::sort(options.begin() + static_cast<std::ptrdiff_t>(begin), options.end(),
              [](const Option& a, const Option& b) {
                  return std::tuple(a.weight, -a.value, a.members) <
                         std::tuple(b.weight, -b.value, b.members);
              });
    std::size_t end = begin;
    for (std::size_t i = begin; i < options.size(); ++i) {
        if (options[i].value > options[end - 1].value) options[end++] = options[i];
    }
    options.resize(end);
}

/// Appends the steps of one group: the upper hull over its options.
void add_steps(std::span<const Option> options, std::uint32_t first_option, std::vector<Step>& steps) {
    const std::size_t begin = steps.size();
    for (std::uint32_t i = 1; i < options.size(); ++i) {
        Step step{};
        while (true) {
            const Option& from =
                steps.size() == begin ? options[0] : options[steps.back().option - first_option];
            step = {options[i].weight - from.weight, options[i].value - from.value, first_option + i,
                    (&from)[1].weight};
            if (steps.size() == begin) break;
            if (Wide{steps.back().value} * step.weight > Wide{step.value} * steps.back().weight) break;
            steps.pop_back();
        }
        steps.push_back(step);
    }
}

Instance prepare(const Plan& plan, std::span<const double> importance, std::int64_t capacity) {
    const auto num_groups = static_cast<std::uint32_t>(plan.groups.size());
    Instance instance{.plan = plan};
    std::vector<std::int64_t> room = cheapest_access(plan, capacity);
    for (std::int64_t& left : room) left = left < 0 ? -1 : capacity - left;
    std::vector<std::int64_t>& values = instance.tensor_values;
    instance.values = scale_values(importance, affordable_tensors(plan, importance, room), values);

    instance.options.reserve(2 * num_groups);
    instance.option_begin.reserve(num_groups + 1);
    for (std::uint32_t group = 0; group < num_groups; ++group) {
        instance.option_begin.push_back(static_cast<std::uint32_t>(instance.options.size()));
        add_options(plan, group, values, room[group], instance.options);
    }
    instance.option_begin.push_back(static_cast<std::uint32_t>(instance.options.size()));

    // Only multiples of the common divisor can be spent: dropping the rest of a capacity tightens its bounds.
    std::int64_t divisor = 0;
    for (const Option& option : instance.options) divisor = common_divisor(divisor, option.weight);
    instance.divisor = std::max<std::int64_t>(divisor, 1);
    if (divisor > 1) {
        for (Option& option : instance.options) option.weight /= divisor;
    }

    instance.rank_begin.reserve(num_groups + 1);
    for (std::uint32_t group = 0; group < num_groups; ++group) {
        instance.rank_begin.push_back(static_cast<std::uint32_t>(instance.steps.size()));
        add_steps(instance.options_of(group), instance.option_begin[group], instance.steps);
    }
    instance.rank_begin.push_back(static_cast<std::uint32_t>(instance.steps.size()));
    std::ranges::sort(instance.steps, denser);
    instance.ranks.resize(instance.steps.size());
    std::vector<std::uint32_t> next(instance.rank_begin.begin(), instance.rank_begin.end() - 1);
    for (std::uint32_t rank = 0; rank < instance.steps.size(); ++rank) {
        instance.ranks[next[instance.led_to(instance.steps[rank]).group]++] = rank;
    }
    return instance;
}

// -------------------------------------------------------------------------------------------------- bounds

/// The LP relaxation over a changing set of steps, O(log n) a change: a Fenwick tree over the density order.
class Relaxation {
  public:
    explicit Relaxation(const Instance& instance) : instance_(instance), sums_(instance.steps.size() + 1) {}

    /// Lets in (sign +1) or out (-1) what of a group fits the capacity.
    void change(std::uint32_t group, std::int64_t capacity, int sign) {
        for (const std::uint32_t rank : instance_.ranks_of(group)) {
            const Step& step = instance_.steps[rank];
            if (step.usable_from > capacity) break;
            for (std::size_t i = rank + std::size_t{1}; i < sums_.size(); i += i & -i) {
                sums_[i].weight += sign * step.weight;
                sums_[i].value += sign * step.value;
            }
        }
    }

    /// The most that the steps let in can be worth within the capacity, were the last one divisible.
    std::int64_t bound(std::int64_t capacity) const {
        const std::span<const Step> steps = instance_.steps;
        std::size_t num_whole = 0;
        std::int64_t value = 0;
        for (std::size_t step = std::bit_floor(steps.size()); step != 0; step /= 2) {
            const std::size_t next = num_whole + step;
            if (next < sums_.size() && sums_[next].weight <= capacity) {
                num_whole = next;
                capacity -= sums_[next].weight;
                value += sums_[next].value;
            }
        }
        if (num_whole == steps.size()) return value;
        const Step& broken = steps[num_whole];
        return value + floor_divide(Wide{capacity} * broken.value, broken.weight);
    }

  private:
    struct Sum {
        std::int64_t weight = 0;
        std::int64_t value = 0;
    };
    const Instance& instance_;
    std::vector<Sum> sums_;
};

/// An arc on the way of a walk that made groups available.
struct Visit {
    std::uint32_t before;  // index of the visit before it, or none
    std::uint32_t groups_begin, groups_end;
};
constexpr std::uint32_t kNoVisit = std::numeric_limits<std::uint32_t>::max();

/// A walk to the end, as the knapsack that it leaves.
struct Walk {
    std::int64_t bound;     // no choice from it is worth more
    std::int64_t capacity;  // what the options may weigh
    std::uint32_t visit;    // the last one
};

/// The best choice so far; no options where that is the one known before.
class Incumbent {
  public:
    Incumbent(const FixedPoint& values, std::int64_t known)
        : values_(values), value_(known), to_beat_(values.indistinct_from(known)) {}

    void raise(std::int64_t value, std::vector<std::uint32_t> options) {
        value_ = value;
        to_beat_ = values_.indistinct_from(value);
        options_ = std::move(options);
    }

    std::int64_t value() const { return value_; }
    /// No search is worth while for this much or less.
    std::int64_t to_beat() const { return to_beat_; }
    const std::vector<std::uint32_t>& options() const { return options_; }

  private:
    FixedPoint values_;
    std::int64_t value_;
    std::int64_t to_beat_;
    std::vector<std::uint32_t> options_;
};

// ------------------------------------------------------------------------------------- one walk's knapsack

/// What one walk offers, by density; the steps before the break step fit together.
struct Knapsack {
    const Instance& instance;
    std::int64_t capacity;
    std::vector<std::uint32_t> ranks;  // ascending: its steps
    std::size_t break_index = 0;
    std::int64_t break_weight = 0;
    std::int64_t break_value = 0;

    Knapsack(const Instance& of, const Walk& walk, std::span<const Visit> visits)
        : instance(of), capacity(walk.capacity) {
        std::vector<bool> offered(of.plan.groups.size());
        for (std::uint32_t v = walk.visit; v != kNoVisit; v = visits[v].before) {
            for (std::uint32_t i = visits[v].groups_begin; i < visits[v].groups_end; ++i) {
                offered[of.plan.arc_groups[i]] = true;
            }
        }
        for (std::uint32_t rank = 0; rank < of.steps.size(); ++rank) {
            const Step& step = of.steps[rank];
            if (offered[of.led_to(step).group] && step.usable_from <= capacity) ranks.push_back(rank);
        }
        while (break_index < ranks.size() && step(break_index).weight <= capacity - break_weight) {
            break_weight += step(break_index).weight;
            break_value += step(break_index).value;
            ++break_index;
        }
    }

    const Step& step(std::size_t position) const { return instance.steps[ranks[position]]; }
    std::uint32_t group(std::size_t position) const { return instance.led_to(step(position)).group; }

    /// The option of a group in the break solution.
    std::uint32_t break_option(std::uint32_t group) const {
        const std::uint32_t end =
            break_index < ranks.size() ? ranks[break_index] : std::numeric_limits<std::uint32_t>::max();
        std::uint32_t option = instance.option_begin[group];
        for (const std::uint32_t rank : instance.ranks_of(group)) {
            const Step& taken = instance.steps[rank];
            if (rank >= end || taken.usable_from > capacity) break;
            option = taken.option;
        }
        return option;
    }
};

/// The options that differ from choosing nothing.
std::vector<std::uint32_t> chosen_of(const Instance& instance,
                                     std::span<const std::uint32_t> option_of_group) {
    std::vector<std::uint32_t> chosen;
    for (const std::uint32_t option : option_of_group) {
        if (instance.options[option].members != 0) chosen.push_back(option);
    }
    return chosen;
}

void improve_greedily(const Knapsack& knapsack, Incumbent& incumbent) {
    const Instance& instance = knapsack.instance;
    std::vector<std::uint32_t> option_of_group(instance.option_begin.begin(),
                                               instance.option_begin.end() - 1);
    std::int64_t left = knapsack.capacity;
    std::int64_t value = 0;
    for (std::size_t position = 0; position < knapsack.ranks.size(); ++position) {
        const std::uint32_t to = knapsack.step(position).option;
        std::uint32_t& from = option_of_group[instance.options[to].group];
        const std::int64_t weight = instance.options[to].weight - instance.options[from].weight;
        if (weight > left) continue;
        left -= weight;
        value += instance.options[to].value - instance.options[from].value;
        from = to;
    }
    if (value > incumbent.value()) incumbent.raise(value, chosen_of(instance, option_of_group));
}

/// Exact search around the break step. A state is a choice that differs from the break solution within the
/// core only; the core grows by the group of the next step to add after it, and of the next to take back
/// before it, in turn. The list of states is ordered by weight and holds no state that another one beats in
/// both weight and value, nor one that cannot become better than the incumbent.
class CoreSearch {
  public:
    CoreSearch(const Instance& instance, std::size_t max_states, std::size_t halve_at, Patience& patience)
        : instance_(instance),
          states_left_(std::min<std::size_t>(max_states, kRoot)),  // nodes are 32 bits
          merges_left_(states_left_ * kMergesPerState),
          halve_at_(halve_at),
          patience_(patience) {}

    /// Raises the incumbent, at least the greedy choice, to the best of this knapsack if that is better.
    /// Returns a bound of what the knapsack's choices are worth: no more than the incumbent, unless
    /// `max_states` ended the search.
    std::int64_t run(const Knapsack& knapsack, Incumbent& incumbent) {
        if (knapsack.break_index == knapsack.ranks.size())
            return incumbent.value();  // greedily, all were taken
        knapsack_ = &knapsack;
        raise_to(incumbent.value());
        best_node_ = best_other_node_ = kRoot;
        changes_.clear();
        in_core_.assign(instance_.plan.groups.size(), false);
        states_.assign(1, {knapsack.break_weight, knapsack.break_value, kRoot});
        add_ = knapsack.break_index;
        remove_end_ = knapsack.break_index;
        move_to_open_steps();

        bool completed = true;
        std::size_t halve_at = halve_at_;
        for (bool adding = true; !states_.empty() && (can_add() || can_remove()); adding = !adding) {
            if (adding ? !can_add() : !can_remove()) continue;
            if (states_.size() >= halve_at) {
                if (meet_in_the_middle()) break;
                halve_at = 4 * states_.size();
            }
            const std::uint32_t group = knapsack.group(adding ? add_ : remove_end_ - 1);
            const std::size_t growth = states_.size() * (instance_.options_of(group).size() - 1);
            if (growth > states_left_ || growth > merges_left_) {
                completed = false;
                break;
            }
            merges_left_ -= growth;
            in_core_[group] = true;
            move_to_open_steps();
            grow(group);
        }
        if (best_ > incumbent.value()) incumbent.raise(best_, choice());
        return completed ? best_ : frontier_bound();
    }

  private:
    struct State {
        std::int64_t weight;
        std::int64_t value;
        std::uint32_t node;  // how it differs from the break solution
    };
    struct Change {
        std::uint32_t option;  // the option that a group has instead of that of the break solution,
        std::uint32_t parent;  // and the change before that
    };
    /// What another option of a group changes.
    struct Delta {
        std::int64_t weight;
        std::int64_t value;
        std::uint32_t option;
    };
    static constexpr std::uint32_t kRoot = std::numeric_limits<std::uint32_t>::max();
    /// States that are looked at again and again without new ones to record take time, too.
    static constexpr std::size_t kMergesPerState = 16;

    void raise_to(std::int64_t best) {
        best_ = best;
        to_beat_ = instance_.values.indistinct_from(best);
    }

    bool can_add() const { return add_ < knapsack_->ranks.size(); }
    bool can_remove() const { return remove_end_ > 0; }

    /// Calls `visit` with every option of a group but that of the break solution.
    template <typename Visitor>
    void for_other_options(std::uint32_t group, Visitor visit) const {
        const Option& from = instance_.options[knapsack_->break_option(group)];
        for (const Option& to : instance_.options_of(group)) {
            if (&to == &from || to.weight > knapsack_->capacity) continue;
            visit(Delta{to.weight - from.weight, to.value - from.value,
                        static_cast<std::uint32_t>(&to - instance_.options.data())});
        }
    }

    /// Whether even the LP relaxation does not beat the incumbent once this differs from the break solution.
    bool settled(const Delta& delta) const {
        const Step& broken = knapsack_->step(knapsack_->break_index);
        const std::int64_t missing = to_beat_ + 1 - knapsack_->break_value - delta.value;
        const std::int64_t left = knapsack_->capacity - knapsack_->break_weight - delta.weight;
        return Wide{left} * broken.value < Wide{missing} * broken.weight;
    }

    bool settled(std::uint32_t group) const {
        bool all = true;
        for_other_options(group, [&](const Delta& delta) { all = all && settled(delta); });
        return all;
    }

    /// Moves the edges of the core past what is in it and what is settled.
    void move_to_open_steps() {
        const auto open = [this](std::size_t position) {
            const std::uint32_t group = knapsack_->group(position);
            return !in_core_[group] && !settled(group);
        };
        while (can_add() && !open(add_)) ++add_;
        while (can_remove() && !open(remove_end_ - 1)) --remove_end_;
    }

    /// The groups outside of the core exchange value for weight at these rates at best: what is left is
    /// filled with the next step to add, and what is too heavy takes back the next step to remove.
    Step fill_rate() const { return can_add() ? knapsack_->step(add_) : Step{1, 0, 0, 0}; }
    Step relief_rate() const { return can_remove() ? knapsack_->step(remove_end_ - 1) : Step{0, 1, 0, 0}; }

    /// What becomes of a state: whether it stays in the list, and whether it is the new incumbent.
    struct Verdict {
        bool kept;
        bool best;
    };

    /// Replaces the list of the core by all its states with every option of the group.
    void grow(std::uint32_t group) {
        const auto judge = [this, capacity = knapsack_->capacity, fill = fill_rate(),
                            relief = relief_rate()](const State& state) {
            const std::int64_t left = capacity - state.weight;
            const bool better = left >= 0 && state.value > best_;
            if (better) raise_to(state.value);
            const Step& rate = left >= 0 ? fill : relief;
            return Verdict{Wide{left} * rate.value >= Wide{to_beat_ + 1 - state.value} * rate.weight, better};
        };
        extend(states_, group, judge);
    }

    /// Tries to end the search with a second list, of all that differs from the break solution outside of the
    /// core: of each state of the core, only the heaviest of the second list that fits is of interest (E.
    /// Horowitz and S. Sahni, JACM 21(2), 1974). Returns whether that list could be made in full; a part of
    /// it may still raise the incumbent to its bound, which few states of many equally dense ones do alone.
    bool meet_in_the_middle() {
        const std::size_t num_changes = changes_.size();
        const std::size_t max_recorded = std::min(4 * states_.size(), states_left_);
        const std::size_t max_merges = std::min(32 * states_.size(), merges_left_);
        std::size_t num_merges = 0;
        bool in_full = true;
        std::vector<bool> met = in_core_;
        others_.assign(1, {0, 0, kRoot});
        const auto meet = [&](std::size_t position) {
            const std::uint32_t group = knapsack_->group(position);
            if (met[group] || settled(group)) return;
            met[group] = true;
            const std::size_t growth = others_.size() * (instance_.options_of(group).size() - 1);
            in_full =
                changes_.size() - num_changes + growth <= max_recorded && num_merges + growth <= max_merges;
            if (!in_full) return;
            num_merges += growth;
            extend(others_, group, [this](const State& state) {
                return Verdict{!settled(Delta{state.weight, state.value, 0}), false};
            });
        };
        std::size_t after = knapsack_->break_index;
        std::size_t before = after;
        while (in_full && (after < knapsack_->ranks.size() || before > 0)) {  // outwards
            if (after < knapsack_->ranks.size()) meet(after++);
            if (in_full && before > 0) meet(--before);
        }
        merges_left_ -= num_merges;

        const std::int64_t best_before = best_;
        auto other = others_.crbegin();
        for (const State& state : states_) {  // the heavier it is, the lighter the other
            patience_.spend(1);
            while (other != others_.crend() && other->weight > knapsack_->capacity - state.weight) ++other;
            if (other == others_.crend()) break;
            if (state.value + other->value <= best_) continue;
            raise_to(state.value + other->value);
            best_node_ = state.node;
            best_other_node_ = other->node;
        }
        if (best_ == best_before) {  // nothing refers to what was recorded
            states_left_ += changes_.size() - num_changes;
            changes_.resize(num_changes);
        }
        return in_full;
    }

    /// Adds to a list all its states with every other option of the group, and drops those that another one
    /// beats and those that are judged out.
    template <typename Judge>
    void extend(std::vector<State>& list, std::uint32_t group, Judge judge) {
        const std::size_t num_changes = changes_.size();
        deltas_.clear();
        for_other_options(group, [&](const Delta& delta) {
            if (!settled(delta)) deltas_.push_back(delta);
        });
        if (deltas_.size() > 1) base_ = list;
        for (const Delta& delta : deltas_) {
            merge(list, deltas_.size() > 1 ? base_ : list, delta, judge);
            list.swap(merged_);
        }
        states_left_ -= changes_.size() - num_changes;
    }

    /// `merged_` becomes `kept` and the states of `base` with the delta.
    template <typename Judge>
    void merge(const std::vector<State>& kept, const std::vector<State>& base, const Delta& delta,
               Judge& judge) {
        patience_.spend(kept.size() + base.size());
        merged_.clear();
        std::int64_t highest_value = std::numeric_limits<std::int64_t>::min();
        const State* old = kept.data();
        const State* changed = base.data();
        const State* const end_of_old = old + kept.size();
        const State* const end_of_changed = changed + base.size();
        while (old != end_of_old || changed != end_of_changed) {
            const auto changed_is_next = [&] {
                if (old == end_of_old || changed == end_of_changed) return old == end_of_old;
                const std::int64_t weight = changed->weight + delta.weight;
                if (weight != old->weight) return weight < old->weight;
                return changed->value + delta.value > old->value;
            };
            const bool is_new = changed_is_next();
            State state = is_new ? *changed++ : *old++;
            if (is_new) {
                state.weight += delta.weight;
                state.value += delta.value;
            }
            if (state.value <= highest_value) continue;
            highest_value = state.value;

            const Verdict verdict = judge(state);
            if (!verdict.kept && !verdict.best) continue;
            if (is_new) {
                changes_.push_back({delta.option, state.node});
                state.node = static_cast<std::uint32_t>(changes_.size() - 1);
            }
            if (verdict.best) {
                best_node_ = state.node;
                best_other_node_ = kRoot;
            }
            if (verdict.kept) merged_.push_back(state);
        }
    }

    /// What the best completion of any state in the list can be worth.
    std::int64_t frontier_bound() const {
        std::int64_t bound = best_;
        for (const State& state : states_) {
            const std::int64_t left = knapsack_->capacity - state.weight;
            const Step rate = left >= 0 ? fill_rate() : relief_rate();
            if (rate.weight == 0)
                continue;  // too heavy, and nothing that weighs anything is left to take back
            bound = std::max(bound, state.value + floor_divide(Wide{left} * rate.value, rate.weight));
        }
        return bound;
    }

    std::vector<std::uint32_t> choice() const {
        std::vector<std::uint32_t> option_of_group(instance_.option_begin.begin(),
                                                   instance_.option_begin.end() - 1);
        const auto choose = [&](std::uint32_t option) {
            option_of_group[instance_.options[option].group] = option;
        };
        for (std::size_t position = 0; position < knapsack_->break_index; ++position) {
            choose(knapsack_->step(position).option);
        }
        for (std::uint32_t node : {best_node_, best_other_node_}) {
            for (; node != kRoot; node = changes_[node].parent) choose(changes_[node].option);
        }
        return chosen_of(instance_, option_of_group);
    }

    const Instance& instance_;
    std::size_t states_left_;
    std::size_t merges_left_;
    std::size_t halve_at_;
    Patience& patience_;
    const Knapsack* knapsack_ = nullptr;
    std::vector<bool> in_core_;   // by group
    std::size_t add_ = 0;         // the next step to add,
    std::size_t remove_end_ = 0;  // and the end of those to take back, at the edges of the core
    std::int64_t best_ = 0;
    std::int64_t to_beat_ = 0;
    std::uint32_t best_node_ = kRoot;        // of the core's list,
    std::uint32_t best_other_node_ = kRoot;  // and of the second one
    std::vector<State> states_;
    std::vector<State> others_;
    std::vector<State> base_;
    std::vector<State> merged_;
    std::vector<Change> changes_;
    std::vector<Delta> deltas_;
};

// ------------------------------------------------------------------------------------------------- the walks

/// The Lagrangian relaxation of the capacity: what each walk is worth where weight has a price. The price is
/// a rational number, so that bounds are exact; they are in units of 1 / denominator.
class Lagrangian {
  public:
    Lagrangian(const Instance& instance, std::int64_t capacity)
        : instance_(instance), capacity_(capacity / instance.divisor) {}

    /// Sets the price to the value per weight of a step.
    void set_price(const Step& step) {
        price_ = step;
        rewards_.resize(instance_.plan.groups.size());
        for (std::uint32_t group = 0; group < rewards_.size(); ++group) {
            Wide best = 0;
            for (const Option& option : instance_.options_of(group)) {
                best = std::max(best, Wide{option.value} * step.weight - Wide{option.weight} * step.value);
            }
            rewards_[group] = best;
        }
        best_below_.resize(instance_.plan.nodes.size());
        for (std::size_t node = 0; node < best_below_.size(); ++node) {
            const auto& [exclude, include] = instance_.plan.nodes[node];
            best_below_[node] = std::max(best(exclude), best(include));
        }
    }

    /// What an arc itself adds, and the most that a walk can add from there on.
    Wide gain(const Plan::Arc& arc) const {
        Wide total = -Wide{arc.cost / instance_.divisor} * price_.value;
        for (const std::uint32_t group : instance_.plan.groups_of(arc)) total += rewards_[group];
        return total;
    }
    Wide best(const Plan::Arc& arc) const {
        Wide open = 0;
        for (const std::uint32_t group : instance_.plan.open_groups_of(arc)) open += rewards_[group];
        return gain(arc) + std::max(open, arc.next == Plan::kEnd ? 0 : best_below_[arc.next]);
    }

    /// Whether the best walk from a node includes its segments.
    bool includes(const Plan::Node& node) const { return best(node.include) > best(node.exclude); }

    /// The bound of all walks with these gains.
    Wide bound(Wide gains) const { return Wide{capacity_} * price_.value + gains; }
    bool beats(Wide gains, std::int64_t value) const {
        return bound(gains) >= Wide{value + 1} * price_.weight;
    }
    std::int64_t floor_bound(Wide gains) const { return floor_divide(bound(gains), price_.weight); }

    /// What the best choice of the groups on an arc weighs, and the arc itself.
    std::int64_t weight(const Plan::Arc& arc) const {
        std::int64_t total = arc.cost / instance_.divisor;
        for (const std::uint32_t group : instance_.plan.groups_of(arc)) {
            for (const Option& option : instance_.options_of(group)) {
                if (Wide{option.value} * price_.weight - Wide{option.weight} * price_.value !=
                    rewards_[group])
                    continue;
                total += option.weight;
                break;
            }
        }
        return total;
    }

  private:
    const Instance& instance_;
    std::int64_t capacity_;
    Step price_{};
    std::vector<Wide> rewards_;     // by group
    std::vector<Wide> best_below_;  // by node
};

/// The search over the walks of a plan.
class WalkSearch {
  public:
    WalkSearch(const Instance& instance, std::int64_t capacity, std::size_t max_states, const Limits& limits,
               Patience& patience)
        : instance_(instance),
          plan_(instance.plan),
          capacity_(capacity),
          max_states_(max_states),
          few_walks_(std::max(limits.few_walks,
                              limits.few_walks_per_node * static_cast<double>(instance.plan.nodes.size()))),
          greedy_work_left_(limits.max_greedy_work),
          patience_(patience),
          relaxation_(instance) {}

    /// Finds the walks that may beat the incumbent, which it raises. Returns a bound of the walks that it
    /// left out.
    std::int64_t run(Incumbent& incumbent) {
        std::optional<Lagrangian> lagrangian;
        if (num_walks() > few_walks_) {
            lagrangian.emplace(instance_, capacity_);
            find_best_price(*lagrangian, incumbent);
        }
        enumerate(lagrangian ? &*lagrangian : nullptr, incumbent);
        try_best_walks(incumbent);
        return left_out_;
    }

    /// The highest bound first.
    const std::vector<Walk>& walks() const { return walks_; }
    Knapsack knapsack(const Walk& walk) const { return {instance_, walk, visits_}; }

  private:
    /// A node that a walk stands at, and what is undone when it goes back.
    struct Frame {
        std::uint32_t node;
        std::uint32_t visit;
        std::int64_t left;           // of the capacity
        std::size_t num_let_in = 0;  // before it
        Wide gains = 0;
        bool include_first = false;
        bool one_done = false;
    };
    struct LetIn {
        std::uint32_t group;
        std::int64_t capacity;
    };

    double num_walks() const {
        std::vector<double> of_node(plan_.nodes.size());
        const auto of = [&](const Plan::Arc& arc) { return arc.next == Plan::kEnd ? 1 : of_node[arc.next]; };
        for (std::size_t node = 0; node < of_node.size(); ++node) {
            of_node[node] = of(plan_.nodes[node].exclude) + of(plan_.nodes[node].include);
        }
        return of(plan_.start);
    }

    std::int64_t units(std::int64_t capacity) const { return capacity / instance_.divisor; }

    std::uint32_t visited(const Plan::Arc& arc, std::uint32_t before) {
        if (arc.groups_begin == arc.groups_end) return before;
        visits_.push_back({before, arc.groups_begin, arc.groups_end});
        return static_cast<std::uint32_t>(visits_.size() - 1);
    }

    /// By bisection over the densities: the higher the price, the less the best walk weighs.
    void find_best_price(Lagrangian& lagrangian, Incumbent& incumbent) {
        Step best_price{1, 0, 0, 0};
        lagrangian.set_price(best_price);
        std::int64_t lowest = lagrangian.floor_bound(lagrangian.best(plan_.start));
        const auto priced = [](const Step& step) { return step.weight > 0; };
        std::span<const Step> prices = instance_.steps;
        prices =
            prices.subspan(static_cast<std::size_t>(std::ranges::find_if(prices, priced) - prices.begin()));
        while (!prices.empty()) {
            const std::size_t middle = prices.size() / 2;
            patience_.spend(instance_.options.size() + plan_.arc_groups.size() + plan_.nodes.size());
            lagrangian.set_price(prices[middle]);
            const std::int64_t bound = lagrangian.floor_bound(lagrangian.best(plan_.start));
            if (bound < lowest) {
                lowest = bound;
                best_price = prices[middle];
            }
            prices =
                best_walk_fits(lagrangian, incumbent) ? prices.subspan(middle + 1) : prices.first(middle);
        }
        lagrangian.set_price(best_price);
    }

    /// Whether the best choice at the price fits the capacity; tries its walk greedily.
    bool best_walk_fits(const Lagrangian& lagrangian, Incumbent& incumbent) {
        const std::size_t num_visits = visits_.size();
        std::uint32_t visit = kNoVisit;
        std::int64_t left = capacity_;
        std::int64_t weight = 0;
        for (const Plan::Arc* arc = &plan_.start; arc != nullptr;) {
            left -= arc->cost;
            weight += lagrangian.weight(*arc);
            visit = visited(*arc, visit);
            if (arc->next == Plan::kEnd) break;
            const Plan::Node& node = plan_.nodes[arc->next];
            arc = lagrangian.includes(node) ? &node.include : &node.exclude;
        }
        if (left >= 0) try_greedily({0, units(left), visit}, incumbent);
        visits_.resize(num_visits);
        return weight <= units(capacity_);
    }

    void enumerate(const Lagrangian* lagrangian, Incumbent& incumbent) {
        const auto leave_to = [this](std::size_t num_let_in) {
            for (; let_in_.size() > num_let_in; let_in_.pop_back()) {
                relaxation_.change(let_in_.back().group, let_in_.back().capacity, -1);
            }
        };
        std::vector<Frame> stack;
        const auto follow = [&](const Plan::Arc& arc, const Frame& from, std::size_t num_let_in) {
            patience_.spend(1 + plan_.groups_of(arc).size() + plan_.open_groups_of(arc).size());
            if (arc.cost > from.left ||
                (lagrangian != nullptr &&
                 !lagrangian->beats(from.gains + lagrangian->best(arc), incumbent.to_beat()))) {
                leave_to(num_let_in);
                return;
            }
            const Frame here{.node = arc.next,
                             .visit = visited(arc, from.visit),
                             .left = from.left - arc.cost,
                             .num_let_in = num_let_in,
                             .gains = lagrangian == nullptr ? 0 : from.gains + lagrangian->gain(arc),
                             .include_first = lagrangian != nullptr && arc.next != Plan::kEnd &&
                                              lagrangian->includes(plan_.nodes[arc.next]),
                             .one_done = false};
            for (const std::uint32_t group : plan_.groups_of(arc)) {
                let_in_.push_back({group, units(here.left)});
                relaxation_.change(group, units(here.left), +1);
            }
            bound_open(arc, units(here.left));
            if (arc.next != Plan::kEnd) {
                stack.push_back(here);
            } else {
                add_walk({relaxation_.bound(units(here.left)), units(here.left), here.visit},
                         lagrangian != nullptr, incumbent);
                leave_to(num_let_in);
            }
        };
        follow(plan_.start, Frame{.node = 0, .visit = kNoVisit, .left = capacity_}, 0);
        while (!stack.empty()) {
            if (lagrangian != nullptr && visits_.size() + walks_.size() > max_states_) {
                left_out_ = std::max(left_out_, lagrangian->floor_bound(lagrangian->best(plan_.start)));
                return;
            }
            const auto& [exclude, include] = plan_.nodes[stack.back().node];
            if (Frame& here = stack.back(); !here.one_done) {
                here.one_done = true;
                follow(here.include_first ? include : exclude, Frame(here), let_in_.size());
            } else {  // the last arc of the node: what it lets in leaves with what its node let in
                const Frame last = here;
                stack.pop_back();
                follow(last.include_first ? exclude : include, last, last.num_let_in);
            }
        }
    }

    /// Bounds the walks that were left out of the plan at an arc: as if what they reach were free to reach.
    void bound_open(const Plan::Arc& arc, std::int64_t capacity) {
        if (arc.open_begin == arc.open_end) return;
        for (const std::uint32_t group : plan_.open_groups_of(arc)) relaxation_.change(group, capacity, +1);
        left_out_ = std::max(left_out_, relaxation_.bound(capacity));
        for (const std::uint32_t group : plan_.open_groups_of(arc)) relaxation_.change(group, capacity, -1);
    }

    void add_walk(const Walk& walk, bool try_now, Incumbent& incumbent) {
        if (walk.bound <= incumbent.to_beat()) return;
        walks_.push_back(walk);
        if (try_now) try_greedily(walk, incumbent);
    }

    /// As long as there is work left for it. Returns whether there was.
    bool try_greedily(const Walk& walk, Incumbent& incumbent) {
        const std::size_t work = instance_.steps.size() + plan_.groups.size();
        if (work > greedy_work_left_) return false;
        greedy_work_left_ -= work;
        patience_.spend(work);
        improve_greedily(knapsack(walk), incumbent);
        return true;
    }

    void try_best_walks(Incumbent& incumbent) {
        std::ranges::stable_sort(walks_, std::ranges::greater{}, &Walk::bound);
        for (const Walk& walk : walks_) {
            if (walk.bound <= incumbent.to_beat() || !try_greedily(walk, incumbent)) break;
        }
    }

    const Instance& instance_;
    const Plan& plan_;
    std::int64_t capacity_;
    std::size_t max_states_;
    double few_walks_;
    std::size_t greedy_work_left_;
    Patience& patience_;
    Relaxation relaxation_;
    std::vector<Visit> visits_;
    std::vector<Walk> walks_;
    std::vector<LetIn> let_in_;
    std::int64_t left_out_ = 0;
};

}  // namespace

PlanChoice search_plan(const Plan& plan, std::span<const double> importance, std::int64_t capacity,
                       const SolveOptions& options, const Limits& limits,
                       std::span<const std::uint8_t> known) {
    const Instance instance = prepare(plan, importance, capacity);
    if (instance.steps.empty()) return {};

    Patience patience(options.interrupted);
    std::int64_t known_value = 0;
    for (std::size_t k = 0; k < known.size(); ++k)
        known_value += known[k] != 0 ? instance.tensor_values[k] : 0;
    Incumbent incumbent(instance.values, known_value);
    const std::size_t max_states =
        plan.has_open ? std::min(options.max_states, limits.max_open_states) : options.max_states;
    WalkSearch search(instance, capacity, max_states, limits, patience);
    std::int64_t bound = search.run(incumbent);
    const std::vector<Walk>& walks = search.walks();

    CoreSearch core(instance, max_states, limits.halve_at, patience);
    for (auto walk = walks.cbegin(); walk != walks.cend() && walk->bound > incumbent.to_beat(); ++walk) {
        patience.spend(instance.steps.size());
        const Knapsack knapsack = search.knapsack(*walk);
        improve_greedily(knapsack, incumbent);
        const std::int64_t walk_bound = std::min(walk->bound, core.run(knapsack, incumbent));
        if (walk_bound <= incumbent.to_beat()) continue;
        // The states ran out: the walks not searched are open up to their bounds, the next one's the highest.
        bound = std::max({bound, walk_bound, walk + 1 != walks.cend() ? (walk + 1)->bound : 0});
        break;
    }

    PlanChoice choice;
    if (incumbent.options().empty()) {
        for (std::uint32_t k = 0; k < known.size(); ++k) {
            if (known[k] != 0) choice.tensors.push_back(k);
        }
    }
    for (const std::uint32_t index : incumbent.options()) {
        const Option& option = instance.options[index];
        const std::span<const std::uint32_t> tensors = plan.tensors_of(plan.groups[option.group]);
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            if ((option.members >> i & 1) != 0) choice.tensors.push_back(tensors[i]);
        }
    }
    choice.optimal = bound <= incumbent.to_beat();
    choice.upper_bound = instance.values.upper(bound);
    return choice;
}

void check_request(std::span<const double> importance, std::size_t num_tensors, std::int64_t capacity) {
    if (importance.size() != num_tensors) {
        throw std::invalid_argument("importance has " + std::to_string(importance.size()) +
                                    " elements; expected " + std::to_string(num_tensors) + ", one a tensor");
    }
    if (capacity < 0) {
        throw std::invalid_argument("capacity is " + std::to_string(capacity) + "; expected 0 or more");
    }
    double worth = 0;
    for (std::size_t k = 0; k < num_tensors; ++k) {
        if (!std::isfinite(importance[k])) {
            throw std::invalid_argument("importance[" + std::to_string(k) + "] is " +
                                        std::to_string(importance[k]) + "; expected a finite number");
        }
        worth += std::max(importance[k], 0.0);
        if (!std::isfinite(worth)) {
            throw std::overflow_error("the sum of the positive importances overflows float64 at importance[" +
                                      std::to_string(k) + "]");
        }
    }
}

}  // namespace gtflops

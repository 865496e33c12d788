#include "closure_relaxation.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace gtflops {
namespace {

using Index = std::uint32_t;

/// Tensors with a supply and segments with a demand; what flows from a tensor to what it needs lowers both.
/// The flow is by levels (E. A. Dinic, Soviet Math. Doklady 11, 1970). Nodes are the tensors, then the
/// segments.
class Network {
  public:
    explicit Network(const ClosureCosts& closure)
        : num_tensors_(closure.num_tensors()),
          out_begin_{0},
          in_begin_(num_tensors_ + closure.num_segments() + 1),
          level_(num_tensors_ + closure.num_segments()),
          next_(level_.size()) {
        const auto add = [this](std::span<const Index> needs) {
            for (const Index s : needs) to_.push_back(static_cast<Index>(num_tensors_ + s));
            from_.insert(from_.end(), needs.size(), static_cast<Index>(out_begin_.size() - 1));
            out_begin_.push_back(to_.size());
        };
        for (std::size_t k = 0; k < num_tensors_; ++k) add(closure.needs_of_tensor(k));
        for (std::size_t s = 0; s < closure.num_segments(); ++s) add(closure.needs_of_segment(s));
        for (const Index node : to_) ++in_begin_[node + 1];
        for (std::size_t node = 1; node < in_begin_.size(); ++node) in_begin_[node] += in_begin_[node - 1];
        in_.resize(to_.size());
        std::vector<std::size_t> end(in_begin_.begin(), in_begin_.end() - 1);
        for (std::size_t arc = 0; arc < to_.size(); ++arc) in_[end[to_[arc]]++] = arc;
    }

    /// By node: what is left of the supply of tensors, and of the demand of segments.
    std::vector<std::int64_t> left;

    /// Finds the largest flow through `left`. `spend` is told each step; when it answers false the flow ends
    /// early, and so does this, with false.
    template <typename Spend>
    bool maximise(Spend spend) {
        flow_.assign(to_.size(), 0);
        while (find_levels(spend)) {
            std::ranges::fill(next_, 0);
            for (std::size_t k = 0; k < num_tensors_; ++k) {
                if (left[k] > 0 && !push_from(k, spend)) return false;
            }
        }
        return !ended_;
    }

    /// After the flow: whether a node is on the side of the supply that is left.
    bool reached(std::size_t node) const { return level_[node] >= 0; }

  private:
    /// The i-th arc that leads out of a node or, against its flow, into it.
    struct Residual {
        std::size_t arc;
        Index node;
        bool forward;
    };
    std::size_t num_arcs(std::size_t node) const {
        return out_begin_[node + 1] - out_begin_[node] + in_begin_[node + 1] - in_begin_[node];
    }
    Residual residual(std::size_t node, std::size_t i) const {
        const std::size_t num_out = out_begin_[node + 1] - out_begin_[node];
        if (i < num_out) return {out_begin_[node] + i, to_[out_begin_[node] + i], true};
        const std::size_t arc = in_[in_begin_[node] + i - num_out];
        return {arc, from_[arc], false};
    }
    bool open(const Residual& residual) const { return residual.forward || flow_[residual.arc] > 0; }

    /// The distances from the supply; whether there is demand in reach.
    template <typename Spend>
    bool find_levels(Spend spend) {
        std::ranges::fill(level_, -1);
        queue_.clear();
        for (std::size_t k = 0; k < num_tensors_; ++k) {
            if (left[k] == 0) continue;
            level_[k] = 0;
            queue_.push_back(static_cast<Index>(k));
        }
        bool demand = false;
        for (std::size_t i = 0; i < queue_.size(); ++i) {
            const Index node = queue_[i];
            demand = demand || (node >= num_tensors_ && left[node] > 0);
            ended_ = !spend(num_arcs(node));
            if (ended_) return false;
            for (std::size_t j = 0; j < num_arcs(node); ++j) {
                const Residual way = residual(node, j);
                if (level_[way.node] >= 0 || !open(way)) continue;
                level_[way.node] = level_[node] + 1;
                queue_.push_back(way.node);
            }
        }
        return demand;
    }

    /// Pushes what a tensor supplies along the levels, as far as there is a way. False when told to end.
    template <typename Spend>
    bool push_from(std::size_t tensor, Spend spend) {
        path_.clear();
        std::size_t node = tensor;
        while (left[tensor] > 0) {
            ended_ = !spend(1);
            if (ended_) return false;
            if (node >= num_tensors_ && left[node] > 0) {
                spend(path_.size());
                node = push_along_path(tensor, node);
            } else if (next_[node] < num_arcs(node)) {
                const Residual way = residual(node, next_[node]);
                if (level_[way.node] == level_[node] + 1 && open(way)) {
                    path_.push_back({way, static_cast<Index>(node)});
                    node = way.node;
                } else {
                    ++next_[node];
                }
            } else {
                if (path_.empty()) break;
                node = path_.back().from;
                path_.pop_back();
                ++next_[node];
            }
        }
        return true;
    }

    /// Returns the node to go on from: the end, or the start of the first arc that is used up.
    std::size_t push_along_path(std::size_t tensor, std::size_t end) {
        std::int64_t amount = std::min(left[tensor], left[end]);
        for (const Move& move : path_) {
            if (!move.way.forward) amount = std::min(amount, flow_[move.way.arc]);
        }
        left[tensor] -= amount;
        left[end] -= amount;
        for (const Move& move : path_) flow_[move.way.arc] += move.way.forward ? amount : -amount;
        const auto used_up =
            std::ranges::find_if(path_, [this](const Move& move) { return !open(move.way); });
        if (used_up == path_.end()) return end;
        const std::size_t from = used_up->from;
        path_.erase(used_up, path_.end());
        return from;
    }

    struct Move {
        Residual way;
        Index from;
    };

    std::size_t num_tensors_;
    std::vector<std::size_t> out_begin_, in_begin_;  // by node
    std::vector<Index> to_, from_;                   // by arc
    std::vector<std::size_t> in_;                    // arcs, by the node that they lead to
    std::vector<std::int64_t> flow_;                 // by arc
    std::vector<std::int32_t> level_;
    std::vector<std::size_t> next_;  // the arc of each node to look at next
    std::vector<Index> queue_;
    std::vector<Move> path_;
    bool ended_ = false;
};

class Relaxation {
  public:
    Relaxation(const ClosureCosts& closure, std::span<const double> importance, std::int64_t capacity,
               std::size_t max_work, Patience& patience)
        : closure_(closure),
          importance_(importance),
          capacity_(capacity),
          work_left_(max_work),
          patience_(patience),
          network_(closure),
          supply_(importance.size()),
          seen_(closure.num_segments()),
          up_(1 + 0x1p-52 * (0x1p12 + static_cast<double>(importance.size()))) {}

    RelaxedChoice run() {
        double worth = 0;
        for (const double value : importance_) worth += std::max(value, 0.0);
        bound_ = worth * up_;
        start();
        if (worth == 0) return {chosen_, 0};
        // Whole numbers that sum to about 2^52: sums of them are exact.
        shift_ = 52 - std::ilogb(worth);
        for (std::size_t k = 0; k < supply_.size(); ++k) {
            supply_[k] =
                static_cast<std::int64_t>(std::ceil(std::ldexp(std::max(importance_[k], 0.0), shift_)));
        }
        for (bool all = true; take_relaxed(all);) all = false;
        fill();
        const std::vector<std::uint8_t> relaxed = chosen_;
        start();
        fill();
        return {worth_of(relaxed) > worth_of(chosen_) ? relaxed : chosen_, bound_};
    }

  private:
    /// Past the rounding of some products.
    static constexpr double kDown = 1 - 0x1p-40;
    /// The share of the tensors that fit which is taken at a time.
    static constexpr std::size_t kPerRound = 16;

    struct Point {
        double worth;
        double cost;
        std::vector<Index> tensors;
    };

    bool spend(std::size_t steps) {
        patience_.spend(steps);
        work_left_ -= std::min(steps, work_left_);
        return work_left_ > 0;
    }

    void start() {
        chosen_.assign(importance_.size(), 0);
        paid_.assign(closure_.num_segments(), 0);
        left_ = capacity_;
    }

    double worth_of(std::span<const std::uint8_t> mask) const {
        double worth = 0;
        for (std::size_t k = 0; k < mask.size(); ++k) worth += mask[k] != 0 ? importance_[k] : 0;
        return worth;
    }

    /// What a tensor would add to the cost; more than what is left where it does not fit. Its segments are
    /// `queue_` if it does.
    std::int64_t added_cost(std::size_t tensor) {
        for (const Index s : queue_) seen_[s] = 0;
        queue_.clear();
        std::size_t num_visited = 1;
        const auto visit = [&](std::span<const Index> segments) {
            num_visited += segments.size();
            for (const Index s : segments) {
                if (paid_[s] != 0 || seen_[s] != 0) continue;
                seen_[s] = 1;
                queue_.push_back(s);
            }
        };
        visit(closure_.needs_of_tensor(tensor));
        std::int64_t cost = 0;
        for (std::size_t i = 0; i < queue_.size() && cost <= left_; ++i) {
            cost += closure_.cost(queue_[i]);
            visit(closure_.needs_of_segment(queue_[i]));
        }
        spend(num_visited);
        return cost;
    }

    bool take(std::size_t tensor) {
        const std::int64_t cost = added_cost(tensor);
        if (cost > left_) return false;
        for (const Index s : queue_) paid_[s] = 1;
        left_ -= cost;
        chosen_[tensor] = 1;
        return true;
    }

    /// Takes tensors by importance per cost that they add, until none fits.
    void fill() {
        std::vector<std::pair<double, Index>> candidates;
        do {
            candidates.clear();
            for (Index k = 0; k < supply_.size() && work_left_ > 0; ++k) {
                if (supply_[k] == 0 || chosen_[k] != 0) continue;
                const std::int64_t cost = added_cost(k);
                if (cost <= left_)
                    candidates.emplace_back(-static_cast<double>(supply_[k]) /
                                                static_cast<double>(std::max<std::int64_t>(cost, 1)),
                                            k);
            }
            std::ranges::sort(candidates);
            // What is paid for them makes others cheaper: only the best are taken before all are looked at
            // again.
            candidates.resize((candidates.size() + kPerRound - 1) / kPerRound);
            for (const auto& [density, tensor] : candidates) take(tensor);
        } while (!candidates.empty());
    }

    /// Takes what fits of a linear relaxation of what is left; `all`: that is everything, and so is bounded.
    /// Whether it found any.
    bool take_relaxed(bool all) {
        Point below{0, 0, {}};
        Point above{0, 0, {}};
        offered_.assign(supply_.size(), 0);
        const std::size_t enough = work_left_ / 2;
        for (Index k = 0; k < supply_.size(); ++k) {
            if (work_left_ == 0) return false;
            if (supply_[k] == 0 || chosen_[k] != 0) continue;
            // Where that takes long, the rest is offered whether it fits or not: the bound is weaker.
            if (work_left_ > enough && added_cost(k) > left_) continue;
            offered_[k] = 1;
            above.worth += static_cast<double>(supply_[k]);
            above.tensors.push_back(k);
        }
        const std::vector<std::uint8_t> reached = closure_.reached(offered_);
        std::int64_t cost = 0;
        for (std::size_t s = 0; s < reached.size(); ++s) {
            cost += reached[s] != 0 && paid_[s] == 0 ? closure_.cost(s) : 0;
        }
        above.cost = static_cast<double>(cost);
        if (cost <= left_) {
            below = above;
            if (all) lower_bound_to(above.worth);
        }
        while (cost > left_) {
            // Demands are rounded down, by which the dearer selection may be worth less; a price is never
            // negative.
            const double price = std::max(0.0, (above.worth - below.worth) / (above.cost - below.cost));
            const double attained = below.worth + price * (static_cast<double>(left_) - below.cost);
            Point between{0, 0, {}};
            const bool complete = solve(price, between);
            double bound = price * static_cast<double>(left_) * up_ + 1;
            for (std::size_t k = 0; k < supply_.size(); ++k) bound += static_cast<double>(network_.left[k]);
            if (all) lower_bound_to(bound);
            if (!complete || bound <= attained * (1 + 1e-9) || between.cost <= below.cost ||
                between.cost >= above.cost)
                break;
            (between.cost <= static_cast<double>(left_) ? below : above) = std::move(between);
        }
        bool any = false;
        for (const Index k : below.tensors) any = take(k) || any;
        return any;
    }

    void lower_bound_to(double bound) { bound_ = std::min(bound_, std::ldexp(bound * up_, -shift_)); }

    /// The best selection of those offered at a price. False if the work ran out.
    bool solve(double price, Point& best) {
        network_.left.assign(supply_.size() + paid_.size(), 0);
        std::int64_t* const left = network_.left.data();
        constexpr double kMost = 0x1p60;  // more than all supply
        for (std::size_t k = 0; k < supply_.size(); ++k) left[k] = offered_[k] != 0 ? supply_[k] : 0;
        for (std::size_t s = 0; s < paid_.size(); ++s) {
            const double cost = price * static_cast<double>(closure_.cost(s)) * kDown;
            left[supply_.size() + s] = paid_[s] != 0 ? 0 : static_cast<std::int64_t>(std::min(cost, kMost));
        }
        if (!network_.maximise([this](std::size_t steps) { return spend(steps); })) return false;
        for (Index k = 0; k < supply_.size(); ++k) {
            if (offered_[k] == 0 || !network_.reached(k)) continue;
            best.worth += static_cast<double>(supply_[k]);
            best.tensors.push_back(k);
        }
        for (std::size_t s = 0; s < paid_.size(); ++s) {
            if (paid_[s] == 0 && network_.reached(supply_.size() + s))
                best.cost += static_cast<double>(closure_.cost(s));
        }
        return true;
    }

    const ClosureCosts& closure_;
    std::span<const double> importance_;
    std::int64_t capacity_;
    std::size_t work_left_;
    Patience& patience_;
    Network network_;
    int shift_ = 0;
    double bound_ = 0;
    std::vector<std::int64_t> supply_;   // by tensor: its importance
    std::vector<std::uint8_t> offered_;  // by tensor: it fits
    std::vector<std::uint8_t> chosen_;   // by tensor
    std::vector<std::uint8_t> paid_;     // by segment
    std::int64_t left_ = 0;              // of the capacity
    std::vector<std::uint8_t> seen_;     // by segment: it is in `queue_`
    std::vector<Index> queue_;
    double up_;  // past the rounding of some products, and of a sum of all importances
};

}  // namespace

RelaxedChoice relax_closure(const ClosureCosts& closure, std::span<const double> importance,
                            std::int64_t capacity, std::size_t max_work, Patience& patience) {
    return Relaxation(closure, importance, capacity, max_work, patience).run();
}

}  // namespace gtflops

#pragma once

#include <cstddef>

namespace gtflops {

/// When the solver changes its ways. Any values give correct answers; tests force the rare ways with small
/// ones.
struct Limits {
    /// On planning a graph: an effort of under a second.
    std::size_t max_plan_work = 50'000'000;

    /// On the segments of a block that is planned: sets of all their pairs, and a recursion over them, are
    /// kept small enough for any stack.
    std::size_t max_block_size = 4096;

    /// On the linear relaxation of a graph that is not planned to its end: an effort of some tenths of a
    /// second.
    std::size_t max_relaxation_work = 100'000'000;

    /// The most walks whose bounds are all computed, or as many for each node of the plan if that is more;
    /// still more are enumerated under a Lagrangian bound.
    double few_walks = 20'000;
    double few_walks_per_node = 4;

    /// On recorded partial selections, and walks, where the plan leaves others out: a search to its end would
    /// rarely prove anything. An effort of about a second.
    std::size_t max_open_states = std::size_t{1} << 22;

    /// On trying walks greedily, in steps looked at: an effort of some tens of milliseconds.
    std::size_t max_greedy_work = std::size_t{1} << 24;

    /// How long a list of partial selections is when a second one is first tried; again whenever it is four
    /// times as long.
    std::size_t halve_at = std::size_t{1} << 7;
};

}  // namespace gtflops

#pragma once

#include <cstdint>
#include <span>

#include "gtflops/chain_knapsack.hpp"
#include "gtflops/closure.hpp"
#include "gtflops/solution.hpp"
#include "limits.hpp"
#include "plan.hpp"

// What the public entries call, with limits that tests can tighten.

namespace gtflops {

Solution solve_chain(const ChainProblem& problem, const SolveOptions& options, const Limits& limits);

/// `plan` is that of the graph that `closure` prices.
Solution solve_graph(const Plan& plan, const ClosureCosts& closure, std::span<const double> importance,
                     std::int64_t capacity, const SolveOptions& options, const Limits& limits);

}  // namespace gtflops

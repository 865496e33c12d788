#include "gtflops/graph_knapsack.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "closure_relaxation.hpp"
#include "graph_plan.hpp"
#include "patience.hpp"
#include "plan_search.hpp"
#include "solve.hpp"

namespace gtflops {
namespace {

IndexRows within_limit(IndexRows rows, const char* rows_of) {
    if (rows.offsets.size() <= Plan::kMaxSize + 1) return rows;
    throw std::invalid_argument("more than 2^28 " + std::string(rows_of) + " are not supported");
}

}  // namespace

GraphKnapsack::GraphKnapsack(IndexRows dependencies, IndexRows tensor_segments,
                             std::span<const std::int64_t> costs)
    : closure_(within_limit(dependencies, "segments"), within_limit(tensor_segments, "tensors"), costs, 1),
      plan_(std::make_shared<const Plan>(plan_graph(dependencies, tensor_segments, costs))) {}

Solution solve_graph(const Plan& plan, const ClosureCosts& closure, std::span<const double> importance,
                     std::int64_t capacity, const SolveOptions& options, const Limits& limits) {
    const std::size_t num_tensors = closure.num_tensors();
    check_request(importance, num_tensors, capacity);
    std::vector<std::uint8_t> known;
    double bound = std::numeric_limits<double>::infinity();
    if (plan.has_open) {
        Patience patience(options.interrupted);
        RelaxedChoice relaxed =
            relax_closure(closure, importance, capacity, limits.max_relaxation_work, patience);
        known = std::move(relaxed.mask);
        bound = relaxed.upper_bound;
    }
    const PlanChoice choice = search_plan(plan, importance, capacity, options, limits, known);
    Solution solution{std::vector<std::uint8_t>(num_tensors), 0, 0, 0, choice.optimal};
    for (const std::uint32_t tensor : choice.tensors) solution.mask[tensor] = 1;
    for (std::size_t k = 0; k < num_tensors; ++k) solution.value += solution.mask[k] != 0 ? importance[k] : 0;
    solution.cost = closure.costs(solution.mask, 1)[0];
    solution.upper_bound =
        choice.optimal ? solution.value : std::max(solution.value, std::min(bound, choice.upper_bound));
    return solution;
}

Solution GraphKnapsack::solve(std::span<const double> importance, std::int64_t capacity,
                              const SolveOptions& options) const {
    return solve_graph(*plan_, closure_, importance, capacity, options, Limits{});
}

}  // namespace gtflops

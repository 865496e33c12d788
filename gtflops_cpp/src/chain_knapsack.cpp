#include "gtflops/chain_knapsack.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "plan.hpp"
#include "plan_search.hpp"
#include "solve.hpp"

namespace gtflops {
namespace {

void check(const ChainProblem& problem) {
    const std::size_t n = problem.dw.size();
    if (problem.dy.size() != n || problem.importance.size() != n) {
        throw std::invalid_argument("dw, dy and importance have " + std::to_string(n) + ", " +
                                    std::to_string(problem.dy.size()) + " and " +
                                    std::to_string(problem.importance.size()) +
                                    " elements; expected one element a tensor in each");
    }
    if (n > Plan::kMaxSize) throw std::invalid_argument("more than 2^28 tensors are not supported");
    std::int64_t cost = 0;
    for (std::size_t k = 0; k < n; ++k) {
        for (const auto& [name, value] : {std::pair{"dw", problem.dw[k]}, std::pair{"dy", problem.dy[k]}}) {
            const auto where = [&, name = name] { return std::string(name) + '[' + std::to_string(k) + ']'; };
            if (value < 0) {
                throw std::invalid_argument(where() + " is " + std::to_string(value) +
                                            "; expected 0 or more");
            }
            if (value > std::numeric_limits<std::int64_t>::max() - cost) {
                throw std::overflow_error("sum(dw) + sum(dy) does not fit int64: it overflows at " + where());
            }
            cost += value;
        }
    }
    check_request(problem.importance, n, problem.capacity);
}

/// A walk goes down the chain and stops somewhere. Tensors in a row that add no activation gradient share a
/// node.
Plan plan_of(const ChainProblem& problem) {
    Plan plan;
    std::vector<Plan::Arc> stretches{{}};  // down the chain; the first is free
    std::int64_t left = problem.capacity;
    for (std::size_t k = 0; k < problem.dw.size() && problem.dy[k] <= left; ++k) {
        left -= problem.dy[k];
        if (problem.dy[k] > 0) {
            stretches.push_back(
                {.cost = problem.dy[k], .groups_begin = static_cast<std::uint32_t>(plan.groups.size())});
        }
        if (problem.importance[k] > 0 && problem.dw[k] <= left) {
            const Plan::Piece piece{problem.dw[k], 1};
            const auto tensor = static_cast<std::uint32_t>(k);
            plan.arc_groups.push_back(plan.add_group({&tensor, 1}, {&piece, 1}));
        }
        stretches.back().groups_end = static_cast<std::uint32_t>(plan.groups.size());
    }
    for (; stretches.size() > 1; stretches.pop_back()) {
        Plan::Arc& arc = stretches.back();
        arc.next = plan.nodes.empty() ? Plan::kEnd : static_cast<std::uint32_t>(plan.nodes.size() - 1);
        plan.nodes.push_back({.exclude = {}, .include = arc});
    }
    plan.start = stretches.front();
    plan.start.next = plan.nodes.empty() ? Plan::kEnd : static_cast<std::uint32_t>(plan.nodes.size() - 1);
    return plan;
}

Solution summed(const ChainProblem& problem, const PlanChoice& choice) {
    const std::size_t n = problem.dw.size();
    Solution solution{std::vector<std::uint8_t>(n), 0, 0, choice.upper_bound, choice.optimal};
    for (const std::uint32_t tensor : choice.tensors) solution.mask[tensor] = 1;
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
    solution.upper_bound = solution.optimal ? solution.value : std::max(solution.value, choice.upper_bound);
    return solution;
}

}  // namespace

Solution solve_chain(const ChainProblem& problem, const SolveOptions& options, const Limits& limits) {
    check(problem);
    return summed(problem,
                  search_plan(plan_of(problem), problem.importance, problem.capacity, options, limits));
}

Solution solve_chain(const ChainProblem& problem, const SolveOptions& options) {
    return solve_chain(problem, options, Limits{});
}

}  // namespace gtflops

#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "gtflops/solution.hpp"
#include "limits.hpp"
#include "plan.hpp"

namespace gtflops {

/// The best choice that a plan offers.
struct PlanChoice {
    std::vector<std::uint32_t> tensors;  // in no order
    double upper_bound = 0;              // no choice is worth more; only where not `optimal`
    bool optimal = true;
};

/// The most important tensors that any walk of the plan makes available within the capacity.
///
/// `known`: a choice known before, one byte a tensor, or empty; it is the answer unless there is a better
/// one. `importance` is finite and its positive elements have a finite sum; the costs of the plan sum, along
/// any walk, to what fits int64. Throws `Interrupted`.
PlanChoice search_plan(const Plan& plan, std::span<const double> importance, std::int64_t capacity,
                       const SolveOptions& options, const Limits& limits,
                       std::span<const std::uint8_t> known = {});

/// What both forms ask of importance and capacity: std::invalid_argument or std::overflow_error names the
/// element that does not meet it.
void check_request(std::span<const double> importance, std::size_t num_tensors, std::int64_t capacity);

}  // namespace gtflops

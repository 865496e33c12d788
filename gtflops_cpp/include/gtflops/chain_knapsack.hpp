#pragma once

#include <cstdint>
#include <span>

#include "gtflops/solution.hpp"

namespace gtflops {

/// Which tensors to train under a budget, in the chain form. Tensors are in backward order, index 0 nearest
/// to the loss. A selection S costs its weight gradients and every activation gradient down to its deepest
/// tensor:
///
///     sum of dw[k] over k in S  +  sum of dy[j] over j <= max(S)      (the empty selection costs 0)
///
/// and is worth the sum of its importances.
struct ChainProblem {
    std::span<const std::int64_t> dw;    // FLOPs, 0 or more
    std::span<const std::int64_t> dy;    // FLOPs, 0 or more
    std::span<const double> importance;  // finite; a tensor with 0 or less is never selected
    std::int64_t capacity;               // FLOPs, 0 or more
};

/// The best selection that costs at most the capacity.
///
/// Costs are used as given, without quantisation. Importances become 62-bit fixed point, with one power of
/// two for all, so that every comparison is exact: rounding moves the sum of n importances by less than n /
/// 2^59 of the total of the positive ones, less than summing them as doubles may. The search ends where no
/// selection is worth more by a difference that a sum of n doubles can tell, n / 2^53 of the value. Where
/// several selections are best, the same one is returned on every run and every machine; docs/solver.md says
/// which.
///
/// Throws std::invalid_argument on malformed input, std::overflow_error where sum(dw) + sum(dy), or the sum
/// of the positive importances, is out of range, `Interrupted` when asked to stop.
Solution solve_chain(const ChainProblem& problem, const SolveOptions& options = {});

}  // namespace gtflops

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "gtflops/closure.hpp"
#include "gtflops/solution.hpp"

namespace gtflops {

struct Plan;

/// Which tensors to train under a budget, in the graph form: a selection costs the segments of the backward
/// pass that its gradients need (`ClosureCosts`), each once, and is worth the sum of its importances.
///
/// The structure of the graph is worked out once, here; each solve takes other importances and another
/// capacity. Immutable, so that any number of threads may solve one object.
class GraphKnapsack {
  public:
    /// `dependencies` and `tensor_segments` as for `ClosureCosts`; `costs`: one cost a segment, 0 or more.
    ///
    /// Throws std::invalid_argument on malformed input, std::overflow_error where the sum of the costs does
    /// not fit int64.
    GraphKnapsack(IndexRows dependencies, IndexRows tensor_segments, std::span<const std::int64_t> costs);

    std::size_t num_segments() const { return closure_.num_segments(); }
    std::size_t num_tensors() const { return closure_.num_tensors(); }

    /// The best selection that costs at most the capacity.
    ///
    /// `importance`: one finite number a tensor; a tensor with 0 or less is never selected.
    ///
    /// Throws as `solve_chain` does.
    Solution solve(std::span<const double> importance, std::int64_t capacity,
                   const SolveOptions& options = {}) const;

  private:
    ClosureCosts closure_;
    std::shared_ptr<const Plan> plan_;  // how the graph is searched; shared by copies
};

}  // namespace gtflops

#pragma once

#include <cstdint>
#include <span>

#include "gtflops/closure.hpp"
#include "limits.hpp"
#include "plan.hpp"

namespace gtflops {

/// The plan of a graph. Arguments as for `GraphKnapsack`, already checked.
///
/// What is needed by all that comes after it is a *cut*: between cuts the graph falls into blocks, and a walk
/// pays whole blocks until it stops inside one. O(segments + dependencies) where every shared segment is a
/// cut or cuts return once a few are decided; a block without that structure is planned until a limit on
/// work, and what is left of it then is open (`Plan::Arc::open_begin`).
Plan plan_graph(IndexRows dependencies, IndexRows tensor_segments, std::span<const std::int64_t> costs,
                const Limits& limits = {});

}  // namespace gtflops

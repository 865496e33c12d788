#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "gtflops/closure.hpp"
#include "patience.hpp"

namespace gtflops {

struct RelaxedChoice {
    std::vector<std::uint8_t> mask;  // within the capacity; not proved
    double upper_bound;              // of every selection within it
};

/// A good selection, and a bound, for any graph: by the linear relaxation instead of a plan.
///
/// With a price on cost the best selection is a closure of maximum weight, which is a minimum cut (J.-C.
/// Picard, Management Science 22(11), 1976). The price is found from both sides, as where the lines of a
/// selection that fits and one that does not cross; the bound at the last price is that of the linear
/// relaxation. What fits is taken, and the rest relaxed again with what is left of the capacity.
///
/// Ends, with what it has, after about `max_work` steps. Throws `Interrupted`.
RelaxedChoice relax_closure(const ClosureCosts& closure, std::span<const double> importance,
                            std::int64_t capacity, std::size_t max_work, Patience& patience);

}  // namespace gtflops

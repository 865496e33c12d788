#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

namespace gtflops {

struct SolveOptions {
    /// How many partial selections may be recorded in one solve: the limit on memory (up to about 60 bytes
    /// each), and, as each may be looked at 16 times on average, on time. Instances from models need a few
    /// thousand.
    std::size_t max_states = 20'000'000;

    /// Asked every few milliseconds; true ends the solve with `Interrupted`.
    std::function<bool()> interrupted;
};

struct Solution {
    std::vector<std::uint8_t> mask;  // 1: selected
    double value;                    // sum of the selected importances, in index order
    std::int64_t cost;               // what the selection costs; never more than the capacity
    double upper_bound;              // no selection is worth more; equal to `value` when `optimal`
    bool optimal;                    // proved; false where `max_states` or the limit on planning was met
};

class Interrupted : public std::runtime_error {
  public:
    Interrupted() : std::runtime_error("interrupted") {}
};

}  // namespace gtflops

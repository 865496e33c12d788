#include "gtflops/graph_knapsack.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

namespace gtflops {

GraphKnapsack::GraphKnapsack(IndexRows dependencies, IndexRows tensor_segments,
                             std::span<const std::int64_t> costs)
    : closure_(dependencies, tensor_segments, costs, 1) {}

// A placeholder until the search lands: exact to 16 tensors, greedy beyond.
Solution GraphKnapsack::solve(std::span<const double> importance, std::int64_t capacity,
                              const SolveOptions&) const {
    const std::size_t n = num_tensors();
    if (importance.size() != n) throw std::invalid_argument("importance has another number of elements");
    if (capacity < 0) throw std::invalid_argument("capacity is negative; expected 0 or more");
    Solution best{std::vector<std::uint8_t>(n), 0, 0, 0, n <= 16};
    const auto consider = [&](const std::vector<std::uint8_t>& mask) {
        double value = 0;
        for (std::size_t k = 0; k < n; ++k) value += mask[k] != 0 ? importance[k] : 0;
        const std::int64_t cost = closure_.costs(mask, 1)[0];
        if (cost > capacity || value <= best.value) return false;
        best.mask = mask;
        best.value = value;
        best.cost = cost;
        return true;
    };
    if (n <= 16) {
        for (std::size_t subset = 0; subset < std::size_t{1} << n; ++subset) {
            std::vector<std::uint8_t> mask(n);
            for (std::size_t k = 0; k < n; ++k) mask[k] = subset >> k & 1;
            bool positive = true;
            for (std::size_t k = 0; k < n; ++k) positive = positive && (mask[k] == 0 || importance[k] > 0);
            if (positive) consider(mask);
        }
        best.upper_bound = best.value;
        return best;
    }
    for (std::size_t k = 0; k < n; ++k) {
        if (importance[k] <= 0) continue;
        std::vector<std::uint8_t> mask = best.mask;
        mask[k] = 1;
        consider(mask);
    }
    for (const double value : importance) best.upper_bound += std::max(value, 0.0);
    return best;
}

}  // namespace gtflops

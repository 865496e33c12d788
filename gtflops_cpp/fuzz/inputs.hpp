#pragma once

#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <vector>

#include "reference.hpp"

// What the fuzz targets share: instances out of the fuzzer's bytes, and what is to be said of any instance.

namespace fuzz {

using Bytes = FuzzedDataProvider;

constexpr std::int64_t kMaxInt64 = std::numeric_limits<std::int64_t>::max();

/// Draws from 0 to n - 1.
inline auto below(Bytes& bytes) {
    return [&bytes](std::int64_t n) { return bytes.ConsumeIntegralInRange<std::int64_t>(0, n - 1); };
}

/// Any int64, the limits and small ones more often than others.
inline std::int64_t any_integer(Bytes& bytes) {
    const auto near = bytes.ConsumeIntegralInRange<std::int64_t>(-2, 12);
    switch (bytes.ConsumeIntegralInRange(0, 3)) {
        case 0:
            return kMaxInt64 - 12 + near;
        case 1:
            return bytes.ConsumeIntegral<std::int64_t>();
        default:
            return near;
    }
}

/// Any double, the special ones included.
inline double any_number(Bytes& bytes) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
    constexpr double kMax = std::numeric_limits<double>::max();
    switch (bytes.ConsumeIntegralInRange(0, 3)) {
        case 0:
            return bytes.PickValueInArray({kInfinity, -kInfinity, kNan, kMax, -kMax, 5e-324, -0.0});
        case 1:
            return bytes.ConsumeFloatingPoint<double>();
        default:
            return bytes.ConsumeIntegralInRange(-2, 12);
    }
}

/// A well-formed one: small whole numbers, so that sums are exact, or numbers of any size and their rounding.
struct Importance {
    std::vector<double> values;
    double rounding = 0;  // by how much sums of them may be off

    Importance(Bytes& bytes, std::size_t size) {
        const bool whole = bytes.ConsumeBool();
        const double largest = bytes.PickValueInArray({1.0, 1e-320, 1e300});
        for (std::size_t k = 0; k < size; ++k) {
            values.push_back(whole ? bytes.ConsumeIntegralInRange(-2, 40)
                                   : bytes.ConsumeFloatingPointInRange(-largest / 8, largest));
            // 2^-46: of at most 64 numbers, and each sum rounds by half of 2^-52 at most
            if (!whole) rounding += std::ldexp(std::max(values.back(), 0.0), -46);
        }
        if (!whole) rounding += std::numeric_limits<double>::denorm_min();
    }
};

inline bool finite(std::span<const double> numbers) {
    return std::ranges::all_of(numbers, [](double number) { return std::isfinite(number); });
}

inline bool worth_overflows(std::span<const double> importance) {
    double sum = 0;
    for (const double value : importance) sum += std::max(0.0, value);  // in this order NaN counts as 0
    return std::isinf(sum);
}

inline bool non_negative(std::span<const std::int64_t> costs) {
    return std::ranges::all_of(costs, [](std::int64_t cost) { return cost >= 0; });
}

inline bool sum_overflows(std::initializer_list<std::span<const std::int64_t>> all) {
    long double sum = 0;  // its 64 bits of mantissa hold the sum until far beyond the limit
    for (const auto& costs : all) {
        for (const std::int64_t cost : costs)
            sum += static_cast<long double>(std::max<std::int64_t>(cost, 0));
    }
    return sum > static_cast<long double>(kMaxInt64);
}

/// Whether the action ran to its end. It must where the input is well-formed, and be refused as documented
/// where it is not; any other exception ends the fuzzer.
template <typename Action>
bool accepted(bool malformed, bool overflowing, Action action) {
    try {
        action();
    } catch (const std::invalid_argument&) {
        CHECK(malformed);
        return false;
    } catch (const std::overflow_error&) {
        CHECK(overflowing);
        return false;
    }
    CHECK(!malformed && !overflowing);
    return true;
}

/// Changes, adds or removes an element.
inline void corrupt(Bytes& bytes, std::vector<std::int64_t>& values) {
    switch (bytes.ConsumeIntegralInRange(0, 3)) {
        case 0:
            values.push_back(any_integer(bytes));
            break;
        case 1:
            if (!values.empty()) values.pop_back();
            break;
        default:
            if (values.empty()) break;
            values[bytes.ConsumeIntegralInRange<std::size_t>(0, values.size() - 1)] = any_integer(bytes);
    }
}

inline void corrupt(Bytes& bytes, reference::Graph& graph) {
    for (int i = bytes.ConsumeIntegralInRange(0, 3); i > 0; --i) {
        std::vector<std::int64_t>* const parts[]{&graph.dependencies.offsets, &graph.dependencies.values,
                                                 &graph.tensors.offsets, &graph.tensors.values, &graph.costs};
        corrupt(bytes, *bytes.PickValueInArray(parts));
    }
}

inline bool well_formed(const reference::Rows& rows, std::size_t num_segments) {
    return !rows.offsets.empty() && rows.offsets.front() == 0 && std::ranges::is_sorted(rows.offsets) &&
           rows.offsets.back() == static_cast<std::int64_t>(rows.values.size()) &&
           std::ranges::all_of(rows.values, [&](std::int64_t segment) {
               return segment >= 0 && segment < static_cast<std::int64_t>(num_segments);
           });
}

inline bool well_formed(const reference::Graph& graph, std::size_t num_columns) {
    if (graph.dependencies.offsets.empty()) return false;
    const std::size_t num_segments = graph.num_segments();
    if (!well_formed(graph.dependencies, num_segments) || !well_formed(graph.tensors, num_segments))
        return false;
    for (std::size_t i = 0; i < num_segments; ++i) {
        for (const std::int64_t needed : graph.dependencies[i]) {
            if (needed >= static_cast<std::int64_t>(i)) return false;
        }
    }
    if (num_segments == 0 || num_columns > graph.costs.size()) {
        if (!graph.costs.empty() || (num_segments != 0 && num_columns != 0)) return false;
    } else if (graph.costs.size() != num_columns * num_segments) {
        return false;
    }
    return non_negative(graph.costs);
}

/// What holds of a solution of a small instance, against every other selection. `limited`: the solver had a
/// limit on states that may have stopped it.
template <typename Form>
void check_against_brute_force(const gtflops::Solution& solution, bool limited, const Form& form,
                               const Importance& importance, std::int64_t capacity) {
    reference::check_solution(solution, form, importance.values, capacity);
    const double best = reference::best_worth(form, importance.values, capacity);
    CHECK(solution.upper_bound >= best - importance.rounding);
    CHECK(solution.optimal || limited);
    if (solution.optimal) CHECK(solution.value >= best - importance.rounding);
    if (importance.rounding == 0) CHECK(solution.optimal == (solution.upper_bound == solution.value));
}

/// What holds of two solutions of one instance by different means, and of a selection that fits.
inline void check_bounds(const gtflops::Solution& one, const gtflops::Solution& other, double attainable,
                         double rounding) {
    const double attained = std::max({one.value, other.value, attainable}) - rounding;
    CHECK(one.upper_bound >= attained && other.upper_bound >= attained);
}

}  // namespace fuzz

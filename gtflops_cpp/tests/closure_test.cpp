#include "gtflops/closure.hpp"

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "check.hpp"

namespace {

using gtflops::ClosureCosts;
using Indices = std::vector<std::int64_t>;

// A diamond, 3 -> {1, 2} -> 0, and a segment 4 on its own. Tensor 0 needs segment 1, tensor 1 segment 3,
// tensor 2 segments 0 and 4, tensor 3 nothing.
const Indices kDependencyOffsets{0, 0, 1, 2, 4, 4};
const Indices kDependencies{0, 0, 1, 2};
const Indices kTensorOffsets{0, 1, 2, 4, 4};
const Indices kTensorSegments{1, 3, 0, 4};
const Indices kCosts{1, 10, 100, 1000, 10000, 5, 4, 3, 2, 1};

ClosureCosts closure(const Indices& dependency_offsets = kDependencyOffsets,
                     const Indices& dependencies = kDependencies,
                     const Indices& tensor_offsets = kTensorOffsets,
                     const Indices& tensor_segments = kTensorSegments, const Indices& costs = kCosts) {
    return {{dependency_offsets, dependencies}, {tensor_offsets, tensor_segments}, costs, 2};
}

void shared_segments_are_paid_once() {
    const ClosureCosts diamond = closure();
    CHECK(diamond.num_segments() == 5 && diamond.num_tensors() == 4 && diamond.num_columns() == 2);
    const std::vector<std::uint8_t> masks{0, 0, 0, 1, /**/ 1, 0, 0, 0, /**/ 0, 1, 0, 0, /**/ 1, 1, 1, 1};
    CHECK((diamond.costs(masks, 4) == Indices{0, 0, 11, 9, 1111, 14, 11111, 15}));
    const std::vector<std::uint8_t> first{1, 0, 0, 0};
    CHECK((diamond.reached(first) == std::vector<std::uint8_t>{1, 1, 0, 0, 0}));
}

void an_empty_graph_costs_nothing() {
    const Indices offsets{0};
    const Indices none;
    const ClosureCosts empty({offsets, none}, {offsets, none}, none, 2);
    CHECK((empty.costs({}, 1) == Indices{0, 0}));
    CHECK(empty.reached({}).empty());
    constexpr std::size_t kMany = std::numeric_limits<std::size_t>::max();
    CHECK(ClosureCosts({offsets, none}, {offsets, none}, none, kMany).num_columns() == kMany);
}

void malformed_input_is_refused() {
    const auto refused = [](const char* text, auto... arguments) {
        return throws<std::invalid_argument>(text, [&] { closure(arguments...); });
    };
    CHECK(refused("dependency_offsets is empty", Indices{}));
    CHECK(refused("dependency_offsets[0] is 1", Indices{1, 1, 1, 2, 4, 4}));
    CHECK(refused("dependency_offsets[3] is 1, less", Indices{0, 0, 2, 1, 4, 4}));
    CHECK(refused("dependencies has 4 elements; expected 3", Indices{0, 0, 1, 2, 3, 3}));
    CHECK(refused("dependencies[1] is -1", kDependencyOffsets, Indices{0, -1, 1, 2}));
    CHECK(refused("dependencies[1] is 5", kDependencyOffsets, Indices{0, 5, 1, 2}));
    CHECK(refused("segment 2 depends on segment 2", kDependencyOffsets, Indices{0, 2, 1, 2}));
    CHECK(refused("tensor_segments[0] is 9", kDependencyOffsets, kDependencies, kTensorOffsets,
                  Indices{9, 3, 0, 4}));
    CHECK(refused("costs has 1 elements; expected 10", kDependencyOffsets, kDependencies, kTensorOffsets,
                  kTensorSegments, Indices{1}));
    CHECK(refused("costs[1, 4] is -1", kDependencyOffsets, kDependencies, kTensorOffsets, kTensorSegments,
                  Indices{1, 1, 1, 1, 1, 1, 1, 1, 1, -1}));
    CHECK(throws<std::invalid_argument>("mask has 1 elements; expected 4",
                                        [] { closure().costs(std::vector<std::uint8_t>{1}, 1); }));
    CHECK(throws<std::invalid_argument>("mask has 1 elements; expected 4",
                                        [] { closure().reached(std::vector<std::uint8_t>{1}); }));
}

void a_column_that_could_overflow_is_refused() {
    constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
    closure(kDependencyOffsets, kDependencies, kTensorOffsets, kTensorSegments,
            {0, 0, 0, 0, 0, kMax, 0, 0, 0, 0});
    CHECK(throws<std::overflow_error>("the sum of costs[1, :]", [] {
        closure(kDependencyOffsets, kDependencies, kTensorOffsets, kTensorSegments,
                {0, 0, 0, 0, 0, kMax, 0, 0, 0, 1});
    }));
}

}  // namespace

int main() {
    shared_segments_are_paid_once();
    an_empty_graph_costs_nothing();
    malformed_input_is_refused();
    a_column_that_could_overflow_is_refused();
}

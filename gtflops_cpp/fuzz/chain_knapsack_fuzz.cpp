#include <cstdint>
#include <vector>

#include "gtflops/chain_knapsack.hpp"
#include "inputs.hpp"

namespace {

using fuzz::Bytes;
using gtflops::Solution;
using gtflops::solve_chain;
using reference::Chain;

Chain make_chain(Bytes& bytes, std::size_t num_tensors) {
    Chain chain;
    // With 64 tensors at most, sums fit.
    const auto largest = bytes.PickValueInArray<std::int64_t>({1, 9, 1'000'000'000, fuzz::kMaxInt64 / 128});
    for (std::size_t k = 0; k < num_tensors; ++k) {
        chain.dw.push_back(bytes.ConsumeIntegralInRange<std::int64_t>(0, largest));
        chain.dy.push_back(bytes.ConsumeBool() ? bytes.ConsumeIntegralInRange<std::int64_t>(0, largest) : 0);
    }
    return chain;
}

std::int64_t capacity_of(Bytes& bytes, const Chain& chain) {
    const std::int64_t all = chain.cost(reference::Mask(chain.num_tensors(), 1));
    return bytes.ConsumeIntegralInRange<std::int64_t>(0, all + 1);
}

void any_input(Bytes& bytes) {
    Chain chain = make_chain(bytes, bytes.ConsumeIntegralInRange<std::size_t>(0, 8));
    std::vector<double> importance;
    for (std::size_t k = 0; k < chain.dw.size(); ++k) importance.push_back(fuzz::any_number(bytes));
    for (int i = bytes.ConsumeIntegralInRange(0, 3); i > 0; --i) {
        fuzz::corrupt(bytes, bytes.ConsumeBool() ? chain.dw : chain.dy);
    }
    const std::int64_t capacity = fuzz::any_integer(bytes);

    const bool malformed = chain.dw.size() != importance.size() || chain.dy.size() != importance.size() ||
                           !fuzz::non_negative(chain.dw) || !fuzz::non_negative(chain.dy) ||
                           !fuzz::finite(importance) || capacity < 0;
    const bool overflowing = fuzz::sum_overflows({chain.dw, chain.dy}) || fuzz::worth_overflows(importance);
    Solution solution;
    if (fuzz::accepted(malformed, overflowing,
                       [&] { solution = solve_chain({chain.dw, chain.dy, importance, capacity}); })) {
        reference::check_solution(solution, chain, importance, capacity);
    }
}

void small_instance(Bytes& bytes) {
    const Chain chain = make_chain(bytes, bytes.ConsumeIntegralInRange<std::size_t>(0, 9));
    const fuzz::Importance importance(bytes, chain.num_tensors());
    const std::int64_t capacity = capacity_of(bytes, chain);
    const bool limited = bytes.ConsumeBool();
    gtflops::SolveOptions options;
    if (limited) options.max_states = bytes.ConsumeIntegralInRange<std::size_t>(0, 20);
    const Solution solution = solve_chain({chain.dw, chain.dy, importance.values, capacity}, options);
    fuzz::check_against_brute_force(solution, limited, chain, importance, capacity);
}

void large_instance(Bytes& bytes) {
    const Chain chain = make_chain(bytes, bytes.ConsumeIntegralInRange<std::size_t>(10, 60));
    const fuzz::Importance importance(bytes, chain.num_tensors());
    const std::int64_t capacity = capacity_of(bytes, chain);
    const auto solve = [&](std::size_t max_states) {
        const Solution solution = solve_chain({chain.dw, chain.dy, importance.values, capacity},
                                              {.max_states = max_states, .interrupted = {}});
        reference::check_solution(solution, chain, importance.values, capacity);
        return solution;
    };
    fuzz::check_bounds(solve(10), solve(10'000), reference::greedy_worth(chain, importance.values, capacity),
                       importance.rounding);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Bytes bytes(data, size);
    bytes.PickValueInArray({any_input, small_instance, large_instance})(bytes);
    return 0;
}

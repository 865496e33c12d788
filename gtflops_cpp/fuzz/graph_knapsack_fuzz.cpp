#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "gtflops/chain_knapsack.hpp"
#include "gtflops/graph_knapsack.hpp"
#include "inputs.hpp"

namespace {

using fuzz::Bytes;
using gtflops::GraphKnapsack;
using gtflops::Solution;
using reference::Graph;
using reference::Structure;

Graph make_graph(Bytes& bytes, std::size_t num_tensors) {
    // With 256 segments at most, sums fit.
    const auto largest = bytes.PickValueInArray<std::int64_t>({1, 9, 1'000'000'000, fuzz::kMaxInt64 / 256});
    return reference::make_graph(bytes.ConsumeEnum<Structure>(), num_tensors, largest, fuzz::below(bytes));
}

std::int64_t capacity_of(Bytes& bytes, const Graph& graph) {
    const std::int64_t all = std::accumulate(graph.costs.begin(), graph.costs.end(), std::int64_t{0});
    return bytes.ConsumeIntegralInRange<std::int64_t>(0, all + 1);
}

void any_input(Bytes& bytes) {
    Graph graph = make_graph(bytes, bytes.ConsumeIntegralInRange<std::size_t>(0, 6));
    fuzz::corrupt(bytes, graph);
    std::optional<GraphKnapsack> knapsack;
    if (!fuzz::accepted(!fuzz::well_formed(graph, 1), fuzz::sum_overflows({graph.costs}),
                        [&] { knapsack.emplace(graph.dependencies, graph.tensors, graph.costs); })) {
        return;
    }
    std::vector<double> importance(bytes.ConsumeBool() ? graph.num_tensors()
                                                       : bytes.ConsumeIntegralInRange<std::size_t>(0, 8));
    for (double& value : importance) value = fuzz::any_number(bytes);
    const std::int64_t capacity = fuzz::any_integer(bytes);

    const bool malformed =
        importance.size() != graph.num_tensors() || !fuzz::finite(importance) || capacity < 0;
    Solution solution;
    if (fuzz::accepted(malformed, fuzz::worth_overflows(importance),
                       [&] { solution = knapsack->solve(importance, capacity); })) {
        reference::check_solution(solution, graph, importance, capacity);
    }
}

void small_instance(Bytes& bytes) {
    const Graph graph = make_graph(bytes, bytes.ConsumeIntegralInRange<std::size_t>(0, 8));
    const GraphKnapsack knapsack(graph.dependencies, graph.tensors, graph.costs);
    CHECK(knapsack.num_segments() == graph.num_segments() && knapsack.num_tensors() == graph.num_tensors());
    // Twice: the object serves other importances as well as the first.
    for (int i = 0; i < 2; ++i) {
        const fuzz::Importance importance(bytes, graph.num_tensors());
        const std::int64_t capacity = capacity_of(bytes, graph);
        const bool limited = bytes.ConsumeBool();
        gtflops::SolveOptions options;
        if (limited) options.max_states = bytes.ConsumeIntegralInRange<std::size_t>(0, 20);
        const Solution solution = knapsack.solve(importance.values, capacity, options);
        fuzz::check_against_brute_force(solution, limited, graph, importance, capacity);
    }
}

void large_instance(Bytes& bytes) {
    const Graph graph = make_graph(bytes, bytes.ConsumeIntegralInRange<std::size_t>(9, 60));
    const GraphKnapsack knapsack(graph.dependencies, graph.tensors, graph.costs);
    const fuzz::Importance importance(bytes, graph.num_tensors());
    const std::int64_t capacity = capacity_of(bytes, graph);
    const auto solve = [&](std::size_t max_states) {
        const Solution solution =
            knapsack.solve(importance.values, capacity, {.max_states = max_states, .interrupted = {}});
        reference::check_solution(solution, graph, importance.values, capacity);
        return solution;
    };
    fuzz::check_bounds(solve(10), solve(10'000), reference::greedy_worth(graph, importance.values, capacity),
                       importance.rounding);
}

/// A chain, given in either form.
void chain_in_both_forms(Bytes& bytes) {
    const auto num_tensors = bytes.ConsumeIntegralInRange<std::size_t>(1, 60);
    reference::Chain chain;
    Graph graph;
    for (std::size_t k = 0; k < num_tensors; ++k) {
        chain.dw.push_back(bytes.ConsumeIntegralInRange<std::int64_t>(0, 1000));
        chain.dy.push_back(bytes.ConsumeIntegralInRange<std::int64_t>(0, 1000));
        const std::int64_t above = static_cast<std::int64_t>(graph.num_segments()) - 2;
        const std::int64_t dy =
            k == 0 ? graph.add_segment({}, chain.dy[k]) : graph.add_segment({above}, chain.dy[k]);
        graph.tensors.add({graph.add_segment({dy}, chain.dw[k])});
    }
    const fuzz::Importance importance(bytes, num_tensors);
    const std::int64_t capacity = capacity_of(bytes, graph);
    const gtflops::SolveOptions options{.max_states = 10'000, .interrupted = {}};
    const Solution by_chain =
        gtflops::solve_chain({chain.dw, chain.dy, importance.values, capacity}, options);
    const Solution by_graph = GraphKnapsack(graph.dependencies, graph.tensors, graph.costs)
                                  .solve(importance.values, capacity, options);
    reference::check_solution(by_graph, chain, importance.values, capacity);
    fuzz::check_bounds(by_chain, by_graph, 0, importance.rounding);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Bytes bytes(data, size);
    bytes.PickValueInArray({any_input, small_instance, large_instance, chain_in_both_forms})(bytes);
    return 0;
}

#include "gtflops/graph_knapsack.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "reference.hpp"

namespace {

using gtflops::GraphKnapsack;
using gtflops::Solution;
using gtflops::SolveOptions;
using reference::Graph;
using reference::Mask;
using reference::Structure;
using Importances = std::vector<double>;

constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();

GraphKnapsack knapsack(const Graph& graph) {
    return {graph.dependencies, graph.tensors, graph.costs};
}

Solution solve(const Graph& graph, const Importances& importance, std::int64_t capacity,
               const SolveOptions& options = {}) {
    Solution solution = knapsack(graph).solve(importance, capacity, options);
    reference::check_solution(solution, graph, importance, capacity);
    return solution;
}

std::int64_t total_cost(const Graph& graph) {
    return std::accumulate(graph.costs.begin(), graph.costs.end(), std::int64_t{0});
}

/// Draws from 0 to n - 1; the same on every standard library.
class Draw {
  public:
    explicit Draw(unsigned seed) : random_(seed) {}
    std::int64_t operator()(std::int64_t n) { return static_cast<std::int64_t>(random_()) % n; }

  private:
    std::mt19937 random_;
};

/// Two chained segments, the first needed by all; each tensor has a segment of its own.
Graph small_chain() {
    Graph graph;
    const std::int64_t first = graph.add_segment({}, 5);
    const std::int64_t second = graph.add_segment({first}, 3);
    for (const std::int64_t needed : {first, second}) {
        graph.add_segment({needed}, 2);
        graph.tensors.add({static_cast<std::int64_t>(graph.num_segments()) - 1});
    }
    return graph;
}

/// Tensors worth what their segments cost, on two branches: no bound can tell them apart.
Graph subset_sum(std::int64_t num_tensors, Importances& importance) {
    Draw draw(3);
    Graph graph;
    std::int64_t branches[]{graph.add_segment({}, 0), graph.add_segment({}, 0)};
    for (std::int64_t k = 0; k < num_tensors; ++k) {
        std::int64_t& branch = branches[k % 2];
        branch = graph.add_segment({branch}, 0);
        const std::int64_t segment = graph.add_segment({branch}, 1 + draw(1'000'000'000));
        graph.tensors.add({segment});
        importance.push_back(static_cast<double>(graph.costs.back()));
    }
    return graph;
}

void agrees_with_brute_force() {
    for (int structure = 0; structure <= static_cast<int>(Structure::kMaxValue); ++structure) {
        Draw draw(1);
        for (int trial = 0; trial < 400; ++trial) {
            const std::int64_t range = 1 + draw(30);
            const Graph graph = reference::make_graph(static_cast<Structure>(structure),
                                                      1 + static_cast<std::size_t>(draw(9)), range, draw);
            Importances importance;
            for (std::size_t k = 0; k < graph.num_tensors(); ++k) {
                importance.push_back(static_cast<double>(draw(range + 3) - 2));
            }
            const std::int64_t capacity = draw(total_cost(graph) + 2);
            const Solution solution = solve(graph, importance, capacity);
            CHECK(solution.optimal);
            CHECK(solution.value == reference::best_worth(graph, importance, capacity));
            CHECK(solve(graph, importance, capacity).mask == solution.mask);
        }
    }
}

/// A group's options are weighed where there is most room; on a deeper walk only the least of them may fit.
void an_option_under_the_hull_is_not_lost() {
    Graph graph;
    const std::int64_t top = graph.add_segment({}, 49);
    const std::int64_t next = graph.add_segment({top}, 1);
    const std::int64_t side = graph.add_segment({next}, 56);
    const std::int64_t free = graph.add_segment({next}, 0);
    const std::int64_t heavy = graph.add_segment({free}, 63);
    const std::int64_t light = graph.add_segment({}, 1);
    graph.tensors.add({top, side});
    graph.tensors.add({side});
    graph.tensors.add({heavy});
    graph.tensors.add({light, heavy});
    graph.tensors.add({next});
    const Solution solution = solve(graph, Importances(5, 1.0), 169);
    CHECK(solution.optimal && solution.value == 4);
}

void the_edges_of_the_capacity() {
    const Graph graph = small_chain();
    const Importances importance{1, 4};
    CHECK((solve(graph, importance, 0).mask == Mask{0, 0}));
    CHECK((solve(graph, importance, 4).mask == Mask{0, 0}));  // less than the first segment alone
    CHECK((solve(graph, importance, 6).mask == Mask{0, 0}));
    CHECK((solve(graph, importance, 7).mask == Mask{1, 0}));
    CHECK((solve(graph, importance, 10).mask == Mask{0, 1}));
    CHECK((solve(graph, importance, 12).mask == Mask{1, 1}));
    CHECK((solve(graph, importance, kMax).mask == Mask{1, 1}));
}

void what_is_free_is_taken() {
    Graph graph;
    const std::int64_t free_segment = graph.add_segment({}, 0);
    const std::int64_t dear = graph.add_segment({free_segment}, 1);
    for (const std::int64_t segment : {free_segment, free_segment, dear}) graph.tensors.add({segment});
    graph.tensors.add({});
    CHECK((solve(graph, {1, -1, 1, 2}, 0).mask == Mask{1, 0, 0, 1}));
    CHECK((solve(graph, {0, -1, 1, 0}, 1).mask == Mask{0, 0, 1, 0}));
}

void nothing_to_choose_from() {
    CHECK(solve(Graph{}, {}, 5).mask.empty());
    Graph only_segments;
    only_segments.add_segment({}, 7);
    CHECK(solve(only_segments, {}, 5).optimal);
}

void extremes_are_exact() {
    Graph graph;
    for (const std::int64_t cost : {kMax - 3, std::int64_t{1}, std::int64_t{2}}) {
        graph.tensors.add({graph.add_segment({}, cost)});
    }
    const Importances importance{4, 1, 2};
    CHECK((solve(graph, importance, kMax).mask == Mask{1, 1, 1}));
    CHECK((solve(graph, importance, kMax - 1).mask == Mask{1, 0, 1}));
    CHECK((solve(graph, importance, kMax - 2).mask == Mask{1, 1, 0}));
    CHECK((solve(graph, importance, kMax - 4).mask == Mask{0, 1, 1}));
}

void the_limit_leaves_a_bound() {
    Importances importance;
    const Graph hard = subset_sum(60, importance);
    const std::int64_t capacity = total_cost(hard) / 2;
    const Solution solution = solve(hard, importance, capacity, {.max_states = 100, .interrupted = {}});
    CHECK(!solution.optimal);
    CHECK(solution.upper_bound >= reference::greedy_worth(hard, importance, capacity));
    CHECK(solution.upper_bound <= static_cast<double>(total_cost(hard)));
}

void a_solve_can_be_interrupted() {
    Importances importance;
    const Graph hard = subset_sum(60, importance);
    CHECK(throws<gtflops::Interrupted>("interrupted", [&] {
        solve(hard, importance, total_cost(hard) / 2, {.interrupted = [] { return true; }});
    }));
}

/// Few walks, each of which lets in many tensors: the caller is asked as often as that takes time.
void many_tensors_on_few_walks_can_be_interrupted() {
    constexpr int kDepth = 100;
    constexpr int kTensors = 100;  // of each segment
    Draw draw(4);
    Graph graph;
    Importances importance;
    for (int tower = 0; tower < 2; ++tower) {
        std::int64_t top = graph.add_segment({}, 1 + draw(1000));
        for (int depth = 0; depth < kDepth; ++depth) {
            for (int k = 0; k < kTensors; ++k) {
                graph.tensors.add({graph.add_segment({top}, 1 + draw(1000))});
                importance.push_back(static_cast<double>(1 + draw(1000)));
            }
            top = graph.add_segment({top}, 1 + draw(1000));
        }
    }
    int asked = 0;
    solve(graph, importance, total_cost(graph) / 2, {.interrupted = [&] { return ++asked < 0; }});
    constexpr int kLetIn = kDepth * kDepth * kTensors;  // at least
    CHECK(asked > kLetIn / (1 << 20));
    CHECK(throws<gtflops::Interrupted>("interrupted", [&] {
        int questions = 0;
        solve(graph, importance, total_cost(graph) / 2, {.interrupted = [&] { return ++questions == 2; }});
    }));
}

/// Nothing to plan by: each of many shared segments needs three of as many others.
void a_graph_without_structure_is_bounded_closely() {
    Draw draw(5);
    Graph graph;
    Importances importance;
    constexpr std::int64_t kHalf = 100;
    for (std::int64_t s = 0; s < kHalf; ++s) graph.add_segment({}, 1 + draw(1000));
    for (std::int64_t s = 0; s < kHalf; ++s) {
        graph.add_segment({draw(kHalf), draw(kHalf), draw(kHalf)}, 1 + draw(1000));
    }
    for (int k = 0; k < 600; ++k) {
        const std::int64_t shared = draw(2 * kHalf);
        graph.tensors.add({graph.add_segment({shared}, 1 + draw(1000))});
        importance.push_back(static_cast<double>(1 + draw(1000)));
    }
    const std::int64_t capacity = total_cost(graph) / 4;
    const Solution solution = solve(graph, importance, capacity);
    CHECK(!solution.optimal);
    CHECK(solution.upper_bound <= 1.02 * solution.value);
    CHECK(throws<gtflops::Interrupted>(
        "interrupted", [&] { solve(graph, importance, capacity, {.interrupted = [] { return true; }}); }));
}

void malformed_input_is_refused() {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const auto refused = [](const Importances& importance, std::int64_t capacity = 1) {
        return throws<std::invalid_argument>("", [&] { solve(small_chain(), importance, capacity); });
    };
    CHECK(refused({1}));
    CHECK(refused({1, 1, 1}));
    CHECK(refused({1, 1}, -1));
    CHECK(refused({1, std::nan("")}));
    CHECK(refused({kInfinity, 1}));
    CHECK(refused({-kInfinity, 1}));
    CHECK(throws<std::overflow_error>("importance", [&] { solve(small_chain(), {1e308, 1e308}, 1); }));
}

void malformed_graphs_are_refused() {
    Graph negative = small_chain();
    negative.costs[1] = -1;
    CHECK(throws<std::invalid_argument>("is -1", [&] { knapsack(negative); }));
    Graph backward = small_chain();
    backward.dependencies.values[0] = 1;
    CHECK(throws<std::invalid_argument>("segment 1 depends on segment 1", [&] { knapsack(backward); }));
    Graph short_of_costs = small_chain();
    short_of_costs.costs.pop_back();
    CHECK(
        throws<std::invalid_argument>("costs has 3 elements; expected 4", [&] { knapsack(short_of_costs); }));
    Graph beyond = small_chain();
    beyond.tensors.values[1] = 4;
    CHECK(throws<std::invalid_argument>("tensor_segments[1] is 4", [&] { knapsack(beyond); }));
    const std::span<const std::int64_t> too_many(&kMax, (std::size_t{1} << 28) + 2);  // never read
    const Graph chain = small_chain();
    CHECK(throws<std::invalid_argument>("more than 2^28 segments",
                                        [&] { GraphKnapsack({too_many, {}}, chain.tensors, chain.costs); }));
    CHECK(throws<std::invalid_argument>(
        "more than 2^28 tensors", [&] { GraphKnapsack(chain.dependencies, {too_many, {}}, chain.costs); }));
    Graph overflowing = small_chain();
    overflowing.costs[3] = kMax;
    CHECK(throws<std::overflow_error>("does not fit int64", [&] { knapsack(overflowing); }));
}

}  // namespace

int main() {
    agrees_with_brute_force();
    an_option_under_the_hull_is_not_lost();
    the_edges_of_the_capacity();
    what_is_free_is_taken();
    nothing_to_choose_from();
    extremes_are_exact();
    the_limit_leaves_a_bound();
    a_solve_can_be_interrupted();
    many_tensors_on_few_walks_can_be_interrupted();
    a_graph_without_structure_is_bounded_closely();
    malformed_input_is_refused();
    malformed_graphs_are_refused();
}

// Many threads, one GraphKnapsack, one ClosureCosts: each thread's answers are those of a thread alone. Worth
// the most under ThreadSanitizer: `make test-threads`.

#include <barrier>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "check.hpp"
#include "gtflops/chain_knapsack.hpp"
#include "gtflops/closure.hpp"
#include "gtflops/graph_knapsack.hpp"
#include "reference.hpp"

namespace {

using gtflops::Solution;
using reference::Graph;

constexpr std::size_t kTensors = 12;
constexpr std::size_t kProblems = 24;
constexpr std::size_t kThreads = 8;

struct Problem {
    std::vector<double> importance;
    std::int64_t capacity;
};

struct Answers {
    std::vector<reference::Mask> graph_masks;
    std::vector<reference::Mask> chain_masks;
    std::vector<std::int64_t> costs;
    std::vector<reference::Mask> reached;

    bool operator==(const Answers&) const = default;
};

struct Shared {
    reference::Chain chain;
    gtflops::GraphKnapsack knapsack;
    gtflops::ClosureCosts closure;
    std::vector<Problem> problems;

    Answers answers() const {
        Answers result;
        for (const auto& [importance, capacity] : problems) {
            const Solution by_graph = knapsack.solve(importance, capacity);
            const Solution by_chain = gtflops::solve_chain({chain.dw, chain.dy, importance, capacity});
            result.costs.push_back(closure.costs(by_graph.mask, 1)[0]);
            result.reached.push_back(closure.reached(by_chain.mask));
            result.graph_masks.push_back(by_graph.mask);
            result.chain_masks.push_back(by_chain.mask);
        }
        return result;
    }
};

Shared make_shared_objects() {
    std::mt19937 random(1);
    const auto below = [&](std::int64_t n) { return static_cast<std::int64_t>(random()) % n; };
    const Graph graph = reference::make_graph(reference::Structure::diamonds, kTensors, 1000, below);
    Shared shared{{},
                  {graph.dependencies, graph.tensors, graph.costs},
                  {graph.dependencies, graph.tensors, graph.costs, 1},
                  {}};
    for (std::size_t k = 0; k < kTensors; ++k) {
        shared.chain.dw.push_back(below(1000));
        shared.chain.dy.push_back(below(1000));
    }
    for (std::size_t i = 0; i < kProblems; ++i) {
        Problem problem{{}, below(12'000)};
        for (std::size_t k = 0; k < kTensors; ++k)
            problem.importance.push_back(static_cast<double>(below(99)));
        shared.problems.push_back(problem);
    }
    return shared;
}

}  // namespace

int main() {
    const Shared shared = make_shared_objects();
    std::vector<Answers> by_thread(kThreads);
    {
        std::barrier start(static_cast<std::ptrdiff_t>(kThreads));
        std::vector<std::jthread> threads;
        for (Answers& answers : by_thread) {
            threads.emplace_back([&] {
                start.arrive_and_wait();
                answers = shared.answers();
            });
        }
    }
    // Only now, so that the threads are the first to use the objects: a late initialisation would be a race.
    const Answers alone = shared.answers();
    for (const Answers& answers : by_thread) CHECK(answers == alone);
}

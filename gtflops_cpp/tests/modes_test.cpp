#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "check.hpp"
#include "graph_plan.hpp"
#include "limits.hpp"
#include "reference.hpp"
#include "solve.hpp"

// Small random instances, solved in the ways that are rare at the usual limits, against brute force and
// against each other. `modes_test INSTANCES SEED` tries more of them; a failure names the instance that did.

namespace {

using gtflops::Limits;
using gtflops::Solution;
using gtflops::SolveOptions;
using reference::Chain;
using reference::Graph;
using reference::Structure;
using Importances = std::vector<double>;

/// Draws from 0 to n - 1; the same on every standard library.
class Draw {
  public:
    explicit Draw(std::uint64_t seed) : random_(seed) {}
    std::int64_t operator()(std::int64_t n) {
        return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(n));
    }
    template <typename Value>
    Value of(std::initializer_list<Value> values) {
        return values.begin()[(*this)(static_cast<std::int64_t>(values.size()))];
    }

  private:
    std::mt19937_64 random_;
};

/// A way of the search, and of the plan.
struct Mode {
    Limits limits{};
    std::size_t max_states = SolveOptions{}.max_states;

    bool unlimited() const {
        const Limits usual;
        return max_states == SolveOptions{}.max_states && limits.max_plan_work == usual.max_plan_work &&
               limits.max_block_size == usual.max_block_size;
    }
};

Mode any_mode(Draw& draw) {
    Mode mode;
    if (draw(2) == 0) {
        mode.limits.few_walks = static_cast<double>(draw.of<std::int64_t>({0, 0, 3}));
        mode.limits.few_walks_per_node = 0;
    }
    if (draw(3) == 0) mode.limits.max_greedy_work = static_cast<std::size_t>(draw(60));
    if (draw(2) == 0) mode.limits.halve_at = static_cast<std::size_t>(draw.of<std::int64_t>({0, 1, 2, 5}));
    switch (draw(4)) {
        case 0:
            mode.limits.max_plan_work = static_cast<std::size_t>(draw(2000));
            break;
        case 1:
            mode.limits.max_block_size = static_cast<std::size_t>(draw(4));
            break;
        default:
            break;
    }
    if (draw(3) == 0) mode.limits.max_relaxation_work = static_cast<std::size_t>(draw(3000));
    if (draw(4) == 0) mode.limits.max_open_states = static_cast<std::size_t>(1 + draw(20));
    if (draw(3) == 0) mode.max_states = static_cast<std::size_t>(1 + draw(50));
    return mode;
}

/// Worths, and by how much sums of them may be off.
struct Worths {
    Importances values;
    double rounding = 0;
};

/// `sizes`: what each tensor's own part costs, for worths in proportion to it.
Worths any_worths(Draw& draw, std::span<const std::int64_t> sizes) {
    Worths worths;
    const std::int64_t kind = draw(6);
    const int exponent = draw.of<int>({0, 0, 0, 900, -1060});  // powers of two keep whole numbers exact
    for (const std::int64_t size : sizes) {
        double value = 1;
        switch (kind) {
            case 0:  // equal
                break;
            case 1:  // equally dense
                value = static_cast<double>(size);
                break;
            case 2:  // strongly correlated
                value = static_cast<double>(size + 3);
                break;
            case 3:  // few of them distinct, some worth nothing or less
                value = static_cast<double>(draw(6) - 1);
                break;
            case 4:
                value = static_cast<double>(draw(1000));
                break;
            default:  // of any magnitude: these round
                value = draw.of<double>({1e300, 1e-300, 1, -1, -1e300, 0, 3e299, 0.1}) *
                        static_cast<double>(1 + draw(5));
        }
        const bool exact = kind != 5 && value < 0x1p50;  // a whole number, and so are sums of these
        if (kind != 5) value = std::ldexp(value, exponent);
        worths.values.push_back(value);
        // 2^-46: of at most 64 numbers, and each sum rounds by half of 2^-52 at most.
        if (!exact) worths.rounding += std::ldexp(std::max(value, 0.0), -46);
    }
    return worths;
}

/// Solves one instance in many ways, all of which must agree with `best`, or with each other if it is not
/// known.
template <typename Form, typename Solve>
std::size_t compare(Draw& draw, const Form& form, const Worths& worths, std::int64_t capacity, Solve solve) {
    constexpr std::size_t kModes = 8;
    constexpr std::size_t kForBruteForce = 10;
    const bool small = form.num_tensors() <= kForBruteForce;
    double best = small ? reference::best_worth(form, worths.values, capacity)
                        : reference::greedy_worth(form, worths.values, capacity);
    std::vector<Solution> solutions;
    for (std::size_t i = 0; i < kModes; ++i) {
        const Mode mode = any_mode(draw);
        const Solution& solution = solutions.emplace_back(solve(mode));
        reference::check_solution(solution, form, worths.values, capacity);
        if (mode.unlimited() && small) CHECK(solution.optimal);
        if (small) CHECK(solution.value <= best + worths.rounding);
        best = std::max(best, solution.value);
    }
    for (const Solution& solution : solutions) {
        CHECK(solution.upper_bound >= best - worths.rounding);
        if (solution.optimal) CHECK(solution.value >= best - worths.rounding);
    }
    return solutions.size();
}

std::int64_t largest_cost(Draw& draw) {
    return draw.of<std::int64_t>({1, 5, 30, 1'000'000'007, std::numeric_limits<std::int64_t>::max() / 256});
}

std::size_t compare_graph(Draw& draw, std::size_t num_tensors) {
    const auto structure = static_cast<Structure>(draw(static_cast<std::int64_t>(Structure::kMaxValue) + 1));
    Graph graph = reference::make_graph(structure, num_tensors, largest_cost(draw), draw);
    if (draw(4) == 0) {
        for (std::int64_t& cost : graph.costs) cost = std::min<std::int64_t>(cost, 1);  // equal, or none
    }
    std::vector<std::int64_t> sizes;
    for (std::size_t k = 0; k < num_tensors; ++k) {
        std::int64_t size = 0;
        for (const std::int64_t s : graph.tensors[k]) size += graph.costs[static_cast<std::size_t>(s)];
        sizes.push_back(size / 4);
    }
    const Worths worths = any_worths(draw, sizes);
    const std::int64_t total = std::accumulate(graph.costs.begin(), graph.costs.end(), std::int64_t{0});
    const gtflops::ClosureCosts closure(graph.dependencies, graph.tensors, graph.costs, 1);
    const std::int64_t capacity = draw(total + 2);
    return compare(draw, graph, worths, capacity, [&](const Mode& mode) {
        const gtflops::Plan plan =
            gtflops::plan_graph(graph.dependencies, graph.tensors, graph.costs, mode.limits);
        return gtflops::solve_graph(plan, closure, worths.values, capacity,
                                    {.max_states = mode.max_states, .interrupted = {}}, mode.limits);
    });
}

std::size_t compare_chain(Draw& draw, std::size_t num_tensors) {
    Chain chain;
    const std::int64_t most_dw = 1 + largest_cost(draw) / 2;
    const std::int64_t most_dy = draw.of<std::int64_t>({1, 2, most_dw / 4 + 1, most_dw});
    std::vector<std::int64_t> sizes;
    for (std::size_t k = 0; k < num_tensors; ++k) {
        chain.dw.push_back(draw(most_dw));
        chain.dy.push_back(draw(most_dy));
        sizes.push_back(chain.dw[k] / 4);
    }
    const Worths worths = any_worths(draw, sizes);
    const std::int64_t total = std::accumulate(
        chain.dw.begin(), chain.dw.end(), std::accumulate(chain.dy.begin(), chain.dy.end(), std::int64_t{0}));
    const std::int64_t capacity = draw(total + 2);
    return compare(draw, chain, worths, capacity, [&](const Mode& mode) {
        return gtflops::solve_chain({chain.dw, chain.dy, worths.values, capacity},
                                    {.max_states = mode.max_states, .interrupted = {}}, mode.limits);
    });
}

std::uint64_t instance = 0;  // the one looked at

}  // namespace

int main(int argc, char** argv) {
    const std::uint64_t num_instances = argc > 1 ? std::stoull(argv[1]) : 5'000;
    const std::uint64_t seed = argc > 2 ? std::stoull(argv[2]) : 1;
    std::atexit([] { std::cout << "instance " << instance << '\n'; });
    std::size_t num_solves = 0;
    for (instance = seed; instance < seed + num_instances; ++instance) {
        Draw draw(instance);
        const auto num_tensors = static_cast<std::size_t>(draw(8) == 0 ? 11 + draw(30) : 1 + draw(10));
        num_solves += draw(4) == 0 ? compare_chain(draw, num_tensors) : compare_graph(draw, num_tensors);
    }
    std::cout << num_solves << " solves agree; up to ";
}

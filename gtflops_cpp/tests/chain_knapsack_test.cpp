#include "gtflops/chain_knapsack.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "check.hpp"
#include "reference.hpp"

namespace {

using gtflops::ChainProblem;
using gtflops::Solution;
using gtflops::solve_chain;
using gtflops::SolveOptions;
using Flops = std::vector<std::int64_t>;
using Importances = std::vector<double>;

struct Instance {
    Flops dw;
    Flops dy;
    Importances importance;

    double brute_force(std::int64_t capacity) const {
        return reference::best_worth(reference::Chain{dw, dy}, importance, capacity);
    }

    Solution solve(std::int64_t capacity, const SolveOptions& options = {}) const {
        Solution solution = solve_chain({dw, dy, importance, capacity}, options);
        reference::check_solution(solution, reference::Chain{dw, dy}, importance, capacity);
        return solution;
    }
};

/// Weights worth as much as they cost: no bound can tell them apart.
Instance subset_sum(std::size_t n, std::int64_t largest, unsigned seed) {
    std::mt19937 random(seed);
    Instance instance;
    for (std::size_t k = 0; k < n; ++k) {
        instance.dw.push_back(1 + static_cast<std::int64_t>(random()) % largest);
        instance.dy.push_back(0);
        instance.importance.push_back(static_cast<double>(instance.dw.back()));
    }
    return instance;
}

void agrees_with_brute_force() {
    std::mt19937 random(1);
    const auto below = [&](int limit) { return static_cast<int>(random() % static_cast<unsigned>(limit)); };
    for (int trial = 0; trial < 4000; ++trial) {
        Instance instance;
        const int n = 1 + below(10);
        const int range = 2 + below(30);
        std::int64_t total = 0;
        for (int k = 0; k < n; ++k) {
            instance.dw.push_back(below(range));
            instance.dy.push_back(below(2) * below(range));
            instance.importance.push_back(below(range) - 2);
            total += instance.dw.back() + instance.dy.back();
        }
        const std::int64_t capacity = below(static_cast<int>(total) + 2);
        const Solution solution = instance.solve(capacity);
        CHECK(solution.optimal);
        CHECK(solution.value == instance.brute_force(capacity));
    }
}

void extremes_are_exact() {
    constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
    const Instance whole_range{{kMax - 3, 1, 0}, {1, 0, 1}, {1e308, 5e-324, 1e-300}};
    CHECK((whole_range.solve(kMax).mask == std::vector<std::uint8_t>{1, 1, 1}));
    CHECK((whole_range.solve(kMax - 1).mask == std::vector<std::uint8_t>{1, 1, 0}));
    CHECK((whole_range.solve(kMax - 3).mask == std::vector<std::uint8_t>{0, 1, 1}));

    const Instance nothing{{}, {}, {}};
    CHECK(nothing.solve(5).mask.empty());
    const Instance worthless{{0, 0}, {0, 0}, {0.0, -1.0}};
    CHECK((worthless.solve(5).mask == std::vector<std::uint8_t>{0, 0}));
}

void the_limit_leaves_a_bound() {
    const Instance hard = subset_sum(60, 1'000'000'000, 3);
    const std::int64_t capacity = std::accumulate(hard.dw.begin(), hard.dw.end(), std::int64_t{0}) / 2;
    const Solution solution = hard.solve(capacity, {.max_states = 1000, .interrupted = {}});
    CHECK(!solution.optimal);
    CHECK(solution.upper_bound <=
          std::nextafter(static_cast<double>(capacity), 2.0 * static_cast<double>(capacity)));
}

void a_solve_can_be_interrupted() {
    const Instance hard = subset_sum(60, 1'000'000'000, 3);
    const std::int64_t capacity = std::accumulate(hard.dw.begin(), hard.dw.end(), std::int64_t{0}) / 2;
    CHECK(throws<gtflops::Interrupted>("interrupted",
                                       [&] { hard.solve(capacity, {.interrupted = [] { return true; }}); }));
}

void malformed_input_is_refused() {
    static constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
    const double one = 1;
    constexpr std::size_t kTooMany = (std::size_t{1} << 28) + 1;  // never read
    CHECK(throws<std::invalid_argument>("more than 2^28 tensors", [&] {
        gtflops::solve_chain({{&kMax, kTooMany}, {&kMax, kTooMany}, {&one, kTooMany}, 1});
    }));
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const auto refused = [](const char* text, const Instance& instance, std::int64_t capacity = 1) {
        return throws<std::invalid_argument>(text, [&] { instance.solve(capacity); });
    };
    CHECK(refused("1, 2 and 1 elements", {{1}, {1, 2}, {1}}));
    CHECK(refused("dw[1] is -1", {{1, -1}, {1, 2}, {1, 1}}));
    CHECK(refused("dy[1] is -2", {{1, 1}, {1, -2}, {1, 1}}));
    CHECK(refused("importance[0] is nan", {{1}, {1}, {std::nan("")}}));
    CHECK(refused("importance[0] is -inf", {{1}, {1}, {-kInfinity}}));
    CHECK(refused("capacity is -1", {{1}, {1}, {1}}, -1));
    CHECK(throws<std::overflow_error>("sum(dw) + sum(dy) does not fit int64: it overflows at dy[1]",
                                      [] { Instance{{kMax - 1, 0}, {1, 1}, {1, 1}}.solve(1); }));
    CHECK(throws<std::overflow_error>("importance[1]",
                                      [] { Instance{{1, 1}, {1, 1}, {1e308, 1e308}}.solve(1); }));
}

}  // namespace

int main() {
    agrees_with_brute_force();
    extremes_are_exact();
    the_limit_leaves_a_bound();
    a_solve_can_be_interrupted();
    malformed_input_is_refused();
}

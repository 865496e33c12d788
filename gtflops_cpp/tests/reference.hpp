#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <span>
#include <vector>

#include "check.hpp"
#include "gtflops/closure.hpp"
#include "gtflops/solution.hpp"

// What solvers are held against: the definitions, written as plainly as they can be.

namespace reference {

using Mask = std::vector<std::uint8_t>;

inline double worth(std::span<const double> importance, const Mask& mask) {
    double total = 0;
    for (std::size_t k = 0; k < mask.size(); ++k) total += mask[k] != 0 ? importance[k] : 0;
    return total;
}

struct Chain {
    std::vector<std::int64_t> dw;
    std::vector<std::int64_t> dy;

    std::size_t num_tensors() const { return dw.size(); }

    std::int64_t cost(const Mask& mask) const {
        std::int64_t total = 0;
        std::ptrdiff_t depth = 0;
        for (std::size_t k = 0; k < mask.size(); ++k) {
            if (mask[k] == 0) continue;
            total += dw[k];
            depth = static_cast<std::ptrdiff_t>(k) + 1;
        }
        return std::accumulate(dy.begin(), dy.begin() + depth, total);
    }
};

/// Rows of indices, packed as the library takes them.
struct Rows {
    std::vector<std::int64_t> offsets{0};
    std::vector<std::int64_t> values;

    void add(std::span<const std::int64_t> row) {
        values.insert(values.end(), row.begin(), row.end());
        offsets.push_back(static_cast<std::int64_t>(values.size()));
    }
    void add(std::initializer_list<std::int64_t> row) { add(std::span(row.begin(), row.size())); }
    std::size_t size() const { return offsets.size() - 1; }
    std::span<const std::int64_t> operator[](std::size_t row) const {
        const auto at = [&](std::size_t i) { return static_cast<std::size_t>(offsets[i]); };
        return std::span(values).subspan(at(row), at(row + 1) - at(row));
    }
    operator gtflops::IndexRows() const { return {offsets, values}; }
};

struct Graph {
    Rows dependencies;
    Rows tensors;
    std::vector<std::int64_t> costs;  // columns of one cost a segment

    std::size_t num_segments() const { return dependencies.size(); }
    std::size_t num_tensors() const { return tensors.size(); }

    /// Adds a segment, and answers which it is.
    std::int64_t add_segment(std::initializer_list<std::int64_t> needs, std::int64_t cost) {
        dependencies.add(needs);
        costs.push_back(cost);
        return static_cast<std::int64_t>(num_segments()) - 1;
    }

    Mask reached(const Mask& mask) const {
        Mask result(num_segments());
        for (std::size_t k = 0; k < mask.size(); ++k) {
            if (mask[k] != 0) reach(tensors[k], result);
        }
        return result;
    }

    std::int64_t cost(const Mask& mask, std::size_t column = 0) const {
        const Mask paid = reached(mask);
        std::int64_t total = 0;
        for (std::size_t i = 0; i < paid.size(); ++i) total += paid[i] * costs[column * paid.size() + i];
        return total;
    }

  private:
    void reach(std::span<const std::int64_t> segments, Mask& result) const {
        for (const std::int64_t segment : segments) {
            const auto i = static_cast<std::size_t>(segment);
            if (result[i] != 0) continue;
            result[i] = 1;
            reach(dependencies[i], result);
        }
    }
};

/// What the best of all subsets is worth.
template <typename Form>
double best_worth(const Form& form, std::span<const double> importance, std::int64_t capacity) {
    double best = 0;
    Mask mask(form.num_tensors());
    for (std::size_t subset = 0; subset < std::size_t{1} << mask.size(); ++subset) {
        for (std::size_t k = 0; k < mask.size(); ++k) mask[k] = (subset >> k) & 1;
        const double value = worth(importance, mask);
        if (value > best && form.cost(mask) <= capacity) best = value;
    }
    return best;
}

/// What one pass over the tensors that takes each which still fits is worth.
template <typename Form>
double greedy_worth(const Form& form, std::span<const double> importance, std::int64_t capacity) {
    Mask mask(form.num_tensors());
    for (std::size_t k = 0; k < mask.size(); ++k) {
        mask[k] = importance[k] > 0;
        if (mask[k] != 0 && form.cost(mask) > capacity) mask[k] = 0;
    }
    return worth(importance, mask);
}

/// What holds of every solution, proven optimal or not.
template <typename Form>
void check_solution(const gtflops::Solution& solution, const Form& form, std::span<const double> importance,
                    std::int64_t capacity) {
    CHECK(solution.mask.size() == form.num_tensors());
    for (std::size_t k = 0; k < solution.mask.size(); ++k) {
        CHECK(solution.mask[k] == 0 || (solution.mask[k] == 1 && importance[k] > 0));
    }
    CHECK(solution.cost == form.cost(solution.mask) && solution.cost <= capacity);
    CHECK(solution.value == worth(importance, solution.mask));
    CHECK(solution.upper_bound >= solution.value);
    CHECK(!solution.optimal || solution.upper_bound == solution.value);
}

/// The shapes of backward graphs that models have, and random ones.
enum class Structure {
    chain,
    branches,
    diamonds,
    two_stacks,
    shared,
    free_segments,
    pairs,
    random,
    tangle,
    kMaxValue = tangle
};

/// A graph of `num_tensors` tensors, with costs from 0 to `largest_cost`. `below(n)` draws from 0 to n - 1.
template <typename Below>
Graph make_graph(Structure structure, std::size_t num_tensors, std::int64_t largest_cost, Below below) {
    Graph graph;
    const auto any_cost = [&] { return below(largest_cost + 1); };
    const auto weight_gradient = [&](std::initializer_list<std::int64_t> needs) {
        const std::int64_t segment = graph.add_segment(needs, any_cost());
        graph.tensors.add({segment});
    };
    std::int64_t trunk = graph.add_segment({}, any_cost());
    std::int64_t encoder = -1;    // the end of a second stack
    std::int64_t beside = trunk;  // the other one of a pair
    while (graph.num_tensors() < num_tensors) {
        const std::size_t left = num_tensors - graph.num_tensors();
        switch (structure) {
            case Structure::chain:  // each tensor's gradient needs all activation gradients before it
                trunk = graph.add_segment({trunk}, any_cost());
                weight_gradient({trunk});
                break;
            case Structure::branches: {  // as q, k and v: beside each other, none needed by what follows
                for (std::size_t branch = 0; branch < std::min<std::size_t>(left, 3); ++branch) {
                    weight_gradient({graph.add_segment({trunk}, any_cost())});
                }
                trunk = graph.add_segment({trunk}, any_cost());
                break;
            }
            case Structure::diamonds: {  // as experts: what follows needs both branches
                const std::int64_t one = graph.add_segment({trunk}, any_cost());
                const std::int64_t other = graph.add_segment({trunk}, any_cost());
                weight_gradient({one});
                if (left > 1) weight_gradient({other});
                trunk = graph.add_segment({one, other}, any_cost());
                break;
            }
            case Structure::two_stacks:  // every decoder layer passes a gradient on to the encoder
                if (left > num_tensors / 2) {
                    trunk = graph.add_segment({trunk}, any_cost());
                    const std::int64_t cross = graph.add_segment({trunk}, any_cost());
                    weight_gradient({cross});
                    encoder = encoder < 0 ? graph.add_segment({cross}, any_cost())
                                          : graph.add_segment({encoder, cross}, any_cost());
                } else {
                    encoder = graph.add_segment({encoder < 0 ? trunk : encoder}, any_cost());
                    weight_gradient({encoder});
                }
                break;
            case Structure::shared: {  // tied tensors: used in several places
                trunk = graph.add_segment({trunk}, any_cost());
                const std::int64_t here = graph.add_segment({trunk}, any_cost());
                graph.tensors.add({here, below(here + 1)});
                break;
            }
            case Structure::free_segments:  // some cost nothing, some tensors need nothing
                trunk = graph.add_segment({trunk}, below(2) * any_cost());
                if (below(4) == 0) {
                    graph.tensors.add({});
                } else {
                    graph.tensors.add({graph.add_segment({trunk}, below(2) * any_cost())});
                }
                break;
            case Structure::pairs: {  // two paths beside each other, which cross now and then
                const std::int64_t one =
                    graph.add_segment({trunk, below(3) == 0 ? beside : trunk}, any_cost());
                const std::int64_t other =
                    graph.add_segment({beside, below(3) == 0 ? trunk : beside}, any_cost());
                trunk = one;
                beside = other;
                weight_gradient({trunk});
                if (left > 1) weight_gradient({beside});
                break;
            }
            case Structure::random: {
                const auto segments = static_cast<std::int64_t>(graph.num_segments());
                const std::int64_t one = below(segments);
                const std::int64_t other = below(segments);
                if (below(2) == 0) graph.add_segment({one, other}, any_cost());
                graph.tensors.add({below(segments), below(static_cast<std::int64_t>(graph.num_segments()))});
                break;
            }
            case Structure::tangle: {  // more segments than tensors, the first ones shared by many
                const auto segments = static_cast<std::int64_t>(graph.num_segments());
                const std::int64_t one = below(segments);
                const std::int64_t other = graph.add_segment({one, below(segments)}, any_cost());
                graph.add_segment({below(one + 1)}, any_cost());
                graph.tensors.add({other, below(segments)});
                break;
            }
        }
    }
    return graph;
}

}  // namespace reference

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "gtflops/closure.hpp"
#include "inputs.hpp"

namespace {

using fuzz::Bytes;
using gtflops::ClosureCosts;
using reference::Graph;
using reference::Mask;
using reference::Structure;

/// Twice as many wrap around to none.
constexpr std::size_t kHalf = std::size_t{1} << (std::numeric_limits<std::size_t>::digits - 1);

/// A graph with its costs in several columns, well-formed or nearly so.
Graph make_graph(Bytes& bytes, std::size_t num_columns) {
    Graph graph;  // sometimes empty
    if (bytes.ConsumeBool()) {
        const auto num_tensors = bytes.ConsumeIntegralInRange<std::size_t>(0, 60);
        graph = reference::make_graph(bytes.ConsumeEnum<Structure>(), num_tensors, 1000, fuzz::below(bytes));
    }
    graph.costs.resize(num_columns * graph.num_segments());
    for (std::int64_t& cost : graph.costs) cost = bytes.ConsumeIntegralInRange<std::int64_t>(0, 1000);
    fuzz::corrupt(bytes, graph);
    return graph;
}

bool a_column_overflows(const Graph& graph, std::size_t num_columns) {
    const std::size_t n = graph.num_segments();
    for (std::size_t column = 0; n != 0 && column < num_columns && (column + 1) * n <= graph.costs.size();
         ++column) {
        if (fuzz::sum_overflows({std::span(graph.costs).subspan(column * n, n)})) return true;
    }
    return false;
}

void query(Bytes& bytes, const ClosureCosts& closure, const Graph& graph, std::size_t num_columns) {
    CHECK(closure.num_segments() == graph.num_segments() && closure.num_tensors() == graph.num_tensors() &&
          closure.num_columns() == num_columns);
    const auto num_selections = bytes.ConsumeIntegralInRange<std::size_t>(0, 4);
    Mask masks;
    std::vector<std::int64_t> costs;
    for (std::size_t selection = 0; selection < num_selections; ++selection) {
        Mask mask(graph.num_tensors());
        for (std::uint8_t& byte : mask)
            byte = bytes.ConsumeBool() ? bytes.ConsumeIntegral<std::uint8_t>() : 0;
        masks.insert(masks.end(), mask.begin(), mask.end());
        for (std::size_t column = 0; column < num_columns; ++column)
            costs.push_back(graph.cost(mask, column));
        CHECK(closure.reached(mask) == graph.reached(mask));
    }
    CHECK(closure.costs(masks, num_selections) == costs);

    masks.push_back(1);
    CHECK(!fuzz::accepted(true, false, [&] { closure.reached(Mask(graph.num_tensors() + 1)); }));
    CHECK(!fuzz::accepted(true, false, [&] { closure.costs(masks, num_selections); }));
    if (graph.num_tensors() != 0) {
        CHECK(!fuzz::accepted(true, false, [&] { closure.costs({}, kHalf); }));
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Bytes bytes(data, size);
    auto num_columns = bytes.ConsumeIntegralInRange<std::size_t>(0, 3);
    const Graph graph = make_graph(bytes, num_columns);
    const bool any_columns = bytes.ConsumeIntegralInRange(0, 15) == 15;
    if (any_columns) num_columns = bytes.ConsumeBool() ? kHalf : bytes.ConsumeIntegral<std::size_t>();

    const bool malformed = !fuzz::well_formed(graph, num_columns);
    const bool overflowing = !graph.dependencies.offsets.empty() && a_column_overflows(graph, num_columns);
    std::optional<ClosureCosts> closure;
    if (fuzz::accepted(malformed, overflowing, [&] {
            closure.emplace(graph.dependencies, graph.tensors, graph.costs, num_columns);
        })) {
        if (!any_columns) query(bytes, *closure, graph, num_columns);  // a result may be too large to ask for
    }
    return 0;
}

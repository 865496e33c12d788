// Which of four tensors to train under a budget, in the chain form and in the graph form.

#include <cstdint>
#include <gtflops/chain_knapsack.hpp>
#include <gtflops/graph_knapsack.hpp>
#include <iostream>
#include <vector>

namespace {

void print(const char* form, const gtflops::Solution& solution) {
    std::cout << form << ": tensors";
    for (std::size_t k = 0; k < solution.mask.size(); ++k) {
        if (solution.mask[k] != 0) std::cout << ' ' << k;
    }
    std::cout << " cost " << solution.cost << " and are worth " << solution.value
              << (solution.optimal ? ", the optimum\n" : "\n");
}

}  // namespace

int main() {
    using Costs = std::vector<std::int64_t>;
    const std::vector<double> importance{1, 3, 2, 4};  // of each tensor, index 0 nearest to the loss
    const std::int64_t budget = 10;

    // As a chain: to reach a tensor, the activation gradients of all tensors before it are paid too.
    const Costs weight_gradient{2, 2, 2, 2};
    const Costs activation_gradient{1, 1, 4, 1};
    print("chain", gtflops::solve_chain({weight_gradient, activation_gradient, importance, budget}));

    // As a graph: here tensor 3 hangs on segment 1 beside tensor 2, and does not need segment 2.
    // Segment 0 needs none, segments 1 and 2 need the one before, segment 3 needs segment 1.
    const Costs segment{1, 1, 4, 1, /* and the weight gradients: */ 2, 2, 2, 2};
    const Costs needs_offsets{0, 0, 1, 2, 3, 4, 5, 6, 7};
    const Costs needs{0, 1, 1, 0, 1, 2, 3};
    const Costs tensor_offsets{0, 1, 2, 3, 4};
    const Costs tensor_segment{4, 5, 6, 7};
    const gtflops::GraphKnapsack graph({needs_offsets, needs}, {tensor_offsets, tensor_segment}, segment);
    print("graph", graph.solve(importance, budget));
}

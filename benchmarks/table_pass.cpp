// One item of a knapsack table over costs: best[c] = max(best[c], best[c - cost] + value), for all c. Two buffers, so
// that nothing but the machine holds the compiler's vectors back.

#include <algorithm>
#include <cstdint>
#include <utility>

extern "C" void table_passes(double* best, double* next, std::int64_t cells, std::int64_t passes) {
    for (std::int64_t pass = 0; pass < passes; ++pass) {
        const std::int64_t cost = 1 + pass * 7919 % (cells / 2);  // loads of any alignment, as costs bring them
        const double value = static_cast<double>(cost % 13);
        const double* __restrict before = best;
        double* __restrict after = next;
        std::copy(before, before + cost, after);
        for (std::int64_t c = cost; c < cells; ++c) {
            const double taken = before[c - cost] + value;
            after[c] = taken > before[c] ? taken : before[c];
        }
        std::swap(best, next);
    }
}

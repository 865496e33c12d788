// One item of a knapsack table over costs: best[c] = max(best[c], best[c - cost] + value), for all c, from
// the top. In blocks, of which what is read and what is written never overlap, so that nothing holds the
// compiler's vectors back.

#include <cstdint>

extern "C" void table_passes(double* best, std::int64_t cells, std::int64_t passes) {
    constexpr std::int64_t block = 64;
    for (std::int64_t pass = 0; pass < passes; ++pass) {
        const std::int64_t cost = block + pass % 512;  // loads of any alignment, as costs bring them
        const auto value = static_cast<double>(pass % 13);
        std::int64_t end = cells;
        for (; end - block >= cost; end -= block) {
            double* __restrict written = best + end - block;
            const double* __restrict read = written - cost;
            for (std::int64_t c = 0; c < block; ++c) {
                const double taken = read[c] + value;
                written[c] = taken > written[c] ? taken : written[c];
            }
        }
        for (std::int64_t c = end - 1; c >= cost; --c) {
            const double taken = best[c - cost] + value;
            best[c] = taken > best[c] ? taken : best[c];
        }
    }
}

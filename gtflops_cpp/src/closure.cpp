#include "gtflops/closure.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace gtflops {
namespace {

std::string element(const char* name, std::size_t index, std::int64_t value) {
    return std::string(name) + '[' + std::to_string(index) + "] is " + std::to_string(value);
}

void require_size(const char* name, std::size_t given, std::size_t expected) {
    if (given != expected) {
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(given) +
                                    " elements; expected " + std::to_string(expected));
    }
}

/// `rows * columns`; a product past size_t is a size that no span can have.
std::size_t area(const char* name, std::size_t rows, std::size_t columns) {
    if (columns != 0 && rows > std::numeric_limits<std::size_t>::max() / columns) {
        throw std::invalid_argument(std::string(name) + " would have more elements than fit in memory");
    }
    return rows * columns;
}

}  // namespace

ClosureCosts::Rows::Rows(IndexRows rows, std::size_t limit, const char* offsets_name,
                         const char* values_name) {
    if (rows.offsets.empty()) {
        throw std::invalid_argument(std::string(offsets_name) +
                                    " is empty; expected one offset more than rows");
    }
    if (limit > std::numeric_limits<std::uint32_t>::max()) {
        throw std::invalid_argument("more than 2^32 - 1 segments are not supported");
    }
    if (rows.offsets.front() != 0) {
        throw std::invalid_argument(element(offsets_name, 0, rows.offsets.front()) + "; expected 0");
    }
    for (std::size_t i = 1; i < rows.offsets.size(); ++i) {
        if (rows.offsets[i] < rows.offsets[i - 1]) {
            throw std::invalid_argument(element(offsets_name, i, rows.offsets[i]) +
                                        ", less than the offset before it");
        }
    }
    require_size(values_name, rows.values.size(), static_cast<std::size_t>(rows.offsets.back()));
    for (std::size_t i = 0; i < rows.values.size(); ++i) {
        if (rows.values[i] < 0 || static_cast<std::size_t>(rows.values[i]) >= limit) {
            throw std::invalid_argument(element(values_name, i, rows.values[i]) +
                                        "; expected a segment, 0 to " + std::to_string(limit) +
                                        " (exclusive)");
        }
    }
    offsets_.assign(rows.offsets.begin(), rows.offsets.end());
    values_.reserve(rows.values.size());
    for (const std::int64_t value : rows.values) values_.push_back(static_cast<std::uint32_t>(value));
}

ClosureCosts::ClosureCosts(IndexRows dependencies, IndexRows tensor_segments,
                           std::span<const std::int64_t> costs, std::size_t num_columns)
    : dependencies_(dependencies, std::max<std::size_t>(dependencies.offsets.size(), 1) - 1,
                    "dependency_offsets", "dependencies"),
      tensor_segments_(tensor_segments, dependencies_.size(), "tensor_offsets", "tensor_segments"),
      num_columns_(num_columns) {
    for (std::size_t segment = 0; segment < num_segments(); ++segment) {
        for (const std::uint32_t needed : dependencies_[segment]) {
            if (needed >= segment) {
                throw std::invalid_argument("segment " + std::to_string(segment) + " depends on segment " +
                                            std::to_string(needed) + "; expected only smaller indices");
            }
        }
    }
    require_size("costs", costs.size(), area("costs", num_columns, num_segments()));
    // Without segments there is nothing to check, in however many columns.
    for (std::size_t column = 0; num_segments() != 0 && column < num_columns; ++column) {
        std::int64_t total = 0;
        for (std::size_t segment = 0; segment < num_segments(); ++segment) {
            const std::int64_t cost = costs[column * num_segments() + segment];
            const auto where = [&] {
                return "costs[" + std::to_string(column) + ", " + std::to_string(segment) + "]";
            };
            if (cost < 0) {
                throw std::invalid_argument(where() + " is " + std::to_string(cost) + "; expected 0 or more");
            }
            if (cost > std::numeric_limits<std::int64_t>::max() - total) {
                throw std::overflow_error("the sum of costs[" + std::to_string(column) +
                                          ", :] does not fit int64: it overflows at " + where());
            }
            total += cost;
        }
    }
    costs_.assign(costs.begin(), costs.end());
}

void ClosureCosts::mark(std::span<const std::uint8_t> mask, std::span<std::uint8_t> reached) const {
    std::ranges::fill(reached, std::uint8_t{0});
    for (std::size_t tensor = 0; tensor < num_tensors(); ++tensor) {
        if (mask[tensor] == 0) continue;
        for (const std::uint32_t segment : tensor_segments_[tensor]) reached[segment] = 1;
    }
    // Whatever needs a segment has a larger index, so one sweep downwards sees every need before its segment.
    for (std::size_t segment = num_segments(); segment-- > 0;) {
        if (reached[segment] == 0) continue;
        for (const std::uint32_t needed : dependencies_[segment]) reached[needed] = 1;
    }
}

std::vector<std::int64_t> ClosureCosts::costs(std::span<const std::uint8_t> masks,
                                              std::size_t num_selections) const {
    require_size("mask", masks.size(), area("mask", num_selections, num_tensors()));
    std::vector<std::int64_t> totals(area("result", num_selections, num_columns_));
    std::vector<std::uint8_t> reached(num_segments());
    for (std::size_t selection = 0; selection < num_selections; ++selection) {
        mark(masks.subspan(selection * num_tensors(), num_tensors()), reached);
        for (std::size_t column = 0; column < num_columns_; ++column) {
            const std::int64_t* const cost = costs_.data() + column * num_segments();
            std::int64_t total = 0;
            for (std::size_t segment = 0; segment < num_segments(); ++segment) {
                total += cost[segment] & -std::int64_t{reached[segment]};  // no branch, so that it vectorises
            }
            totals[selection * num_columns_ + column] = total;
        }
    }
    return totals;
}

std::vector<std::uint8_t> ClosureCosts::reached(std::span<const std::uint8_t> mask) const {
    require_size("mask", mask.size(), num_tensors());
    std::vector<std::uint8_t> result(num_segments());
    mark(mask, result);
    return result;
}

}  // namespace gtflops

#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace gtflops {

/// Rows of indices, packed end to end: row i is values[offsets[i] .. offsets[i + 1]), the end not included.
struct IndexRows {
    std::span<const std::int64_t> offsets;
    std::span<const std::int64_t> values;
};

/// What the gradients of a set of tensors cost together.
///
/// A *segment* is a piece of the backward pass that runs either whole or not at all. A tensor's gradient
/// needs some segments directly, and those need others; each segment that is reached is paid for once.
/// Segments are in topological order: a segment depends only on segments of smaller index. Immutable, so that
/// any number of threads may query one object.
class ClosureCosts {
  public:
    /// `dependencies`: a row for each segment, the segments that it needs.
    /// `tensor_segments`: a row for each tensor, the segments that its gradient needs directly.
    /// `costs`: `num_columns` rows of one non-negative cost a segment.
    ///
    /// Throws std::invalid_argument on malformed input, std::overflow_error where the total of a column does
    /// not fit int64; no query can overflow after that.
    ClosureCosts(IndexRows dependencies, IndexRows tensor_segments, std::span<const std::int64_t> costs,
                 std::size_t num_columns);

    std::size_t num_segments() const { return dependencies_.size(); }
    std::size_t num_tensors() const { return tensor_segments_.size(); }
    std::size_t num_columns() const { return num_columns_; }

    /// What a segment, or the gradient of a tensor, needs directly; and the first cost of a segment.
    std::span<const std::uint32_t> needs_of_segment(std::size_t segment) const {
        return dependencies_[segment];
    }
    std::span<const std::uint32_t> needs_of_tensor(std::size_t tensor) const {
        return tensor_segments_[tensor];
    }
    std::int64_t cost(std::size_t segment) const { return costs_[segment]; }

    /// The cost of each selection, column by column: `masks` holds `num_selections` rows of one byte a tensor
    /// (nonzero: selected), the result `num_selections` rows of `num_columns()` sums. O(segments +
    /// dependencies) a selection.
    std::vector<std::int64_t> costs(std::span<const std::uint8_t> masks, std::size_t num_selections) const;

    /// One byte a segment: 1 where the selection needs it.
    std::vector<std::uint8_t> reached(std::span<const std::uint8_t> mask) const;

  private:
    /// IndexRows after its check: owned, and narrow enough to stay in cache.
    class Rows {
      public:
        Rows(IndexRows rows, std::size_t limit, const char* offsets_name, const char* values_name);

        std::size_t size() const { return offsets_.size() - 1; }
        std::span<const std::uint32_t> operator[](std::size_t row) const {
            return {values_.data() + offsets_[row], values_.data() + offsets_[row + 1]};
        }

      private:
        std::vector<std::size_t> offsets_;
        std::vector<std::uint32_t> values_;
    };

    void mark(std::span<const std::uint8_t> mask, std::span<std::uint8_t> reached) const;

    Rows dependencies_;
    Rows tensor_segments_;
    std::vector<std::int64_t> costs_;
    std::size_t num_columns_;
};

}  // namespace gtflops

#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

// Both forms of the problem are solved through a *plan*: a decision diagram over what a selection pays for in
// common, and groups of tensors that become available along the way.

namespace gtflops {

/// Every way in which a selection can pay for what several tensors share.
///
/// A walk through the diagram, from `start` to `kEnd`, decides which shared segments are paid: at each node
/// the segments of one arc, or of the other. On its way it collects *groups*; what is left is to choose from
/// the groups within what the walk leaves of the capacity.
struct Plan {
    /// The most tensors of a group: all subsets of a group are looked at.
    static constexpr std::size_t kMaxGroup = 4;
    /// The most tensors, and the most segments: with 16 options for each group, all indices fit 32 bits.
    static constexpr std::size_t kMaxSize = std::size_t{1} << 28;
    static constexpr std::uint32_t kEnd = std::numeric_limits<std::uint32_t>::max();

    /// A cost that a selection pays once if it holds any of some tensors of the group.
    struct Piece {
        std::int64_t cost;
        std::uint8_t members;  // bit i: the i-th tensor of the group
    };
    struct Group {
        std::uint32_t tensors_begin, tensors_end;
        std::uint32_t pieces_begin, pieces_end;
    };
    struct Arc {
        std::int64_t cost = 0;
        std::uint32_t groups_begin = 0, groups_end = 0;  // what becomes available, in `arc_groups`
        std::uint32_t open_begin = 0, open_end = 0;      // groups that walks left out of the plan might reach
        std::uint32_t next = kEnd;                       // always of smaller index than the arc's own node
    };
    struct Node {
        Arc exclude, include;
    };

    std::vector<std::uint32_t> tensors;
    std::vector<Piece> pieces;
    std::vector<Group> groups;
    std::vector<std::uint32_t> arc_groups;
    std::vector<Node> nodes;
    Arc start;
    bool has_open = false;  // some walks are left out

    std::uint32_t add_group(std::span<const std::uint32_t> members, std::span<const Piece> costs) {
        const auto tensors_begin = static_cast<std::uint32_t>(tensors.size());
        const auto pieces_begin = static_cast<std::uint32_t>(pieces.size());
        tensors.insert(tensors.end(), members.begin(), members.end());
        pieces.insert(pieces.end(), costs.begin(), costs.end());
        groups.push_back({tensors_begin, static_cast<std::uint32_t>(tensors.size()), pieces_begin,
                          static_cast<std::uint32_t>(pieces.size())});
        return static_cast<std::uint32_t>(groups.size() - 1);
    }
    std::span<const std::uint32_t> tensors_of(const Group& group) const {
        return {tensors.data() + group.tensors_begin, tensors.data() + group.tensors_end};
    }
    std::span<const Piece> pieces_of(const Group& group) const {
        return {pieces.data() + group.pieces_begin, pieces.data() + group.pieces_end};
    }
    std::span<const std::uint32_t> groups_of(const Arc& arc) const {
        return {arc_groups.data() + arc.groups_begin, arc_groups.data() + arc.groups_end};
    }
    std::span<const std::uint32_t> open_groups_of(const Arc& arc) const {
        return {arc_groups.data() + arc.open_begin, arc_groups.data() + arc.open_end};
    }
};

}  // namespace gtflops

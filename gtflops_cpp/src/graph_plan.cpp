#include "graph_plan.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <map>
#include <numeric>
#include <utility>
#include <vector>

namespace gtflops {
namespace {

using Index = std::uint32_t;
using Indices = std::vector<Index>;

// ------------------------------------------------------------------------------ what tensors have in common

/// Up to `Plan::kMaxGroup` tensors, or just that there are more.
class FewTensors {
  public:
    void insert(Index tensor) {
        const auto end = tensors_.begin() + std::min<std::size_t>(size_, Plan::kMaxGroup);
        if (many() || std::find(tensors_.begin(), end, tensor) != end) return;
        if (size_ < Plan::kMaxGroup) tensors_[size_] = tensor;
        ++size_;
    }
    void insert(const FewTensors& others) {
        if (others.many()) size_ = Plan::kMaxGroup + 1;
        if (many()) return;
        for (const Index tensor : others.tensors()) insert(tensor);
    }
    bool many() const { return size_ > Plan::kMaxGroup; }
    std::span<const Index> tensors() const { return {tensors_.data(), many() ? 0 : size_}; }

  private:
    std::array<Index, Plan::kMaxGroup> tensors_{};
    std::size_t size_ = 0;
};

/// A group of the plan, and the shared segments that it needs directly.
struct HangingGroup {
    Index group;
    Indices needs;
};

/// A graph without what only a few tensors need: that is in their groups.
struct SharedGraph {
    std::vector<std::int64_t> costs;
    std::vector<Indices> dependencies;  // of smaller index
    std::vector<HangingGroup> groups;
};

void sort_unique(Indices& indices) {
    std::ranges::sort(indices);
    const auto rest = std::ranges::unique(indices);
    indices.erase(rest.begin(), rest.end());
}

/// Splits a graph into groups of tensors, whose own segments are decided with them, and segments shared by
/// many.
class Split {
  public:
    Split(IndexRows dependencies, IndexRows tensor_segments, std::span<const std::int64_t> costs)
        : dependencies_(dependencies),
          tensor_segments_(tensor_segments),
          costs_(costs),
          needed_by_(costs.size()),
          shared_(costs.size()),
          needs_(costs.size()),
          leader_(tensor_segments.offsets.size() - 1) {
        for (std::size_t tensor = 0; tensor < leader_.size(); ++tensor) {
            for (const auto s : row(tensor_segments_, tensor))
                needed_by_[static_cast<std::size_t>(s)].insert(static_cast<Index>(tensor));
        }
        for (std::size_t s = costs.size(); s-- > 0;) {
            for (const auto needed : row(dependencies_, s))
                needed_by_[static_cast<std::size_t>(needed)].insert(needed_by_[s]);
        }
        for (std::size_t s = 0; s < costs.size(); ++s) shared_[s] = needed_by_[s].many();
    }

    SharedGraph into(Plan& plan) {
        do {
            find_needs();
            join_tensors();
        } while (separate_unlike_tensors());

        SharedGraph graph;
        Indices number(costs_.size());
        for (std::size_t s = 0; s < costs_.size(); ++s) {
            if (!shared_[s] || passes_on(s)) continue;
            number[s] = static_cast<Index>(graph.costs.size());
            graph.costs.push_back(costs_[s]);
            graph.dependencies.push_back(renumbered(needs_[s], number));
        }
        std::vector<Indices> members(leader_.size());
        for (Index tensor = 0; tensor < leader_.size(); ++tensor) members[find(tensor)].push_back(tensor);
        std::vector<std::vector<Plan::Piece>> pieces = pieces_of(members);
        for (Index leader = 0; leader < leader_.size(); ++leader) {
            if (members[leader].empty()) continue;
            graph.groups.push_back({plan.add_group(members[leader], pieces[leader]),
                                    renumbered(needs_of_tensor(leader), number)});
        }
        return graph;
    }

  private:
    static std::span<const std::int64_t> row(IndexRows rows, std::size_t index) {
        const auto begin = static_cast<std::size_t>(rows.offsets[index]);
        return rows.values.subspan(begin, static_cast<std::size_t>(rows.offsets[index + 1]) - begin);
    }
    static Indices renumbered(Indices segments, const Indices& number) {
        for (Index& s : segments) s = number[s];
        return segments;
    }

    /// A shared segment that costs nothing is as good as what it needs.
    bool passes_on(std::size_t s) const { return costs_[s] == 0 && needs_[s].size() <= 1; }

    /// Appends the shared segments that stand for a segment.
    void append(std::size_t s, Indices& to) const {
        if (shared_[s] && !passes_on(s)) {
            to.push_back(static_cast<Index>(s));
        } else {
            to.insert(to.end(), needs_[s].begin(), needs_[s].end());
        }
    }

    void find_needs() {
        for (std::size_t s = 0; s < costs_.size(); ++s) {
            needs_[s].clear();
            for (const auto needed : row(dependencies_, s))
                append(static_cast<std::size_t>(needed), needs_[s]);
            sort_unique(needs_[s]);
        }
    }

    Indices needs_of_tensor(Index tensor) const {
        Indices needs;
        for (const auto s : row(tensor_segments_, tensor)) append(static_cast<std::size_t>(s), needs);
        sort_unique(needs);
        return needs;
    }

    Index find(Index tensor) {
        while (leader_[tensor] != tensor) tensor = leader_[tensor] = leader_[leader_[tensor]];
        return tensor;
    }

    bool joins(std::size_t s) const {
        return !shared_[s] && costs_[s] > 0 && needed_by_[s].tensors().size() > 1;
    }

    /// Tensors that share a segment of their own are decided together.
    void join_tensors() {
        std::iota(leader_.begin(), leader_.end(), Index{0});
        for (std::size_t s = 0; s < costs_.size(); ++s) {
            if (!joins(s)) continue;
            const std::span<const Index> tensors = needed_by_[s].tensors();
            for (const Index tensor : tensors) {
                const Index a = find(tensors[0]);
                const Index b = find(tensor);
                leader_[std::max(a, b)] = std::min(a, b);
            }
        }
    }

    /// Where tensors that were joined are too many, or need other shared segments, what joins them is shared
    /// too. Returns whether there was such a case.
    bool separate_unlike_tensors() {
        Indices sizes(leader_.size());
        std::vector<bool> unlike(leader_.size());
        for (Index tensor = 0; tensor < leader_.size(); ++tensor) {
            const Index leader = find(tensor);
            if (++sizes[leader] > Plan::kMaxGroup) unlike[leader] = true;
            if (leader != tensor && needs_of_tensor(leader) != needs_of_tensor(tensor)) unlike[leader] = true;
        }
        bool any = false;
        for (std::size_t s = 0; s < costs_.size(); ++s) {
            if (!joins(s) || !unlike[find(needed_by_[s].tensors()[0])]) continue;
            shared_[s] = true;
            any = true;
        }
        return any;
    }

    std::vector<std::vector<Plan::Piece>> pieces_of(const std::vector<Indices>& members) {
        std::vector<std::vector<Plan::Piece>> pieces(members.size());
        for (std::size_t s = 0; s < costs_.size(); ++s) {
            const std::span<const Index> tensors = needed_by_[s].tensors();
            if (shared_[s] || costs_[s] == 0 || tensors.empty()) continue;
            const Index leader = find(tensors[0]);
            unsigned mask = 0;
            for (const Index tensor : tensors) {
                mask |= 1U << (std::ranges::lower_bound(members[leader], tensor) - members[leader].begin());
            }
            const auto same = [mask](const Plan::Piece& piece) { return piece.members == mask; };
            const auto known = std::ranges::find_if(pieces[leader], same);
            if (known != pieces[leader].end()) {
                known->cost += costs_[s];
            } else {
                pieces[leader].push_back({costs_[s], static_cast<std::uint8_t>(mask)});
            }
        }
        return pieces;
    }

    IndexRows dependencies_;
    IndexRows tensor_segments_;
    std::span<const std::int64_t> costs_;
    std::vector<FewTensors> needed_by_;
    std::vector<bool> shared_;
    std::vector<Indices> needs_;  // shared segments that a segment needs, through segments that are not
    Indices leader_;              // union-find over tensors
};

// --------------------------------------------------------------------------------------------- inside a
// block

using Set = std::vector<std::uint64_t>;  // of segments of the block, as bits

bool holds(const Set& set, Index i) {
    return (set[i / 64] >> i % 64 & 1) != 0;
}
void insert(Set& set, Index i) {
    set[i / 64] |= std::uint64_t{1} << i % 64;
}
void erase(Set& set, Index i) {
    set[i / 64] &= ~(std::uint64_t{1} << i % 64);
}

/// The members in ascending order.
Indices members_of(const Set& set) {
    Indices members;
    for (std::size_t word = 0; word < set.size(); ++word) {
        for (std::uint64_t bits = set[word]; bits != 0; bits &= bits - 1) {
            members.push_back(
                static_cast<Index>(word * 64 + static_cast<std::size_t>(std::countr_zero(bits))));
        }
    }
    return members;
}

/// A stretch of the shared graph between cuts, numbered from 0, and the groups that need any of it.
struct Block {
    std::vector<std::int64_t> costs;
    std::vector<Indices> dependencies;
    std::vector<Indices> groups;  // that need a segment, and through it all that they need
};

/// Plans the walks that stop inside one block.
///
/// What is undecided is a set of segments, all of whose needs are paid or undecided too. Parts of it that
/// only a few tensors need become groups; for the rest one segment is decided, which then decides all that it
/// needs or all that needs it. Equal sets are planned once.
class BlockPlanner {
  public:
    BlockPlanner(const Block& block, Plan& plan, std::size_t max_size, std::size_t& work_left)
        : block_(block),
          plan_(plan),
          max_size_(max_size),
          work_left_(work_left),
          dependents_(block.costs.size()) {
        for (Index s = 0; s < block.costs.size(); ++s) {
            for (const Index needed : block.dependencies[s]) dependents_[needed].push_back(s);
        }
    }

    /// The arc that enters the block, all of it undecided.
    Plan::Arc enter() {
        const std::size_t size = block_.costs.size();
        Set all((size + 63) / 64);
        for (Index s = 0; s < size; ++s) insert(all, s);
        if (size > max_size_) return arc(0, {}, left_open(all));
        above_.assign(size, Set(all.size()));
        below_.assign(size, Set(all.size()));
        for (Index s = 0; s < size; ++s) {
            for (const Index needed : block_.dependencies[s]) {
                insert(above_[s], needed);
                unite(above_[s], above_[needed]);
            }
        }
        for (auto s = static_cast<Index>(size); s-- > 0;) {
            for (const Index dependent : dependents_[s]) {
                insert(below_[s], dependent);
                unite(below_[s], below_[dependent]);
            }
        }
        return arc(0, {}, plan(all));
    }

  private:
    /// What a walk finds where a set of segments is undecided.
    struct Entry {
        Indices groups;
        Indices open;
        Index next = Plan::kEnd;
    };

    static void unite(Set& to, const Set& from) {
        for (std::size_t word = 0; word < to.size(); ++word) to[word] |= from[word];
    }
    static void subtract(Set& from, const Set& what) {
        for (std::size_t word = 0; word < from.size(); ++word) from[word] &= ~what[word];
    }
    static std::size_t num_common(const Set& a, const Set& b) {
        std::size_t count = 0;
        for (std::size_t word = 0; word < a.size(); ++word) {
            count += static_cast<std::size_t>(std::popcount(a[word] & b[word]));
        }
        return count;
    }

    Plan::Arc arc(std::int64_t cost, const Indices& groups, const Entry& entry) {
        spend(4 * (groups.size() + entry.groups.size() + entry.open.size()));  // copies, which take memory
        Plan::Arc result{.cost = cost, .next = entry.next};
        const auto append = [this](const Indices& values) {
            plan_.arc_groups.insert(plan_.arc_groups.end(), values.begin(), values.end());
            return static_cast<Index>(plan_.arc_groups.size());
        };
        result.groups_begin = static_cast<Index>(plan_.arc_groups.size());
        append(groups);
        result.groups_end = append(entry.groups);
        result.open_begin = result.groups_end;
        result.open_end = append(entry.open);
        return result;
    }

    Index add_node(const Plan::Arc& exclude, const Plan::Arc& include) {
        plan_.nodes.push_back({exclude, include});
        return static_cast<Index>(plan_.nodes.size() - 1);
    }

    bool spend(std::size_t work) {
        work_left_ -= std::min(work, work_left_);
        return work_left_ > 0;
    }

    const Entry& plan(const Set& undecided) {
        if (const auto known = planned_.find(undecided); known != planned_.end()) return known->second;
        // Where work runs out, each set that waits for another one to be planned leaves a part of it open.
        const std::size_t copies = 4 * num_groups(undecided);
        const bool work_left = spend(undecided.size() * 64) && waiting_ + copies <= work_left_;
        waiting_ += copies;
        Entry entry = work_left ? decided(undecided) : left_open(undecided);
        waiting_ -= copies;
        return planned_.emplace(undecided, std::move(entry)).first->second;
    }

    Entry decided(Set undecided) {
        drop_useless(undecided);
        Entry entry;
        Indices part;  // the first that is not a group
        for (Indices& other : parts_of(undecided)) {
            if (num_tensors(other) <= Plan::kMaxGroup) {
                entry.groups.push_back(as_group(other));
                for (const Index s : other) erase(undecided, s);
            } else if (part.empty()) {
                part = std::move(other);
            }
        }
        if (part.empty()) return entry;

        const Index pivot = pivot_of(part);
        Set without = undecided;
        subtract(without, below_[pivot]);
        erase(without, pivot);
        Set paid(undecided.size());
        std::int64_t cost = 0;
        Indices groups;
        for (const Index s : part) {
            if (s != pivot && !holds(above_[pivot], s)) continue;
            insert(paid, s);
            cost += block_.costs[s];
            groups.insert(groups.end(), block_.groups[s].begin(), block_.groups[s].end());
        }
        Set with = undecided;
        subtract(with, paid);
        const Plan::Arc exclude = arc(0, {}, plan(without));
        const Plan::Arc include = arc(cost, groups, plan(with));
        entry.next = add_node(exclude, include);
        return entry;
    }

    /// Walks down all segments in order that stop anywhere; that is not all that there is.
    Entry left_open(const Set& undecided) {
        Entry entry;
        plan_.has_open = true;
        const Indices segments = members_of(undecided);
        for (auto s = segments.rbegin(); s != segments.rend(); ++s) {
            const Indices& groups = block_.groups[*s];
            entry.open.insert(entry.open.end(), groups.begin(), groups.end());
            entry.next =
                add_node({}, arc(block_.costs[*s], groups, {.groups = {}, .open = {}, .next = entry.next}));
        }
        return entry;
    }

    /// Segments that no group needs any more.
    void drop_useless(Set& undecided) const {
        const Indices segments = members_of(undecided);
        for (auto s = segments.rbegin(); s != segments.rend(); ++s) {
            const auto left = [&](Index dependent) { return holds(undecided, dependent); };
            if (block_.groups[*s].empty() && std::ranges::none_of(dependents_[*s], left))
                erase(undecided, *s);
        }
    }

    /// The parts of a set that do not need each other, each ascending.
    std::vector<Indices> parts_of(const Set& undecided) {
        std::vector<Indices> parts;
        Set seen(undecided.size());
        for (const Index first : members_of(undecided)) {
            if (holds(seen, first)) continue;
            Indices part{first};
            insert(seen, first);
            for (std::size_t next = 0; next < part.size(); ++next) {
                const auto join = [&](Index s) {
                    if (!holds(undecided, s) || holds(seen, s)) return;
                    insert(seen, s);
                    part.push_back(s);
                };
                const Index from = part[next];
                std::ranges::for_each(block_.dependencies[from], join);
                std::ranges::for_each(dependents_[from], join);
            }
            std::ranges::sort(part);
            parts.push_back(std::move(part));
        }
        return parts;
    }

    std::size_t num_groups(const Set& undecided) const {
        std::size_t count = 0;
        for (const Index s : members_of(undecided)) count += block_.groups[s].size();
        return count;
    }

    std::size_t num_tensors(const Indices& part) const {
        std::size_t count = 0;
        for (const Index s : part) {
            for (const Index group : block_.groups[s]) count += plan_.tensors_of(plan_.groups[group]).size();
        }
        return count;
    }

    /// One group of a part's tensors, which pay for its segments.
    Index as_group(const Indices& part) {
        if (const auto known = grouped_.find(part); known != grouped_.end()) return known->second;
        Indices tensors;
        std::vector<Plan::Piece> pieces;
        std::map<Index, unsigned> members;  // of each segment: the tensors that need it
        for (auto s = part.rbegin(); s != part.rend(); ++s) {
            unsigned& needed_by = members[*s];
            for (const Index dependent : dependents_[*s]) {
                if (const auto other = members.find(dependent); other != members.end())
                    needed_by |= other->second;
            }
            for (const Index group : block_.groups[*s]) {
                const std::size_t first = tensors.size();
                for (const Index tensor : plan_.tensors_of(plan_.groups[group])) {
                    needed_by |= 1U << tensors.size();
                    tensors.push_back(tensor);
                }
                for (const Plan::Piece& piece : plan_.pieces_of(plan_.groups[group])) {
                    pieces.push_back({piece.cost, static_cast<std::uint8_t>(piece.members << first)});
                }
            }
            if (block_.costs[*s] > 0)
                pieces.push_back({block_.costs[*s], static_cast<std::uint8_t>(needed_by)});
        }
        return grouped_.emplace(part, plan_.add_group(tensors, pieces)).first->second;
    }

    /// The segment to decide: the first one if all others need it, else one that decides most either way.
    Index pivot_of(const Indices& part) {
        Set in_part(above_[0].size());
        for (const Index s : part) insert(in_part, s);
        if (num_common(below_[part[0]], in_part) == part.size() - 1) return part[0];
        spend(part.size() * in_part.size() * 2);
        Index best = part[0];
        std::size_t most = 0;
        for (const Index s : part) {
            const std::size_t decides =
                std::min(num_common(above_[s], in_part), num_common(below_[s], in_part));
            if (decides > most) {
                most = decides;
                best = s;
            }
        }
        return best;
    }

    const Block& block_;
    Plan& plan_;
    std::size_t max_size_;
    std::size_t& work_left_;
    std::size_t waiting_ = 0;  // copies of groups if all sets that are being planned were left open
    std::vector<Indices> dependents_;
    std::vector<Set> above_;  // all that a segment needs
    std::vector<Set> below_;  // all that needs it
    std::map<Set, Entry> planned_;
    std::map<Indices, Index> grouped_;
};

// ------------------------------------------------------------------------------------------- between the
// cuts

/// For each segment whether it is a cut: whether all that come before it are needed by it, and all that come
/// after it need it. O(segments + dependencies).
std::vector<bool> find_cuts(const SharedGraph& graph) {
    const std::size_t size = graph.costs.size();
    std::vector<std::ptrdiff_t> crossings(size + 1);
    // Whatever lies strictly between two places is no cut.
    const auto cross = [&](std::size_t begin, std::size_t end) {
        if (begin >= end) return;
        ++crossings[begin];
        --crossings[end];
    };
    std::vector<std::size_t> first_dependent(size, size);
    for (std::size_t s = 0; s < size; ++s) {
        // Between a segment and the last one that it needs, nothing is needed by it.
        cross(graph.dependencies[s].empty() ? 0 : graph.dependencies[s].back() + std::size_t{1}, s);
        for (const Index needed : graph.dependencies[s]) {
            first_dependent[needed] = std::min(first_dependent[needed], s);
        }
    }
    for (std::size_t s = 0; s < size; ++s) cross(s + 1, first_dependent[s]);
    std::vector<bool> cuts(size);
    std::ptrdiff_t crossing = 0;
    for (std::size_t s = 0; s < size; ++s) {
        crossing += crossings[s];
        cuts[s] = crossing == 0;
    }
    return cuts;
}

}  // namespace

Plan plan_graph(IndexRows dependencies, IndexRows tensor_segments, std::span<const std::int64_t> costs,
                const Limits& limits) {
    Plan plan;
    const SharedGraph graph = Split(dependencies, tensor_segments, costs).into(plan);
    const std::vector<bool> cuts = find_cuts(graph);

    // Each block is a cut, or all that lies between two.
    Indices block_of(graph.costs.size());
    Indices first_of;
    for (Index s = 0; s < block_of.size(); ++s) {
        if (s == 0 || cuts[s] || cuts[s - 1]) first_of.push_back(s);
        block_of[s] = static_cast<Index>(first_of.size() - 1);
    }
    std::vector<Block> blocks(first_of.size());
    for (Index s = 0; s < block_of.size(); ++s) {
        Block& block = blocks[block_of[s]];
        const Index first = first_of[block_of[s]];
        block.costs.push_back(graph.costs[s]);
        block.groups.emplace_back();
        Indices& inside = block.dependencies.emplace_back();
        for (const Index needed : graph.dependencies[s]) {
            if (needed >= first) inside.push_back(needed - first);
        }
    }
    Indices free;
    for (const HangingGroup& hanging : graph.groups) {
        if (hanging.needs.empty()) {
            free.push_back(hanging.group);
            continue;
        }
        // What it needs in earlier blocks, all of the last block needs too.
        Block& block = blocks[block_of[hanging.needs.back()]];
        const Index first = first_of[block_of[hanging.needs.back()]];
        Indices inside;
        for (const Index needed : hanging.needs) {
            if (needed >= first) inside.push_back(needed - first);
        }
        if (inside.size() == 1) {
            block.groups[inside[0]].push_back(hanging.group);
        } else {  // a free segment stands for all of them
            block.costs.push_back(0);
            block.dependencies.push_back(std::move(inside));
            block.groups.push_back({hanging.group});
        }
    }

    // Backwards, so that what follows is there before what leads to it.
    std::size_t work_left = limits.max_plan_work;
    Index next = Plan::kEnd;
    const auto append = [&plan](const Indices& groups) {
        plan.arc_groups.insert(plan.arc_groups.end(), groups.begin(), groups.end());
        return static_cast<Index>(plan.arc_groups.size());
    };
    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
        Plan::Arc stop;
        if (block->costs.size() > 1)
            stop = BlockPlanner(*block, plan, limits.max_block_size, work_left).enter();
        Plan::Arc on{.cost = std::accumulate(block->costs.begin(), block->costs.end(), std::int64_t{0}),
                     .groups_begin = static_cast<Index>(plan.arc_groups.size()),
                     .next = next};
        for (const Indices& groups : block->groups) append(groups);
        on.groups_end = static_cast<Index>(plan.arc_groups.size());
        plan.nodes.push_back({.exclude = stop, .include = on});
        next = static_cast<Index>(plan.nodes.size() - 1);
    }
    plan.start = {
        .groups_begin = static_cast<Index>(plan.arc_groups.size()), .groups_end = append(free), .next = next};
    return plan;
}

}  // namespace gtflops

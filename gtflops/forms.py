"""The two forms of the selection problem, in one shape: what items cost together, and the best of them within a limit.

An *item* is what is chosen or not as a whole: a tensor, or the tensors of a layer. Both forms know what a step costs
whatever is chosen (``base``), can have items paid beforehand, and can merge items.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from gtflops import _core
from gtflops.closure import CopiedByFields, Segments, csr
from gtflops.solver import GraphKnapsack, KnapsackResult, knapsack

CostName: TypeAlias = Literal["flops", "time"]
FormName: TypeAlias = Literal["graph", "chain"]

Items: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """What it costs to add up the gradients of a tensor's uses: ``cost`` for each chosen one but the first.

    ``parts`` are the uses that each item has: int64 [items].
    """

    parts: npt.NDArray[np.int64]
    cost: int

    def of(self, items: Items) -> int:
        """What is paid where these items are chosen."""
        return self.cost * max(0, int(self.parts[items].sum()) - 1)

    def of_many(self, many: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """The same for each row of bool [selections, items]."""
        more: npt.NDArray[np.int64] = np.maximum(many.astype(np.int64) @ self.parts - 1, 0)
        return self.cost * more

    def beside(self, item: int) -> npt.NDArray[np.int64]:
        """What each item costs where ``item`` is chosen: int64 [items]."""
        costs = self.cost * self.parts
        costs[item] -= self.cost
        return costs

    def at_most(self) -> npt.NDArray[np.int64]:
        """Costs of items of which no sum is below what is paid, and that of all is that."""
        return self.beside(int(self.parts.argmax())) if self.parts.any() else self.parts


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """What is chosen, its worth, and what no other choice within the limits exceeds; equal where ``optimal``."""

    mask: Items
    value: float
    upper_bound: float
    optimal: bool


#: The most problems that are solved to find the best selection where sums have parts.
MOST_PROBLEMS = 256


class Form(Protocol):
    """A selection problem: items, what they cost together, and the best of them within a limit."""

    @property
    def base(self) -> int:
        """What a step costs in which no item is chosen."""

    def total(self, items: Items) -> int:
        """What a step costs in which these items are chosen, in this form."""

    def alone(self) -> npt.NDArray[np.int64]:
        """What a step costs in which only one item is chosen, for each."""

    def solve(self, worth: npt.NDArray[np.float64], limit: int) -> KnapsackResult:
        """The items of most worth whose step costs at most ``limit``, which is at least ``base``."""

    def paid(self, items: Items) -> Self:
        """The problem that is left where these items are chosen already, and cost nothing more."""

    def merged(self, item_of: npt.NDArray[np.intp]) -> Self:
        """The problem whose item ``i`` is all items ``k`` with ``item_of[k] == i``."""

    def surcharged(self, weight: int, surcharge: npt.NDArray[np.int64]) -> Self:
        """The problem of base 0 in which costs are ``weight`` times as large, and each item costs ``surcharge`` more.

        The sum of its costs has to fit int64.
        """


@dataclass(frozen=True, eq=False)
class ChainForm:
    """Items of own cost ``own``, which also need the first ``depth`` of the ``shared`` costs."""

    base: int
    own: npt.NDArray[np.int64]
    depth: npt.NDArray[np.intp]
    shared: npt.NDArray[np.int64]

    @classmethod
    def of(cls, base: int, segments: Segments, sums: Sequence[Sum] = ()) -> "ChainForm":
        own, shared = segments.chain_costs()
        own = own + sum(one.at_most() for one in sums)
        depth = np.array(
            [position + 1 if needs else 0 for position, needs in enumerate(segments.gradient_of)], dtype=np.intp
        )
        return cls(base, own, depth, shared)

    @cached_property
    def _cumulative(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.shared)])

    def total(self, items: Items) -> int:
        return self.base + int(self.own[items].sum() + self._cumulative[self.depth[items].max(initial=0)])

    def alone(self) -> npt.NDArray[np.int64]:
        return self.base + self.own + self._cumulative[self.depth]

    def solve(self, worth: npt.NDArray[np.float64], limit: int) -> KnapsackResult:
        order = np.argsort(self.depth, kind="stable")
        added = np.diff(self._cumulative[self.depth[order]], prepend=0)
        best = knapsack(self.own[order], added, worth[order], limit - self.base)
        mask = np.empty_like(best.mask)
        mask[order] = best.mask
        return replace(best, mask=mask)

    def paid(self, items: Items) -> "ChainForm":
        shared = self.shared.copy()
        shared[: self.depth[items].max(initial=0)] = 0
        return replace(self, base=self.total(items), own=np.where(items, 0, self.own), shared=shared)

    def merged(self, item_of: npt.NDArray[np.intp]) -> "ChainForm":
        own = np.zeros(item_of.max(initial=-1) + 1, dtype=np.int64)
        depth = np.zeros(len(own), dtype=np.intp)
        np.add.at(own, item_of, self.own)
        np.maximum.at(depth, item_of, self.depth)
        return replace(self, own=own, depth=depth)

    def surcharged(self, weight: int, surcharge: npt.NDArray[np.int64]) -> "ChainForm":
        return replace(self, base=0, own=weight * self.own + surcharge, shared=weight * self.shared)


@dataclass(frozen=True, eq=False)
class GraphForm(CopiedByFields):
    """Items that need segments of the backward pass, each of which costs once, and ``sums``: the exact cost.

    ``chain`` is the same problem in the chain form, an upper bound of every cost in this one.
    """

    base: int
    dependencies: tuple[tuple[int, ...], ...]
    item_segments: tuple[tuple[int, ...], ...]
    costs: npt.NDArray[np.int64]
    chain: ChainForm
    sums: tuple[Sum, ...] = ()

    @classmethod
    def of(cls, base: int, segments: Segments, sums: tuple[Sum, ...] = ()) -> "GraphForm":
        costs = segments.costs.sum(axis=0)
        return cls(base, segments.dependencies, segments.gradient_of, costs, ChainForm.of(base, segments, sums), sums)

    @cached_property
    def _knapsack(self) -> GraphKnapsack:
        return GraphKnapsack(self.dependencies, self.item_segments, self.costs)

    @cached_property
    def _closure(self) -> _core.ClosureCosts:
        return _core.ClosureCosts(*csr(self.dependencies), *csr(self.item_segments), self.costs[np.newaxis])

    def total(self, items: Items) -> int:
        return self.base + int(self._closure.cost(items)[0]) + sum(one.of(items) for one in self.sums)

    def totals(self, many: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """What steps cost, int64 [selections], for many selections at once: bool [selections, items]."""
        return self.base + self._closure.costs(many)[:, 0] + sum(one.of_many(many) for one in self.sums)

    def alone(self) -> npt.NDArray[np.int64]:
        return self.totals(np.eye(len(self.item_segments), dtype=np.bool_))

    def solve(self, worth: npt.NDArray[np.float64], limit: int) -> KnapsackResult:
        if self.sums:
            problems = math.prod(int(np.count_nonzero(one.parts)) for one in self.sums)
            return self._best_by_first(worth, limit) if problems <= MOST_PROBLEMS else self._within_sums(worth, limit)
        best = self._knapsack.solve(worth, limit - self.base)
        if best.optimal or limit < self.chain.base:
            return best
        # What fits in the chain form fits here, and may be better than a search that was cut short.
        chain = self.chain.solve(worth, limit)
        if chain.value <= best.value:
            return best
        return KnapsackResult(
            mask=chain.mask,
            value=chain.value,
            cost=self.total(chain.mask) - self.base,
            upper_bound=max(chain.value, best.upper_bound),
            optimal=chain.value >= best.upper_bound,
        )

    def _best_by_first(self, worth: npt.NDArray[np.float64], limit: int) -> KnapsackResult:
        """The best by the first use of a tensor that is chosen: then each other one costs the same, whichever are."""
        found = [form.solve(np.where(left_out, 0.0, worth), limit) for left_out, form in self._by_first]
        best = max(found, key=lambda one: one.value)
        bound = max(one.upper_bound for one in found)
        return replace(
            best,
            cost=self.total(best.mask) - self.base,
            upper_bound=max(best.value, bound),
            optimal=best.value >= bound,
        )

    def _within_sums(self, worth: npt.NDArray[np.float64], limit: int) -> KnapsackResult:
        """What is best where each part of a sum pays for an addition, which is one too many for each sum; bounded by
        what is best where none does."""
        without = replace(self, sums=())
        dearer = without.surcharged(1, np.sum([one.at_most() for one in self.sums], axis=0))
        found = replace(dearer, base=self.base, chain=self.chain).solve(worth, limit)
        bound = without.solve(worth, limit).upper_bound
        return replace(
            found,
            cost=self.total(found.mask) - self.base,
            upper_bound=max(found.value, bound),
            optimal=found.value >= bound,
        )

    @cached_property
    def _by_first(self) -> list[tuple[Items, "GraphForm"]]:
        """For each use of one of the tensors, the items of the uses before it, and the problem without these.

        Where it is not chosen, but some after it are, a cost is too high by one addition: that selection has its own
        cost in a later problem.
        """
        one, *others = self.sums
        without = replace(self, sums=tuple(others))
        by_first = []
        for item in np.flatnonzero(one.parts).tolist():
            left_out = (np.arange(len(one.parts)) < item) & (one.parts > 0)
            # The chain form, an upper bound already, stays as it is.
            form = replace(without.surcharged(1, one.beside(item)), base=self.base, chain=self.chain)
            by_first.append((left_out, form))
        return by_first

    def paid(self, items: Items) -> "GraphForm":
        costs = np.where(self._closure.reached(items), 0, self.costs)
        left = replace(
            self,
            base=self.total(items),
            costs=costs,
            chain=self.chain.paid(items),
            sums=tuple(one for one in self.sums if not one.parts[items].any()),
        )
        each = np.zeros(len(items), dtype=np.int64)
        for one in self.sums:
            if one.parts[items].any():
                each += one.cost * np.where(items, 0, one.parts)
        return replace(left.surcharged(1, each), base=left.base, chain=left.chain) if each.any() else left

    def merged(self, item_of: npt.NDArray[np.intp]) -> "GraphForm":
        rows: list[set[int]] = [set() for _ in range(item_of.max(initial=-1) + 1)]
        for item, segments in zip(item_of, self.item_segments, strict=True):
            rows[item].update(segments)
        sums = [Sum(np.zeros(len(rows), dtype=np.int64), one.cost) for one in self.sums]
        for one, merged in zip(self.sums, sums, strict=True):
            np.add.at(merged.parts, item_of, one.parts)
        item_segments = tuple(tuple(sorted(row)) for row in rows)
        return replace(self, item_segments=item_segments, chain=self.chain.merged(item_of), sums=tuple(sums))

    def surcharged(self, weight: int, surcharge: npt.NDArray[np.int64]) -> "GraphForm":
        own = range(len(self.costs), len(self.costs) + len(surcharge))  # a segment for each item
        return GraphForm(
            base=0,
            dependencies=(*self.dependencies, *(() for _ in own)),
            item_segments=tuple((*row, segment) for row, segment in zip(self.item_segments, own, strict=True)),
            costs=np.concatenate([weight * self.costs, surcharge]),
            chain=self.chain.surcharged(weight, surcharge),
            sums=tuple(replace(one, cost=weight * one.cost) for one in self.sums),
        )


def fill(
    form: Form,
    items: Items,
    worth: npt.NDArray[np.float64],
    elements: npt.NDArray[np.int64],
    limit: int,
    room: float,
) -> Items:
    """``items`` and, by worth, each other of positive worth that fits the limit and the elements still free."""
    filled = items.copy()
    by_worth = np.argsort(-worth, kind="stable")
    for item in by_worth[(worth > 0)[by_worth] & ~items[by_worth]]:
        if elements[item] <= room:
            filled[item] = True
            if form.total(filled) <= limit:
                room -= int(elements[item])
            else:
                filled[item] = False
    return filled

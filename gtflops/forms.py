"""The two forms of the selection problem, in one shape: what items cost together, and the best of them within a limit.

An *item* is what is chosen or not as a whole: a tensor, or the tensors of a layer. Both forms know what a step costs
whatever is chosen (``base``), can have items paid beforehand, and can merge items.
"""

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
class Solution:
    """What is chosen, its worth, and what no other choice within the limits exceeds; equal where ``optimal``."""

    mask: Items
    value: float
    upper_bound: float
    optimal: bool


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
    def of(cls, base: int, segments: Segments) -> "ChainForm":
        own, shared = segments.chain_costs()
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
    """Items that need segments of the backward pass, each of which costs once: the exact cost.

    ``chain`` is the same problem in the chain form, an upper bound of every cost in this one.
    """

    base: int
    dependencies: tuple[tuple[int, ...], ...]
    item_segments: tuple[tuple[int, ...], ...]
    costs: npt.NDArray[np.int64]
    chain: ChainForm

    @classmethod
    def of(cls, base: int, segments: Segments) -> "GraphForm":
        costs = segments.costs.sum(axis=0)
        return cls(base, segments.dependencies, segments.gradient_of, costs, ChainForm.of(base, segments))

    @cached_property
    def _knapsack(self) -> GraphKnapsack:
        return GraphKnapsack(self.dependencies, self.item_segments, self.costs)

    @cached_property
    def _closure(self) -> _core.ClosureCosts:
        return _core.ClosureCosts(*csr(self.dependencies), *csr(self.item_segments), self.costs[np.newaxis])

    def total(self, items: Items) -> int:
        return self.base + int(self._closure.cost(items)[0])

    def totals(self, many: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """What steps cost, int64 [selections], for many selections at once: bool [selections, items]."""
        return self.base + self._closure.costs(many)[:, 0]

    def alone(self) -> npt.NDArray[np.int64]:
        return self.totals(np.eye(len(self.item_segments), dtype=np.bool_))

    def solve(self, worth: npt.NDArray[np.float64], limit: int) -> KnapsackResult:
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

    def paid(self, items: Items) -> "GraphForm":
        costs = np.where(self._closure.reached(items), 0, self.costs)
        return replace(self, base=self.total(items), costs=costs, chain=self.chain.paid(items))

    def merged(self, item_of: npt.NDArray[np.intp]) -> "GraphForm":
        rows: list[set[int]] = [set() for _ in range(item_of.max(initial=-1) + 1)]
        for item, segments in zip(item_of, self.item_segments, strict=True):
            rows[item].update(segments)
        return replace(self, item_segments=tuple(tuple(sorted(row)) for row in rows), chain=self.chain.merged(item_of))

    def surcharged(self, weight: int, surcharge: npt.NDArray[np.int64]) -> "GraphForm":
        own = range(len(self.costs), len(self.costs) + len(surcharge))  # a segment for each item
        return GraphForm(
            base=0,
            dependencies=(*self.dependencies, *(() for _ in own)),
            item_segments=tuple((*row, segment) for row, segment in zip(self.item_segments, own, strict=True)),
            costs=np.concatenate([weight * self.costs, surcharge]),
            chain=self.chain.surcharged(weight, surcharge),
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

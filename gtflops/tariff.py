"""What the operators of a graph cost, one by one, and what a step costs at any sizes of a family, without its graph."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm, prod

import numpy as np
import numpy.typing as npt

from gtflops.closure import AFTER_FORWARD, Segments
from gtflops.graph import GETITEM, Graph, Phase
from gtflops.operators import Flops, FlopsByOutput, price
from gtflops.polynomials import Monomial, terms_of
from gtflops.shapes import Family

#: Phases in which operators run.
STEP = (Phase.FORWARD, *AFTER_FORWARD)


def node_prices(graph: Graph) -> tuple[list[Flops], dict[str, Counter[str]]]:
    """The price of every node by the operator table; and, by operator without a price, the modules it runs in."""
    prices: list[Flops] = [Flops()] * len(graph.nodes)
    cache: dict[int, Flops | FlopsByOutput | None] = {}  # equal calls of a graph are one object
    unsupported: dict[str, Counter[str]] = {}
    for index, node in enumerate(graph.nodes):
        if node.phase not in STEP:
            continue
        if node.call.op == GETITEM:
            (position,) = node.call.args
            made_by = cache.get(id(graph.nodes[node.inputs[0]].call))  # none for a part of a part
            if isinstance(made_by, FlopsByOutput):
                assert isinstance(position, int)
                prices[index] = made_by.outputs[position]
            continue
        if id(node.call) not in cache:
            cache[id(node.call)] = price(node.call)
        cost = cache[id(node.call)]
        if cost is None:
            unsupported.setdefault(node.call.op, Counter())[node.module] += 1
        else:
            prices[index] = cost.shared if isinstance(cost, FlopsByOutput) else cost
    return prices, unsupported


@dataclass(frozen=True)
class StepCosts:
    """What a step costs: its forward pass, int64 [2], matrix products and the rest; and its segments."""

    forward: npt.NDArray[np.int64]
    segments: Segments


@dataclass(frozen=True)
class Tariff:
    """What a step costs at the sizes of a family, as polynomials of them.

    The prices of a family's nodes are polynomials where the formulas of its operators only add and multiply sizes:
    they are run once, on polynomials. ``nodes`` are their coefficients, times ``denominator``, int64
    [monomials, 2, nodes], and ``bounds``, for each monomial, the sums of their absolute values. ``sums`` are int64
    [monomials, 6 + 4 segments]: what the forward pass costs, what runs always, and each segment.
    """

    monomials: tuple[Monomial, ...]
    denominator: int
    bounds: tuple[int, ...]
    nodes: npt.NDArray[np.int64]
    sums: npt.NDArray[np.int64]
    like: Segments

    @classmethod
    def of(cls, family: Family, names: Sequence[str], needed: Sequence[int]) -> "Tariff | None":
        """From what :func:`gtflops.closure.needed_by` gives of the family. ``None`` where a formula asks for more of a
        size than polynomials know (which is greater? its logarithm?), and where numbers would not fit 64 bits."""
        try:
            prices, _ = node_prices(family.general)
        except Exception:  # a formula, perhaps the user's, that polynomials will not do for: it is run on integers
            return None
        terms = [[terms_of(flops[column]) for flops in prices] for column in (0, 1)]
        if any(by_monomial is None for column in terms for by_monomial in column):
            return None
        monomials = sorted({monomial for column in terms for by_monomial in column for monomial in by_monomial or ()})
        denominator = lcm(
            *(Fraction(factor).denominator for column in terms for node in column for factor in (node or {}).values())
        )
        coefficients = {
            monomial: [[int((node or {}).get(monomial, 0) * denominator) for node in column] for column in terms]
            for monomial in monomials
        }
        bounds = tuple(sum(abs(factor) for column in columns for factor in column) for columns in coefficients.values())
        if sum(bounds) > np.iinfo(np.int64).max:
            return None
        nodes = np.array(list(coefficients.values()), dtype=np.int64)
        graph = family.template
        in_forward = np.array([node.phase is Phase.FORWARD for node in graph.nodes], dtype=np.bool_)
        segments = [Segments.of(graph, names, needed, prices_of_one) for prices_of_one in nodes]
        sums = [
            np.concatenate([prices_of_one[:, in_forward].sum(axis=1), own.always, own.costs.ravel()])
            for prices_of_one, own in zip(nodes, segments, strict=True)
        ]
        tariff = cls(tuple(monomials), denominator, bounds, nodes, np.array(sums, dtype=np.int64), segments[0])
        return tariff if all(tariff._agrees(family, point) for point in family.points) else None

    def _agrees(self, family: Family, point: Mapping[str, int]) -> bool:
        """Whether each node has the price that its formula gives for integers: a formula that asks for the type of a
        size would take another branch for a polynomial, and nothing would tell."""
        graph = family.at(point)
        assert graph is not None
        if not self._fits(point):
            return False
        exact = np.array(node_prices(graph)[0], dtype=np.int64).T
        return bool((np.tensordot(self._values(point), self.nodes, axes=1) == exact * self.denominator).all())

    def at(self, point: Mapping[str, int]) -> StepCosts | None:
        """The costs at these sizes. ``None`` where they may not fit 64 bits, or come out as no integers."""
        if not self._fits(point):
            return None
        sums, remainders = np.divmod(self._values(point) @ self.sums, self.denominator)
        if remainders.any():
            return None
        return StepCosts(sums[:2], replace(self.like, always=sums[2:6], costs=sums[6:].reshape(4, -1)))

    def prices_at(self, point: Mapping[str, int]) -> npt.NDArray[np.int64]:
        """The price of each node at sizes that :meth:`at` has costs for: read-only int64 [2, nodes]."""
        prices = np.tensordot(self._values(point), self.nodes, axes=1) // self.denominator
        prices.flags.writeable = False
        return prices

    def _fits(self, point: Mapping[str, int]) -> bool:
        """Whether no sum of products of these overflows."""
        products = (value * bound for value, bound in zip(self._monomials_at(point), self.bounds, strict=True))
        return sum(products) <= np.iinfo(np.int64).max

    def _values(self, point: Mapping[str, int]) -> npt.NDArray[np.int64]:
        return np.array(self._monomials_at(point), dtype=np.int64)

    def _monomials_at(self, point: Mapping[str, int]) -> list[int]:
        return [prod(point[name] for name in monomial) for monomial in self.monomials]

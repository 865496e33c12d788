"""The selection problem as a mixed-integer program, solved by HiGHS: an answer that owes nothing to gtflops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

_OPTIMAL = 0  # what scipy calls status


@dataclass(frozen=True)
class Answer:
    """``mask`` is None where no selection was found in time; HiGHS proves that none is worth more than ``bound``."""

    mask: NDArray[np.bool_] | None
    bound: float
    optimal: bool


def highs_chain(dw: Any, dy: Any, importance: Any, capacity: int, seconds: float) -> Answer:
    """The chain form: tensor k pays dw[k], and needs the activation gradients 0 to k."""
    n = len(dw)
    above = [[k - 1] if k else [] for k in range(n)]
    return _highs(dw, above, [[k] for k in range(n)], dy, importance, capacity, seconds)


def highs_graph(
    dependencies: Sequence[Sequence[int]],
    tensor_segments: Sequence[Sequence[int]],
    costs: Any,
    importance: Any,
    capacity: int,
    seconds: float,
    elements: Any = None,
    max_elements: int = 0,
) -> Answer:
    """The graph form: a tensor pays nothing by itself, and needs its segments. A second limit where it has elements."""
    own = np.zeros(len(tensor_segments), dtype=np.int64)
    return _highs(own, dependencies, tensor_segments, costs, importance, capacity, seconds, elements, max_elements)


def _highs(
    own: Any,
    dependencies: Sequence[Sequence[int]],
    tensor_segments: Sequence[Sequence[int]],
    costs: Any,
    importance: Any,
    capacity: int,
    seconds: float,
    elements: Any = None,
    max_elements: int = 0,
) -> Answer:
    """Binary x[k] trains tensor k, binary y[s] runs segment s: x[k] <= y[s], y[s] <= y[t] where one needs the other.

    HiGHS works in float64, to absolute tolerances of 1e-6. Between value and bound: importances are scaled to sum 1e6.
    On rows: costs are given in units of their greatest common divisor, with half a unit of room, which is exact while
    they sum to at most 1e11 units. With larger numbers HiGHS takes its rounding for a violation, and misses selections
    that just fit; then the unit is larger and costs are rounded down, so that nothing that fits is lost, but what it
    selects may exceed the capacity: the caller has to sum its selection.
    """
    n, m = len(own), len(costs)
    worth = np.concatenate([np.asarray(importance, dtype=np.float64), np.zeros(m)])
    paid = np.concatenate([np.asarray(own, dtype=np.int64), np.asarray(costs, dtype=np.int64)])
    total = worth[worth > 0].sum()
    if total == 0:
        return Answer(np.zeros(n, dtype=bool), 0.0, True)
    scale, unit = 1e6 / total, max(1, int(np.gcd.reduce(paid)), -(-int(paid.sum()) // 10**11))
    needs = [(k, n + s) for k, segments in enumerate(tensor_segments) for s in segments]
    needs += [(n + s, n + t) for s, sources in enumerate(dependencies) for t in sources]
    constraints = [LinearConstraint(paid // unit, -np.inf, capacity // unit + 0.5)]
    if elements is not None:
        row = np.concatenate([elements, np.zeros(m, dtype=np.int64)])
        constraints.append(LinearConstraint(row, -np.inf, max_elements + 0.5))
    if needs:
        rows = np.repeat(np.arange(len(needs)), 2)
        signs = np.tile([1.0, -1.0], len(needs))
        order = sparse.csr_array((signs, (rows, np.ravel(needs))), shape=(len(needs), n + m))
        constraints.append(LinearConstraint(order, -np.inf, 0.0))
    answer = milp(
        -scale * worth,
        integrality=np.ones(n + m, dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    bound = total if answer.mip_dual_bound is None else -answer.mip_dual_bound / scale
    mask = None if answer.x is None else answer.x[:n] > 0.5
    return Answer(mask, bound, answer.status == _OPTIMAL)

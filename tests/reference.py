"""Slow, plain answers that the C++ core must agree with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def chain_cost(dw: Sequence[int], dy: Sequence[int], selected: Sequence[int]) -> int:
    """What a selection, given as ascending indices, costs in the chain form."""
    return sum(dw[k] for k in selected) + (sum(dy[: selected[-1] + 1]) if selected else 0)


def chain_optimum_brute_force(
    dw: Sequence[int], dy: Sequence[int], importance: Sequence[float], capacity: int
) -> float:
    """The best value of any of the 2^n selections."""
    n = len(dw)
    selections = ([k for k in range(n) if subset >> k & 1] for subset in range(1 << n))
    return max(sum(importance[k] for k in s) for s in selections if chain_cost(dw, dy, s) <= capacity)


def chain_optimum_dp(dw: Sequence[int], dy: Sequence[int], importance: Sequence[float], capacity: int) -> float:
    """The best value, by dynamic programming over exact costs: best[weight] over the tensors so far."""
    best = {0: 0.0}
    optimum = 0.0
    for cost, depth_cost, worth in zip(dw, accumulate(dy), importance, strict=True):
        room = capacity - depth_cost
        taken = {weight + cost: value + worth for weight, value in best.items() if weight + cost <= room}
        optimum = max(optimum, max(taken.values(), default=0.0))
        for weight, value in taken.items():
            best[weight] = max(best.get(weight, value), value)
    return optimum


def closure(
    dependencies: Sequence[Sequence[int]], tensor_segments: Sequence[Sequence[int]], selected: Sequence[int]
) -> set[int]:
    """The segments that the selected tensors reach."""
    reached: set[int] = set()
    pending = [segment for tensor in selected for segment in tensor_segments[tensor]]
    while pending:
        segment = pending.pop()
        if segment not in reached:
            reached.add(segment)
            pending.extend(dependencies[segment])
    return reached

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


def graph_optimum_brute_force(
    dependencies: Sequence[Sequence[int]],
    tensor_segments: Sequence[Sequence[int]],
    costs: Sequence[int],
    importance: Sequence[float],
    capacity: int,
) -> float:
    """The best value of any of the 2^n selections."""
    n = len(tensor_segments)
    selections = ([k for k in range(n) if subset >> k & 1] for subset in range(1 << n))
    alone = [closure(dependencies, tensor_segments, [k]) for k in range(n)]
    return max(
        sum(importance[k] for k in s)
        for s in selections
        if sum(costs[segment] for segment in set().union(*(alone[k] for k in s))) <= capacity
    )


def graph_optimum_ideals(
    dependencies: Sequence[Sequence[int]],
    tensor_segments: Sequence[Sequence[int]],
    costs: Sequence[int],
    importance: Sequence[float],
    capacity: int,
) -> float:
    """The best value, over the sets of segments (as bits) that contain what they depend on and fit the capacity."""
    needs = [sum(1 << source for source in sources) for sources in dependencies]
    ideals = {0: 0}  # cost of each, over the segments so far
    for segment, cost in enumerate(costs):
        ideals |= {
            ideal | 1 << segment: paid + cost
            for ideal, paid in ideals.items()
            if needs[segment] & ~ideal == 0 and paid + cost <= capacity
        }
    wants = [sum(1 << segment for segment in set(segments)) for segments in tensor_segments]
    worthwhile = [(bits, worth) for bits, worth in zip(wants, importance, strict=True) if worth > 0]
    return max(sum(worth for bits, worth in worthwhile if bits & ~ideal == 0) for ideal in ideals)


def chain_form(
    dependencies: Sequence[Sequence[int]], tensor_segments: Sequence[Sequence[int]], costs: Sequence[int]
) -> tuple[list[int], list[int]]:
    """dw and dy of a graph, tensors in backward order: who first needs a shared segment pays for it as dy."""
    dw, dy = [0] * len(tensor_segments), [0] * len(tensor_segments)
    needed_by: list[list[int]] = [[] for _ in costs]
    for k in range(len(tensor_segments)):
        for segment in closure(dependencies, tensor_segments, [k]):
            needed_by[segment].append(k)
    for tensors, cost in zip(needed_by, costs, strict=True):
        if tensors:
            (dw if len(tensors) == 1 else dy)[tensors[0]] += cost
    return dw, dy

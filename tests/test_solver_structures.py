"""The graph form on structures beyond those of today's models, against HiGHS: towers, many experts, none at all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from gtflops.solver import GraphKnapsack
from highs import highs_graph

SECONDS = 60


class GraphOfSegments:
    """A graph that grows by segments of random cost, tensors among them."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.dependencies: list[list[int]] = []
        self.tensor_segments: list[list[int]] = []
        self.costs: list[int] = []

    def segment(self, dependencies: list[int]) -> int:
        self.dependencies.append(dependencies)
        self.costs.append(int(self.rng.integers(5, 20)) * 10**6 + int(self.rng.integers(0, 1000)))
        return len(self.costs) - 1

    def tensors(self, count: int, segment: int) -> None:
        for _ in range(count):
            self.tensor_segments.append([self.segment([segment])])


def towers(number: int, depth: int, tensors: int) -> GraphOfSegments:
    """Chains side by side: (depth + 1) ** number ways to stop."""
    graph = GraphOfSegments(number)
    for _ in range(number):
        last: list[int] = []
        for _ in range(depth):
            last = [graph.segment(last)]
            graph.tensors(tensors, last[0])
    return graph


def experts(layers: int, number: int, tensors: int) -> GraphOfSegments:
    """Layers of parallel branches: 2 ** number ways to stop in each."""
    graph = GraphOfSegments(number)
    last: list[int] = []
    for _ in range(layers):
        branches = [graph.segment(last) for _ in range(number)]
        for branch in branches:
            graph.tensors(tensors, branch)
        last = [graph.segment(branches)]
    return graph


def cross_attention(layers: int, encoder: int) -> GraphOfSegments:
    """A decoder with keys and values of each layer, which the encoder needs, and a weight and a bias for each."""
    graph = GraphOfSegments(layers)
    last: list[int] = []
    crossings = []
    for _ in range(layers):
        for _ in range(2):
            crossings.append(graph.segment(last))
            graph.tensors(2, crossings[-1])
        last = [graph.segment(last)]
        graph.tensors(4, last[0])
    last = crossings
    for _ in range(encoder):
        last = [graph.segment(last)]
        graph.tensors(4, last[0])
    return graph


STRUCTURES: dict[str, Callable[[], GraphOfSegments]] = {
    "2 towers of 48": lambda: towers(2, 48, 2),
    "6 towers of 50": lambda: towers(6, 50, 2),
    "6 towers of 12, 6 tensors each": lambda: towers(6, 12, 6),
    "4 layers of 64 experts": lambda: experts(4, 64, 3),
    "3 layers of 16 experts, 6 tensors each": lambda: experts(3, 16, 6),
    "24 layers of cross-attention": lambda: cross_attention(24, 24),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_optimum_is_the_one_that_highs_proves(structure: str) -> None:
    graph = STRUCTURES[structure]()
    rows = graph.dependencies, graph.tensor_segments
    costs = np.array(graph.costs)
    solver = GraphKnapsack(*rows, costs)
    importance = graph.rng.gamma(0.5, 1.0, len(graph.tensor_segments))
    for share in (0.2, 0.5):
        capacity = int(share * costs.sum())
        answer = highs_graph(*rows, costs, importance, capacity, SECONDS)
        assert answer.optimal, share
        assert answer.mask is not None, share
        result = solver.solve(importance, capacity)
        assert result.optimal, share
        assert result.cost <= capacity, share
        assert result.value == pytest.approx(importance[answer.mask].sum(), rel=1e-9), share


def test_what_is_not_proved_says_so() -> None:
    """Without any structure, the plan is given up; the bound still holds, and the selection still fits."""
    rng = np.random.default_rng(0)
    dependencies = [[j for j in range(i) if rng.random() < 0.01] for i in range(300)]
    costs = 1000 * rng.integers(1, 1000, len(dependencies))
    tensor_segments = [sorted(set(rng.integers(0, 300, 3).tolist())) for _ in range(300)]
    importance = rng.gamma(0.5, 1.0, len(tensor_segments))
    capacity = int(0.5 * costs.sum())
    answer = highs_graph(dependencies, tensor_segments, costs, importance, capacity, SECONDS)
    assert answer.optimal
    assert answer.mask is not None
    result = GraphKnapsack(dependencies, tensor_segments, costs).solve(importance, capacity)
    assert not result.optimal
    assert 0 < result.value <= importance[answer.mask].sum() * (1 + 1e-9) <= result.upper_bound * (1 + 1e-9)
    assert result.cost <= capacity


def test_a_graph_that_is_not_planned_is_solved_closely() -> None:
    """Where only what is paid makes tensors cheap, and a search to its end would take many seconds."""
    for share, tensors in ((0.15, 3), (0.5, 1)):
        graph = GraphOfSegments(5)
        shared = 400
        dependencies = [
            sorted({int(s) for s in graph.rng.integers(max(0, s - 60), s, size=2)}) if s else [] for s in range(shared)
        ]
        dependencies += [[k // tensors] for k in range(shared * tensors)]
        tensor_segments = [[shared + k] for k in range(shared * tensors)]
        costs = graph.rng.integers(1, 1000, size=len(dependencies))
        importance = graph.rng.gamma(0.5, 1, size=len(tensor_segments))
        best = GraphKnapsack(dependencies, tensor_segments, costs).solve(importance, int(costs.sum() * share))
        assert best.cost <= int(costs.sum() * share)
        assert best.upper_bound <= 1.12 * best.value

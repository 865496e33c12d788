"""Every way to solve an instance agrees on it: brute force, the plain references, a NumPy table, C++ and HiGHS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.random import Generator
from numpy.typing import NDArray

from gtflops.solver import GraphKnapsack, KnapsackResult, knapsack
from highs import Answer, highs_chain, highs_graph
from reference import (
    chain_cost,
    chain_form,
    chain_optimum_brute_force,
    chain_optimum_dp,
    closure,
    graph_optimum_brute_force,
    graph_optimum_ideals,
)

Rows = list[list[int]]
Structure = tuple[Rows, Rows]
"""Dependencies of the segments, and segments of the tensors."""
Votes = dict[str, float]
"""What each solver says that the best selection is worth."""

SECONDS = 10.0  # HiGHS needs milliseconds
TABLE_CELLS = 10_000


@dataclass(frozen=True)
class GraphInstance:
    """Printed, it is the literal that makes it again."""

    dependencies: Rows
    tensor_segments: Rows
    costs: list[int]
    importance: list[float]
    capacity: int


@dataclass(frozen=True)
class ChainInstance:
    """Printed, it is the literal that makes it again."""

    dw: list[int]
    dy: list[int]
    importance: list[float]
    capacity: int

    def as_graph(self) -> GraphInstance:
        """Segment 2k is the activation gradient of tensor k, segment 2k + 1 its weight gradient."""
        n = len(self.dw)
        dependencies = [
            [2 * k - 2] if side == 0 and k else [2 * k] if side else [] for k in range(n) for side in (0, 1)
        ]
        costs = [cost for pair in zip(self.dy, self.dw, strict=True) for cost in pair]
        return GraphInstance(dependencies, [[2 * k + 1] for k in range(n)], costs, self.importance, self.capacity)


Instance = GraphInstance | ChainInstance

# --- structures of graphs -------------------------------------------------------------------------------------------


def chains(rng: Generator) -> Structure:
    """A chain of segments; tensors hang on any of them."""
    m = int(rng.integers(1, 11))
    return [[s - 1] if s else [] for s in range(m)], some_rows(rng, m)


def diamonds(rng: Generator) -> Structure:
    """Segments that part and meet again: 3 -> {1, 2} -> 0, 6 -> {4, 5} -> 3."""
    m = 3 * int(rng.integers(1, 4)) + 1
    rows: Rows = [[] if s == 0 else [s - 2, s - 1] if s % 3 == 0 else [s // 3 * 3] for s in range(m)]
    return rows, some_rows(rng, m)


def parallel_branches(rng: Generator) -> Structure:
    """Blocks of q, k and v: each tensor its own branch, each block on all or some branches of the one before."""
    dependencies: Rows = [[]]
    tensors: Rows = []
    entry = [0]
    for _ in range(rng.integers(1, 4)):
        width = int(rng.integers(2, 4))
        branches = range(len(dependencies), len(dependencies) + width)
        dependencies += [list(entry) for _ in branches]
        tensors += [[branch] for branch in branches]
        entry = sorted(rng.choice(branches, rng.integers(1, width + 1), replace=False).tolist())
    return dependencies, tensors


def encoder_decoder(rng: Generator) -> Structure:
    """A decoder's chain with a cross link from every layer; the encoder's chain needs all of those."""
    layers, depth = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    dependencies: Rows = []
    tensors: Rows = []
    cross: list[int] = []
    for layer in range(layers):
        body = len(dependencies)
        dependencies += [[body - 2] if layer else [], [body]]
        cross.append(body + 1)
        tensors += [[body], [body + 1]]
    for layer in range(depth):
        dependencies.append([len(dependencies) - 1] if layer else cross)
        tensors.append([len(dependencies) - 1])
    return dependencies, tensors


def experts(rng: Generator) -> Structure:
    """Layers of a router and experts: below the layer all of them are needed, an expert's tensors need itself alone."""
    dependencies: Rows = [[]]
    tensors: Rows = []
    entry = [0]
    for _ in range(rng.integers(1, 3)):
        first = len(dependencies)
        number = int(rng.integers(2, 5))
        dependencies += [list(entry) for _ in range(number)]
        tensors += [[first + expert] for expert in range(number)]
        entry = list(range(first, first + number))
    dependencies.append(entry)
    return dependencies, [*tensors, [len(dependencies) - 1]]


def towers(rng: Generator) -> Structure:
    """Two or three chains side by side on one loss, as CLIP has them."""
    dependencies: Rows = [[]]
    for _ in range(rng.integers(2, 4)):
        for level in range(rng.integers(1, 4)):
            dependencies.append([len(dependencies) - 1] if level else [0])
    return dependencies, some_rows(rng, len(dependencies))


def any_graph(rng: Generator) -> Structure:
    """Any acyclic graph; tensors with several direct segments, with one, and with none."""
    m = int(rng.integers(0, 11))
    dependencies = [sorted(np.flatnonzero(rng.random(s) < rng.choice([0.1, 0.3, 0.6])).tolist()) for s in range(m)]
    return dependencies, some_rows(rng, m, most=3)


def private_and_shared(rng: Generator) -> Structure:
    """A chain of shared segments with one private one for each tensor, as weight gradients are; some tensors twice."""
    depth = int(rng.integers(1, 5))
    dependencies: Rows = [[s - 1] if s else [] for s in range(depth)]
    tensors: Rows = []
    for _ in range(rng.integers(1, 9)):
        if tensors and rng.random() < 0.2:
            tensors.append(list(tensors[-1]))
        else:
            tensors.append([len(dependencies)])
            dependencies.append([int(rng.integers(depth))])
    return dependencies, tensors


def some_rows(rng: Generator, segments: int, most: int = 1) -> Rows:
    """Up to nine tensors, each on up to ``most`` segments."""
    sizes = rng.integers(0 if most > 1 else 1, most + 1, size=rng.integers(0, 10))
    return [rng.integers(0, segments, size=size).tolist() if segments else [] for size in sizes]


STRUCTURES = [
    chains, diamonds, parallel_branches, encoder_decoder, experts, towers, any_graph, private_and_shared
]  # fmt: skip


# --- costs, importances and capacities ------------------------------------------------------------------------------


def some_costs(rng: Generator, number: int) -> list[int]:
    """Of one magnitude, up to 1e15; or few distinct ones; or mostly none."""
    largest = int(rng.choice([1, 5, 40, 1000, 10**6, 10**9, 10**12, 10**15]))
    costs = rng.integers(0, largest, size=number, endpoint=True)
    match rng.integers(4):
        case 0:
            costs = rng.choice(rng.integers(0, largest, size=3, endpoint=True), size=number)
        case 1:
            costs *= rng.random(number) < 0.4
    return [int(cost) for cost in costs]


def some_importances(rng: Generator, number: int) -> list[float]:
    """Whole numbers full of ties, or reals; skewed or flat; some worthless, some harmful."""
    match rng.integers(5):
        case 0:
            values = rng.integers(-2, 6, size=number).astype(np.float64)
        case 1:
            values = np.full(number, 1.0)
        case 2:
            values = rng.gamma(0.3, 1.0, size=number)
        case 3:
            values = rng.lognormal(0.0, 3.0, size=number) * rng.choice([-1.0, 1.0, 1.0, 1.0], size=number)
        case _:
            values = rng.uniform(-0.2, 1.0, size=number)
    return [float(value) for value in values]


def some_capacity(rng: Generator, total: int, spent: Callable[[], int]) -> int:
    """Nothing, everything, any share, or what some selection costs, give or take one."""
    match rng.integers(8):
        case 0:
            return 0
        case 1:
            return total
        case 2 | 3 | 4:
            return max(0, spent() + int(rng.integers(-1, 2)))
        case _:
            return int(total * rng.random())


def random_graph(rng: Generator, structure: Callable[[Generator], Structure]) -> GraphInstance:
    dependencies, tensors = structure(rng)
    costs = some_costs(rng, len(dependencies))

    def spent() -> int:
        selected = np.flatnonzero(rng.random(len(tensors)) < 0.5).tolist()
        return sum(costs[segment] for segment in closure(dependencies, tensors, selected))

    importance = some_importances(rng, len(tensors))
    if costs and rng.random() < 0.2:  # worth what it costs, and a little: the density says nothing
        importance = [float(sum(costs[s] for s in row)) + 1.0 for row in tensors]
    return GraphInstance(dependencies, tensors, costs, importance, some_capacity(rng, sum(costs), spent))


def random_chain(rng: Generator) -> ChainInstance:
    n = int(rng.integers(0, 11))
    dw, dy = some_costs(rng, n), some_costs(rng, n)
    if rng.random() < 0.25:
        dy = [0] * n
    importance = some_importances(rng, n)
    if rng.random() < 0.2:
        importance = [float(cost + rng.integers(2)) for cost in dw]
    if n > 1 and rng.random() < 0.2:  # a tensor twice
        dw[1], dy[1], importance[1] = dw[0], dy[0], importance[0]

    def spent() -> int:
        return chain_cost(dw, dy, np.flatnonzero(rng.random(n) < 0.5).tolist())

    return ChainInstance(dw, dy, importance, some_capacity(rng, sum(dw) + sum(dy), spent))


# --- the solvers ----------------------------------------------------------------------------------------------------


def chain_table(instance: ChainInstance) -> float:
    """best[c]: the most that weight gradients of c FLOPs buy, the tensors so far; read off for each depth."""
    best = np.zeros(instance.capacity + 1)
    optimum, room = 0.0, instance.capacity
    for dw, dy, worth in zip(instance.dw, instance.dy, instance.importance, strict=True):
        room -= dy
        if room < 0:
            break
        if dw <= room:
            best[dw:] = np.maximum(best[dw:], best[: best.size - dw] + worth)
        optimum = max(optimum, float(best[room]))
    return optimum


def graph_votes(graph: GraphInstance) -> Votes:
    rows = (graph.dependencies, graph.tensor_segments)

    def cost(mask: NDArray[np.bool_]) -> int:
        return sum(graph.costs[segment] for segment in closure(*rows, selected_in(mask)))

    arguments = (*rows, graph.costs, graph.importance, graph.capacity)
    return {
        "brute force": graph_optimum_brute_force(*arguments),
        "ideals": graph_optimum_ideals(*arguments),
        "GraphKnapsack": value_of(solve_graph(graph), cost, graph),
        **vote_of_highs(highs_graph(*arguments, seconds=SECONDS), cost, graph),
    }


def chain_votes(chain: ChainInstance) -> Votes:
    def cost(mask: NDArray[np.bool_]) -> int:
        return chain_cost(chain.dw, chain.dy, selected_in(mask))

    arguments = (chain.dw, chain.dy, chain.importance, chain.capacity)
    votes = {
        "brute force": chain_optimum_brute_force(*arguments),
        "plain DP": chain_optimum_dp(*arguments),
        "knapsack": value_of(knapsack(*arguments), cost, chain),
        "GraphKnapsack": value_of(solve_graph(chain.as_graph()), cost, chain),
        **vote_of_highs(highs_chain(*arguments, seconds=SECONDS), cost, chain),
    }
    if chain.capacity <= TABLE_CELLS:
        votes["NumPy table"] = chain_table(chain)
    return votes


def solve_graph(graph: GraphInstance) -> KnapsackResult:
    solver = GraphKnapsack(graph.dependencies, graph.tensor_segments, graph.costs)
    return solver.solve(graph.importance, graph.capacity)


def value_of(result: KnapsackResult, cost: Callable[[NDArray[np.bool_]], int], instance: Instance) -> float:
    """What an answer of gtflops is worth, after its own figures were summed again."""
    selected = selected_in(result.mask)
    assert result.cost == cost(result.mask) <= instance.capacity, instance
    assert result.value == sum(instance.importance[k] for k in selected), instance
    assert all(instance.importance[k] > 0 for k in selected), instance
    assert result.optimal, instance
    assert result.upper_bound == result.value, instance
    return result.value


def vote_of_highs(answer: Answer, cost: Callable[[NDArray[np.bool_]], int], instance: Instance) -> Votes:
    """None where costs are so large that HiGHS gives up, or that what it selects exceeds the capacity (``highs``)."""
    if not answer.optimal or answer.mask is None or cost(answer.mask) > instance.capacity:
        return {}
    return {"HiGHS": sum(instance.importance[k] for k in selected_in(answer.mask))}


def selected_in(mask: NDArray[np.bool_]) -> list[int]:
    return [int(k) for k in np.flatnonzero(mask)]


def assert_agreement(instance: Instance, votes: Votes) -> None:
    """HiGHS may stop at a gap of 1e-12 of all importance; the others differ in the order of sums alone."""
    worth = sum(value for value in instance.importance if value > 0)
    wrong = [
        name
        for name, value in votes.items()
        if abs(value - votes["brute force"]) > (1e-9 if name == "HiGHS" else 1e-13) * worth
    ]
    assert not wrong, f"{' and '.join(wrong)} disagree with brute force: {votes} on\n{instance}"


def assert_all_agree_on_graphs(structure: Callable[[Generator], Structure], seeds: range) -> None:
    by_highs = 0
    for seed in seeds:
        graph = random_graph(np.random.default_rng(seed), structure)
        votes = graph_votes(graph)
        assert_agreement(graph, votes)
        assert_chain_is_no_better(graph, votes["GraphKnapsack"])
        by_highs += "HiGHS" in votes
    assert by_highs > 0.9 * len(seeds)


def assert_chain_is_no_better(graph: GraphInstance, value: float) -> None:
    """The chain form's selection fits the graph's capacity too, where it costs at most as much."""
    dw, dy = chain_form(graph.dependencies, graph.tensor_segments, graph.costs)
    chain = knapsack(dw, dy, graph.importance, graph.capacity)
    segments = closure(graph.dependencies, graph.tensor_segments, selected_in(chain.mask))
    assert sum(graph.costs[segment] for segment in segments) <= chain.cost, graph
    assert chain.value <= value * (1 + 1e-13), graph  # equals may differ in the rounding of their sums


def assert_all_agree_on_chains(seeds: range) -> None:
    by_highs = by_table = 0
    for seed in seeds:
        chain = random_chain(np.random.default_rng(seed))
        votes = chain_votes(chain)
        assert_agreement(chain, votes)
        by_highs += "HiGHS" in votes
        by_table += "NumPy table" in votes
    assert by_highs > 0.9 * len(seeds)
    assert by_table > 0.2 * len(seeds)


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.__name__)
def test_all_solvers_agree_on_small_graphs(structure: Callable[[Generator], Structure]) -> None:
    assert_all_agree_on_graphs(structure, range(50))


def test_all_solvers_agree_on_small_chains() -> None:
    assert_all_agree_on_chains(range(100))


# Seeds that CI does not have, in blocks that run side by side; 10,000 instances in all.
@pytest.mark.slow
@pytest.mark.parametrize("block", range(1, 9))
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.__name__)
def test_all_solvers_agree_on_many_graphs(structure: Callable[[Generator], Structure], block: int) -> None:
    assert_all_agree_on_graphs(structure, range(125 * block, 125 * (block + 1)))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(1, 9))
def test_all_solvers_agree_on_many_chains(block: int) -> None:
    assert_all_agree_on_chains(range(250 * block, 250 * (block + 1)))

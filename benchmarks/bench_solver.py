"""The solver on one thread: a grid of instances by gtflops alone, and some of them by every other solver as well.

Outside solvers have SECONDS each and run once. Values, bounds and proofs go to ``extra_info``, from which
``write_results.py`` computes ratios and gaps.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gtflops.solver import GraphKnapsack, knapsack
from highs import Answer, highs_chain, highs_graph
from instances import (
    BUDGETS,
    FAMILIES,
    HARD_SIZES,
    MODELS,
    Problem,
    hard,
    importances_of,
    real,
    structure,
)
from other_solvers import cp_sat_chain, cp_sat_graph, greedy
from published_recursion import published_selection

SECONDS = 20.0
GRID = [(model, kind, budget) for model in MODELS for kind in importances_of(model) for budget in BUDGETS]
#: What every solver is run on: all budgets would take hours.
COMPARED = [
    *(("OPT-2.7B", kind, 0.5) for kind in ("gamma", "lognormal", "by size")),
    ("OPT-2.7B", "gamma", 0.4),
    ("OPT-2.7B", "gamma", 0.7),
    ("SmolLM2-135M", "measured", 0.5),
    ("FLAN-T5-XL", "gamma", 0.5),
    ("Llama-2-70B", "gamma", 0.5),
    ("OPT-2.7B, 4x layers", "gamma", 0.5),
    ("OPT-2.7B, 16x layers", "gamma", 0.5),
]
HARD = [(family, *size, with_dy) for family in FAMILIES for size in HARD_SIZES for with_dy in (False, True)]
COMPARED_HARD = [(family, 100, 10**3, False) for family in FAMILIES]


def by_gtflops(problem: Problem) -> Answer:
    result = knapsack(problem.dw, problem.dy, problem.importance, problem.capacity)
    return Answer(result.mask, result.upper_bound, result.optimal)


def by_gtflops_on_the_graph(problem: Problem) -> Answer:
    assert problem.graph is not None
    result = problem.graph.solver.solve(problem.importance, problem.capacity)
    return Answer(result.mask, result.upper_bound, result.optimal)


def by_highs(problem: Problem) -> Answer:
    return highs_chain(problem.dw, problem.dy, problem.importance, problem.capacity, SECONDS)


def by_highs_on_the_graph(problem: Problem) -> Answer:
    graph = problem.graph
    assert graph is not None
    arguments = (graph.dependencies, graph.tensor_segments, graph.costs, problem.importance, problem.capacity)
    return highs_graph(*arguments, SECONDS)


def by_the_published_recursion(problem: Problem) -> Answer:
    mask = published_selection(problem.dw, problem.dy, problem.importance, problem.capacity)
    return Answer(mask, float(np.maximum(problem.importance, 0.0).sum()), False)  # it has no bound of its own


@dataclass(frozen=True)
class Solver:
    """Who, on which form of the problem, how, and how often it is timed."""

    name: str
    form: str
    solve: Callable[[Problem], Answer]
    rounds: int = 1

    def __str__(self) -> str:
        return f"{self.name}, {self.form}"


GTFLOPS = Solver("gtflops", "chain", by_gtflops, 20)
GTFLOPS_GRAPH = Solver("gtflops", "graph", by_gtflops_on_the_graph, 20)
OTHERS = [
    Solver("published recursion, 1,000 steps", "chain", by_the_published_recursion, 5),
    Solver("greedy by density", "chain", greedy, 5),
    Solver("HiGHS", "chain", by_highs),
    Solver("HiGHS", "graph", by_highs_on_the_graph),
    Solver("CP-SAT", "chain", lambda problem: cp_sat_chain(problem, SECONDS)),
    Solver("CP-SAT", "graph", lambda problem: cp_sat_graph(problem, SECONDS)),
]


def measure(benchmark: Any, solver: Solver, problem: Problem, table: str, instance: str) -> None:
    """Time a solver, and record what its answer is worth, costs and proves."""
    benchmark.group = f"{table}: {instance}"
    answer = benchmark.pedantic(
        lambda: solver.solve(problem), rounds=solver.rounds, warmup_rounds=int(solver.rounds > 1)
    )
    mask = np.zeros(len(problem.dw), dtype=bool) if answer.mask is None else answer.mask
    cost = step_over_budget(problem, mask)
    assert cost <= 1 or solver.name != "gtflops"
    benchmark.extra_info |= {
        "table": table,
        "instance": instance,
        "solver": solver.name,
        "form": solver.form,
        "value": float(problem.importance[mask].sum()),
        "bound": float(answer.bound),
        "optimal": bool(answer.optimal),
        "cost": cost,
    }


def step_over_budget(problem: Problem, mask: NDArray[np.bool_]) -> float:
    """What a step with these tensors costs, exactly, as a share of the budget; where there is no step, by the chain."""
    if problem.graph is not None:
        step = problem.graph.profile.step_flops(mask).total
        return step / (problem.capacity + problem.graph.floor)
    depth = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
    return float((problem.dw[mask].sum() + problem.dy[:depth].sum()) / problem.capacity)


@pytest.mark.parametrize("solver", [GTFLOPS, GTFLOPS_GRAPH], ids=str)
@pytest.mark.parametrize(("model", "kind", "budget"), GRID)
def test_grid(benchmark: Any, model: str, kind: str, budget: float, solver: Solver) -> None:
    measure(benchmark, solver, real(model, kind, budget), "grid", f"{model}, {kind}, {budget}")
    benchmark.extra_info |= {"model": model, "tensors": len(structure(model).profile.names)}


@pytest.mark.parametrize("solver", [GTFLOPS, GTFLOPS_GRAPH, *OTHERS], ids=str)
@pytest.mark.parametrize(("model", "kind", "budget"), COMPARED)
def test_compared(benchmark: Any, model: str, kind: str, budget: float, solver: Solver) -> None:
    measure(benchmark, solver, real(model, kind, budget), "compared", f"{model}, {kind}, {budget}")
    benchmark.extra_info["time limit"] = SECONDS


@pytest.mark.parametrize("solver", [s for s in (GTFLOPS, *OTHERS) if s.form == "chain"], ids=str)
@pytest.mark.parametrize("hard_problem", COMPARED_HARD, ids=str)
def test_compared_on_hard_families(benchmark: Any, hard_problem: tuple[str, int, int, bool], solver: Solver) -> None:
    measure(benchmark, solver, hard(*hard_problem), "compared", name_of(*hard_problem))
    benchmark.extra_info["time limit"] = SECONDS


@pytest.mark.parametrize("hard_problem", HARD, ids=str)
def test_hard_families(benchmark: Any, hard_problem: tuple[str, int, int, bool]) -> None:
    measure(benchmark, replace(GTFLOPS, rounds=1), hard(*hard_problem), "hard", name_of(*hard_problem))


def name_of(family: str, tensors: int, largest: int, with_dy: bool) -> str:
    return f"{family}, {tensors:,} tensors, costs to {largest:.0e}, {'dy' if with_dy else 'no dy'}"


@pytest.mark.parametrize("model", MODELS)
def test_structure(benchmark: Any, model: str) -> None:
    """What GraphKnapsack works out once."""
    graph = structure(model)
    benchmark.group = "structure of the graph form, once a profile"
    benchmark.pedantic(
        lambda: GraphKnapsack(graph.dependencies, graph.tensor_segments, graph.costs), rounds=5, warmup_rounds=1
    )
    benchmark.extra_info["tensors"] = len(graph.tensor_segments)
    benchmark.extra_info["segments"] = len(graph.costs)


# --- the floor of exact tables --------------------------------------------------------------------------------------

IN_CACHE, IN_MEMORY = 10_000, 20_000_000


@pytest.fixture(scope="module")
def table_passes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``table_pass.cpp``, with all vectors that this machine has."""
    library = tmp_path_factory.mktemp("floor") / "table_pass.so"
    source = Path(__file__).with_name("table_pass.cpp")
    flags = ["-O3", "-march=native", "-shared", "-fPIC"]
    subprocess.run(["c++", *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).table_passes


@pytest.mark.parametrize(("cells", "passes"), [(IN_CACHE, 10_000), (IN_MEMORY, 5)])
def test_vectorised_table_passes(benchmark: Any, table_passes: Any, cells: int, passes: int) -> None:
    """How fast any exact table over costs can be, and how long one would take on OPT-2.7B, budget 0.5."""
    best = np.zeros(cells)
    arguments = best.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(cells), ctypes.c_int64(passes)
    benchmark.group = "vectorised table passes"
    benchmark.pedantic(lambda: table_passes(*arguments), rounds=5, warmup_rounds=1)
    rate = cells * passes / benchmark.stats.stats.median
    problem = real("OPT-2.7B", "gamma", 0.5)
    lossless_cells = problem.capacity // int(np.gcd.reduce(problem.dw))
    benchmark.extra_info["Gcell/s"] = rate / 1e9
    benchmark.extra_info["million cells of a lossless table, OPT-2.7B"] = lossless_cells / 1e6
    benchmark.extra_info["seconds for its passes at this rate"] = lossless_cells * len(problem.dw) / rate

"""What gtflops' solver is held against: greedy selection and CP-SAT; HiGHS is in ``tests/highs.py``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from highs import Answer
from instances import Problem


def greedy(problem: Problem) -> Answer:
    """By density at each depth: whatever still fits, the densest first; the best depth.

    All depths at once: ``room[d]`` is left, and ``value[d]`` gathered, of the budget of those that go down to d.
    """
    dw, worth = problem.dw, problem.importance
    room = problem.capacity - np.cumsum(problem.dy)
    value = np.where(room >= 0, 0.0, -np.inf)
    order = np.argsort(-worth / np.maximum(dw, 1), kind="stable")
    order = order[worth[order] > 0]
    for k in order:
        fits = room[k:] >= dw[k]
        room[k:] -= np.where(fits, dw[k], 0)
        value[k:] += np.where(fits, worth[k], 0.0)
    mask = np.zeros(len(dw), dtype=bool)
    depth = int(value.argmax())
    left = problem.capacity - int(problem.dy[: depth + 1].sum())
    for k in order[order <= depth]:
        if dw[k] <= left:
            mask[k] = True
            left -= int(dw[k])
    return Answer(mask, float(worth[order].sum()), False)


def cp_sat_chain(problem: Problem, seconds: float) -> Answer:
    """The chain form: tensor k pays dw[k], and needs the activation gradients 0 to k."""
    model = cp_model.CpModel()
    n = len(problem.dw)
    chosen = [model.new_bool_var("") for _ in range(n)]
    reached = [model.new_bool_var("") for _ in range(n)]
    for k in range(n):
        model.add_implication(chosen[k], reached[k])
        if k:
            model.add_implication(reached[k], reached[k - 1])
    return _cp_sat(model, chosen, chosen + reached, np.concatenate([problem.dw, problem.dy]), problem, seconds)


def cp_sat_graph(problem: Problem, seconds: float) -> Answer:
    """The graph form: a tensor needs its segments, those need others."""
    graph = problem.graph
    assert graph is not None
    model = cp_model.CpModel()
    chosen = [model.new_bool_var("") for _ in graph.tensor_segments]
    runs = [model.new_bool_var("") for _ in graph.costs]
    for needs, variables in ((graph.tensor_segments, chosen), (graph.dependencies, runs)):
        for variable, segments in zip(variables, needs, strict=True):
            for segment in segments:
                model.add_implication(variable, runs[segment])
    return _cp_sat(model, chosen, runs, graph.costs, problem, seconds)


def _cp_sat(
    model: cp_model.CpModel,
    chosen: list[cp_model.IntVar],
    paid: list[cp_model.IntVar],
    costs: NDArray[np.int64],
    problem: Problem,
    seconds: float,
) -> Answer:
    """One worker; importances as whole numbers that sum to 1e12, as CP-SAT has no others."""
    worth = np.maximum(problem.importance, 0.0)
    scale = 1e12 / worth.sum()
    unit = max(1, int(np.gcd.reduce(costs)))
    model.add(cp_model.LinearExpr.weighted_sum(paid, (costs // unit).tolist()) <= problem.capacity // unit)
    model.maximize(cp_model.LinearExpr.weighted_sum(chosen, np.rint(worth * scale).astype(np.int64).tolist()))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = seconds
    status = solver.solve(model)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    mask = np.array([solver.boolean_value(variable) for variable in chosen]) if found else None
    return Answer(mask, solver.best_objective_bound / scale, status == cp_model.OPTIMAL)

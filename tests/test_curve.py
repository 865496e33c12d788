"""The frontier: at each budget what select finds, monotone, and to be asked at any other."""

import copy
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gtflops
from branching_models import BATCHES, Attention, Branches, every_mask, profile_of, with_times
from gtflops import Profile
from gtflops.forms import Solution
from gtflops.problem import Problem


def random_importance(profile: Profile, seed: int) -> dict[str, float]:
    values = np.random.default_rng(seed).normal(0.5, 1, len(profile.names)).round(1)
    return dict(zip(profile.names, [1.0, *values[1:].tolist()], strict=True))  # at least one is positive


@pytest.mark.parametrize("model", BATCHES)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_each_point_is_the_best_of_all_subsets(model: Callable[[], torch.nn.Module], seed: int) -> None:
    profile = profile_of(model)
    importance = random_importance(profile, seed)
    values = np.array([importance[name] for name in profile.names])
    masks = every_mask(profile)[1:]  # the first is empty
    costs, worths = profile.step_flops_of_many(masks).sum(axis=1), masks @ values

    curve = gtflops.frontier(profile, importance, budgets=24)
    assert len(curve) == 24
    assert curve.budgets[0] == costs[worths > 0].min()
    assert curve.budgets[-1] == profile.full_flops
    for point, budget in enumerate(curve.budgets):
        assert curve.value[point] == pytest.approx(worths[costs <= budget].max())
    assert (np.diff(curve.value) >= 0).all()
    assert curve.optimal.all()
    assert (curve.upper_bound == curve.value).all()
    assert (curve.flops <= curve.budgets).all()
    assert (curve.flops == profile.step_flops_of_many(curve.masks).sum(axis=1)).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"form": "chain"},
        {"granularity": "layer", "must_freeze": "head.*"},
        {"must_train": "*.bias"},
        {"max_elements": 700},
        {"cost": "time", "max_elements": 500, "form": "chain"},
        {"cost": "time"},
        {"cost": "time", "form": "chain", "granularity": "layer"},
    ],
)
def test_each_point_and_any_other_is_what_select_finds(options: dict[str, Any]) -> None:
    profile = with_times(profile_of(Attention))
    importance = random_importance(profile, 3)
    curve = gtflops.frontier(profile, importance, budgets=[0.95, 0.87, 1.0, 0.9], **options)
    limit = {"flops": "budget_flops", "time": "budget_seconds"}[options.get("cost", "flops")]
    assert (np.diff(curve.budgets) > 0).all()
    for budget, point in zip((0.87, 0.9, 0.95, 1.0), curve, strict=True):
        chosen = gtflops.select(profile, importance, budget, **options)
        assert point.to_json() == chosen.to_json()
        asked = curve.selection(**{limit: getattr(chosen, limit)})
        assert asked.to_json() == chosen.to_json()
    between = curve.selection(0.89)
    assert between.to_json() == gtflops.select(profile, importance, 0.89, **options).to_json()
    assert curve[0].value <= between.value <= curve[1].value


@pytest.mark.parametrize("model", BATCHES)
@pytest.mark.parametrize("room", [0.2, 0.5, 0.9])
def test_a_limit_on_elements_holds_at_each_point(model: Callable[[], torch.nn.Module], room: float) -> None:
    profile = profile_of(model)
    importance = random_importance(profile, 5)
    numel = np.array([tensor.numel for tensor in profile.tensors])
    values = np.array([importance[name] for name in profile.names])
    max_elements = max(int(room * numel.sum()), int(numel[values > 0].min()))
    masks = every_mask(profile)[1:]
    masks = masks[masks @ numel <= max_elements]
    costs, worths = profile.step_flops_of_many(masks).sum(axis=1), masks @ values

    curve = gtflops.frontier(profile, importance, budgets=16, max_elements=max_elements)
    assert curve.budgets[0] == costs[worths > 0].min()
    assert (curve.masks @ numel <= max_elements).all()
    assert (np.diff(curve.value) >= 0).all()
    for budget, value, bound in zip(curve.budgets, curve.value, curve.upper_bound, strict=True):
        best = worths[costs <= budget].max()
        assert value <= best + 1e-12
        assert bound >= best - 1e-12
    unlimited = gtflops.frontier(profile, importance, budgets=16)
    assert curve.value[-1] < unlimited.value[-1] or unlimited.masks[-1] @ numel <= max_elements


@pytest.mark.parametrize("number", [3, np.int64(3), np.uint8(3), np.array(3)])
def test_any_integer_says_how_many(number: Any) -> None:
    profile = profile_of(Branches)
    assert len(gtflops.frontier(profile, random_importance(profile, 2), budgets=number)) == 3


def test_it_begins_with_the_smallest_feasible_step() -> None:
    profile = profile_of(Branches)
    importance = random_importance(profile, 0)
    forced = profile.step_flops(["a.0.weight"]).total
    assert gtflops.frontier(profile, importance, must_train="a.0.weight").budgets[0] == forced
    curve = gtflops.frontier(profile, importance)
    assert len(curve) == 256
    with pytest.raises(gtflops.InfeasibleBudgetError):
        curve.selection(budget_flops=int(curve.budgets[0]) - 1)


def test_it_stays_monotone_where_points_are_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that is cut short now and then does not lose what fitted a smaller budget."""
    profile = profile_of(Branches)
    importance = random_importance(profile, 1)
    proved = gtflops.frontier(profile, importance, budgets=12)
    solve, calls = Problem.solve, count()

    def cut_short(self: Problem, limit: int) -> Solution:
        best = solve(self, limit)
        if next(calls) % 2 == 0:
            return best
        return replace(solve(self, self.smallest), upper_bound=best.value + 1.0, optimal=False)

    monkeypatch.setattr(Problem, "solve", cut_short)
    curve = gtflops.frontier(profile, importance, budgets=12)
    assert (~curve.optimal).any()
    assert (np.diff(curve.value) >= 0).all()
    assert (curve.value <= proved.value + 1e-12).all()
    assert (curve.upper_bound >= proved.value - 1e-12).all()
    assert (curve.flops <= curve.budgets).all()
    assert (curve.value == [math.fsum(importance[name] for name in point.names) for point in curve]).all()


def test_plain_data() -> None:
    profile = profile_of(Branches)
    curve = gtflops.frontier(profile, random_importance(profile, 2), budgets=3)
    data = json.loads(json.dumps(curve.to_json(), allow_nan=False))
    assert data["full_flops"] == profile.full_flops
    assert [[data["names"][place] for place in point["trains"]] for point in data["points"]] == [
        list(point.names) for point in curve
    ]
    assert [point["flops"] for point in data["points"]] == curve.flops.tolist()
    timed = with_times(profile)
    points = gtflops.frontier(timed, random_importance(profile, 2), budgets=3, cost="time").to_json()["points"]
    assert all(point["seconds"] <= point["budget_seconds"] for point in points)
    assert repr(curve).startswith("Frontier(3 budgets, 3 proved, of Profile(Branches")


def test_points_cannot_be_written_to() -> None:
    profile = profile_of(Branches)
    curve = gtflops.frontier(profile, random_importance(profile, 2), budgets=3)
    with pytest.raises(ValueError, match="read-only"):
        curve.value[0] = 2.0
    with pytest.raises(ValueError, match="read-only"):
        curve[0].mask[0] = True


@pytest.mark.parametrize("budgets", [1, -2, np.int8(1), True, np.True_, 2.5, "many", None, [], [0.5, 1.2], ["half"]])
def test_budgets_that_are_none(budgets: Any) -> None:
    profile = profile_of(Branches)
    with pytest.raises(gtflops.InputError, match=r"budgets? is "):
        gtflops.frontier(profile, random_importance(profile, 2), budgets=budgets)


def test_a_budget_that_nothing_fits() -> None:
    profile = profile_of(Branches)
    with pytest.raises(gtflops.InfeasibleBudgetError, match="the smallest feasible budget"):
        gtflops.frontier(profile, random_importance(profile, 2), budgets=[0.05, 0.9])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("form", ["graph", "chain"])
def test_profiles_selections_and_frontiers_can_be_copied(copied: Callable[[Any], Any], form: Any) -> None:
    profile = profile_of(Branches)
    importance = random_importance(profile, 0)
    selection = gtflops.select(profile, importance, 0.8, form=form)
    curve = gtflops.frontier(profile, importance, budgets=5, form=form)
    again = copied((profile, selection, curve))
    assert again[0].step_flops(selection.mask) == profile.step_flops(selection.mask)
    assert (again[1].names, again[1].flops, again[1].value) == (selection.names, selection.flops, selection.value)
    assert again[2].selection(0.8).names == curve.selection(0.8).names
    assert (again[2].masks == curve.masks).all()

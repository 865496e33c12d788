"""Where FLOPs bring the most: against every subset, with and without reuse and a total; and the budget that asks."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gtflops
from branching_models import BATCHES, Attention, Branches, every_mask, profile_of
from gtflops import Profile
from gtflops.errors import InputError
from gtflops.problem import Problem, layers_of
from gtflops.spending import TOLERANCE
from gtflops.training import Auto, GreenTrainer, Progress, SelectionRecord, Total, TrainingLog, budget_of
from small_models import build, padded_batch


def importances(profile: Profile, seed: int, mean: float = 0.5) -> dict[str, float]:
    values = np.random.default_rng(seed).normal(mean, 1, len(profile.names)).round(1)
    return dict(zip(profile.names, [1.0, *values[1:].tolist()], strict=True))  # at least one is positive


def require_best(point: gtflops.OperatingPoint, worths: npt.NDArray[Any], everything: float) -> None:
    """Held against the worth of every subset and that of training everything: as good but for the tolerance."""
    best = max(float(worths.max()), everything) / everything
    assert point.gain <= best * (1 + 1e-12)
    assert point.gain * (1 + TOLERANCE) >= best * (1 - 1e-12)
    assert point.upper_bound >= best * (1 - 1e-12)
    assert point.upper_bound >= point.gain


@pytest.mark.parametrize("model", BATCHES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), portion=st.floats(0.001, 1.5))
def test_the_best_of_all_subsets(model: Callable[[], torch.nn.Module], seed: int, portion: float) -> None:
    profile = profile_of(model)
    importance = importances(profile, seed)
    values = np.array([importance[name] for name in profile.names])
    masks = every_mask(profile)[1:]  # the first is empty
    costs, worths = profile.step_flops_of_many(masks).sum(axis=1), masks @ values

    point = gtflops.operating_point(profile, importance)
    assert (point.everything.mask == (values > 0)).all()
    assert point.everything.flops == profile.step_flops(values > 0).total
    require_best(point, worths / costs, point.everything.value / point.everything.flops)
    assert point.gain == pytest.approx(point.per_flop)
    assert point.trains_everything == (point.gain == 1)
    assert point.steps is point.full_steps is None

    total, steps = portion * 40 * profile.full_flops, 40
    under = gtflops.operating_point(profile, importance, total_flops=total, num_steps=steps)
    paid = np.minimum(steps, total / costs)
    require_best(under, worths * paid, under.everything.value * min(steps, total / under.everything.flops))
    assert under.steps == min(steps, int(total / under.selection.flops))
    assert under.full_steps == min(steps, int(total / under.everything.flops))
    if portion >= 1:
        assert under.trains_everything
        assert under.steps == steps


@pytest.mark.parametrize(
    "options",
    [
        {"must_train": "*.bias"},
        {"must_freeze": ["head.*", "*.0.v.*"]},
        {"granularity": "layer"},
        {"granularity": "layer", "must_train": "*.0.o.weight"},
        {"max_elements": 60},
        {"max_elements": 10_000},
    ],
)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("total", [False, True])
def test_the_best_under_conditions(options: dict[str, Any], seed: int, total: bool) -> None:
    profile = profile_of(Attention)
    importance = importances(profile, seed)
    values = np.array([importance[name] for name in profile.names])
    numel = np.array([tensor.numel for tensor in profile.tensors])
    problem = Problem.of(profile, importance, **options)
    frozen = np.array([name in ("head.weight", "layers.0.v.weight", "layers.0.v.bias") for name in profile.names])
    masks = every_mask(profile)[1:]
    masks = masks[(masks >= problem.forced).all(axis=1)]
    if "must_freeze" in options:
        masks = masks[~(masks & frozen).any(axis=1)]
    if "granularity" in options:
        free = ~problem.forced
        for layer in set(layers_of(profile.names)):
            own = np.array([one == layer for one in layers_of(profile.names)]) & free
            masks = masks[masks[:, own].all(axis=1) | ~masks[:, own].any(axis=1)]
    masks = masks[masks @ numel <= options.get("max_elements", math.inf)]
    costs, worths = profile.step_flops_of_many(masks).sum(axis=1), masks @ values
    spent = 0.7 * 100 * profile.full_flops
    given: dict[str, Any] = {"total_flops": spent, "num_steps": 100} if total else {}
    point = gtflops.operating_point(profile, importance, **options, **given)
    everything = point.everything
    assert (masks == point.selection.mask).all(axis=1).any()

    def rate(worth: Any, cost: Any) -> Any:
        return worth * np.minimum(100, spent / cost) if total else worth / cost

    best, reference = rate(worths, costs).max(), rate(everything.value, everything.flops)
    assert point.gain <= best / reference * (1 + 1e-12)
    assert point.gain * (1 + TOLERANCE) >= best / reference * (1 - 1e-12)
    assert point.upper_bound >= best / reference * (1 - 1e-12)


def blocks_in_a_row() -> Profile:
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU()) for _ in range(4)]
    model = torch.nn.Sequential(*blocks, torch.nn.Linear(6, 2, bias=False))
    return gtflops.profile(model, torch.rand(5, 6), loss=lambda y, x: y.sum())


def steps_paid(profile: Profile, mask: npt.NDArray[np.bool_], total: Fraction, steps: int, epochs: int) -> Fraction:
    """The largest n for which n x later + min(n, steps of an epoch) x stored is within the total, no whole number."""
    step = profile.step_flops(mask, reuse="prefix")
    of_an_epoch = Fraction(steps, epochs)
    beyond = (total - of_an_epoch * step.stored) / step.total
    return min(Fraction(steps), beyond if beyond >= of_an_epoch else total / (step.total + step.stored))


@pytest.mark.parametrize("epochs", [1, 2, 5, 30])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_all_subsets_with_reuse(epochs: int, seed: int) -> None:
    profile = blocks_in_a_row()
    importance = dict(
        zip(profile.names, np.random.default_rng(seed).lognormal(0, 2, len(profile.names)).tolist(), strict=True)
    )
    values = np.array(list(importance.values()))
    masks = np.array(list(itertools.product([False, True], repeat=len(values))))[1:]
    form = profile.form("flops", epochs)
    point = gtflops.operating_point(profile, importance, reuse="prefix", epochs_left=epochs)
    require_best(point, masks @ values / form.totals(masks), point.everything.value / point.everything.flops)

    steps = 10 * epochs
    for portion in (0.02, 0.1, 0.3, 0.5, 0.9):
        total = Fraction(int(portion * steps * profile.full_flops))
        paid = np.array([float(steps_paid(profile, mask, total, steps, epochs)) for mask in masks])
        under = gtflops.operating_point(
            profile, importance, total_flops=float(total), num_steps=steps, reuse="prefix", epochs_left=epochs
        )
        full = float(steps_paid(profile, under.everything.mask, total, steps, epochs))
        best = (masks @ values * paid).max() / (under.everything.value * full)
        assert under.gain <= best * (1 + 1e-12)
        assert under.gain >= 0.97 * best, "a run that ends within an epoch is planned for whole ones"
        assert under.upper_bound >= best * (1 - 1e-9)
        assert under.steps == int(steps_paid(profile, under.selection.mask, total, steps, epochs))


def test_what_is_left_of_a_total_is_no_virtue() -> None:
    """By FLOP, the top layer alone brings most; where the total pays for more than all steps of it, more is trained."""
    profile = gtflops.profile("facebook/opt-125m", batch_size=2, seq_len=64)
    importance = {
        tensor.name: 1.0 if ".11." in tensor.name and len(tensor.shape) == 2 else 1e-6 for tensor in profile.tensors
    }
    alone = gtflops.operating_point(profile, importance)
    assert not alone.trains_everything
    assert not any(".10." in name and name.endswith("weight") and "norm" not in name for name in alone.selection.names)
    shares = []
    for portion in (0.1, 0.5, 0.8, 1.0):
        total = portion * 1000 * profile.full_flops
        point = gtflops.operating_point(profile, importance, total_flops=total, num_steps=1000)
        assert point.steps is not None
        assert point.steps * point.selection.flops <= total
        shares.append(point.share)
    assert shares[0] == pytest.approx(alone.share, rel=0.01)
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_reasons() -> None:
    profile = gtflops.profile("facebook/opt-125m", batch_size=2, seq_len=64)
    even = {tensor.name: float(tensor.numel) for tensor in profile.tensors}
    top = {name: 100 * value if ".11." in name else value for name, value in even.items()}
    of_150 = {"total_flops": 148.5 * profile.full_flops, "num_steps": 300}
    assert gtflops.operating_point(profile, even).reason == (
        "training everything is predicted to bring more per FLOP than any selection"
    )
    point = gtflops.operating_point(profile, even, **of_150)
    assert point.trains_everything
    assert point.reason == "at this budget, training everything for 148 steps is predicted to beat selection"
    one = gtflops.operating_point(profile, even, total_flops=1.5 * profile.full_flops, num_steps=300)
    assert one.reason == "at this budget, training everything for 1 step is predicted to beat selection"
    none = gtflops.operating_point(profile, even, total_flops=0.5 * profile.full_flops, num_steps=300)
    assert none.reason == "the total pays for less than one step"
    assert none.steps == 0 < none.predicted
    point = gtflops.operating_point(profile, top)
    what = f"training {len(point.selection.names)} of {len(profile.names)} tensors at {point.share:.2f} of a full step"
    assert point.reason == f"{what} is predicted to bring {point.gain:.2f}x per FLOP what full training brings"
    point = gtflops.operating_point(profile, top, reuse="prefix", epochs_left=5, **of_150)
    assert point.reuses
    what = f"training {len(point.selection.names)} of {len(profile.names)} tensors at {point.share:.2f} of a full step"
    assert point.reason == (
        f"{what} with reuse for {point.steps} steps is predicted to bring {point.gain:.2f}x what training everything "
        "for 148 steps brings"
    )
    assert repr(point) == f"OperatingPoint({point.reason})"
    data = json.loads(json.dumps(point.to_json(), allow_nan=False))
    assert (data["gain"], data["steps"], data["reuses"]) == (point.gain, point.steps, True)
    assert data["selection"]["names"] == list(point.selection.names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_flops": 1e9}, "expected both, the total and the most steps"),
        ({"num_steps": 4}, "expected both, the total and the most steps"),
        ({"total_flops": 0, "num_steps": 4}, "total_flops is 0, expected a positive finite number"),
        ({"total_flops": math.inf, "num_steps": 4}, "total_flops is inf, expected a positive finite number"),
        ({"total_flops": 1e9, "num_steps": 0}, "num_steps is 0, expected a positive integer"),
        ({"epochs_left": 3}, "given without reuse='prefix'"),
        ({"must_train": "b.*"}, "sum to -[0-9.]+, must_train included"),
    ],
)
def test_wrong_input(arguments: dict[str, Any], message: str) -> None:
    profile = profile_of(Branches)
    importance = {name: -3.0 if name.startswith("b") else 1.0 for name in profile.names}
    with pytest.raises(InputError, match=message):
        gtflops.operating_point(profile, importance, **arguments)


# --- the budget --------------------------------------------------------------------------------------------------

START = Progress(
    step=0, num_steps=10, epoch=0.0, spent_flops=0, full_flops=1000, smallest_share=0.35, seconds=0, kwh=None, time=0
)


def test_auto_is_a_budget() -> None:
    assert budget_of("auto") == Auto()
    assert Auto().exhausted(START, 10**30) is None
    Auto().check(None, None)
    under = Auto(Total(flops=600))
    assert budget_of(under) is under
    with pytest.raises(InputError, match="their number is not known"):
        under.check(None, 3)
    assert "is spent" in str(under.exhausted(replace(START, spent_flops=500), 101))
    with pytest.raises(InputError, match=r"the total of Auto is 0\.5, expected one such as Total"):
        Auto(0.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"budget is 'full', expected .*'auto'"):
        budget_of("full")  # type: ignore[arg-type]


def test_auto_spends_what_is_left() -> None:
    """2,000 of 10,000 are spent, measuring takes 100 of each of the 8 steps left; a full step there costs 2,000."""
    profile = profile_of(Branches)
    problem = Problem.of(profile, importances(profile, 1, mean=2.0))
    progress = replace(START, step=2, spent_flops=2000, measuring_flops_left=800, full_flops=2000)
    point = Auto(Total(flops=10_000)).point(problem, progress)
    assert point is not None
    scale = Fraction(profile.full_flops, 2000)
    everything = point.everything.flops
    assert point.full_steps == int(8000 * scale / (everything + 100 * scale))
    assert point.steps is not None
    assert point.steps * (point.selection.flops + 100 * scale) <= 8000 * scale

    hours = Auto(Total(hours=1.0)).point(problem, START)
    assert hours is not None
    assert hours.full_steps is None, "nothing tells yet what an hour pays for"


def concentrated(model: Any, batches: Any, optimizer: Any, loss: Any = None, **_: Any) -> dict[str, float]:
    """Importance in the top block, as if measured."""
    return {name: float(tensor.numel()) * (100 if ".2." in name else 1) for name, tensor in model.named_parameters()}


def even(model: Any, batches: Any, optimizer: Any, loss: Any = None, **_: Any) -> dict[str, float]:
    return {name: float(tensor.numel()) for name, tensor in model.named_parameters()}


def trained_by(measure: Any, budget: Any, steps: int = 12) -> GreenTrainer:
    torch.manual_seed(0)
    model = build("llama")
    batches = [padded_batch() for _ in range(steps)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = GreenTrainer(model, optimizer, batches[0], budget, 4, measure=measure, count_executed=True)
    trainer.fit(batches)
    return trainer


def test_auto_trains_everything_where_importance_is_even() -> None:
    trainer = trained_by(even, "auto")
    for record in trainer.log.selections:
        assert record.reason == "training everything is predicted to bring more per FLOP than any selection"
        assert record.flops == record.full_flops
        assert record.budget is None
    assert trainer.log.planned_flops == trainer.log.full_flops == trainer.log.executed_flops


def test_auto_trains_the_top_where_importance_is_there() -> None:
    trainer = trained_by(concentrated, "auto")
    for record in trainer.log.selections:
        assert record.reason is not None
        assert "of a full step is predicted to bring" in record.reason
        assert record.names
        assert all(".2." in name for name in record.names)
    assert trainer.log.planned_flops == trainer.log.executed_flops
    assert trainer.log.planned_flops < 0.7 * trainer.log.full_flops


def test_auto_makes_fewer_full_steps_of_a_total() -> None:
    full = gtflops.profile(build("llama"), padded_batch()).full_flops
    trainer = trained_by(even, Auto(Total(flops=6 * full)))
    log = trainer.log
    assert log.planned_flops + log.measuring_flops <= 6 * full
    assert len(log.steps) == 4, "measuring takes two full steps, and checking the first estimate a third of one"
    assert log.stopped is not None
    assert "is spent" in log.stopped
    # 5 full steps are left for 12 steps of which 2 more are to be measured on, and one to be checked
    first = log.selections[0].reason
    assert first == "at this budget, training everything for 4 steps is predicted to beat selection"
    again = TrainingLog.from_json(json.loads(json.dumps(log.to_json())), trainer.profile)
    assert [record.reason for record in again.selections] == [record.reason for record in log.selections]
    old = log.selections[0].to_json()
    del old["reason"]
    assert SelectionRecord.from_json(old, trainer.profile).reason is None


def test_auto_resumes_to_the_bit(tmp_path: Any) -> None:
    def trainer() -> tuple[GreenTrainer, list[Any]]:
        torch.manual_seed(0)
        model = build("llama")
        batches = [padded_batch() for _ in range(6)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return GreenTrainer(model, optimizer, batches[0], "auto", 2, measure=concentrated), batches

    whole, batches = trainer()
    losses = [step.loss for step in whole.fit(batches).steps]
    begun, batches = trainer()
    begun.fit(batches, num_steps=3, checkpoints=tmp_path)
    resumed, batches = trainer()
    log = resumed.fit(batches, checkpoints=tmp_path, resume=True)
    assert [step.loss for step in log.steps] == losses
    assert [record.reason for record in log.selections] == [record.reason for record in whole.log.selections]

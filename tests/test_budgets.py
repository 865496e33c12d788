"""Budgets: their arithmetic to the last FLOP, totals that hold, grids by the hour, and input that is refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gtflops
from gtflops.errors import InfeasibleBudgetError, InputError
from gtflops.training.budgets import Budget, CarbonAware, Progress, Total, budget_of, share_of
from gtflops.training.intensity import IntensitySeries, intensity_of, read_intensity, unix_time

START = Progress(
    step=0, num_steps=10, epoch=0.0, spent_flops=0, full_flops=1000, smallest_share=0.35, seconds=0, kwh=None, time=0
)
HOUR = 3600
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()


# --- numbers, lists, functions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.5, 1, 1.0, np.float32(0.25), None])
def test_a_number_is_the_same_all_the_time(value: Any) -> None:
    budget = budget_of(value)
    budget.check(None, None)
    assert budget.share(START) is value
    assert budget.share(replace(START, step=9, epoch=5.5)) is value
    assert budget.exhausted(START, 10**30) is None


def test_a_list_goes_by_epoch() -> None:
    budget = budget_of([0.4, 0.6, None])
    budget.check(30, 3)
    shares = [budget.share(replace(START, epoch=epoch)) for epoch in (0, 0.99, 1.0, 1.5, 2.0, 2.99)]
    assert shares == [0.4, 0.4, 0.6, 0.6, None, None]


def test_a_list_that_is_too_short() -> None:
    budget = budget_of([0.4, 0.6])
    with pytest.raises(InputError, match="has 2 entries and 3 epochs are to be trained; expected one for each epoch"):
        budget.check(None, 3)
    budget.check(None, None)
    with pytest.raises(InputError, match="has 2 entries and epoch 3 begins"):
        budget.share(replace(START, epoch=2.0))


def test_a_function_sees_the_progress() -> None:
    budget = budget_of(lambda progress: 0.8 if progress.step < 3 else 0.4)
    assert [budget.share(replace(START, step=step)) for step in (0, 2, 3)] == [0.8, 0.8, 0.4]


def test_a_budget_of_ones_own() -> None:
    class Halving(Budget):
        def share(self, progress: Progress) -> float | None:
            return 0.5 ** (1 + math.floor(progress.epoch))

    budget = Halving()
    assert budget_of(budget) is budget
    assert budget.share(replace(START, epoch=1.2)) == 0.25
    assert budget.exhausted(START, 1) is None
    with pytest.raises(InputError, match="budget is the class Halving, expected an instance"):
        budget_of(Halving)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0, -0.1, 1.0001, math.nan, math.inf, True, "0.5", 2 + 0j])
def test_shares_outside_of_zero_to_one(share: Any) -> None:
    expected = r"expected a share of a full step in \(0, 1\]"
    with pytest.raises(InputError, match=expected):
        budget_of(share)
    with pytest.raises(InputError, match=f"budget of epoch 2 is .*{expected}"):
        budget_of([0.5, share])
    with pytest.raises(InputError, match=f"budget of step 4 is .*{expected}"):
        budget_of(lambda _: share).share(replace(START, step=4))
    with pytest.raises(InputError, match=f"share from 100 gCO2/kWh on is .*{expected}"):
        CarbonAware(50, {0: 1.0, 100: share})
    with pytest.raises(InputError, match=f"budget at 50 gCO2/kWh is .*{expected}"):
        CarbonAware(50, lambda _: share).share(START)


@pytest.mark.parametrize("value", [[], (), {}, object(), {0.5}])
def test_what_is_no_budget(value: Any) -> None:
    with pytest.raises(InputError, match="expected a share of a full step"):
        budget_of(value)


# --- totals -----------------------------------------------------------------------------------------------------


def test_a_total_of_flops_is_spread_over_the_steps_left() -> None:
    budget = Total(flops=6000)
    assert budget.share(START) == 0.6
    # 6000 - 1600 = 4400 FLOPs for the 8 steps left, of which measuring takes 400: 4000 / (8 x 1000)
    later = replace(START, step=2, spent_flops=1600, measuring_flops_left=400)
    assert budget.share(later) == 0.5
    assert budget.share(replace(later, spent_flops=0, full_flops=100)) == 1.0
    assert budget.share(replace(later, spent_flops=6000)) == START.smallest_share


def test_a_total_of_flops_is_exact_to_the_last_one() -> None:
    budget = Total(flops=1000)
    assert budget.exhausted(replace(START, spent_flops=600), 400) is None
    reason = budget.exhausted(replace(START, step=3, spent_flops=600), 401)
    assert reason == "Total(flops=1000) is spent: 600 FLOP after 3 steps, and what comes next needs 401"


def test_a_total_of_flops_that_cannot_pay_for_all_steps() -> None:
    with pytest.raises(
        InfeasibleBudgetError,
        match=r"pays 0\.3000 of a full step for each of 10 steps, .* share is 0\.3500; .* at least flops=3700 \(3\.70",
    ):
        Total(flops=3200).share(replace(START, measuring_flops_left=200))
    assert Total(flops=3700).share(replace(START, measuring_flops_left=200)) == 0.35


@pytest.mark.parametrize(("total", "used"), [(Total(hours=2), {"seconds": HOUR}), (Total(kwh=2.0), {"kwh": 1.0})])
def test_hours_and_energy_become_flops_at_what_a_flop_has_cost(total: Total, used: dict[str, float]) -> None:
    """Half is used after 2 of 10 steps and 3000 FLOPs: another 3000 for 8 steps of 1000."""
    progress = replace(START, step=2, spent_flops=3000, kwh=0.0)
    progress = replace(progress, **used)
    assert total.share(progress) == 0.375
    assert total.share(replace(progress, measuring_flops_left=200)) == 0.35
    assert total.share(replace(progress, measuring_flops_left=201)) == START.smallest_share
    assert total.exhausted(progress, 10**20) is None
    assert total.exhausted(replace(progress, **{name: 2 * value for name, value in used.items()}), 1) == (
        f"{total} is spent: 2 after 2 steps"
    )
    assert total.share(replace(START, kwh=0.0)) == 1.0, "nothing is measured yet"


def test_a_slow_first_measurement_is_no_error() -> None:
    assert Total(hours=1).share(replace(START, spent_flops=1000, seconds=HOUR / 2)) == START.smallest_share


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing given to Total, expected one of flops, hours and kwh"),
        ({"flops": 1, "hours": 2}, "flops=1 and hours=2 given to Total"),
        ({"flops": 0.5}, "flops of Total is 0.5, expected a positive"),
        *(({"hours": value}, "hours of Total is") for value in (0, -1, math.nan, math.inf, "3", True)),
    ],
)
def test_what_is_no_total(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Total(**given)


def test_what_a_total_needs() -> None:
    with pytest.raises(InputError, match="their number is not known"):
        Total(flops=100).check(None, 3)
    with pytest.raises(InputError, match="their number is not known"):
        Total(flops=100).share(replace(START, num_steps=None))
    with pytest.raises(InputError, match=r"Total\(kwh=1\) needs the energy to be measured"):
        Total(kwh=1).share(START)
    with pytest.raises(InputError, match="needs the energy to be measured"):
        Total(kwh=1).exhausted(START, 1)


def simulated(budget: Total, costs: list[int], every: int, least: float) -> tuple[int, int]:
    """Spent FLOPs and steps made, where a selection costs what its share allows and measuring a full step."""
    spent, share = 0, 1.0
    for step, cost in enumerate(costs):
        seen = costs[max(0, step - 10) : step] or costs[:1]
        now = replace(START, step=step, num_steps=len(costs), full_flops=sum(seen) / len(seen), smallest_share=least)
        if step % every == 0:
            if budget.exhausted(replace(now, spent_flops=spent), cost):
                return spent, step
            spent += cost
            left = (len(costs) - step - 1) // every * now.full_flops
            given = budget.share(replace(now, spent_flops=spent, measuring_flops_left=left))
            assert given is not None
            assert least <= given <= 1
            share = given
        next_flops = int(Fraction(repr(share)) * cost)
        if budget.exhausted(replace(now, spent_flops=spent), next_flops):
            return spent, step
        spent += next_flops
    return spent, len(costs)


@given(
    costs=st.lists(st.integers(1, 10**18), min_size=1, max_size=40),
    every=st.integers(1, 10),
    total=st.integers(1, 10**19),
)
def test_no_run_exceeds_a_total_of_flops(costs: list[int], every: int, total: int) -> None:
    try:
        spent, _ = simulated(Total(flops=total), costs, every, 0.35)
    except InfeasibleBudgetError:
        return
    assert spent <= total


@given(
    costs=st.lists(st.integers(9 * 10**14, 11 * 10**14), min_size=5, max_size=60),
    every=st.integers(1, 10),
    portion=st.floats(0.5, 0.85),
)
def test_a_total_of_flops_is_spent_but_for_less_than_two_steps(costs: list[int], every: int, portion: float) -> None:
    total = int(portion * sum(costs)) + max(costs) * math.ceil(len(costs) / every)
    spent, steps = simulated(Total(flops=total), costs, every, 0.35)
    assert total - 2 * max(costs) * every <= spent <= total
    assert steps >= len(costs) - 2 * every


@given(total=st.integers(4000, 10**18), steps=st.integers(1, 10))
def test_rounding_ends_no_run_early(total: int, steps: int) -> None:
    """Equal steps, no measuring: all are made, and what is left is less than a FLOP for each and doubles' rounding."""
    full = max(1, total // steps)
    budget, spent = Total(flops=total), 0
    for step in range(steps):
        progress = replace(START, step=step, num_steps=steps, spent_flops=spent, full_flops=full, smallest_share=0.01)
        share = budget.share(progress)
        assert share is not None
        cost = int(Fraction(repr(share)) * full)
        assert budget.exhausted(progress, cost) is None
        spent += cost
    assert total - spent <= steps + total * 2**-50


@given(full=st.integers(1, 10**19), part=st.integers(1, 10**19))
def test_the_share_of_a_cost_pays_for_it_and_none_below_does(full: int, part: int) -> None:
    cost = min(full, part)
    share = share_of(cost, full)
    assert Fraction(repr(share)) * full >= cost
    below = math.nextafter(math.nextafter(share, 0), 0)
    assert Fraction(repr(below)) * full < cost


# --- the grid ---------------------------------------------------------------------------------------------------


SERIES = [("2026-01-31T12:00Z", 120), ("2026-01-31T13:00Z", 200), ("2026-01-31T15:00Z", 410.5)]


def at(time: float) -> Progress:
    return replace(START, time=time)


def test_shares_follow_the_grid() -> None:
    budget = CarbonAware(SERIES, {0: 1.0, 200: 0.6, 400: 0.4})
    hours = (0, 0.999, 1, 2.999, 3, 4.999)
    assert [budget.share(at(NOON + hour * HOUR)) for hour in hours] == [1.0, 1.0, 0.6, 0.6, 0.4, 0.4]
    budget = CarbonAware(SERIES, lambda grams: min(1.0, 100 / grams))
    assert budget.share(at(NOON)) == 100 / 120


@pytest.mark.parametrize("hours", [-0.001, 5])
def test_times_outside_of_the_series(hours: float) -> None:
    """The last value holds for two hours, as long as the one before it."""
    with pytest.raises(InputError, match="it covers 2026-01-31T12:00Z to 2026-01-31T17:00Z; expected a series that"):
        CarbonAware(SERIES, {0: 1.0}).share(at(NOON + hours * HOUR))


@pytest.mark.parametrize(
    "time",
    [
        NOON,
        "2026-01-31T12:00Z",
        "2026-01-31 12:00",
        "2026-01-31T14:00+02:00",
        datetime(2026, 1, 31, 12),
        datetime(2026, 1, 31, 14, tzinfo=timezone(timedelta(hours=2))),
    ],
)
def test_times_without_an_offset_are_utc(time: Any) -> None:
    assert unix_time(time) == NOON


def test_any_way_to_give_an_intensity(tmp_path: Path) -> None:
    path = tmp_path / "grid.csv"
    path.write_text("time,intensity\n2026-01-31T12:00Z,120\n2026-01-31T13:00Z,200\n", encoding="utf-8")
    ways: list[Any] = [120, lambda time: 120, path, str(path), SERIES, IntensitySeries((NOON, NOON + 1), (120, 0))]
    assert [intensity_of(way)(NOON) for way in ways] == [120] * 6


def test_a_csv_file_with_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "grid.csv"
    path.write_text(
        '\ufeffDatetime (UTC),Zone,"Carbon (direct)"\n2026-01-31 12:00:00,FR,52.1\n2026-01-31 13:00:00,FR,49\n'
    )
    series = read_intensity(path, time="Datetime (UTC)", intensity="Carbon (direct)")
    assert series == IntensitySeries((NOON, NOON + HOUR), (52.1, 49.0), str(path))
    assert CarbonAware(series, {0: 0.7}).share(at(NOON)) == 0.7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column 'time' and no column 'intensity'; its columns: none; name yours by read_intensity"),
        ("time,gCO2\n2026-01-31T12:00Z,1\n", "has no column 'intensity'; its columns: 'time', 'gCO2'"),
        ("time,intensity\n", "has 0 times and 0 intensities, expected at least two"),
        ("time,intensity\n2026-01-31,1\n", "has 1 times"),
        ("time,intensity\n2026-01-31T13:00Z,1\n2026-01-31T12:00Z,1\n", "line 3: 2026-01-31T12:00Z is not after the"),
        ("time,intensity\n2026-01-31T13:00Z,1\n2026-01-31T14:00+01:00,1\n", "line 3: 2026-01-31T13:00Z is not after"),
        ("time,intensity\nyesterday,1\n", "line 2: time is 'yesterday', expected ISO 8601"),
        ("time,intensity\n,1\n", "line 2: time is '', expected ISO 8601"),
        ("time,intensity\n2026-01-31T12:00Z,low\n", "line 2: intensity is 'low', expected a number"),
        ("time,intensity\n2026-01-31T12:00Z\n", "line 2: intensity is None, expected a number"),
        ("time,intensity\n2026-01-31T12:00Z,nan\n", "line 2: intensity is nan, expected gCO2/kWh, a finite"),
        ("time,intensity\n2026-01-31T12:00Z,-1\n", "line 2: intensity is -1.0, expected gCO2/kWh, a finite"),
    ],
)
def test_csv_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "grid.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"grid.csv.*{message}"):
        CarbonAware(path, {0: 1.0})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*: No such file or directory; expected a CSV file"):
        CarbonAware(tmp_path / "none.csv", {0: 1.0})
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_intensity(tmp_path / "bytes.csv")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CarbonAware([1, 2], {0: 1.0}), "entry 1 of the series is 1, expected a pair"),
        (lambda: CarbonAware([(0, 1)], {0: 1.0}), "has 1 times and 1 intensities"),
        (lambda: CarbonAware([(1, 1), (1, 1)], {0: 1.0}), "time 2 of the series, .* is not after the one before it"),
        (lambda: CarbonAware([(math.nan, 1), (1, 1)], {0: 1.0}), "time 1 of the series is nan"),
        (lambda: CarbonAware([(0, 1), (1, math.nan)], {0: 1.0}), "intensity 2 of the series is nan"),
        (lambda: CarbonAware([(None, 1), (1, 1)], {0: 1.0}), "time is None, expected a unix time"),
        (lambda: CarbonAware(None, {0: 1.0}), "intensity is None, expected gCO2/kWh"),
        (lambda: CarbonAware(True, {0: 1.0}), "intensity is True, expected gCO2/kWh"),
        (lambda: CarbonAware(lambda _: math.nan, {0: 1.0}).share(START), "intensity at 1970-01-01T00:00Z is nan"),
        (lambda: CarbonAware(1, {100: 1.0}), "shares begin at 100.0, expected them to begin at an intensity of 0"),
        (lambda: CarbonAware(1, {}), "shares begin at None"),
        (lambda: CarbonAware(1, {0: 1.0, -5: 0.5}), "a threshold of shares is -5"),
        (lambda: CarbonAware(1, 0.5), "shares is 0.5, expected a mapping"),
    ],
)
def test_grids_that_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(gtflops.InputError, match=message):
        make()


def test_until_is_a_total() -> None:
    import torch

    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(gtflops.InputError, match=r"until is 1000000\.0, expected a total, such as Total\(flops=2e15\)"):
        gtflops.GreenTrainer(model, optimizer, torch.ones(1, 2), until=1e6, loss=lambda y, x: y.sum())  # type: ignore[arg-type]

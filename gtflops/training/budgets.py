"""Budgets that move: what share of a full step the coming steps may cost, from what a run has done so far.

A budget is a function of :class:`Progress` and has no state of its own, so that a resumed run is given the same shares.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from gtflops.errors import InfeasibleBudgetError, InputError
from gtflops.problem import Problem
from gtflops.spending import OperatingPoint, Spending, point_of
from gtflops.training.intensity import Intensity, IntensityLike, intensity_of, is_number, require_intensity
from gtflops.units import FLOPS_BY_PREFIX, format_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a budget may look at, between two optimizer steps.

    Args:
        step: optimizer steps made.
        num_steps: optimizer steps planned in all, where that is known.
        epoch: epochs made: 1.0 once the first is over.
        spent_flops: FLOPs of all steps so far, and of measuring importance.
        full_flops: FLOPs of a full step on the batches seen lately.
        smallest_share: the least share that a selection fits, by :func:`share_of`.
        measuring_flops_left: FLOPs that measuring importance will cost until the end of the run.
        seconds: what all this took.
        kwh: the energy that it took, where it is measured.
        time: the time of day, seconds since 1970.
    """

    step: int
    num_steps: int | None
    epoch: float
    spent_flops: int
    full_flops: float
    smallest_share: float
    measuring_flops_left: float = 0
    seconds: float
    kwh: float | None
    time: float


@runtime_checkable
class Budget(Protocol):
    """What the loop asks. Subclass it and write :meth:`share`; the rest is needed by few."""

    def share(self, progress: Progress) -> float | None:
        """Share of a full step that the coming steps may cost, in (0, 1]; ``None`` for everything, unselected."""
        ...

    def check(self, num_steps: int | None, num_epochs: int | None) -> None:
        """InputError, at the start, if a run of this length cannot have this budget. ``None`` if not known."""
        return

    def exhausted(self, progress: Progress, next_flops: int) -> str | None:
        """Why the run must end before something that costs ``next_flops``; ``None`` if it may go on."""
        return None

    def point(self, problem: Problem, progress: Progress) -> OperatingPoint | None:
        """What to train, by a budget that looks at importances and costs itself; ``None`` for one that gives a share.

        Asked after :meth:`share` at each selection; what it gives is trained as it is, within no share of each step.
        """
        return None


BudgetLike: TypeAlias = (
    float | Literal["auto"] | Sequence[float | None] | Callable[[Progress], float | None] | Budget | None
)


@dataclass(frozen=True, slots=True)
class Constant(Budget):
    """The same share all the time; ``None`` trains everything."""

    value: float | None

    def __post_init__(self) -> None:
        _require_share(self.value, "budget")

    def share(self, progress: Progress) -> float | None:
        return self.value


@dataclass(frozen=True, slots=True)
class ByEpoch(Budget):
    """One share for each epoch."""

    values: tuple[float | None, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise InputError("the budget list is empty, expected a share of a full step for each epoch")
        for number, value in enumerate(self.values, start=1):
            _require_share(value, f"budget of epoch {number}")

    def check(self, num_steps: int | None, num_epochs: int | None) -> None:
        if num_epochs is not None and num_epochs > len(self.values):
            raise self._too_short(f"{num_epochs} epochs are to be trained")

    def share(self, progress: Progress) -> float | None:
        epoch = math.floor(progress.epoch)
        if epoch >= len(self.values):
            raise self._too_short(f"epoch {epoch + 1} begins")
        return self.values[epoch]

    def _too_short(self, what: str) -> InputError:
        return InputError(f"the budget list has {len(self.values)} entries and {what}; expected one for each epoch")


@dataclass(frozen=True, slots=True)
class ByFunction(Budget):
    """Whatever a function makes of the progress."""

    function: Callable[[Progress], float | None]

    def share(self, progress: Progress) -> float | None:
        return _require_share(self.function(progress), f"budget of step {progress.step}")


@dataclass(frozen=True, slots=True)
class Total(Budget):
    """What the whole run may spend, measuring importance included: FLOPs, hours, or kilowatt-hours; one of them.

    The coming steps may cost what is left, spread evenly over the steps left, and never more than a full step. Hours
    and energy are turned into FLOPs at what a FLOP has cost so far, measuring included; where nothing has been spent
    yet, the share is 1.

    FLOPs are never exceeded: the run ends before the step that would. Hours and energy are exceeded by less than what
    one step takes. A total of FLOPs that cannot pay for all steps is an InfeasibleBudgetError at the first step; if it
    turns out later (longer batches, a slower machine), the run goes on with the cheapest selections until all is spent.

    >>> Total(flops=600).share(Progress(
    ...     step=4, num_steps=10, epoch=0.4, spent_flops=300, full_flops=100, smallest_share=0.4, seconds=1, kwh=None,
    ...     time=0,
    ... ))
    0.5
    """

    flops: float | None = None
    hours: float | None = None
    kwh: float | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("flops", "hours", "kwh") if getattr(self, name) is not None}
        if len(given) != 1:
            what = " and ".join(f"{name}={value!r}" for name, value in given.items()) or "nothing"
            raise InputError(f"{what} given to Total, expected one of flops, hours and kwh")
        for name, value in given.items():
            least = 1 if name == "flops" else 0
            if not is_number(value) or not least <= value < math.inf or value == 0:
                raise InputError(f"{name} of Total is {value!r}, expected a positive finite number")

    def check(self, num_steps: int | None, num_epochs: int | None) -> None:
        if num_steps is None:
            raise InputError(
                f"{self} is spread over all steps, and their number is not known; say how many there are, or give "
                "batches that have a length"
            )

    def share(self, progress: Progress) -> float | None:
        self.check(progress.num_steps, None)
        assert progress.num_steps is not None
        left = self._flops_left(progress)
        if left is None:
            return 1.0
        steps_left = max(1, progress.num_steps - progress.step)
        exact = (left - Fraction(progress.measuring_flops_left)) / (steps_left * Fraction(progress.full_flops))
        if exact >= 1:
            return 1.0
        if exact >= Fraction(repr(progress.smallest_share)):
            return _rounded_down(exact)
        if self.flops is not None and progress.step == 0:
            needed = progress.spent_flops + Fraction(progress.measuring_flops_left)
            needed += steps_left * Fraction(repr(progress.smallest_share)) * Fraction(progress.full_flops)
            raise InfeasibleBudgetError(
                f"{self} pays {float(exact):.4f} of a full step for each of {steps_left} steps, and the smallest "
                f"feasible share is {progress.smallest_share:.4f}; expected a total of at least "
                f"flops={math.ceil(needed)} ({format_flops(float(needed))}), or fewer steps"
            )
        return progress.smallest_share

    def exhausted(self, progress: Progress, next_flops: int) -> str | None:
        if self.flops is not None:
            if progress.spent_flops + next_flops <= self.flops:
                return None
            return (
                f"{self} is spent: {progress.spent_flops:,} FLOP after {progress.step} steps, and what comes next "
                f"needs {next_flops:,}"
            )
        used, limit, unit = self._used(progress)
        if used < limit:
            return None
        return f"{self} is spent: {used / unit:.6g} after {progress.step} steps"

    def spending(self, progress: Progress, full_flops: int) -> Spending | None:
        """What is left, for the steps left, where a full step costs ``full_flops``; ``None`` where nothing tells yet.

        Steps of the run may cost another number, by the lengths and the number of their batches.
        """
        self.check(progress.num_steps, None)
        assert progress.num_steps is not None
        left, scale = self._flops_left(progress), full_flops / Fraction(progress.full_flops)
        if left is None or left <= 0:
            return None
        steps_left = max(1, progress.num_steps - progress.step)
        return Spending(left * scale, steps_left, Fraction(progress.measuring_flops_left) / steps_left * scale)

    def _flops_left(self, progress: Progress) -> Fraction | None:
        """FLOPs that what is left pays for; ``None`` where nothing tells yet."""
        if self.flops is not None:
            return Fraction(int(self.flops)) - progress.spent_flops
        used, limit, _ = self._used(progress)
        if used <= 0 or progress.spent_flops <= 0:
            return None
        return Fraction(limit - used) * progress.spent_flops / Fraction(used)

    def _used(self, progress: Progress) -> tuple[float, float, float]:
        """What was used, what may be, and what the user's unit is in terms of these: seconds or kWh."""
        if self.hours is not None:
            return progress.seconds, self.hours * 3600, 3600
        assert self.kwh is not None
        if progress.kwh is None:
            raise InputError(f"{self} needs the energy to be measured; give the trainer an EnergyMeter")
        return progress.kwh, self.kwh, 1

    def __str__(self) -> str:
        if self.flops is not None:
            return f"Total(flops={int(self.flops)})"
        return f"Total(hours={self.hours})" if self.hours is not None else f"Total(kwh={self.kwh})"


@dataclass(frozen=True, slots=True)
class Auto(Budget):
    """Whatever brings the most, by importance: ``budget="auto"``, or ``Auto(Total(flops=2e15))`` for a whole run.

    At each selection it trains the :func:`gtflops.operating_point`: the selection with the most importance per FLOP, or
    everything where no selection beats that. With a total, what is left of it is to bring the most until the steps of
    the run are over: everything for fewer steps, where that is predicted to bring more, so that the run ends when the
    total is spent; everything for all steps, where it pays for that. No step is held to a share. The reason is in the
    log of each selection. Until hours or energy tell what a FLOP takes, they are no total yet.

    Importance is measured at each selection, also where everything is trained: about a full step each time, which the
    total pays.
    """

    total: Total | None = None

    def __post_init__(self) -> None:
        if self.total is not None and not isinstance(self.total, Total):
            raise InputError(f"the total of Auto is {self.total!r}, expected one such as Total(flops=2e15)")

    def check(self, num_steps: int | None, num_epochs: int | None) -> None:
        if self.total is not None:
            self.total.check(num_steps, num_epochs)

    def share(self, progress: Progress) -> float | None:
        return 1.0

    def exhausted(self, progress: Progress, next_flops: int) -> str | None:
        return None if self.total is None else self.total.exhausted(progress, next_flops)

    def point(self, problem: Problem, progress: Progress) -> OperatingPoint | None:
        spending = None if self.total is None else self.total.spending(progress, problem.full)
        return point_of(problem, spending)


@dataclass(frozen=True, slots=True)
class CarbonAware(Budget):
    """More training while the grid is clean, less while it is not.

    Args:
        intensity: gCO2/kWh by time: a CSV file (columns ``time`` and ``intensity``; for others see
            :func:`gtflops.training.read_intensity`), pairs of time and number, or a function of the unix time. A time
            without an offset is UTC.
        shares: the share of a full step from each intensity on, beginning at 0, or a function of the intensity.

    >>> budget = CarbonAware([("2026-01-31T00:00", 120), ("2026-01-31T06:00", 310)], {0: 1.0, 200: 0.6, 400: 0.4})
    >>> budget.share_at(120), budget.share_at(310), budget.share_at(400)
    (1.0, 0.6, 0.4)
    """

    intensity: IntensityLike
    shares: Mapping[float, float] | Callable[[float], float | None]
    _at: Intensity = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_at", intensity_of(self.intensity))
        if isinstance(self.shares, Mapping):
            thresholds = [require_intensity(threshold, "a threshold of shares") for threshold in self.shares]
            if 0 not in thresholds:
                raise InputError(
                    f"shares begin at {min(thresholds, default=None)}, expected them to begin at an intensity of 0: "
                    "{0: 1.0, 200: 0.6, 400: 0.4} is 0.6 of a full step from 200 gCO2/kWh on"
                )
            for threshold, share in self.shares.items():
                _require_share(share, f"share from {threshold} gCO2/kWh on")
        elif not callable(self.shares):
            raise InputError(
                f"shares is {self.shares!r}, expected a mapping of gCO2/kWh to shares of a full step, or a function"
            )

    def share(self, progress: Progress) -> float | None:
        return self.share_at(self._at(progress.time))

    def share_at(self, intensity: float) -> float | None:
        """The share at an intensity in gCO2/kWh."""
        if isinstance(self.shares, Mapping):
            return self.shares[max(threshold for threshold in self.shares if threshold <= intensity)]
        return _require_share(self.shares(intensity), f"budget at {intensity:g} gCO2/kWh")


def budget_of(value: BudgetLike) -> Budget:
    """A number, ``None``, ``"auto"``, a list by epoch, a function of :class:`Progress` or a :class:`Budget`."""
    if value is None or is_number(value):
        return Constant(value)
    if isinstance(value, str) and value == "auto":
        return Auto()
    if isinstance(value, Budget):
        if isinstance(value, type):
            raise InputError(f"budget is the class {value.__name__}, expected an instance of it")
        return value
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return ByEpoch(tuple(value))
    if callable(value):
        return ByFunction(value)
    raise InputError(
        f"budget is {value!r}, expected a share of a full step in (0, 1], a list of them by epoch, 'auto', a function "
        "of Progress, or a Budget such as Total"
    )


def total_of(text: str) -> Total:
    """A total as people write it: a number, and FLOP with a prefix, h, min, s, kWh or Wh.

    >>> print(total_of("2 PFLOP"), total_of("90 min"), total_of("1.5kWh"))
    Total(flops=2000000000000000) Total(hours=1.5) Total(kwh=1.5)
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    try:
        number, unit = (float(found[1]), found[2]) if found else (math.nan, "")
    except ValueError:
        number, unit = math.nan, ""
    field_name, factor = _UNITS.get(re.sub("(?i)flops?$", "FLOP", unit), ("", 0.0))
    if math.isnan(number) or not field_name:
        raise InputError(
            f"the total is {text!r}, expected a number and a unit, such as '2 PFLOP' (k, M, G, T, P, E or Z), '3 h' "
            "(h, min or s) or '1.5 kWh' (kWh or Wh)"
        )
    return Total(**{field_name: number * factor})


#: The field of :class:`Total` that a unit is for, and how much of it one is.
_UNITS: Mapping[str, tuple[str, float]] = {
    **{f"{prefix}FLOP": ("flops", factor) for prefix, factor in FLOPS_BY_PREFIX.items()},
    "h": ("hours", 1),
    "min": ("hours", 1 / 60),
    "s": ("hours", 1 / 3600),
    "kWh": ("kwh", 1),
    "Wh": ("kwh", 1 / 1000),
}


def share_of(flops: int, full_flops: int) -> float:
    """The least share of ``full_flops`` that pays for ``flops``, as :func:`gtflops.select` reads a budget.

    >>> share_of(1, 3), int(share_of(1, 3) * 3)
    (0.33333333333333337, 1)
    """
    share = flops / full_flops
    while Fraction(repr(share)) * full_flops < flops:
        share = math.nextafter(share, math.inf)
    return share


def _rounded_down(exact: Fraction) -> float:
    share = float(exact)
    while Fraction(repr(share)) > exact:
        share = math.nextafter(share, 0.0)
    return share


def _require_share(value: object, what: str) -> float | None:
    if value is not None and (not is_number(value) or not 0 < value <= 1):
        raise InputError(f"{what} is {value!r}, expected a share of a full step in (0, 1]")
    return value

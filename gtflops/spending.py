"""Where FLOPs bring the most: a selection for many steps, or everything for fewer."""

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from gtflops.errors import InputError
from gtflops.forms import Solution
from gtflops.problem import Granularity, Patterns, Problem
from gtflops.profiling import Profile, Reuse
from gtflops.selection import Selection, selection_of

#: The search ends where nothing can be better by more than this share,
TOLERANCE = 1e-3
#: or after so many selections were made; ``OperatingPoint.upper_bound`` says what that leaves open.
MAX_SELECTIONS = 200
#: Numbers of epochs that are all looked at, with reuse; of larger ones, some.
_EPOCHS = 8


@dataclass(frozen=True, eq=False)
class OperatingPoint:
    """What to train for the most importance per FLOP, beside training everything.

    ``everything`` is every tensor that may be trained and whose importance is above 0, as ``budget=1`` selects them:
    what has less would not lower the loss by this estimate. (``budget=None`` trains those too.)

    ``gain`` is what is predicted of ``selection``, by what is predicted of ``everything``: importance per FLOP or,
    under a total, importance times the steps that it pays for, parts of one included: ``predicted``, which is above 0.
    No selection has a gain above ``upper_bound``. ``steps`` and ``full_steps`` are what the total pays for of the one
    and of the other; ``None`` without a total. ``reason`` says it in a sentence.
    """

    selection: Selection
    everything: Selection
    gain: float
    upper_bound: float
    predicted: float
    steps: int | None
    full_steps: int | None

    def __repr__(self) -> str:
        return f"OperatingPoint({self.reason})"

    @property
    def share(self) -> float:
        """What a step costs, by a step that trains the whole model."""
        return self.selection.flops / self.selection.profile.full_flops

    @property
    def trains_everything(self) -> bool:
        """Whether no selection is predicted to beat training everything."""
        return bool((self.selection.mask == self.everything.mask).all())

    @property
    def per_flop(self) -> float:
        """Importance per FLOP of a step, by that of training everything."""
        full = self.everything
        return self.selection.value / full.value * full.flops / self.selection.flops

    @property
    def reuses(self) -> bool:
        """Whether blocks below the selected tensors are read from a store."""
        return self.selection.reuses

    @property
    def reason(self) -> str:
        """Why this, in a sentence without its capital letter and its full stop."""
        if self.steps == 0:
            return "the total pays for less than one step"
        if self.trains_everything:
            if self.full_steps is None:
                return "training everything is predicted to bring more per FLOP than any selection"
            return f"at this budget, training everything for {_steps(self.full_steps)} is predicted to beat selection"
        numbers = f"{len(self.selection.names)} of {len(self.everything.names)} tensors"
        what = f"training {numbers} at {self.share:.2f} of a full step"
        what += " with reuse" if self.reuses else ""
        if self.steps is None or self.full_steps is None:
            return f"{what} is predicted to bring {self.gain:.2f}x per FLOP what full training brings"
        return (
            f"{what} for {_steps(self.steps)} is predicted to bring {self.gain:.2f}x what training everything for "
            f"{_steps(self.full_steps)} brings"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "share": self.share,
            "per_flop": self.per_flop,
            "gain": self.gain,
            "upper_bound": self.upper_bound,
            "trains_everything": self.trains_everything,
            "reuses": self.reuses,
            "steps": self.steps,
            "full_steps": self.full_steps,
            "reason": self.reason,
            "selection": self.selection.to_json(),
        }


def operating_point(
    profile: Profile,
    importance: Mapping[str, float],
    *,
    total_flops: float | None = None,
    num_steps: int | None = None,
    granularity: Granularity = "tensor",
    must_train: Patterns = (),
    must_freeze: Patterns = (),
    max_elements: int | None = None,
    reuse: Reuse | None = None,
    epochs_left: int | None = None,
    allow_unsupported: bool = False,
) -> OperatingPoint:
    """The selection with the most importance per FLOP of its step, and whether training everything beats it.

    Without a total, the largest ``I(S) / T(S)``: importance by the exact FLOPs of a step, forward pass included, with
    reuse on average over ``epochs_left``.

    With ``total_flops`` for at most ``num_steps`` steps (those of the epochs over the data), the largest predicted
    gain: ``steps x I(S)``, where ``steps <= num_steps`` and all steps together cost at most the total. Spending less
    than the total is no virtue: where ``num_steps`` steps of the most importance per FLOP would not use it up, a dearer
    selection brings more, and where the total pays for all steps in full, that is everything. With reuse, the steps of
    the first of the ``epochs_left`` epochs fill the store, and a total that is spent in fewer epochs has fewer to share
    that.

    Importance is a first-order estimate for the coming step, taken to hold for all of them and to add up over tensors.
    Negative importances are never chosen, but by ``must_train``. ``max_elements`` and the other conditions are those of
    :func:`gtflops.select`; so are the errors, and InputError for a total without ``num_steps``, or the other way round.

    How: what all selections of a cost between ``a`` and ``b`` may bring per FLOP is at most the importance of the best
    selection of cost ``b``, divided by ``a``. Ranges of costs are solved at their upper end and split, the most
    promising first, until none can be better by more than 0.1 %: some ten to hundred selections. With reuse under a
    total, so is each number of epochs that the run may take; for one that ends within an epoch ``upper_bound`` says
    what a plan for just that many steps might bring beyond. A selection takes some tenths of a millisecond for models
    of some hundred tensors, and up to half a second where ``max_elements`` binds.

    >>> import gtflops
    >>> profile = gtflops.profile("facebook/opt-125m", batch_size=4, seq_len=128)
    >>> even = {tensor.name: float(tensor.numel) for tensor in profile.tensors}
    >>> gtflops.operating_point(profile, even, total_flops=1e13, num_steps=100).reason
    'at this budget, training everything for 25 steps is predicted to beat selection'
    >>> top = {name: 100 * value if ".11." in name else value for name, value in even.items()}
    >>> gtflops.operating_point(profile, top, total_flops=1e13, num_steps=100).trains_everything
    False
    """
    problem = Problem.of(
        profile,
        importance,
        granularity=granularity,
        must_train=must_train,
        must_freeze=must_freeze,
        max_elements=max_elements,
        reuse=reuse,
        epochs_left=epochs_left,
        allow_unsupported=allow_unsupported,
    )
    if (total_flops is None) != (num_steps is None):
        raise InputError(
            f"total_flops is {total_flops!r} and num_steps {num_steps!r}; expected both, the total and the most steps "
            "that it may be spent on, or neither"
        )
    if total_flops is None or num_steps is None:
        return point_of(problem)
    if isinstance(total_flops, bool) or not 0 < total_flops < math.inf:
        raise InputError(f"total_flops is {total_flops!r}, expected a positive finite number")
    if isinstance(num_steps, bool) or num_steps < 1:
        raise InputError(f"num_steps is {num_steps!r}, expected a positive integer")
    return point_of(problem, Spending(Fraction(total_flops), num_steps))


@dataclass(frozen=True, slots=True)
class Spending:
    """A total of FLOPs for at most ``num_steps`` steps; each costs ``overhead`` beside itself, as measuring does."""

    total: Fraction
    num_steps: int
    overhead: Fraction = Fraction(0)

    def steps(self, selection: Selection) -> Fraction:
        """How many steps of a selection the total pays for, and a part of one; at most ``num_steps``."""
        profile, mask = selection.profile, selection.mask
        if selection.epochs_left is None:
            return min(Fraction(self.num_steps), self.total / (selection.flops + self.overhead))
        step = profile.step_flops(mask, reuse="prefix")
        first, later = step.first + self.overhead, step.total + self.overhead
        in_first_epoch = Fraction(self.num_steps, selection.epochs_left)
        if self.total <= first * in_first_epoch:
            return self.total / first
        return min(Fraction(self.num_steps), in_first_epoch + (self.total - first * in_first_epoch) / later)


def point_of(problem: Problem, spending: Spending | None = None) -> OperatingPoint:
    """:func:`operating_point` of a problem over FLOPs."""
    everything = _everything(problem)
    if everything.value <= 0:
        raise InputError(
            f"the importances of all that may be trained sum to {everything.value:g}, must_train included, so that "
            "nothing is predicted to lower the loss; expected a sum above 0"
        )

    def worth(selection: Selection) -> float:
        if spending is None:
            return selection.value / selection.flops
        return selection.value * float(spending.steps(selection))

    best, most, bound = everything, worth(everything), -math.inf
    is_allowed = problem.fits(everything.mask)
    if not is_allowed:
        most = -math.inf
    overhead = 0.0 if spending is None else float(spending.overhead)
    for plan, floor in _plans(problem, spending):
        start = everything.value / max(plan.exact.total(everything.mask) + overhead, floor) if is_allowed else -math.inf
        found, rate_bound = _most_per_flop(plan, floor, overhead, start)
        bound = max(bound, rate_bound * (1.0 if spending is None else float(spending.total)))
        if found is None:
            continue
        # Steps are counted by the epochs that the run has, whatever number of them the plan was made for.
        chosen = selection_of(problem, problem.exact.total(found.mask), found)
        if (value := worth(chosen)) > most:
            best, most = chosen, value
    full = worth(everything)
    return OperatingPoint(
        selection=best,
        everything=everything,
        gain=most / full,
        upper_bound=max(most, bound) / full,
        predicted=most,
        steps=None if spending is None else int(spending.steps(best)),
        full_steps=None if spending is None else int(spending.steps(everything)),
    )


def _everything(problem: Problem) -> Selection:
    """Every tensor that may be trained and is worth something, and those that must."""
    mask = problem.forced | (problem.worth > 0)[problem.item_of]
    value = math.fsum(problem.values[mask])
    return selection_of(problem, problem.exact.total(mask), Solution(mask, value, value, optimal=True))


def _plans(problem: Problem, spending: Spending | None) -> Iterator[tuple[Problem, float]]:
    """Problems of which one has the best selection, and for each the cost below which a cheaper step brings nothing.

    A total that is spent on few of the epochs has few to share what the first one stores. For a run that ends between
    two numbers of epochs, the plan of the larger one is the bound: it shares among more.
    """
    if spending is None:
        yield problem, 0.0
    elif problem.epochs_left is None:
        yield problem, float(spending.total / spending.num_steps)
    else:
        for epochs in _numbers_of_epochs(problem.epochs_left):
            steps = Fraction(spending.num_steps * epochs, problem.epochs_left)
            yield problem.over_epochs(epochs), float(spending.total / steps)


def _numbers_of_epochs(epochs: int) -> list[int]:
    """All up to 8, and a few beyond, up to ``epochs``."""
    numbers = list(range(1, min(epochs, _EPOCHS) + 1))
    while numbers[-1] < epochs:
        numbers.append(min(epochs, numbers[-1] * 3 // 2))
    return numbers


def _most_per_flop(problem: Problem, floor: float, overhead: float, start: float) -> tuple[Solution | None, float]:
    """The largest ``value / max(cost + overhead, floor)`` above ``start``, ``None`` without any; and an upper bound.

    A fractional problem. Dinkelbach's method would solve ``value - rate x cost`` without a limit, a minimum cut; ranges
    of costs need the solver of a limit alone, and serve all of its conditions.
    """

    def per_flop(value: float, least: int, most: int) -> float:
        """What a selection of such a value may have, whose cost is in the range."""
        return value / max((least if value >= 0 else most) + overhead, floor)

    everything = _everything(problem)
    # What costs less than the floor counts as the floor: the best within it is the best of all these.
    least = max(problem.smallest, int(floor - overhead))
    most = max(least, problem.exact.total(everything.mask))
    best, rate, unproved = None, start, -math.inf
    queue = [(-math.inf, least, most, math.inf)]  # minus a bound, a range of costs, and a bound of values in it
    for _ in range(MAX_SELECTIONS):
        if not queue or -queue[0][0] <= rate + TOLERANCE * abs(rate):
            break
        _, least, most, value = heapq.heappop(queue)
        solution = problem.solve(most)
        cost = problem.exact.total(solution.mask)
        if (found := per_flop(solution.value, cost, cost)) > rate:
            best, rate = solution, found
        value = min(value, solution.upper_bound)
        if not solution.optimal:
            unproved = max(unproved, per_flop(value, max(cost, least), most))
        # What costs more than the solution, within the limit, is worth no more.
        if (most := cost - 1) < least:
            continue
        middle = math.isqrt(least * most)
        for start_of, end_of in ((least, middle), (middle + 1, most)):
            if start_of <= end_of:
                heapq.heappush(queue, (-per_flop(value, start_of, end_of), start_of, end_of, value))
    return best, max(rate, unproved, -queue[0][0] if queue else -math.inf)


def _steps(number: int) -> str:
    return f"{number:,} step" + ("" if number == 1 else "s")

"""What each budget buys: the frontier, as a report shows it."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Literal

import numpy as np

from gtflops.curve import frontier
from gtflops.problem import Problem
from gtflops.profiling import Profile

#: Steps between two budgets, as shares of a full step, by the most tensors for which the solver makes them at once.
_STEPS = ((1_000, Fraction(1, 200)), (5_000, Fraction(1, 50)), (20_000, Fraction(1, 10)))


@dataclass(frozen=True, slots=True)
class BudgetPoint:
    """The best selection within ``budget_flops``. ``captured`` is its share of what is bought, in [0, 1].

    ``trains`` has bit k of byte k // 8 set where tensor k, in backward order, is trained.
    """

    budget_flops: int
    flops: int
    captured: float
    optimal: bool
    tensors: int
    numel: int
    trains: bytes

    def positions(self) -> list[int]:
        """Of the trained tensors, in backward order."""
        bits = np.unpackbits(np.frombuffer(self.trains, np.uint8), bitorder="little")
        return [int(position) for position in np.flatnonzero(bits)]


@dataclass(frozen=True, slots=True)
class BudgetCurve:
    """What the best selection at each budget captures, the smallest budget first.

    ``bought`` is importance, or, where nobody measured any, the number of trained elements.
    """

    bought: Literal["importance", "elements"]
    points: tuple[BudgetPoint, ...]


def budget_curve(profile: Profile, importance: Mapping[str, float] | None = None) -> BudgetCurve | None:
    """The frontier at round shares of a full step. Operators without a price count as free, as in all of a report.

    ``None`` where no tensor is worth anything, and for more than 20,000 tensors, where it would take minutes.
    InputError for importances of another model.
    """
    step = next((step for most, step in _STEPS if len(profile.names) <= most), None)
    worth = (
        {tensor.name: float(tensor.numel) * tensor.has_gradient for tensor in profile.tensors}
        if importance is None
        else importance
    )
    if step is None or not profile.full_flops or all(value == 0 for value in worth.values()):
        return None
    problem = Problem.of(profile, worth, allow_unsupported=True)
    least = ceil(Fraction(problem.smallest, problem.full) / step)
    shares = [float(count * step) for count in range(least, int(1 / step) + 1)]
    curve = frontier(profile, worth, budgets=shares, allow_unsupported=True)
    numel = np.array([tensor.numel for tensor in profile.tensors], dtype=np.int64)
    points = (
        BudgetPoint(
            budget_flops=int(budget),
            flops=int(flops),
            captured=chosen.importance_captured,
            optimal=chosen.optimal,
            tensors=int(mask.sum()),
            numel=int(numel[mask].sum()),
            trains=np.packbits(mask, bitorder="little").tobytes(),
        )
        for budget, flops, mask, chosen in zip(curve.budgets, curve.flops, curve.masks, curve, strict=True)
    )
    return BudgetCurve("elements" if importance is None else "importance", tuple(points))

"""Other ways to choose tensors within a budget, for the ablation: each from the same importances and exact costs."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator

import gtflops
from gtflops.problem import Problem
from gtflops.profiling import Profile
from gtflops.selection import selection_of
from gtflops.spending import OperatingPoint
from gtflops.training import Budget, Progress
from published_recursion import published_selection

#: The names of what is trained, from a profile, importances, the FLOPs that a step may cost, and random numbers.
Rule = Callable[[Profile, Mapping[str, float], int, Generator], Collection[str]]


def exactly(profile: Profile, importance: Mapping[str, float], limit: int, rng: Generator) -> Collection[str]:
    """What gtflops selects: the control, trained as the others are."""
    return gtflops.select(profile, importance, budget_flops=limit).names


def at_random(
    profile: Profile, importance: Mapping[str, float], limit: int, rng: np.random.Generator
) -> Collection[str]:
    """The best selection for importances drawn anew each time: it fills the budget, and means nothing."""
    drawn = rng.exponential(size=len(profile.names))
    return gtflops.select(profile, dict(zip(profile.names, drawn.tolist(), strict=True)), budget_flops=limit).names


def largest_first(
    profile: Profile, importance: Mapping[str, float], limit: int, rng: np.random.Generator
) -> Collection[str]:
    """By importance without a look at costs, the largest first, leaving out what does not fit."""
    chosen: list[str] = []
    for name in sorted(importance, key=lambda one: importance[one], reverse=True):
        if importance[name] > 0 and profile.step_flops([*chosen, name]).total <= limit:
            chosen.append(name)
    return chosen


def as_published(
    profile: Profile, importance: Mapping[str, float], limit: int, rng: np.random.Generator
) -> Collection[str]:
    """Our writing of the published recursion: costs rounded down to a thousandth of the backward pass.

    Kinder than the public code: exact on these costs, and in the true backward order. What it chooses may cost more
    than the limit, and is trained as it is.
    """
    mask = published_selection(
        profile.t_dw,
        profile.t_dy,
        np.array([max(0.0, importance[name]) for name in profile.names]),
        limit - profile.forward_flops,
    )
    return [name for name, chosen in zip(profile.names, mask, strict=True) if chosen]


RULES: dict[str, Rule] = {"exact": exactly, "random": at_random, "largest": largest_first, "published": as_published}


class ByAnotherRule(OperatingPoint):
    """No prediction is made of it."""

    @property
    def reason(self) -> str:
        return f"a rule chose {len(self.selection.names)} tensors at {self.share:.3f} of a full step"


@dataclass(frozen=True, slots=True)
class ByRule(Budget):
    """What a rule chooses within ``value`` of a full step, on the batch that importance is measured on.

    Other batches are trained with the same, whatever that costs there. Importance is paid for whatever the rule.
    """

    value: float
    rule: Rule
    seed: int

    def share(self, progress: Progress) -> float | None:
        return self.value

    def point(self, problem: Problem, progress: Progress) -> OperatingPoint | None:
        profile, full = problem.profile, problem.profile.full_flops
        rng = np.random.default_rng((self.seed, progress.step))
        names = self.rule(profile, problem.importance, int(self.value * full), rng)
        mask = profile.mask(names)
        everything = selection_of(problem, full, problem.solve(full))
        value = float(problem.values[mask].sum())
        flops = profile.step_flops(mask).total
        chosen = replace(everything, mask=mask, flops=flops, value=value, upper_bound=value, optimal=False)
        unknown = {"gain": math.nan, "upper_bound": math.nan, "predicted": math.nan}
        return ByAnotherRule(chosen, everything, **unknown, steps=None, full_steps=None)

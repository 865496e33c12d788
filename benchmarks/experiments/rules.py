"""Other ways to choose tensors within a budget, for the ablation: each from the same importances and exact costs."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

import gtflops
from gtflops.problem import Problem
from gtflops.profiling import Profile
from gtflops.selection import selection_of
from gtflops.spending import OperatingPoint
from gtflops.training import Budget, Progress
from published_recursion import published_selection

#: The names of what is trained, from a profile, importances, the FLOPs that a step may cost, and the steps made.
Rule = Callable[[Profile, Mapping[str, float], int, int], Collection[str]]


def at_random(profile: Profile, importance: Mapping[str, float], limit: int, step: int) -> Collection[str]:
    """The best selection for importances drawn anew each time: it fills the budget, and means nothing."""
    drawn = np.random.default_rng(step).exponential(size=len(profile.names))
    return gtflops.select(profile, dict(zip(profile.names, drawn.tolist(), strict=True)), budget_flops=limit).names


def largest_first(profile: Profile, importance: Mapping[str, float], limit: int, step: int) -> Collection[str]:
    """By importance without a look at costs, the largest first, leaving out what does not fit."""
    chosen: list[str] = []
    for name in sorted(importance, key=lambda one: importance[one], reverse=True):
        if importance[name] > 0 and profile.step_flops([*chosen, name]).total <= limit:
            chosen.append(name)
    return chosen


def as_published(profile: Profile, importance: Mapping[str, float], limit: int, step: int) -> Collection[str]:
    """The published recursion: a chain in backward order, costs rounded down to a thousandth of the backward pass.

    What it chooses may cost more than the limit, and is trained as it is.
    """
    mask = published_selection(
        profile.t_dw,
        profile.t_dy,
        np.array([max(0.0, importance[name]) for name in profile.names]),
        limit - profile.forward_flops,
    )
    return [name for name, chosen in zip(profile.names, mask, strict=True) if chosen]


RULES: dict[str, Rule] = {"random": at_random, "largest": largest_first, "published": as_published}


@dataclass(frozen=True, slots=True)
class ByRule(Budget):
    """What a rule chooses within ``value`` of a full step. Importance is measured, and paid for, whatever the rule."""

    value: float
    rule: Rule

    def share(self, progress: Progress) -> float | None:
        return self.value

    def point(self, problem: Problem, progress: Progress) -> OperatingPoint | None:
        profile, full = problem.profile, problem.profile.full_flops
        names = self.rule(profile, problem.importance, int(self.value * full), progress.step)
        mask = profile.mask(names)
        everything = selection_of(problem, full, problem.solve(full))
        value = float(problem.values[mask].sum())
        flops = profile.step_flops(mask).total
        chosen = replace(everything, mask=mask, flops=flops, value=value, upper_bound=value, optimal=False)
        return OperatingPoint(chosen, everything, 1.0, 1.0, None, None)

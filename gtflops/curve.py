"""The whole curve of importance against cost: the best selection at many budgets, or at any."""

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from gtflops.errors import InputError
from gtflops.forms import CostName, FormName, Solution
from gtflops.problem import Granularity, Patterns, Problem, limit_of
from gtflops.profiling import Profile, Reuse
from gtflops.selection import Selection, selection_of

BUDGETS = 256


@dataclass(frozen=True, eq=False)
class Frontier:
    """The best selection at each of many budgets, the smallest first. ``frontier[i]`` is the i-th as a Selection.

    ``budgets`` is int64 [points], what a step may cost, in FLOPs, or in nanoseconds for a frontier over time;
    ``flops`` int64 [points], what it costs exactly; ``masks`` bool [points, tensors], aligned with
    ``profile.tensors``; ``value``, ``upper_bound`` and ``optimal`` as those of a :class:`Selection`. ``value`` never
    falls from one budget to the next.
    """

    problem: Problem
    budgets: npt.NDArray[np.int64]
    flops: npt.NDArray[np.int64]
    value: npt.NDArray[np.float64]
    upper_bound: npt.NDArray[np.float64]
    optimal: npt.NDArray[np.bool_]
    masks: npt.NDArray[np.bool_]

    def __repr__(self) -> str:
        return f"Frontier({len(self)} budgets, {int(self.optimal.sum())} proved, of {self.problem.profile!r})"

    def __len__(self) -> int:
        return len(self.budgets)

    def __getitem__(self, index: int) -> Selection:
        return selection_of(
            self.problem,
            int(self.budgets[index]),
            Solution(
                self.masks[index], float(self.value[index]), float(self.upper_bound[index]), bool(self.optimal[index])
            ),
        )

    def __iter__(self) -> Iterator[Selection]:
        return (self[index] for index in range(len(self)))

    def selection(
        self,
        budget: float | None = None,
        *,
        budget_flops: int | None = None,
        budget_seconds: float | None = None,
    ) -> Selection:
        """The best selection at any budget, solved now, under the conditions of the frontier. As ``select``."""
        limit = limit_of(self.problem.profile, self.problem.cost, budget, budget_flops, budget_seconds)
        return selection_of(self.problem, limit, self.problem.solve(limit))

    def to_json(self) -> dict[str, Any]:
        """Plain data: the names of all tensors once, and of each point the positions it trains instead."""
        points = []
        for selection, mask in zip(self, self.masks, strict=True):
            point = selection.to_json()
            del point["names"], point["full_flops"]
            points.append({**point, "trains": np.flatnonzero(mask).tolist()})
        profile = self.problem.profile
        return {"names": list(profile.names), "full_flops": profile.full_flops, "points": points}


def frontier(
    profile: Profile,
    importance: Mapping[str, float],
    *,
    budgets: SupportsIndex | Iterable[float] = BUDGETS,
    form: FormName = "graph",
    granularity: Granularity = "tensor",
    must_train: Patterns = (),
    must_freeze: Patterns = (),
    max_elements: int | None = None,
    cost: CostName = "flops",
    reuse: Reuse | None = None,
    epochs_left: int | None = None,
    allow_unsupported: bool = False,
) -> Frontier:
    """The best selection at many budgets: how much importance each amount of FLOPs buys.

    ``budgets`` is how many, evenly spaced from the smallest step that trains something to the full step, or what each
    may cost, as shares of a full step in (0, 1]. The other arguments and the errors are those of
    :func:`gtflops.select`; ``max_elements`` holds at each budget. Takes as long as that many selections, some tenths of
    a millisecond each for models of some hundred tensors, and up to half a second each where ``max_elements`` binds.

    >>> import gtflops, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))
    >>> profile = gtflops.profile(model, torch.ones(7, 3), loss=lambda y, x: y.sum())
    >>> curve = gtflops.frontier(profile, {"2.bias": 1.0, "2.weight": 2.0, "0.bias": 1.0, "0.weight": 4.0}, budgets=4)
    >>> tuple(selection.value for selection in curve)
    (1.0, 3.0, 4.0, 8.0)
    >>> curve.selection(1.0).names
    ('2.bias', '2.weight', '0.bias', '0.weight')
    >>> few = gtflops.frontier(profile, curve[3].importance, budgets=[0.7, 1.0], max_elements=15)
    >>> few[0].names, few[1].names
    (('2.bias', '2.weight'), ('2.bias', '2.weight', '0.bias'))
    """
    problem = Problem.of(
        profile,
        importance,
        form=form,
        granularity=granularity,
        must_train=must_train,
        must_freeze=must_freeze,
        max_elements=max_elements,
        cost=cost,
        reuse=reuse,
        epochs_left=epochs_left,
        allow_unsupported=allow_unsupported,
    )
    limits = _limits(problem, budgets)
    solutions: list[Solution] = []
    for limit in limits:
        solution = problem.solve(limit)
        # Where a search was cut short, or sums round, what fitted the budget before may be worth more.
        if solutions and (before := solutions[-1]).value > solution.value:
            bound = max(solution.upper_bound, before.value)
            solution = Solution(before.mask, before.value, bound, solution.optimal)
        solutions.append(solution)
    masks = np.array([solution.mask for solution in solutions], dtype=np.bool_)
    arrays = (
        np.array(limits, dtype=np.int64),
        profile.form("flops", problem.epochs_left).totals(masks),
        np.array([solution.value for solution in solutions]),
        np.array([solution.upper_bound for solution in solutions]),
        np.array([solution.optimal for solution in solutions], dtype=np.bool_),
        masks,
    )
    for array in arrays:
        array.flags.writeable = False
    return Frontier(problem, *arrays)


def _limits(problem: Problem, budgets: SupportsIndex | Iterable[float]) -> list[int]:
    """Limits in FLOPs or nanoseconds, ascending."""
    expected = "expected how many, at least 2, or shares of a full step in (0, 1]"
    if isinstance(budgets, (bool, np.bool_, str)):
        raise InputError(f"budgets is {budgets!r}, {expected}")
    try:
        number = operator.index(budgets)  # type: ignore[arg-type]  # shares have none
    except TypeError:
        number = None
    if number is not None:
        if number < 2:
            raise InputError(f"budgets is {number}, expected at least 2, the smallest and the full step")
        least, room = problem.smallest, max(0, problem.full - problem.smallest)
        return [least + room * step // (number - 1) for step in range(number)]
    if not isinstance(budgets, Iterable):
        raise InputError(f"budgets is {budgets!r}, {expected}")
    limits = sorted(limit_of(problem.profile, problem.cost, budget) for budget in budgets)
    if not limits:
        raise InputError(f"budgets is empty, {expected}")
    return limits

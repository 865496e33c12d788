"""Profile + importance + budget -> Selection: the tensors to train until the next selection."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from gtflops.errors import InfeasibleBudgetError, InputError
from gtflops.profiling import HasParameters, Profile
from gtflops.solver import knapsack
from gtflops.units import format_flops

_LARGEST = float(np.finfo(np.float64).max)

Model = TypeVar("Model", bound=HasParameters)


@dataclass(frozen=True, eq=False)
class Selection:
    """The tensors to train, what a step with them costs, and how good the choice is.

    ``mask`` is a bool array aligned with ``profile.tensors``; ``flops`` the exact cost of a step, at most
    ``budget_flops``; ``value`` the sum of the selected importances, and ``upper_bound`` what no selection of the
    chain form within the budget exceeds (equal to ``value`` where ``optimal``).
    """

    profile: Profile
    importance: Mapping[str, float]
    mask: npt.NDArray[np.bool_]
    budget_flops: int
    flops: int
    value: float
    upper_bound: float
    optimal: bool

    def __repr__(self) -> str:
        share = self.flops / self.profile.full_flops
        return (
            f"Selection({len(self.names)} of {len(self.mask)} tensors, {format_flops(self.flops)}, {share:.3f} of full)"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The selected tensors, in backward order."""
        return tuple(name for name, selected in zip(self.profile.names, self.mask, strict=True) if selected)

    @property
    def importance_captured(self) -> float:
        """Share of all positive importance that the selected tensors hold."""
        return self.value / math.fsum(value for value in self.importance.values() if value > 0)

    def apply(self, model: Model) -> Model:
        """Let exactly the selected tensors of ``model`` require gradients, and return the model.

        Gradients that frozen tensors still hold are dropped: an optimizer would move them by what is left there.
        InputError, before anything is changed, for a model that was not the one profiled.
        """
        self.profile.require_fit(model)
        parameters = dict(model.named_parameters())
        for name, selected in zip(self.profile.names, self.mask, strict=True):
            parameters[name].requires_grad_(bool(selected))
            if not selected:
                parameters[name].grad = None
        return model

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "names": list(self.names),
            "budget_flops": self.budget_flops,
            "flops": self.flops,
            "full_flops": self.profile.full_flops,
            "value": self.value,
            "upper_bound": self.upper_bound,
            "optimal": self.optimal,
            "importance_captured": self.importance_captured,
        }


def select(
    profile: Profile,
    importance: Mapping[str, float],
    budget: float | None = None,
    *,
    budget_flops: int | None = None,
    allow_unsupported: bool = False,
) -> Selection:
    """Choose the tensors of most importance whose training step fits the budget.

    ``importance`` maps every tensor of the profile to a finite number; tensors without positive importance are
    never chosen. ``budget`` is a share of ``profile.full_flops`` in (0, 1], 0.5 if nothing is given; or
    ``budget_flops`` says it in FLOPs. Solves the chain form (weight gradients of the chosen, activation gradients down
    to the deepest) to proven optimality, and re-sums the exact cost of what it chose. Where the chain form, which is
    an upper bound of the exact cost, fits nothing, the best single tensor that fits exactly is chosen.

    Raises InputError for importances or budgets that do not fit, UnsupportedOperatorError where an operator has no
    price (``allow_unsupported=True`` counts it as free), InfeasibleBudgetError where no selection fits.

    >>> import gtflops
    >>> profile = gtflops.profile("facebook/opt-125m", batch_size=4, seq_len=128)
    >>> selection = gtflops.select(profile, {tensor.name: tensor.numel for tensor in profile.tensors}, budget=0.6)
    >>> selection.optimal, selection.flops <= 0.6 * profile.full_flops
    (True, True)
    """
    if not allow_unsupported:
        profile.require_prices()
    limit = budget_in_flops(profile, budget, budget_flops)
    values = _values(profile, importance)
    _require_feasible(profile, values, limit)
    solution = knapsack(profile.t_dw, profile.t_dy, values, max(0, limit - profile.step_flops("none").total))
    mask, value, upper_bound, optimal = solution.mask, solution.value, solution.upper_bound, solution.optimal
    if not mask.any():
        best = int(np.where(profile.alone_flops <= limit, values, 0).argmax())
        mask = np.arange(len(values)) == best
        value, upper_bound, optimal = float(values[best]), float(values[values > 0].sum()), False
    flops = profile.step_flops(mask).total
    if flops > limit:  # the chain form is an upper bound of the exact cost
        raise AssertionError(f"selection of {flops} FLOPs exceeds its budget of {limit}")
    return Selection(profile, dict(importance), mask, limit, flops, value, upper_bound, optimal)


def budget_in_flops(profile: Profile, budget: float | None, budget_flops: int | None = None) -> int:
    """What a step may cost, from a share of a full step (0.5 without either) or as given. InputError if it is none."""
    if budget is not None and budget_flops is not None:
        raise InputError(f"both budget={budget!r} and budget_flops={budget_flops!r} are given, expected one of them")
    if budget_flops is not None:
        if not isinstance(budget_flops, (int, np.integer)) or isinstance(budget_flops, bool) or budget_flops <= 0:
            raise InputError(f"budget_flops is {budget_flops!r}, expected a positive integer")
        return int(budget_flops)
    share = 0.5 if budget is None else budget
    if isinstance(share, bool) or not isinstance(share, (int, float, np.floating)) or not 0 < share <= 1:
        raise InputError(f"budget is {share!r}, expected a share of a full step in (0, 1]")
    return int(Fraction(repr(float(share))) * profile.full_flops)  # 0.6 means 6/10


def _values(profile: Profile, importance: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """Importances aligned with ``profile.tensors``; 0 for tensors that the loss does not depend on."""
    missing = [name for name in profile.names if name not in importance]
    known = set(profile.names)
    unknown = [name for name in importance if name not in known]
    if missing or unknown:
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} of {len(profile.names)} tensors, first {missing[0]!r}")
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), profile.names, n=1, cutoff=0.3)
            nearest = f" (nearest: {close[0]!r})" if close else ""
            parts.append(f"has {len(unknown)} names that the profile does not, first {unknown[0]!r}{nearest}")
        raise InputError(f"importance {' and '.join(parts)}; expected one number for each tensor of the profile")
    for name in profile.names:
        value = importance[name]
        if not isinstance(value, (int, float, np.integer, np.floating)) or not abs(value) <= _LARGEST:
            raise InputError(f"importance of {name!r} is {value!r}, expected a finite number")
    return np.array(
        [float(importance[tensor.name]) if tensor.has_gradient else 0.0 for tensor in profile.tensors],
        dtype=np.float64,
    )


_RUNS_ALWAYS = "what runs whatever is trained, input gradients included (model.disable_input_require_grads() ends them)"


def _require_feasible(profile: Profile, values: npt.NDArray[np.float64], limit: int) -> None:
    if not (values > 0).any():
        raise InputError(
            "no tensor has a positive importance, so the selection would be empty and nothing would be trained; "
            "expected at least one"
        )
    smallest = int(profile.alone_flops[values > 0].min())
    if limit >= smallest:
        return
    full = profile.full_flops
    floor = profile.step_flops("none")
    share = limit / full
    least = -(-10_000 * smallest // full) / 10_000  # rounded up
    reason = (
        f"is below {_RUNS_ALWAYS if floor.backward else 'the forward pass alone'} "
        f"({floor.total / full:.4f} of a full step)"
        if limit < floor.total
        else "leaves too little for any tensor of positive importance"
    )
    raise InfeasibleBudgetError(
        f"budget {share:.4f} ({format_flops(limit)}) {reason}; the smallest feasible budget for this model and batch "
        f"is {least:.4f} (budget_flops={smallest})"
    )

"""Profile + importance + budget -> Selection: the tensors to train until the next selection."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from gtflops.forms import CostName, FormName, Solution
from gtflops.problem import Granularity, Patterns, Problem, limit_of
from gtflops.profiling import HasParameters, Profile, Reuse
from gtflops.units import format_flops

if TYPE_CHECKING:
    import torch

Model = TypeVar("Model", bound=HasParameters)


@dataclass(frozen=True, eq=False)
class Selection:
    """The tensors to train, what a step with them costs, and how good the choice is.

    ``mask`` is a bool array aligned with ``profile.tensors``; ``flops`` the exact cost of a step, with reuse on average
    over ``epochs_left``, rounded up (``profile.step_flops(selection.mask, reuse="prefix")`` has the parts). Either
    ``budget_flops`` or ``budget_seconds`` says what the step may cost, and it costs no more. ``value`` is the sum of
    the selected importances, and ``upper_bound`` what no selection under the same conditions exceeds (equal to
    ``value`` where ``optimal``).
    """

    profile: Profile
    importance: Mapping[str, float]
    mask: npt.NDArray[np.bool_]
    budget_flops: int | None
    flops: int
    value: float
    upper_bound: float
    optimal: bool
    budget_seconds: float | None = None
    epochs_left: int | None = None

    def __repr__(self) -> str:
        share = self.flops / self.profile.full_flops
        return (
            f"Selection({len(self.names)} of {len(self.mask)} tensors, {format_flops(self.flops)}, {share:.3f} of full)"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from gtflops.report.notebook import selection_html

        return selection_html(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The selected tensors, in backward order."""
        return tuple(name for name, selected in zip(self.profile.names, self.mask, strict=True) if selected)

    @property
    def partial(self) -> tuple[str, ...]:
        """Those of ``names`` that are trained by a part of their gradient: :meth:`gtflops.Profile.partial`."""
        return self.profile.partial(self.mask)

    @property
    def seconds(self) -> float | None:
        """What a step takes by the measured times of its operators; ``None`` for a profile without."""
        if self.profile.nanoseconds is None:
            return None
        return self.profile.form("time", self.epochs_left).total(self.mask) / 1e9

    @property
    def reuses(self) -> bool:
        """Whether blocks below the selected tensors are read from a store, which takes two epochs."""
        return (self.epochs_left or 1) > 1 and bool(self.profile.step_flops(self.mask, reuse="prefix").blocks)

    @property
    def importance_captured(self) -> float:
        """Share of all positive importance that the selected tensors hold; 0 where there is none."""
        positive = math.fsum(value for value in self.importance.values() if value > 0)
        return self.value / positive if positive else 0.0

    def apply(self, model: Model) -> Model:
        """Let exactly the selected tensors of ``model`` require gradients, and return the model.

        Gradients that frozen tensors still hold are dropped: an optimizer would move them by what is left there. With
        ``uses="separate"``, modules through which a shared tensor is not trained hold another one on its memory, until
        :func:`gtflops.tie`. InputError, before anything is changed, for a model that was not the one profiled.
        """
        self.profile.require_fit(model)
        if self.profile.graph.uses:
            from gtflops.capture.uses import train_uses  # needs torch, which such a model has loaded

            train_uses(cast("torch.nn.Module", model), frozenset(self.names))
            return model
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
            "partial": list(self.partial),
            "budget_flops": self.budget_flops,
            "budget_seconds": self.budget_seconds,
            "flops": self.flops,
            "full_flops": self.profile.full_flops,
            "seconds": self.seconds,
            "epochs_left": self.epochs_left,
            "value": self.value,
            "upper_bound": self.upper_bound,
            "optimal": self.optimal,
            "importance_captured": self.importance_captured,
        }

    @classmethod
    def from_json(cls, profile: Profile, data: Mapping[str, Any], importance: Mapping[str, float]) -> "Selection":
        """The inverse of :meth:`to_json`, which holds neither profile nor importances.

        ``profile`` may be of another batch shape of the same model; the figures are those of the selection. InputError
        for a model without such tensors.
        """
        return cls(
            profile=profile,
            importance=importance,
            mask=profile.mask(data["names"]),
            budget_flops=data["budget_flops"],
            flops=data["flops"],
            value=data["value"],
            upper_bound=data["upper_bound"],
            optimal=data["optimal"],
            budget_seconds=data["budget_seconds"],
            epochs_left=data.get("epochs_left"),
        )


def select(
    profile: Profile,
    importance: Mapping[str, float],
    budget: float | None = None,
    *,
    budget_flops: int | None = None,
    budget_seconds: float | None = None,
    form: FormName = "graph",
    granularity: Granularity = "tensor",
    must_train: Patterns = (),
    must_freeze: Patterns = (),
    max_elements: int | None = None,
    cost: CostName = "flops",
    reuse: Reuse | None = None,
    epochs_left: int | None = None,
    allow_unsupported: bool = False,
) -> Selection:
    """Choose the tensors of most importance whose training step fits the budget.

    Args:
        profile: what a step costs, for every choice of tensors.
        importance: a finite number for every tensor of the profile. What has none above 0 is not chosen.
        budget: what a step may cost, as a share of a full step in (0, 1]; 0.5 if no budget is given.
        budget_flops: the same in FLOPs, instead.
        budget_seconds: the same in seconds, instead, with ``cost="time"``.
        form: ``"graph"``, where a step costs what it executes, or ``"chain"``, the published form: the weight gradients
            of the chosen tensors and the activation gradients of all down to the deepest. The second is an upper bound
            of the first, so that it fits the budget too, with at most as much importance.
        granularity: ``"tensor"``, or ``"layer"`` to train all tensors of a layer or none, so that ``torch.compile``
            sees few variants of it. A layer is the outermost module around a tensor whose name is a number, such as
            ``model.layers.3``; outside of those, the largest module around it without such modules in it, such as
            ``lm_head``, or else the module that holds it. The layer of a tensor with several names is that of the name
            in the profile. A layer is worth the sum of its tensors' importances, negative ones included.
        must_train: patterns (as of :mod:`fnmatch`, such as ``"lm_head.*"``) of names of tensors that are trained in
            any case; their cost comes first, and their importance counts whatever it is.
        must_freeze: patterns of names of tensors that are not trained. With ``granularity="layer"``, tensors that must
            train or freeze stand for themselves, and the rest of their layer goes together.
        max_elements: a limit on the number of elements of all trained tensors, which is what the memory of an
            optimizer is proportional to. With it, the proof may be missing: see ``optimal`` and ``upper_bound``.
        cost: ``"flops"``, or ``"time"`` for a profile with the time of each operator (``gtflops.measure_time``).
        reuse: ``"prefix"`` where the activations below the trained tensors are stored in the first of ``epochs_left``
            epochs, and the blocks below them not run in the others. A step then costs the average over these epochs,
            so that budgets below the forward pass can hold.
        epochs_left: with ``reuse``, how many epochs are left, the next one included.
        allow_unsupported: count operators without a price as free, instead of refusing them.

    Raises:
        InputError: an argument is not as above, a pattern matches nothing or both patterns match a tensor, or nothing
            would be trained.
        UnsupportedOperatorError: an operator has no price.
        UnsupportedModelError: with ``reuse``, a model without blocks (a list of modules) that could be left out.
        InfeasibleBudgetError: no selection fits; the message names the smallest budget that one fits, with reuse and
            without where they differ.

    >>> import gtflops
    >>> profile = gtflops.profile("facebook/opt-125m", batch_size=4, seq_len=128)
    >>> importance = {tensor.name: tensor.numel for tensor in profile.tensors}
    >>> selection = gtflops.select(profile, importance, budget=0.6)
    >>> selection.optimal, selection.flops <= 0.6 * profile.full_flops
    (True, True)
    >>> few = gtflops.select(profile, importance, budget=0.6, must_train="*.11.*", max_elements=20_000_000)
    >>> sum(tensor.numel for tensor, chosen in zip(profile.tensors, few.mask) if chosen) <= 20_000_000
    True
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
    limit = limit_of(profile, cost, budget, budget_flops, budget_seconds)
    return selection_of(problem, limit, problem.solve(limit))


def selection_of(problem: Problem, limit: int, solution: Solution) -> Selection:
    """The record of a solution within a limit."""
    return Selection(
        profile=problem.profile,
        importance=problem.importance,
        mask=solution.mask,
        budget_flops=limit if problem.cost == "flops" else None,
        flops=problem.profile.form("flops", problem.epochs_left, problem.held).total(solution.mask),
        value=solution.value,
        upper_bound=solution.upper_bound,
        optimal=solution.optimal,
        budget_seconds=limit / 1e9 if problem.cost == "time" else None,
        epochs_left=problem.epochs_left,
    )

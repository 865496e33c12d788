"""Train under a budget of FLOPs: select, train, select again."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from gtflops.capture import ExecutedFlops, Loss, batch_types, call_model, loss_of
from gtflops.errors import GtflopsError, InputError
from gtflops.importance import measure_importance
from gtflops.problem import limit_of
from gtflops.profiling import Profile, profile
from gtflops.selection import Selection, select


class Scheduler(Protocol):
    """What the loop needs of a learning-rate schedule."""

    def step(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SelectionRecord:
    """A selection and the number of optimizer steps made before it; ``seconds`` to measure and to select."""

    step: int
    selection: Selection
    seconds: float


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step. FLOPs of forward and backward; ``executed_flops`` where they were counted."""

    step: int
    loss: float
    planned_flops: int
    executed_flops: int | None
    seconds: float


@dataclass(slots=True)
class TrainingLog:
    """What was trained, in order. FLOPs of training steps; each selection adds about one full step to measure."""

    steps: list[StepRecord] = field(default_factory=list)
    selections: list[SelectionRecord] = field(default_factory=list)
    measuring_flops: int = 0

    @property
    def planned_flops(self) -> int:
        return sum(step.planned_flops for step in self.steps)

    @property
    def executed_flops(self) -> int | None:
        """``None`` unless every step was counted."""
        counted = [step.executed_flops for step in self.steps if step.executed_flops is not None]
        return sum(counted) if len(counted) == len(self.steps) else None

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps) + sum(record.seconds for record in self.selections)


class GreenTrainer:
    """Trains the tensors that matter most within a budget of FLOPs a step, and chooses them anew now and then.

    Only tensors that require gradients when the trainer is built are candidates: what is frozen stays frozen.

    Args:
        model: the model, in the mode to train it in.
        optimizer: one that holds every candidate.
        profile_or_batch: a :class:`gtflops.Profile` of this model, or a batch to profile it on.
        budget: share of a full step's FLOPs that a step may cost, in (0, 1], for the shape of the batch that each
            selection is made on; ``None`` trains every candidate, the full fine-tuning to compare with.
        every: optimizer steps between two selections.
        loss: ``loss(outputs, batch)``, a scalar tensor; ``outputs.loss`` without it.
        scheduler: stepped after each optimizer step.
        count_executed: count what each step really executes, by gtflops' own table (some percent slower).
        allow_unsupported: count operators without a price as free, instead of refusing them.

    >>> import torch, gtflops
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> batches = [torch.randn(16, 4) for _ in range(6)]
    >>> trainer = gtflops.GreenTrainer(
    ...     model, optimizer, batches[0], budget=0.8, every=3, loss=lambda y, x: y.square().mean(), count_executed=True
    ... )
    >>> log = trainer.fit(batches)
    >>> len(log.steps), len(log.selections), log.executed_flops == log.planned_flops
    (6, 2, True)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        profile_or_batch: Any,
        budget: float | None = 0.5,
        every: int = 100,
        *,
        loss: Loss | None = None,
        scheduler: Scheduler | None = None,
        count_executed: bool = False,
        allow_unsupported: bool = False,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise InputError(f"every is {every!r}, expected a positive number of optimizer steps")
        self.model = model
        self.optimizer = optimizer
        self.budget = budget
        self.every = every
        self.loss = loss
        self.scheduler = scheduler
        self.count_executed = count_executed
        self.allow_unsupported = allow_unsupported
        self.profile = (
            profile_or_batch if isinstance(profile_or_batch, Profile) else profile(model, profile_or_batch, loss)
        )
        self.profile.require_fit(model)
        if not allow_unsupported:
            self.profile.require_prices()
        if budget is not None:
            limit_of(self.profile, budget=budget)
        self.candidates = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
        if not self.candidates:
            raise InputError("every tensor of the model is frozen, so there is nothing to select from; thaw some first")
        self.selection: Selection | None = None
        self.log = TrainingLog()
        signature = (
            (tuple(self.profile.graph.batch.items()), (), self._modes())
            if isinstance(profile_or_batch, Profile)
            else self._signature(profile_or_batch)
        )
        self._profiles = {signature: self.profile}

    def fit(self, batches: Iterable[Any], on_step: Callable[[StepRecord], None] | None = None) -> TrainingLog:
        """One optimizer step a batch, selecting anew every ``every`` steps on the batch that comes next."""
        for batch in batches:
            if len(self.log.steps) % self.every == 0:
                self.select(batch)
            record = self.step(batch)
            if on_step is not None:
                on_step(record)
        return self.log

    def select(self, batch: Any) -> None:
        """Measure importance on ``batch``, choose the tensors to train, and freeze the others.

        Gradients are dropped on the way: a frozen tensor that kept one would be moved by the optimizer.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.budget is None:
            for name, tensor in self.model.named_parameters():
                tensor.requires_grad_(name in self.candidates)
            return
        started = time.perf_counter()
        costs = self._profile_of(batch)
        measured = measure_importance(self.model, [batch], self.optimizer, self.loss)
        importance = {name: value if name in self.candidates else 0.0 for name, value in measured.items()}
        self.selection = select(costs, importance, self.budget, allow_unsupported=self.allow_unsupported)
        self.selection.apply(self.model)
        held = {tensor for group in self.optimizer.param_groups for tensor in group["params"]}
        thawed = [name for name, tensor in self.model.named_parameters() if name in measured and tensor in held]
        self.log.measuring_flops += costs.step_flops(thawed).total
        self.log.selections.append(SelectionRecord(len(self.log.steps), self.selection, time.perf_counter() - started))

    def step(self, batch: Any) -> StepRecord:
        """One training step on ``batch`` with the tensors selected last."""
        started = time.perf_counter()
        planned = self._profile_of(batch).step_flops(self.model).total
        with ExecutedFlops() if self.count_executed else nullcontext() as executed:
            loss = loss_of(call_model(self.model, batch), batch, self.loss)
            if not math.isfinite(loss.item()):
                raise GtflopsError(
                    f"the loss is {loss.item()} at step {len(self.log.steps)}; the weights are those of the step "
                    "before; expected a finite loss: try a lower learning rate, or look at the batch"
                )
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        record = StepRecord(
            step=len(self.log.steps),
            loss=loss.item(),
            planned_flops=planned,
            executed_flops=None if executed is None else self.executed_flops(executed),
            seconds=time.perf_counter() - started,
        )
        self.log.steps.append(record)
        return record

    def executed_flops(self, counted: ExecutedFlops) -> int:
        """What was counted; UnsupportedOperatorError for operators without a price, unless they are allowed."""
        return sum(counted.flops) if self.allow_unsupported else counted.total

    def _profile_of(self, batch: Any) -> Profile:
        """The profile for the batch's shapes and the model's modes; each new one is traced once."""
        signature = self._signature(batch)
        if signature not in self._profiles:
            self._profiles[signature] = profile(self.model, batch, self.loss)
        return self._profiles[signature]

    def _signature(self, batch: Any) -> tuple[Any, ...]:
        """What the operators of a step may depend on: shapes, the batch's plain values, which modules train."""
        values = (leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, (bool, int, float, str)))
        return tuple(batch_types(batch).items()), tuple(values), self._modes()

    def _modes(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self.model.modules())

"""Train under a budget of FLOPs: select, train, select again."""

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch

from gtflops.capture import ExecutedFlops, Loss, call_model, loss_of
from gtflops.capture.batches import describe_batch
from gtflops.errors import GtflopsError, InfeasibleBudgetError, InputError
from gtflops.importance import measure_importance
from gtflops.problem import Granularity, Patterns, Problem, limit_of
from gtflops.profiling import Profile, profile
from gtflops.selection import Selection, select
from gtflops.training import checkpoints
from gtflops.training.pricing import Prices
from gtflops.training.records import SelectionRecord, StepRecord, TrainingLog

#: When to select anew: every so many optimizer steps, at the start of each epoch, or where a function of the number of
#: steps made says so.
Every: TypeAlias = int | Literal["epoch"] | Callable[[int], bool]
#: Names of the tensors to train from a step on, given what steps cost: schemes that do not go by importance.
Choose: TypeAlias = Callable[[Profile, int], Iterable[str]]


def check_every(every: Any) -> None:
    """InputError for what is no :data:`Every`."""
    if not (callable(every) or every == "epoch" or (type(every) is int and every >= 1)):
        raise InputError(
            f"every is {every!r}, expected a positive number of optimizer steps, 'epoch', or a function of the "
            "number of steps made"
        )


class Scheduler(Protocol):
    """What the loop needs of a learning-rate schedule."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class GreenTrainer:
    """Trains the tensors that matter most within a budget of FLOPs a step, and chooses them anew now and then.

    :meth:`fit` is the whole loop. A loop of your own calls :meth:`step_boundary` before each optimizer step, with the
    batches of that step, and is otherwise as it was. Only tensors that require gradients when the trainer is built are
    candidates: what is frozen stays frozen.

    The budget holds for the sum over all steps, each priced in the real shape of its batches: where the selection would
    cost more than what its batches may cost and earlier steps left, a smaller one is made for that step from the same
    importances. Where even the cheapest is too much, it is trained, and later steps make up for it.

    Args:
        model: the model, in the mode to train it in.
        optimizer: one that holds every candidate.
        profile_or_batch: a :class:`gtflops.Profile` of this model, or a batch to profile it on.
        budget: share of a full step's FLOPs that a step may cost, in (0, 1]; ``None`` trains every candidate, the full
            fine-tuning to compare with.
        every: when to select anew: a number of optimizer steps, ``"epoch"``, or a function of the number of steps made.
        loss: ``loss(outputs, batch)``, a scalar tensor; ``outputs.loss`` without it.
        scheduler: stepped after each optimizer step of :meth:`fit`.
        choose: ``choose(profile, step)`` gives the names of the tensors to train until the next selection, in the place
            of a budget; nothing is measured.
        granularity, must_train, must_freeze, max_elements: as of :func:`gtflops.select`.
        max_grad_norm: gradients of :meth:`fit` are clipped to it.
        count_executed: count what each step of :meth:`fit` executes, by gtflops' own table (some percent slower).
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

    The same in a loop of your own:

    >>> for batch in batches:
    ...     record = trainer.step_boundary(batch)
    ...     model(batch).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> trainer.log.planned_flops <= 0.8 * trainer.log.full_flops
    True
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        profile_or_batch: Any,
        budget: float | None = 0.5,
        every: Every = 100,
        *,
        loss: Loss | None = None,
        scheduler: Scheduler | None = None,
        choose: Choose | None = None,
        granularity: Granularity = "tensor",
        must_train: Patterns = (),
        must_freeze: Patterns = (),
        max_elements: int | None = None,
        max_grad_norm: float | None = None,
        count_executed: bool = False,
        allow_unsupported: bool = False,
    ) -> None:
        check_every(every)
        self.model = model
        self.optimizer = optimizer
        self.budget = budget if choose is None else None
        self.every = every
        self.loss = loss
        self.scheduler = scheduler
        self.choose = choose
        self.max_grad_norm = max_grad_norm
        self.count_executed = count_executed
        self.allow_unsupported = allow_unsupported
        self._conditions: dict[str, Any] = {
            "granularity": granularity,
            "must_train": must_train,
            "must_freeze": must_freeze,
            "max_elements": max_elements,
            "allow_unsupported": allow_unsupported,
        }
        self._prices = Prices(model, loss)
        if isinstance(profile_or_batch, Profile):
            self.profile = profile_or_batch
            self._prices.add(self.profile)
        else:
            self.profile = profile(model, profile_or_batch, loss)
            self._prices.add(self.profile, profile_or_batch)
        self.profile.require_fit(model)
        if not allow_unsupported:
            self.profile.require_prices()
        if budget is not None:
            limit_of(self.profile, budget=budget)
        self.candidates = frozenset(name for name, tensor in model.named_parameters() if tensor.requires_grad)
        if not self.candidates:
            raise InputError("every tensor of the model is frozen, so there is nothing to select from; thaw some first")
        self.selection: Selection | None = None
        self.epoch = 0
        self.log = TrainingLog()
        self._chosen: frozenset[str] | None = None
        self._trained: frozenset[str] | None = None
        self._allowed = 0
        self._spent = 0

    # --- in any loop ----------------------------------------------------------------------------------------------

    def step_boundary(self, *batches: Any, epoch: int = 0, measure_on: Iterable[Any] | None = None) -> StepRecord:
        """Call it before the forward pass of each optimizer step, with the batches (several where gradients are
        accumulated) of that step.

        Selects anew where that is due, on ``measure_on`` or else on the batches of the step; lets exactly the tensors
        to train require gradients; and writes down what the step will cost. InputError where gradients of an unfinished
        step are there: tensors that are frozen with a gradient would be moved.
        """
        if not batches:
            raise InputError("step_boundary() got no batch, expected those of the coming optimizer step")
        self._require_untouched()
        starts_epoch, self.epoch = epoch != self.epoch, epoch
        if self._chosen is None or self._is_due(starts_epoch):
            self.select(*(batches if measure_on is None else measure_on))
        assert self._chosen is not None
        costs = [self._prices.of(batch) for batch in batches]
        names, planned = self._within_budget(costs)
        self._train_only(names)
        record = StepRecord(
            step=len(self.log.steps),
            epoch=epoch,
            planned_flops=planned,
            full_flops=_total(costs, costs[0].names),
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
        )
        self.log.steps.append(record)
        return record

    def select(self, *batches: Any) -> SelectionRecord:
        """Choose the tensors to train from the next step on, by their importance on ``batches``."""
        self._require_no_gradients()
        started = time.perf_counter()
        costs = self._prices.of(batches[0])
        selection: Selection | None = None
        if self.choose is not None:
            chosen = frozenset(self.choose(costs, len(self.log.steps)))
        elif self.budget is None:
            chosen = self.candidates
        else:
            measured = measure_importance(self.model, batches, self.optimizer, self.loss)
            importance = {name: value if name in self.candidates else 0.0 for name, value in measured.items()}
            selection = select(costs, importance, self.budget, **self._conditions)
            chosen = frozenset(selection.names)
            held = {tensor for group in self.optimizer.param_groups for tensor in group["params"]}
            thawed = [name for name, tensor in self.model.named_parameters() if name in measured and tensor in held]
            self.log.measuring_flops += sum(self._prices.of(batch).step_flops(thawed).total for batch in batches)
        self.selection, self._chosen = selection, chosen
        self._train_only(chosen)
        record = SelectionRecord(
            step=len(self.log.steps),
            epoch=self.epoch,
            names=tuple(name for name in costs.names if name in chosen),
            flops=costs.step_flops(chosen).total,
            full_flops=costs.full_flops,
            budget=self.budget,
            seconds=time.perf_counter() - started,
            selection=selection,
        )
        self.log.selections.append(record)
        return record

    # --- the loop written out -------------------------------------------------------------------------------------

    def fit(
        self,
        batches: Iterable[Any],
        epochs: int = 1,
        *,
        accumulate: int = 1,
        measure_on: int = 1,
        on_step: Callable[[StepRecord], None] | None = None,
        on_selection: Callable[[SelectionRecord], None] | None = None,
        checkpoints: str | Path | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
    ) -> TrainingLog:
        """``epochs`` passes over ``batches``, an optimizer step for every ``accumulate`` of them.

        Args:
            batches: gone over again in each epoch, so an iterator has one epoch only.
            accumulate: batches whose gradients are averaged to make a step; what does not fill one is left out.
            measure_on: batches from the next step on that importance is averaged over.
            on_step, on_selection: called with each record.
            checkpoints: a folder for checkpoints, each whole or absent: after every ``checkpoint_every`` steps, at the
                end, and when Ctrl-C ends the run, after the step that it falls into (``log.stopped`` says so).
            resume: go on from the last checkpoint of that folder, as the same call without the stop would have: to the
                bit, for the same batches, on the same machine.

        A batch that fails, and a loss that is not finite, raise before the optimizer moves anything.
        """
        if self.log.steps and resume:
            raise InputError("resume=True on a trainer that has made steps, expected a new one, built as the first was")
        if resume and checkpoints is None:
            raise InputError("resume=True without checkpoints, expected the folder that they were written to")
        folder = None if checkpoints is None else Path(checkpoints)
        run = _Run(self, batches, epochs, accumulate, measure_on, folder)
        if resume:
            run.resume()
        else:
            self.optimizer.zero_grad(set_to_none=True)
        with _interruption() as interrupted:
            for epoch, step_batches, upcoming in run:
                selections = len(self.log.selections)
                self.step_boundary(*step_batches, epoch=epoch, measure_on=upcoming)
                if on_selection is not None and len(self.log.selections) > selections:
                    on_selection(self.log.selections[-1])
                record = self._step(step_batches)
                if on_step is not None:
                    on_step(record)
                if interrupted.is_set():
                    self.log.stopped = f"interrupted after {len(self.log.steps)} steps"
                    break
                if folder is not None and checkpoint_every and len(self.log.steps) % checkpoint_every == 0:
                    run.save()
        if folder is not None:
            run.save()
        if self.log.stopped is not None and folder is None:
            raise KeyboardInterrupt
        return self.log

    def _step(self, batches: tuple[Any, ...]) -> StepRecord:
        """The step that the last boundary opened."""
        started = time.perf_counter()
        record = self.log.steps[-1]
        try:
            with ExecutedFlops() if self.count_executed else nullcontext() as executed:
                loss = sum(self._backward(batch, len(batches)) for batch in batches)
        except BaseException:
            self.log.steps.pop()
            self._spent -= record.planned_flops
            self.optimizer.zero_grad(set_to_none=True)
            raise
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        record = replace(
            record,
            loss=loss,
            executed_flops=None if executed is None else self.executed_flops(executed),
            seconds=time.perf_counter() - started,
        )
        self.log.steps[-1] = record
        return record

    def _backward(self, batch: Any, parts: int) -> float:
        """Forward and backward pass of one of the ``parts`` of a step; its share of the loss."""
        step = len(self.log.steps) - 1
        try:
            outputs = call_model(self.model, batch)
        except Exception as error:
            raise GtflopsError(
                f"step {step} failed, and the weights are those of the step before: {type(self.model).__name__} "
                f"refused the batch {describe_batch(batch)}: {type(error).__name__}: {error}"
            ) from error
        loss = loss_of(outputs, batch, self.loss)
        if not math.isfinite(value := loss.item()):
            raise GtflopsError(
                f"the loss is {value} at step {step}; the weights are those of the step before; expected a finite "
                "loss: try a lower learning rate, or look at the batch"
            )
        loss.backward(torch.full_like(loss, 1 / parts))
        return value / parts

    def executed_flops(self, counted: ExecutedFlops) -> int:
        """What was counted; UnsupportedOperatorError for operators without a price, unless they are allowed."""
        return sum(counted.flops) if self.allow_unsupported else counted.total

    # --- what to train --------------------------------------------------------------------------------------------

    def _is_due(self, starts_epoch: bool) -> bool:
        step = len(self.log.steps)
        if self.every == "epoch":
            return starts_epoch
        return bool(self.every(step)) if callable(self.every) else step % self.every == 0

    def _within_budget(self, costs: list[Profile]) -> tuple[frozenset[str], int]:
        """What to train on batches of these costs so that the sum over steps is within the budget, and its FLOPs."""
        assert self._chosen is not None
        names, planned = self._chosen, _total(costs, self._chosen)
        if self.budget is None or self.selection is None:
            return names, planned
        self._allowed += sum(limit_of(cost, budget=self.budget) for cost in costs)
        self._allowed += int(self.budget * _adding(costs, costs[0].names))
        if self._spent + planned > self._allowed:
            names, planned = self._smaller(costs, self._allowed - self._spent)
        self._spent += planned
        return names, planned

    def _smaller(self, costs: list[Profile], room: int) -> tuple[frozenset[str], int]:
        """The selection for a step of these costs and at most ``room`` FLOPs, or the cheapest where there is none."""
        assert self.selection is not None
        # Of batches of several shapes, the one in which the room is the smallest share of what is trained now.
        tightest = max(costs, key=lambda cost: cost.step_flops(self._chosen or ()).total / cost.full_flops)
        problem = Problem.of(tightest, self.selection.importance, **self._conditions)
        share = room / _total(costs, costs[0].names)
        while (limit := int(share * tightest.full_flops)) >= problem.smallest:
            try:
                mask = problem.solve(limit).mask
            except InfeasibleBudgetError:
                break
            names = frozenset(name for name, chosen in zip(tightest.names, mask, strict=True) if chosen)
            if (planned := _total(costs, names)) <= room:
                return names, planned
            share *= min(room / planned, 0.999)
        mask = problem.solve(problem.smallest).mask
        names = frozenset(name for name, chosen in zip(tightest.names, mask, strict=True) if chosen)
        return names, _total(costs, names)

    def _train_only(self, names: frozenset[str]) -> None:
        if names == self._trained:
            return
        self._require_no_gradients()
        for name, tensor in self.model.named_parameters():
            tensor.requires_grad_(name in names)
            tensor.grad = None
        self._trained = names

    def _require_untouched(self) -> None:
        if self._trained is None:
            return
        for name, tensor in self.model.named_parameters():
            if tensor.requires_grad != (name in self._trained):
                raise InputError(
                    f"{name!r} was {'thawed' if tensor.requires_grad else 'frozen'} by something else since the last "
                    "step, so that the step would not cost what is planned; expected that only the trainer changes "
                    "requires_grad: freeze before it is built, or give must_train and must_freeze"
                )

    def _require_no_gradients(self) -> None:
        for name, tensor in self.model.named_parameters():
            if tensor.grad is not None and bool(tensor.grad.count_nonzero()):
                raise InputError(
                    f"{name!r} has the gradient of an unfinished step, and what is trained changes between optimizer "
                    "steps only; expected optimizer.step() and optimizer.zero_grad() before"
                )

    # --- what a run can be resumed from ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the trainer stands, its log included, as plain data; without the model's and the optimizer's."""
        return {
            "epoch": self.epoch,
            "chosen": None if self._chosen is None else sorted(self._chosen),
            "trained": None if self._trained is None else sorted(self._trained),
            "allowed": self._allowed,
            "spent": self._spent,
            "log": self.log.to_json(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state of :meth:`state_dict`, for a trainer that was built alike, and freeze as it says."""
        log = TrainingLog.from_json(state["log"], self.profile)
        self.log = log
        self.epoch = state["epoch"]
        self.selection = log.selections[-1].selection if log.selections else None
        self._chosen = None if state["chosen"] is None else frozenset(state["chosen"])
        self._allowed, self._spent = state["allowed"], state["spent"]
        if state["trained"] is not None:
            self._train_only(frozenset(state["trained"]))


class _Run:
    """The batches of a run, step by step, from any step on; and the checkpoints that it goes on from."""

    def __init__(
        self,
        trainer: GreenTrainer,
        batches: Iterable[Any],
        epochs: int,
        accumulate: int,
        measure_on: int,
        folder: Path | None,
    ) -> None:
        for name, value in (("epochs", epochs), ("accumulate", accumulate), ("measure_on", measure_on)):
            if type(value) is not int or value < 1:
                raise InputError(f"{name} is {value!r}, expected a positive integer")
        if epochs > 1 and isinstance(batches, Iterator):
            raise InputError(
                f"an iterator of batches is gone after one epoch; expected a list or a loader for {epochs}"
            )
        self._trainer = trainer
        self._batches = batches
        self._epochs = epochs
        self._accumulate = accumulate
        self._ahead = max(accumulate, measure_on)
        self._measure_on = measure_on
        self._folder = folder
        self._epoch = 0
        self._steps_in_epoch = 0
        self._at_start_of_epoch: Mapping[str, Any] | None = None
        self._after_skipping: Mapping[str, Any] | None = None

    def __iter__(self) -> Iterator[tuple[int, tuple[Any, ...], list[Any]]]:
        """Epoch, batches of a step, and batches to measure importance on if that is due."""
        for epoch in range(self._epoch, self._epochs):
            self._epoch = epoch
            if self._at_start_of_epoch is None:
                self._at_start_of_epoch = checkpoints.random_states()
            stream = iter(self._batches)
            for _ in islice(stream, self._steps_in_epoch * self._accumulate):
                pass
            if self._after_skipping is not None:
                checkpoints.restore_random_states(self._after_skipping)
                self._after_skipping = None
            ahead: deque[Any] = deque(islice(stream, self._ahead))
            while len(ahead) >= self._accumulate:
                step = tuple(islice(ahead, self._accumulate))
                self._steps_in_epoch += 1
                yield epoch, step, list(islice(ahead, self._measure_on))
                for _ in step:
                    ahead.popleft()
                ahead.extend(islice(stream, self._accumulate))
            self._epoch, self._steps_in_epoch, self._at_start_of_epoch = epoch + 1, 0, None

    def save(self) -> None:
        assert self._folder is not None
        trainer = self._trainer
        states = {
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
            "random": checkpoints.random_states(),
            "random_at_start_of_epoch": self._at_start_of_epoch,
        }
        progress = {
            "trainer": trainer.state_dict(),
            "epoch": self._epoch,
            "steps_in_epoch": self._steps_in_epoch,
            "accumulate": self._accumulate,
        }
        checkpoints.write(self._folder, len(trainer.log.steps), trainer.model, states, progress)

    def resume(self) -> None:
        assert self._folder is not None
        trainer = self._trainer
        checkpoint = checkpoints.read_last(self._folder, trainer.model)
        states, progress = checkpoint.states, checkpoint.progress
        if progress["accumulate"] != self._accumulate:
            raise InputError(
                f"{checkpoint.path} is of a run with accumulate={progress['accumulate']}, expected the same, not "
                f"{self._accumulate}"
            )
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.load_state_dict(progress["trainer"])
        trainer.optimizer.load_state_dict(states["optimizer"])
        if trainer.scheduler is not None and states["scheduler"] is not None:
            trainer.scheduler.load_state_dict(states["scheduler"])
        trainer.log.stopped = None
        self._epoch, self._steps_in_epoch = progress["epoch"], progress["steps_in_epoch"]
        self._at_start_of_epoch = states["random_at_start_of_epoch"]
        if self._at_start_of_epoch is None:
            checkpoints.restore_random_states(states["random"])
        else:  # a loader shuffles again as it did
            checkpoints.restore_random_states(self._at_start_of_epoch)
            self._after_skipping = states["random"]


def _total(costs: Sequence[Profile], names: Collection[str]) -> int:
    """FLOPs of a step whose batches have these costs."""
    return sum(cost.step_flops(names).total for cost in costs) + _adding(costs, names)


def _adding(costs: Sequence[Profile], names: Collection[str]) -> int:
    """FLOPs of accumulating gradients: each batch after the first adds its own to those that are there."""
    if len(costs) == 1:
        return 0
    elements = sum(tensor.numel for tensor in costs[0].tensors if tensor.name in names and tensor.has_gradient)
    return (len(costs) - 1) * elements


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, in the place of an exception in the middle of a step; a second Ctrl-C is one."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are for the main thread only
        yield interrupted
        return

    def note(number: int, frame: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)

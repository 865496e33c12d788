"""Train under a budget of FLOPs: select, train, select again."""

import inspect
import logging
import math
import time
import warnings
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch

from gtflops.capture import ExecutedFlops, Loss, call_model, loss_of
from gtflops.capture.batches import describe_batch
from gtflops.capture.uses import check_uses, has_strayed, named_tensors, owners, tie, train_uses, uses_of_shared
from gtflops.errors import BudgetSpentError, GtflopsError, InfeasibleBudgetError, InputError
from gtflops.graph import Uses
from gtflops.importance import ImportanceCheck, expected_drop, measure_importance
from gtflops.importance.learning_rates import rates_of
from gtflops.importance.measuring import require_held, restored, unwrapped
from gtflops.importance.updates import local
from gtflops.problem import Granularity, Patterns, Problem, limit_of, part_of
from gtflops.profiling import Profile, Reuse, profile
from gtflops.reuse import ActivationStore
from gtflops.selection import Selection, selection_of
from gtflops.spending import OperatingPoint
from gtflops.training import checkpoints
from gtflops.training.budgets import BudgetLike, ByEpoch, Progress, Total, budget_of, share_of
from gtflops.training.compiling import warn_of_recompiles
from gtflops.training.energy import Energy, EnergyMeter
from gtflops.training.pricing import Prices
from gtflops.training.processes import Processes
from gtflops.training.records import SelectionRecord, StepRecord, TrainingLog
from gtflops.training.reusing import BatchCosts, reusing_of
from gtflops.training.run import Run, interruption
from gtflops.training.watching import Watcher
from gtflops.trimming import Trim, Trimming

_logger = logging.getLogger(__name__)

#: When to select anew: every so many optimizer steps, at the start of each epoch, or where a function of the number of
#: steps made says so.
Every: TypeAlias = int | Literal["epoch"] | Callable[[int], bool]
#: Names of the tensors to train from a step on, given what steps cost: schemes that do not go by importance.
Choose: TypeAlias = Callable[[Profile, int], Iterable[str]]

#: Steps, besides the coming one, whose mean size a moving budget goes by.
STEPS_SEEN = 20
#: Steps for which a first-order estimate that held is trusted, at learning rates that are not higher: to check it takes
#: a forward pass, a third of a full step.
TRUSTED_STEPS = 500


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
    batches of that step, and is otherwise as it was; one that sets ``checks`` may hold the estimate behind a selection
    against what came of it, by :meth:`expect_drop` and :meth:`check_drop`, and one that measures energy may write it
    down by step, by :meth:`note_energy`, as :meth:`fit` does. Only tensors that require gradients when the trainer is
    built are candidates: what is frozen stays frozen.

    The budget holds for the sum over all steps, each priced in the real shape of its batches: where the selection would
    cost more than what its batches may cost and earlier steps left, a smaller one is made for that step from the same
    importances. Where even the cheapest is too much, it is trained, and later steps make up for it.

    A model in ``DistributedDataParallel`` (given wrapped or unwrapped) or under ``fully_shard`` is trained by all of
    its processes together, each with batches of its own: they select by the importances of all, and what the log says
    is of all: FLOPs are summed, the loss is averaged.

    Args:
        model: the model, in the mode to train it in.
        optimizer: one that holds every candidate.
        profile_or_batch: a :class:`gtflops.Profile` of this model, or a batch to profile it on.
        budget: share of a full step's FLOPs that a step may cost, in (0, 1]; a list of them by epoch; a function of
            :class:`gtflops.training.Progress`; a :class:`gtflops.training.Total` for the whole run, or
            :class:`gtflops.training.CarbonAware`. ``"auto"``, or :class:`gtflops.training.Auto` with a total, finds out
            what brings the most importance per FLOP, if need be everything for fewer steps. It is asked at each
            selection. ``None`` trains every candidate, the full fine-tuning to compare with.
        every: when to select anew: a number of optimizer steps, ``"epoch"``, or a function of the number of steps made.
            With ``reuse``, a selection within an epoch is followed by one at the start of the next, where what is
            stored can be changed.
        until: ends the run before the step that it does not pay for, measuring importance included, whatever is trained
            and however it is chosen: what ways to train are compared at that differ in what a step costs.
        loss: ``loss(outputs, batch)``, a scalar tensor; ``outputs.loss`` without it.
        scheduler: stepped after each optimizer step of :meth:`fit`.
        choose: ``choose(profile, step)`` gives the names of the tensors to train until the next selection, in the place
            of a budget; nothing is measured.
        measure: what measures importance, called as :func:`gtflops.measure_importance` with ``scheduler=``; for example
            ``functools.partial(gtflops.measure_importance, method="two-pass")``, the published way.
        granularity: as of :func:`gtflops.select`; ``"layer"`` for compiled layers.
        must_train: as of :func:`gtflops.select`.
        must_freeze: as of :func:`gtflops.select`.
        max_elements: as of :func:`gtflops.select`.
        reuse: ``"prefix"`` to store, in the first epoch, what the blocks below the trained tensors compute for each
            example, and not to run them in the others: budgets below the forward pass can hold. The budget is then for
            a step on average over the epochs. These blocks run without dropout. A loop of your own says
            ``with trainer.forward_pass():`` around the forward pass of each batch.
        store: with ``reuse``, a folder, or a :class:`gtflops.reuse.ActivationStore`.
        batch_first: with ``reuse``, says that row i of every tensor of a batch is of example i alone, where names of
            the batch are none that transformers knows for such: else only a whole batch is found again.
        num_epochs: with ``reuse``, the passes over the data that the run makes; :meth:`fit` knows it.
        num_steps: optimizer steps of the run, for budgets that are spread over them; :meth:`fit` knows it for batches
            that have a length.
        energy: a :class:`gtflops.training.EnergyMeter`, on during :meth:`fit`.
        processes: which processes train together, where the model does not tell.
        max_grad_norm: gradients of :meth:`fit` are clipped to it.
        uses: ``"separate"`` to choose each use of a tensor that several modules share by itself, as a tied embedding is
            used at the input and in the head: see :func:`gtflops.profile`. The optimizer holds one tensor, which stays
            tied; what modules through which it is not trained hold is another one, on the same memory, until
            :meth:`tie`. Of such a tensor, the log says that its gradient is partial.
        trim: ``"auto"`` takes the padding out of the batches of :meth:`fit`, and the head off positions without a
            label: see :class:`gtflops.trimming.Trim`. A full step is then one on such a batch. In a loop of your own,
            :meth:`trimmed` gives the batch to train on.
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
        budget: BudgetLike = 0.5,
        every: Every = 100,
        *,
        until: Total | None = None,
        loss: Loss | None = None,
        scheduler: Scheduler | None = None,
        choose: Choose | None = None,
        measure: Callable[..., dict[str, float]] = measure_importance,
        granularity: Granularity = "tensor",
        must_train: Patterns = (),
        must_freeze: Patterns = (),
        max_elements: int | None = None,
        reuse: Reuse | None = None,
        store: ActivationStore | str | Path | None = None,
        batch_first: bool = False,
        num_steps: int | None = None,
        num_epochs: int | None = None,
        energy: EnergyMeter | None = None,
        processes: Processes | None = None,
        max_grad_norm: float | None = None,
        trim: Trimming = None,
        uses: Uses | None = None,
        count_executed: bool = False,
        allow_unsupported: bool = False,
    ) -> None:
        check_every(every)
        check_uses(uses)
        self.processes = processes or Processes(model)
        self.model = model = self.processes.module
        self.optimizer = optimizer
        self.budget = budget_of(budget if choose is None else None)
        if until is not None and not isinstance(until, Total):
            raise InputError(f"until is {until!r}, expected a total, such as Total(flops=2e15)")
        self.every = every
        self.until = until
        self.loss = loss
        self.scheduler = scheduler
        self.choose = choose
        self.measure = measure
        self.num_steps = num_steps
        self.num_epochs = self.whole_epochs = num_epochs
        self.energy = energy
        self.max_grad_norm = max_grad_norm
        self.uses = uses
        self.count_executed = count_executed
        self.allow_unsupported = allow_unsupported
        self._conditions: dict[str, Any] = {
            "granularity": granularity,
            "must_train": must_train,
            "must_freeze": must_freeze,
            "max_elements": max_elements,
            "allow_unsupported": allow_unsupported,
        }
        warn_of_recompiles(model, granularity)
        self._trim = Trim.of(trim, model, loss)
        self._shared = uses_of_shared(model, uses)
        self._prices = Prices(model, loss, uses)
        if isinstance(profile_or_batch, Profile):
            self.profile = profile_or_batch
            self._prices.add(self.profile)
        else:
            batch = self.trimmed(profile_or_batch)
            self.profile = profile(model, batch, loss, uses=uses)
            self._prices.add(self.profile, batch)
        _require_same_uses(self.profile, uses, bool(self._shared))
        self.profile.require_fit(model)
        self._reusing = reusing_of(self.profile, model, self._prices, loss, reuse, store, uses, batch_first)
        if not allow_unsupported:
            self.profile.require_prices()
        self.candidates = frozenset(name for name, tensor in self._tensors().items() if tensor.requires_grad)
        if not self.candidates:
            raise InputError("every tensor of the model is frozen, so there is nothing to select from; thaw some first")
        require_held(model, optimizer)
        self._elements = {name: local(tensor).numel() for name, tensor in self._tensors().items()}  # of this process
        self.selection: Selection | None = None
        self.epoch = 0
        self.log = TrainingLog()
        self.interrupted = False
        """Whether Ctrl-C or SIGTERM ended the last :meth:`fit`."""
        self.checks = False
        """Whether the loop checks the estimate: a total of FLOPs then keeps what that costs."""
        self._chosen: frozenset[str] | None = None
        self._trained: frozenset[str] | None = None
        self._share: float | None = None
        self._due: tuple[Every, int, list[int]] | None = None
        self._is_stepped = True
        """Whether the optimizer has made a step since the last boundary."""
        _tell_of_steps(unwrapped(optimizer), weakref.WeakMethod(self._note_step))
        self._starts_epoch = False
        self._to_check = False
        self._batches: tuple[Any, ...] = ()
        self._passes: deque[BatchCosts] = deque()
        """The forward passes of the step that are still to come."""
        self._draws: Mapping[str, Any] = {}
        self._predicted: float | None = None
        self._allowed, self._spent = 0, 0
        self._before_step = self._account()
        self._seconds_before = 0.0
        self._started: float | None = None

    # --- in any loop ----------------------------------------------------------------------------------------------

    def trimmed(self, batch: Any) -> Any:
        """The batch to train on in the place of ``batch``: with ``trim="auto"``, without what its loss does not see.

        A loop of your own gives it to :meth:`step_boundary` and to the model alike. The hooks that it puts on the model
        do nothing for other batches; :meth:`untrim` takes them off, as the end of :meth:`fit` does.
        """
        return batch if self._trim is None else self._trim(batch)

    def untrim(self) -> None:
        """Leave the model without hooks of this trainer, until the next batch is trimmed."""
        if self._trim is not None:
            self._trim.remove()

    def tie(self) -> None:
        """With ``uses="separate"``: let every module that shares a tensor hold the tensor itself again, until the next
        step, as the end of :meth:`fit` does. The tensor then requires a gradient where one of its uses did."""
        if self._shared:
            tie(self.model)
            self._trained = None

    def step_boundary(self, *batches: Any, epoch: int = 0, measure_on: Iterable[Any] | None = None) -> StepRecord:
        """Call it before the forward pass of each optimizer step, with the batches (several where gradients are
        accumulated) of that step.

        Selects anew where that is due, on ``measure_on`` or else on the batches of the step; lets exactly the tensors
        to train require gradients; and writes down what the step will cost. ``epoch`` counts the passes over the data:
        with ``every="epoch"``, or a budget for each epoch, a new number is what makes a selection due. InputError where
        gradients of an unfinished step are there: it would be written down as several (``step_boundary`` is called once
        for all of its batches), and tensors that are frozen with a gradient would be moved. BudgetSpentError where the
        budget of a whole run does not pay for the step.
        """
        if not batches:
            raise InputError("step_boundary() got no batch, expected those of the coming optimizer step")
        with self.processes.together():
            self.processes.require_same("the number of batches of a step", str(len(batches)))
            self._require_untouched()
            if not self._is_stepped:
                self._require_no_gradients()
            self._require_passed()
            self._starts_epoch = self._starts_epoch or epoch != self.epoch or self._chosen is None
            self.epoch = epoch
            if self._reusing is not None:
                self._require_length()
                if self._starts_epoch:
                    self._reusing.begin_epoch()
            if self._chosen is None or self._is_due(len(self.log.steps), self._starts_epoch):
                self._select(batches if measure_on is None else tuple(measure_on), batches)
            self._to_check = self._to_check and self.checks
            costs = [self._costs_of(batch) for batch in batches]
            full = self._total(costs, "all")
            allowed, owed, names, charged = self._within_budget(costs, full)
            planned = charged - self._sum(cost.saved for cost in costs)
            checking = self._sum(cost.forward_flops for cost in costs) if self._to_check else 0
            self._require_left(self._progress(full), planned + checking)
            self._train_only(names)
            record = StepRecord(
                step=len(self.log.steps),
                epoch=epoch,
                planned_flops=planned,
                full_flops=full,
                learning_rate=rates_of(self.optimizer)[0],
                reused=self._reusing is not None
                and self.processes.all("what is reused", all(cost.reused for cost in costs)),
            )
        self._starts_epoch = False  # until here, so that a selection that failed is made up for
        self._predicted = None
        if self._to_check:
            self._batches, self._draws = batches, checkpoints.random_states()
        self._before_step = self._account()
        self._allowed, self._spent = allowed, self._spent + charged
        if self._reusing is not None:
            self._reusing.owed, self._reusing.owed_ahead = owed
            self._passes = deque(costs)
        self.log.steps.append(record)
        self._is_stepped = False
        return record

    def _note_step(self) -> None:
        self._is_stepped = True

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Around the forward pass of each batch of a step, in the order in which :meth:`step_boundary` was given them,
        in a loop of your own with ``reuse``: blocks whose activations are stored are not run in it."""
        try:
            with self._passes.popleft().around_forward() if self._passes else nullcontext():
                yield
        except BaseException:
            self._passes.clear()  # those of a step that is not made
            raise

    def expect_drop(self, *, scale: float = 1.0) -> None:
        """Call it between the backward passes and the optimizer's step, if the loop checks the estimate.

        In the first step after a selection by importance, it says what the loss will fall by to first order; else it
        does nothing. ``scale`` is what the gradients were multiplied by, as clipping does. Where they are not finite,
        so that a ``GradScaler`` leaves the step out, the next step is checked in its place.
        """
        if self._to_check and scale > 0:
            drop = self.processes.drop("the predicted drop", expected_drop(self.model, self.optimizer, scale=scale))
            self._predicted = drop if math.isfinite(drop) else None

    def check_drop(self, loss: float) -> None:
        """Call it after the optimizer's step and ``zero_grad()``, if the loop checks the estimate; ``loss`` is the
        step's: the mean over its batches. After :meth:`expect_drop` has said something, a forward pass says what the
        loss fell by; both are in the step's record, with a UserWarning where they are far apart."""
        if self._predicted is None:
            return
        check = ImportanceCheck(self._predicted, self.processes.mean("the loss of the step", loss), self._loss_again())
        self._predicted, self._to_check = None, False
        record = self.log.steps[-1]
        self.log.steps[-1] = replace(record, loss=check.before, predicted_drop=check.predicted, real_drop=check.real)
        if not check.holds:
            warnings.warn(f"step {record.step}: {check}", stacklevel=3)

    def note_energy(self) -> None:
        """Call it after :meth:`check_drop`, if the loop measures energy: what the run has used goes into the record of
        the step."""
        if self.energy is not None:
            kwh, co2_g = self.energy.of_late()
            self.log.steps[-1] = replace(self.log.steps[-1], kwh=kwh, co2_kg=co2_g / 1000)

    def _loss_again(self) -> float:
        """The loss on the batches of a step after it, with the random numbers of the step. Changes nothing."""
        costs = [self._costs_of(batch) for batch in self._batches]
        self.log.measuring_flops += self._sum(cost.forward_flops for cost in costs)
        losses = []
        with restored(self.model, {}), torch.no_grad(), self.processes.passing():
            checkpoints.restore_random_states(self._draws)
            for batch, cost in zip(self._batches, costs, strict=True):
                with cost.around_forward():
                    outputs = call_model(self.model, batch)
                losses.append(loss_of(outputs, batch, self.loss, trained=False).item())
        return self.processes.mean("the loss after the step", sum(losses) / len(losses))

    def select(self, *batches: Any) -> SelectionRecord:
        """Choose the tensors to train from the next step on, by their importance on ``batches``."""
        with self.processes.together():
            return self._select(batches, batches[:1])

    def _select(self, batches: tuple[Any, ...], coming: tuple[Any, ...]) -> SelectionRecord:
        """By the importance on ``batches``, before a step on those that are ``coming``."""
        self._require_no_gradients()
        started = time.perf_counter()
        costs = self._prices.of(self.processes.first_batch(batches[0]))
        prices = [self._prices.of(batch) for batch in coming]
        full = self._total([BatchCosts(profile, profile) for profile in prices], "all")
        progress = self._progress(full)
        share = self.processes.first("the budget", lambda: self.budget.share(progress))
        selection = reason = None
        held = () if self._reusing is None else self._reusing.held
        if self.choose is not None:
            chosen = self._require_trainable(costs, self.choose(costs, len(self.log.steps)))
        else:
            if share is not None:
                selection, share, problem, reason = self._by_importance(batches, costs, full)
                held = problem.held
            chosen = self.candidates if selection is None else frozenset(selection.names)
        self.processes.require_same("the selection", " ".join(sorted(chosen)))
        if self._reusing is not None:
            if moved := self._hold_below(costs, chosen, held):
                reason = f"{moved}; {reason}" if reason else moved
            held = self._reusing.held
        self._train_only(chosen)
        self._chosen, self.selection, self._share = chosen, selection, share
        self._to_check = selection is not None and self._is_check_due()
        record = SelectionRecord(
            step=len(self.log.steps),
            epoch=self.epoch,
            names=tuple(name for name in costs.names if name in chosen),
            flops=costs.step_flops(chosen).total - costs.stored_flops(held),
            full_flops=costs.full_flops,
            budget=share,
            seconds=time.perf_counter() - started,
            selection=selection,
            held=() if self._reusing is None else self._reusing.held,
            reason=reason,
            importance_captured=None if selection is None else selection.importance_captured,
            partial=costs.partial(chosen),
        )
        self.log.selections.append(record)
        if reason is not None:
            _logger.info("step %d: %s", record.step, reason)
        return record

    def _hold_below(self, costs: Profile, chosen: frozenset[str], held: tuple[str, ...]) -> str | None:
        """Hold what is held, if the selection is one above it, or else what is below what is trained, where later
        epochs read it; what that changes, in a sentence."""
        reusing = self._reusing
        assert reusing is not None
        below = reusing.below(costs, chosen)
        if not held or not set(held) <= set(below):
            held = below if self._may_move() else ()
        if held == reusing.held:
            return None
        reusing.hold(held, self.epoch)
        if not held:
            return "nothing is stored"
        size = costs.cache_bytes(held)
        return (
            f"what the blocks up to {held[-1]} compute is stored, {size:,} bytes for a batch such as this; they run "
            "without dropout"
        )

    def _may_move(self) -> bool:
        """Whether another boundary could be held from here on: filled by a whole epoch, and read in others."""
        return self._starts_epoch and self._epochs_left() >= 2

    def _epochs_left(self) -> int:
        """Whole ones, the present one included, as far as the run goes."""
        return max(1, (self.whole_epochs or 1) - self.epoch)

    def _steps_left(self) -> int:
        """The coming one included."""
        return max(1, (self.num_steps or 0) - len(self.log.steps))

    def _require_trainable(self, costs: Profile, names: Iterable[str]) -> frozenset[str]:
        """What ``choose`` gave; InputError where a step could not train that."""
        chosen = frozenset([names] if isinstance(names, str) else names)
        mask = costs.mask(chosen)
        if foreign := sorted(chosen - self.candidates):
            raise InputError(
                f"choose gave {len(foreign)} tensors that were frozen when the trainer was built, first {foreign[0]!r}"
                "; expected names of candidates"
            )
        if not any(tensor.has_gradient for tensor, is_chosen in zip(costs.tensors, mask, strict=True) if is_chosen):
            raise InputError(
                f"choose gave {len(chosen)} tensors and the loss depends on none of them, so nothing would be trained; "
                "expected at least one that it depends on"
            )
        return chosen

    def _by_importance(
        self, batches: tuple[Any, ...], costs: Profile, full: int
    ) -> tuple[Selection | None, float | None, Problem, str | None]:
        """A selection, its share, the problem that it solves and why it is that one, where a step costs ``full`` FLOPs
        in full; no selection where the budget is ``None`` by then."""
        held = {tensor for group in self.optimizer.param_groups for tensor in group["params"]}
        measured = [
            name
            for name, tensor in owners(self.model, self.uses).items()
            if tensor in held and tensor.is_floating_point()
        ]
        flops = self._sum(self._prices.of(batch).step_flops(measured).total for batch in batches)
        self._require_left(self._progress(full), flops)
        with self.processes.measuring():
            of_this_process = self.measure(
                self.model,
                batches,
                self.optimizer,
                self.processes.agreed(self.loss),
                scheduler=self.scheduler,
                **({} if self.uses is None else {"uses": self.uses}),  # a function of the user's may know of none
            )
        self.log.measuring_flops += flops
        importance = {
            name: value if name in self.candidates else 0.0
            for name, value in self.processes.averaged(of_this_process).items()
        }
        problems = self._problems(costs, importance)
        # Asked again: what measuring took tells a budget of hours what a FLOP takes here.
        smallest_share = share_of(min(problem.smallest for problem in problems), costs.full_flops)
        left = self._selections_left()
        measuring_left = left * flops
        if self.checks:
            checks = self._is_check_due() + min(left, ((self.num_steps or 0) - len(self.log.steps)) // TRUSTED_STEPS)
            measuring_left += checks * self._sum(self._prices.of(batch).forward_flops for batch in batches)
        progress = self._progress(full, smallest_share, measuring_left)
        share = self.processes.first("the budget", lambda: self.budget.share(progress))
        if share is None:
            return None, None, problems[0], None
        if point := self.processes.first("the operating point", lambda: self._point(problems, progress)):
            number, chosen, why = point
            return Selection.from_json(costs, chosen, importance), None, problems[number], why
        limit = limit_of(costs, budget=share)
        least = min(problem.smallest for problem in problems)
        if self._reusing is not None and limit > least:  # what was spent ahead is paid back out of it
            due = self._reusing.due(self._steps_left()) / progress.full_flops  # shares of a step of the usual size
            limit = max(least, limit - math.ceil(due * costs.full_flops))
        selection, problem, reason = _better_of(problems, limit)
        return selection, share, problem, reason

    def _problems(self, costs: Profile, importance: Mapping[str, float]) -> list[Problem]:
        """What may be chosen from: above the boundary that is held, and with another one, as far as there are such."""
        if self._reusing is None:
            return [Problem.of(costs, importance, **self._conditions)]
        problems = []
        if self._reusing.held:
            with suppress(InputError, InfeasibleBudgetError):  # nothing above it is worth training, or fits
                problems.append(Problem.of(costs, importance, held=self._reusing.held, **self._conditions))
        if self._may_move() or not problems:
            epochs_left = self._epochs_left() if self._may_move() else 1  # nothing that is stored would be read
            problems.append(Problem.of(costs, importance, reuse="prefix", epochs_left=epochs_left, **self._conditions))
        return problems

    def _point(self, problems: Sequence[Problem], progress: Progress) -> tuple[int, dict[str, Any], str] | None:
        """What a budget wants trained, and why, as plain data for the other processes, after the number of its problem;
        ``None`` for a share."""
        # What was spent ahead is spent: of a total, that much less is left for the steps to come.
        progress = replace(progress, spent_flops=progress.spent_flops + self._owed)
        points: list[tuple[int, Problem, OperatingPoint]] = []
        for number, problem in enumerate(problems):
            try:
                point = self.budget.point(problem, progress)
            except (InputError, InfeasibleBudgetError):
                if number == len(problems) - 1 and not points:
                    raise
                continue
            if point is not None:
                points.append((number, problem, point))
        if not points:
            return None
        number, problem, point = max(points, key=lambda one: one[2].predicted)
        reason = point.reason
        if problem.held and point.steps != 0:  # its "everything" is what stands above the boundary
            reason = _described(problem, point.selection)
            others = [other.predicted for _, _, other in points if other is not point]
            reason += "".join(f", {point.predicted / other:.2f}x what storing anew brings" for other in others)
        return number, point.selection.to_json(), reason

    def _require_left(self, progress: Progress, flops: int) -> None:
        """BudgetSpentError where the budget of the run does not pay for ``flops``."""
        # What was spent ahead is spent, whoever pays it back.
        progress = replace(progress, spent_flops=progress.spent_flops + self._owed)

        def exhausted() -> str | None:
            until = None if self.until is None else self.until.exhausted(progress, flops)
            return until or self.budget.exhausted(progress, flops)

        if reason := self.processes.first("what is left", exhausted):
            raise BudgetSpentError(reason)

    def _is_check_due(self) -> bool:
        """Whether the coming step is to tell if the first-order estimate holds: unless one of late did, at a learning
        rate that was no lower."""
        for step in reversed(self.log.steps[-TRUSTED_STEPS:]):
            if (check := step.check) is not None:
                return not check.holds or (rates_of(self.optimizer)[0] or 0) > (step.learning_rate or 0)
        return True

    def _selections_left(self) -> int:
        """How many selections are still to come in the run, as far as that is known."""
        made, steps = len(self.log.steps), self.num_steps or 0
        if self.every == "epoch":
            return max(0, (self.num_epochs or 1) - self.epoch - 1)
        if self._due is None or self._due[:2] != (self.every, steps):  # asked once of each step, not at each selection
            self._due = self.every, steps, self._steps_due(steps)
        return len(self._due[2]) - bisect_right(self._due[2], made)

    def _steps_due(self, steps: int) -> list[int]:
        """Before which of so many steps of a run a selection is due, one after the other."""
        assert self.every != "epoch"
        every = self.every
        due = set(range(0, steps, every) if isinstance(every, int) else filter(every, range(steps)))
        if self._reusing is not None:  # at the start of the epoch after one with a selection within
            in_epoch = max(1, steps // (self.whole_epochs or 1))
            due.update([step + in_epoch - step % in_epoch for step in due if step % in_epoch])
        return sorted(step for step in due if step < steps)

    def _progress(self, full: int, smallest_share: float = 0.0, measuring_left: int = 0) -> Progress:
        """``full`` is what the coming step costs in full."""
        now = time.perf_counter()
        if self._started is None:
            self._started = now
        seen = [*(step.full_flops for step in self.log.steps[-STEPS_SEEN:]), full]
        return Progress(
            step=len(self.log.steps),
            num_steps=self.num_steps,
            epoch=float(self.epoch),
            spent_flops=self._spent - self._owed + self.log.measuring_flops,
            full_flops=sum(seen) / len(seen),
            smallest_share=smallest_share,
            measuring_flops_left=measuring_left,
            seconds=self._seconds_before + now - self._started,
            kwh=None if self.energy is None else self.energy.kwh,
            time=time.time(),
        )

    # --- the loop written out -------------------------------------------------------------------------------------

    def fit(
        self,
        batches: Iterable[Any],
        epochs: int = 1,
        *,
        num_steps: int | None = None,
        accumulate: int = 1,
        measure_on: int = 1,
        on_step: Callable[[StepRecord], None] | None = None,
        watchers: Sequence[Watcher] = (),
        checkpoints: str | Path | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
    ) -> TrainingLog:
        """``epochs`` passes over ``batches``, an optimizer step for every ``accumulate`` of them.

        Args:
            batches: gone over again in each epoch, so an iterator has one epoch only. Told which one it is by
                ``batches.set_epoch``, where there is such a method.
            num_steps: the most steps to make, in the middle of an epoch if need be; of a resumed run, in all.
            accumulate: batches whose gradients are averaged to make a step; what does not fill one is left out.
            measure_on: batches from the next step on that importance is averaged over.
            on_step: called with the record of each step.
            watchers: told of each selection and step, as :class:`gtflops.training.JsonLines` is.
            checkpoints: a folder for checkpoints, each whole or absent: after every ``checkpoint_every`` steps, at the
                end, and when Ctrl-C or SIGTERM ends the run, after the step it falls into (``log.stopped`` says so).
            resume: go on from the last checkpoint of that folder, as the same call without the stop would have: to the
                bit, for the same batches, on the same machine.

        A batch that fails, and a loss that is not finite, raise before the optimizer moves anything. A budget of a
        whole run that is spent ends the run, with the reason in ``log.stopped``.
        """
        if self.log.steps and resume:
            raise InputError("resume=True on a trainer that has made steps, expected a new one, built as the first was")
        if resume and checkpoints is None:
            raise InputError("resume=True without checkpoints, expected the folder that they were written to")
        folder = None if checkpoints is None else Path(checkpoints)
        run = Run(self, batches, epochs, num_steps, accumulate, measure_on, folder)
        if run.num_steps is not None:
            self.num_steps = run.num_steps
        self.num_epochs = epochs
        if run.whole_epochs is not None:
            self.whole_epochs = run.whole_epochs
        self.budget.check(self.num_steps, epochs)
        if self._reusing is not None:
            self._require_length()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            _require_steps_alone(self.scheduler)
        with ExitStack() as stack:
            stack.callback(self.tie)
            if resume:
                run.resume()
            else:
                run.require_room()
                self._starts_epoch = True
                if self._reusing is not None:
                    self._reusing.filled_in = None  # an epoch of another run
            self.log.stopped, self.interrupted = None, False
            stack.callback(self.untrim)
            stack.callback(setattr, self, "checks", self.checks)
            self.checks = True
            interrupted = stack.enter_context(interruption())
            stack.enter_context(self.processes.together())
            watchers = watchers if self.processes.rank == 0 else ()
            if self.energy is not None:
                stack.enter_context(self.energy)
            for watcher in watchers:
                watcher.on_start(len(self.log.steps), self.num_steps, resume)
                stack.callback(watcher.on_end)
            for epoch, step_batches, upcoming in run:
                selections = len(self.log.selections)
                try:
                    self.step_boundary(*step_batches, epoch=epoch, measure_on=upcoming)
                except BudgetSpentError as reason:
                    self.log.stopped = str(reason)
                    break
                if len(self.log.selections) > selections:
                    for watcher in watchers:
                        watcher.on_selection(self.log.selections[-1])
                record = self._step(step_batches)
                run.steps_in_epoch += 1
                for watcher in watchers:
                    watcher.on_step(record)
                if on_step is not None:
                    on_step(record)
                if self.processes.any("an interruption", interrupted.is_set()):
                    self.interrupted = True
                    self.log.stopped = f"interrupted after {len(self.log.steps)} steps"
                    break
                if folder is not None and checkpoint_every and len(self.log.steps) % checkpoint_every == 0:
                    run.save()
            if folder is not None:
                run.save()
            if self.energy is not None:
                self.log.energy = self.energy.energy
            if folder is None and self.processes.any("an interruption", interrupted.is_set()):
                raise KeyboardInterrupt
        return self.log

    def _step(self, batches: tuple[Any, ...]) -> StepRecord:
        """The step that the last boundary opened."""
        started = time.perf_counter()
        try:
            with ExecutedFlops() if self.count_executed else nullcontext() as executed:
                loss = sum(self._backward(batch, left, len(batches)) for left, batch in _counted_down(batches))
            executed_flops = None if executed is None else self._sum([self.executed_flops(executed)])
            scale = 1.0
            if self.max_grad_norm is not None:
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
                scale = clipping_scale(self.processes.whole(norm), self.max_grad_norm)
            self.expect_drop(scale=scale)
            self.optimizer.step()
        except BaseException:
            self._take_back_step()
            self.optimizer.zero_grad(set_to_none=True)
            self.processes.rewrap()  # a pass that was not finished would be waited for
            raise
        self.optimizer.zero_grad(set_to_none=True)
        self.check_drop(loss)
        if self.scheduler is not None:
            self.scheduler.step()
        record = replace(
            self.log.steps[-1], loss=loss, executed_flops=executed_flops, seconds=time.perf_counter() - started
        )
        self.log.steps[-1] = record
        self.note_energy()
        return self.log.steps[-1]

    def _backward(self, batch: Any, left: int, parts: int) -> float:
        """Forward and backward pass of one of the ``parts`` of a step, with ``left`` to come; its share of the loss."""
        with self.processes.syncing(left == 0):
            with self.processes.together():
                loss = self._forward(batch)
                value = self.processes.mean("the loss", loss.item())
            with self.processes.communicating():
                loss.backward(torch.full_like(loss, 1 / parts))
        return value / parts

    def _forward(self, batch: Any) -> torch.Tensor:
        step = len(self.log.steps) - 1
        try:
            with self.processes.passing(), self.forward_pass():
                outputs = call_model(self.processes.model, batch)
        except GtflopsError:  # it is another's batch, or a model whose prefix cannot be reused
            raise
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
        return loss

    def executed_flops(self, counted: ExecutedFlops) -> int:
        """What was counted; UnsupportedOperatorError for operators without a price, unless they are allowed."""
        return sum(counted.flops) if self.allow_unsupported else counted.total

    # --- what to train --------------------------------------------------------------------------------------------

    def _is_due(self, step: int, starts_epoch: bool) -> bool:
        if self.every == "epoch" or (starts_epoch and (isinstance(self.budget, ByEpoch) or self._is_boundary_due())):
            return starts_epoch
        return bool(self.every(step)) if callable(self.every) else step % self.every == 0

    def _is_boundary_due(self) -> bool:
        """Whether the last selection fell within an epoch: the boundary can move at the start of the next one."""
        if self._reusing is None:
            return False
        last = self.log.selections[-1]
        return last.step > 0 and self.log.steps[last.step - 1].epoch == last.epoch

    def _within_budget(self, costs: list[BatchCosts], full: int) -> tuple[int, tuple[int, int], frozenset[str], int]:
        """FLOPs that all steps may cost up to this one, and what is owed of them by steps to come; what to train in it
        to stay within them, and what it is charged with."""
        assert self._chosen is not None
        names, charged = self._chosen, self._total(costs, self._chosen)
        owed = (0, 0)
        if self._reusing is not None:
            below = self._sum(cost.charged for cost in costs)
            has_room = self.processes.all("room for activations", self._reusing.store.full is None)
            owed = self._reusing.owed_after(below, self.epoch, self._epochs_left(), self._steps_left(), has_room)
        if self._share is None or self.selection is None:
            # All that a step costs is allowed: it spends nothing ahead, and pays nothing back.
            return self._allowed + charged, self._account()[2], names, charged
        allowed = self._allowed + part_of(self._share, full)
        if self._spent + charged > allowed + sum(owed):
            names, charged = self._smaller(costs, full, allowed + sum(owed) - self._spent)
        return allowed, owed, names, charged

    def _smaller(self, costs: list[BatchCosts], full: int, room: int) -> tuple[frozenset[str], int]:
        """The selection for a step of these costs and at most ``room`` FLOPs, or the cheapest where there is none."""
        assert self.selection is not None
        # Of batches of several shapes, the one in which the room is the smallest share of what is trained now.
        tightest = max(costs, key=lambda cost: cost.step_flops(self._chosen or ()) / cost.full_flops)
        held = () if self._reusing is None else self._reusing.held
        problem = Problem.of(tightest.as_run, self.selection.importance, held=held, **self._conditions)
        share = room / full
        # What is charged of the blocks below the boundary, the problem does not count.
        while (names := self._solved(problem, int(share * tightest.full_flops) - tightest.charged)) is not None:
            if (charged := self._total(costs, names)) <= room:
                return names, charged
            share *= min(room / charged, 0.999)
        names = self._solved(problem, problem.smallest)
        assert names is not None
        return names, self._total(costs, names)

    def _solved(self, problem: Problem, limit: int) -> frozenset[str] | None:
        """The first process's solution of its problem, whose prices are those of its batches; ``None`` for none."""

        def solve() -> frozenset[str] | None:
            if limit < problem.smallest:
                return None
            with suppress(InfeasibleBudgetError):
                mask = problem.solve(limit).mask
                names = problem.profile.names
                return frozenset(name for name, chosen in zip(names, mask, strict=True) if chosen)
            return None

        return self.processes.first("a smaller selection", solve)

    def _total(self, costs: Sequence[BatchCosts], trainable: frozenset[str] | Literal["all"]) -> int:
        """FLOPs of a step over batches of these costs: from the second on, each adds its gradients to those before."""
        if trainable == "all":
            flops = sum(cost.full_flops for cost in costs)
        else:
            flops = sum(cost.step_flops(trainable) for cost in costs)
        if len(costs) > 1:
            profile = costs[0].ordinary
            trained = {
                tensor.name
                for tensor, is_trained in zip(profile.tensors, profile.mask(trainable), strict=True)
                if is_trained and tensor.has_gradient
            }
            for uses in self._shared:  # have one gradient
                trained.difference_update(sorted(trained.intersection(uses))[1:])
            flops += (len(costs) - 1) * sum(self._elements[name] for name in trained)
        return self._sum([flops])

    def _costs_of(self, batch: Any) -> BatchCosts:
        if self._reusing is not None:
            return self._reusing.costs(batch, self.epoch)
        profile = self._prices.of(batch)
        return BatchCosts(profile, profile)

    def _sum(self, flops: Iterable[int]) -> int:
        """Over batches, and over the processes that train together."""
        return self.processes.sum("FLOPs", sum(flops))

    def _train_only(self, names: frozenset[str]) -> None:
        if names == self._trained and not (self._shared and has_strayed(self.model)):
            return
        self._require_no_gradients()
        for tensor in self.model.parameters():
            tensor.grad = None
        if self._shared:
            train_uses(self.model, names)
        else:
            for name, tensor in self.model.named_parameters():
                tensor.requires_grad_(name in names)
        self.processes.rewrap()
        self._trained = names

    def _tensors(self) -> dict[str, torch.nn.Parameter]:
        """What may be trained, as the model has it now."""
        return named_tensors(self.model, self.uses)

    @property
    def _owed(self) -> int:
        """FLOPs of what was spent that steps to come pay back."""
        return 0 if self._reusing is None else self._reusing.owed + self._reusing.owed_ahead

    def _account(self) -> tuple[int, int, tuple[int, int]]:
        """What steps may have cost, what they did, and what of that is owed."""
        owed = (0, 0) if self._reusing is None else (self._reusing.owed, self._reusing.owed_ahead)
        return self._allowed, self._spent, owed

    def _take_back_step(self) -> None:
        """The step that the last boundary opened is not made."""
        self.log.steps.pop()
        self._allowed, self._spent, owed = self._before_step
        self._passes.clear()
        if self._reusing is not None:
            self._reusing.owed, self._reusing.owed_ahead = owed

    def _require_length(self) -> None:
        """InputError where it is not known how many steps share what the first epoch stores."""
        if self.num_steps is None or self.whole_epochs is None:
            raise InputError(
                "reuse='prefix' spreads its first epoch over those to come, and their number is not known: expected "
                "num_steps and num_epochs, or batches that have a length"
            )

    def _require_passed(self) -> None:
        """InputError where forward passes of the last step were not those that its cost was told of."""
        if self._passes:
            raise InputError(
                f"{len(self._passes)} forward passes of the last step were made without the trainer, or not at all, so "
                "that they did not cost what was planned; expected each, in the order of the batches, inside of "
                "'with trainer.forward_pass():'"
            )

    def _require_untouched(self) -> None:
        if self._trained is None:
            return
        for name, tensor in self._tensors().items():
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
                    f"{name!r} has the gradient of an unfinished step; expected optimizer.step() and "
                    "optimizer.zero_grad() before: what is trained changes between optimizer steps only, and batches "
                    "whose gradients are accumulated are given to one step_boundary(*batches)"
                )

    # --- what a run can be resumed from ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the trainer stands, its log included, as plain data; without the model's and the optimizer's."""
        return {
            "epoch": self.epoch,
            "starts_epoch": self._starts_epoch,
            "chosen": None if self._chosen is None else sorted(self._chosen),
            "trained": None if self._trained is None else sorted(self._trained),
            "allowed": self._allowed,
            "spent": self._spent,
            "share": self._share,
            "seconds": self._seconds_before + (0.0 if self._started is None else time.perf_counter() - self._started),
            "energy": None if self.energy is None else asdict(self.energy.energy),
            "reusing": None if self._reusing is None else self._reusing.state_dict(),
            "uses": self.uses,
            "log": self.log.to_json(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state of :meth:`state_dict`, for a trainer that was built alike, and freeze as it says."""
        self.require_candidates_of(state)
        log = TrainingLog.from_json(state["log"], self.profile)
        self.log = log
        self.epoch, self._starts_epoch = state["epoch"], state["starts_epoch"]
        self.selection = log.selections[-1].selection if log.selections else None
        self._chosen = None if state["chosen"] is None else frozenset(state["chosen"])
        self._allowed, self._spent = state["allowed"], state["spent"]
        self._share, self._seconds_before, self._started = state["share"], state["seconds"], None
        if self.energy is not None and state["energy"] is not None:
            self.energy.continue_from(Energy(**state["energy"]))
        if self._reusing is not None and state["reusing"] is not None:
            self._reusing.load_state_dict(state["reusing"])
        if state["trained"] is not None:
            self._train_only(frozenset(state["trained"]))

    def require_candidates_of(self, state: Mapping[str, Any]) -> None:
        """InputError for a state of :meth:`state_dict` of a run that trained what is frozen here, or other units."""
        if state.get("uses") != self.uses:
            raise InputError(
                f"the run to go on with had uses={state.get('uses')!r}, expected the same, not {self.uses!r}: names "
                "stand for other gradients there"
            )
        foreign = sorted({*(state["chosen"] or ()), *(state["trained"] or ())} - self.candidates)
        if foreign:
            raise InputError(
                f"the run to go on with trained {len(foreign)} tensors that were frozen when this trainer was built, "
                f"first {foreign[0]!r}; expected what was frozen then to be frozen now, and no more"
            )


def _require_same_uses(profile: Profile, uses: Uses | None, has_shared: bool) -> None:
    is_separate = bool(profile.graph.uses)
    if is_separate != has_shared:
        raise InputError(
            f"the profile has {'each use of a shared tensor' if is_separate else 'a shared tensor as a whole'} and "
            f"uses is {uses!r}; expected the same in both: gtflops.profile(model, batch, uses={uses!r})"
        )


def _better_of(problems: Sequence[Problem], limit: int) -> tuple[Selection, Problem, str | None]:
    """The selection of most importance among the best of each problem, which are the first ones to hold what is stored;
    and why, where there was a choice. InfeasibleBudgetError where no problem has one."""
    found: list[tuple[Problem, Selection]] = []
    for problem in problems:
        with suppress(InfeasibleBudgetError):
            found.append((problem, selection_of(problem, limit, problem.solve(limit))))
    if not found:
        raise min(problems, key=lambda problem: problem.smallest).infeasible(limit)
    problem, best = max(found, key=lambda pair: pair[1].value)
    if len(problems) == 1:
        return best, problem, None
    others = [_described(other, selection) for other, selection in found if other is not problem]
    return best, problem, f"{_described(problem, best)}, not {', '.join(others) or 'another way: none fits the budget'}"


def _described(problem: Problem, selection: Selection) -> str:
    how = "keeping what is stored" if problem.held else "storing anew, the first pass counted"
    return f"{how}: {selection.importance_captured:.4f} of the importance for {selection.flops:,} FLOPs a step"


def clipping_scale(norm: torch.Tensor, max_norm: float) -> float:
    """What ``clip_grad_norm_`` multiplied gradients by whose norm it gave."""
    return min(1.0, max_norm / (norm.item() + 1e-6))


def _require_steps_alone(scheduler: Scheduler) -> None:
    try:
        inspect.signature(scheduler.step).bind()
    except TypeError as error:
        raise InputError(
            f"{type(scheduler).__name__} cannot be stepped after each optimizer step ({error}); expected a schedule "
            "that goes by steps, or one that is stepped by you: leave scheduler= out, and call it in on_step"
        ) from None


def _tell_of_steps(optimizer: torch.optim.Optimizer, listener: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Calls ``listener`` after each step; by a weak reference, so that an optimizer keeps no trainer alive."""

    def tell(*_: Any) -> None:
        if (note := listener()) is not None:
            note()

    optimizer.register_step_post_hook(tell)


def _counted_down(batches: tuple[Any, ...]) -> Iterator[tuple[int, Any]]:
    return zip(range(len(batches) - 1, -1, -1), batches, strict=True)

"""A callback that trains under a budget of FLOPs, for transformers.Trainer and what inherits from it."""

import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.overrides import TorchFunctionMode
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from gtflops.capture.unchanged import attributes_unchanged
from gtflops.capture.uses import check_uses, tie
from gtflops.errors import BudgetSpentError, InputError
from gtflops.graph import Uses
from gtflops.importance import measure_importance
from gtflops.problem import Granularity, Patterns
from gtflops.profiling import Reuse
from gtflops.reuse import ActivationStore
from gtflops.training import EnergyMeter, GreenTrainer, TrainingLog
from gtflops.training.budgets import BudgetLike
from gtflops.training.loop import Choose, Every, check_every, clipping_scale
from gtflops.training.processes import Processes
from gtflops.trimming import Trim, Trimming

#: A transformers.Trainer that trains: the types of its attributes are those that they may have before.
Training: TypeAlias = Any

_logger = logging.getLogger(__name__)


class GreenTrainerCallback(TrainerCallback, ExportableState):
    """Trains the tensors that matter most within a budget of FLOPs a step: one line more for a ``Trainer``.

    ``Trainer(..., callbacks=[GreenTrainerCallback(budget=0.5)])``, with a model that is trainable as a whole. At the
    first step it traces what the Trainer does with a batch, its own loss and autocast included; then and whenever
    ``every`` says so, it measures importances on the batches of the coming step, selects, and freezes the rest. The run
    is otherwise the Trainer's: nothing is drawn from its data or its random states.

    The budget holds for the sum over the steps, each priced in the real shapes of its batches, as
    :class:`gtflops.GreenTrainer` has it. ``state.total_flos`` counts what was executed, measuring included, and the
    Trainer's logs have ``gtflops/step_flops`` (of the last step), ``gtflops/flops_total`` (all so far, measuring
    included), ``gtflops/flops_saved`` (against the same steps in full), ``gtflops/selected_tensors``,
    ``gtflops/budget`` and ``gtflops/importance_captured``; :attr:`log` has every step and selection. The first step
    after a selection checks the estimate behind it by a forward pass, unless one of late held, and warns where it does
    not hold: ``gtflops/predicted_drop`` and ``gtflops/real_drop``. With ``energy``, ``gtflops/kwh`` and
    ``gtflops/co2_kg``.

    Of a PEFT model, it selects among the tensors that PEFT trains; a full step is still one that trains the whole
    model, of which adapters alone may cost 0.7. Tensors whose training would raise the loss by their importance are not
    selected, even by a budget of 1. With activation checkpointing, inputs are kept from
    requiring gradients, so that the backward pass ends at the lowest trained tensor. When training ends, by an error
    too, every candidate requires gradients again, as before. A checkpoint has what a resumed run needs to go on as if
    it had not been stopped; one that was saved without the callback cannot be resumed with it.

    Args:
        budget: as of :class:`gtflops.GreenTrainer`; a :class:`gtflops.training.Total` that is spent ends the training,
            with the reason in ``log.stopped``.
        every: when to select anew: ``"epoch"``, a number of optimizer steps, or a function of the number of steps made.
        choose: as of :class:`gtflops.GreenTrainer`.
        measure: as of :class:`gtflops.GreenTrainer`.
        trim: ``"auto"`` takes the padding out of the Trainer's batches, and the head off positions without a label, for
            as long as it trains: see :class:`gtflops.trimming.Trim`. Not where the loss is not the model's own.
        energy: a :class:`gtflops.training.EnergyMeter`, on during the training, in the first process.
        granularity: as of :func:`gtflops.select`.
        must_train: as of :func:`gtflops.select`.
        must_freeze: as of :func:`gtflops.select`; may also name tensors that were frozen before the Trainer was built.
        max_elements: as of :func:`gtflops.select`.
        reuse: ``"prefix"`` as of :class:`gtflops.GreenTrainer`: what the blocks below the trained tensors compute for
            an example is stored in the first epoch, and read in the others.
        store: with ``reuse``, a folder, or a :class:`gtflops.reuse.ActivationStore`.
        batch_first: with ``reuse``, as of :class:`gtflops.GreenTrainer`.
        uses: ``"separate"`` as of :class:`gtflops.GreenTrainer`: each use of a shared tensor is chosen by itself.
        allow_unsupported: as of :func:`gtflops.select`.

    Errors about the set-up are raised by ``trainer.train()``, before the first step.
    """

    def __init__(
        self,
        budget: BudgetLike = 0.5,
        every: Every = "epoch",
        *,
        choose: Choose | None = None,
        measure: Callable[..., dict[str, float]] = measure_importance,
        granularity: Granularity = "tensor",
        must_train: Patterns = (),
        must_freeze: Patterns = (),
        max_elements: int | None = None,
        reuse: Reuse | None = None,
        store: ActivationStore | str | Path | None = None,
        batch_first: bool = False,
        uses: Uses | None = None,
        trim: Trimming = None,
        energy: EnergyMeter | None = None,
        allow_unsupported: bool = False,
    ) -> None:
        check_every(every)
        check_uses(uses)
        self._energy = energy
        self._trim = trim
        self._settings: dict[str, Any] = {
            "budget": budget,
            "every": every,
            "choose": choose,
            "measure": measure,
            "granularity": granularity,
            "must_train": must_train if isinstance(must_train, str) else list(must_train),
            "must_freeze": must_freeze if isinstance(must_freeze, str) else list(must_freeze),
            "max_elements": max_elements,
            "reuse": reuse,
            "store": store,
            "batch_first": batch_first,
            "uses": uses,
            "allow_unsupported": allow_unsupported,
        }
        self._run: _Run | None = None
        #: Where the run of a checkpoint stood, as plain data.
        self.progress: Mapping[str, Any] | None = None

    @property
    def log(self) -> TrainingLog:
        """The steps and selections of the last run; empty before its first step."""
        green = self._run.green if self._run is not None else None
        return TrainingLog() if green is None else green.log

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the Trainer keeps."""
        green = self._run.green if self._run is not None else None
        plain = (str, int, float, list, type(None))
        settings = {name: value if isinstance(value, plain) else repr(value) for name, value in self._settings.items()}
        if self._settings["measure"] is measure_importance:
            del settings["measure"]
        del settings["store"]  # a folder may have moved
        settings["trim"] = self._trim
        return {"args": settings, "attributes": {"progress": self.progress if green is None else green.state_dict()}}

    # --- the Trainer's events -------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is not None:
            self._run.close()  # one that ended by an error before its first epoch
        self._run = None
        trainer = _trainer_of(state)
        if sum(isinstance(callback, GreenTrainerCallback) for callback in trainer.callback_handler.callbacks) > 1:
            raise InputError(
                "the Trainer has more than one GreenTrainerCallback, and each would freeze what another trains; "
                "expected one: trainer.remove_callback(GreenTrainerCallback) removes the first"
            )
        self.progress = _progress_of(state, type(self).__name__) if state.global_step else None
        _require_trainable(trainer.model, self._settings["must_freeze"])
        _require_no_reentrant_checkpoints(trainer.model)
        _warn_of_whole_models(trainer)
        trim = Trim.of(self._trim, trainer.model, _own_loss(trainer))
        self._run = _Run(trainer, self._settings, self._energy, self.progress, trim)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is not None:
            self._run.begin_epoch()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is not None:
            self._run.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is not None:
            self._run.before_update()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._run is not None:
            self._run.after_update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is not None:
            self._run.close()


class _Run:
    """One ``trainer.train()``, from its beginning to its end.

    Callbacks are shown neither batches and losses, nor logs before they are written, nor errors. So methods of the
    Trainer are stood in for while it runs: those that draw the batches of a step, train on one, say what it costs, clip
    gradients and log; and, for the errors, those of an epoch and of the end.
    """

    def __init__(
        self,
        trainer: Training,
        settings: Mapping[str, Any],
        energy: EnergyMeter | None,
        progress: Mapping[str, Any] | None,
        trim: Trim | None,
    ) -> None:
        self.green: GreenTrainer | None = None
        self._trainer = trainer
        self._settings = settings
        self._progress = progress
        self._step = _TrainerStep.of(trainer)
        self._processes = Processes(trainer.model_wrapped, inside=self._step)
        self._energy = energy if self._processes.rank == 0 else None
        self._trim = trim
        self._epoch: int | None = None
        self._batches: Sequence[Any] = ()
        self._is_begun = False
        self._losses: list[torch.Tensor] = []
        self._clipped: float | None = None
        self._unreported = 0
        self._planned = 0
        self._full = 0
        self._undo = ExitStack()
        model = trainer.model
        self._undo.callback(_thaw, [tensor for tensor in model.parameters() if tensor.requires_grad])
        self._undo.callback(tie, model)
        _disable_input_gradients(model, self._undo)
        if trim is not None:
            self._undo.callback(trim.remove)
        self._draw = _stand_in(self._undo, trainer, "get_batch_samples", self._get_batch_samples)
        self._train = _stand_in(self._undo, trainer, "training_step", self._training_step)
        self._clip = _stand_in(self._undo, trainer.accelerator, "clip_grad_norm_", self._clip_grad_norm)
        self._log = _stand_in(self._undo, trainer, "log", self._log_with_flops)
        _stand_in(self._undo, trainer, "floating_point_ops", self._floating_point_ops)
        for name in ("_run_epoch", "_finalize_training"):
            if hasattr(trainer, name):  # they are the Trainer's own, and it may name them otherwise
                _stand_in(self._undo, trainer, name, self._cleared_away(getattr(trainer, name)))

    def close(self) -> None:
        """Give the Trainer its methods back, and let every candidate require gradients again."""
        if self.green is not None and self._energy is not None:
            self.green.log.energy = self._energy.energy
        self._undo.close()

    def begin_epoch(self) -> None:
        self._epoch = int(self._trainer.state.epoch) if self._epoch is None else self._epoch + 1

    def begin_step(self) -> None:
        """The first step of a run is begun here: a resumed one has its random states only now."""
        if not self._is_begun:
            self._begin_step()
        self._is_begun = False

    def _begin_step(self) -> None:
        self._trainer.model.train()  # an evaluation leaves it in its other mode, which is priced apart
        if self.green is None:
            self.green = self._started()
        self._losses, self._clipped = [], None
        measured = self.green.log.measuring_flops
        try:
            record = self.green.step_boundary(*self._batches, epoch=self._epoch or 0)
        finally:
            self._unreported += self.green.log.measuring_flops - measured
        self._planned += record.planned_flops
        self._full += record.full_flops
        self._unreported += record.planned_flops

    def before_update(self) -> None:
        assert self.green is not None
        if self._clipped is None:  # which does it, for scaled gradients
            self._trainer.accelerator.unscale_gradients()
        self.green.expect_drop(scale=1.0 if self._clipped is None else self._clipped)

    def after_update(self) -> None:
        assert self.green is not None
        measured = self.green.log.measuring_flops
        self.green.check_drop(math.fsum(loss.item() for loss in self._losses))
        self.green.note_energy()
        self._unreported += self.green.log.measuring_flops - measured
        self._trainer.current_flos += self._floating_point_ops(None)

    def _started(self) -> GreenTrainer:
        optimizer = self._trainer.optimizer
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        green = GreenTrainer(
            self._step,
            optimizer,
            self._batches[0],
            # What reads padding is known of a model's own loss alone.
            loss=None if _own_loss(self._trainer) is None else lambda outputs, batch: outputs["loss"],
            scheduler=self._trainer.lr_scheduler,
            num_steps=self._trainer.state.max_steps,
            energy=self._energy,
            processes=self._processes,
            **self._settings,
        )
        green.checks = True
        green.num_epochs = math.ceil(self._trainer.state.num_train_epochs)
        green.whole_epochs = _whole_epochs(self._trainer)
        green.budget.check(green.num_steps, green.num_epochs)
        if self._energy is not None:
            self._energy.continue_from(None)
        if self._progress is not None:
            green.load_state_dict(self._progress)
            green.log.stopped = None
            self._planned, self._full = green.log.planned_flops, green.log.full_flops
        if self._energy is not None:
            self._undo.enter_context(self._energy)
        return green

    # --- in the place of the Trainer's methods ------------------------------------------------------------------

    def _get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items = self._draw(*args, **kwargs)
        if self._trim is not None:  # after the labels were counted
            batches = [self._trim(batch) for batch in batches]
        shared = {} if num_items is None else {"num_items_in_batch": torch.as_tensor(num_items)}
        self._batches = [{**batch, **shared} for batch in batches]
        if self.green is None or not batches:
            return batches, num_items
        self._trainer.current_gradient_accumulation_steps = len(batches)  # as the Trainer does next
        try:
            self._begin_step()
        except BudgetSpentError as reason:
            self._stop(reason)
            return [], num_items  # no step is made of them, and the epoch ends
        self._is_begun = True
        return batches, num_items

    def _stop(self, reason: BudgetSpentError) -> None:
        assert self.green is not None
        self.green.log.stopped = str(reason)
        _logger.warning("training ends after %d steps: %s", len(self.green.log.steps), reason)
        self._trainer.control.should_training_stop = True
        self._trainer.current_flos += self._floating_point_ops(None)  # what was measured for the step

    def _training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self.green is not None
        with _modes_kept(self._trainer.model), self.green.forward_pass():
            loss: torch.Tensor = self._train(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def _clip_grad_norm(self, parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        norm = self._clip(parameters, max_norm, *args, **kwargs)
        self._clipped = 1.0 if norm is None else clipping_scale(self._processes.whole(norm), max_norm)
        return norm

    def _cleared_away(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, after whose errors the model is as the Trainer was given it, and the other processes know."""

        def cleared_away(*args: Any, **kwargs: Any) -> Any:
            try:
                with self._processes.communicating():
                    try:
                        return method(*args, **kwargs)
                    except BudgetSpentError as reason:  # of the first step, whose batches are the Trainer's by then
                        self._stop(reason)
            except BaseException:
                self.close()
                raise

        return cleared_away

    def _floating_point_ops(self, inputs: Any) -> int:
        """The Trainer asks after each batch, and reads the sum after the step."""
        flops, self._unreported = self._unreported, 0
        return flops if self._trainer.args.process_index == 0 else 0  # they are those of all, and the Trainer adds up

    def _log_with_flops(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if self.green is not None and self.green.log.steps and ("loss" in logs or "train_loss" in logs):
            steps, selection = self.green.log.steps, self.green.log.selections[-1]
            total = self._planned + self.green.log.measuring_flops
            logs["gtflops/step_flops"] = steps[-1].planned_flops
            logs["gtflops/flops_total"] = total
            logs["gtflops/flops_saved"] = self._full - total
            logs["gtflops/selected_tensors"] = len(selection.names)
            if selection.budget is not None:
                logs["gtflops/budget"] = selection.budget
            if selection.importance_captured is not None:
                logs["gtflops/importance_captured"] = selection.importance_captured
            if (checked := self.green.log.last_checked) is not None:
                logs["gtflops/predicted_drop"] = checked.predicted_drop
                logs["gtflops/real_drop"] = checked.real_drop
            if self._energy is not None:
                energy = self._energy.energy
                logs["gtflops/kwh"], logs["gtflops/co2_kg"] = energy.kwh, energy.co2_kg
        self._log(logs, *args, **kwargs)


class _TrainerStep(torch.nn.Module):
    """What a Trainer does with a batch up to ``backward()``, as a module: with the model's tensors under its names.

    The FLOPs and the gradients are then those of the Trainer's own loss, whatever it is, under its own autocast. Of
    ``named_modules``, which all else goes through, the first is the model itself.
    """

    def __init__(self, trainer: Training) -> None:
        super().__init__()
        model = trainer.model
        self._model: Any
        self.__dict__.update(
            _parameters=model._parameters, _buffers=model._buffers, _modules=model._modules, _model=model
        )
        self.config = getattr(model, "config", None)
        self._trainer = trainer
        self._training_step = trainer.training_step
        self._questions = _Questions(trainer)

    @classmethod
    def of(cls, trainer: Training) -> "_TrainerStep":
        """Under the name of the model's class, which profiles and messages have."""
        step: _TrainerStep = type(type(trainer.model).__name__, (cls,), {})(trainer)
        return step

    def get_encoder(self) -> torch.nn.Module:
        """As transformers' encoder-decoders have it."""
        encoder: torch.nn.Module = self._model.get_encoder()
        return encoder

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        yield from self._model.named_modules(*args, **kwargs)

    def forward(self, num_items_in_batch: torch.Tensor | None = None, **inputs: Any) -> dict[str, torch.Tensor]:
        """The ``loss`` that the backward pass starts at."""
        trainer = self._trainer
        losses: list[torch.Tensor] = []
        with (
            attributes_unchanged(
                [trainer], with_tensors=lambda name: False, except_in=("train_dataset", "eval_dataset")
            ),
            self._questions,
            _modes_kept(self._model),
            ExitStack() as undo,
        ):
            _stand_in(undo, trainer.accelerator, "backward", lambda loss, **kwargs: losses.append(loss))
            self._training_step(self._model, inputs, num_items_in_batch)
        if len(losses) != 1:
            raise InputError(
                f"training_step() of {type(trainer).__name__} makes {len(losses)} backward passes for a batch, "
                "expected one, through accelerator.backward()"
            )
        loss: torch.Tensor = losses[0]
        if not isinstance(loss, FakeTensor):
            # Importance is measured batch by batch: each is to stand for the whole step.
            loss = loss * trainer.current_gradient_accumulation_steps
        else:  # what Accelerator.backward does with it
            loss = loss / trainer.accelerator.gradient_accumulation_steps
            if trainer.accelerator.scaler is not None:
                loss = loss * loss.new_ones(())
        return {"loss": loss}


class _Questions(TorchFunctionMode):
    """Answers the Trainer's own code that asks tensors without data, as it does for the metrics that it logs.

    Numbers are 0, and conditions hold. Where a condition was taken to hold and does not when the step is run on data,
    for the importances, that is an error: the step may cost something else. Questions of the model stay errors.
    """

    def __init__(self, trainer: Training) -> None:
        super().__init__()
        self._trainer = trainer
        self._taken_to_hold: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.Tensor.item, torch.Tensor.__bool__):
            return func(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        if frame.f_locals.get("self") is not self._trainer:
            return func(*args)
        line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        try:
            answer = func(*args)
        except DataDependentOutputException:
            if func is torch.Tensor.item:
                return 0.0
            self._taken_to_hold.add(line)
            return True
        if answer is False and line in self._taken_to_hold:
            raise InputError(
                f"the condition of {type(self._trainer).__name__} at {line} depends on the data, and the FLOPs of a "
                "step with it; expected a step that depends on shapes alone"
            )
        return answer


def _stand_in(undo: ExitStack, owner: Any, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Put ``method`` in the place of that of ``owner``, which is returned, until ``undo`` is closed."""
    original: Callable[..., Any] = getattr(owner, name)
    if name in vars(owner):
        undo.callback(setattr, owner, name, original)
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, method)
    return original


@contextmanager
def _modes_kept(model: torch.nn.Module) -> Iterator[None]:
    """The Trainer says ``model.train()`` in each training step, where a frozen prefix is in evaluation mode by then.
    ``model.eval()``, and the ``train()`` that ends it, do what they say."""
    is_in_evaluation = False
    with ExitStack() as undo:

        def train(mode: bool = True) -> torch.nn.Module:
            nonlocal is_in_evaluation
            if mode and not is_in_evaluation:
                return model
            is_in_evaluation = not mode
            changed: torch.nn.Module = original(mode)
            return changed

        original = _stand_in(undo, model, "train", train)
        yield


# --- the set-up -------------------------------------------------------------------------------------------------


def _trainer_of(state: TrainerState) -> Training:
    """The Trainer whose event this is. It does not pass itself to its callbacks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and owner.state is state:
            return owner
        frame = frame.f_back
    raise InputError("GreenTrainerCallback was called by no transformers.Trainer; in a loop of your own: GreenTrainer")


def _whole_epochs(trainer: Training) -> int | None:
    """Passes over the data that the Trainer makes to their end; ``None`` for data without a length."""
    if trainer.args.max_steps <= 0:
        return int(trainer.args.num_train_epochs)
    if trainer.state.num_train_epochs == sys.maxsize:
        return None
    batches, accumulated = len(trainer.callback_handler.train_dataloader), trainer.args.gradient_accumulation_steps
    in_epoch: int = max(1, math.ceil(batches / accumulated))
    max_steps: int = trainer.args.max_steps
    return max_steps // in_epoch


def _progress_of(state: TrainerState, name: str) -> Mapping[str, Any]:
    states: Any = state.stateful_callbacks  # a mapping by now
    saved = states.get(name)
    progress = saved["attributes"].get("progress") if isinstance(saved, dict) else None
    if progress is None:
        raise InputError(
            f"the checkpoint of step {state.global_step} was saved without {name}, so what it had selected and spent "
            "is not known; resume it without the callback, or start a new run from its weights: "
            "from_pretrained(checkpoint), and train() without resume_from_checkpoint"
        )
    result: Mapping[str, Any] = progress
    return result


def _own_loss(trainer: Training) -> Callable[..., Any] | None:
    """The Trainer's loss, where that is another than its model's."""
    own: Callable[..., Any] = trainer.compute_loss
    is_the_models = (
        getattr(own, "__func__", None) is Trainer.compute_loss
        and trainer.compute_loss_func is None
        and trainer.label_smoother is None
    )
    return None if is_the_models else own


def _require_trainable(model: torch.nn.Module, must_freeze: str | Sequence[str]) -> None:
    """The Trainer gives its optimizer only what requires gradients when it is made."""
    if any(hasattr(part, "peft_config") for part in model.modules()):
        return
    patterns = [must_freeze] if isinstance(must_freeze, str) else must_freeze
    frozen = [
        name
        for name, tensor in model.named_parameters()
        if tensor.is_floating_point()
        and not tensor.requires_grad
        and not any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if frozen:
        raise InputError(
            f"{len(frozen)} tensors of the model are frozen already, first {frozen[0]!r}, so the Trainer's optimizer "
            "does not hold them and they could never be selected; expected a model that is trainable as a whole: call "
            "model.requires_grad_(True) before the Trainer is built, and give GreenTrainerCallback(must_freeze=...) "
            "for what is to stay frozen"
        )


def _require_no_reentrant_checkpoints(model: torch.nn.Module) -> None:
    for part in model.modules():
        chosen = getattr(getattr(part, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(part, "gradient_checkpointing", False) and chosen.get("use_reentrant") is not False:
            raise InputError(
                "the model uses reentrant activation checkpointing, whose backward pass runs in full whatever is "
                "frozen, or not at all; expected TrainingArguments(gradient_checkpointing_kwargs="
                '{"use_reentrant": False})'
            )


def _warn_of_whole_models(trainer: Training) -> None:
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        warnings.warn(
            "TrainingArguments(fsdp=...) asks for FSDP, and accelerate trains by "
            f"{trainer.accelerator.distributed_type} instead, without a word: it shards on accelerators only, so each "
            "process holds the whole model; expected a GPU for each process and no use_cpu=True, or no fsdp= where "
            "that is as you want it",
            stacklevel=2,
        )


def _disable_input_gradients(model: torch.nn.Module, undo: ExitStack) -> None:
    """transformers and PEFT let the embedding's output require gradients under activation checkpointing, for the
    reentrant form's sake: the backward pass would always run down to it, whatever is frozen. They forget a hook when
    they set it again, for a second training, so that their own way of removing it leaves one."""
    for part in model.modules():
        for key, hook in list(part._forward_hooks.items()):
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del part._forward_hooks[key]
                undo.callback(part._forward_hooks.__setitem__, key, hook)


def _thaw(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.requires_grad_(True)

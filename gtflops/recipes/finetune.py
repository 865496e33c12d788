"""Fine-tune a language model by a scheme, and say what it cost and what it brought."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gtflops.capture import ExecutedFlops
from gtflops.capture.uses import check_uses
from gtflops.errors import BudgetSpentError, InputError
from gtflops.graph import Uses
from gtflops.importance import measure_importance
from gtflops.problem import Granularity
from gtflops.profiling import Profile
from gtflops.profiling import profile as profile_of
from gtflops.recipes.batches import Batch, EpochBatches, batches_in_epoch, in_order
from gtflops.recipes.datasets import DataSet
from gtflops.recipes.evaluation import mean_loss, on_device, quality
from gtflops.recipes.memory import Memory, PeakMemory
from gtflops.recipes.resuming import digest_of_texts, digest_of_weights, require_as_begun, write_beginning
from gtflops.recipes.schemes import Scheme, scheme
from gtflops.selection import Selection
from gtflops.training import (
    Auto,
    EnergyMeter,
    GreenTrainer,
    StepRecord,
    Total,
    TrainingLog,
    Watcher,
    budget_of,
    processes,
)
from gtflops.training.budgets import BudgetLike
from gtflops.training.loop import Every, check_every
from gtflops.trimming import Trimming


@dataclass(frozen=True, kw_only=True)
class FineTuneSettings:
    """What a run depends on besides model and data."""

    steps: int
    scheme: str = "greentrainer"
    """One of :data:`gtflops.recipes.schemes.SCHEMES`, or ``top15`` for the 15 blocks nearest to the loss."""
    batch_size: int = 4
    seq_len: int = 224
    target_len: int = 64
    """The longest text to generate, and the length of an encoder-decoder's labels."""
    accumulate: int = 1
    """Batches whose gradients make a step."""
    budget: BudgetLike = 0.5
    """Share of a full step's FLOPs, for the scheme greentrainer; or any other budget of :class:`GreenTrainer`."""
    every: Every = 100
    """Optimizer steps between selections, or "epoch"."""
    until: float | None = None
    """FLOPs that end the run of any scheme, measuring importance included, so that schemes are compared at one total:
    the rate falls to 0 there. ``steps`` are then the most that are made."""
    granularity: Granularity = "tensor"
    """What the scheme greentrainer chooses as a whole; "layer" for compiled layers."""
    must_train: tuple[str, ...] = ()
    """Patterns of tensors that the scheme greentrainer trains in any case."""
    must_freeze: tuple[str, ...] = ()
    """Patterns of tensors that it never trains."""
    store: Path | None = None
    """A folder for what the blocks below the trained tensors compute, which later epochs read; None computes it."""
    uses: Uses | None = None
    """"separate" chooses each use of a shared tensor by itself, for the scheme greentrainer."""
    trim: Trimming = None
    """"auto" trains on batches of examples of about the same length, without their padding, with the head where there
    are labels alone: see :class:`gtflops.trimming.Trim`."""
    learning_rate: float = 5e-5
    """Peak of AdamW's linear decay to zero, without warm-up (the published recipe's schedule)."""
    seed: int = 0
    """Of the order of the examples, of new weights (adapters, prefixes), of random blocks and of dropout."""
    num_validation: int | None = None
    """Validation examples that the loss is measured on; None is all."""
    num_quality: int = 0
    """Validation examples that the quality is measured on, which takes a generated text each; 0 leaves it out."""
    count_executed: bool = False
    """Count what each step executes, instead of one step alone (some percent slower)."""
    allow_unsupported: bool = False
    """Count operators without a price as free."""

    def __post_init__(self) -> None:
        scheme(self.scheme)
        budget_of(self.budget)
        check_every(self.every)
        check_uses(self.uses)
        if self.until is not None:
            Total(flops=self.until)
        for name in ("steps", "batch_size", "seq_len", "target_len", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected a positive number")
        if self.num_quality < 0 or (self.num_validation is not None and self.num_validation < 1):
            raise InputError(
                f"num_quality is {self.num_quality} and num_validation {self.num_validation}, expected numbers of "
                "examples; num_quality=0 leaves the quality out"
            )

    def num_epochs(self, num_examples: int, num_processes: int = 1) -> int:
        """How many epochs the steps reach into."""
        steps = batches_in_epoch(num_examples, self.batch_size, num_processes) // self.accumulate
        if steps < 1:
            needed = self.batch_size * num_processes * self.accumulate
            raise InputError(f"{num_examples} examples do not fill a step of {needed}; expected at least as many")
        return math.ceil(self.steps / steps)


@dataclass(frozen=True)
class CountedStep:
    """FLOPs of one real forward and backward pass, counted while it ran, and what the profile says of it."""

    planned_matmul: int
    pytorch_matmul: int
    """By torch.utils.flop_counter.FlopCounterMode."""
    planned: int
    executed: int
    """By gtflops' own table, on the operators that ran."""


@dataclass(frozen=True)
class FineTuneResult:
    """A run: its log, what it trained, mean validation loss a target token before and after, and one counted step.

    ``profile`` is that of the model as it was trained, adapters included, on its first batch, trimmed if the run was.
    ``base`` and ``loss_before`` are those of the model as it came, on a batch as it came: every scheme's FLOPs are
    compared to a full step of that. ``trained`` are the tensors that the last step trained. ``quality`` is in percent.
    """

    scheme: Scheme
    log: TrainingLog
    profile: Profile
    base: Profile
    selection: Selection | None
    trained: tuple[str, ...]
    loss_before: float
    loss_after: float
    quality: Mapping[str, float]
    counted: CountedStep
    memory: Memory | None
    batches_per_step: int = 1
    """Over all processes."""

    @property
    def full_step_flops(self) -> int:
        """What full fine-tuning takes for a batch."""
        return self.base.full_flops

    @property
    def flops_share(self) -> float:
        """Planned FLOPs of all steps, as a share of those of full fine-tuning."""
        return self.log.planned_flops / (self.full_step_flops * self.batches_per_step * len(self.log.steps))

    @property
    def train_seconds(self) -> float:
        """Of the steps alone."""
        return sum(step.seconds or 0.0 for step in self.log.steps)


class InterruptedRunError(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a run, after ``step`` optimizer steps of ``num_steps``. What is in ``checkpoints``, if
    there is such a folder, goes on from there."""

    def __init__(self, step: int, num_steps: int, checkpoints: Path | None) -> None:
        super().__init__(f"interrupted after {step} of {num_steps} steps")
        self.step, self.num_steps, self.checkpoints = step, num_steps, checkpoints


def finetune(
    model: Any,
    tokenizer: Any,
    data: DataSet,
    settings: FineTuneSettings,
    *,
    profile: Profile | None = None,
    loss_before: float | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_trained: Callable[[Any], None] | None = None,
    measure: Callable[..., dict[str, float]] = measure_importance,
    save: Path | None = None,
    energy: EnergyMeter | None = None,
    watchers: Sequence[Watcher] = (),
    checkpoints: Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
) -> FineTuneResult:
    """Train ``model`` in place for ``settings.steps`` steps, on the device that it is on.

    ``measure``, ``energy``, ``watchers``, ``checkpoints`` and ``resume`` are as of :class:`GreenTrainer`, which has the
    epochs of ``data``; ``energy`` to the first process alone. A total that is spent ends the training, with the
    reason in the log; Ctrl-C is an InterruptedRunError. A run is resumed with what it was begun with: InputError names
    what is other.

    ``profile`` (of the model as it comes) and ``loss_before`` are taken as known where given. Two runs from the same
    weights and settings, on the same machine with the same number of threads, give the same losses. As soon as it is
    trained, the model, or its adapters alone, is written to the folder ``save``; ``on_trained`` is called with it,
    adapters included. In a process group that was started, every process calls this, and trains on batches of its own.
    """
    chosen = scheme(settings.scheme)
    device = next(model.parameters()).device
    sizes: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "seq_len": settings.seq_len,
        "target_len": settings.target_len if model.config.is_encoder_decoder else None,
    }
    if not data.validation:
        raise InputError(f"{data.name} has no validation examples; expected at least one to measure the loss on")
    if checkpoints is not None:
        _begin_or_go_on(checkpoints, resume, _options(model, data, settings))
    epochs = settings.num_epochs(len(data.train), processes.count())
    loader = EpochBatches(
        data.train,
        tokenizer,
        seed=settings.seed,
        device=device,
        part=processes.rank() if processes.count() > 1 else 0,
        parts=processes.count(),
        grouped=settings.trim is not None,
        **sizes,
    )
    held_out = [
        on_device(batch, device) for batch in in_order(data.validation[: settings.num_validation], tokenizer, **sizes)
    ]
    first = next(iter(loader))
    model.requires_grad_(True).train()
    base = profile or profile_of(model, first)
    loss_before = mean_loss(model, held_out) if loss_before is None else loss_before

    trainer: GreenTrainer | None = None

    def decay(step: int) -> float:
        """To 0 at the last step, or where a total that may be spent before it will be."""
        spent = 0.0 if trainer is None else _spent(trainer)
        return max(0.0, 1 - max(step / settings.steps, spent))

    torch.manual_seed(settings.seed + processes.rank())  # for dropout, which each process draws by itself
    trained = chosen.prepare(model).train()
    costs = base if trained is model and settings.uses is None else profile_of(trained, first, uses=settings.uses)
    optimizer = torch.optim.AdamW(
        [tensor for tensor in trained.parameters() if tensor.requires_grad], lr=settings.learning_rate
    )
    trainer = GreenTrainer(
        processes.in_ddp(trained),
        optimizer,
        costs if settings.trim is None else first,
        settings.budget if chosen.budgeted else None,
        settings.every,
        until=None if settings.until is None else Total(flops=settings.until),
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, decay),
        count_executed=settings.count_executed,
        allow_unsupported=settings.allow_unsupported,
        granularity=settings.granularity,
        must_train=settings.must_train,
        must_freeze=settings.must_freeze,
        reuse=None if settings.store is None else "prefix",
        store=settings.store,
        uses=settings.uses,
        trim=settings.trim,
        measure=measure,
        energy=energy if processes.rank() == 0 else None,
        choose=None if chosen.choose is None else chosen.choose(settings.seed),
    )
    counted: CountedStep | None = None
    unpriced = {"allow_unsupported": settings.allow_unsupported}

    def count_then_report(record: StepRecord) -> None:
        nonlocal counted
        if counted is None:  # after the first step, so that the first selection is in force
            counted = count_step(trained, trainer.profile, trainer.trimmed(first), **unpriced)
        if on_step is not None:
            on_step(record)

    torch.manual_seed(settings.seed)  # whatever the scheme drew, dropout is the same
    try:
        with PeakMemory(trained) as peak:
            trainer.fit(
                loader,
                epochs=epochs,
                num_steps=settings.steps,
                accumulate=settings.accumulate,
                on_step=count_then_report,
                watchers=watchers,
                checkpoints=checkpoints,
                checkpoint_every=checkpoint_every,
                resume=resume,
            )
    except KeyboardInterrupt as error:
        raise InterruptedRunError(len(trainer.log.steps), settings.steps, None) from error
    if trainer.interrupted:
        raise InterruptedRunError(len(trainer.log.steps), settings.steps, checkpoints)
    if not trainer.log.steps:
        raise BudgetSpentError(f"no step was made: {trainer.log.stopped}; expected a larger total")
    if counted is None:  # resumed after its last step
        counted = count_step(trained, trainer.profile, trainer.trimmed(first), **unpriced)
        trainer.untrim()
    if save is not None and processes.rank() == 0:
        trained.save_pretrained(save)
        tokenizer.save_pretrained(save)
    if on_trained is not None:
        on_trained(trained)
    return FineTuneResult(
        scheme=chosen,
        log=trainer.log,
        profile=trainer.profile,
        base=base,
        selection=trainer.selection,
        trained=tuple(name for name, tensor in trained.named_parameters() if tensor.requires_grad),
        loss_before=loss_before,
        loss_after=mean_loss(trained, held_out),
        quality=_quality(trained, tokenizer, data, settings),
        counted=counted,
        memory=peak.memory,
        batches_per_step=settings.accumulate * processes.count(),
    )


def _spent(trainer: GreenTrainer) -> float:
    """The share of its total that a run has spent which may end before its last step; 0 for any other."""
    budget, log = trainer.budget, trainer.log
    totals = (trainer.until, budget.total if isinstance(budget, Auto) else None)
    flops = [total.flops for total in totals if total is not None and total.flops is not None]
    return (log.planned_flops + log.measuring_flops) / min(flops) if flops else 0.0


def _begin_or_go_on(folder: Path, resume: bool, options: Mapping[str, object]) -> None:
    if resume:
        require_as_begun(folder, options)
    elif there := sorted(folder.glob("step-*")):
        raise InputError(f"{folder} has {there[-1].name} of another run; expected an empty folder, or to resume")
    elif processes.rank() == 0:
        write_beginning(folder, options)


def _options(model: Any, data: DataSet, settings: FineTuneSettings) -> dict[str, object]:
    """What the steps of a run depend on, by the names of the options of ``gtflops train``.

    The number of steps is one of them: the learning rate falls to 0 at the last. What is measured on the way, and on
    which device, is not.
    """
    fixed = [field.name for field in fields(settings) if field.name not in _FREE]
    examples = (text for one in data.train for text in (one.source, one.cue, one.target))
    return {
        "number of processes": processes.count(),
        "--model": f"{type(model).__name__} with weights {digest_of_weights(model)}",
        "--attention": model.config._attn_implementation,
        "--data": f"{len(data.train)} training examples {digest_of_texts(examples)}",
        "--store": settings.store is not None,
        **{f"--{name.replace('_', '-')}": getattr(settings, name) for name in fixed},
    } | ({} if scheme(settings.scheme).budgeted else {"--budget": None})


#: Settings that no step depends on; a run may go on with others, and with its store in another folder.
_FREE = ("num_validation", "num_quality", "count_executed", "allow_unsupported", "store")


def _quality(model: Any, tokenizer: Any, data: DataSet, settings: FineTuneSettings) -> dict[str, float]:
    if settings.num_quality == 0:
        return {}
    return quality(
        model,
        tokenizer,
        data.validation[: settings.num_quality],
        data.metric,
        seq_len=settings.seq_len,
        target_len=settings.target_len,
        batch_size=settings.batch_size,
    )


def count_step(model: Any, costs: Profile, batch: Batch, *, allow_unsupported: bool = False) -> CountedStep:
    """Run forward and backward once under both counters, and drop the gradients: the run is as it was."""
    device = batch["input_ids"].device
    unchanged_random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with unchanged_random_state, ExecutedFlops() as executed, FlopCounterMode(display=False) as pytorch:
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    return CountedStep(
        planned_matmul=costs.step_flops(model, ops="matmul").total,
        pytorch_matmul=pytorch.get_total_flops(),
        planned=costs.step_flops(model).total,
        executed=sum(executed.flops) if allow_unsupported else executed.total,
    )

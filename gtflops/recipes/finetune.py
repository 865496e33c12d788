"""Fine-tune a causal language model under a budget, and say what it cost and what it brought."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gtflops.capture import ExecutedFlops
from gtflops.profiling import Profile
from gtflops.recipes.datasets import IGNORED, Batch, Example, batches
from gtflops.selection import Selection
from gtflops.training import GreenTrainer, StepRecord, TrainingLog, processes


@dataclass(frozen=True, kw_only=True)
class FineTuneSettings:
    """What a run depends on besides model and data."""

    steps: int
    batch_size: int = 4
    seq_len: int = 224
    budget: float | None = 0.5
    """Share of a full step's FLOPs; None trains everything."""
    every: int = 100
    """Optimizer steps between selections."""
    learning_rate: float = 5e-5
    """Peak of AdamW's linear decay to zero, without warm-up (the published recipe's schedule)."""
    seed: int = 0
    """Of the order of the examples and of dropout."""
    allow_unsupported: bool = False
    """Count operators without a price as free."""


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
    """A run: its log, mean validation loss a target token before and after, and one counted step."""

    log: TrainingLog
    profile: Profile
    selection: Selection | None
    loss_before: float
    loss_after: float
    counted: CountedStep


def finetune(
    model: Any,
    tokenizer: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    settings: FineTuneSettings,
    *,
    profile: Profile | None = None,
    loss_before: float | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> FineTuneResult:
    """Train ``model`` in place for ``settings.steps`` steps.

    ``profile`` and ``loss_before`` are taken as known where given. Two runs from the same weights and settings, on
    the same machine with the same number of threads, give the same losses. In a process group that was started, every
    process calls this, and trains on batches of its own.
    """
    torch.manual_seed(settings.seed + processes.rank())  # for dropout, which each process draws by itself
    sizes = {"batch_size": settings.batch_size, "seq_len": settings.seq_len}
    device = next(model.parameters()).device
    shared = processes.share(batches(train, tokenizer, seed=settings.seed, **sizes))
    stream = ({name: tensor.to(device) for name, tensor in batch.items()} for batch in shared)
    held_out = list(islice(batches(validation, tokenizer, **sizes), len(validation) // settings.batch_size))
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / settings.steps))
    first = next(stream)
    trainer = GreenTrainer(
        processes.in_ddp(model),
        optimizer,
        profile or first,
        settings.budget,
        settings.every,
        scheduler=scheduler,
        allow_unsupported=settings.allow_unsupported,
    )
    if loss_before is None:
        loss_before = mean_loss(model, held_out)
    counted: CountedStep | None = None

    def count_then_report(record: StepRecord) -> None:
        nonlocal counted
        if counted is None:  # after the first step, so that the first selection is in force
            counted = count_step(trainer, first)
        if on_step is not None:
            on_step(record)

    trainer.fit([first, *islice(stream, settings.steps - 1)], on_step=count_then_report)
    assert counted is not None
    return FineTuneResult(
        log=trainer.log,
        profile=trainer.profile,
        selection=trainer.selection,
        loss_before=loss_before,
        loss_after=mean_loss(model, held_out),
        counted=counted,
    )


def mean_loss(model: Any, held_out: Sequence[Batch]) -> float:
    """Mean negative log-likelihood of a target token over all batches, in evaluation mode."""
    model.eval()
    total, num_targets = 0.0, 0
    with torch.no_grad():
        for batch in held_out:
            targets = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss) * targets
            num_targets += targets
    model.train()
    return total / num_targets if num_targets else math.nan


def count_step(trainer: GreenTrainer, batch: Batch) -> CountedStep:
    """Run forward and backward once under both counters, and drop the gradients: the run is as it was."""
    state = torch.random.get_rng_state()
    with ExecutedFlops() as executed, FlopCounterMode(display=False) as pytorch:
        trainer.model(**batch).loss.backward()
    torch.random.set_rng_state(state)
    trainer.optimizer.zero_grad(set_to_none=True)
    return CountedStep(
        planned_matmul=trainer.profile.step_flops(trainer.model, ops="matmul").total,
        pytorch_matmul=pytorch.get_total_flops(),
        planned=trainer.profile.step_flops(trainer.model).total,
        executed=trainer.executed_flops(executed),
    )

"""What a step under a budget takes, what gtflops adds to an epoch, and the memory at its highest: SmolLM2-135M.

Each is compared in one run. A full step of fine-tuning goes before each step or measurement that is compared to it, so
that a busy machine slows both down alike: a share is the median over these pairs.
"""

import copy
import itertools
import multiprocessing
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

import gtflops
from gtflops.importance import expected_drop
from gtflops.problem import Problem
from gtflops.recipes.datasets import load
from gtflops.recipes.memory import PeakMemory
from gtflops.recipes.models import SMOLLM2, load_pretrained
from gtflops.recipes.schemes import scheme
from gtflops.reuse import ActivationStore, Prefix
from gtflops.sources import Live
from gtflops.training.pricing import Prices

ROUNDS = 3
BATCH_SIZE, SEQ_LEN, LONGEST = 4, 128, 192
STEPS = 500
BUDGETS = {f"budget {share}": share for share in (0.36, 0.4, 0.5, 0.6, 0.7, 0.8)}

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Smol:
    """The model with an optimizer that has made a step of all its tensors, a batch, and what steps on it cost."""

    model: Any
    optimizer: torch.optim.Optimizer
    longest: Batch
    batch: Batch
    profile: gtflops.Profile
    importance: dict[str, float]

    def step(self, names: Collection[str]) -> tuple[float, float]:
        """Seconds of a step that trains the named tensors, and of its forward and backward pass alone."""
        train_only(self.model, names)
        return one_step(self.model, self.optimizer, self.batch)

    def full_step(self) -> tuple[float, float]:
        return self.step(self.profile.names)


def texts(tokenizer: Any) -> Batch:
    """Text of ACLSum without padding, to be learnt by heart."""
    ids = tokenizer(" ".join(example.source for example in load("aclsum").train[:8]))["input_ids"]
    return batch_of(torch.tensor(ids[: BATCH_SIZE * LONGEST]).view(BATCH_SIZE, LONGEST))


def batch_of(ids: torch.Tensor) -> Batch:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def train_only(model: Any, names: Collection[str]) -> None:
    chosen = set(names)
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(name in chosen)
        tensor.grad = None


def adamw(model: Any) -> torch.optim.Optimizer:
    """As the recipes have it."""
    return torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], lr=5e-5)


def one_step(model: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[float, float]:
    start = time.perf_counter()
    model(**batch).loss.backward()
    passes = time.perf_counter() - start
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start, passes


@pytest.fixture(scope="module")
def smol() -> Smol:
    pretrained = load_pretrained(SMOLLM2)
    longest = texts(pretrained.tokenizer)
    batch = {name: tensor[:, :SEQ_LEN] for name, tensor in longest.items()}
    model, optimizer = pretrained.model, adamw(pretrained.model)
    one_step(model, optimizer, batch)
    importance = gtflops.measure_importance(model, [batch], optimizer)
    return Smol(model, optimizer, longest, batch, gtflops.profile(model, batch), importance)


# --- time against FLOPs ---------------------------------------------------------------------------------------------


def measure_share(benchmark: Any, smol: Smol, name: str, flops: int, one: Any) -> None:
    """``one()`` beside full steps, each its seconds and those of its passes."""
    own: list[tuple[float, float]] = []
    full: list[tuple[float, float]] = []
    one()  # warm-up
    benchmark.pedantic(
        lambda: own.append(one()),
        setup=lambda: full.append(smol.full_step()),
        rounds=ROUNDS,
    )
    steps, passes = ([a[part] / b[part] for a, b in zip(own, full, strict=True)] for part in (0, 1))
    benchmark.extra_info.update(
        {
            "table": "step time",
            "trained": name,
            "share of FLOPs": flops / smol.profile.full_flops,
            "share of time": median(steps),
            "least and greatest": [min(steps), max(steps)],
            "of both passes": median(passes),
            "seconds": median(seconds for seconds, _ in own),
        }
    )


@pytest.mark.parametrize("name", [*BUDGETS, "everything"])
def test_step_of_a_selection(benchmark: Any, smol: Smol, name: str) -> None:
    names = smol.profile.names
    if name in BUDGETS:
        limit = int(BUDGETS[name] * smol.profile.full_flops)
        least = Problem.of(smol.profile, smol.importance).smallest
        names = gtflops.select(smol.profile, smol.importance, budget_flops=max(limit, least)).names
        name += " (infeasible: the least that is feasible)" if limit < least else ""
    measure_share(benchmark, smol, name, smol.profile.step_flops(names).total, lambda: smol.step(names))


def test_step_of_lora(benchmark: Any, smol: Smol) -> None:
    model = scheme("lora").prepare(copy.deepcopy(smol.model).requires_grad_(True)).train()
    optimizer = adamw(model)
    flops = gtflops.profile(model, smol.batch).step_flops(model).total
    measure_share(benchmark, smol, "LoRA", flops, lambda: one_step(model, optimizer, smol.batch))


@pytest.mark.parametrize("budget", [0.2, 0.3, 0.5])
def test_step_from_stored_activations(benchmark: Any, smol: Smol, budget: float, tmp_path: Path) -> None:
    """Of a later epoch, reading and checking what is stored included."""
    names = gtflops.select(smol.profile, smol.importance, budget, reuse="prefix", epochs_left=5).names
    step = smol.profile.step_flops(names, reuse="prefix")
    model = copy.deepcopy(smol.model)  # full steps of the other, in between, change what lies below the boundary
    train_only(model, names)
    optimizer = adamw(model)
    prefix = Prefix(model, step.blocks, ActivationStore(tmp_path))

    def one() -> tuple[float, float]:
        start = time.perf_counter()
        with prefix.for_batch(smol.batch):
            loss = model(**smol.batch).loss
        loss.backward()
        passes = time.perf_counter() - start
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start, passes

    one()  # stores
    name = f"budget {budget} with reuse over 5 epochs"
    measure_share(benchmark, smol, name, step.total, one)
    assert prefix.statistics.examples_computed == BATCH_SIZE
    benchmark.extra_info["bytes per example"] = prefix.statistics.bytes_written // BATCH_SIZE


# --- what is added to an epoch --------------------------------------------------------------------------------------


def note_part(benchmark: Any, part: str, per: str, **besides: float) -> None:
    """``per`` is what it is done once for: a run, a selection or an epoch's steps."""
    benchmark.extra_info.update({"table": "added", "part": part, "per": per, **besides})


def a_trainer(smol: Smol, budget: float = 0.5) -> gtflops.GreenTrainer:
    """One whose importances are there already: every other selection goes by them upside down, so that much flips."""
    upside_down = dict(zip(smol.importance, reversed(smol.importance.values()), strict=True))
    measured = itertools.cycle([smol.importance, upside_down])
    smol.model.requires_grad_(True)
    return gtflops.GreenTrainer(
        smol.model,
        smol.optimizer,
        smol.batch,
        budget,
        every=STEPS,
        measure=lambda *_, **__: next(measured),
    )


def test_trace(benchmark: Any, smol: Smol) -> None:
    note_part(benchmark, "trace", "run")
    benchmark.pedantic(lambda: gtflops.profile(smol.model, smol.batch), rounds=3, warmup_rounds=1)


def test_importance(benchmark: Any, smol: Smol) -> None:
    full: list[float] = []
    own: list[float] = []

    def measure() -> None:
        start = time.perf_counter()
        gtflops.measure_importance(smol.model, [smol.batch], smol.optimizer)
        own.append(time.perf_counter() - start)

    benchmark.pedantic(measure, setup=lambda: full.append(smol.full_step()[0]), rounds=ROUNDS)
    note_part(benchmark, "importance", "selection", steps=median(a / b for a, b in zip(own, full, strict=True)))


def test_selection_and_flips(benchmark: Any, smol: Smol) -> None:
    note_part(benchmark, "selection and flips", "selection")
    trainer = a_trainer(smol)
    benchmark.pedantic(lambda: trainer.select(smol.batch), rounds=20, warmup_rounds=1)


def test_check_of_the_estimate(benchmark: Any, smol: Smol) -> None:
    """As the loop does it: the predicted drop before the optimizer's step, and the loss again after it. Of an estimate
    that holds, at a rate that does not rise, once in an epoch of this length."""
    note_part(benchmark, "check of the estimate", "run")
    names = gtflops.select(smol.profile, smol.importance, 0.5).names

    def with_gradients() -> None:
        train_only(smol.model, names)
        smol.model(**smol.batch).loss.backward()

    def check() -> None:
        expected_drop(smol.model, smol.optimizer)
        with torch.no_grad():
            smol.model(**smol.batch).loss.item()

    benchmark.pedantic(check, setup=with_gradients, rounds=3, warmup_rounds=1)
    smol.optimizer.zero_grad()


def varying_epoch(smol: Smol) -> list[Batch]:
    """Batches of 64 to 192 tokens in random order."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(SEQ_LEN // 2, LONGEST + 1, (STEPS,), generator=generator).tolist()
    return [{name: tensor[:, :size] for name, tensor in smol.longest.items()} for size in drawn]


@pytest.mark.parametrize("lengths", ["one shape", "varying shapes"])
def test_step_boundaries(benchmark: Any, smol: Smol, lengths: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an epoch whose batches are as long as each other, or not: all but the steps themselves. What of it is tracing,
    and pricing lengths that are new, is said besides."""
    epoch = [smol.batch] * STEPS if lengths == "one shape" else varying_epoch(smol)
    seconds = {"in traces": 0.0, "in pricing": 0.0}

    def timed(part: str, owner: type, name: str) -> None:
        function = getattr(owner, name)

        def run(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                seconds[part] += time.perf_counter() - start

        monkeypatch.setattr(owner, name, run)

    timed("in traces", Live, "trace")
    timed("in pricing", Prices, "of")

    def setup() -> tuple[tuple[gtflops.GreenTrainer], dict[str, Any]]:
        trainer = a_trainer(smol)
        trainer.step_boundary(smol.batch)  # the selection is counted by itself
        seconds.update(dict.fromkeys(seconds, 0.0))
        return (trainer,), {}

    def boundaries(trainer: gtflops.GreenTrainer) -> None:
        trainer.every = 2 * STEPS
        for batch in epoch:
            trainer.step_boundary(batch)

    full = smol.full_step()[0]
    benchmark.pedantic(boundaries, setup=setup, rounds=1)
    steps = benchmark.stats.stats.total / full
    in_traces, in_pricing = seconds["in traces"], seconds["in pricing"] - seconds["in traces"]
    note_part(
        benchmark,
        f"{STEPS} step boundaries, {lengths}",
        "epoch",
        steps=steps,
        **{"in traces": in_traces, "in pricing": in_pricing},
    )
    smol.model.requires_grad_(True)


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_of(name: str) -> int:
    """Bytes at the peak of three steps, the first with a selection where there is a budget."""
    pretrained = load_pretrained(SMOLLM2)
    batch = {key: tensor[:, :SEQ_LEN] for key, tensor in texts(pretrained.tokenizer).items()}
    model = scheme("lora" if name == "LoRA" else "full").prepare(pretrained.model).train()
    trainer = gtflops.GreenTrainer(model, adamw(model), batch, BUDGETS.get(name), every=STEPS)
    with PeakMemory(model) as peak:
        trainer.fit([batch] * 3)
    assert peak.memory is not None, "the peak of memory is measured under Linux, or on a GPU"
    return peak.memory.peak_bytes


@pytest.mark.parametrize("name", ["everything", "budget 0.5", "LoRA"])
def test_peak_memory(benchmark: Any, name: str) -> None:
    """In a process of its own; its time is that of starting one as well."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = benchmark.pedantic(lambda: pool.apply(peak_of, (name,)), rounds=1)
    benchmark.extra_info.update({"table": "memory", "trained": name, "bytes": peak})

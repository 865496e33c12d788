"""How to spend FLOPs on a model and data: a short measurement, what each choice brings, and a recommendation."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
import torch

from gtflops.errors import InfeasibleBudgetError, InputError, UnsupportedModelError
from gtflops.forms import Solution
from gtflops.importance import measure_importance
from gtflops.problem import Problem, limit_of
from gtflops.profiling import Profile
from gtflops.profiling import profile as profile_of
from gtflops.recipes.batches import EpochBatches, encode
from gtflops.recipes.datasets import DataSet
from gtflops.recipes.models import Pretrained
from gtflops.recipes.schemes import blocks_of, scheme
from gtflops.selection import Selection, selection_of
from gtflops.spending import OperatingPoint, Spending, point_of

#: Shares of a full step whose best selections are shown, besides everything; those below the forward pass need reuse.
BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True)
class AdviceSettings:
    """What the advice depends on besides model and data."""

    total_flops: float | None = None
    """What the whole run may spend; without it, choices are held against each other by FLOP."""
    epochs: int = 3
    """Passes over the data, at most; what is reused is stored in the first."""
    batch_size: int = 4
    seq_len: int = 224
    target_len: int = 64
    """The length of an encoder-decoder's labels."""
    measure_on: int = 4
    """Batches that importance is averaged over; each takes as long as a full step."""
    learning_rate: float = 5e-5
    """Of AdamW, whose first update importance is measured by."""
    seed: int = 0
    """Of the order of the examples, and of dropout."""
    allow_unsupported: bool = False
    """Count operators without a price as free."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "seq_len", "target_len", "measure_on", "learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected a positive number")
        if self.total_flops is not None and not self.total_flops >= 1:
            raise InputError(f"total_flops is {self.total_flops}, expected a positive number of FLOPs")


@dataclass(frozen=True, slots=True)
class DeadWork:
    """What of a full step cannot bring anything, over all training examples as they are padded.

    ``positions`` are those of all inputs (of encoder and decoder), ``padding`` is how many of them are no tokens;
    ``supervised`` of the ``head_positions``, at which the head runs, have a label. FLOPs are shares of those of full
    steps: ``padding_flops`` by what steps of each example's own length cost, ``head_flops`` those of the head at
    positions without a label, in padding too; ``flops`` are both, where both are none of them twice. ``None`` where it
    cannot be told.
    """

    positions: int
    padding: int
    head_positions: int
    supervised: int
    padding_flops: float | None
    head_flops: float | None
    flops: float | None


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to spend FLOPs, and what is predicted of it.

    ``share`` is what a step costs, by a full step; with reuse on average over the epochs. ``captured`` is the share of
    all positive importance, ``per_flop`` importance per FLOP by that of training everything; ``None`` where it is not
    estimated. ``steps`` is how many the total pays for, at most those of the epochs, and ``gain`` the importance of
    all of them by that of training everything for as many as it pays for; ``None`` without a total.
    """

    name: str
    reuse: bool
    share: float
    captured: float | None
    per_flop: float | None
    steps: int | None
    gain: float | None


@dataclass(frozen=True)
class Advice:
    """What was measured of a model and data, what each choice brings, and what to do.

    ``num_steps`` are those of all epochs. ``point`` is the best selection without reuse, ``point_with_reuse`` with it
    (``None`` for a single epoch, and where reuse is refused); ``notes`` say what was left out, and why.
    """

    model: str
    data: str
    settings: AdviceSettings
    num_examples: int
    num_steps: int
    full_flops: int
    dead: DeadWork
    choices: tuple[Choice, ...]
    point: OperatingPoint
    point_with_reuse: OperatingPoint | None
    notes: tuple[str, ...]

    @property
    def best(self) -> OperatingPoint:
        """The point that is recommended."""
        return self.point if self.point_with_reuse is None else self.point_with_reuse

    @property
    def recommendation(self) -> tuple[str, ...]:
        """What to do, in plain sentences, and how far it can be trusted."""
        sentences = [_sentence(self.best.reason)]
        if self.best.reuses:
            sentences.append(_sentence(f"without reuse, {self.point.reason}"))
        batches = self.settings.measure_on
        sentences.append(
            f"Importance is a first-order estimate of the coming step, measured on {batches} "
            f"batch{'' if batches == 1 else 'es'} before the first step and taken to hold for all of them, at one "
            "learning rate for all choices: what trains a part often stands a higher one, and then brings more."
        )
        return tuple(sentences)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        reuse = self.point_with_reuse
        return {
            "model": self.model,
            "data": self.data,
            "settings": asdict(self.settings),
            "num_examples": self.num_examples,
            "num_steps": self.num_steps,
            "full_flops": self.full_flops,
            "dead_work": asdict(self.dead),
            "choices": [asdict(choice) for choice in self.choices],
            "point": self.point.to_json(),
            "point_with_reuse": None if reuse is None else reuse.to_json(),
            "recommendation": list(self.recommendation),
            "notes": list(self.notes),
        }


def advise(
    pretrained: Pretrained,
    data: DataSet,
    settings: AdviceSettings,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Advice:
    """Measure what a step costs, what its dead work is and where importance lies, and say how to spend a total.

    Weights are afterwards as they were. The batches are the first that ``finetune`` would train on with the same seed.
    InputError for data that do not fill a batch; UnsupportedOperatorError as :func:`gtflops.select`.
    """
    model, tokenizer = pretrained.model, pretrained.tokenizer
    target_len = settings.target_len if model.config.is_encoder_decoder else None
    on_stage("encoding the examples")
    loader = EpochBatches(
        data.train,
        tokenizer,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        seed=settings.seed,
        target_len=target_len,
        device=next(model.parameters()).device,
    )
    batches = list(islice(loader, settings.measure_on))
    on_stage("tracing a step")
    model.requires_grad_(True).train()
    costs = profile_of(model, batches[0])
    if not settings.allow_unsupported:
        costs.require_prices()
    on_stage("counting dead work")
    lengths = [
        (len(row.prompt), len(row.target))
        for row in (encode(one, tokenizer, seq_len=settings.seq_len, target_len=target_len) for one in data.train)
    ]
    dead = dead_work(costs, lengths, settings.seq_len, target_len, head=_head_of(model))
    on_stage(f"measuring importance on {len(batches)} batches")
    torch.manual_seed(settings.seed)  # for dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    importance = measure_importance(model, batches, optimizer)
    on_stage("selecting")
    num_steps = settings.epochs * len(loader)
    spending = None if settings.total_flops is None else Spending(Fraction(settings.total_flops), num_steps)
    notes: list[str] = []
    problem = Problem.of(costs, importance, allow_unsupported=settings.allow_unsupported)
    with_reuse: Problem | None = None
    if settings.epochs > 1:
        try:
            with_reuse = Problem.of(
                costs,
                importance,
                reuse="prefix",
                epochs_left=settings.epochs,
                allow_unsupported=settings.allow_unsupported,
            )
        except (InputError, UnsupportedModelError) as error:
            notes.append(f"reuse is left out: {error}")
    else:
        notes.append("reuse is left out: what is stored in an epoch is read in those after it, and there is one")
    point = point_of(problem, spending)
    table = _Table(point.everything, spending)
    fewer = spending is not None and (point.full_steps or 0) < num_steps
    choices = [table.choice("everything" + (", for fewer steps" if fewer else ""), table.everything)]
    points = [point]
    if with_reuse is not None:
        points.append(point_of(with_reuse, spending))
    choices += [
        table.choice("the best selection", one.selection)
        for one in points
        if not one.trains_everything and _differs(one.selection)
    ]
    for ways in (_by_budget, _top_layers):
        for one in (problem,) if with_reuse is None else (problem, with_reuse):
            choices += [table.choice(name, chosen) for name, chosen in ways(one)]
    on_stage("tracing a step with adapters")
    try:
        choices.append(table.choice_of("LoRA, rank 8 on queries and values", _lora_flops(model, batches[0])))
    except InputError as error:
        notes.append(f"LoRA is left out: {error}")
    return Advice(
        model=pretrained.source,
        data=data.name,
        settings=settings,
        num_examples=len(data.train),
        num_steps=num_steps,
        full_flops=costs.full_flops,
        dead=dead,
        choices=tuple(choices),
        point=point,
        point_with_reuse=None if with_reuse is None else points[-1],
        notes=tuple(notes),
    )


# --- dead work --------------------------------------------------------------------------------------------------


def dead_work(
    costs: Profile, lengths: Sequence[tuple[int, int]], seq_len: int, target_len: int | None, head: str | None
) -> DeadWork:
    """Of examples with so many tokens of prompt and of target, padded to ``seq_len`` (and labels to ``target_len``).

    ``costs`` is of a padded batch of a model that is still there; ``head`` the path of its head, if it has one.
    """
    number = len(lengths)
    tokens: Counter[tuple[int, int | None]]
    if target_len is None:
        tokens = Counter((prompt + target, None) for prompt, target in lengths)
        positions = head_positions = number * seq_len
        # What is predicted at a position is the next token: the first of all has none before it.
        supervised = sum(min(target, prompt + target - 1) for prompt, target in lengths)
        head_padding = positions - sum(prompt + target for prompt, target in lengths)
        padding = head_padding
    else:
        tokens = Counter((prompt, target) for prompt, target in lengths)
        positions, head_positions = number * (seq_len + target_len), number * target_len
        supervised = sum(target for _, target in lengths)
        head_padding = head_positions - supervised
        padding = positions - sum(prompt + target for prompt, target in lengths)
    padding_flops: float | None = None
    with suppress(InputError):  # a batch whose sizes cannot be told apart
        # The shortest first: between two lengths that were traced, others need no trace.
        lengths_in_order = sorted(tokens.items(), key=lambda item: item[0][0])
        own = sum(
            times * costs.at(seq_len=one, decoder_len=other).full_flops for (one, other), times in lengths_in_order
        )
        padding_flops = 1 - own / (number * costs.full_flops)
    head_flops = both = None
    if head is not None:
        of_head = costs.by_module()[head].total / costs.full_flops / head_positions
        head_flops = of_head * (head_positions - supervised)
        if padding_flops is not None:
            both = padding_flops + of_head * (head_positions - head_padding - supervised)
    return DeadWork(positions, padding, head_positions, supervised, padding_flops, head_flops, both)


def _head_of(model: Any) -> str | None:
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None)


# --- choices ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """What choices are held against: training everything, under a total or by FLOP."""

    everything: Selection
    spending: Spending | None

    def choice(self, name: str, selection: Selection) -> Choice:
        full = self.everything
        per_flop = selection.value / full.value * full.flops / selection.flops
        steps = gain = None
        if self.spending is not None:
            paid = self.spending.steps(selection)
            steps, gain = int(paid), selection.value / full.value * float(paid / self.spending.steps(full))
        return Choice(
            name=name,
            reuse=selection.epochs_left is not None,
            share=selection.flops / full.profile.full_flops,
            captured=selection.importance_captured,
            per_flop=per_flop,
            steps=steps,
            gain=gain,
        )

    def choice_of(self, name: str, flops: int) -> Choice:
        """One of other parameters than the model's, whose importance says nothing of them."""
        steps = None
        if self.spending is not None:
            steps = min(self.spending.num_steps, int(self.spending.total / flops))
        return Choice(name, False, flops / self.everything.profile.full_flops, None, None, steps, None)


def _by_budget(problem: Problem) -> Iterator[tuple[str, Selection]]:
    """The best selection at each budget that one fits."""
    for budget in BUDGETS:
        limit = limit_of(problem.profile, budget=budget)
        with suppress(InfeasibleBudgetError):
            chosen = selection_of(problem, limit, problem.solve(limit))
            if _differs(chosen):
                yield f"selection at {budget:g}", chosen


def _top_layers(problem: Problem) -> Iterator[tuple[str, Selection]]:
    """The blocks nearest to the loss and nothing else: two of them, a quarter, and half."""
    block_of = blocks_of(problem.profile.names)
    order = list(dict.fromkeys(block for block in block_of.values() if block))
    for number in sorted({2, len(order) // 4, len(order) // 2} - {0}):
        if number < len(order):
            mask = np.array([block_of[name] in order[:number] for name in problem.profile.names], dtype=np.bool_)
            value, cost = math.fsum(problem.values[mask]), problem.exact.total(mask)
            chosen = selection_of(problem, cost, Solution(mask, value, value, optimal=False))
            if _differs(chosen):
                yield f"top {number} of {len(order)} layers", chosen


def _differs(selection: Selection) -> bool:
    """False for one with reuse that leaves nothing out: it is what it is without."""
    return selection.epochs_left is None or selection.reuses


def _lora_flops(model: Any, batch: Any) -> int:
    """FLOPs of a step of the scheme lora; the model is given back without adapters."""
    with warnings.catch_warnings(action="ignore"):  # of PEFT's about names in transformers
        adapted = scheme("lora").prepare(model)
    try:
        trained = [name for name, tensor in adapted.named_parameters() if tensor.requires_grad]
        return profile_of(adapted.train(), batch).step_flops(trained).total
    finally:
        adapted.unload().requires_grad_(True)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."

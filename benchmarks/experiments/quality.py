"""Quality at equal total FLOPs: runs what is not done yet of the plan in cells.py, until it is ended.

``make experiment-quality``: Ctrl-C ends it; what is done is kept, a file a run in ``results/quality``, and is skipped
the next time; several of them share the work. SmolLM2-135M on ACLSum (and on reviews, whose ratings are to be told, in
fewer cells), in batches of 4 by length without padding, with
the head at target positions alone, for every scheme alike; matrix products in bfloat16 by autocast, weights and
optimizer in float32.
"""

import argparse
import copy
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from experiments import drug_reviews
from experiments.cells import DATA_SETS, EPOCHS, REVIEWS, Cell, plan, result_of
from experiments.provenance import provenance
from experiments.rules import RULES, ByRule
from gtflops.errors import GtflopsError, InfeasibleBudgetError
from gtflops.families import IGNORED
from gtflops.files import write_whole
from gtflops.importance import measure_importance
from gtflops.recipes.batches import EpochBatches, in_order
from gtflops.recipes.datasets import DataSet, Example, load
from gtflops.recipes.evaluation import generate
from gtflops.recipes.finetune import FineTuneResult, FineTuneSettings, finetune
from gtflops.recipes.models import SMOLLM2, Pretrained, load_pretrained
from gtflops.training import Auto, EnergyMeter, Total
from gtflops.training.loop import Every
from gtflops.training.pricing import Prices
from gtflops.trimming import Trim

BATCH_SIZE = 4
#: Test examples that a text is generated for.
NUM_TEXTS = 150
#: Steps after which LISA draws blocks anew, and after which *often* selects.
LISA_EVERY, OFTEN = 10, 25
TWO_PASS = partial(measure_importance, method="two-pass")


def settings_of(cell: Cell, data: DataSet, flops: int, store: Path) -> FineTuneSettings:
    """What a run depends on; ``flops`` is what it may spend in all."""
    steps_in_epoch = len(data.train) // BATCH_SIZE
    common = FineTuneSettings(
        steps=100 * steps_in_epoch,
        until=flops,
        batch_size=BATCH_SIZE,
        seq_len=data.seq_len,
        target_len=data.target_len,
        trim="auto",
        every="epoch",
        learning_rate=cell.rate,
        seed=cell.seed,
        num_validation=1,  # measured here, example by example
        count_executed=True,
    )
    name, _, budget = cell.scheme.partition("@")
    if name in RULES:
        return replace(common, scheme="greentrainer", budget=ByRule(float(budget), RULES[name], cell.seed))
    if name in ("gt", "two-pass", "once", "often"):
        every: Every = {"once": common.steps, "often": OFTEN}.get(name, "epoch")
        return replace(common, scheme="greentrainer", budget=float(budget), every=every)
    if name in ("auto", "reuse"):
        of_run = replace(common, scheme="greentrainer", steps=cell.epochs * steps_in_epoch, store=store)
        if name == "auto":
            return replace(of_run, budget=Auto(Total(flops=flops)), until=None)
        # A share of each step, since a total is spread by the first batch, which is of the longest examples.
        return replace(of_run, budget=cell.total * EPOCHS / cell.epochs)
    return replace(common, scheme=name, every=LISA_EVERY if name == "lisa" else "epoch")


def epoch_flops(model: Any, tokenizer: Any, data: DataSet) -> int:
    """Of full steps over all training examples, without what the loss does not see."""
    prices = Prices(model, None)
    batches = EpochBatches(data.train, tokenizer, batch_size=BATCH_SIZE, seq_len=data.seq_len, seed=0, grouped=True)
    with Trim(model) as trim:
        return sum(prices.of(trim(batch)).full_flops for batch in batches)


def in_bfloat16(model: Any) -> Any:
    """The model, whose forward passes are each under autocast, so that no cast of a weight outlives a step."""
    autocast = torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16)

    def enter(*_: Any) -> None:
        autocast.__enter__()

    def leave(*_: Any) -> None:
        autocast.__exit__(None, None, None)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
    return model


def losses(model: Any, tokenizer: Any, examples: Sequence[Example], data: DataSet) -> dict[str, list[float]]:
    """The sum over its target's tokens, for each example, and how many tokens these are."""
    model.eval()
    by_length = sorted(range(len(examples)), key=lambda index: len(examples[index].source))
    ordered = [examples[index] for index in by_length]
    found: list[tuple[float, int]] = []
    with torch.no_grad(), Trim(model) as trim:
        for batch in in_order(ordered, tokenizer, batch_size=BATCH_SIZE, seq_len=data.seq_len):
            labels = batch["labels"][:, 1:]  # a first one has no position to be predicted from
            is_target = labels != IGNORED
            logits = model(**trim(batch)).logits
            # Of target positions alone, in the order of the batch, unless the model could not be trimmed.
            at_targets = logits[0] if logits.shape[0] == 1 else logits[:, -labels.shape[1] - 1 : -1][is_target]
            values = torch.nn.functional.cross_entropy(at_targets.float(), labels[is_target], reduction="none")
            counts = is_target.sum(1).tolist()
            found += [(float(part.sum()), count) for part, count in zip(values.split(counts), counts, strict=True)]
    in_order_of_data = [found[by_length.index(index)] for index in range(len(examples))]
    return {"losses": [value for value, _ in in_order_of_data], "tokens": [count for _, count in in_order_of_data]}


def texts(model: Any, tokenizer: Any, examples: Sequence[Example], data: DataSet) -> list[str]:
    """Greedy answers, after which the weights are in bfloat16."""
    by_length = sorted(range(len(examples)), key=lambda index: len(examples[index].source))
    answers = generate(
        model.to(torch.bfloat16),
        tokenizer,
        [examples[index] for index in by_length],
        seq_len=data.seq_len,
        target_len=data.target_len,
        batch_size=20,
    )
    return [answers[by_length.index(index)] for index in range(len(examples))]


def evaluated(model: Any, tokenizer: Any, data: DataSet, *, tunes: bool) -> dict[str, Any]:
    """What choices are made by, and what is for tables alone."""
    found = {"validation": losses(model, tokenizer, data.validation, data)}
    if tunes:
        return found
    if data.metric == "choices":
        return found | {"test": of_choices(model, tokenizer, data.test, data)}
    test = losses(model, tokenizer, data.test, data)
    return found | {"test": {**test, "texts": texts(model, tokenizer, data.test[:NUM_TEXTS], data)}}


def of_choices(model: Any, tokenizer: Any, examples: Sequence[Example], data: DataSet) -> dict[str, list[Any]]:
    """Losses of the targets, and which choice is the likeliest."""
    choices = examples[0].choices
    each = [losses(model, tokenizer, [replace(one, target=choice) for one in examples], data) for choice in choices]
    right = [choices.index(example.target) for example in examples]
    return {
        **{of: [each[choice][of][index] for index, choice in enumerate(right)] for of in ("losses", "tokens")},
        "chosen": [choices[int(np.argmin(values))] for values in zip(*(one["losses"] for one in each), strict=True)],
    }


def captured_by(names: Collection[str], pretrained: Pretrained, data: DataSet, cell: Cell) -> float:
    """Share of the importance that tensors have before the first step, for a scheme that measures none itself."""
    model = in_bfloat16(copy.deepcopy(pretrained.model)).train()
    batches = EpochBatches(
        data.train, pretrained.tokenizer, batch_size=BATCH_SIZE, seq_len=data.seq_len, seed=cell.seed, grouped=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=cell.rate)
    importance = measure_importance(model, [next(iter(batches))], optimizer)
    positive = {name: value for name, value in importance.items() if value > 0}
    return math.fsum(value for name, value in positive.items() if name in names) / math.fsum(positive.values())


def run(cell: Cell, pretrained: Pretrained, data: DataSet, flops_of_epoch: int) -> dict[str, Any]:
    """Train and measure; what came of it, as plain data."""
    started = time.perf_counter()
    tokenizer = pretrained.tokenizer
    model = copy.deepcopy(pretrained.model)
    in_bfloat16(model)
    result: dict[str, Any] = {"cell": asdict(cell), "epoch_flops": flops_of_epoch}
    if cell.scheme == "untrained":
        return result | evaluated(model, tokenizer, data, tunes=False)
    flops = int(cell.total * EPOCHS * flops_of_epoch)
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as store:
        try:
            made = finetune(
                model,
                tokenizer,
                data,
                settings_of(cell, data, flops, Path(store)),
                loss_before=math.nan,
                measure=TWO_PASS if cell.scheme.startswith("two-pass") else measure_importance,
                on_trained=lambda trained: measured.update(evaluated(trained, tokenizer, data, tunes=cell.tunes)),
                energy=EnergyMeter("FRA", tracking="process"),
            )
        except GtflopsError as error:
            if not (isinstance(error, InfeasibleBudgetError) or str(error).startswith("the loss is")):
                raise
            return result | {"failed": str(error)}
    if cell.scheme.startswith("top"):
        result["captured"] = captured_by(made.trained, pretrained, data, cell)
    return result | {"until": flops, **described(made), **measured, "seconds": time.perf_counter() - started}


def described(made: FineTuneResult) -> dict[str, Any]:
    log = made.log
    return {
        "steps": len(log.steps),
        "planned": log.planned_flops,
        "executed": log.executed_flops,
        "measuring": log.measuring_flops,
        "full": log.full_flops,
        "train_losses": [step.loss for step in log.steps],
        "train_seconds": log.seconds,
        "stopped": log.stopped,
        "energy": None if log.energy is None else {"tracking": "process", **asdict(log.energy)},
        "selections": [
            {
                "step": record.step,
                "tensors": len(record.names),
                "flops": record.flops,
                "full_flops": record.full_flops,
                "captured": record.importance_captured,
                "held": len(record.held),
                "reason": record.reason,
            }
            for record in log.selections
        ],
    }


@contextmanager
def claimed(cell: Cell) -> Iterator[bool]:
    """Whether no other process is at it."""
    claim = cell.path.with_suffix(".running")
    claim.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        if (at_work := claim.read_text()) != _process(at_work.partition(" ")[0]):
            claim.unlink(missing_ok=True)  # of one that was killed
    own = claim.with_suffix(f".{os.getpid()}.running")
    own.write_text(_process(str(os.getpid())))
    try:
        claim.hardlink_to(own)  # whole, or not at all
    except FileExistsError:
        yield False
        return
    finally:
        own.unlink()
    try:
        yield True
    finally:
        claim.unlink(missing_ok=True)


def _process(number: str) -> str:
    """A process by its number and when it began, as numbers come again; empty if it is gone."""
    try:
        after_its_name = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{number} {after_its_name[19]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=DATA_SETS, help="one set of data; all unless given")
    parser.add_argument("--most", type=int, help="runs to make; all unless given")
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    pretrained = load_pretrained(SMOLLM2)

    @cache
    def data_set(name: str) -> tuple[DataSet, int]:
        """With the FLOPs of a full epoch."""
        data = drug_reviews.load() if name == REVIEWS else load(name)
        flops = epoch_flops(in_bfloat16(copy.deepcopy(pretrained.model)), pretrained.tokenizer, data)
        print(f"{name}: a full epoch is {flops:,} FLOPs", flush=True)
        return data, flops

    left, made_by = math.inf if given.most is None else given.most, provenance("python -m experiments.quality")
    while left > 0:
        for cell in plan():
            if result_of(cell) is not None or given.data not in (None, cell.data):
                continue
            with claimed(cell) as is_ours:
                if not is_ours or result_of(cell) is not None:
                    continue
                started = time.perf_counter()
                result = run(cell, pretrained, *data_set(cell.data)) | {"made": made_by}
                write_whole(cell.path, json.dumps(result, indent=1) + "\n")
                print(f"{cell.data} {cell.name}: {time.perf_counter() - started:.0f} s", flush=True)
            break
        else:
            return
        left -= 1


if __name__ == "__main__":
    sys.exit(main())

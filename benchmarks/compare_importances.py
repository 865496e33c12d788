"""Writes compared_importances.json: training by the two measures of importance, `update="first"` and `update="next"`.

SmolLM2-135M on ACLSum at half of a full step's FLOPs, selecting anew every few steps, from the same weights, batches
and seed: about 10 minutes of one core. A run that is already there for the same settings is kept, so that the command
goes on where it was cut off: ``OMP_NUM_THREADS=1 .venv/bin/python benchmarks/compare_importances.py``.
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import gtflops
from gtflops.files import write_whole
from gtflops.recipes.datasets import aclsum, batches
from gtflops.recipes.finetune import mean_loss
from gtflops.recipes.models import SMOLLM2, load_pretrained

COMPARED = Path(__file__).with_name("compared_importances.json")
UPDATES = ("first", "next")


def run(update: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One training run that selects by ``update``; both measures are taken at each selection."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    pretrained = load_pretrained(SMOLLM2)
    model, tokenizer, num_steps = pretrained.model, pretrained.tokenizer, settings["steps"]
    sizes = {"batch_size": settings["batch_size"], "seq_len": settings["seq_len"]}
    stream = batches(aclsum("train"), tokenizer, seed=seed, **sizes)
    held_out = list(islice(batches(aclsum("val"), tokenizer, seed=0, **sizes), settings["validation_batches"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["learning_rate"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    names = {tensor: name for name, tensor in model.named_parameters()}
    profile = None
    losses = {0: mean_loss(model, held_out)}
    training, selections = [], []
    for step, batch in enumerate(islice(stream, num_steps)):
        if step % settings["every"] == 0:
            profile = profile or gtflops.profile(model, batch)
            measured = {
                kind: gtflops.measure_importance(model, [batch], optimizer, update=kind, scheduler=scheduler)
                for kind in UPDATES
            }
            chosen = gtflops.select(profile, measured[update], settings["budget"])
            trained_before = {names[tensor] for tensor in optimizer.state}
            chosen.apply(model)
            selections.append(
                {
                    "step": step,
                    "flops_share": chosen.flops / profile.full_flops,
                    "tensors": len(chosen.names),
                    "never_trained": len(set(chosen.names) - trained_before),
                    "captured": {kind: captured(values, chosen.names) for kind, values in measured.items()},
                    "of_never_trained": {
                        kind: captured(values, values.keys() - trained_before) for kind, values in measured.items()
                    },
                }
            )
        value = training_loss(model, batch)
        value.backward()
        predicted = gtflops.expected_drop(model, optimizer) if step % settings["every"] == 0 else None
        optimizer.step()
        if predicted is not None:
            with torch.no_grad():
                after = training_loss(model, batch).item()
            selections[-1] |= {"predicted_drop": predicted, "real_drop": value.item() - after}
        optimizer.zero_grad()
        scheduler.step()
        training.append(value.item())
        if (step + 1) % settings["validate_every"] == 0 or step + 1 == num_steps:
            losses[step + 1] = mean_loss(model, held_out)
            print(f"{update}, seed {seed}, step {step + 1}: validation {losses[step + 1]:.4f}", flush=True)
    return {
        "validation": losses,
        "training": training,
        "selections": selections,
        "tensors_ever_trained": len(optimizer.state),
        "seconds": time.perf_counter() - started,
    }


def training_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def captured(importance: dict[str, float], names: Any) -> float:
    """Share of all positive importance that these tensors hold."""
    return sum(importance[name] for name in names) / sum(value for value in importance.values() if value > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--validate-every", type=int, default=20)
    parser.add_argument("--validation-batches", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=COMPARED)
    settings = vars(parser.parse_args())
    output, seeds = settings.pop("output"), settings.pop("seeds")
    results: dict[str, Any] = {"settings": settings, "runs": {}}
    if output.exists() and (there := json.loads(output.read_text(encoding="utf-8")))["settings"] == settings:
        results = there
    for seed in seeds:
        for update in UPDATES:
            if f"{update}-{seed}" not in results["runs"]:
                results["runs"][f"{update}-{seed}"] = run(update, seed, settings)
                write_whole(output, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Tables of step time, overhead and memory, from what ``make experiment-time`` measured by bench_training.py."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_table import duration, marked, table, time_of

RAW = Path(__file__).with_name("results") / "training.json"
#: Steps of the epoch that bench_training.py is about, and the points by which time may exceed FLOPs.
STEPS, POINTS, POINTS_OF_REUSE = 500, 3.0, 5.0
#: Hours of OPT-2.7B on SciTLDR on one H100, as METHOD's source has them, by what is trained.
PUBLISHED_FULL = 0.92
PUBLISHED = {
    "everything": PUBLISHED_FULL,
    "LoRA": 0.59,
    "budget 0.36": 0.32,
    "budget 0.4": 0.36,
    "budget 0.5": 0.46,
    "budget 0.6": 0.56,
    "budget 0.7": 0.68,
    "budget 0.8": 0.77,
}

Result = Mapping[str, Any]

STEP_TIME = """
### Step time against FLOPs

SmolLM2-135M, 4 x 128 tokens, AdamW as PyTorch makes it, importances measured on that batch. A step is forward pass,
backward pass and optimizer; its FLOPs are those of both passes. Each step is compared to the full step before it; the
share of time is the median over these pairs. The target is a share of time of at most {points:g} points above that of
FLOPs; "everything" against itself shows the noise. With reuse, steps are those of later epochs, which read what is
stored below the boundary; the target for them is {reused:g} points. Published are hours of OPT-2.7B on SciTLDR on one
H100, as a share of those of full fine-tuning; the budgets are the same, the models and machines are not.

"""

ADDED = """
### What gtflops adds to an epoch

Shares of {steps} steps at budget 0.5 (the median of the table above), by the medians of the parts: *all* is trace +
selections x (importance + selection and flips) + check of the estimate + the epoch's step boundaries. An estimate that
holds is checked once in {steps} steps. Boundaries of varying shapes hold all pricing: their batches are 64 to 192
tokens long in random order, none priced before. The target is at most 1 %, and importance at most 1.1 full steps.

"""

MEMORY = """
### Memory at its highest

Three steps of `fit`, each in a process of its own, the first with a selection where there is a budget: the model's
tensors and the rise of resident memory.

"""


def step_times(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        info = result["extra_info"]
        target = POINTS_OF_REUSE if "bytes per example" in info else POINTS
        points = 100 * (info["share of time"] - info["share of FLOPs"])
        least, greatest = info["least and greatest"]
        rows.append(
            [
                info["trained"],
                f"{info['share of FLOPs']:.1%}",
                f"{info['share of time']:.1%}",
                f"{least:.1%} to {greatest:.1%}",
                _published(info["trained"]),
                f"{points:+.1f}",
                "yes" if points <= target else "no",
                f"{info['of both passes']:.1%}",
                duration(info["seconds"]),
                f"{info['bytes per example']:,}" if "bytes per example" in info else "",
            ]
        )
    return table(
        "trained | share of FLOPs | share of time | least to greatest | published share of hours | points above | "
        "within the target | of both passes alone | step | bytes stored per example",
        rows,
    )


def added(results: Sequence[Result], step: float) -> str:
    """``step`` is in seconds; how often a part is done in an epoch goes by what it is done once for."""
    epochs = {"one selection": 1, f"one every {STEPS // 5} steps": 5}
    boundaries = [result for result in results if result["extra_info"]["per"] == "epoch"]
    parts = [result for result in results if result["extra_info"]["per"] != "epoch"]
    rows = []
    sums = dict.fromkeys(epochs, 0.0)
    for result in parts:
        info = result["extra_info"]
        shares = []
        for name, selections in epochs.items():
            share = time_of(result) * (selections if info["per"] == "selection" else 1) / (STEPS * step)
            sums[name] += share
            shares.append(f"{share:.2%}")
        besides = f", {info['steps']:.3g} full steps" if "steps" in info else ""
        rows.append([info["part"], f"{duration(time_of(result))}{besides}", f"once a {info['per']}", *shares])
    for result in boundaries:
        share = f"{time_of(result) / (STEPS * step):.2%}"
        info = result["extra_info"]
        parts_of_it = f"{duration(info['in traces'])} in traces, {duration(info['in pricing'])} in pricing"
        taken = f"{duration(time_of(result))}, {info['steps']:.3g} full steps: {parts_of_it}"
        rows.append([info["part"], taken, "once an epoch", *[share] * len(epochs)])
    for result in boundaries:
        share = time_of(result) / (STEPS * step)
        _, _, shapes = result["extra_info"]["part"].partition(", ")
        rows.append([f"all, {shapes}", "", "", *(f"{total + share:.2%}" for total in sums.values())])
    return table("part | time | how often | " + " | ".join(epochs), rows)


def memory(results: Sequence[Result]) -> str:
    full = next(r["extra_info"]["bytes"] for r in results if r["extra_info"]["trained"] == "everything")
    return table(
        "trained | peak | share of everything's",
        (
            [info["trained"], f"{info['bytes'] / 2**30:.2f} GiB", f"{info['bytes'] / full:.1%}"]
            for info in (result["extra_info"] for result in results)
        ),
    )


def _published(trained: str) -> str:
    hours = next((hours for name, hours in PUBLISHED.items() if trained.split(" (")[0] == name), None)
    return "" if hours is None else f"{hours / PUBLISHED_FULL:.1%}"


def section() -> str:
    """For RESULTS.md."""
    if not RAW.exists():
        return ""
    data = json.loads(RAW.read_text(encoding="utf-8"))
    tables: dict[str, list[Result]] = {}
    for result in data["benchmarks"]:
        tables.setdefault(result["extra_info"]["table"], []).append(result)
    half = next(one for one in tables["step time"] if one["extra_info"]["trained"] == "budget 0.5")
    machine, versions = data["machine_info"], data["versions"]
    return (
        "## Time and memory of training\n\n"
        f"`make experiment-time` on {data['datetime'][:10]} at commit {data['commit_info']['id'][:12]}: "
        f"{machine['system']} {machine['machine']}, {machine['cpu']['count']} cores, one thread, Python "
        f"{machine['python_version']}, "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ".\n"
        + marked("time", STEP_TIME.format(points=POINTS, reused=POINTS_OF_REUSE) + step_times(tables["step time"]))
        + ADDED.format(steps=STEPS)
        + added(tables["added"], half["extra_info"]["seconds"])
        + MEMORY
        + memory(tables["memory"])
    )

"""Writes benchmarks/RESULTS.md: ``make bench-results`` from what pytest-benchmark measured, ``make experiments-tables``
from the raw results of ``experiments/``. Each leaves the other's part as it is.
"""

import json
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from experiments.tables import HEAD, sections
from markdown_table import table

RESULTS = Path(__file__).with_name("RESULTS.md")
PACKAGES = ("torch", "transformers", "numpy", "scipy", "ortools")
#: Steps of the epoch that bench_training.py is about, and the points by which time may exceed FLOPs.
STEPS, POINTS, POINTS_OF_REUSE = 500, 3.0, 5.0
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))

Result = dict[str, Any]

NOTES = """
The published recursion is our own writing of it in NumPy, vectorised over the FLOPs axis and exact on its rounded-down
costs; how the public code divides FLOPs into 1,000 steps is not specified, and here a step is a thousandth of the full
backward pass. A share of the optimum above 1 is paid for by a step above its budget. The public code is Python and
takes 3 to 15 s a selection. Greedy selection by density is NumPy, vectorised over the depths.
"""

COMPARED = """
## The solver beside others

Batch 4 x 512, attention eager. The *gap* is the share that an answer lacks of the least bound that any solver of the
group proved for this form of the problem: of the optimum, where one proved it (below 0: within the tolerance of the
solver that bounded it). *proof* says whether a solver proved its own answer to be the optimum within its time: HiGHS
and CP-SAT had {seconds:.0f} s, one thread and one run. *cost* is the exact cost of the step in
budgets. Ratios are to gtflops in the same form.

"""

GRID = """
## The solver over the whole grid

Each model with every importance (gamma, lognormal, by size; for SmolLM2-135M also measured) and budgets 0.36 to 0.8.
The last column is the largest ratio of the graph form's time to the chain form's on one instance.

"""

HARD = """
## Hard families, chain form

One round each. Where there is no proof, the limit on states was reached, and the gap is to the bound that is reported.

"""

STEP_TIME = """
## Step time against FLOPs

SmolLM2-135M, 4 x 128 tokens, AdamW as PyTorch makes it, importances measured on that batch. A step is forward pass,
backward pass and optimizer; its FLOPs are those of both passes. Each step is compared to the full step before it; the
share of time is the median over these pairs. The target is a share of time of at most {points:g} points above that of
FLOPs; "everything" against itself shows the noise. With reuse, steps are those of later epochs, which read what is
stored below the boundary; the target for them is {reused:g} points.

"""

ADDED = """
## What gtflops adds to an epoch

Shares of {steps} steps at budget 0.5 (the median of the table above), by the medians of the parts: *all* is trace +
selections x (importance + selection and flips) + check of the estimate + the epoch's step boundaries. An estimate that
holds is checked once in {steps} steps. Boundaries of varying shapes hold all pricing: their batches are 64 to 192
tokens long in random order, none priced before. The target is at most 1 %, and importance at most 1.1 full steps.

"""

MEMORY = """
## Memory at its highest

Three steps of `fit`, each in a process of its own, the first with a selection where there is a budget: the model's
tensors and the rise of resident memory.

"""


def duration(seconds: float) -> str:
    """Three significant digits in the largest unit that leaves a digit before the point."""
    scale, unit = next(((scale, unit) for scale, unit in UNITS if seconds >= scale), UNITS[-1])
    return f"{seconds / scale:.3g} {unit}"


def ratio(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def time_of(result: Result) -> float:
    return float(result["stats"]["median"])


def grouped(results: Iterable[Result], key: Callable[[Result], Any]) -> list[tuple[Any, list[Result]]]:
    """In the order in which the groups first appear."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return list(groups.items())


# --- everything but the solver's instances --------------------------------------------------------------------------


def timings(results: list[Result]) -> str:
    rows = []
    for group, members in groupby(sorted(results, key=lambda result: str(result["group"])), lambda r: str(r["group"])):
        ordered = sorted(members, key=time_of)
        for position, result in enumerate(ordered):
            rows.append(
                [
                    group if position == 0 else "",
                    result["name"].removeprefix("test_"),
                    duration(time_of(result)),
                    ratio(time_of(result) / time_of(ordered[0])),
                    str(result["stats"]["rounds"]),
                    "; ".join(f"{name} {value:,.4g}" for name, value in result["extra_info"].items()),
                ]
            )
    return table("what | by | median | ratio | rounds | besides", rows)


# --- the solver's instances -----------------------------------------------------------------------------------------


def gap(result: Result, bound: float) -> str:
    """As a share of the bound; an answer beyond its budget has none."""
    info = result["extra_info"]
    if info["cost"] > 1:
        return "over budget"
    share = 1 - info["value"] / bound
    return "0" if abs(share) < 1e-12 else f"{share:.1e}"


def proof(result: Result) -> str:
    return "yes" if result["extra_info"]["optimal"] else "no"


def compared(results: list[Result]) -> str:
    rows = []
    for instance, members in grouped(results, lambda result: result["extra_info"]["instance"]):
        bounds = {
            form: min(result["extra_info"]["bound"] for result in of_form)
            for form, of_form in grouped(members, lambda result: result["extra_info"]["form"])
        }
        ours = {r["extra_info"]["form"]: time_of(r) for r in members if r["extra_info"]["solver"] == "gtflops"}
        for position, result in enumerate(members):
            info = result["extra_info"]
            rows.append(
                [
                    instance if position == 0 else "",
                    info["form"],
                    info["solver"],
                    duration(time_of(result)),
                    ratio(time_of(result) / ours[info["form"]]),
                    gap(result, bounds[info["form"]]),
                    proof(result),
                    f"{info['cost']:.4f}",
                ]
            )
    return table("instance, importance, budget | form | solver | time | ratio | gap | proof | cost", rows)


def grid(results: list[Result]) -> str:
    rows = []
    for model, members in grouped(results, lambda result: result["extra_info"]["model"]):
        by_form = {
            form: {r["extra_info"]["instance"]: r for r in members if r["extra_info"]["form"] == form}
            for form in ("chain", "graph")
        }
        cells = [model, f"{members[0]['extra_info']['tensors']:,}"]
        for of_form in by_form.values():
            times = [time_of(result) for result in of_form.values()]
            proved = sum(result["extra_info"]["optimal"] for result in of_form.values())
            cells += [duration(median(times)), duration(max(times)), f"{proved} of {len(times)}"]
        ratios = [time_of(by_form["graph"][name]) / time_of(result) for name, result in by_form["chain"].items()]
        rows.append([*cells, ratio(max(ratios))])
    return table(
        "model | tensors | chain: median | slowest | proved | graph: median | slowest | proved | graph / chain", rows
    )


def hard(results: list[Result]) -> str:
    return table(
        "instance | time | gap | proof",
        (
            [
                result["extra_info"]["instance"],
                duration(time_of(result)),
                gap(result, result["extra_info"]["bound"]),
                proof(result),
            ]
            for result in results
        ),
    )


# --- training -------------------------------------------------------------------------------------------------------


def step_times(results: list[Result]) -> str:
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
                f"{points:+.1f}",
                "yes" if points <= target else "no",
                f"{info['of both passes']:.1%}",
                duration(info["seconds"]),
                f"{info['bytes per example']:,}" if "bytes per example" in info else "",
            ]
        )
    return table(
        "trained | share of FLOPs | share of time | least to greatest | points above | "
        "within the target | of both passes alone | step | bytes stored per example",
        rows,
    )


def added(results: list[Result], step: float) -> str:
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


def memory(results: list[Result]) -> str:
    full = next(r["extra_info"]["bytes"] for r in results if r["extra_info"]["trained"] == "everything")
    return table(
        "trained | peak | share of everything's",
        (
            [info["trained"], f"{info['bytes'] / 2**30:.2f} GiB", f"{info['bytes'] / full:.1%}"]
            for info in (result["extra_info"] for result in results)
        ),
    )


def benchmarks(measured: Path) -> str:
    """The tables whose tests were run."""
    data = json.loads(measured.read_text(encoding="utf-8"))
    machine = data["machine_info"]
    tables = dict(grouped(data["benchmarks"], lambda result: result["extra_info"].get("table")))
    text = (
        "# Benchmark results\n\n"
        f"`make bench-results` on {data['datetime'][:10]}: {machine['system']} {machine['machine']}, "
        f"{machine['cpu'].get('count')} cores, one thread, Python {machine['python_version']}, "
        + ", ".join(f"{package} {version(package)}" for package in PACKAGES)
        + ".\nMedians, and ratios to the fastest of a group, which ran in one process.\n"
    )
    if None in tables:
        text += "\n" + timings(tables[None])
    if "compared" in tables:
        seconds = tables["compared"][0]["extra_info"]["time limit"]
        text += COMPARED.format(seconds=seconds) + compared(tables["compared"]) + NOTES
    if "grid" in tables:
        text += GRID + grid(tables["grid"])
    if "hard" in tables:
        text += HARD + hard(tables["hard"])
    if "step time" in tables:
        text += STEP_TIME.format(points=POINTS, reused=POINTS_OF_REUSE) + step_times(tables["step time"])
    if "step time" in tables and "added" in tables:
        half = next(r for r in tables["step time"] if r["extra_info"]["trained"] == "budget 0.5")
        text += ADDED.format(steps=STEPS) + added(tables["added"], half["extra_info"]["seconds"])
    if "memory" in tables:
        text += MEMORY + memory(tables["memory"])
    return text


def main(measured: Path | None) -> None:
    """Without a file of measurements, the experiments' part alone is written anew."""
    own = benchmarks(measured) if measured else RESULTS.read_text(encoding="utf-8").partition(HEAD)[0]
    RESULTS.write_text(own + sections(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)

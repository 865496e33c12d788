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

from experiments.quality_tables import draw
from experiments.tables import HEAD, sections
from markdown_table import duration, ratio, table, time_of

RESULTS = Path(__file__).with_name("RESULTS.md")
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "quality.svg"
PACKAGES = ("torch", "transformers", "numpy", "scipy", "ortools")

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
    return text


def main(measured: Path | None) -> None:
    """Without a file of measurements, the experiments' part alone is written anew."""
    own = benchmarks(measured) if measured else RESULTS.read_text(encoding="utf-8").partition(HEAD)[0]
    RESULTS.write_text(own + sections(), encoding="utf-8")
    draw(FIGURE)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)

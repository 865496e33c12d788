"""Writes benchmarks/RESULTS.md from what pytest-benchmark measured: ``make bench-results``."""

import json
import sys
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))

NOTES = """
The published recursion is our own writing of it in NumPy, vectorised over the FLOPs axis and exact on its rounded-down
costs; how the public code divides FLOPs into 1,000 steps is not specified, and here a step is a thousandth of the full
backward pass. A share of the optimum above 1 is paid for by a step above its budget. The public code is Python and
takes 3 to 15 s a selection.
"""


def duration(seconds: float) -> str:
    """Three significant digits in the largest unit that leaves a digit before the point."""
    scale, unit = next(((scale, unit) for scale, unit in UNITS if seconds >= scale), UNITS[-1])
    return f"{seconds / scale:.3g} {unit}"


def rows(results: list[dict[str, Any]]) -> list[str]:
    def group_of(result: dict[str, Any]) -> str:
        return str(result["group"])

    lines = []
    for group, members in groupby(sorted(results, key=group_of), group_of):
        ordered = sorted(members, key=lambda result: float(result["stats"]["median"]))
        best = ordered[0]["stats"]["median"]
        for position, result in enumerate(ordered):
            stats, extra = result["stats"], result["extra_info"]
            cells = [
                group if position == 0 else "",
                result["name"].removeprefix("test_"),
                duration(stats["median"]),
                f"{stats['median'] / best:,.3g}" if stats["median"] / best < 1000 else f"{stats['median'] / best:,.0f}",
                str(stats["rounds"]),
                "; ".join(f"{name} {value:.4f}" for name, value in extra.items()),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(measured: Path) -> None:
    data = json.loads(measured.read_text(encoding="utf-8"))
    machine = data["machine_info"]
    Path(__file__).with_name("RESULTS.md").write_text(
        "# Benchmark results\n\n"
        f"`make bench-results` on {data['datetime'][:10]}: {machine['system']} {machine['machine']}, "
        f"{machine['cpu'].get('count')} cores, one thread, Python {machine['python_version']}, "
        + ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "numpy"))
        + ".\nMedians, and ratios to the fastest of a group, which ran in one process.\n\n"
        "| what | by | median | ratio | rounds | besides |\n|---|---|---|---|---|---|\n"
        + "\n".join(rows(data["benchmarks"]))
        + "\n"
        + NOTES,
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

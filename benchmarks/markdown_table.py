"""What tables in Markdown are made of."""

from collections.abc import Iterable, Mapping
from typing import Any

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """``head`` is the line of titles, with ``|`` between them."""
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    """Three significant digits in the largest unit that leaves a digit before the point."""
    scale, unit = next(((scale, unit) for scale, unit in UNITS if seconds >= scale), UNITS[-1])
    return f"{seconds / scale:.3g} {unit}"


def ratio(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def time_of(result: Mapping[str, Any]) -> float:
    """Of what pytest-benchmark measured, in seconds."""
    return float(result["stats"]["median"])


def marked(name: str, text: str) -> str:
    """A part that docs/does-it-hold.md takes over by its name."""
    return f"<!-- --8<-- [start:{name}] -->\n\n{text.strip()}\n\n<!-- --8<-- [end:{name}] -->\n\n"

"""What a step costs, what was selected and how training went, as one HTML, Markdown, JSON or CSV file.

Needs no torch.
"""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtflops.errors import InputError
from gtflops.files import write_whole
from gtflops.profiling import Profile
from gtflops.report.budgets import budget_curve
from gtflops.report.summary import Summary, summarise
from gtflops.selection import Selection

if TYPE_CHECKING:
    from gtflops.training.records import TrainingLog

__all__ = ["SUFFIXES", "schema", "write"]

SUFFIXES = (".html", ".md", ".json", ".csv")


def write(
    path: Path,
    profile: Profile,
    selection: Selection | None = None,
    log: "TrainingLog | None" = None,
    importance: Mapping[str, float] | None = None,
) -> None:
    """Write a report, whole or not at all, by the suffix of ``path``.

    ``.html`` is one self-contained file, ``.md`` the same in tables, ``.json`` all of it as data (:func:`schema`) and
    ``.csv`` a row for each tensor. A log without ``selection`` reports its last one. What each budget buys is by
    ``importance``, or that of the selection, or, without either, by number of elements.

    InputError for another suffix, a folder that cannot be written, a selection, log or importances of another profile,
    or .html without the packages of the extra ``report``.
    """
    suffix = require_suffix(path)
    summary = summarise(profile, selection, log)
    if suffix == ".csv":
        write_whole(path, _csv(summary))
        return
    if importance is None and summary.selection is not None:
        importance = {tensor.name: tensor.importance or 0.0 for tensor in summary.tensors}
    summary = replace(summary, budgets=budget_curve(profile, importance))
    if suffix == ".json":
        text = json.dumps(summary.to_json(), allow_nan=False, indent=2) + "\n"
    elif suffix == ".md":
        from gtflops.report import markdown

        text = markdown.render(summary)
    else:
        from gtflops.report import html

        text = html.render(summary)
    write_whole(path, text)


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of reports as .json."""
    text = files("gtflops.report").joinpath("schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def require_suffix(path: Path) -> str:
    """The suffix of a report's file; InputError for one that there is no report of."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path} has the suffix {path.suffix!r}, expected {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        )
    return suffix


def _csv(summary: Summary) -> str:
    """A line for each tensor, with the fields of the JSON report's ``tensors``."""
    text = io.StringIO()
    rows = summary.to_json()["tensors"]
    fields = list(rows[0]) if rows else ["name"]
    lines = csv.DictWriter(text, fields, lineterminator="\n")
    lines.writeheader()
    lines.writerows({**row, "shape": "x".join(map(str, row["shape"]))} for row in rows)
    return text.getvalue()

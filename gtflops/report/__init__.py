"""What a step costs, what was selected and how training went, as one HTML, Markdown or JSON file. Needs no torch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from gtflops.errors import InputError
from gtflops.files import write_whole
from gtflops.profiling import Profile
from gtflops.report import html, markdown
from gtflops.report.summary import summarise
from gtflops.selection import Selection

if TYPE_CHECKING:
    from gtflops.training.records import TrainingLog

__all__ = ["write"]


def write(path: Path, profile: Profile, selection: Selection | None = None, log: "TrainingLog | None" = None) -> None:
    """Write a report, whole or not at all, by the suffix of ``path``: .html (self-contained), .md or .json.

    A log without ``selection`` reports its last one. InputError for another suffix, a folder that cannot be written,
    a selection or log of another profile, or .html without the packages of the extra ``report``.
    """
    suffix = path.suffix.lower()
    if suffix not in (".html", ".md", ".json"):
        raise InputError(f"{path} has the suffix {path.suffix!r}, expected .html, .md or .json")
    summary = summarise(profile, selection, log)
    if suffix == ".html":
        text = html.render(summary)
    elif suffix == ".md":
        text = markdown.render(summary)
    else:
        text = json.dumps(summary.to_json(), allow_nan=False, indent=2) + "\n"
    write_whole(path, text)

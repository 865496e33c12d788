"""The experiments' part of ``benchmarks/RESULTS.md``, from the raw results in ``results/``."""

from collections.abc import Callable

from experiments import paper_flops_tables, quality_tables, time_tables

#: What begins the part in the page; whatever stands before it is of ``make bench-results``.
HEAD = "\n# Experiments\n"

#: Each gives its part in Markdown, from a heading of the second level on, or ``""`` where nothing was measured.
SECTIONS: tuple[Callable[[], str], ...] = (
    paper_flops_tables.section,
    quality_tables.section,
    time_tables.section,
)


def sections() -> str:
    """The whole part, its head included."""
    return "\n".join([HEAD, *(text for section in SECTIONS if (text := section()))])

"""The operator FLOPs table, put together from its classes."""

from collections.abc import Iterable

from gtflops.operators import (
    attention,
    convolutions,
    elementwise,
    free,
    linear_algebra,
    matrix_products,
    normalisation,
    recurrent,
    reductions,
)
from gtflops.operators.cost import Entry

TABLE: tuple[Entry, ...] = (
    *matrix_products.ENTRIES,
    *convolutions.ENTRIES,
    *attention.ENTRIES,
    *recurrent.ENTRIES,
    *normalisation.ENTRIES,
    *linear_algebra.ENTRIES,
    *reductions.ENTRIES,
    *elementwise.ENTRIES,
    *free.ENTRIES,
)


def _index(entries: Iterable[Entry]) -> dict[str, Entry]:
    index: dict[str, Entry] = {}
    for entry in entries:
        for op in entry.ops:
            if op in index:
                raise ValueError(f"{op} stands twice in the operator table")
            index[op] = entry
    return index


#: The table by operator, without overload.
BY_OP = _index(TABLE)

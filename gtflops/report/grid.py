"""Tensors laid out as layers by kinds: one map that stays readable for any number of tensors."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gtflops.problem import layers_of

#: More than these would be lines too thin to see; neighbouring layers then share a column, rare kinds a row.
_MOST_LAYERS = 128
_MOST_KINDS = 40
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Grid:
    """Where each tensor lies, in the order given: ``cells[k]`` is ``row * len(layers) + column`` of tensor k.

    Rows are kinds of tensors, such as ``self_attn.q_proj.weight``; columns are layers. Several tensors may share a
    cell, as those of all experts of a layer do.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    cells: tuple[int, ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> "Grid":
        """The grid of tensors by their names, layers in the order in which their first tensor comes.

        >>> grid = Grid.of(["head.weight", "layers.1.fc.weight", "layers.1.fc.bias", "layers.0.fc.weight"])
        >>> grid.layers, grid.kinds
        (('head', 'layers.1', 'layers.0'), ('weight', 'fc.weight', 'fc.bias'))
        >>> grid.cells
        (0, 4, 7, 5)
        """
        layer_of = layers_of(names)
        kind_of = [_kind(name, layer) for name, layer in zip(names, layer_of, strict=True)]
        layers = list(dict.fromkeys(layer_of))
        columns = min(len(layers), _MOST_LAYERS)
        column_of = {layer: place * columns // len(layers) for place, layer in enumerate(layers)}
        first_of = {column_of[layer]: layer for layer in reversed(layers)}
        usual = {kind for kind, _ in Counter(kind_of).most_common(_MOST_KINDS)}
        shown = [kind if kind in usual else OTHER for kind in kind_of]
        kinds = list(dict.fromkeys(shown))
        row_of = {kind: row for row, kind in enumerate(kinds)}
        return cls(
            layers=tuple(first_of[column] for column in range(columns)),
            kinds=tuple(kinds),
            cells=tuple(row_of[kind] * columns + column_of[layer] for kind, layer in zip(shown, layer_of, strict=True)),
        )

    def summed(self, values: Sequence[int]) -> list[list[int | None]]:
        """The sum of ``values``, one for each tensor, in each cell, a list for each kind; ``None`` without a tensor."""
        sums: dict[int, int] = {}
        for cell, value in zip(self.cells, values, strict=True):
            sums[cell] = sums.get(cell, 0) + value
        columns = len(self.layers)
        return [[sums.get(row * columns + column) for column in range(columns)] for row in range(len(self.kinds))]


def _kind(name: str, layer: str) -> str:
    """What is left of a name without its layer, with a star for each number."""
    rest = name[len(layer) + 1 :] if layer else name
    return ".".join("*" if part.isdigit() else part for part in rest.split("."))

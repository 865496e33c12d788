"""Following the values of a batch's integers, so that code which branches on them takes the branch of a real step."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    unset_fake_temporarily,
)

_LARGEST = 1 << 22  # elements; larger tensors, such as one-hot codes and whole masks, decide no branches


class ValuesLost(Exception):
    """A tensor with known values was written into from one without: trace again on shapes alone."""


class KnownValues:
    """Tensors with data among tensors without.

    Masks, labels and token numbers are small, and models ask them questions (is there padding at all? where is the
    last token?). Operators on such tensors only are really computed; with any other tensor the result has no data.
    """

    def __init__(self) -> None:
        self._known: set[int] = set()
        self.asked = False

    def add(self, tensor: torch.Tensor) -> None:
        """``tensor`` has data. It must be kept alive as long as this object, which knows it by identity."""
        self._known.add(id(tensor))

    def run(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``func`` of the arguments, computed where all of its tensors have data. ValuesLost where that is impossible."""
        if not self._known:
            return func(*args, **kwargs)
        tensors = list(_tensors((*args, *kwargs.values())))
        known = [id(tensor) in self._known for tensor in tensors]
        if not any(known):
            return func(*args, **kwargs)
        mutates = func._schema.is_mutable
        if not all(known):
            if mutates and id(tensors[0]) in self._known:
                raise ValuesLost
            return func(*self._resolved(func, args), **kwargs)
        if not mutates:
            try:
                shapes = func(*args, **kwargs)
                if any(tensor.numel() > _LARGEST for tensor in _tensors((shapes,))):
                    return shapes
            except (DataDependentOutputException, DynamicOutputShapeException):
                self.asked = True
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        self._known.update(id(tensor) for tensor in _tensors((result,)))
        return result

    def _resolved(self, func: torch._ops.OpOverload, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Masks with data as the positions that they select, so that the shape of the selection is known."""
        if func is not torch.ops.aten.index.Tensor:
            return args
        tensor, indices = args
        positions: list[Any] = []
        for index in indices:
            if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) and id(index) in self._known:
                with unset_fake_temporarily():
                    positions.extend(index.nonzero().unbind(1))
                self.asked = True
            else:
                positions.append(index)
        return (tensor, positions)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)

"""Following the values of small tensors, so that code which branches on them takes the branch of a real step."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.utils import _pytree as pytree

_LARGEST = 1 << 22  # elements; larger tensors, such as one-hot codes and whole masks, decide no branches


# What masks and positions are made by. Zeros are not among them: they are there to be written into.
_MAKERS = frozenset(
    (
        torch.ops.aten.arange.default,
        torch.ops.aten.arange.start,
        torch.ops.aten.arange.start_step,
        torch.ops.aten.ones.default,
        torch.ops.aten.full.default,
        torch.ops.aten.rand.default,
    )
)
# Random numbers that decide which layers run are few; more are noise.
_MOST_RANDOM = 64


class ValuesLostError(Exception):
    """A tensor with known values was written into from one without: trace again on shapes alone."""


class KnownValues:
    """Tensors with data among tensors without.

    Masks, labels, positions and token numbers are small, and models ask them questions (is there padding at all?
    where is the last token?). Operators on such tensors only are really computed; with any other tensor the result has
    no data. ``asked`` is whether a question was put to a tensor that comes from the batch, ``asked_random`` to one that
    comes from a random number.
    """

    def __init__(self) -> None:
        self.follow = False
        self.asked = False
        self.asked_random = False
        self._known: set[int] = set()
        self._of_batch: set[int] = set()
        self._random: set[int] = set()

    def add(self, tensor: torch.Tensor) -> None:
        """A tensor of the batch has data. It must be kept alive as long as this object, which knows it by identity."""
        self._known.add(id(tensor))
        self._of_batch.add(id(tensor))

    def run(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``func`` of the arguments, computed where all tensors have data. ValuesLostError where it cannot be."""
        if not self.follow:
            return func(*args, **kwargs)
        tensors = list(_tensors((*args, *kwargs.values())))
        if not tensors and func not in _MAKERS:
            return func(*args, **kwargs)
        known = [id(tensor) in self._known for tensor in tensors]
        if not any(known) and tensors:
            return func(*args, **kwargs)
        if not all(known):
            constants = {id(tensor): tensor.constant for tensor in tensors if isinstance(tensor, FakeTensor)}
            if any(constant is None for constant in constants.values()):
                if func._schema.is_mutable and known[0]:
                    raise ValuesLostError
                return func(*self._resolved(func, args), **kwargs)
            # Numbers that PyTorch made into tensors, such as the right side of an assignment.
            args, kwargs = pytree.tree_map_only(FakeTensor, lambda tensor: constants[id(tensor)], (args, kwargs))
        of_batch = any(id(tensor) in self._of_batch for tensor in tensors)
        random = func is torch.ops.aten.rand.default or any(id(tensor) in self._random for tensor in tensors)
        if not func._schema.is_mutable:
            try:
                shapes = func(*args, **kwargs)
                most = _MOST_RANDOM if random else _LARGEST
                if any(tensor.numel() > most or tensor.is_meta for tensor in _tensors((shapes,))):
                    return shapes
            except (DataDependentOutputException, DynamicOutputShapeException):
                self.asked |= of_batch
                self.asked_random |= random
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        made = {id(tensor) for tensor in _tensors((result,))}
        self._known |= made
        if of_batch:
            self._of_batch |= made
        if random:
            self._random |= made
        return result

    def _resolved(self, func: torch._ops.OpOverload, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Masks with data as the positions that they select, so that the shape of the selection is known."""
        if func is not torch.ops.aten.index.Tensor:
            return args
        tensor, indices = args
        positions: list[Any] = []
        for index in indices:
            if id(index) in self._known and index.dtype in (torch.bool, torch.uint8):
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

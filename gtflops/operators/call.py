"""An operator call as plain data: what a price is a function of."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class TensorType:
    """Shape and dtype of a tensor, without the tensor.

    >>> TensorType((4, 512), "float32").numel
    2048
    >>> [TensorType((3,), dtype).num_bytes for dtype in ("bool", "bfloat16", "float8_e4m3fn", "complex64")]
    [3, 6, 3, 24]
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return self.numel * (max(1, int(bits.group()) // 8) if bits else 1)

    @property
    def is_floating(self) -> bool:
        return self.dtype.startswith(("float", "bfloat", "complex"))

    @property
    def is_complex(self) -> bool:
        return self.dtype.startswith("complex")


Argument: TypeAlias = "TensorType | int | float | bool | str | tuple[Argument, ...] | None"


@dataclass(frozen=True, slots=True)
class Call:
    """One operator with the types of what goes in and comes out.

    ``op`` is the qualified name with its overload, such as ``aten.mm.default``; ``args`` and ``kwargs`` are the
    operator's own arguments with tensors replaced by their types. Equal calls have equal prices.
    """

    op: str
    args: tuple[Argument, ...]
    kwargs: tuple[tuple[str, Argument], ...]
    outputs: tuple[TensorType | None, ...]

    def tensors(self) -> Iterator[TensorType]:
        """The tensors that go in, in the order of the arguments."""
        yield from _tensors(self.args)
        yield from _tensors(tuple(value for _, value in self.kwargs))

    def argument(self, position: int, name: str, default: Argument = None) -> Argument:
        """The argument at ``position`` of the schema, or given by ``name``, or its ``default``."""
        if position < len(self.args):
            return self.args[position]
        return dict(self.kwargs).get(name, default)

    def shape(self, position: int) -> tuple[int, ...]:
        """The shape of the tensor argument at ``position``."""
        tensor = self.args[position]
        if not isinstance(tensor, TensorType):
            raise TypeError(f"{self.op}: argument {position} is {tensor!r}, expected a tensor")
        return tensor.shape

    @property
    def output(self) -> TensorType:
        """The first output, which must be a tensor."""
        first = self.outputs[0]
        if first is None:
            raise TypeError(f"{self.op}: has no first output")
        return first


def _tensors(arguments: tuple[Argument, ...]) -> Iterator[TensorType]:
    for argument in arguments:
        if isinstance(argument, TensorType):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)

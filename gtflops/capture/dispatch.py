"""Watching PyTorch's dispatcher: each operator that runs, as the data that the operator table prices."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gtflops.capture.unchanged import eagerly
from gtflops.errors import UnsupportedOperatorError
from gtflops.operators import Argument, Call, Flops, TensorType, lookup, price_executed

# Questions about a tensor that reach a dispatch mode although they compute nothing.
_METADATA = frozenset(
    (
        torch.ops.prim.device.default,
        torch.ops.aten.sym_size.default,
        torch.ops.aten.sym_stride.default,
        torch.ops.aten.sym_numel.default,
        torch.ops.aten.sym_storage_offset.default,
        torch.ops.aten.is_contiguous.default,
    )
)


# Operators of torch's distributed engines, which move numbers; what a network adds up on the way is not counted.
_COMMUNICATION = frozenset(("c10d", "_c10d_functional", "_dtensor", "fsdp"))


@cache
def _qualified_name(func: torch._ops.OpOverload) -> str:
    return f"{func.namespace}.{func._schema.name.partition('::')[2]}.{func._overloadname}"


@cache
def _is_composite(func: torch._ops.OpOverload) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def _is_taken_apart(func: torch._ops.OpOverload) -> bool:
    """Whether an operator is a composite of others that has no price as a whole; the user may give it one."""
    return _is_composite(func) and lookup(_qualified_name(func)) is None


@cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor_type(tensor: torch.Tensor) -> TensorType:
    """The type of a tensor, with sizes as plain integers."""
    return TensorType(tuple(tensor.shape), _dtype_name(tensor.dtype))


def _argument(value: Any) -> Argument:
    if isinstance(value, torch.Tensor):
        return tensor_type(value)
    if isinstance(value, (list, tuple)):
        return tuple(_argument(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)  # dtypes, devices, layouts, generators, symbolic numbers


def outputs_of(result: Any) -> Sequence[Any]:
    """What an operator returned, as a sequence."""
    return result if isinstance(result, (tuple, list)) else (result,)


def describe_call(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Call:
    """An operator that ran, as plain data."""
    return Call(
        _qualified_name(func),
        tuple(_argument(value) for value in args),
        tuple((name, _argument(value)) for name, value in kwargs.items()),
        tuple(tensor_type(output) if isinstance(output, torch.Tensor) else None for output in outputs_of(result)),
    )


class OperatorMode(TorchDispatchMode):
    """Calls ``observe(func, args, kwargs, result)`` after every operator that does work.

    Composite operators that reach the mode whole (they do under ``torch.inference_mode``) are taken apart first, so
    that the same operators are observed as without it.
    """

    def observe(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        raise NotImplementedError

    def run(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator itself."""
        return func(*args, **kwargs)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return NotImplemented  # the dispatcher then answers by itself
        if _is_taken_apart(func):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = self.run(func, args, kwargs)
        self.observe(func, args, kwargs, result)
        return result


class ExecutedFlops(OperatorMode):
    """Counts the FLOPs of what really runs inside a ``with``, by gtflops' own table.

    ``flops`` holds both columns, ``total`` their sum; operators without a price are counted in ``unsupported`` by
    name. Operators that make several gradients are priced by the ones that were asked for. What ``torch.compile`` was
    put on runs eagerly inside.

    >>> import torch
    >>> a = torch.ones(2, 3)
    >>> with ExecutedFlops() as executed:
    ...     product = a @ a.T
    >>> executed.flops
    Flops(matmul=24, other=0)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = Flops()
        self.unsupported: dict[str, int] = {}
        self._entered: list[AbstractContextManager[object]] = []

    def __enter__(self) -> Self:
        self._entered.append(nullcontext() if self._entered else eagerly())
        self._entered[-1].__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._entered.pop().__exit__(*error)

    @property
    def total(self) -> int:
        """FLOPs of everything that ran; UnsupportedOperatorError where something that ran has no price."""
        if self.unsupported:
            listed = ", ".join(f"{op} ({count} times)" for op, count in sorted(self.unsupported.items()))
            raise UnsupportedOperatorError(f"operators without a price ran: {listed}; the total is not known")
        return sum(self.flops)

    def observe(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if func.namespace in _COMMUNICATION:
            return
        call = describe_call(func, args, kwargs, result)
        cost = price_executed(call)
        if cost is None:
            self.unsupported[call.op] = self.unsupported.get(call.op, 0) + 1
            return
        self.flops = Flops(self.flops.matmul + cost.matmul, self.flops.other + cost.other)

"""Formulas that were registered with torch's own counter, for operators that the table lacks."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry

from gtflops.errors import InputError
from gtflops.operators import Argument, Call, Entry, Flops, Kind, TensorType


def torch_formula(op: str) -> Entry | None:
    """The entry of an operator that ``torch.utils.flop_counter.register_flop_formula`` was given a formula for.

    Torch's formulas count matrix products. They take tensors or, wrapped, their shapes; tensors without data stand in
    for both. InputError, when a call is priced, where the formula fails on them or returns no integer.
    """
    name = ".".join(op.split(".")[:2])
    formula = next((formula for target, formula in flop_registry.items() if name in _names(target)), None)
    if formula is None:
        return None
    return Entry(
        Kind.MATRIX_PRODUCT,
        lambda call: Flops(matmul=_count(call, formula)),
        (name,),
        "registered with torch",
        "torch.utils.flop_counter.register_flop_formula",
    )


def _names(target: Any) -> Iterator[str]:
    if isinstance(target, torch._ops.OpOverloadPacket):
        yield target._qualified_op_name.replace("::", ".")
    elif isinstance(target, torch._ops.HigherOrderOperator):
        yield f"{target.namespace}.{target.name()}"


def _count(call: Call, formula: Callable[..., Any]) -> int:
    with _disable_current_modes():
        args = tuple(_stand_in(argument) for argument in call.args)
        kwargs = {name: _stand_in(value) for name, value in call.kwargs}
        outputs = tuple(_stand_in(output) for output in call.outputs)
        try:
            count = formula(*args, **kwargs, out_val=outputs[0] if len(outputs) == 1 else outputs)
        except Exception as error:
            raise InputError(
                f"the formula that was registered with torch for {call.op} failed on {call.args}: "
                f"{type(error).__name__}: {error}; gtflops.register_flops takes one of your own"
            ) from error
    if type(count) is not int or count < 0:
        raise InputError(
            f"the formula that was registered with torch for {call.op} returned {count!r}, "
            "expected an integer, not below 0"
        )
    return count


def _stand_in(argument: Argument) -> Any:
    if isinstance(argument, TensorType):
        return torch.empty(argument.shape, dtype=getattr(torch, argument.dtype), device="meta")
    if isinstance(argument, tuple):
        return [_stand_in(item) for item in argument]
    return argument

"""The operator calls that PyTorch really makes, and their prices."""

from collections.abc import Callable
from typing import Any

from gtflops.capture.dispatch import OperatorMode, describe_call
from gtflops.operators import Call, Flops, FlopsByOutput, price


def calls_of(function: Callable[[], Any]) -> list[Call]:
    """The operator calls that a function really makes."""
    calls: list[Call] = []

    class Record(OperatorMode):
        def observe(self, func, args, kwargs, result):  # type: ignore[no-untyped-def]
            calls.append(describe_call(func, args, kwargs, result))

    with Record():
        function()
    return calls


def only(op: str, function: Callable[[], Any]) -> Flops | FlopsByOutput:
    """The price of the one call of ``op`` that a function makes."""
    (call,) = [call for call in calls_of(function) if call.op.startswith(op)]
    cost = price(call)
    assert cost is not None
    return cost


def backward_of(output: Any) -> Callable[[], None]:
    """The backward pass from a tensor, to be observed."""
    return lambda: output.sum().backward()

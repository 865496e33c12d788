"""The operator FLOPs table: formulas by class of operator, lookup, and the user's own. Knows shapes only."""

from gtflops.operators.call import Argument, Call, TensorType
from gtflops.operators.cost import Entry, Flops, FlopsByOutput, Kind, Price
from gtflops.operators.pricing import (
    add_fallback,
    lookup,
    may_cost,
    price,
    price_executed,
    register_flops,
    registrations,
)
from gtflops.operators.table import TABLE

__all__ = [
    "TABLE",
    "Argument",
    "Call",
    "Entry",
    "Flops",
    "FlopsByOutput",
    "Kind",
    "Price",
    "TensorType",
    "add_fallback",
    "lookup",
    "may_cost",
    "price",
    "price_executed",
    "register_flops",
    "registrations",
]

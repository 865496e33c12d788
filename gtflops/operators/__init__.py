"""The operator FLOPs table: formulas by class of operator, and lookup. Knows shapes only."""

from gtflops.operators.call import Argument, Call, TensorType
from gtflops.operators.formulas import Flops, FlopsByOutput
from gtflops.operators.table import TABLE, Entry, Kind, lookup, price

__all__ = ["TABLE", "Argument", "Call", "Entry", "Flops", "FlopsByOutput", "Kind", "TensorType", "lookup", "price"]

"""What a price is, and what a line of the table is.

A price has two columns. ``matmul`` holds matrix products under PyTorch's convention (2 FLOPs a multiply-add, causal
masks not discounted, the same numbers as ``torch.utils.flop_counter``). ``other`` holds everything else, by counting
the floating-point additions, multiplications, comparisons and function evaluations that the textbook formula needs
for an element; an evaluation of exp, tanh, erf, rsqrt and the like counts as one.

Integer and boolean arithmetic is no floating-point operation and counts as none, in matrix products too. Complex
arithmetic is counted in real operations: an addition 2, a multiplication 6, a division 11, so a multiply-add 8; any
other function of a complex number is taken as two of a real one, one for each component that comes out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, TypeAlias

from gtflops.operators.call import Call, TensorType


class Flops(NamedTuple):
    """FLOPs of one operator: matrix products, and everything else."""

    matmul: int = 0
    other: int = 0


@dataclass(frozen=True, slots=True)
class FlopsByOutput:
    """The price of an operator that makes several gradients: paid once, and for each output that is asked for."""

    shared: Flops
    outputs: tuple[Flops, ...]

    def executed(self, call: Call) -> Flops:
        """What a call costs that really ran: its ``output_mask`` says what was asked for, or else what it returned.

        The mask is the one argument of an operator that is a list of booleans, wherever it stands.
        """
        lists = [value for value in (*call.args, *(value for _, value in call.kwargs)) if isinstance(value, tuple)]
        masks = [
            mask for mask in lists if len(mask) == len(self.outputs) and all(type(asked) is bool for asked in mask)
        ]
        wanted = masks[0] if masks else tuple(output is not None for output in call.outputs)
        asked = (self.shared, *(part for part, want in zip(self.outputs, wanted, strict=True) if want))
        return Flops(sum(part.matmul for part in asked), sum(part.other for part in asked))


Price: TypeAlias = Flops | FlopsByOutput
Formula: TypeAlias = Callable[[Call], Price]
#: A formula whose price is one sum.
Whole: TypeAlias = Callable[[Call], Flops]


class Kind(StrEnum):
    """What an operator does, for tables by class."""

    MATRIX_PRODUCT = "matrix product"
    CONVOLUTION = "convolution"
    ATTENTION = "attention"
    RECURRENT = "recurrent"
    NORMALISATION = "normalisation"
    LINEAR_ALGEBRA = "linear algebra"
    REDUCTION = "reduction"
    ELEMENTWISE = "elementwise"
    RANDOM = "random"
    FREE = "free"


#: Sources of formulas, as the table names them.
DEFINITION = "arithmetic of the definition"
FLOP_COUNTER = "torch.utils.flop_counter"
NO_ARITHMETIC = "no floating-point operation"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table: the operators, without overload, that share a formula.

    ``text`` is the formula for people: ``x`` stands for the number of elements that go in (of the first tensor),
    ``y`` for the number that come out. Where an operator makes several gradients it names the shared part and each
    output. ``source`` says where the formula is from.
    """

    kind: Kind
    formula: Formula
    ops: tuple[str, ...]
    text: str
    source: str


def entry(kind: Kind, formula: Formula, ops: str, text: str, source: str = DEFINITION) -> Entry:
    """A line of the table; operators without a namespace are ATen's."""
    return Entry(kind, formula, tuple(op if "." in op else f"aten.{op}" for op in ops.split()), text, source)


def free(call: Call) -> Flops:
    """No floating-point operation: views, copies, fills, selections, integer and random-bit work."""
    return Flops()


def is_floating(call: Call) -> bool:
    """Whether any tensor that goes in has a fraction; complex ones count."""
    return any(tensor.is_floating for tensor in call.tensors())


def is_complex(call: Call) -> bool:
    """Whether any tensor that goes in is complex."""
    return any(tensor.is_complex for tensor in call.tensors())


def components(call: Call) -> int:
    """Real numbers in an element: 2 where complex tensors go in; integers have none that count."""
    return 2 if is_complex(call) else int(is_floating(call))


def multiply_adds(call: Call, count: int) -> int:
    """FLOPs of ``count`` multiply-adds on what goes in: 2 each, 8 where complex, none on integers."""
    return {0: 0, 1: 2, 2: 8}[components(call)] * count


def tensor(call: Call, position: int, name: str) -> TensorType:
    """The tensor argument at ``position`` of the schema or given by ``name``."""
    value = call.argument(position, name)
    if not isinstance(value, TensorType):
        raise TypeError(f"{call.op}: argument {name} is {value!r}, expected a tensor")
    return value


def integers(call: Call, position: int, name: str) -> tuple[int, ...]:
    """The list of integers at ``position`` of the schema or given by ``name``."""
    value = call.argument(position, name)
    if not isinstance(value, tuple) or not all(isinstance(item, int) for item in value):
        raise TypeError(f"{call.op}: argument {name} is {value!r}, expected integers")
    return value  # type: ignore[return-value]  # checked above


def per_output(flops: int, *, of_complex: int | None = None) -> Whole:
    """``flops`` for each element that comes out, on floating-point input; ``of_complex`` (or twice) on complex."""
    on_complex = 2 * flops if of_complex is None else of_complex

    def formula(call: Call) -> Flops:
        each = (0, flops, on_complex)[components(call)]
        return Flops(other=each * call.output.numel)

    return formula


def per_input(flops: int, *, and_per_output: int = 0) -> Whole:
    """``flops`` for each element of the first argument, for reductions and accumulations."""

    def formula(call: Call) -> Flops:
        count = flops * tensor(call, 0, "self").numel + (and_per_output * call.output.numel if and_per_output else 0)
        return Flops(other=components(call) * count)

    return formula


def per_value(position: int, name: str, flops: int = 1) -> Whole:
    """``flops`` for each element of the tensor argument ``name``, such as the one that is added into another."""

    def formula(call: Call) -> Flops:
        values = tensor(call, position, name)
        return Flops(other=flops * values.numel * (1 + values.is_complex) if values.is_floating else 0)

    return formula

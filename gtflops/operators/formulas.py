"""FLOPs formulas: pure functions of an operator call, in two columns.

``matmul`` holds matrix products under PyTorch's convention (2 FLOPs a multiply-add, causal masks not
discounted, the same numbers as ``torch.utils.flop_counter``). ``other`` holds everything else, by counting the
floating-point additions, multiplications and function evaluations that the textbook formula needs for an
element; an evaluation of exp, tanh, erf, rsqrt and the like counts as one. Integer and boolean arithmetic is no
floating-point operation and counts as none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
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
        """What a call costs that really ran: its ``output_mask`` says what was asked for, or else what it returned."""
        last = call.args[-1] if call.args else None
        if not (isinstance(last, tuple) and len(last) == len(self.outputs)):
            last = tuple(output is not None for output in call.outputs)
        asked = (self.shared, *(part for part, wanted in zip(self.outputs, last, strict=True) if wanted))
        return Flops(sum(part.matmul for part in asked), sum(part.other for part in asked))


Formula: TypeAlias = "Callable[[Call], Flops | FlopsByOutput]"


# --- matrix products -------------------------------------------------------------------------------------------


def mm(call: Call) -> Flops:
    """(m, k) @ (k, n)."""
    (m, k), (_, n) = call.shape(0), call.shape(1)
    return Flops(matmul=2 * m * k * n)


def bmm(call: Call) -> Flops:
    """(b, m, k) @ (b, k, n)."""
    (b, m, k), (_, _, n) = call.shape(0), call.shape(1)
    return Flops(matmul=2 * b * m * k * n)


def addmm(call: Call) -> Flops:
    """(m, k) @ (k, n) plus a bias: one more addition an output element."""
    (m, k), (_, n) = call.shape(1), call.shape(2)
    return Flops(matmul=2 * m * k * n, other=call.output.numel)


def baddbmm(call: Call) -> Flops:
    """(b, m, k) @ (b, k, n) plus a tensor; ``beta=0`` ignores the tensor."""
    (b, m, k), (_, _, n) = call.shape(1), call.shape(2)
    adds = 0 if call.argument(3, "beta", 1) == 0 else call.output.numel
    return Flops(matmul=2 * b * m * k * n, other=adds)


def mv(call: Call) -> Flops:
    """(m, k) @ (k,). ``torch.utils.flop_counter`` has no formula for it."""
    m, k = call.shape(0)
    return Flops(matmul=2 * m * k)


def addmv(call: Call) -> Flops:
    """(m, k) @ (k,) plus a vector."""
    m, k = call.shape(1)
    return Flops(matmul=2 * m * k, other=m)


def dot(call: Call) -> Flops:
    """(k,) . (k,)."""
    return Flops(matmul=2 * prod(call.shape(0)))


# --- convolutions -----------------------------------------------------------------------------------------------


def _convolution_products(
    outer: tuple[int, ...], inner: tuple[int, ...], weight: tuple[int, ...], transposed: object
) -> int:
    """FLOPs of the multiply-adds: each element of the weight meets each position of the output once (of the input
    where transposed). A weight holds 1/groups of the input's channels, so groups need no factor of their own."""
    batch, _, *positions = inner if transposed else outer
    return 2 * batch * prod(positions) * prod(weight)


def convolution(call: Call) -> Flops:
    """Convolution of any rank, grouped, dilated or transposed; the bias is one addition an output element."""
    products = _convolution_products(call.output.shape, call.shape(0), call.shape(1), call.args[6])
    return Flops(products, call.output.numel if call.args[2] is not None else 0)


def convolution_backward(call: Call) -> FlopsByOutput:
    """The gradients of input and weight make as many multiply-adds as the forward does, each; the bias's is a sum.

    ``torch.utils.flop_counter`` counts the weight's gradient ``groups`` times over.
    """
    outer, inner, weight = call.shape(0), call.shape(1), call.shape(2)
    products = Flops(matmul=_convolution_products(outer, inner, weight, call.args[7]))
    return FlopsByOutput(Flops(), (products, products, Flops(other=prod(outer))))


# --- attention -------------------------------------------------------------------------------------------------

SOFTMAX_FLOPS = 5  # an element: running maximum, subtract, exp, sum, divide
SOFTMAX_BACKWARD_FLOPS = 4  # y * (g - sum(g * y)): multiply, sum, subtract, multiply


def _attention_sizes(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> tuple[int, int, int]:
    """Number of scores, FLOPs of one product over the query's width, and of one over the value's."""
    batch, heads, queries, width = query
    scores = batch * heads * queries * key[-2]
    return scores, 2 * scores * width, 2 * scores * value[-1]


def attention(call: Call) -> Flops:
    """softmax(q k' * scale + mask) v, fused: two products; scale, mask and softmax on every score."""
    scores, by_width, by_value = _attention_sizes(call.shape(0), call.shape(1), call.shape(2))
    return Flops(matmul=by_width + by_value, other=(SOFTMAX_FLOPS + 2) * scores)


def attention_backward(call: Call) -> Flops:
    """Five products: the scores again, and the gradients of v, of the scores, of q and of k.

    Fused kernels make all three gradients whichever is asked for, so the operator has one price. Other: scale and
    exp of the scores again, then the backward of softmax and of the scale.
    """
    scores, by_width, by_value = _attention_sizes(call.shape(1), call.shape(2), call.shape(3))
    return Flops(matmul=3 * by_width + 2 * by_value, other=(3 + SOFTMAX_BACKWARD_FLOPS + 1) * scores)


# --- normalisation ---------------------------------------------------------------------------------------------


def layer_norm(call: Call) -> Flops:
    """mean 1, centre 1, variance 2, scale 1 an element; weight and bias one each where given."""
    affine = sum(call.args[position] is not None for position in (2, 3))
    return Flops(other=(5 + affine) * call.output.numel)


def layer_norm_backward(call: Call) -> FlopsByOutput:
    """x^ = (x - mean) * rstd is needed by the input's and the weight's gradient, and shared.

    Input: g * w (where there is a weight), two reductions (1 + 2), rstd * (g - a - x^ * b): 4. Weight:
    sum of g * x^: 2. Bias: sum of g: 1.
    """
    numel = call.output.numel if call.outputs[0] is not None else prod(call.shape(0))
    weighted = int(call.args[5] is not None)
    return FlopsByOutput(
        shared=Flops(other=2 * numel),
        outputs=(Flops(other=(7 + weighted) * numel), Flops(other=2 * numel), Flops(other=numel)),
    )


def batch_norm(call: Call) -> Flops:
    """In training (argument 5) as layer norm; in evaluation centre 1 and scale 1, then weight and bias."""
    affine = sum(call.args[position] is not None for position in (1, 2))
    return Flops(other=((5 if call.args[5] else 2) + affine) * call.output.numel)


def batch_norm_backward(call: Call) -> FlopsByOutput:
    """As for layer norm in training; in evaluation the input's gradient is g * w * rstd. ``train`` is argument 7."""
    numel = prod(call.shape(0))
    weighted = int(call.args[2] is not None)
    of_input = 7 + weighted if call.args[7] else 1 + weighted
    return FlopsByOutput(
        shared=Flops(other=2 * numel),
        outputs=(Flops(other=of_input * numel), Flops(other=2 * numel), Flops(other=numel)),
    )


def group_norm(call: Call) -> Flops:
    """As layer norm, over groups of channels."""
    affine = sum(call.args[position] is not None for position in (1, 2))
    return Flops(other=(5 + affine) * call.output.numel)


def group_norm_backward(call: Call) -> FlopsByOutput:
    """As for layer norm."""
    numel = prod(call.shape(0))
    weighted = int(call.args[4] is not None)
    return FlopsByOutput(
        shared=Flops(other=2 * numel),
        outputs=(Flops(other=(7 + weighted) * numel), Flops(other=2 * numel), Flops(other=numel)),
    )


def rms_norm(call: Call) -> Flops:
    """square 1, mean 1, scale 1 an element; the weight one more where given."""
    return Flops(other=(3 + int(call.args[2] is not None)) * call.output.numel)


def rms_norm_backward(call: Call) -> FlopsByOutput:
    """As for layer norm, without the mean: x^ = x * rstd is shared."""
    numel = prod(call.shape(0))
    weighted = int(call.args[4] is not None)
    return FlopsByOutput(
        shared=Flops(other=numel),
        outputs=(Flops(other=(5 + weighted) * numel), Flops(other=2 * numel)),
    )


# --- everything that is a number of FLOPs an element -----------------------------------------------------------


def _is_floating(call: Call) -> bool:
    return any(tensor.is_floating for tensor in call.tensors())


def per_output_element(flops: int) -> Formula:
    """``flops`` for each element that comes out, on floating-point input; integers cost nothing."""

    def formula(call: Call) -> Flops:
        return Flops(other=flops * call.output.numel if _is_floating(call) else 0)

    return formula


def per_input_element(flops: int, *, and_per_output: int = 0) -> Formula:
    """``flops`` for each element of the first argument, for reductions and accumulations."""

    def formula(call: Call) -> Flops:
        if not _is_floating(call):
            return Flops()
        return Flops(other=flops * prod(call.shape(0)) + and_per_output * call.output.numel)

    return formula


def gelu(call: Call) -> Flops:
    """0.5 x (1 + erf(x / sqrt 2)): 5; with ``tanh``: 0.5 x (1 + tanh(a (x + b x^3))): 9."""
    tanh = call.argument(1, "approximate", "none") == "tanh"
    return Flops(other=(9 if tanh else 5) * call.output.numel)


def gelu_backward(call: Call) -> Flops:
    """g (cdf + x pdf): cdf 4, pdf (square, scale, exp, scale) 4, combine 3; with ``tanh`` 19 in the same way."""
    tanh = call.argument(2, "approximate", "none") == "tanh"
    return Flops(other=(19 if tanh else 11) * call.output.numel)


def accumulate_values(position: int, name: str) -> Formula:
    """One addition for each element of the tensor that is added into another."""

    return lambda call: _values(call, position, name)


def _values(call: Call, position: int, name: str) -> Flops:
    values = call.argument(position, name)
    if not isinstance(values, TensorType):
        raise TypeError(f"{call.op}: argument {name} is {values!r}, expected a tensor")
    return Flops(other=values.numel if values.is_floating else 0)


def per_target(call: Call) -> Flops:
    """Negative log-likelihood: one log-probability a target is added, or one gradient a target is scaled."""
    target = call.args[1] if call.op.startswith("aten.nll_loss_forward") else call.args[2]
    if not isinstance(target, TensorType):
        raise TypeError(f"{call.op}: its target is {target!r}, expected a tensor")
    return Flops(other=target.numel)


def squared_error(call: Call) -> Flops:
    """Difference and square an element, and the sum over them where the loss is reduced (``reduction`` not 0)."""
    reduced = call.argument(2, "reduction", 1) != 0
    return Flops(other=(2 + reduced) * prod(call.shape(0)))


def index_put(call: Call) -> Flops:
    """Writes values; with ``accumulate`` adds them, one addition a value written."""
    return _values(call, 2, "values") if call.argument(3, "accumulate", False) else Flops()


def free(call: Call) -> Flops:
    """No floating-point operation: views, copies, fills, selections, integer and random-bit work."""
    return Flops()

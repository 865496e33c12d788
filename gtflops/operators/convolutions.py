"""Prices of convolutions of any rank: grouped, dilated, transposed."""

from math import prod

from gtflops.operators.call import Call
from gtflops.operators.cost import (
    FLOP_COUNTER,
    Entry,
    Flops,
    FlopsByOutput,
    Kind,
    components,
    entry,
    multiply_adds,
    tensor,
)


def _multiply_adds(outer: tuple[int, ...], inner: tuple[int, ...], weight: tuple[int, ...], transposed: object) -> int:
    """Each element of the weight meets each position of the output once (of the input where transposed). A weight
    holds 1/groups of the input's channels, so groups need no factor of their own."""
    batch, _, *positions = inner if transposed else outer
    return batch * prod(positions) * prod(weight)


def convolution(call: Call) -> Flops:
    """Convolution of any rank, grouped, dilated or transposed; the bias is one addition an output element."""
    transposed = call.argument(6, "transposed", False)
    macs = _multiply_adds(call.output.shape, call.shape(0), call.shape(1), transposed)
    bias = call.argument(2, "bias") is not None
    return Flops(multiply_adds(call, macs), components(call) * call.output.numel if bias else 0)


def backend_convolution(call: Call) -> Flops:
    """A back-end's own convolution, never transposed, without a bias."""
    return Flops(matmul=multiply_adds(call, _multiply_adds(call.output.shape, call.shape(0), call.shape(1), False)))


def convolution_backward(call: Call) -> FlopsByOutput:
    """The gradients of input and weight make as many multiply-adds as the forward does, each; the bias's is a sum.

    ``torch.utils.flop_counter`` counts the weight's gradient ``groups`` times over.
    """
    outer, inner, weight = call.shape(0), call.shape(1), call.shape(2)
    transposed = call.argument(7, "transposed", False)
    products = Flops(matmul=multiply_adds(call, _multiply_adds(outer, inner, weight, transposed)))
    return FlopsByOutput(Flops(), (products, products, Flops(other=components(call) * prod(outer))))


def convolution_over_time(call: Call) -> Flops:
    """(time, batch, in) with a weight (width, in, out): each output position meets the whole weight; and the bias."""
    result = call.output
    width, channels, _ = tensor(call, 1, "weight").shape
    return Flops(multiply_adds(call, result.numel * width * channels), components(call) * result.numel)


_FORWARD = "2 (batch) (output positions) (weight elements), transposed: input positions"

ENTRIES: tuple[Entry, ...] = (
    entry(
        Kind.CONVOLUTION,
        convolution,
        "convolution _convolution convolution_overrideable",
        f"{_FORWARD}; other: y for a bias",
        FLOP_COUNTER,
    ),
    entry(Kind.CONVOLUTION, backend_convolution, "cudnn_convolution", _FORWARD, FLOP_COUNTER),
    entry(
        Kind.CONVOLUTION,
        convolution_backward,
        "convolution_backward",
        "input: as forward; weight: as forward; bias: y's elements",
        f"{FLOP_COUNTER}, without its factor of groups on the weight's gradient",
    ),
    entry(Kind.CONVOLUTION, convolution_over_time, "conv_tbc", "2 y (width) (channels in); other: y"),
)

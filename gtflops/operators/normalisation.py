"""Prices of normalisations: over layers, batches, groups, weights, and softmax."""

from math import prod

from gtflops.operators.call import Call
from gtflops.operators.cost import Entry, Flops, FlopsByOutput, Kind, entry, per_output, tensor

SOFTMAX_FLOPS = 5  # an element: running maximum, subtract, exp, sum, divide
SOFTMAX_BACKWARD_FLOPS = 4  # y * (g - sum(g * y)): multiply, sum, subtract, multiply


def _affine(call: Call, weight: int, bias: int) -> int:
    return (call.argument(weight, "weight") is not None) + (call.argument(bias, "bias") is not None)


def layer_norm(call: Call) -> Flops:
    """mean 1, centre 1, variance 2, scale 1 an element; weight and bias one each where given."""
    return Flops(other=(5 + _affine(call, 2, 3)) * call.output.numel)


def _backward(numel: int, *, weighted: bool, fixed: bool = False) -> FlopsByOutput:
    """x^ = (x - mean) * rstd is needed by the input's and the weight's gradient, and shared.

    Input: g * w (where there is a weight), two reductions (1 + 2), rstd * (g - a - x^ * b): 4; where the statistics
    are fixed, g * w * rstd. Weight: sum of g * x^: 2. Bias: sum of g: 1.
    """
    of_input = (1 if fixed else 7) + weighted
    return FlopsByOutput(
        shared=Flops(other=2 * numel),
        outputs=(Flops(other=of_input * numel), Flops(other=2 * numel), Flops(other=numel)),
    )


def layer_norm_backward(call: Call) -> FlopsByOutput:
    """As ``_backward``."""
    return _backward(prod(call.shape(1)), weighted=call.argument(5, "weight") is not None)


def group_norm(call: Call) -> Flops:
    """As layer norm, over groups of channels."""
    return Flops(other=(5 + _affine(call, 1, 2)) * call.output.numel)


def group_norm_backward(call: Call) -> FlopsByOutput:
    """As ``_backward``."""
    return _backward(prod(call.shape(0)), weighted=call.argument(4, "weight") is not None)


def _batch_norm(call: Call, *, training: bool) -> Flops:
    return Flops(other=((5 if training else 2) + _affine(call, 1, 2)) * call.output.numel)


def batch_norm(call: Call) -> Flops:
    """In training as layer norm; in evaluation centre 1 and scale 1, then weight and bias.

    Variants differ in whether running statistics are arguments, so training is the first boolean that is given.
    """
    training = next(value for value in (*call.args, *dict(call.kwargs).values()) if isinstance(value, bool))
    return _batch_norm(call, training=training)


def batch_norm_in_training(call: Call) -> Flops:
    """The variant that always takes the batch's statistics."""
    return _batch_norm(call, training=True)


def batch_norm_in_evaluation(call: Call) -> Flops:
    """The variant that always takes the running statistics."""
    return _batch_norm(call, training=False)


def batch_norm_backward(call: Call) -> FlopsByOutput:
    """As ``_backward``; ``train`` (or ``update``) is argument 7, and false where the statistics are fixed."""
    train = next(value for value in (*call.args[7:], *dict(call.kwargs).values()) if isinstance(value, bool))
    return _backward(prod(call.shape(0)), weighted=call.argument(2, "weight") is not None, fixed=not train)


def batch_norm_backward_at_once(call: Call) -> Flops:
    """As ``_backward`` in training, all three gradients: cuDNN's has no mask."""
    price = _backward(prod(call.shape(0)), weighted=True)
    return Flops(other=price.shared.other + sum(part.other for part in price.outputs))


def rms_norm(call: Call) -> Flops:
    """square 1, mean 1, scale 1 an element; the weight one more where given."""
    return Flops(other=(3 + int(call.argument(2, "weight") is not None)) * call.output.numel)


def rms_norm_backward(call: Call) -> FlopsByOutput:
    """As for layer norm, without the mean: x^ = x * rstd is shared."""
    numel = prod(call.shape(0))
    weighted = int(call.argument(4, "weight") is not None)
    return FlopsByOutput(Flops(other=numel), (Flops(other=(5 + weighted) * numel), Flops(other=2 * numel)))


def weight_norm(call: Call) -> Flops:
    """g v / |v|: square and sum 2 an element of v, the root and g / |v| for each norm, then one product an element."""
    return Flops(other=3 * tensor(call, 0, "v").numel + 2 * tensor(call, 1, "g").numel)


def weight_norm_backward(call: Call) -> Flops:
    """Both gradients at once: s = sum of dw v (2 an element of v); dg = s / |v|; dv = g / |v| (dw - v dg / |v|), which
    is 3 an element and two more divisions a norm."""
    return Flops(other=5 * tensor(call, 1, "saved_v").numel + 3 * tensor(call, 2, "saved_g").numel)


def renormalised_rows(call: Call) -> Flops:
    """Each looked-up row's norm (2 an element, a root), its factor (1) and its product with it, as if all were too
    long: which are is data."""
    table, rows = tensor(call, 0, "self"), tensor(call, 1, "indices").numel
    return Flops(other=rows * (3 * table.shape[-1] + 2))


_BACKWARD = "shared: 2 x; input: 7 x (8 x with a weight); weight: 2 x; bias: x"

ENTRIES: tuple[Entry, ...] = (
    entry(Kind.NORMALISATION, layer_norm, "native_layer_norm", "5 y, and y each for weight and bias"),
    entry(Kind.NORMALISATION, layer_norm_backward, "native_layer_norm_backward", _BACKWARD),
    entry(Kind.NORMALISATION, group_norm, "native_group_norm", "5 y, and y each for weight and bias"),
    entry(Kind.NORMALISATION, group_norm_backward, "native_group_norm_backward", _BACKWARD),
    entry(
        Kind.NORMALISATION,
        batch_norm,
        """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional cudnn_batch_norm
        miopen_batch_norm""",
        "5 y (evaluation 2 y), and y each for weight and bias",
    ),
    entry(
        Kind.NORMALISATION,
        batch_norm_in_training,
        "_batch_norm_with_update _batch_norm_with_update_functional",
        "5 y, and y each for weight and bias",
    ),
    entry(
        Kind.NORMALISATION,
        batch_norm_in_evaluation,
        "_native_batch_norm_legit_no_training _batch_norm_no_update",
        "2 y, and y each for weight and bias",
    ),
    entry(
        Kind.NORMALISATION,
        batch_norm_backward,
        "native_batch_norm_backward batch_norm_backward",
        f"{_BACKWARD}; evaluation: input x (2 x)",
    ),
    entry(
        Kind.NORMALISATION,
        batch_norm_backward_at_once,
        "cudnn_batch_norm_backward miopen_batch_norm_backward",
        "13 x: all gradients at once",
    ),
    entry(Kind.NORMALISATION, rms_norm, "_fused_rms_norm", "3 y, and y for a weight"),
    entry(
        Kind.NORMALISATION,
        rms_norm_backward,
        "_fused_rms_norm_backward",
        "shared: x; input: 5 x (6 x with a weight); weight: 2 x",
    ),
    entry(Kind.NORMALISATION, weight_norm, "_weight_norm_interface", "3 v + 2 g for v weights and g norms"),
    entry(
        Kind.NORMALISATION, weight_norm_backward, "_weight_norm_interface_backward", "5 v + 3 g: both gradients at once"
    ),
    entry(Kind.NORMALISATION, renormalised_rows, "embedding_renorm", "r (3 d + 2) for r rows of width d, at most"),
    # Subtract the maximum, exp, sum, and divide or subtract the logarithm.
    entry(
        Kind.NORMALISATION,
        per_output(SOFTMAX_FLOPS),
        "_softmax _log_softmax _safe_softmax _masked_softmax",
        f"{SOFTMAX_FLOPS} y",
    ),
    entry(
        Kind.NORMALISATION,
        per_output(SOFTMAX_BACKWARD_FLOPS),
        "_softmax_backward_data _log_softmax_backward_data _masked_softmax_backward",
        f"{SOFTMAX_BACKWARD_FLOPS} y",
    ),
)

"""Prices of reductions, scatters, pools, losses and distances."""

from math import prod

from gtflops.operators.call import Argument, Call
from gtflops.operators.cost import (
    Entry,
    Flops,
    Formula,
    Kind,
    components,
    entry,
    integers,
    is_floating,
    per_input,
    per_output,
    per_value,
    tensor,
)

# --- scatters and embeddings -----------------------------------------------------------------------------------


def index_put(call: Call) -> Flops:
    """Writes values; with ``accumulate`` adds them, one addition a value written."""
    return per_value(2, "values")(call) if call.argument(3, "accumulate", False) else Flops()


def put(call: Call) -> Flops:
    """As ``index_put``."""
    return per_value(2, "source")(call) if call.argument(3, "accumulate", False) else Flops()


def scatter_reduce(call: Call) -> Flops:
    """One operation for each value that is scattered; a mean divides each result once more."""
    scattered = (
        tensor(call, 2, "index").numel if call.op.startswith("aten.scatter") else tensor(call, 3, "source").numel
    )
    divided = call.output.numel if call.argument(4, "reduce") == "mean" else 0
    return Flops(other=components(call) * (scattered + divided))


def embedding_bag(call: Call) -> Flops:
    """Each row that is looked up is added (or compared, in mode max) to its bag, times its weight where it has one;
    the mean (mode 1) divides each result."""
    table, indices = tensor(call, 0, "weight"), tensor(call, 1, "indices")
    looked_up = indices.numel * table.shape[-1]
    weighted = call.argument(6, "per_sample_weights") is not None
    return Flops(other=looked_up * (1 + weighted) + (call.output.numel if call.argument(4, "mode", 0) == 1 else 0))


def _bag_backward(call: Call, mode: Argument, scaled: Argument, weighted: bool) -> Flops:
    """Each looked-up row's gradient is added to the table's: times its weight where it has one, over the size of its
    bag in mode mean, over its frequency where that is asked for. In mode max one row of a bag receives each element."""
    grad, indices = tensor(call, 0, "grad"), tensor(call, 1, "indices")
    if mode == 2:
        return Flops(other=grad.numel)
    return Flops(other=indices.numel * grad.shape[-1] * (1 + weighted + (mode == 1) + bool(scaled)))


def embedding_bag_backward(call: Call) -> Flops:
    """The gradient of the table, as ``_bag_backward``."""
    weighted = call.argument(10, "per_sample_weights") is not None
    return _bag_backward(call, call.argument(8, "mode"), call.argument(7, "scale_grad_by_freq"), weighted)


def embedding_bag_dense_backward(call: Call) -> Flops:
    """The same, without ``sparse`` among its arguments, and without the bags' offsets."""
    weighted = call.argument(8, "per_sample_weights") is not None
    return _bag_backward(call, call.argument(7, "mode"), call.argument(6, "scale_grad_by_freq"), weighted)


def sample_weights_backward(call: Call) -> Flops:
    """The gradient of a sample's weight is the dot product of its row and its bag's gradient."""
    return Flops(other=2 * tensor(call, 2, "indices").numel * tensor(call, 1, "weight").shape[-1])


# --- pools -----------------------------------------------------------------------------------------------------


def _window(call: Call, position: int, rank: int) -> int:
    """Elements of the window, padding included."""
    kernel = integers(call, position, "kernel_size")
    return prod(kernel) if len(kernel) == rank else kernel[0] ** rank


def max_pool(rank: int) -> Formula:
    """One comparison for each element of each window."""
    return lambda call: Flops(other=_window(call, 1, rank) * call.output.numel if is_floating(call) else 0)


def average_pool(rank: int) -> Formula:
    """One addition for each element of each window, and one division a window."""
    return lambda call: Flops(other=(_window(call, 1, rank) + 1) * call.output.numel)


def average_pool_backward(rank: int) -> Formula:
    """Each window's gradient is divided once and added to each of its elements."""
    return lambda call: Flops(other=(_window(call, 2, rank) + 1) * tensor(call, 0, "grad_output").numel)


def _in_windows(inner: tuple[int, ...], outer: tuple[int, ...], rank: int) -> int:
    """Elements of all adaptive windows: the i-th of n in a length of m reaches from floor(i m / n) to
    ceil((i + 1) m / n), and in several dimensions windows are products of these."""
    lengths = 1
    for size, count in zip(inner[-rank:], outer[-rank:], strict=True):
        lengths *= sum(-(-(index + 1) * size // count) - index * size // count for index in range(count))
    return prod(outer[:-rank]) * lengths


def adaptive_average_pool(rank: int) -> Formula:
    """One addition for each element of each window, and one division a window."""
    return lambda call: Flops(
        other=_in_windows(call.shape(0), call.output.shape, rank) + call.output.numel,
    )


def adaptive_average_pool_backward(rank: int) -> Formula:
    """Each window's gradient is divided once and added to each of its elements."""
    return lambda call: Flops(other=_in_windows(call.shape(1), call.shape(0), rank) + prod(call.shape(0)))


def adaptive_max_pool(rank: int) -> Formula:
    """One comparison for each element of each window."""
    return lambda call: Flops(other=_in_windows(call.shape(0), call.output.shape, rank))


# --- losses ----------------------------------------------------------------------------------------------------


def per_target(call: Call) -> Flops:
    """Negative log-likelihood: one log-probability a target is added, or one gradient a target is scaled."""
    return Flops(other=tensor(call, 2 if "backward" in call.op else 1, "target").numel)


def loss(flops: int, reduction: int) -> Formula:
    """``flops`` an element, and the sum over them where the loss is reduced (``reduction`` not 0)."""

    def formula(call: Call) -> Flops:
        reduced = call.argument(reduction, "reduction", 1) != 0
        return Flops(other=(flops + reduced) * prod(call.shape(0)))

    return formula


def loss_backward(flops: int) -> Formula:
    """``flops`` for each element of the prediction, which stands after the loss's gradient."""
    return per_value(1, "self", flops)


def binary_cross_entropy(call: Call) -> Flops:
    """-(t log p + (1 - t) log(1 - p)): two logarithms, two differences, two products, a sum, a sign: 8; a weight."""
    weighted = call.argument(2, "weight") is not None
    reduced = call.argument(3, "reduction", 1) != 0
    return Flops(other=(8 + weighted + reduced) * prod(call.shape(0)))


def binary_cross_entropy_backward(call: Call) -> Flops:
    """g (p - t) / ((1 - p) p): two differences, two products, a division; a weight."""
    weighted = call.argument(3, "weight") is not None
    return Flops(other=(5 + weighted) * prod(call.shape(1)))


def binary_cross_entropy_with_logits(call: Call) -> Flops:
    """(1 - t) x + max(-x, 0) + log(1 + exp(-|x|)): 1 - t, a product, a sign, a maximum, an absolute value, a sign,
    exp, log1p, two sums: 10; a weight 1; a weight of positives, 1 + (w - 1) t, 4."""
    weighted = call.argument(2, "weight") is not None
    positives = 4 * (call.argument(3, "pos_weight") is not None)
    reduced = call.argument(4, "reduction", 1) != 0
    return Flops(other=(10 + weighted + positives + reduced) * prod(call.shape(0)))


_CTC_STEP = 13  # log(a + b + c) p of logarithms: maximum 2, subtract 3, exp 3, sum 2, log 1, add the maximum and p 2


def _ctc_states(call: Call, log_probs: int) -> int:
    """Time steps x states of the alignment: a blank before, between and after the S labels of each target, 2 S + 1.

    Lengths that are given as tensors are data: all are taken to be whole then.
    """
    inputs, targets = call.argument(log_probs + 2, "input_lengths"), call.argument(log_probs + 3, "target_lengths")
    if isinstance(inputs, tuple) and isinstance(targets, tuple):
        pairs = zip(inputs, targets, strict=True)
        return sum(
            time * (2 * labels + 1) for time, labels in pairs if isinstance(time, int) and isinstance(labels, int)
        )
    time, batch, _ = call.shape(log_probs)
    return time * (2 * tensor(call, log_probs + 1, "targets").numel + batch)


def ctc_loss(call: Call) -> Flops:
    """Graves et al. 2006: each state's probability at each time step from three former ones, in logarithms."""
    return Flops(other=_CTC_STEP * _ctc_states(call, 0))


def ctc_loss_backward(call: Call) -> Flops:
    """The same backward in time, 5 a state to collect by label (a sum, and log(a + b)), 6 an input: two exp, two sums,
    a difference, a product with the gradient."""
    return Flops(other=(_CTC_STEP + 5) * _ctc_states(call, 1) + 6 * prod(call.shape(1)))


# --- distances -------------------------------------------------------------------------------------------------


def distances(call: Call) -> Flops:
    """sum(|a - b|^p)^(1/p) of every pair: difference, absolute value, power, sum, 4 a coordinate, 3 for p of 0, 1, 2
    (a product) and infinity (a maximum); a root a pair but for p of 0, 1 and infinity."""
    p = call.argument(2, "p")
    each = 3 if p in (0, 1, 2, float("inf")) else 4
    root = p not in (0, 1, float("inf"))
    return Flops(other=call.output.numel * (each * call.shape(0)[-1] + root))


def distances_backward(call: Call) -> Flops:
    """The gradient of the first points: g sign(a - b) (|a - b| / d)^(p - 1), summed over pairs.

    A coordinate: difference, product, sum and for p not 2 the sign, 4; for other p than 1 and infinity a division and a
    power more, 6. A pair: g / d for p of 2.
    """
    p, pairs = call.argument(3, "p"), prod(call.shape(0))
    each = 3 if p == 2 else 4 if p in (0, 1, float("inf")) else 6
    return Flops(other=pairs * (each * call.shape(1)[-1] + (p == 2)))


_LOSS = "and x where it is reduced"


ENTRIES: tuple[Entry, ...] = (
    entry(
        Kind.REDUCTION,
        per_input(1),
        """sum nansum amax amin max min argmax argmin any all cumsum topk sort trace median nanmedian kthvalue mode
        cummax cummin _cummax_helper _cummin_helper prims.sum prims.amax prims.amin""",
        "x",
    ),
    entry(Kind.REDUCTION, per_input(1), "prod cumprod prims.prod", "x"),
    entry(Kind.REDUCTION, per_input(1, and_per_output=1), "mean", "x + y"),
    entry(Kind.REDUCTION, per_input(2), "aminmax _aminmax", "2 x"),
    # Mean 1, centre 1, square 1, sum 1; a division (and a root) for each result.
    entry(Kind.REDUCTION, per_input(4, and_per_output=1), "var var_mean prims.var", "4 x + y"),
    entry(Kind.REDUCTION, per_input(4, and_per_output=2), "std std_mean", "4 x + 2 y"),
    entry(Kind.REDUCTION, per_input(2, and_per_output=1), "linalg_vector_norm norm native_norm", "2 x + y"),
    # The norm of a difference.
    entry(Kind.REDUCTION, per_input(3, and_per_output=1), "dist", "3 x + y"),
    # exp after subtracting the maximum, and the sum; a logarithm for each result.
    entry(Kind.REDUCTION, per_input(4, and_per_output=2), "logsumexp", "4 x + 2 y"),
    # Maximum, subtract, exp, log1p, add.
    entry(Kind.REDUCTION, per_input(5), "logcumsumexp _logcumsumexp", "5 x"),
    entry(Kind.REDUCTION, per_input(3), "prims.prepare_softmax_online", "3 x"),  # running maximum, exp, sum
    # Gradients that are summed where several outputs read one input.
    entry(
        Kind.REDUCTION,
        per_input(1),
        """embedding_dense_backward reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward
        replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward
        max_pool2d_with_indices_backward max_pool3d_with_indices_backward adaptive_max_pool2d_backward
        adaptive_max_pool3d_backward fractional_max_pool2d_backward fractional_max_pool3d_backward col2im
        upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward
        _upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward _upsample_nearest_exact3d_backward""",
        "x",
    ),
    entry(
        Kind.REDUCTION,
        index_put,
        "index_put _index_put_impl _unsafe_index_put prims._unsafe_index_put_",
        "one a value where it accumulates",
    ),
    entry(Kind.REDUCTION, put, "put", "one a value where it accumulates"),
    entry(Kind.REDUCTION, per_value(3, "values"), "_unsafe_masked_index_put_accumulate", "one a value"),
    entry(Kind.REDUCTION, per_value(3, "source"), "index_add", "one a value"),
    entry(Kind.REDUCTION, per_value(3, "src"), "scatter_add", "one a value"),
    entry(Kind.REDUCTION, scatter_reduce, "scatter_reduce index_reduce", "one a value (mean: and y)"),
    entry(
        Kind.REDUCTION,
        embedding_bag,
        "_embedding_bag _embedding_bag_forward_only",
        "r d for r rows of width d (2 r d with weights); mean: and y",
    ),
    entry(
        Kind.REDUCTION,
        embedding_bag_backward,
        "_embedding_bag_backward",
        "r d, and r d each for weights, mean, frequency; max: x",
    ),
    entry(
        Kind.REDUCTION,
        embedding_bag_dense_backward,
        "_embedding_bag_dense_backward",
        "r d, and r d each for weights, mean, frequency; max: x",
    ),
    entry(Kind.REDUCTION, sample_weights_backward, "_embedding_bag_per_sample_weights_backward", "2 r d"),
    entry(
        Kind.REDUCTION,
        max_pool(2),
        "max_pool2d_with_indices fractional_max_pool2d prims._low_memory_max_pool_with_offsets",
        "(window) y",
    ),
    entry(Kind.REDUCTION, max_pool(3), "max_pool3d_with_indices fractional_max_pool3d", "(window) y"),
    entry(Kind.REDUCTION, average_pool(2), "avg_pool2d", "(window + 1) y"),
    entry(Kind.REDUCTION, average_pool(3), "avg_pool3d", "(window + 1) y"),
    entry(Kind.REDUCTION, average_pool_backward(2), "avg_pool2d_backward", "(window + 1) x"),
    entry(Kind.REDUCTION, average_pool_backward(3), "avg_pool3d_backward", "(window + 1) x"),
    entry(Kind.REDUCTION, adaptive_average_pool(2), "_adaptive_avg_pool2d", "(elements of all windows) + y"),
    entry(Kind.REDUCTION, adaptive_average_pool(3), "_adaptive_avg_pool3d", "(elements of all windows) + y"),
    entry(
        Kind.REDUCTION,
        adaptive_average_pool_backward(2),
        "_adaptive_avg_pool2d_backward",
        "(elements of all windows) + x",
    ),
    entry(
        Kind.REDUCTION,
        adaptive_average_pool_backward(3),
        "_adaptive_avg_pool3d_backward",
        "(elements of all windows) + x",
    ),
    entry(Kind.REDUCTION, adaptive_max_pool(2), "adaptive_max_pool2d", "(elements of all windows)"),
    entry(Kind.REDUCTION, adaptive_max_pool(3), "adaptive_max_pool3d", "(elements of all windows)"),
    # One log-probability a target is read and added; its gradient is one product a target.
    entry(
        Kind.REDUCTION,
        per_target,
        "nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward",
        "one a target",
    ),
    # Difference and square; their derivative is difference, product, product.
    entry(Kind.REDUCTION, loss(2, 2), "mse_loss", f"2 x, {_LOSS}"),
    entry(Kind.REDUCTION, loss_backward(3), "mse_loss_backward", "3 x"),
    # Difference z, |z|, comparison with beta; then z^2 / 2 beta (3) or |z| - beta / 2 (fewer).
    entry(Kind.REDUCTION, loss(6, 2), "smooth_l1_loss", f"6 x, {_LOSS}"),
    # The same without the division: z^2 / 2.
    entry(Kind.REDUCTION, loss(5, 2), "huber_loss", f"5 x, {_LOSS}"),
    # Difference, two comparisons, the factor (z / beta, or delta), product with the gradient.
    entry(Kind.REDUCTION, loss_backward(5), "smooth_l1_loss_backward huber_loss_backward", "5 x"),
    entry(Kind.REDUCTION, binary_cross_entropy, "binary_cross_entropy", f"8 x, x for a weight, {_LOSS}"),
    entry(Kind.REDUCTION, binary_cross_entropy_backward, "binary_cross_entropy_backward", "5 x, and x for a weight"),
    entry(
        Kind.REDUCTION,
        binary_cross_entropy_with_logits,
        "binary_cross_entropy_with_logits",
        f"10 x, x for a weight, 4 x for one of positives, {_LOSS}",
    ),
    # log(1 + exp(-t x)): product, sign, exp, log1p; backward -t z / (1 + z), times g: product, sign, exp, sum,
    # division, product, product.
    entry(Kind.REDUCTION, loss(4, 2), "soft_margin_loss", f"4 x, {_LOSS}"),
    entry(Kind.REDUCTION, loss_backward(7), "soft_margin_loss_backward", "7 x"),
    # max(0, margin - x_t + x): two sums, a maximum, the sum over classes; backward a comparison, a sum, a product.
    entry(Kind.REDUCTION, per_input(4), "multi_margin_loss", "4 x"),
    entry(Kind.REDUCTION, loss_backward(5), "multi_margin_loss_backward", "5 x"),
    entry(
        Kind.REDUCTION,
        ctc_loss,
        "_ctc_loss",
        "13 (time) (2 labels + 1), summed",
        "Graves et al. 2006, forward variables",
    ),
    entry(
        Kind.REDUCTION,
        ctc_loss_backward,
        "_ctc_loss_backward",
        "18 (time) (2 labels + 1), summed, + 6 (time) (batch) (classes)",
        "Graves et al. 2006, backward variables",
    ),
    entry(Kind.REDUCTION, distances, "_cdist_forward", "y (3 or 4 m, and 1 for a root) for width m"),
    entry(Kind.REDUCTION, distances_backward, "_cdist_backward", "x (3 m + 1) for p = 2; x 4 m for 1, infinity; x 6 m"),
    entry(Kind.REDUCTION, per_output(3), "linalg_cross", "3 y"),
)

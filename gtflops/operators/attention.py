"""Prices of fused attention, of every back-end, and of the fused layers that hold it."""

from math import prod

from gtflops.operators.call import Call
from gtflops.operators.cost import FLOP_COUNTER, Entry, Flops, Kind, entry, tensor
from gtflops.operators.normalisation import SOFTMAX_BACKWARD_FLOPS, SOFTMAX_FLOPS

FLASH = "Dao et al. 2022, FlashAttention (arXiv 2205.14135), algorithm 4: five products"


def _forward(scores: int, width: int, value_width: int) -> Flops:
    """Two products, q k' and p v; scale, mask and softmax on every score."""
    return Flops(matmul=2 * scores * (width + value_width), other=(SOFTMAX_FLOPS + 2) * scores)


def _backward(scores: int, width: int, value_width: int) -> Flops:
    """Five products: the scores again, and the gradients of v, of the scores, of q and of k.

    Three of them run over the query's width, two over the value's. Fused kernels make all three gradients whichever
    is asked for, so the operator has one price. Other: scale and exp of the scores again and the mask, then the
    backward of softmax and of the scale.
    """
    return Flops(2 * scores * (3 * width + 2 * value_width), (3 + SOFTMAX_BACKWARD_FLOPS + 1) * scores)


def _heads_first(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> tuple[int, int, int]:
    """(batch, heads, length, width): number of scores, and the widths. Keys and values may have fewer heads."""
    return prod(query[:-1]) * key[-2], query[-1], value[-1]


def _length_first(call: Call, first: int, offsets: int, longest: int) -> tuple[int, int, int]:
    """(batch, length, heads, width); or, with the offsets of sequences that lie end to end, (total, heads, width).

    The lengths of such sequences are data: each is taken to be as long as the longest, as ``torch.utils.flop_counter``
    takes them on tensors without data.
    """
    query, key, value = (call.shape(first + position) for position in range(3))
    starts = call.argument(offsets, "cum_seq_q")
    heads, width, value_width = query[-2], query[-1], value[-1]
    if starts is None:
        return prod(query[:-1]) * key[-3], width, value_width
    of_query, of_key = call.argument(longest, "max_q"), call.argument(longest + 1, "max_k")
    sequences = tensor(call, offsets, "cum_seq_q").numel - 1
    return sequences * heads * _length(of_query, query) * _length(of_key, key), width, value_width


def _length(longest: object, packed: tuple[int, ...]) -> int:
    """The longest sequence, or all positions where it is not said or known."""
    return longest if isinstance(longest, int) else prod(packed[:-2])


def scaled_dot_product(call: Call) -> Flops:
    """softmax(q k' * scale + mask) v on (batch, heads, length, width)."""
    return _forward(*_heads_first(call.shape(0), call.shape(1), call.shape(2)))


def scaled_dot_product_backward(call: Call) -> Flops:
    """The backward of it; the arguments begin with the output's gradient."""
    return _backward(*_heads_first(call.shape(1), call.shape(2), call.shape(3)))


def flash(call: Call) -> Flops:
    """The kernel itself, length before heads."""
    return _forward(*_length_first(call, 0, 3, 5))


def flash_in_place(call: Call) -> Flops:
    """The kernel that writes into its first argument."""
    return _forward(*_length_first(call, 1, 4, 6))


def flash_backward(call: Call) -> Flops:
    """The kernel's backward, length before heads."""
    return _backward(*_length_first(call, 1, 6, 8))


def efficient(call: Call) -> Flops:
    """The memory-efficient kernel: length before heads, a bias before the offsets."""
    return _forward(*_length_first(call, 0, 4, 6))


def efficient_backward(call: Call) -> Flops:
    """Its backward; the bias's gradient is the scores' own."""
    return _backward(*_length_first(call, 1, 6, 8))


def _multi_head(
    batch: int, lengths: tuple[int, int, int], width: int, heads: int, *, averaged: bool = False, weights: bool = False
) -> Flops:
    """Projections in, attention, projection out.

    Projections: 2 width^2 a position of q, k, v and of the output, and a bias each. Attention: two products over all
    scores; scale, mask and softmax. Average of the weights over heads: one addition a score, one division a result.
    """
    queries, keys, values = lengths
    positions = batch * (2 * queries + keys + values)
    scores = batch * heads * queries * keys
    inner = _forward(scores, width // heads, width // heads)
    average = scores + batch * queries * keys if weights and averaged else 0
    return Flops(2 * positions * width**2 + inner.matmul, positions * width + inner.other + average)


def multi_head_attention(call: Call) -> Flops:
    """``nn.MultiheadAttention`` in evaluation without gradients, which runs as one operator.

    As ``_multi_head``; the weights are averaged over heads where they are asked for.
    """
    batch, queries, width = call.shape(0)
    lengths = (queries, call.shape(1)[-2], call.shape(2)[-2])
    heads = _size(call, 4, "num_head")
    weights = bool(call.argument(10, "need_weights", True))
    averaged = bool(call.argument(11, "average_attn_weights", True))
    return _multi_head(batch, lengths, width, heads, averaged=averaged, weights=weights)


def encoder_layer(call: Call) -> Flops:
    """``nn.TransformerEncoderLayer`` in evaluation without gradients, which runs as one operator.

    ``_multi_head`` on one sequence; two layer norms with weight and bias, 7 an element each; two residual additions;
    two linear layers of width x hidden with their biases, and ReLU (1) or GELU (5) an element between.
    """
    source = call.shape(0)
    batch, length, width = prod(source[:-2]), source[-2], source[-1]
    hidden = call.shape(14)[0]
    attention = _multi_head(batch, (length, length, length), width, _size(call, 2, "num_heads"))
    positions = batch * length
    activation = 5 if call.argument(7, "use_gelu") else 1
    other = (2 * 7 + 2) * width + (hidden + width) + activation * hidden
    return Flops(attention.matmul + 4 * positions * width * hidden, attention.other + positions * other)


def _size(call: Call, position: int, name: str) -> int:
    value = call.argument(position, name)
    if not isinstance(value, int):
        raise TypeError(f"{call.op}: argument {name} is {value!r}, expected an integer")
    return value


_TEXT = "2 s (d + e) for s = (batch) (heads) (queries) (keys) scores of widths d, e; other: 7 s"
_TEXT_BACKWARD = "2 s (3 d + 2 e), all gradients at once; other: 8 s"

ENTRIES: tuple[Entry, ...] = (
    entry(
        Kind.ATTENTION,
        scaled_dot_product,
        """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps
        _cudnn_attention_forward""",
        _TEXT,
        FLOP_COUNTER,
    ),
    entry(
        Kind.ATTENTION,
        scaled_dot_product_backward,
        """_scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_flash_attention_backward
        _scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward
        _scaled_dot_product_fused_attention_overrideable_backward _cudnn_attention_backward""",
        _TEXT_BACKWARD,
        FLASH,
    ),
    entry(Kind.ATTENTION, flash, "_flash_attention_forward", _TEXT, FLASH),
    entry(Kind.ATTENTION, flash_in_place, "_flash_attention_forward_no_dropout_inplace", _TEXT, FLASH),
    entry(Kind.ATTENTION, flash_backward, "_flash_attention_backward", _TEXT_BACKWARD, FLASH),
    entry(Kind.ATTENTION, efficient, "_efficient_attention_forward", _TEXT, FLOP_COUNTER),
    entry(Kind.ATTENTION, efficient_backward, "_efficient_attention_backward", _TEXT_BACKWARD, FLASH),
    entry(
        Kind.ATTENTION,
        multi_head_attention,
        "_native_multi_head_attention",
        "2 (batch) (2 q + k + v) D^2 + attention; other: its, biases, average of the weights",
    ),
    entry(
        Kind.ATTENTION,
        encoder_layer,
        "_transformer_encoder_layer_fwd",
        "8 T D^2 + attention + 4 T D F; other: attention's, two layer norms, residuals, biases, activation",
    ),
)

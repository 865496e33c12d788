"""Prices of products against counting them one by one: convolutions, attention, recurrent layers, fused layers."""

from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import flop_registry

from gtflops.operators import TABLE, Call, Flops, FlopsByOutput, TensorType, lookup, price
from operator_calls import backward_of, calls_of, only

small = st.integers(1, 3)


def f32(*shape: int) -> TensorType:
    return TensorType(shape, "float32")


def taps(
    size: tuple[int, ...], kernel: tuple[int, ...], positions: tuple[int, ...], channels: int, out: int, groups: int
) -> int:
    """Multiply-adds of a convolution, one by one: sample, position, output channel, its group's inputs, window."""
    count = 0
    for _ in range(size[0]):
        for _ in product(*map(range, positions)):
            for out_channel in range(out):
                group = out_channel // (out // groups)
                for channel in range(channels):
                    if channel // (channels // groups) == group:
                        for _ in product(*map(range, kernel)):
                            count += 1
    return count


@settings(max_examples=40)
@given(
    rank=st.integers(1, 3),
    groups=st.integers(1, 2),
    inner=st.integers(1, 2),
    outer=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    transposed=st.booleans(),
    bias=st.booleans(),
    wanted=st.tuples(st.booleans(), st.booleans()),
)
def test_convolutions_against_a_naive_count(
    rank: int,
    groups: int,
    inner: int,
    outer: int,
    kernel: int,
    stride: int,
    dilation: int,
    transposed: bool,
    bias: bool,
    wanted: tuple[bool, bool],
) -> None:
    channels, out = inner * groups, outer * groups
    name = f"Conv{'Transpose' * transposed}{rank}d"
    module = getattr(torch.nn, name)(channels, out, kernel, stride=stride, dilation=dilation, groups=groups, bias=bias)
    x = torch.ones(2, channels, *[dilation * (kernel - 1) + 2] * rank, requires_grad=wanted[0])
    module.weight.requires_grad_(wanted[1])
    y = module(x)
    positions = tuple((x if transposed else y).shape[2:])
    macs = taps(tuple(x.shape), (kernel,) * rank, positions, channels, out, groups)
    assert only("aten.convolution.", lambda: module(x)) == Flops(2 * macs, y.numel() * bias)
    if any((*wanted, bias)):
        (call,) = [call for call in calls_of(backward_of(y)) if call.op.startswith("aten.convolution_backward")]
        cost = price(call)
        assert isinstance(cost, FlopsByOutput)
        assert cost.executed(call) == Flops(2 * macs * sum(wanted), y.numel() * bias)


@settings(max_examples=40)
@given(small, small, small, small, small, small, st.integers(1, 2))
def test_attention_against_a_naive_count(
    b: int, kv_heads: int, queries: int, keys: int, width: int, value: int, repeated: int
) -> None:
    """Every back-end: keys and values of fewer heads serve ``repeated`` query heads each."""
    heads = kv_heads * repeated
    forward = backward = scores = 0
    for _ in product(range(b), range(heads), range(queries), range(keys)):
        scores += 1
        forward += sum(2 for _ in range(width)) + sum(2 for _ in range(value))
        backward += sum(2 * 3 for _ in range(width)) + sum(2 * 2 for _ in range(value))  # q k', ds k, ds' q; g v', p' g
    q, k, v = f32(b, heads, queries, width), f32(b, kv_heads, keys, width), f32(b, kv_heads, keys, value)
    grad = f32(b, heads, queries, value)
    for op in sorted(op for op in lookup_group("aten._scaled_dot_product_flash_attention")):
        assert price(Call(f"{op}.default", (q, k, v), (), (grad,))) == Flops(forward, 7 * scores), op
    for op in sorted(op for op in lookup_group("aten._scaled_dot_product_flash_attention_backward")):
        assert price(Call(f"{op}.default", (grad, q, k, v), (), (q, k, v))) == Flops(backward, 8 * scores), op
    # The kernels themselves: length before heads.
    q, k, v = f32(b, queries, heads, width), f32(b, keys, kv_heads, width), f32(b, keys, kv_heads, value)
    grad = f32(b, queries, heads, value)
    flash = (q, k, v, None, None, queries, keys, 0.0, False, False)
    assert price(Call("aten._flash_attention_forward.default", flash, (), (grad,))) == Flops(forward, 7 * scores)
    in_place = Call("aten._flash_attention_forward_no_dropout_inplace.default", (grad, *flash), (), (grad,))
    assert price(in_place) == Flops(forward, 7 * scores)
    efficient = (q, k, v, None, None, None, None, None, 0.0, 0)
    assert price(Call("aten._efficient_attention_forward.default", efficient, (), (grad,))) == Flops(
        forward, 7 * scores
    )
    back = (grad, q, k, v, grad, f32(1), None, None, queries, keys)
    for op in ("_flash_attention_backward", "_efficient_attention_backward"):
        assert price(Call(f"aten.{op}.default", back, (), (q, k, v))) == Flops(backward, 8 * scores), op


def lookup_group(op: str) -> tuple[str, ...]:
    entry = lookup(op)
    assert entry is not None
    return entry.ops


def test_attention_on_sequences_end_to_end() -> None:
    """3 sequences of at most 5 queries and 7 keys, 2 heads of width 4: each is taken as long as the longest."""
    q, k, offsets = f32(11, 2, 4), f32(15, 2, 4), TensorType((4,), "int32")
    scores = 3 * 2 * 5 * 7
    forward = Call(
        "aten._flash_attention_forward.default", (q, k, k, offsets, offsets, 5, 7, 0.0, False, False), (), (q,)
    )
    assert price(forward) == Flops(2 * 2 * scores * 4, 7 * scores)
    args = (q, q, k, k, q, q, offsets, offsets, 5, 7, 0.0, False)
    assert price(Call("aten._flash_attention_backward.default", args, (), (q, k, k))) == Flops(
        5 * 2 * scores * 4, 8 * scores
    )
    batched = tuple(f32(1, *tensor.shape) for tensor in (q, k, k))
    args = (*batched, None, offsets, offsets, 5, 7, 0.0, 0)
    assert price(Call("aten._efficient_attention_forward.default", args, (), (batched[0],))) == Flops(
        2 * 2 * scores * 4, 7 * scores
    )


def test_attention_as_it_runs_here() -> None:
    q = torch.ones(2, 3, 5, 4, requires_grad=True)
    k = torch.ones(2, 3, 7, 4)
    scores = 2 * 3 * 5 * 7
    mask = torch.zeros(5, 7)
    forward = only("aten._scaled_dot_product", lambda: scaled_dot_product_attention(q, k, k, attn_mask=mask))
    assert forward == Flops(2 * 2 * scores * 4, 7 * scores)
    y = scaled_dot_product_attention(q, k, k, attn_mask=mask)
    assert only("aten._scaled_dot_product", backward_of(y)) == Flops(5 * 2 * scores * 4, 8 * scores)


@settings(max_examples=25)
@given(small, small, small, small, st.integers(1, 2), st.booleans(), st.booleans(), st.booleans())
def test_lstm_against_a_naive_count(
    time: int, batch: int, width: int, hidden: int, layers: int, both_ways: bool, bias: bool, batch_first: bool
) -> None:
    """A multiply-add for each step, sample, gate, unit and each of its inputs and former units."""
    forward = Flops()
    backward = Flops()
    for layer, _ in product(range(layers), range(1 + both_ways)):
        inputs = width if layer == 0 else hidden * (1 + both_ways)
        for _ in product(range(time), range(batch)):
            macs = sum(inputs + hidden for _ in range(4) for _ in range(hidden))
            # 4 sums of two products, 4 activations, f c + i g (3), o tanh(c) (2); 2 biases a gate.
            cell = sum(4 + 4 + 3 + 2 + 8 * bias for _ in range(hidden))
            # tanh(c) 1, do 1, dc 5, di dg df dc' 4, three of sigmoid and one of tanh 12, next step 1; biases 4.
            cell_backward = sum(1 + 1 + 5 + 4 + 12 + 1 + 4 * bias for _ in range(hidden))
            forward = Flops(forward.matmul + 2 * macs, forward.other + cell)
            backward = Flops(backward.matmul + 4 * macs, backward.other + cell_backward)
    module = torch.nn.LSTM(width, hidden, layers, bias=bias, bidirectional=both_ways, batch_first=batch_first)
    x = torch.ones(*((batch, time) if batch_first else (time, batch)), width)
    assert total("aten.mkldnn_rnn_layer.", lambda: module(x)) == forward
    y, _ = module(x)
    assert total("aten.mkldnn_rnn_layer_backward.", backward_of(y)) == backward


def total(op: str, function: Any) -> Flops:
    """The sum over the calls of ``op`` that a function makes, which must be priced as a whole."""
    costs = [price(call) for call in calls_of(function) if call.op.startswith(op)]
    assert costs
    assert all(isinstance(cost, Flops) for cost in costs)
    return Flops(*(sum(column) for column in zip(*costs, strict=True)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "gates", "cell", "backward"), [(0, 1, 2, 2), (1, 1, 2, 4), (2, 4, 13, 24), (3, 3, 10, 17)]
)
def test_cudnn_rnn(mode: int, gates: int, cell: int, backward: int) -> None:
    """5 steps of 2 samples, 3 inputs, 4 units, one layer in two directions; the CPU has no such operator."""
    weights = (f32(gates * 4, 3), f32(gates * 4, 4), f32(gates * 4), f32(gates * 4)) * 2
    x, h, y = f32(5, 2, 3), f32(2, 2, 4), f32(5, 2, 8)
    macs, units = 5 * 2 * gates * 4 * (3 + 4) * 2, 5 * 2 * 4 * 2
    biases = 5 * 2 * 2 * gates * 4 * 2
    tail = (mode, 4, 0, 1, False, 0.0, True, True, (), None)
    call = Call("aten._cudnn_rnn.default", (x, weights, 4, None, h, h, *tail), (), (y, h, h, None, None))
    assert price(call) == Flops(2 * macs, cell * units + biases)
    for mask in ((True, True, True, True), (True, False, False, False)):
        args = (x, weights, 4, x, h, h, y, y, None, None, *tail, x, mask)
        call = Call("aten._cudnn_rnn_backward.default", args, (), (x, h, h, None))
        cost = price(call)
        assert isinstance(cost, FlopsByOutput)
        weight = Flops(2 * macs, biases) if mask[3] else Flops()
        assert cost.executed(call) == Flops(2 * macs + weight.matmul, backward * units + weight.other)


def test_fused_cells() -> None:
    """3 samples of 4 units; these run on accelerators."""
    gates, state = f32(3, 16), f32(3, 4)
    assert price(Call("aten._thnn_fused_lstm_cell.default", (gates, gates, state), (), (state,))) == Flops(
        other=13 * 12
    )
    with_bias = (gates, gates, state, f32(16), f32(16))
    assert price(Call("aten._thnn_fused_lstm_cell.default", with_bias, (), (state,))) == Flops(other=21 * 12)
    back = (state, None, state, state, gates, True)
    assert price(Call("aten._thnn_fused_lstm_cell_backward_impl.default", back, (), ())) == Flops(other=27 * 12)
    gates = f32(3, 12)
    assert price(Call("aten._thnn_fused_gru_cell.default", (gates, gates, state), (), (state,))) == Flops(other=10 * 12)
    assert price(Call("aten._thnn_fused_gru_cell_backward.default", (state, gates, True), (), ())) == Flops(
        other=22 * 12
    )


def test_fast_paths_of_transformer_layers() -> None:
    """Width 8, 2 heads, 16 hidden, 3 samples of 5: the parts, written out."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x, positions, scores = torch.ones(3, 5, 8), 3 * 5, 3 * 2 * 5 * 5
    with torch.no_grad():
        encoder = only("aten._transformer_encoder_layer_fwd", lambda: layer(x))
        heads = only("aten._native_multi_head_attention", lambda: layer.self_attn(x, x, x, need_weights=False))
        averaged = only("aten._native_multi_head_attention", lambda: layer.self_attn(x, x, x))
    attention = Flops(2 * positions * 8 * (3 * 8 + 8) + 2 * 2 * scores * 4, positions * 4 * 8 + 7 * scores)
    assert heads == attention
    assert averaged == Flops(attention.matmul, attention.other + scores + 3 * 5 * 5)
    norms, residuals, biases, relu = 2 * 7 * positions * 8, 2 * positions * 8, positions * (16 + 8), positions * 16
    assert encoder == Flops(
        attention.matmul + 2 * positions * 8 * 16 * 2, attention.other + norms + residuals + biases + relu
    )
    # The unfused layer makes the same matrix products.
    assert sum(cost.matmul for call in calls_of(lambda: layer.train()(x)) for cost in whole(call)) == encoder.matmul


def whole(call: Call) -> list[Flops]:
    cost = price(call)
    assert cost is not None, call.op
    return [cost.executed(call) if isinstance(cost, FlopsByOutput) else cost]


@given(small, small, small, small)
def test_bilinear_against_a_naive_count(b: int, i: int, j: int, o: int) -> None:
    """x1 W first, then times x2; each gradient contracts the same tensors in another order."""
    first = sum(2 for _ in product(range(b), range(o), range(i), range(j)))
    second = sum(2 for _ in product(range(b), range(o), range(j)))
    module = torch.nn.Bilinear(i, j, o, bias=False)
    x1, x2 = torch.ones(b, i), torch.ones(b, j)
    assert only("aten._trilinear", lambda: module(x1, x2)) == Flops(first + second)
    y = module(x1, x2)
    # dW: the outer product of x1 and g, one product each, and then a sum over the batch times x2.
    assert only("aten._trilinear", backward_of(y)) == Flops(first, b * i * o)


def test_grouped_scaled_and_integer_products() -> None:
    rows, weight, offsets = f32(6, 4), f32(3, 4, 5), TensorType((3,), "int32")
    both = f32(6, 5)
    assert price(Call("aten._grouped_mm.default", (rows, weight, offsets), (), (both,))) == Flops(2 * 6 * 4 * 5)
    name = "transformers.grouped_mm_fallback"
    assert price(Call(f"{name}.default", (rows, weight, offsets), (), (both,))) == Flops(2 * 6 * 4 * 5)
    back = Call(f"{name}_backward.default", (rows, weight, offsets, both), (), (rows, weight))
    assert price(back) == Flops(2 * 2 * 6 * 4 * 5)
    batched = Call("aten._grouped_mm.default", (f32(3, 6, 4), weight), (), (f32(3, 6, 5),))
    assert price(batched) == Flops(2 * 3 * 6 * 4 * 5)
    of_weight = Call("aten._grouped_mm.default", (f32(4, 6), both, offsets), (), (weight,))
    assert price(of_weight) == Flops(2 * 4 * 6 * 5)
    e4m3, result = "float8_e4m3fn", TensorType((2, 4), "bfloat16")
    scaled = (TensorType((2, 3), e4m3), TensorType((3, 4), e4m3), f32(1), f32(1))
    assert price(Call("aten._scaled_mm.default", scaled, (), (result,))) == Flops(2 * 2 * 3 * 4, 2 * 8)
    packed = (TensorType((2, 3), "float4_e2m1fn_x2"), TensorType((3, 4), "float4_e2m1fn_x2"), f32(1), f32(1), f32(4))
    assert price(Call("aten._scaled_mm.default", packed, (), (result,))) == Flops(2 * 2 * 6 * 4, 3 * 8)
    a = torch.ones(32, 32, dtype=torch.int8)
    assert only("aten._int_mm", lambda: torch._int_mm(a, a)) == Flops()
    assert only("aten.mm", lambda: a.int() @ a.int()) == Flops()


def test_complex_products_count_real_operations() -> None:
    """A complex multiply-add is four multiplications and four additions."""
    a = torch.ones(2, 3, dtype=torch.complex64)
    assert only("aten.mm", lambda: a @ a.T) == Flops(8 * 2 * 3 * 2)
    assert only("aten.addmm", lambda: torch.addmm(a[:, :2], a, a.T)) == Flops(8 * 2 * 3 * 2, 2 * 4)
    assert only("aten.mul", lambda: a * a) == Flops(other=6 * 6)
    assert only("aten.add", lambda: a + a) == only("aten.sum", lambda: a.sum()) == Flops(other=2 * 6)
    assert only("aten.div", lambda: a / a) == Flops(other=11 * 6)
    assert only("aten.abs", lambda: a.abs()) == Flops(other=4 * 6)


def meta_call(op: str, *shapes: Any, output: tuple[int, ...]) -> Call:
    arguments = tuple(f32(*shape) if isinstance(shape, tuple) else shape for shape in shapes)
    return Call(f"{op}.default", arguments, (), (f32(*output),))


@pytest.mark.parametrize(
    "call",
    [
        meta_call("aten.mm", (2, 3), (3, 4), output=(2, 4)),
        meta_call("aten.addmm", (4,), (2, 3), (3, 4), output=(2, 4)),
        meta_call("aten.bmm", (5, 2, 3), (5, 3, 4), output=(5, 2, 4)),
        meta_call("aten.baddbmm", (5, 2, 4), (5, 2, 3), (5, 3, 4), output=(5, 2, 4)),
        meta_call("aten._scaled_mm", (2, 3), (3, 4), (1,), (1,), output=(2, 4)),
        meta_call("aten.convolution", (2, 4, 9), (6, 2, 3), None, [1], [0], [1], False, [0], 2, output=(2, 6, 7)),
        meta_call("aten.convolution", (2, 4, 9), (4, 3, 3), None, [1], [0], [1], True, [0], 2, output=(2, 6, 11)),
        meta_call("aten._convolution", (2, 4, 9), (6, 4, 3), None, [1], [0], [1], False, [0], 1, output=(2, 6, 7)),
        *(
            meta_call(
                f"aten._scaled_dot_product_{kind}_attention", (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6), output=(1,)
            )
            for kind in ("flash", "efficient", "cudnn")
        ),
        *(
            meta_call(
                f"aten._scaled_dot_product_{kind}_attention_backward",
                (2, 4, 5, 6),
                (2, 4, 5, 8),
                (2, 2, 7, 8),
                (2, 2, 7, 6),
                output=(2, 4, 5, 8),
            )
            for kind in ("flash", "efficient", "cudnn")
        ),
    ],
)
def test_equal_to_torchs_formulas(call: Call) -> None:
    namespace, name, _ = call.op.split(".")
    formula = flop_registry[getattr(getattr(torch.ops, namespace), name)]
    args = [torch.empty(a.shape, device="meta") if isinstance(a, TensorType) else a for a in call.args]
    cost = price(call)
    assert isinstance(cost, Flops)
    assert cost.matmul == formula(*args, out_val=torch.empty(call.output.shape, device="meta"))


def test_every_formula_of_torchs_counter_is_in_the_table_or_named_here() -> None:
    """What torch prices and the table does not would be priced by torch's own formula."""
    missing = [
        str(target)
        for target in flop_registry
        if isinstance(target, torch._ops.OpOverloadPacket) and not any(str(target) in entry.ops for entry in TABLE)
    ]
    assert missing == ["aten._slow_conv2d_forward"]  # below the dispatcher's level: never seen by a mode


@pytest.mark.parametrize("mask", list(product([False, True], repeat=3)))
def test_convolution_backward_equals_torchs_but_for_groups(mask: tuple[bool, bool, bool]) -> None:
    """Without groups torch's formula is right: compare with it for every mask."""
    x, weight, grad = f32(2, 4, 9), f32(6, 4, 3), f32(2, 6, 7)
    outputs = tuple(tensor if wanted else None for tensor, wanted in zip((x, weight, f32(6)), mask, strict=True))
    call = Call(
        "aten.convolution_backward.default",
        (grad, x, weight, (6,), (1,), (0,), (1,), False, (0,), 1, mask),
        (),
        outputs,
    )
    cost = price(call)
    assert isinstance(cost, FlopsByOutput)
    made = [None if output is None else torch.empty(output.shape, device="meta") for output in outputs]
    args = [torch.empty(a.shape, device="meta") if isinstance(a, TensorType) else a for a in call.args]
    formula = flop_registry[torch.ops.aten.convolution_backward]
    assert cost.executed(call).matmul == formula(*args, out_val=made)
    assert cost.executed(call).other == (prod((2, 6, 7)) if mask[2] else 0)

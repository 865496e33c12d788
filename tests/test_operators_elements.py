"""Prices of what costs a number of FLOPs an element: counted one by one, or in closed form."""

from itertools import product
from math import ceil, floor, log2
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from gtflops.operators import Call, Flops, FlopsByOutput, Kind, TensorType, lookup, price
from operator_calls import backward_of, calls_of, only

small = st.integers(1, 3)


def executed(op: str, function: Any) -> Flops:
    """What the one call of ``op`` cost, by the outputs that were asked for."""
    (call,) = [call for call in calls_of(function) if call.op.startswith(op)]
    cost = price(call)
    assert cost is not None
    return cost.executed(call) if isinstance(cost, FlopsByOutput) else cost


# --- pools -----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(2, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 1))
def test_pools_against_a_naive_count(rank: int, kernel: int, stride: int, padding: int) -> None:
    """Every element of every window is compared once, or added once and the window divided."""
    padding = min(padding, kernel // 2)
    x = torch.ones(2, 3, *[5] * rank, requires_grad=True)
    for kind in ("Max", "Avg"):
        pool = getattr(nn, f"{kind}Pool{rank}d")(kernel, stride, padding)
        y = pool(x)
        count = 0
        for _ in product(*map(range, y.shape)):
            for _ in product(*[range(kernel)] * rank):
                count += 1
            count += kind == "Avg"
        name = f"max_pool{rank}d_with_indices" if kind == "Max" else f"avg_pool{rank}d"
        assert only(f"aten.{name}.", lambda pool=pool: pool(x)) == Flops(other=count)
        backward = y.numel() if kind == "Max" else count
        assert only(f"aten.{name}_backward.", backward_of(y)) == Flops(other=backward)


@settings(max_examples=40)
@given(st.integers(2, 3), st.integers(1, 7), st.integers(2, 5))
def test_adaptive_pools_against_a_naive_count(rank: int, size: int, result: int) -> None:
    x = torch.ones(2, 3, *[size] * rank, requires_grad=True)
    window = [range(floor(i * size / result), ceil((i + 1) * size / result)) for i in range(result)]
    count = sum(2 * 3 for windows in product(window, repeat=rank) for _ in product(*windows))
    for kind, name, each in (("Max", "adaptive_max_pool", 0), ("Avg", "_adaptive_avg_pool", 1)):
        pool = getattr(nn, f"Adaptive{kind}Pool{rank}d")(result)
        y = pool(x)
        assert only(f"aten.{name}{rank}d.", lambda pool=pool: pool(x)) == Flops(other=count + each * y.numel())
        backward = count + y.numel() if kind == "Avg" else y.numel()
        assert only(f"aten.{name}{rank}d_backward.", backward_of(y)) == Flops(other=backward)


# --- embedding bags --------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.sampled_from(["sum", "mean", "max"]), st.lists(st.integers(1, 4), min_size=1, max_size=4), small, st.booleans()
)
def test_embedding_bags_against_a_naive_count(mode: str, bags: list[int], width: int, weighted: bool) -> None:
    """Each row of each bag is weighted, and added or compared; a mean is divided."""
    weighted = weighted and mode == "sum"
    forward = backward = of_weights = 0
    for rows, _ in ((rows, column) for rows in bags for column in range(width)):
        for _ in range(rows):
            forward += 1 + weighted
            backward += {"sum": 1 + weighted, "mean": 2, "max": 0}[mode]
            of_weights += 2
        forward += mode == "mean"
        backward += mode == "max"
    table = torch.ones(9, width, requires_grad=True)
    indices = torch.zeros(sum(bags), dtype=torch.int64)
    offsets = torch.tensor([0, *bags]).cumsum(0)[:-1]
    weights = torch.ones(sum(bags), requires_grad=True) if weighted else None

    def bag() -> torch.Tensor:
        return functional.embedding_bag(indices, table, offsets, mode=mode, per_sample_weights=weights)

    assert only("aten._embedding_bag.", bag) == Flops(other=forward)
    y = bag()
    calls = calls_of(backward_of(y))
    costs = {call.op.split(".")[1]: price(call) for call in calls if "embedding_bag" in call.op}
    assert costs.pop("_embedding_bag_backward") == Flops(other=backward)
    if weighted:
        assert costs.pop("_embedding_bag_per_sample_weights_backward") == Flops(other=of_weights)
    assert costs == {}


def test_embedding_with_a_maximal_norm() -> None:
    """4 rows of width 5: square and sum 10, root, factor, 5 products."""
    embedding = nn.Embedding(9, 5, max_norm=1.0)
    assert only("aten.embedding_renorm", lambda: embedding(torch.tensor([0, 1, 2, 2]))) == Flops(other=4 * 17)


# --- normalisation ---------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(small, st.sampled_from([2, 4]), small, st.booleans(), st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_norms_against_a_naive_count(
    n: int, c: int, length: int, affine: bool, wanted: tuple[bool, bool, bool]
) -> None:
    """Statistics, centring and scaling of every element; and of the gradients only those that are asked for."""
    x = torch.rand(n, c, length, requires_grad=wanted[0])
    forward = backward = 0
    for _ in range(x.numel()):
        forward += 1 + 1 + 2 + 1 + 2 * affine  # mean, centre, variance, scale; weight and bias
        backward += 2 + wanted[0] * (7 + affine) + affine * (2 * wanted[1] + wanted[2])
    modules: list[tuple[nn.Module, str]] = [(nn.LayerNorm(length, elementwise_affine=affine), "native_layer_norm")]
    if n * length > 1:  # one value has no variance
        modules.append((nn.BatchNorm1d(c, affine=affine), "native_batch_norm"))
    if c // 2 * length > 1:
        modules.append((nn.GroupNorm(2, c, affine=affine), "native_group_norm"))
    for module, name in modules:
        for parameter, trained in zip(module.parameters(), wanted[1:], strict=False):
            parameter.requires_grad_(trained)
        assert only(f"aten.{name}.", lambda module=module: module(x)) == Flops(other=forward), name
        y = module(x)
        if y.requires_grad:
            assert executed(f"aten.{name}_backward", backward_of(y)) == Flops(other=backward), name


def test_batch_norms_of_other_back_ends() -> None:
    """48 elements; statistics of the batch 5, fixed ones 2, an element; weight and bias."""
    x, c = TensorType((2, 4, 6), "float32"), TensorType((4,), "float32")

    def cost(op: str, *args: Any, outputs: int = 3) -> Any:
        return price(Call(op, (x, *args), (), (x, c, c, c, c)[:outputs]))

    assert cost("aten._native_batch_norm_legit.default", c, c, c, c, True, 0.1, 1e-5) == Flops(other=7 * 48)
    assert cost("aten._native_batch_norm_legit.no_stats", c, None, True, 0.1, 1e-5) == Flops(other=6 * 48)
    assert cost("aten._native_batch_norm_legit_functional.default", c, c, c, c, False, 0.1, 1e-5) == Flops(other=4 * 48)
    assert cost("aten._native_batch_norm_legit_no_training.default", c, c, c, c, 0.1, 1e-5) == Flops(other=4 * 48)
    assert cost("aten._batch_norm_with_update.default", c, c, c, c, 0.1, 1e-5) == Flops(other=7 * 48)
    assert cost("aten._batch_norm_no_update.default", c, c, c, c, 0.1, 1e-5) == Flops(other=4 * 48)
    assert cost("aten.cudnn_batch_norm.default", c, c, c, c, True, 0.1, 1e-5) == Flops(other=7 * 48)
    assert cost("aten.cudnn_batch_norm_backward.default", x, c, c, c, c, c, 1e-5, c) == Flops(
        other=(2 + 8 + 2 + 1) * 48
    )


@pytest.mark.parametrize("mask", list(product([False, True], repeat=3)))
def test_a_mask_that_does_not_stand_last(mask: tuple[bool, bool, bool]) -> None:
    """batch_norm_backward has its mask before the reserve; outputs are all returned, as on some back-ends."""
    x, c = TensorType((2, 4, 6), "float32"), TensorType((4,), "float32")
    args = (x, x, c, c, c, c, c, True, 1e-5, mask, TensorType((0,), "uint8"))
    call = Call("aten.batch_norm_backward.default", args, (), (x, c, c))
    cost = price(call)
    assert isinstance(cost, FlopsByOutput)
    assert cost.executed(call) == Flops(other=48 * (2 + 8 * mask[0] + 2 * mask[1] + mask[2]))
    by_name = Call(call.op, args[:9], (("output_mask", mask), ("reserve", c)), (x, c, c))
    assert cost.executed(by_name) == cost.executed(call)


def test_weight_norm() -> None:
    """24 weights in 4 norms: |v|^2 2 and g v / |v| 1 a weight, a root and a division a norm."""
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    x = torch.ones(2, 6)
    assert only("aten._weight_norm_interface.", lambda: linear(x)) == Flops(other=3 * 24 + 2 * 4)
    assert only("aten._weight_norm_interface_backward.", backward_of(linear(x))) == Flops(other=5 * 24 + 3 * 4)


# --- activations and losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "op", "forward", "backward"),
    [
        (nn.Softplus(), "softplus", 4, 5),
        (nn.ELU(), "elu", 3, 4),
        (nn.SELU(), "elu", 3, 4),
        (nn.Hardswish(), "hardswish", 5, 5),
        (nn.Hardsigmoid(), "hardsigmoid", 4, 3),
        (nn.PReLU(), "_prelu_kernel", 2, 3),
        (nn.RReLU(), "rrelu_with_noise", 2, 2),
        (nn.LogSigmoid(), "log_sigmoid", 6, 6),
        (nn.Softshrink(), "softshrink", 2, 1),
        (nn.Hardshrink(), "hardshrink", 1, 1),
        (nn.ReLU6(), "hardtanh", 1, 2),
        (nn.SiLU(), "silu", 2, 6),
        (nn.LeakyReLU(), "leaky_relu", 2, 2),
    ],
)
def test_activations(module: nn.Module, op: str, forward: int, backward: int) -> None:
    x = torch.ones(3, 8, requires_grad=True)
    suffix = "_forward." if op == "log_sigmoid" else "."
    assert only(f"aten.{op}{suffix}", lambda: module(x)) == Flops(other=forward * 24)
    assert only(f"aten.{op}_backward.", backward_of(module(x))) == Flops(other=backward * 24)


def test_glu() -> None:
    """12 results of a sigmoid and a product; for each s, g s, and g a s (1 - s): 6 for both halves."""
    x = torch.ones(3, 8, requires_grad=True)
    assert only("aten.glu.", lambda: functional.glu(x)) == Flops(other=2 * 12)
    assert only("aten.glu_backward", backward_of(functional.glu(x))) == Flops(other=6 * 12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    ("loss", "op", "forward", "backward"),
    [
        (functional.mse_loss, "mse_loss", 2, 3),
        (functional.smooth_l1_loss, "smooth_l1_loss", 6, 5),
        (functional.huber_loss, "huber_loss", 5, 5),
        (functional.binary_cross_entropy, "binary_cross_entropy", 8, 5),
        (functional.soft_margin_loss, "soft_margin_loss", 4, 7),
        (functional.binary_cross_entropy_with_logits, "binary_cross_entropy_with_logits", 10, None),
    ],
)
def test_losses(loss: Any, op: str, forward: int, backward: int | None, reduction: str) -> None:
    """The elements' formula, and one addition each where they are summed."""
    x, target = torch.full((3, 8), 0.5, requires_grad=True), torch.full((3, 8), 0.25)
    cost = only(f"aten.{op}.", lambda: loss(x, target, reduction=reduction))
    assert cost == Flops(other=(forward + (reduction != "none")) * 24)
    if backward is not None:
        assert only(f"aten.{op}_backward", backward_of(loss(x, target, reduction=reduction))) == Flops(
            other=backward * 24
        )


def test_weighted_cross_entropies() -> None:
    x, target, weight = torch.full((24,), 0.5), torch.full((24,), 0.25), torch.ones(24)
    cost = only("aten.binary_cross_entropy.", lambda: functional.binary_cross_entropy(x, target, weight))
    assert cost == Flops(other=(8 + 1 + 1) * 24)
    logits = functional.binary_cross_entropy_with_logits
    cost = only("aten.binary_cross_entropy_with", lambda: logits(x, target, weight, pos_weight=weight))
    assert cost == Flops(other=(10 + 1 + 4 + 1) * 24)
    image, labels = torch.ones(2, 3, 4, 4, requires_grad=True), torch.zeros(2, 4, 4, dtype=torch.int64)
    assert only("aten.nll_loss2d_forward", lambda: functional.nll_loss(image, labels)) == Flops(other=32)
    assert only("aten.nll_loss2d_backward", backward_of(functional.nll_loss(image, labels))) == Flops(other=32)


@given(st.lists(st.tuples(st.integers(4, 6), st.integers(1, 2)), min_size=1, max_size=3))
def test_ctc_against_a_naive_count(lengths: list[tuple[int, int]]) -> None:
    """Each state, a blank around each label, from three former ones at every time step."""
    forward = sum(13 for time, labels in lengths for _ in product(range(time), range(2 * labels + 1)))
    states = forward // 13
    x = torch.zeros(6, len(lengths), 5)
    targets = torch.ones(sum(labels for _, labels in lengths), dtype=torch.int64)
    inputs, labels = zip(*lengths, strict=True)
    args = (TensorType(tuple(x.shape), "float32"), TensorType(tuple(targets.shape), "int64"), inputs, labels)
    assert price(Call("aten._ctc_loss.default", args, (), ())) == Flops(other=forward)
    back = Call("aten._ctc_loss_backward.default", (TensorType((1,), "float32"), *args), (), ())
    assert price(back) == Flops(other=18 * states + 6 * x.numel())


def test_ctc_with_lengths_in_tensors() -> None:
    """10 steps of 2 samples of 3 labels, as if all were whole: 10 * 2 * 7 states. So it is under a mode, which torch
    does not read lengths out for."""
    log_probs = torch.zeros(10, 2, 5, requires_grad=True)
    targets, inputs, labels = torch.ones(2, 3, dtype=torch.int64), torch.tensor([10, 9]), torch.tensor([3, 2])
    calls = calls_of(lambda: functional.ctc_loss(log_probs, targets, inputs, labels).backward())
    costs = {call.op: price(call) for call in calls if "ctc" in call.op}
    assert costs == {
        "aten._ctc_loss.Tensor": Flops(other=13 * 10 * 2 * 7),
        "aten._ctc_loss_backward.Tensor": Flops(other=18 * 140 + 6 * 100),
    }


# --- images and distances --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "rank", "taps"), [("linear", 1, 2), ("bilinear", 2, 4), ("trilinear", 3, 8), ("bicubic", 2, 16)]
)
def test_interpolation(mode: str, rank: int, taps: int) -> None:
    x = torch.ones(2, 3, *[4] * rank, requires_grad=True)
    y = functional.interpolate(x, scale_factor=2, mode=mode)
    cost = only(f"aten.upsample_{mode}{rank}d.", lambda: functional.interpolate(x, scale_factor=2, mode=mode))
    assert cost == Flops(other=(taps + taps - 1) * y.numel())
    assert only(f"aten.upsample_{mode}{rank}d_backward", backward_of(y)) == Flops(other=2 * taps * y.numel())


def test_antialiased_interpolation() -> None:
    """6 planes from 9 x 8 to 3 x 4: 4 taps along the width and 6 along the height."""
    x = torch.ones(2, 3, 9, 8, requires_grad=True)
    y = functional.interpolate(x, (3, 4), mode="bilinear", antialias=True)
    by_width, by_height = 6 * 9 * 4, 6 * 3 * 4
    name = "aten._upsample_bilinear2d_aa"
    again = only(f"{name}.", lambda: functional.interpolate(x, (3, 4), mode="bilinear", antialias=True))
    assert again == Flops(other=by_width * 7 + by_height * 11)
    assert only(f"{name}_backward", backward_of(y)) == Flops(other=by_width * 8 + by_height * 12)


@pytest.mark.parametrize(("mode", "point", "taps"), [("bilinear", 12, 4), ("nearest", 6, 1), ("bicubic", 46, 16)])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_grid_sampler_by_output(mode: str, point: int, taps: int, wanted: tuple[bool, bool]) -> None:
    """2 x 9 points of 4 channels."""
    x = torch.ones(2, 4, 5, 5, requires_grad=wanted[0])
    grid = torch.zeros(2, 3, 3, 2, requires_grad=wanted[1])
    points, values = 2 * 9, 2 * 9 * 4

    def sample() -> torch.Tensor:
        return functional.grid_sample(x, grid, mode=mode, align_corners=False)

    assert only("aten.grid_sampler_2d.", sample) == Flops(other=points * point + values * (2 * taps - 1))
    of_input, of_grid = 2 * taps * values, 0 if mode == "nearest" else 2 * (3 * taps * values + points)
    assert executed("aten.grid_sampler_2d_backward", backward_of(sample())) == Flops(
        other=points * point + of_input * wanted[0] + of_grid * wanted[1]
    )


def test_windows_as_columns() -> None:
    x = torch.ones(2, 3, 5, 5, requires_grad=True)
    y = functional.unfold(x, 3)
    assert only("aten.im2col", lambda: functional.unfold(x, 3)) == Flops()
    assert only("aten.col2im", backward_of(y)) == Flops(other=2 * 3 * 9 * 9)


@given(small, small, small, st.sampled_from([0.0, 1.0, 2.0, 3.0, float("inf")]))
def test_distances_against_a_naive_count(p: int, r: int, width: int, norm: float) -> None:
    count = 0
    for _ in product(range(p), range(r)):
        for _ in range(width):
            count += 1 + 1 + 1 + (norm == 3)  # difference; absolute value, product or comparison; sum or maximum; power
        count += norm in (2, 3)
    a, b = torch.ones(p, width), torch.zeros(r, width)
    assert only("aten._cdist_forward", lambda: torch.cdist(a, b, p=norm)) == Flops(other=count)


def test_distances_by_a_product() -> None:
    """30 and 29 points of width 4: one product over width 6."""
    a, b = torch.ones(30, 4), torch.zeros(29, 4)
    cost = only("aten._euclidean_dist", lambda: torch.cdist(a, b))
    assert cost == Flops(2 * 30 * 29 * 6, 2 * (30 + 29) * 4 + 30 * 4 + 2 * 30 * 29)


def test_scattered_reductions() -> None:
    index, source = torch.tensor([0, 0, 1]), torch.ones(3)
    for reduce, extra in (("sum", 0), ("amax", 0), ("mean", 4)):
        cost = only("aten.scatter_reduce", lambda r=reduce: torch.zeros(4).scatter_reduce(0, index, source, r))
        assert cost == Flops(other=3 + extra)
    rows = torch.ones(3, 5)
    cost = only("aten.index_reduce", lambda: torch.zeros(4, 5).index_reduce(0, index, rows, "amax"))
    assert cost == Flops(other=15)


# --- transforms and factorisations -----------------------------------------------------------------------------


def test_fourier_transforms() -> None:
    """The convention: 5 N log2 N of complex numbers, half of it on real ones."""
    x = torch.ones(3, 16)
    assert only("aten._fft_r2c", lambda: torch.fft.rfft(x)) == Flops(other=3 * 5 * 16 * 4 // 2)
    assert only("aten._fft_c2c", lambda: torch.fft.fft(x.cfloat())) == Flops(other=3 * 5 * 16 * 4)
    assert only("aten._fft_c2r", lambda: torch.fft.irfft(torch.fft.rfft(x))) == Flops(other=3 * 5 * 16 * 4 // 2)
    y = torch.ones(2, 8, 4).cfloat()
    assert only("aten._fft_c2c", lambda: torch.fft.fft2(y)) == Flops(other=2 * 5 * 32 * 5)
    odd = torch.ones(3, 7).cfloat()
    assert only("aten._fft_c2c", lambda: torch.fft.fft(odd)) == Flops(other=round(3 * 5 * 7 * log2(7)))


def test_factorisations_by_their_textbook_counts() -> None:
    a = 3 * torch.eye(6).expand(2, 6, 6).contiguous()
    b = torch.ones(2, 6, 4)
    n3, by_rhs = 2 * 6**3, 2 * 6**2 * 4
    assert only("aten.linalg_cholesky_ex", lambda: torch.linalg.cholesky(a)) == Flops(other=n3 // 3)
    assert only("aten.linalg_inv_ex", lambda: torch.linalg.inv(a)) == Flops(other=2 * n3)
    solve = torch.linalg.solve_triangular
    assert only("aten.linalg_solve_triangular", lambda: solve(a, b, upper=True)) == Flops(other=by_rhs)
    assert only("aten._linalg_solve_ex", lambda: torch.linalg.solve(a, b)) == Flops(other=n3 * 2 // 3 + 2 * by_rhs)
    assert only("aten._linalg_slogdet", lambda: torch.linalg.slogdet(a)) == Flops(other=n3 * 2 // 3 + 12)
    assert only("aten.linalg_qr", lambda: torch.linalg.qr(a)) == Flops(other=2 * 2 * n3 * 2 // 3)
    assert only("aten.cholesky_solve", lambda: torch.cholesky_solve(b, a)) == Flops(other=2 * by_rhs)


# --- everything else -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "aten"),
    [("mul", "mul.Tensor"), ("exp", "exp.default"), ("sum", "sum.dim_IntList"), ("maximum", "maximum.default")],
)
def test_prims_cost_what_their_aten_operators_do(operation: str, aten: str) -> None:
    """Decomposed graphs of torch.compile hold prims."""
    x = TensorType((4, 6), "float32")
    y = TensorType((4,), "float32") if operation == "sum" else x
    args = (x, (1,)) if operation == "sum" else (x, x)
    expected = price(Call(f"aten.{aten}", args, (), (y,)))
    assert price(Call(f"prims.{operation}.default", args, (), (y,))) == expected == Flops(other=24)
    assert price(Call("prims.convert_element_type.default", (x, "bfloat16"), (), (x,))) == Flops()
    assert price(Call("prims.fma.default", (x, x, x), (), (x,))) == Flops(other=48)
    entry = lookup("prims.inductor_random.default")
    assert entry is not None
    assert entry.kind == Kind.RANDOM


def test_lists_of_tensors() -> None:
    tensors = [torch.ones(3), torch.ones(4, 5)]
    assert only("aten._foreach_add_", lambda: torch._foreach_add_(tensors, 1.0)) == Flops(other=23)
    assert only("aten._foreach_norm", lambda: torch._foreach_norm(tensors)) == Flops(other=46)


MODULES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.GRU(6, 4), (5, 3, 6)),
    (nn.GRU(6, 4, 2, bidirectional=True, batch_first=True), (5, 3, 6)),
    (nn.RNN(6, 4), (5, 3, 6)),
    (nn.LSTM(6, 4, proj_size=2), (5, 3, 6)),
    (nn.LSTMCell(6, 4), (3, 6)),
    (nn.GRUCell(6, 4), (3, 6)),
    (nn.MultiheadAttention(8, 2), (0,)),
    (nn.Transformer(8, 2, 1, 1, 16), (0, 0)),
    (nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)), (3, 6)),
    (nn.utils.parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="householder"), (3, 4)),
    (nn.LocalResponseNorm(2), (2, 4, 8, 8)),
    (nn.InstanceNorm2d(4, affine=True), (2, 4, 8, 8)),
    (nn.LPPool2d(2, 2), (2, 4, 8, 8)),
    (nn.MaxPool1d(3), (2, 4, 8)),
    (nn.FractionalMaxPool2d(3, 4), (2, 4, 8, 8)),
    (nn.PixelShuffle(2), (2, 4, 8, 8)),
    (nn.ReflectionPad2d(1), (2, 4, 8, 8)),
    (nn.ReplicationPad1d(1), (2, 4, 8)),
    (nn.CircularPad1d(1), (2, 4, 8)),
    (nn.ChannelShuffle(2), (2, 4, 8, 8)),
    (nn.Upsample(scale_factor=2), (2, 4, 8, 8)),
    (nn.Fold(8, 3), (2, 36, 36)),
    *((activation(), (3, 8)) for activation in (nn.CELU, nn.Mish, nn.Softsign, nn.Tanhshrink, nn.Tanh, nn.GELU)),
    (nn.Softmin(1), (3, 8)),
]


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=lambda value: type(value).__name__)
def test_common_modules_have_no_operator_without_a_price(module: nn.Module, shape: tuple[int, ...]) -> None:
    def step() -> None:
        if isinstance(module, nn.MultiheadAttention):
            x = torch.ones(5, 3, 8, requires_grad=True)
            y = module(x, x, x)
        elif isinstance(module, nn.Transformer):
            x = torch.ones(5, 3, 8, requires_grad=True)
            y = module(x, x)
        else:
            y = module(torch.rand(shape, requires_grad=True))
        (y[0] if isinstance(y, tuple) else y).sum().backward()

    assert [call.op for call in calls_of(step) if price(call) is None] == []


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.stft(x, 4, return_complex=True, window=torch.hann_window(4)).abs(),
        lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 2),
        lambda x: torch.view_as_real(
            torch.view_as_complex(x.view(2, 8, 2)) * torch.polar(torch.ones(8), torch.ones(8))
        ),
        lambda x: functional.kl_div(x.log_softmax(1), torch.full((2, 16), 1 / 16)),
        lambda x: functional.cosine_similarity(x, x + 1),
        lambda x: functional.poisson_nll_loss(x, torch.ones(2, 16)),
        lambda x: functional.gaussian_nll_loss(x, torch.ones(2, 16), torch.ones(2, 16)),
        lambda x: functional.multi_margin_loss(x, torch.zeros(2, dtype=torch.int64)),
        lambda x: functional.triplet_margin_loss(x, x + 1, x - 1),
        lambda x: functional.affine_grid(x[:, :6].view(2, 2, 3), [2, 1, 4, 4], align_corners=False),
        lambda x: x.logcumsumexp(1) + x.cumprod(1) + x.cummax(1)[0],
        lambda x: torch.cross(x[:, :3], x[:, 3:6], dim=1),
        lambda x: torch.einsum("bi,bj->bij", x, x),
        lambda x: torch.linalg.vector_norm(x) + torch.linalg.matrix_norm(x),
        lambda x: torch.atan2(x, x + 1) + torch.hypot(x, x) + torch.lerp(x, x, 0.5) + torch.nan_to_num(x),
        lambda x: functional.gumbel_softmax(x, hard=True),
        lambda x: functional.dropout1d(x.view(2, 4, 4)),
        lambda x: x.std() + x.var(1).sum() + x.median() + x.quantile(0.5),
        lambda x: torch.trapezoid(x),
    ],
)
def test_common_functions_have_no_operator_without_a_price(function: Any) -> None:
    def step() -> None:
        function(torch.rand(2, 16, requires_grad=True)).sum().backward()

    assert [call.op for call in calls_of(step) if price(call) is None] == []

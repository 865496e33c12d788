"""Formulas against closed forms written out here, and against a naive count."""

import random
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gtflops
from gtflops.operators import TABLE, Call, Flops, FlopsByOutput, Kind, TensorType, lookup, price
from operator_calls import calls_of, only
from real_steps import executed_operators, predicted_operators, train_only

size = st.integers(0, 6)


@given(size, size, size, size)
def test_matrix_products_against_a_naive_count(b: int, m: int, k: int, n: int) -> None:
    """Multiply-adds counted one by one."""
    macs = sum(1 for _ in range(b) for _ in range(m) for _ in range(n) for _ in range(k))
    x, y = torch.ones(b, m, k), torch.ones(b, k, n)
    assert only("aten.bmm", lambda: torch.bmm(x, y)) == Flops(matmul=2 * macs)
    bias = torch.ones(b, m, n)
    assert only("aten.baddbmm", lambda: torch.baddbmm(bias, x, y)) == Flops(2 * macs, b * m * n)
    assert only("aten.baddbmm", lambda: torch.baddbmm(bias, x, y, beta=0)) == Flops(2 * macs)
    if b:
        assert only("aten.mm", lambda: x[0] @ y[0]) == Flops(matmul=2 * macs // b)
        assert only("aten.addmm", lambda: torch.addmm(torch.ones(n), x[0], y[0])) == Flops(2 * macs // b, m * n)
        assert only("aten.mv", lambda: x[0] @ torch.ones(k)) == Flops(matmul=2 * m * k)
        assert only("aten.addmv", lambda: torch.addmv(torch.ones(m), x[0], torch.ones(k))) == Flops(2 * m * k, m)
        assert only("aten.dot", lambda: torch.ones(k) @ torch.ones(k)) == Flops(matmul=2 * k)


def test_layer_norm_by_output() -> None:
    x = torch.ones(6, 8, requires_grad=True)
    norm = torch.nn.LayerNorm(8)
    assert only("aten.native_layer_norm.", lambda: norm(x)) == Flops(other=7 * 48)
    assert only("aten.native_layer_norm.", lambda: torch.nn.functional.layer_norm(x, (8,))) == Flops(other=5 * 48)
    y = norm(x)
    cost = only("aten.native_layer_norm_backward", lambda: y.sum().backward())
    assert cost == FlopsByOutput(Flops(other=96), (Flops(other=8 * 48), Flops(other=96), Flops(other=48)))
    assert isinstance(cost, FlopsByOutput)
    norm.bias.requires_grad_(False)
    y = norm(x)
    (call,) = [call for call in calls_of(lambda: y.sum().backward()) if "norm_backward" in call.op]
    assert cost.executed(call) == Flops(other=(2 + 8 + 2) * 48)


@pytest.mark.parametrize(
    ("module", "inner", "outer", "weight"),
    [  # shapes of input, output and weight, by hand
        (torch.nn.Conv1d(4, 8, 3), (2, 4, 9), (2, 8, 7), (8, 4, 3)),
        (torch.nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2), (2, 4, 9, 9), (2, 8, 4, 4), (8, 4, 3, 3)),
        (torch.nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 9, 9), (2, 8, 7, 7), (8, 2, 3, 3)),
        (torch.nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5), (2, 4, 3, 3), (4, 1, 3, 3)),
        (torch.nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), (1, 3, 3, 3, 3), (3, 2, 2, 2, 2)),
        (torch.nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5), (2, 6, 11, 11), (4, 3, 3, 3)),
    ],
)
def test_convolutions(module: torch.nn.Module, inner: tuple[int, ...], outer: tuple[int, ...], weight: Any) -> None:
    """Each weight element meets each output position once (each input position where transposed), for each sample."""
    positions = prod(inner[2:]) if "Transpose" in type(module).__name__ else prod(outer[2:])
    products, bias = 2 * inner[0] * positions * prod(weight), prod(outer) * (module.bias is not None)
    assert tuple(module.weight.shape) == weight
    x = torch.ones(inner, requires_grad=True)
    y = module(x)
    assert tuple(y.shape) == outer
    assert only("aten.convolution.", lambda: module(x)) == Flops(products, bias)
    backward = only("aten.convolution_backward", lambda: y.sum().backward())
    assert backward == FlopsByOutput(Flops(), (Flops(products), Flops(products), Flops(other=prod(outer))))


class First(torch.nn.Module):
    """The first output of a module that has several."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)[0]


class Warped(torch.nn.Module):
    """Samples an image where a trained map says."""

    def __init__(self) -> None:
        super().__init__()
        self.image = torch.nn.Parameter(torch.randn(2, 3, 5, 5))
        self.grid = torch.nn.Parameter(torch.zeros(2, 4, 4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.grid_sample(self.image, self.grid, align_corners=False) + x.mean()


nn = torch.nn
NETWORKS = [
    (
        [nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.GroupNorm(2, 2)],
        (2, 2, 5, 5),
    ),
    ([nn.ConvTranspose2d(2, 4, 3, groups=2), nn.MaxPool2d(2), nn.PReLU(4), nn.Upsample(scale_factor=2)], (2, 2, 5, 5)),
    (
        [nn.Conv3d(2, 3, 2, dilation=2), nn.AdaptiveAvgPool3d(2), nn.Softplus(), nn.InstanceNorm3d(3, affine=True)],
        (2, 2, 5, 5, 5),
    ),
    ([First(nn.LSTM(4, 3, bidirectional=True)), nn.LayerNorm(6)], (5, 2, 4)),
    ([First(nn.GRU(4, 3)), First(nn.RNN(3, 2))], (5, 2, 4)),
    ([nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.GLU(), nn.Linear(3, 2)], (5, 4)),
    (
        [
            nn.Linear(4, 4),
            nn.RMSNorm(4),
            nn.Unflatten(1, (1, 2, 2)),
            nn.Unfold(2),
            nn.ELU(),
            nn.Flatten(),
            nn.Linear(4, 2),
        ],
        (5, 4),
    ),
    ([Warped(), nn.Conv2d(3, 2, 3)], (2, 3)),
]


@pytest.mark.parametrize(("layers", "shape"), NETWORKS, ids=lambda value: type(value[0]).__name__)
@pytest.mark.parametrize("training", [True, False])
def test_networks_are_exact_for_every_selection(
    layers: list[nn.Module], shape: tuple[int, ...], training: bool
) -> None:
    def loss(outputs: torch.Tensor, _: Any) -> torch.Tensor:
        return outputs.square().mean()

    model, x = nn.Sequential(*layers).train(training), torch.randn(shape)
    for parameter in model.parameters():
        parameter.requires_grad_()
    profile = gtflops.profile(model, x, loss)
    assert profile.unsupported == ()
    selections = list(product([False, True], repeat=len(profile.names)))
    for chosen in random.Random(0).sample(selections, min(64, len(selections))):
        names = [name for name, wanted in zip(profile.names, chosen, strict=True) if wanted]
        if names:
            train_only(model, names)
            assert executed_operators(model, x, loss) == predicted_operators(profile, names), names


def test_gelu_by_its_form() -> None:
    x = torch.ones(10)
    gelu = torch.nn.functional.gelu
    assert only("aten.gelu", lambda: gelu(x)) == Flops(other=50)
    assert only("aten.gelu", lambda: gelu(x, approximate="tanh")) == Flops(other=90)


def test_fused_attention() -> None:
    """Batch 2, heads 3, 5 queries, 7 keys, width 4, value width 4: two products of 2 * 2*3*5*7*4 each."""
    q, k, v = (torch.ones(2, 3, n, 4, requires_grad=True) for n in (5, 7, 7))
    product, scores = 2 * 2 * 3 * 5 * 7 * 4, 2 * 3 * 5 * 7
    name = "aten._scaled_dot_product_flash_attention_for_cpu"
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    forward = only(f"{name}.", lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert forward == Flops(matmul=2 * product, other=7 * scores)
    assert only(f"{name}_backward", lambda: output.sum().backward()) == Flops(matmul=5 * product, other=8 * scores)


def test_reductions_losses_and_scatters() -> None:
    x = torch.ones(4, 6)
    assert only("aten.sum", lambda: x.sum(1)) == Flops(other=24)
    assert only("aten.mean", lambda: x.mean(1)) == Flops(other=24 + 4)
    assert only("aten._softmax", lambda: x.softmax(1)) == Flops(other=5 * 24)
    target = torch.zeros(4, dtype=torch.int64)
    assert only("aten.nll_loss_forward", lambda: torch.nn.functional.nll_loss(x, target)) == Flops(other=4)
    assert only("aten.mse_loss", lambda: torch.nn.functional.mse_loss(x, x)) == Flops(other=3 * 24)
    index = torch.tensor([0, 0, 1])
    assert only("aten.index_put", lambda: torch.zeros(4).index_put((index,), torch.ones(3), accumulate=True)) == Flops(
        other=3
    )
    assert only("aten.index_put", lambda: torch.zeros(4).index_put((index,), torch.ones(3))) == Flops()
    weight = torch.ones(9, 5, requires_grad=True)
    rows = torch.nn.functional.embedding(index, weight)
    assert only("aten.embedding_dense_backward", lambda: rows.sum().backward()) == Flops(other=3 * 5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int32])
def test_integers_cost_no_floating_point_operation(dtype: torch.dtype) -> None:
    x = torch.ones(5, dtype=dtype)
    calls = calls_of(lambda: (x + x, x.cumsum(0), x == x))
    assert {price(call) for call in calls} == {Flops()}


def test_in_place_and_overloads_share_an_entry() -> None:
    x = torch.ones(5)
    assert only("aten.add_", lambda: x.add_(1)) == only("aten.add", lambda: x + x) == Flops(other=5)
    assert lookup("aten.relu_.default") is lookup("aten.relu")
    assert lookup("aten.__and__.Tensor") is None


def test_an_unknown_operator_has_no_price() -> None:
    """Nothing is silently zero: what the table does not know is None, and the profile lists it."""
    assert price(Call("aten._linalg_eigh.default", (), (), (TensorType((2,), "float32"),))) is None

    class Spectrum(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(super().forward(x)).sum()

    profile = gtflops.profile(Spectrum(4, 4), torch.ones(2, 4), lambda y, _: y)
    assert [(op.name, op.count) for op in profile.unsupported] == [("aten._linalg_svd.default", 1)]
    importance = {"weight": 1.0, "bias": 1.0}
    with pytest.raises(gtflops.UnsupportedOperatorError, match=r"aten\._linalg_svd.*allow_unsupported=True"):
        gtflops.select(profile, importance, budget=1.0)
    assert gtflops.select(profile, importance, budget=1.0, allow_unsupported=True).flops <= profile.full_flops


def test_the_table_is_whole() -> None:
    """Every operator stands once and exists in torch, and every class and line says what it is."""
    # What prims and transformers define is there once these are loaded.
    import torch._inductor.inductor_prims
    import torch._prims
    import transformers.integrations.moe  # noqa: F401

    ops = [op for entry in TABLE for op in entry.ops]
    assert len(ops) == len(set(ops))
    assert {entry.kind for entry in TABLE} == set(Kind)
    unknown = [op for op in ops if not hasattr(getattr(torch.ops, op.partition(".")[0]), op.partition(".")[2])]
    assert unknown == []
    assert all(entry.text and entry.source and entry.ops for entry in TABLE)
    for kind in (Kind.FREE, Kind.RANDOM):
        assert {entry.formula(Call("aten.view.default", (), (), ())) for entry in TABLE if entry.kind == kind} == {
            Flops()
        }


def test_composite_operators_are_not_in_the_table() -> None:
    """A composite is priced by its parts, which is what runs; a price of its own would hide them."""
    composite = []
    for op in (op for entry in TABLE for op in entry.ops if op.startswith("aten.")):
        packet = getattr(torch.ops.aten, op.removeprefix("aten."))
        names = [getattr(packet, overload).name() for overload in packet.overloads() if "out" not in overload]
        known = [name for name in names if torch._C._dispatch_has_kernel(name)]  # TorchScript's scalars are not
        if all(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd") for name in known):
            composite.append(op)
    assert composite == ["aten._fused_rms_norm"]  # it has kernels of its own on accelerators


def test_composite_operators_are_taken_apart() -> None:
    """Under inference mode PyTorch hands composite operators over whole; their parts are what is counted."""
    linear, x = torch.nn.Linear(4, 8), torch.ones(3, 4)
    with torch.inference_mode(), gtflops.ExecutedFlops() as executed:
        linear(x)
    assert executed.flops == Flops(matmul=2 * prod((3, 4, 8)), other=3 * 8)
    assert executed.unsupported == {}

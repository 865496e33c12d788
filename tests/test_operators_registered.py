"""Formulas that are not in the table: the user's own, and those registered with torch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils import flop_counter

import gtflops
from gtflops.operators import Call, Flops, FlopsByOutput, TensorType, lookup, price, pricing, registrations

MATRIX = TensorType((2, 3), "float32")
CALL = Call("mylib.double.default", (MATRIX,), (), (MATRIX,))


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pricing, "_registered", {})


@pytest.fixture
def double() -> Iterator[Any]:
    """A custom operator, differentiable, that no table knows."""
    library = torch.library.Library("gtflops_tests", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
    library._register_fake("double", lambda x: torch.empty_like(x))
    torch.library.register_autograd("gtflops_tests::double", lambda context, grad: grad * 2, lib=library)
    yield torch.ops.gtflops_tests.double
    library._destroy()


@pytest.mark.parametrize("name", ["mylib::double", "mylib.double", "mylib.double.default"])
def test_a_formula_of_the_users_own(name: str) -> None:
    assert price(CALL) is None

    @gtflops.register_flops(name, kind="elementwise")
    def double(call: Call) -> Flops:
        """One product an element.

        More words.
        """
        return Flops(other=call.output.numel)

    assert price(CALL) == Flops(other=6)
    (entry,) = registrations()
    assert (entry.kind, entry.text) == ("elementwise", "One product an element.")
    assert entry.source.startswith("registered by test_operators_registered.")
    assert double(CALL) == Flops(other=6)  # the function itself is handed back


def test_one_overload_only() -> None:
    gtflops.register_flops("mylib::double.default")(lambda call: 1)
    assert price(CALL) == Flops(matmul=1)
    assert lookup("mylib.double.Tensor") is None
    gtflops.register_flops("mylib::inplace")(lambda call: 2)
    assert lookup("mylib.inplace_.default") is lookup("mylib.inplace.default") is not None


def test_torchs_own_names_of_operators(double: Any) -> None:
    for op in (double, double.default):
        gtflops.register_flops(op, replace=True)(lambda call: 5)
        assert price(Call("gtflops_tests.double.default", (MATRIX,), (), (MATRIX,))) == Flops(matmul=5)

    @torch.library.custom_op("gtflops_tests::triple", mutates_args=())
    def triple(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    gtflops.register_flops(triple)(lambda call: 7)
    with gtflops.ExecutedFlops() as executed:
        triple(torch.ones(2))
    assert executed.flops == Flops(matmul=7)


def test_by_output_and_the_table_replaced() -> None:
    two = Call("mylib.double.default", (MATRIX,), (), (MATRIX, None))
    parts = FlopsByOutput(Flops(1), (Flops(2), Flops(3)))
    gtflops.register_flops("mylib::double")(lambda call: parts)
    assert price(two) == parts
    assert parts.executed(two) == Flops(3)
    with pytest.raises(gtflops.InputError, match=r"prices 2 outputs, expected 1"):
        price(CALL)
    mm = Call("aten.mm.default", (MATRIX, TensorType((3, 2), "float32")), (), (TensorType((2, 2), "float32"),))
    with pytest.raises(gtflops.InputError, match=r"aten\.mm has a price already \(2 m k n\); replace=True"):
        gtflops.register_flops("aten::mm")
    gtflops.register_flops("aten::mm", replace=True)(lambda call: 1)
    assert price(mm) == Flops(1)
    with pytest.raises(gtflops.InputError, match="has a price already"):
        gtflops.register_flops("aten::mm")


@pytest.mark.parametrize("name", ["double", "mylib::", "mylib/double", "", "a.b.c.d", 3, None])
def test_a_name_that_is_none(name: Any) -> None:
    with pytest.raises(gtflops.InputError, match="names no operator, expected one such as 'mylib::my_op'"):
        gtflops.register_flops(name)


def test_other_wrong_arguments() -> None:
    with pytest.raises(gtflops.InputError, match="kind is 'fast', expected one of matrix product, convolution"):
        gtflops.register_flops("mylib::double", kind="fast")
    with pytest.raises(gtflops.InputError, match="expected a function of a gtflops"):
        gtflops.register_flops("mylib::double")(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "cost", [None, 1.5, True, -1, "6", (1, 2), Flops(-1), Flops(1.5), FlopsByOutput(Flops(), (3,))]
)  # type: ignore[arg-type]
def test_a_result_that_is_no_price(cost: Any) -> None:
    gtflops.register_flops("mylib::double")(lambda call: cost)
    with pytest.raises(gtflops.InputError, match=r"the formula for mylib\.double\.default returned .*expected Flops"):
        price(CALL)


class Doubling(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.gtflops_tests.double(super().forward(x)).sum()


def test_a_profile_with_a_registered_operator(double: Any) -> None:
    model, x = Doubling(3, 2), torch.ones(4, 3)
    before = gtflops.profile(model, x, lambda y, _: y)
    assert [op.name for op in before.unsupported] == ["gtflops_tests.double.default"]
    gtflops.register_flops(double)(lambda call: 1000 * call.output.numel)
    after = gtflops.profile(model, x, lambda y, _: y)
    assert after.unsupported == ()
    assert after.forward_flops - before.forward_flops == 8000
    with gtflops.ExecutedFlops() as executed:
        model(x).backward()
    assert executed.total == after.full_flops


@pytest.fixture
def registered_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered in the test is gone after it."""
    entries = dict(flop_counter.flop_registry)
    yield  # type: ignore[misc]
    flop_counter.flop_registry.clear()
    flop_counter.flop_registry.update(entries)


@pytest.mark.usefixtures("registered_with_torch")
@pytest.mark.parametrize("get_raw", [False, True])
def test_what_is_registered_with_torch_is_honoured(double: Any, get_raw: bool) -> None:
    @flop_counter.register_flop_formula(double, get_raw=get_raw)
    def formula(x: Any, *args: Any, out_shape: Any = None, out_val: Any = None, **kwargs: Any) -> int:
        rows, columns = x.shape if get_raw else x
        assert tuple(out_val.shape if get_raw else out_shape) == (rows, columns)
        return 10 * rows * columns

    model, x = Doubling(3, 2), torch.ones(4, 3)
    profile = gtflops.profile(model, x, lambda y, _: y)
    assert profile.unsupported == ()
    with flop_counter.FlopCounterMode(display=False) as counter, gtflops.ExecutedFlops() as executed:
        model(x)
    assert profile.step_flops("none", ops="matmul").forward == counter.get_total_flops() == 2 * 4 * 3 * 2 + 80
    assert executed.flops.matmul == counter.get_total_flops()
    # The user's formula goes before torch's, the table as well.
    gtflops.register_flops(double)(lambda call: 1)
    assert price(Call("gtflops_tests.double.default", (MATRIX,), (), (MATRIX,))) == Flops(matmul=1)
    entry = lookup("aten.mm")
    assert entry is not None
    assert entry.text == "2 m k n"


@pytest.mark.usefixtures("registered_with_torch")
@pytest.mark.parametrize(
    ("result", "message"), [(1.5, "returned 1.5"), (ValueError("no"), "failed on .*ValueError: no")]
)
def test_what_is_registered_with_torch_and_fails(double: Any, result: Any, message: str) -> None:
    @flop_counter.register_flop_formula(double)
    def formula(x: Any, **kwargs: Any) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    with pytest.raises(gtflops.InputError, match=f"registered with torch for gtflops_tests.double.default {message}"):
        price(Call("gtflops_tests.double.default", (MATRIX,), (), (MATRIX,)))


def test_higher_order_operators_of_torchs_counter() -> None:
    """flex_attention is no ATen operator; torch's counter knows it by its object."""
    q = TensorType((1, 2, 8, 4), "float32")
    assert price(Call("higher_order.flex_attention", (q, q, q), (), (q,))) == Flops(matmul=2 * 2 * 2 * 8 * 8 * 4)

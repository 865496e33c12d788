"""The promise on models of every kind: for any selection, the operators predicted are those that PyTorch executes."""

import random
from collections import Counter
from typing import Any

import pytest

import gtflops
from real_steps import executed_operators, predicted_operators, train_only
from zoo import ZOO


def selections(names: tuple[str, ...], number: int) -> list[list[str]]:
    """None, all, first, last, one, and ``number`` random subsets of every size."""
    draw = random.Random(11)
    fixed = [[], list(names), [names[0]], [names[-1]], [draw.choice(names)]]
    return fixed + [draw.sample(names, draw.randint(1, len(names))) for _ in range(number)]


def by_price(operators: Counter[Any]) -> Counter[Any]:
    """Products by one matrix and the batches of products which they may be instead, by their price alone."""
    alike: Counter[Any] = Counter()
    for (op, shapes, cost), count in operators.items():
        op = op.replace("_forward_only", "")
        product = op in ("aten.mm.default", "aten.bmm.default")
        alike["product" if product else op, () if product else shapes, cost] += count
    return alike


@pytest.mark.parametrize("name", ZOO)
def test_operators_equal_the_executed_ones(name: str) -> None:
    case = ZOO[name]()
    profile = gtflops.profile(case.model, case.batch, case.loss)
    assert profile.unsupported == ()
    trainable = tuple(tensor.name for tensor in profile.tensors if tensor.has_gradient)
    for names in selections(trainable, 10):
        train_only(case.model, names)
        executed = executed_operators(case.model, case.batch, case.loss)
        predicted = predicted_operators(profile, names)
        if any("another name, at the same FLOPs" in note for note in profile.notes):
            executed, predicted = by_price(executed), by_price(predicted)
        assert executed == predicted, (names, executed - predicted, predicted - executed)
        step = profile.step_flops(names)
        assert step.total == sum(sum(cost) * count for (_, _, cost), count in executed.items())


# What PyTorch's counter has no formula for (on the CPU), and what it counts otherwise.
WITHOUT_FORMULA = {
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward",
    "aten._grouped_mm",
    "aten._trilinear",
    "aten.mkldnn_rnn_layer",
    "aten.mkldnn_rnn_layer_backward",
    "aten.mv",
    "aten.dot",
    "aten.addmv",
}
GROUPED = {"convolution-grouped", "convolution-depthwise", "convnext", "mamba-eager"}  # overcounted, once a group


@pytest.mark.parametrize("name", ZOO)
def test_matrix_products_equal_pytorchs_counter(name: str) -> None:
    """Operator by operator, wherever PyTorch's own formulas are right."""
    case = ZOO[name]()
    found = gtflops.profile(case.model, case.batch, case.loss).verify(case.model, case.batch, case.loss, selections=2)
    assert found.exact
    for check in found.checks:
        differing = {difference.operator for difference in check.pytorch_differences}
        assert differing <= WITHOUT_FORMULA | ({"aten.convolution_backward"} if name in GROUPED else set())
        if name in GROUPED:
            assert all(difference.other >= difference.predicted for difference in check.pytorch_differences)

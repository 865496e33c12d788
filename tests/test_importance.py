"""Importance: equal to what the optimizer would really do, and nothing is changed by measuring it."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

import gtflops
from small_models import build, padded_batch
from test_capture import Restless, assert_same, squared, state_of

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1),
    "adamw-amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, amsgrad=True, betas=(0.8, 0.95)),
    "adamw-maximize": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, maximize=True),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=3e-3, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.2),
    "sgd-nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-3),
}


def by_a_real_step(model: torch.nn.Module, batch: Any, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The definition, on copies: -sum(dw * g) over one step that is really made."""
    model, optimizer = copy.deepcopy((model, optimizer))
    before = {name: tensor.detach().double().clone() for name, tensor in model.named_parameters()}
    optimizer.zero_grad()
    model(**batch).loss.backward()
    gradients = {name: tensor.grad.double().clone() for name, tensor in model.named_parameters()}
    optimizer.step()
    return {
        name: -((tensor.detach().double() - before[name]) * gradients[name]).sum().item()
        for name, tensor in model.named_parameters()
    }


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equals_a_real_step(kind: str, steps_before: int) -> None:
    model, batch = build("llama").eval().double(), padded_batch()  # double, so that only the formula is tested
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(steps_before):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    expected = by_a_real_step(model, batch, optimizer)
    measured = gtflops.measure_importance(model, [batch], optimizer)
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, rel=1e-7, abs=1e-14), name


def optimizer_state(optimizer: torch.optim.Optimizer) -> Any:
    names = {id(tensor): index for index, group in enumerate(optimizer.param_groups) for tensor in group["params"]}
    return {
        "state": copy.deepcopy({names[id(tensor)]: dict(values) for tensor, values in optimizer.state.items()}),
        "identity": [
            id(value) for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)
        ],
        "groups": [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
        "attributes": sorted(vars(optimizer)),
    }


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_everything_is_left_bit_identical(kind: str, steps_before: int) -> None:
    model, batch = Restless(), torch.randn(6, 4)
    optimizer = OPTIMIZERS[kind](model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for _ in range(steps_before):
        squared(model(batch), batch).backward()
        optimizer.step()
        scheduler.step()
    model.linear.bias.requires_grad_(False)
    model.norm.eval()
    before, optimizer_before = state_of(model, batch), optimizer_state(optimizer)
    measured = gtflops.measure_importance(model, [batch, batch], optimizer, squared)
    assert measured.keys() == dict(model.named_parameters()).keys()
    assert any(measured.values())
    assert_same(before, state_of(model, batch))
    assert_same(optimizer_before, optimizer_state(optimizer))


@pytest.mark.parametrize("kind", ["adamw", "rmsprop"])
def test_a_failing_batch_loses_nothing(kind: str) -> None:
    model, batch, refused = Restless(), torch.randn(6, 4), torch.randn(6, 5)
    optimizer = OPTIMIZERS[kind](model.parameters())
    squared(model(batch), batch).backward()
    optimizer.step()
    before, optimizer_before = state_of(model, batch), optimizer_state(optimizer)
    with pytest.raises(gtflops.InputError, match="refused the batch"):
        gtflops.measure_importance(model, [batch, refused], optimizer, squared)
    assert_same(before, state_of(model, batch))
    assert_same(optimizer_before, optimizer_state(optimizer))
    assert not any(tensor._post_accumulate_grad_hooks for tensor in model.parameters())


def test_the_average_over_batches() -> None:
    model, first, second = build("gpt2").eval(), padded_batch(), padded_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one = gtflops.measure_importance(model, [first], optimizer)
    other = gtflops.measure_importance(model, [second], optimizer)
    both = gtflops.measure_importance(model, iter([first, second]), optimizer)
    for name in both:
        assert both[name] == pytest.approx((one[name] + other[name]) / 2, rel=1e-12)


def test_frozen_and_unused_tensors() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model.forward = lambda x: model["a"](x).sum()  # type: ignore[method-assign]
    model["a"].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    measured = gtflops.measure_importance(model, [torch.ones(2, 3)], optimizer, lambda y, _: y)
    assert measured["a.weight"] != 0
    assert measured["b.weight"] == measured["b.bias"] == 0.0
    assert not model["a"].weight.requires_grad


def test_sparse_gradients() -> None:
    def model_with(sparse: bool) -> torch.nn.Module:
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Embedding(7, 3, sparse=sparse), torch.nn.Linear(3, 1))

    batch = torch.tensor([[1, 2, 2]])
    dense, sparse = (
        gtflops.measure_importance(model, [batch], torch.optim.SGD(model.parameters(), lr=0.1), squared)
        for model in (model_with(False), model_with(True))
    )
    assert sparse == pytest.approx(dense)


def test_groups_held_at_zero_have_no_importance() -> None:
    """Only where every rate is 0 does the base rate stand in: a group that a schedule freezes would not move."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    optimizer = torch.optim.AdamW([{"params": layer.parameters()} for layer in model], lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda _: 0.0])
    measured = gtflops.measure_importance(model, [torch.ones(2, 4)], optimizer, squared)
    assert {name: value != 0 for name, value in measured.items()} == {
        "0.weight": True,
        "0.bias": True,
        "1.weight": False,
        "1.bias": False,
    }


def test_an_empty_group_and_a_sparse_buffer() -> None:
    class Graph(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("adjacency", torch.eye(2).to_sparse())

    model = Graph()
    model.bias.requires_grad_(False)
    model.weight.grad = torch.ones(4, 4)
    optimizer = torch.optim.NAdam([{"params": list(model.parameters())}, {"params": []}])
    assert any(gtflops.measure_importance(model, [torch.ones(2, 4)], optimizer, squared).values())
    assert torch.equal(model.weight.grad, torch.ones(4, 4))
    assert not model.bias.requires_grad


def test_the_users_step_hooks_are_not_run() -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.RMSprop(model.parameters())
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    gtflops.measure_importance(model, [torch.ones(2, 4)], optimizer, squared)
    assert calls == []
    squared(model(torch.ones(2, 4)), None).backward()
    optimizer.step()
    assert calls == [1]


# --- bad input --------------------------------------------------------------------------------------------------


def test_no_batches() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(gtflops.InputError, match="batches is empty"):
        gtflops.measure_importance(model, [], torch.optim.AdamW(model.parameters()), squared)


def test_an_optimizer_that_does_not_hold_all_tensors() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(gtflops.InputError, match="does not hold 1 of 2 tensors, first 'bias'"):
        gtflops.measure_importance(model, [torch.ones(1, 2)], torch.optim.AdamW([model.weight]), squared)


def test_an_optimizer_in_the_backward_pass_is_refused() -> None:
    model = torch.nn.Linear(4, 4)
    model.weight.register_post_accumulate_grad_hook(lambda tensor: tensor.data.zero_())
    before = state_of(model, None)
    with pytest.raises(gtflops.InputError, match="'weight' has a post-accumulate-gradient hook"):
        gtflops.measure_importance(model, [torch.ones(2, 4)], torch.optim.SGD(model.parameters(), lr=0.1), squared)
    assert_same(before, state_of(model, None))


def test_a_learning_rate_of_zero() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(gtflops.InputError, match="learning rate is 0"):
        gtflops.measure_importance(model, [torch.ones(1, 2)], torch.optim.AdamW(model.parameters(), lr=0.0), squared)


def test_a_loss_that_is_not_finite() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(gtflops.InputError, match="the loss is nan"):
        gtflops.measure_importance(
            model, [torch.full((1, 2), math.nan)], torch.optim.AdamW(model.parameters()), squared
        )


@pytest.mark.parametrize("kind", ["adamw", "nadam"])
def test_an_optimizer_of_other_tensors_too(kind: str) -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.ones(()))
    optimizer = OPTIMIZERS[kind]([*model.parameters(), other])
    with pytest.raises(gtflops.InputError, match="holds 1 tensors that are not the model's"):
        gtflops.measure_importance(model, [torch.ones(1, 2)], optimizer, lambda y, _: (y * other).sum())
    assert (other.item(), other.grad) == (1.0, None)


def test_a_gradient_in_parts() -> None:
    class Checkpointed(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                x = torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=True)
            return x

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Checkpointed(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(gtflops.InputError, match="arrives in parts"):
        gtflops.measure_importance(model, [torch.ones(1, 2)], optimizer, squared)


def test_an_optimizer_that_needs_a_closure() -> None:
    model = torch.nn.Linear(2, 2)
    before = state_of(model, None)
    with pytest.raises(gtflops.InputError, match="LBFGS cannot make a step by itself"):
        gtflops.measure_importance(model, [torch.ones(1, 2)], torch.optim.LBFGS(model.parameters()), squared)
    assert_same(before, state_of(model, None))

"""Importance: equal to what the optimizer would really do, and nothing is changed by measuring it."""

import copy
import math
from typing import Any

import pytest
import scipy.stats
import torch
import torch.utils.checkpoint
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

import gtflops
from gtflops.importance import coming_rates
from small_models import build, padded_batch
from test_capture import Restless, assert_same, squared, state_of


class Doubled(torch.optim.SGD):
    """A subclass, which may do anything: it cannot be told from its type, and makes a real step."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step(closure)


class OwnState(torch.optim.SGD):
    """Makes its state when it is built, as torch's optimizers do not."""

    def __init__(self, *arguments: Any, **rest: Any) -> None:
        super().__init__(*arguments, **rest)
        for tensor in self.param_groups[0]["params"]:
            self.state[tensor]["steps"] = 0

    def step(self, closure: Any = None) -> Any:
        for tensor in self.param_groups[0]["params"]:
            self.state[tensor]["steps"] += 1
        return torch.optim.SGD.step.__wrapped__(self, closure)


def in_two_groups(kind: Any, parameters: Any, **rest: Any) -> Any:
    first, *others = parameters
    return kind([{"params": [first], "lr": 1e-3, "weight_decay": 0.3}, {"params": others}], **rest)


def muon(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon([tensor for tensor in parameters if tensor.dim() == 2], lr=1e-3)


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1),
    "adamw-amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, amsgrad=True, betas=(0.8, 0.95)),
    "adamw-maximize": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, maximize=True),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, fused=True),
    "adamw-foreach": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, foreach=True),
    "adamw-tensor-lr": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(3e-3, dtype=torch.float64)),
    "adamw-groups": lambda parameters: in_two_groups(torch.optim.AdamW, parameters, lr=3e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=3e-3, weight_decay=0.1),
    "adam-decoupled": lambda parameters: torch.optim.Adam(
        parameters, lr=3e-3, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.2),
    "sgd-nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    "sgd-subclass": lambda parameters: Doubled(parameters, lr=0.01, momentum=0.9),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(
        parameters, lr=1e-2, lr_decay=0.1, initial_accumulator_value=0.01
    ),
    "adadelta": lambda parameters: torch.optim.Adadelta(parameters, lr=0.5, weight_decay=0.1),
    "adamax": lambda parameters: torch.optim.Adamax(parameters, lr=1e-3),
    "asgd": lambda parameters: torch.optim.ASGD(parameters, lr=1e-2, t0=1),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=1e-3),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-3, weight_decay=0.1),
    "radam": lambda parameters: torch.optim.RAdam(parameters, lr=1e-3, betas=(0.9, 0.5)),
    "muon": muon,
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2, weight_decay=0.1),
    "adafactor-transformers": lambda parameters: transformers.Adafactor(
        parameters, lr=1e-3, relative_step=False, beta1=0.9, weight_decay=0.1
    ),
    "adafactor-transformers-relative": lambda parameters: transformers.Adafactor(
        parameters, scale_parameter=True, relative_step=True, warmup_init=True
    ),
}
#: Enough to tell the ways that there are to measure apart.
SOME = ("adamw", "rmsprop", "adafactor", "sgd-subclass")


def trained(kind: str, steps: int, family: str = "llama") -> tuple[Any, Any, torch.optim.Optimizer]:
    """A model in float64, so that only the formula is tested; a batch; an optimizer that made some steps."""
    model, batch = build(family).eval().double(), padded_batch()
    if kind == "muon":
        for tensor in model.parameters():
            tensor.requires_grad_(tensor.dim() == 2)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model, batch, optimizer


def by_a_real_step(
    model: torch.nn.Module, batch: Any, optimizer: torch.optim.Optimizer, optimizer_kind: Any = None
) -> dict[str, float]:
    """The definition, on copies: -sum(dw * g) over one step that is really made, by a new optimizer if asked for."""
    model, optimizer = copy.deepcopy((model, optimizer))
    if optimizer_kind is not None:
        optimizer = optimizer_kind(model.parameters())
    before = {name: tensor.detach().double().clone() for name, tensor in model.named_parameters()}
    model.zero_grad()
    model(**batch).loss.backward()
    gradients = {
        name: 0.0 if tensor.grad is None else tensor.grad.double().clone() for name, tensor in model.named_parameters()
    }
    optimizer.step()
    return {
        name: -((tensor.detach().double() - before[name]) * gradients[name]).sum().item()
        for name, tensor in model.named_parameters()
    }


def assert_close(measured: dict[str, float], expected: dict[str, float]) -> None:
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, rel=1e-7, abs=1e-14), name
    assert any(expected.values())


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equals_a_real_step(kind: str, steps_before: int) -> None:
    model, batch, optimizer = trained(kind, steps_before)
    expected = by_a_real_step(model, batch, optimizer)
    assert_close(gtflops.measure_importance(model, [batch], optimizer, update="next"), expected)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_first_update_is_that_of_a_new_optimizer(kind: str) -> None:
    model, batch, optimizer = trained(kind, 3)
    expected = by_a_real_step(model, batch, optimizer, OPTIMIZERS[kind])
    assert_close(gtflops.measure_importance(model, [batch], optimizer), expected)


@pytest.mark.parametrize("kind", SOME)
def test_two_passes_as_published(kind: str) -> None:
    model, batch, optimizer = trained(kind, 2, "llama-tied")
    expected = by_a_real_step(model, batch, optimizer)
    assert_close(gtflops.measure_importance(model, [batch], optimizer, method="two-pass"), expected)
    if kind == "sgd-subclass":  # has no state before its first step
        expected = by_a_real_step(model, batch, optimizer, OPTIMIZERS[kind])
        measured = gtflops.measure_importance(model, [batch], optimizer, method="two-pass", update="first")
        assert_close(measured, expected)


@settings(max_examples=40, deadline=None)
@given(
    decay=st.sampled_from([0.0, 0.1]),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
    eps=st.floats(1e-12, 1.0),
    flags=st.fixed_dictionaries({name: st.booleans() for name in ("amsgrad", "maximize", "decoupled_weight_decay")}),
    steps_before=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_any_setting_of_adam(
    decay: float, betas: tuple[float, float], eps: float, flags: dict[str, bool], steps_before: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = torch.nn.Linear(5, 3).double()
    layer.bias.data *= 1e3
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, betas=betas, eps=eps, weight_decay=decay, **flags)
    x = torch.randn(4, 5).double()
    for _ in range(steps_before):
        optimizer.zero_grad()
        squared(layer(x), x).backward()
        optimizer.step()
    measured = gtflops.measure_importance(layer, [x], optimizer, squared, update="next")
    published = gtflops.measure_importance(layer, [x], optimizer, squared, method="two-pass")
    assert measured == pytest.approx(published, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize(("rate", "steps_before", "least"), [(2e-5, 6, 0.99), (2e-5, 0, 0.95), (5e-4, 6, 0.8)])
def test_one_pass_ranks_tensors_as_two_at_low_rates(rate: float, steps_before: int, least: float) -> None:
    """The second of the two passes being one at the new weights, whose gradients are others where rates are high."""
    torch.manual_seed(0)
    model, batch = build("llama").eval(), padded_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)

    def step() -> None:
        model.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    for _ in range(steps_before):
        step()
    measured = gtflops.measure_importance(model, [batch], optimizer, update="next")
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    step()
    model.zero_grad()
    model(**batch).loss.backward()
    published = {
        name: -torch.sum((tensor.detach() - before[name]) * tensor.grad).item()
        for name, tensor in model.named_parameters()
    }
    correlation = scipy.stats.spearmanr([measured[name] for name in published], list(published.values())).statistic
    assert correlation > least


def test_untrained_tensors_do_not_look_more_important() -> None:
    """Under Adam the next update of an untrained tensor is several times a trained one's; the first is like the first.

    Two equal layers, of which one was trained on noise and put back."""
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(16, 16, bias=False) for _ in range(2)])
    model.forward = lambda x: sum(layer(x) for layer in model)  # type: ignore[method-assign,assignment]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    kept = model[0].weight.detach().clone()
    for _ in range(20):
        (model[0].weight * torch.randn(16, 16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model[0].weight.data.copy_(kept)
    x = torch.randn(8, 16)
    following = gtflops.measure_importance(model, [x], optimizer, squared, update="next")
    alike = gtflops.measure_importance(model, [x], optimizer, squared)
    assert following["1.weight"] > 3 * following["0.weight"]
    assert alike["1.weight"] == alike["0.weight"] > 0


def test_bfloat16_is_measured_in_float32() -> None:
    """The weights after a step are mostly those before; the update that was meant is not 0."""
    model, batch = build("llama").eval().bfloat16(), padded_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)
    for update in ("first", "next"):
        model.zero_grad()
        model(**batch).loss.backward()
        expected = {}
        for name, tensor in model.named_parameters():
            weight, slope = tensor.detach().double(), tensor.grad.double()
            state = {key: value.double() for key, value in optimizer.state[tensor].items()} if update == "next" else {}
            step = state.get("step", torch.zeros(())).item() + 1
            mean = 0.9 * state.get("exp_avg", 0) + 0.1 * slope
            square = 0.999 * state.get("exp_avg_sq", 0) + 0.001 * slope**2
            adapted = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
            expected[name] = (1e-5 * (adapted + 0.1 * weight) * slope).sum().item()
        model.zero_grad()
        measured = gtflops.measure_importance(model, [batch], optimizer, update=update)
        assert measured == pytest.approx(expected, rel=1e-4)
        real = gtflops.measure_importance(model, [batch], optimizer, method="two-pass")
        assert sum(abs(real[name] - expected[name]) > 0.3 * expected[name] for name in expected) > len(expected) / 3
        model(**batch).loss.backward()
        optimizer.step()


def test_bfloat16_and_adafactor() -> None:
    """torch's Adafactor takes its epsilon from the type of the tensor, not from the one that it is computed in."""
    model, x = torch.nn.Linear(8, 8, bias=False).bfloat16(), torch.full((4, 8), 1e-2, dtype=torch.bfloat16)
    measured = gtflops.measure_importance(model, [x], torch.optim.Adafactor(model.parameters(), lr=0.1), squared)
    wide, x = copy.deepcopy(model).double(), x.double()
    as_in_bfloat16, as_in_double = (
        torch.optim.Adafactor(wide.parameters(), lr=0.1, eps=(eps, 1e-3))
        for eps in (torch.finfo(torch.bfloat16).eps, None)
    )
    assert measured == pytest.approx(gtflops.measure_importance(wide, [x], as_in_bfloat16, squared), rel=0.05)
    assert measured != pytest.approx(gtflops.measure_importance(wide, [x], as_in_double, squared), rel=0.5)


def test_under_autocast() -> None:
    """The forward pass takes the autocast around the call, and the rest does not."""
    model, batch = build("llama").eval(), padded_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        value = model(**batch).loss
    value.backward()
    predicted = gtflops.expected_drop(model, optimizer)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        measured = gtflops.measure_importance(model, [batch], optimizer)
    assert sum(measured.values()) == pytest.approx(predicted, rel=1e-6)
    plain = gtflops.measure_importance(model, [batch], optimizer)
    assert sum(plain.values()) != pytest.approx(predicted, rel=1e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_non_reentrant_checkpointing() -> None:
    model, batch, optimizer = trained("adamw", 1)
    expected = by_a_real_step(model, batch, optimizer)
    model.train()  # checkpoints are for training only; this model has no dropout
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(gtflops.measure_importance(model, [batch], optimizer, update="next"), expected)


def test_accelerates_wrappers_are_seen_through() -> None:
    model, batch = build("llama").eval(), padded_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = LambdaLR(optimizer, lambda step: float(step > 0))
    expected = gtflops.measure_importance(model, [batch], torch.optim.AdamW(model.parameters(), lr=1e-3))
    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
        wrapped, wrapped_scheduler = accelerator.prepare(optimizer, scheduler)
        assert type(wrapped) is not torch.optim.AdamW
        accelerator.gradient_state._set_sync_gradients(False)  # in the middle of an accumulation
        for method in ("one-pass", "two-pass"):
            measured = gtflops.measure_importance(
                model, [batch], wrapped, scheduler=wrapped_scheduler, method=method, update="first"
            )
            assert measured == pytest.approx(expected, rel=1e-2, abs=1e-9)
        assert optimizer.param_groups[0]["lr"] == 0.0
    finally:
        accelerator.gradient_state._set_sync_gradients(True)
        AcceleratorState._reset_state(reset_partial_state=True)


def test_shards() -> None:
    """What fully_shard made is measured by the shards of this process; of one process, they are all."""

    def model_and_optimizer(shard: bool) -> Any:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        if shard:
            for module in (model[0], model):
                fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        squared(model(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()
        return model, optimizer

    x = torch.randn(5, 4)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for options in ({"update": "next"}, {"update": "first"}, {"method": "two-pass"}):
            expected, measured = (
                gtflops.measure_importance(*(model, [x], optimizer, squared), **options)
                for model, optimizer in map(model_and_optimizer, (False, True))
            )
            assert measured == pytest.approx(expected)
    finally:
        torch.distributed.destroy_process_group()


# --- the learning rate of the coming steps --------------------------------------------------------------------------

SCHEDULES: dict[str, Any] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 0.5 if step >= 3 else 0.0),
    "groups": lambda optimizer: LambdaLR(optimizer, [lambda _: 0.0, lambda step: float(step > 1)]),
    "warm-up": lambda optimizer: transformers.get_linear_schedule_with_warmup(optimizer, 5, 20),
    "cosine": lambda optimizer: transformers.get_cosine_schedule_with_warmup(optimizer, 7, 20),
    "one-cycle": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=10, div_factor=math.inf),
    "sequential": lambda optimizer: SequentialLR(
        optimizer,
        [LambdaLR(optimizer, lambda _: 0.0), LinearLR(optimizer, start_factor=0.25, total_iters=4)],
        milestones=[2],
    ),
}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning", "ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_schedules_next_rate(kind: str, rate: Any) -> None:
    model, x = torch.nn.Linear(4, 4), torch.ones(2, 4)

    def optimizer_with(rate: Any) -> torch.optim.Optimizer:
        rate = rate.clone() if isinstance(rate, torch.Tensor) else rate
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5 * rate}]
        return torch.optim.AdamW(groups, lr=rate)

    def rates(optimizer: torch.optim.Optimizer) -> list[float]:
        return [float(group["lr"]) for group in optimizer.param_groups]

    optimizer, apart = optimizer_with(rate), optimizer_with(rate)
    scheduler, scheduler_apart = SCHEDULES[kind](optimizer), SCHEDULES[kind](apart)
    assert rates(optimizer) == [0.0, 0.0]
    before, state = optimizer_state(optimizer), copy.deepcopy(scheduler.state_dict())
    measured = gtflops.measure_importance(model, [x], optimizer, squared, scheduler=scheduler)
    assert_same(before, optimizer_state(optimizer))
    assert str(state) == str(scheduler.state_dict())

    trajectory = [rates(apart)]
    for _ in range(8):
        scheduler_apart.step()
        trajectory.append(rates(apart))
    following = next(step for step in trajectory if any(step))
    assert coming_rates(optimizer, scheduler) == following
    for group, coming in zip(apart.param_groups, following, strict=True):
        group["lr"] = coming
    assert measured == gtflops.measure_importance(model, [x], apart, squared)

    went_on = [rates(optimizer)]  # and the schedule goes on as though nothing had been asked of it
    for _ in range(8):
        scheduler.step()
        went_on.append(rates(optimizer))
    assert went_on == trajectory


def test_a_schedule_that_is_callable_and_keeps_count() -> None:
    class Counting:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, step: int) -> float:
            self.calls += 1
            return float(self.calls > 3)

    model, rates = torch.nn.Linear(2, 2), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = LambdaLR(optimizer, rates)
    assert coming_rates(optimizer, scheduler) == [0.5]
    assert rates.calls == 1


def test_a_rate_above_0_is_taken_as_it_is() -> None:
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.5)
    assert coming_rates(optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))) == [0.5]


def test_without_the_scheduler_the_rate_it_started_from() -> None:
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.5)
    LambdaLR(optimizer, lambda step: float(step))
    assert coming_rates(optimizer) == [0.5]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: LambdaLR(optimizer, lambda _: 0.0),
        lambda optimizer: OneCycleLR(optimizer, 0.0, total_steps=4),
        ReduceLROnPlateau,
    ],
    ids=["constant", "ends", "needs a metric"],
)
def test_a_schedule_that_stays_at_0(schedule: Any) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = schedule(optimizer)
    before = optimizer_state(optimizer)
    with pytest.raises(gtflops.InputError, match=r"the learning rate is 0 and .* does not raise it"):
        gtflops.measure_importance(model, [torch.ones(1, 2)], optimizer, squared, scheduler=scheduler)
    assert_same(before, optimizer_state(optimizer))


# --- does the estimate hold? ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOME)
def test_the_expected_drop_is_the_sum_of_importances(kind: str) -> None:
    model, batch, optimizer = trained(kind, 2)
    importance = gtflops.measure_importance(model, [batch], optimizer, update="next")
    selected = list(importance)[::3]
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(name in selected)
        tensor.grad = None
    model(**batch).loss.backward()
    before, optimizer_before = state_of(model, batch), optimizer_state(optimizer)
    drop = gtflops.expected_drop(model, optimizer)
    assert drop == pytest.approx(sum(importance[name] for name in selected), rel=1e-9)
    assert_same(before, state_of(model, batch))
    assert_same(optimizer_before, optimizer_state(optimizer))


def test_the_expected_drop_with_clipped_gradients() -> None:
    """The update is made of what is clipped, and the slope is what it was before."""
    layer, x = torch.nn.Linear(3, 3, bias=False).double(), torch.ones(2, 3).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    squared(layer(x), x).backward()
    slope = layer.weight.grad.clone()
    layer.weight.grad *= 0.25
    expected = (0.1 * 0.25 * slope * slope).sum().item()
    assert gtflops.expected_drop(layer, optimizer, scale=0.25) == pytest.approx(expected)


def test_no_gradient_no_expectation() -> None:
    layer = torch.nn.Linear(3, 3)
    with pytest.raises(gtflops.InputError, match="no tensor that the optimizer holds has a gradient"):
        gtflops.expected_drop(layer, torch.optim.SGD(layer.parameters(), lr=0.1))


@pytest.mark.parametrize("rate", [1e-3, 0.3, 3.0])
def test_predicted_and_real_drop(rate: float) -> None:
    """loss = w^2, w = 1: the slope is 2, so a step predicts 4 rate, and really brings 4 rate - 4 rate^2."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    batch = torch.ones(1, 1).double()
    before, optimizer_before = state_of(model, batch), optimizer_state(optimizer)
    check = gtflops.check_importance(model, batch, optimizer, squared)
    assert check.predicted == pytest.approx(4 * rate)
    assert check.real == pytest.approx(4 * rate - 4 * rate**2)
    assert check.holds == (rate < 0.5)
    assert ("does not hold" in str(check)) == (rate > 0.5)
    assert_same(before, state_of(model, batch))
    assert_same(optimizer_before, optimizer_state(optimizer))


@pytest.mark.parametrize("kind", ["adamw", "sgd-subclass"])
def test_a_check_leaves_everything_as_it_was(kind: str) -> None:
    model, batch = Restless(), torch.randn(6, 4)
    optimizer = OPTIMIZERS[kind](model.parameters())
    squared(model(batch), batch).backward()
    optimizer.step()
    model.linear.bias.requires_grad_(False)
    before, optimizer_before = state_of(model, batch), optimizer_state(optimizer)
    check = gtflops.check_importance(model, batch, optimizer, squared)
    assert check.holds  # dropout drops the same in both passes, or the losses would be of different functions
    assert check.real != 0
    assert_same(before, state_of(model, batch))
    assert_same(optimizer_before, optimizer_state(optimizer))
    with pytest.raises(gtflops.InputError, match="refused the batch"):
        gtflops.check_importance(model, torch.ones(6, 5), optimizer, squared)
    assert_same(before, state_of(model, batch))
    assert_same(optimizer_before, optimizer_state(optimizer))


def test_a_first_step_at_a_high_rate_does_not_hold() -> None:
    """As FINDINGS saw: Adam's first step moves everything by the rate, whatever the slope."""
    model, batch = build("llama").eval(), padded_batch()
    low, high = (
        gtflops.check_importance(model, batch, torch.optim.AdamW(model.parameters(), lr=rate)) for rate in (1e-5, 0.3)
    )
    assert (low.holds, high.holds) == (True, False)


def test_a_difference_that_the_loss_cannot_show_is_none() -> None:
    assert gtflops.ImportanceCheck(predicted=1e-9, before=3.0, after=3.0).holds
    assert not gtflops.ImportanceCheck(predicted=1e-2, before=3.0, after=3.0).holds
    assert not gtflops.ImportanceCheck(predicted=-1e-2, before=3.0, after=2.99).holds


def test_a_check_needs_something_trained() -> None:
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(gtflops.InputError, match="no tensor that the optimizer holds is trainable"):
        gtflops.check_importance(model, torch.ones(1, 2), torch.optim.SGD(model.parameters(), lr=0.1), squared)


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_bytes(run: Any) -> int:
    """The most memory that torch's CPU allocator had given out at once during ``run``, beyond what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    sizes = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    assert sizes
    current = peak = 0
    for _, size in sorted(sizes, key=lambda item: item[0]):
        current += size
        peak = max(peak, current)
    return peak


@pytest.mark.parametrize("update", ["first", "next"])
@pytest.mark.parametrize("kind", ["adamw", "adam-decoupled", "sgd-momentum", "nadam"])
def test_at_most_the_largest_tensor_more_than_a_step(kind: str, update: str) -> None:
    model, x = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4))), torch.randn(2, 1024)
    optimizer = OPTIMIZERS[kind](model.parameters())

    def step() -> None:
        squared(model(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the state is there from now on
    plain = peak_bytes(step)
    largest = max(tensor.nbytes for tensor in model.parameters())
    assert plain > 4 * largest  # all the gradients
    measuring = peak_bytes(lambda: gtflops.measure_importance(model, [x], optimizer, squared, update=update))
    assert measuring <= plain + largest
    if kind != "nadam":  # whose pieces are in float64
        assert measuring < 2 * largest  # far less, in fact: a gradient at a time


# --- nothing is changed ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {"update": "next"}) for kind in OPTIMIZERS if kind != "muon"), *((kind, {}) for kind in SOME)]
    + [(kind, {"method": "two-pass"}) for kind in SOME],
)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_everything_is_left_bit_identical(kind: str, options: Any, steps_before: int) -> None:
    model, batch = Restless(), torch.randn(6, 4)
    optimizer = OPTIMIZERS[kind](model.parameters())
    scheduler = None
    if not kind.endswith("relative"):  # the one that has no rate to schedule
        scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    for _ in range(steps_before):
        squared(model(batch), batch).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    model.linear.bias.requires_grad_(False)
    model.norm.eval()
    before, optimizer_before = state_of(model, batch), optimizer_state(optimizer)
    measured = gtflops.measure_importance(model, [batch, batch], optimizer, squared, **options)
    assert measured.keys() == dict(model.named_parameters()).keys()
    assert any(measured.values())
    assert_same(before, state_of(model, batch))
    assert_same(optimizer_before, optimizer_state(optimizer))


@pytest.mark.parametrize("method", ["one-pass", "two-pass"])
@pytest.mark.parametrize("kind", SOME)
def test_a_failing_batch_loses_nothing(kind: str, method: Any) -> None:
    model, batch, refused = Restless(), torch.randn(6, 4), torch.randn(6, 5)
    optimizer = OPTIMIZERS[kind](model.parameters())
    squared(model(batch), batch).backward()
    optimizer.step()
    before, optimizer_before = state_of(model, batch), optimizer_state(optimizer)
    with pytest.raises(gtflops.InputError, match="refused the batch"):
        gtflops.measure_importance(model, [batch, refused], optimizer, squared, method=method)
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
    optimizer = OwnState(model.parameters(), lr=0.1)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    measured = gtflops.measure_importance(model, [torch.ones(2, 4)], optimizer, squared, update="next")
    assert calls == []
    assert all(measured.values())
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


def test_a_missing_loss() -> None:
    model, batch = build("llama"), padded_batch()
    del batch["labels"]
    optimizer = torch.optim.AdamW(model.parameters())
    before, optimizer_before = state_of(model, batch), optimizer_state(optimizer)
    with pytest.raises(gtflops.InputError, match="put labels into the batch, or give loss="):
        gtflops.measure_importance(model, [batch], optimizer)
    assert_same(before, state_of(model, batch))
    assert_same(optimizer_before, optimizer_state(optimizer))


def test_names_that_there_are_not() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(gtflops.InputError, match="method is 'two_pass', expected 'one-pass' or 'two-pass'"):
        gtflops.measure_importance(model, [torch.ones(1, 2)], optimizer, squared, method="two_pass")  # type: ignore[arg-type]
    with pytest.raises(gtflops.InputError, match="update is 'last', expected 'first' or 'next'"):
        gtflops.measure_importance(model, [torch.ones(1, 2)], optimizer, squared, update="last")  # type: ignore[arg-type]


def test_a_first_update_that_needs_its_state() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = OwnState(model.parameters(), lr=0.1)
    before = optimizer_state(optimizer)
    with pytest.raises(gtflops.InputError, match=r"OwnState cannot make a step by itself .* or update='next'"):
        gtflops.measure_importance(model, [torch.ones(1, 2)], optimizer, squared, method="two-pass", update="first")
    assert_same(before, optimizer_state(optimizer))


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

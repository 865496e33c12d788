"""Importance of each tensor: the first-order estimate of the drop in loss that training it would bring.

``I[k] = -sum_i dw_i * dL/dw_i`` with an update ``dw`` that the optimizer would make (METHOD; the GreenTrainer paper,
arXiv:2309.13192, equation 4). One backward pass for optimizers that treat each tensor by itself.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch

from gtflops.capture import Loss, call_model, loss_of
from gtflops.capture.unchanged import restore_contents, unchanged
from gtflops.capture.uses import check_uses, owners, separated
from gtflops.errors import InputError
from gtflops.graph import Uses
from gtflops.importance.learning_rates import coming_rates
from gtflops.importance.updates import UpdateName, drop, is_by_tensor, local

#: ``"one-pass"``: each gradient is turned into a number as soon as it is there. ``"two-pass"``: as published, a real
#: step of the optimizer, undone.
Method: TypeAlias = Literal["one-pass", "two-pass"]

#: By name, a tensor of the model and the one that gets its gradient: another one where that is of a use alone.
Sought: TypeAlias = Mapping[str, tuple[torch.Tensor, torch.Tensor]]

#: What an optimizer has set for each tensor that it holds.
Settings: TypeAlias = Mapping[torch.Tensor, Mapping[str, Any]]


def measure_importance(
    model: torch.nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    loss: Loss | None = None,
    *,
    method: Method = "one-pass",
    update: UpdateName | None = None,
    scheduler: Any = None,
    uses: Uses | None = None,
) -> dict[str, float]:
    """Importance of every floating-point tensor of ``model``, averaged over ``batches``.

    Args:
        model: in the mode to train it in. Frozen tensors that the optimizer holds are measured too. Frozen ones that it
            does not hold, and tensors that the loss does not depend on, would not be moved: their importance is 0.
        batches: one backward pass is made on each.
        optimizer: one that holds every trainable tensor, or accelerate's wrapper around it.
        loss: ``loss(outputs, batch)``, a scalar tensor; ``outputs.loss`` without it.
        method: ``"one-pass"`` works the update out by itself while the gradients come and frees each at once: a
            training step's time, and at most the largest tensor more than its memory. That is exact for the optimizers
            of torch (all variants; Adafactor and Muon take a few copies of one tensor) and transformers' Adafactor. Any
            other one, subclasses too, makes the real step of ``"two-pass"``: the published way, the difference between
            the weights before and after, with copies of weights, gradients and state. In bfloat16 most of that
            difference is 0, where one pass works in float32.
        update: ``"first"``: the first update that the optimizer would make to each tensor, as if none had been trained.
            ``"next"``: what its next step makes, with its state; under Adam, a tensor that was never trained has none,
            and its first update is several times as large as a trained tensor's, so that selection runs after untrained
            tensors. Without, ``"first"`` for one pass and ``"next"`` for two, as published.
        scheduler: where all learning rates are 0 (a warm-up), its next ones that are not are used; it stays where it
            is. Without it, the rates that the schedule started from.
        uses: ``"separate"`` as of :func:`gtflops.profile`: a number for each use of a shared tensor, the share of its
            gradient in what the tensor as a whole would bring: ``-sum(dw * g_use)``, where the update is that by the
            sum of the gradients of all uses. They add up to the tensor's own importance, and may be negative. Takes as
            much memory more as the uses of one such tensor.

    Weights, gradients, ``requires_grad``, buffers, the optimizer's state and the random states are afterwards as they
    were, to the bit, also when a batch fails. In a process group each process measures its own batches and shards, and
    nothing is communicated: average the numbers, or add up those of shards.

    Raises InputError for no batches, an optimizer that lacks a trainable tensor, holds one that is not the model's, or
    whose learning rates are all 0, tensors with post-accumulate-gradient hooks (which may step an optimizer), a batch
    that the model refuses, and a loss that is missing, cannot be trained on or is not finite.

    >>> import torch, gtflops
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)      # dw = -0.5 g, and g = (3, 4): 0.5 * 25
    >>> gtflops.measure_importance(model, [torch.tensor([[3.0, 4.0]])], sgd, loss=lambda y, x: y.sum())
    {'weight': 12.5}
    """
    if method not in get_args(Method):
        raise InputError(f"method is {method!r}, expected 'one-pass' or 'two-pass'")
    if update is None:
        update = "next" if method == "two-pass" else "first"
    elif update not in get_args(UpdateName):
        raise InputError(f"update is {update!r}, expected 'first' or 'next'")
    check_uses(uses)
    optimizer = unwrapped(optimizer)
    parameters = {name: tensor for name, tensor in owners(model, uses).items() if tensor.is_floating_point()}
    _require_fit(model, optimizer)
    settings = settings_by_tensor(optimizer, coming_rates(optimizer, scheduler))
    held = {name: tensor for name, tensor in parameters.items() if tensor in settings}
    hooked = [name for name, tensor in held.items() if tensor._post_accumulate_grad_hooks]
    if hooked:
        raise InputError(
            f"{hooked[0]!r} has a post-accumulate-gradient hook, which would run while importance is measured and may "
            "step an optimizer; remove such hooks before, and add them again after"
        )
    measure = _in_one_pass if method == "one-pass" and is_by_tensor(optimizer) else _in_two_passes
    with restored(model, held), separated(model, uses) as leaves:
        for tensor in held.values():
            tensor.grad = None
            tensor.requires_grad_(True)
        sought = {name: (tensor, leaves[name]) for name, tensor in held.items()}
        totals = dict.fromkeys(parameters, 0.0)
        count = 0
        for batch in batches:
            count += 1
            for name, value in measure(model, sought, batch, optimizer, settings, update, loss).items():
                totals[name] += value
    if count == 0:
        raise InputError("batches is empty, expected at least one batch to measure importance on")
    return {name: total / count for name, total in totals.items()}


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer in accelerate's wrapper, whose ``step`` does nothing in the middle of an accumulation."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def settings_by_tensor(
    optimizer: torch.optim.Optimizer, rates: Sequence[float | None]
) -> dict[torch.Tensor, Mapping[str, Any]]:
    """What the optimizer has set for each tensor that it holds, with these learning rates of its groups."""
    return {
        tensor: {**group, "lr": rate} if "lr" in group else group
        for group, rate in zip(optimizer.param_groups, rates, strict=True)
        for tensor in group["params"]
    }


def require_held(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """InputError where a tensor that requires gradients is none of the optimizer's."""
    held = {tensor for group in optimizer.param_groups for tensor in group["params"]}
    parameters = {name: tensor for name, tensor in model.named_parameters() if tensor.is_floating_point()}
    missing = [name for name, tensor in parameters.items() if tensor.requires_grad and tensor not in held]
    if missing:
        raise InputError(
            f"the optimizer does not hold {len(missing)} of {len(parameters)} tensors, first {missing[0]!r}; "
            "expected one built on model.parameters() while all of them are trainable"
        )


def _require_fit(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    held = {tensor for group in optimizer.param_groups for tensor in group["params"]}
    foreign = len(held - set(model.parameters()))
    if foreign:
        raise InputError(
            f"the optimizer holds {foreign} tensors that are not the model's, which measuring would move; expected one "
            "built on model.parameters()"
        )
    require_held(model, optimizer)


def forward(model: torch.nn.Module, batch: Any, loss: Loss | None, *, trained: bool = True) -> torch.Tensor:
    """The loss of a step; InputError for a batch that the model refuses, and a loss that is none or not finite."""
    with torch.set_grad_enabled(trained):
        try:
            outputs = call_model(model, batch)
        except Exception as error:
            raise InputError(
                f"{type(model).__name__} refused the batch: {type(error).__name__}: {error}; "
                "expected a mapping of the forward's arguments, a tuple, or a tensor"
            ) from error
        value = loss_of(outputs, batch, loss, trained=trained)
    if not bool(torch.isfinite(value.detach()).all()):
        raise InputError(f"the loss is {value.item()}, expected a finite number")
    return value


def backward(value: torch.Tensor) -> None:
    """As a training step does it: outside of the autocast that may be around the call."""
    with torch.autocast(value.device.type, enabled=False):
        value.backward()


def _in_one_pass(
    model: torch.nn.Module,
    sought: Sought,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    update: UpdateName,
    loss: Loss | None,
) -> dict[str, float]:
    """Each gradient is turned into a number and freed as soon as it is there; those of several uses when all are."""
    measured: dict[str, torch.Tensor] = {}
    parts: dict[str, torch.Tensor] = {}

    def hook_for(name: str, tensor: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def hook(leaf: torch.Tensor) -> None:
            gradient = leaf.grad
            assert gradient is not None
            if name in measured or name in parts:
                raise InputError(
                    f"the gradient of {name!r} arrives in parts (reentrant activation checkpointing), so it cannot be "
                    "freed as it comes; expected use_reentrant=False"
                )
            if leaf is tensor:
                measured[name] = drop(optimizer, tensor, gradient, settings[tensor], update)
            else:
                parts[name] = gradient
            leaf.grad = None

        return hook

    handles = [
        leaf.register_post_accumulate_grad_hook(hook_for(name, tensor)) for name, (tensor, leaf) in sought.items()
    ]
    try:
        backward(forward(model, batch, loss))
    finally:
        for handle in handles:
            handle.remove()
        for _, leaf in sought.values():
            leaf.grad = None
    totals = _totals(sought, parts)
    for name, part in parts.items():
        tensor, _ = sought[name]
        measured[name] = drop(optimizer, tensor, totals[tensor], settings[tensor], update, along=part)
    return {name: value.item() for name, value in measured.items()}


def _in_two_passes(
    model: torch.nn.Module,
    sought: Sought,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    update: UpdateName,
    loss: Loss | None,
) -> dict[str, float]:
    """All gradients first, then a real step of the optimizer."""
    try:
        backward(forward(model, batch, loss))
        parts = {
            name: leaf.grad for name, (tensor, leaf) in sought.items() if leaf is not tensor and leaf.grad is not None
        }
        for tensor, total in _totals(sought, parts).items():
            tensor.grad = total
        return drops_by_real_step(
            {name: tensor for name, (tensor, _) in sought.items()}, optimizer, settings, update, parts
        )
    finally:
        for tensor, leaf in sought.values():
            tensor.grad = leaf.grad = None


def _totals(sought: Sought, parts: Mapping[str, torch.Tensor]) -> dict[torch.Tensor, torch.Tensor]:
    """The gradient of each tensor as a whole, from those of its uses in the order in which they came."""
    totals: dict[torch.Tensor, torch.Tensor] = {}
    for name, part in parts.items():
        tensor, _ = sought[name]
        totals[tensor] = totals[tensor] + part if tensor in totals else part
    return totals


def drops_by_real_step(
    tensors: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    update: UpdateName,
    parts: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, float]:
    """``-sum(dw * g)`` of those tensors that have a gradient, by a step of the optimizer that is undone. Of tensors
    that are looked at by use, ``parts`` are the gradients of these: ``-sum(dw * part)``."""
    parts = parts or {}
    by_use = {tensors[name] for name in parts}
    with real_step(optimizer, settings, update) as before:
        return {
            name: -torch.sum(_difference(tensor, before[tensor][0]) * _dense(parts.get(name, before[tensor][1]))).item()
            for name, tensor in tensors.items()
            if name in parts or (tensor in before and tensor not in by_use)
        }


def _difference(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return local(after.detach()).double() - local(before).double()


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    gradient = local(gradient)
    return (gradient.to_dense() if gradient.is_sparse else gradient).double()


# --- leaving everything as it was -----------------------------------------------------------------------------------


@contextmanager
def real_step(
    optimizer: torch.optim.Optimizer, settings: Settings, update: UpdateName
) -> Iterator[Mapping[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
    """A step of the optimizer, undone at the end. Gives each tensor's former content and gradient."""
    gradients = {tensor: tensor.grad for tensor in settings if tensor.grad is not None}
    before = {tensor: (tensor.detach().clone(), gradient.clone()) for tensor, gradient in gradients.items()}
    with _restored_optimizer(optimizer):
        try:
            for group in optimizer.param_groups:
                for tensor in group["params"][:1]:
                    group.update({key: value for key, value in settings[tensor].items() if key == "lr"})
            if update == "first":
                optimizer.state.clear()
            try:
                # The class's own method: a scheduler counts calls of the one it put on the object.
                type(optimizer).step(optimizer)
            except (KeyError, TypeError) as error:
                raise InputError(
                    f"{type(optimizer).__name__} cannot make a step by itself ({type(error).__name__}: {error}); "
                    "expected an optimizer whose step() needs no closure"
                    + (", or update='next' for one that needs its state" if update == "first" else "")
                ) from error
            yield before
        finally:
            with torch.no_grad():
                for tensor, (content, gradient) in before.items():
                    tensor.copy_(content)
                    tensor.grad = gradients[tensor]  # which the step may have changed, or replaced
                    gradients[tensor].copy_(gradient)


@contextmanager
def restored(model: torch.nn.Module, parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Puts back gradients, requires_grad, buffers (batch norm counts), and what :func:`unchanged` does."""
    required = {tensor: tensor.requires_grad for tensor in parameters.values()}
    gradients = {tensor: tensor.grad for tensor in parameters.values()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with unchanged(model):
            yield
    finally:
        for tensor, requires in required.items():
            tensor.grad = None
            tensor.requires_grad_(requires)
            tensor.grad = gradients[tensor]
        restore_contents(buffers)


@contextmanager
def _restored_optimizer(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Puts back the optimizer's state, settings and attributes; state tensors keep their identity."""
    attributes = dict(optimizer.__dict__)
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")  # the user's: averages, counters
    optimizer.__dict__.update({name: type(attributes[name])() for name in hooks})
    state = {tensor: copy.copy(values) for tensor, values in optimizer.state.items()}
    contents = {
        tensor: {key: value.clone() for key, value in values.items() if isinstance(value, torch.Tensor)}
        for tensor, values in optimizer.state.items()
    }
    others = {
        tensor: {key: copy.deepcopy(value) for key, value in values.items() if not isinstance(value, torch.Tensor)}
        for tensor, values in optimizer.state.items()
    }
    settings = [dict(group) for group in optimizer.param_groups]  # a step replaces settings, and changes none in place
    try:
        yield
    finally:
        optimizer.__dict__.clear()
        optimizer.__dict__.update(attributes)
        with torch.no_grad():
            for tensor, values in state.items():
                for key, content in contents[tensor].items():
                    values[key].copy_(content)
                values.update(others[tensor])
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, saved in zip(optimizer.param_groups, settings, strict=True):
            group.update(saved)

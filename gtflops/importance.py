"""Importance of each tensor: the first-order estimate of the drop in loss that training it would bring.

``I[k] = -sum_i dw_i * dL/dw_i`` with the update ``dw`` that the optimizer would make now (METHOD; the GreenTrainer
paper, arXiv:2309.13192, equation 4). One backward pass for optimizers whose update has a closed form here.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, TypeAlias

import torch

from gtflops.capture import Loss, call_model, loss_of
from gtflops.capture.unchanged import restore_contents, unchanged
from gtflops.errors import InputError

#: The update that an optimizer would make to a parameter with this gradient, from its state and settings.
Update: TypeAlias = Callable[[torch.Tensor, torch.Tensor, Mapping[str, Any], Mapping[str, Any]], torch.Tensor]


def measure_importance(
    model: torch.nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    loss: Loss | None = None,
) -> dict[str, float]:
    """Importance of every floating-point tensor of ``model``, averaged over ``batches``.

    AdamW, Adam and SGD are exact in one backward pass a batch, each gradient freed as soon as it is used; any other
    optimizer makes a real step that is undone. Frozen tensors that the optimizer holds are measured too. Frozen ones
    that it does not hold, and tensors that the loss does not depend on, would not be moved: their importance is 0.
    Where a warm-up has the learning rate at 0, the schedule's base rate stands in. Weights, gradients,
    ``requires_grad``, buffers, the optimizer's state and the random states are afterwards as they were, to the bit,
    also when a batch fails.

    Raises InputError for no batches, an optimizer that lacks a trainable tensor, holds one that is not the model's, or
    whose learning rates are all 0, tensors with post-accumulate-gradient hooks (which may step an optimizer), a batch
    that the model refuses, and a loss that cannot be trained on or is not finite.

    >>> import torch, gtflops
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)      # dw = -0.5 g, and g = (3, 4): 0.5 * 25
    >>> gtflops.measure_importance(model, [torch.tensor([[3.0, 4.0]])], sgd, loss=lambda y, x: y.sum())
    {'weight': 12.5}
    """
    parameters = {name: tensor for name, tensor in model.named_parameters() if tensor.is_floating_point()}
    groups = _groups(model, parameters, optimizer)
    held = {name: tensor for name, tensor in parameters.items() if tensor in groups}
    hooked = [name for name, tensor in held.items() if tensor._post_accumulate_grad_hooks]
    if hooked:
        raise InputError(
            f"{hooked[0]!r} has a post-accumulate-gradient hook, which would run while importance is measured and may "
            "step an optimizer; remove such hooks before, and add them again after"
        )
    update = _UPDATES.get(type(optimizer))
    with _restored(model, held):
        for tensor in held.values():
            tensor.grad = None
            tensor.requires_grad_(True)
        totals = dict.fromkeys(parameters, 0.0)
        count = 0
        for batch in batches:
            count += 1
            if update is None:
                measured = _by_real_step(model, held, batch, optimizer, groups, loss)
            else:
                measured = _by_hooks(model, held, batch, optimizer, groups, update, loss)
            for name, value in measured.items():
                totals[name] += value
    if count == 0:
        raise InputError("batches is empty, expected at least one batch to measure importance on")
    return {name: total / count for name, total in totals.items()}


def _groups(
    model: torch.nn.Module, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[torch.Tensor, Mapping[str, Any]]:
    """The settings that the optimizer has for each tensor it holds, with the rate of the coming steps."""
    groups: dict[torch.Tensor, Mapping[str, Any]] = {}
    warming_up = all(group.get("lr") == 0 for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        coming = {**group, "lr": group.get("initial_lr", 0)} if warming_up else group
        groups.update(dict.fromkeys(group["params"], coming))
    foreign = len(groups.keys() - set(model.parameters()))
    if foreign:
        raise InputError(
            f"the optimizer holds {foreign} tensors that are not the model's, which measuring would move; expected one "
            "built on model.parameters()"
        )
    missing = [name for name, tensor in parameters.items() if tensor.requires_grad and tensor not in groups]
    if missing:
        raise InputError(
            f"the optimizer does not hold {len(missing)} of {len(parameters)} tensors, first {missing[0]!r}; "
            "expected one built on model.parameters() while all of them are trainable"
        )
    if all(group.get("lr") == 0 for group in groups.values()):
        raise InputError("the learning rate is 0, so no tensor has importance; expected the rate of the coming steps")
    return groups


def _forward(model: torch.nn.Module, batch: Any, loss: Loss | None) -> torch.Tensor:
    with torch.enable_grad():
        try:
            outputs = call_model(model, batch)
        except Exception as error:
            raise InputError(
                f"{type(model).__name__} refused the batch: {type(error).__name__}: {error}; "
                "expected a mapping of the forward's arguments, a tuple, or a tensor"
            ) from error
        value = loss_of(outputs, batch, loss)
    if not bool(torch.isfinite(value.detach()).all()):
        raise InputError(f"the loss is {value.item()}, expected a finite number")
    return value


def _by_hooks(
    model: torch.nn.Module,
    parameters: Mapping[str, torch.Tensor],
    batch: Any,
    optimizer: torch.optim.Optimizer,
    groups: Mapping[torch.Tensor, Mapping[str, Any]],
    update: Update,
    loss: Loss | None,
) -> dict[str, float]:
    """One backward pass; each gradient is turned into a number and freed as soon as it is there."""
    measured: dict[str, torch.Tensor] = {}

    def hook_for(name: str) -> Callable[[torch.Tensor], None]:
        def hook(tensor: torch.Tensor) -> None:
            gradient = tensor.grad
            assert gradient is not None
            if name in measured:
                raise InputError(
                    f"the gradient of {name!r} arrives in parts (reentrant activation checkpointing), so it cannot be "
                    "freed as it comes; expected use_reentrant=False"
                )
            with torch.no_grad():
                measured[name] = _by_formula(tensor, gradient, optimizer.state.get(tensor, {}), groups[tensor], update)
            tensor.grad = None

        return hook

    handles = [tensor.register_post_accumulate_grad_hook(hook_for(name)) for name, tensor in parameters.items()]
    try:
        _forward(model, batch, loss).backward()
    finally:
        for handle in handles:
            handle.remove()
        for tensor in parameters.values():
            tensor.grad = None
    return {name: value.item() for name, value in measured.items()}


#: Elements that are handled at once: temporaries stay in the processor's cache (several times as fast on a CPU).
_CHUNK = 1 << 16


def _by_formula(
    tensor: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any], update: Update
) -> torch.Tensor:
    """``-sum(dw * g)``, summed in float64, chunk by chunk: the updates are elementwise."""
    shape = tensor.shape
    tensor, gradient = _local(tensor), _local(gradient)
    flat_state = {
        key: _local(value).reshape(-1) if isinstance(value, torch.Tensor) and value.shape == shape else value
        for key, value in state.items()
    }
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    flat, flat_gradient = tensor.reshape(-1), gradient.reshape(-1)
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for start in range(0, tensor.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        part_state = {
            key: value[part] if isinstance(value, torch.Tensor) and value.shape == flat.shape else value
            for key, value in flat_state.items()
        }
        change = update(flat[part], flat_gradient[part], part_state, group)
        total -= torch.sum(change.mul_(flat_gradient[part]), dtype=torch.float64)
    return total


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a DTensor; any other tensor as it is."""
    shard = getattr(tensor, "to_local", None)
    return tensor if shard is None else shard()


def _by_real_step(
    model: torch.nn.Module,
    parameters: Mapping[str, torch.Tensor],
    batch: Any,
    optimizer: torch.optim.Optimizer,
    groups: Mapping[torch.Tensor, Mapping[str, Any]],
    loss: Loss | None,
) -> dict[str, float]:
    """A real step of the optimizer, undone: weights, its state, its settings and its other attributes."""
    before = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    with _restored_optimizer(optimizer):
        try:
            _forward(model, batch, loss).backward()
            gradients = {name: tensor.grad.clone() for name, tensor in parameters.items() if tensor.grad is not None}
            for group in filter(itemgetter("params"), optimizer.param_groups):
                group["lr"] = groups[group["params"][0]]["lr"]
            # The class's own method: a scheduler counts calls of the one it put on the object.
            type(optimizer).step(optimizer)
            return {
                name: -torch.sum(
                    (_local(parameters[name].detach()).double() - _local(before[name]).double())
                    * _local(gradient).double()
                ).item()
                for name, gradient in gradients.items()
            }
        except TypeError as error:
            raise InputError(
                f"{type(optimizer).__name__} cannot make a step by itself ({error}); expected an optimizer whose "
                "step() needs no closure"
            ) from error
        finally:
            with torch.no_grad():
                for name, tensor in parameters.items():
                    tensor.copy_(before[name])
                    tensor.grad = None


# --- what an optimizer would do ---------------------------------------------------------------------------------


def _adam(
    tensor: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any]
) -> torch.Tensor:
    """Adam and AdamW (Loshchilov and Hutter, arXiv:1711.05101), as torch.optim computes them."""
    learning_rate, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
    gradient = -gradient if group["maximize"] else gradient
    change = torch.zeros_like(tensor)
    if decay and group["decoupled_weight_decay"]:
        change = tensor * (-learning_rate * decay)
    elif decay:
        gradient = gradient + decay * tensor
    step = float(state["step"]) + 1 if state else 1.0
    mean = torch.lerp(state["exp_avg"] if state else torch.zeros_like(gradient), gradient, 1 - beta1)
    square = (beta2 * state["exp_avg_sq"] if state else 0) + (1 - beta2) * gradient * gradient
    if group["amsgrad"]:
        square = torch.maximum(state["max_exp_avg_sq"], square) if state else square
    denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    return change.sub_(mean.div_(denominator), alpha=learning_rate / (1 - beta1**step))


def _sgd(
    tensor: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any]
) -> torch.Tensor:
    """SGD with momentum, dampening, Nesterov and weight decay, as torch.optim.SGD documents it."""
    gradient = -gradient if group["maximize"] else gradient
    if group["weight_decay"]:
        gradient = gradient + group["weight_decay"] * tensor
    if group["momentum"]:
        buffer = state.get("momentum_buffer")
        velocity = gradient if buffer is None else group["momentum"] * buffer + (1 - group["dampening"]) * gradient
        gradient = gradient + group["momentum"] * velocity if group["nesterov"] else velocity
    return -float(group["lr"]) * gradient


#: Exact types only: a subclass may update in another way, and then makes a real step.
_UPDATES: dict[type[torch.optim.Optimizer], Update] = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.SGD: _sgd,
}


# --- leaving everything as it was -------------------------------------------------------------------------------


@contextmanager
def _restored(model: torch.nn.Module, parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
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

"""What an optimizer would do to a tensor, and what that brings to first order: ``-sum(dw * g)``."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch.optim import ASGD, SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, Muon, NAdam, RAdam, RMSprop, Rprop

#: ``"next"``: what the optimizer's next step makes, with its state. ``"first"``: what its first step would make,
#: without state, so that tensors that were trained and tensors that never were are measured alike.
UpdateName: TypeAlias = Literal["first", "next"]

#: The change to a tensor with this gradient, from the optimizer's state for it and its settings. Elementwise.
Formula: TypeAlias = Callable[[torch.Tensor, torch.Tensor, Mapping[str, Any], Mapping[str, Any]], torch.Tensor]

#: Elements that are handled at once: temporaries stay in the processor's cache (several times as fast on a CPU).
_CHUNK = 1 << 16


def is_by_tensor(optimizer: torch.optim.Optimizer) -> bool:
    """Whether what the optimizer does to a tensor is known to depend on that tensor's gradient and state alone.

    By exact type: a subclass may update in another way. Of what works on whole tensors, a shard does not say enough.
    """
    kind = type(optimizer)
    sharded = any(hasattr(tensor, "to_local") for group in optimizer.param_groups for tensor in group["params"])
    whole = kind in _WHOLE or _is_transformers_adafactor(kind)
    return kind in _FORMULAS or kind in _ELEMENTWISE or (whole and not sharded)


def drop(
    optimizer: torch.optim.Optimizer,
    tensor: torch.Tensor,
    gradient: torch.Tensor,
    group: Mapping[str, Any],
    update: UpdateName,
    along: torch.Tensor | None = None,
) -> torch.Tensor:
    """``-sum(dw * g)`` of one tensor, as a float64 scalar on its device. The optimizer is one :func:`is_by_tensor`.

    With ``along``, ``-sum(dw * along)``: what that part of the gradient has of it.

    The update is worked out in float32 at least, also where the tensor is bfloat16 and could not take it. A tensor that
    is sharded (a DTensor) brings the share of this process.
    """
    kind = type(optimizer)
    state = optimizer.state.get(tensor, {}) if update == "next" else {}
    state = {key: local(value) if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    tensor, gradient = local(tensor.detach()), local(gradient.detach())
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    along = gradient if along is None else along.detach()
    along = along.to_dense() if along.is_sparse else along
    wide = torch.promote_types(tensor.dtype, torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        if kind in _FORMULAS:
            # Once a tensor, since on a GPU it waits for the device.
            state = {key: _plain(value) for key, value in state.items()}
            for part, slope, part_along, part_state in _chunks(tensor, gradient, along, state, wide):
                change = _FORMULAS[kind](part, slope, part_state, group)
                total -= torch.sum(change.mul_(part_along), dtype=torch.float64)
        elif kind in _ELEMENTWISE:
            # In float64, as the change is the difference of two tensors.
            alone = _of_its_own(kind, group)
            for part, slope, part_along, part_state in _chunks(tensor, gradient, along, state, torch.float64):
                total -= torch.sum(_by_a_step(alone, part, slope, part_state).mul_(part_along))
        else:
            alone = _of_its_own(kind, {**group, "eps": _explicit_eps(group["eps"], tensor.dtype)})
            slope = gradient.to(wide)
            change = _by_a_step(alone, tensor.to(wide), slope, state)
            total -= torch.sum(change.mul_(along.to(wide)), dtype=torch.float64)
    return total


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a DTensor; any other tensor as it is."""
    shard = getattr(tensor, "to_local", None)
    return tensor if shard is None else shard()


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value


def _explicit_eps(eps: Any, dtype: torch.dtype) -> Any:
    """torch's Adafactor takes the precision of the tensor it is given, which here is a wider one."""
    return (torch.finfo(dtype).eps, *eps[1:]) if isinstance(eps, tuple) and eps[0] is None else eps


def _chunks(
    tensor: torch.Tensor,
    gradient: torch.Tensor,
    along: torch.Tensor,
    state: Mapping[str, Any],
    dtype: torch.dtype,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]]:
    """Tensor, gradient, what the change is held against, and state, piece by piece, in ``dtype``."""
    like_tensor = {
        key: value.reshape(-1)
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.dim() and value.shape == tensor.shape
    }
    others = {key: value for key, value in state.items() if key not in like_tensor}
    flat, flat_gradient, flat_along = tensor.reshape(-1), gradient.reshape(-1), along.reshape(-1)
    for start in range(0, tensor.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        pieces = {key: value[part].to(dtype) for key, value in like_tensor.items()}
        slope = flat_gradient[part].to(dtype)
        part_along = slope if along is gradient else flat_along[part].to(dtype)
        yield flat[part].to(dtype), slope, part_along, {**others, **pieces}


def _of_its_own(kind: type[torch.optim.Optimizer], group: Mapping[str, Any]) -> torch.optim.Optimizer:
    """A new optimizer of this kind with these settings, in its plainest implementation."""
    plain = {"foreach": False, "fused": None, "capturable": False, "differentiable": False}
    settings = {
        name: plain.get(name, group[name])
        for name in inspect.signature(kind).parameters
        if name != "params" and name in group
    }
    return kind([torch.zeros(1, 1)], **settings)


def _by_a_step(
    optimizer: torch.optim.Optimizer, tensor: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, Any]
) -> torch.Tensor:
    """The change that a step of ``optimizer`` makes to this tensor, on copies."""
    moved = tensor.clone()
    moved.grad = gradient.clone()
    optimizer.param_groups[0]["params"] = [moved]
    optimizer.state.clear()
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            # A count of steps keeps its type; what is as long as a tensor is computed with in that tensor's.
            is_wide = value.dim() > 0 and value.is_floating_point()
            optimizer.state[moved][key] = value.to(tensor.dtype if is_wide else value.dtype, copy=True)
        else:
            optimizer.state[moved][key] = copy.deepcopy(value)
    optimizer.step()
    return moved.sub_(tensor)


# --- the kinds ------------------------------------------------------------------------------------------------------


def _adam(
    tensor: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any]
) -> torch.Tensor:
    """Adam and AdamW (Loshchilov and Hutter, arXiv:1711.05101), as torch.optim computes them."""
    learning_rate, decay = float(group["lr"]), float(group["weight_decay"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    gradient = -gradient if group["maximize"] else gradient
    change = torch.zeros_like(tensor)
    if decay and group["decoupled_weight_decay"]:
        change = tensor * (-learning_rate * decay)
    elif decay:
        gradient = gradient + decay * tensor
    if not state:  # the corrections for a bias towards 0 undo the averages: g / (|g| + eps)
        return change.sub_(gradient / gradient.abs().add_(group["eps"]), alpha=learning_rate)
    step = state["step"] + 1
    mean = torch.lerp(state["exp_avg"], gradient, 1 - beta1)
    square = (state["exp_avg_sq"] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if group["amsgrad"]:
        square = torch.maximum(state["max_exp_avg_sq"], square)
    denominator = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
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


_FORMULAS: dict[type[torch.optim.Optimizer], Formula] = {Adam: _adam, AdamW: _adam, SGD: _sgd}

#: Each element is updated by itself, so that a step can be made on a few of them.
_ELEMENTWISE: frozenset[type[torch.optim.Optimizer]] = frozenset(
    {Adadelta, Adagrad, Adamax, ASGD, NAdam, RAdam, RMSprop, Rprop}
)

#: Each tensor is updated by itself, but as a whole.
_WHOLE: frozenset[type[torch.optim.Optimizer]] = frozenset({Adafactor, Muon})


def _is_transformers_adafactor(kind: type) -> bool:
    """Another of the whole ones; told by its name, since transformers is slow to import."""
    return (kind.__module__, kind.__qualname__) == ("transformers.optimization", "Adafactor")

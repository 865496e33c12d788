"""Does the first-order estimate hold? The predicted drop of the loss beside the real one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gtflops.capture import Loss
from gtflops.errors import InputError
from gtflops.importance.learning_rates import coming_rates
from gtflops.importance.measuring import (
    backward,
    drops_by_real_step,
    forward,
    real_step,
    restored,
    settings_by_tensor,
    unwrapped,
)
from gtflops.importance.updates import drop, is_by_tensor

#: How far the real drop may be from the predicted one, as a share of the predicted one.
_TOLERANCE = 0.5

#: What a loss is known to, as a share of it: computed in float32, over many terms.
_PRECISION = 1e-5


@dataclass(frozen=True, slots=True)
class ImportanceCheck:
    """The drop in loss that a step was to bring to first order, and the losses before and after it.

    >>> check = ImportanceCheck(predicted=0.25, before=2.5, after=2.5)
    >>> check.real, check.holds
    (0.0, False)
    >>> print(check)
    predicted drop of the loss 0.25, real 0: the first-order estimate does not hold, so that importances are a poor \
guide to what is worth training; a lower learning rate or a warm-up makes them a better one
    """

    predicted: float
    before: float
    after: float

    @property
    def real(self) -> float:
        """The drop that came."""
        return self.before - self.after

    @property
    def holds(self) -> bool:
        """Whether the real drop is within half of the predicted one, or the difference within the loss's precision."""
        return abs(self.real - self.predicted) <= max(_TOLERANCE * abs(self.predicted), _PRECISION * abs(self.before))

    def __str__(self) -> str:
        numbers = f"predicted drop of the loss {self.predicted:.3g}, real {self.real:.3g}: the first-order estimate "
        if self.holds:
            return numbers + "holds"
        return numbers + (
            "does not hold, so that importances are a poor guide to what is worth training; a lower learning rate or a "
            "warm-up makes them a better one"
        )


def expected_drop(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, scale: float = 1.0) -> float:
    """The drop in loss that the optimizer's step would bring to first order, with the gradients that are there.

    ``-sum(dw * g)`` over all tensors with a gradient: to call between ``backward()`` and ``optimizer.step()``, which it
    costs about as much time as. What the loss on the same batch then falls by is for :class:`ImportanceCheck`.
    ``scale`` is what the gradients were multiplied by since (clipping them to half of their norm: 0.5). Nothing is
    changed. InputError for an optimizer that needs a closure, or if nothing has a gradient.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> model(torch.tensor([3.0, 4.0])).backward()
    >>> expected_drop(model, sgd)
    12.5
    """
    optimizer = unwrapped(optimizer)
    settings = settings_by_tensor(optimizer, [group.get("lr") for group in optimizer.param_groups])
    with_gradient = {
        name: tensor for name, tensor in model.named_parameters() if tensor.grad is not None and tensor in settings
    }
    if not with_gradient:
        raise InputError("no tensor that the optimizer holds has a gradient; expected to be asked after backward()")
    return sum(_drops(with_gradient, optimizer, settings).values()) / scale


def check_importance(
    model: torch.nn.Module,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    loss: Loss | None = None,
    *,
    scheduler: Any = None,
) -> ImportanceCheck:
    """A step on ``batch`` with the tensors that are trainable now, predicted and really made, then undone.

    Costs a training step, a forward pass, and copies of the trained tensors and the optimizer's state. Both losses see
    the same random numbers (dropout). In a loop that makes the step anyway, :func:`expected_drop` before it and a
    forward pass after it do the same for less. Everything is put back as :func:`measure_importance` does.
    """
    optimizer = unwrapped(optimizer)
    settings = settings_by_tensor(optimizer, coming_rates(optimizer, scheduler))
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad and tensor in settings}
    if not trained:
        raise InputError("no tensor that the optimizer holds is trainable; expected a selection to check")
    with restored(model, trained):
        for tensor in trained.values():
            tensor.grad = None
        with torch.random.fork_rng():
            value = forward(model, batch, loss)
        backward(value)
        before = value.item()
        predicted = sum(_drops(trained, optimizer, settings).values())
        with real_step(optimizer, settings, "next"):
            after = forward(model, batch, loss, trained=False).item()
    return ImportanceCheck(predicted, before, after)


def _drops(
    tensors: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    settings: Mapping[torch.Tensor, Mapping[str, Any]],
) -> dict[str, float]:
    if not is_by_tensor(optimizer):
        return drops_by_real_step(tensors, optimizer, settings, "next")
    return {
        name: drop(optimizer, tensor, tensor.grad, settings[tensor], "next").item()
        for name, tensor in tensors.items()
        if tensor.grad is not None
    }

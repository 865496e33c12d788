"""The learning rates of the coming steps, asked of a schedule without moving it."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from gtflops.errors import InputError

#: How far a schedule is followed. Schedules are at 0 for one step at most as a rule: the first of a warm-up.
_STEPS_AHEAD = 10_000


def coming_rates(optimizer: torch.optim.Optimizer, scheduler: Any = None) -> list[float | None]:
    """The learning rate of each parameter group: now, or, where all are 0, at the next step at which one is not.

    That step is found by stepping the scheduler, which is put back with all that it set in the optimizer, and without
    a scheduler the ``initial_lr`` that one left in the groups stands in. A group without a rate (transformers'
    Adafactor can do without) has ``None``. InputError where every rate stays at 0.
    """
    rates = rates_of(optimizer)
    if any(rate != 0 for rate in rates):
        return rates
    if scheduler is None:
        rates = [float(group.get("initial_lr", 0)) for group in optimizer.param_groups]
        if any(rates):
            return rates
        raise InputError("the learning rate is 0, so no tensor has importance; expected the rate of the coming steps")
    while hasattr(scheduler, "scheduler"):  # accelerate's wrapper
        scheduler = scheduler.scheduler
    with _put_back(optimizer, scheduler), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the scheduler is stepped before the optimizer
        for _ in range(_STEPS_AHEAD):
            try:
                scheduler.step()
            except Exception:  # a schedule that ends (OneCycleLR), or one that needs a metric to make a step
                break
            rates = rates_of(optimizer)
            if any(rate != 0 for rate in rates):
                return rates
    raise InputError(
        f"the learning rate is 0 and {type(scheduler).__name__} does not raise it in the coming {_STEPS_AHEAD:,} "
        "steps, so no tensor has importance; expected to be asked before the schedule's end"
    )


def rates_of(optimizer: torch.optim.Optimizer) -> list[float | None]:
    """The learning rate of each parameter group now; ``None`` for a group without one."""
    return [None if (rate := group.get("lr")) is None else float(rate) for group in optimizer.param_groups]


@contextmanager
def _put_back(optimizer: torch.optim.Optimizer, scheduler: Any) -> Iterator[None]:
    """Restores the optimizer's settings and all that the scheduler keeps."""
    settings = [{key: _copied(value) for key, value in group.items()} for group in optimizer.param_groups]
    kept = [(part, {key: _copied(value) for key, value in vars(part).items()}) for part in _parts(scheduler)]
    try:
        yield
    finally:
        for group, saved in zip(optimizer.param_groups, settings, strict=True):
            for key, value in saved.items():
                if isinstance(value, torch.Tensor) and isinstance(group[key], torch.Tensor):
                    group[key].copy_(value)  # a rate that is a tensor is set in place
                else:
                    group[key] = value
        for part, attributes in kept:
            vars(part).clear()
            vars(part).update(attributes)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return copy.copy(value) if isinstance(value, (list, dict, set)) else value


def _parts(scheduler: Any) -> Iterator[Any]:
    """The scheduler, the ones it is made of, and callable objects that give it its rates."""
    yield scheduler
    for value in vars(scheduler).values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, LRScheduler):
                yield from _parts(item)
            elif callable(item) and not isinstance(item, FunctionType) and hasattr(item, "__dict__"):
                yield item

"""Tensors without data, and running on them."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def fake(fake_mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without data in the place of ``tensor``, on the same device."""
    if isinstance(tensor, FakeTensor):
        with fake_mode:
            return tensor.detach()
    if tensor.is_inference():  # autograd takes no tensor that was made under inference mode
        with fake_mode:
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return fake_mode.from_tensor(tensor, static_shapes=True).detach()


def fake_parameter(fake_mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter without data, trainable if it is floating-point, with what its model has put on ``tensor``."""
    parameter = torch.nn.Parameter(fake(fake_mode, tensor), requires_grad=tensor.is_floating_point())
    for name, value in getattr(tensor, "__dict__", {}).items():
        if not hasattr(parameter, name):
            setattr(parameter, name, value)
    return parameter


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """A trace keeps all that it makes until its end: collecting on the way finds nothing, and takes a quarter of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

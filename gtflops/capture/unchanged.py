"""Running the user's model without leaving a trace on it."""

import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from gtflops.capture.sharding import sharded_again


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Puts back what running the model's own code may change, besides its parameters and buffers.

    That is the attributes of its modules, the dicts, lists, sets and deques in them at any depth, the content of the
    tensors in those, and the random states of Python, NumPy and torch. Objects of other classes are not looked into.
    What ``torch.compile`` was put on runs eagerly meanwhile: see :func:`eagerly`.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with (
            torch.random.fork_rng(),
            eagerly(),
            attributes_unchanged(list(model.modules()), with_tensors=lambda name: name not in _RESTORED_BY_OTHERS),
            sharded_again(model),
        ):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


_RESTORED_BY_OTHERS = ("_parameters", "_buffers")


@contextmanager
def attributes_unchanged(
    owners: Iterable[Any], *, with_tensors: Callable[[str], bool], except_in: Container[str] = ()
) -> Iterator[None]:
    """Puts back the attributes of objects and the containers in them; of tensors, the content where
    ``with_tensors(name)``. What is in the attributes named in ``except_in`` is not looked at."""
    attributes = [(owner, dict(owner.__dict__)) for owner in owners]
    containers: dict[int, tuple[Any, Any]] = {}
    tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for _, values in attributes:
        for name, value in values.items():
            if name not in except_in:
                _remember(value, containers, tensors if with_tensors(name) else None)
    try:
        yield
    finally:
        for container, content in containers.values():
            _refill(container, content)
        for owner, values in attributes:
            _refill(owner.__dict__, values)
        restore_contents(tensors.values())


def eagerly() -> AbstractContextManager[object]:
    """Compiled modules and functions run as if they were not.

    A function that dynamo first meets under a dispatch mode would never be compiled again, without a word.
    """
    # Its import takes seconds, and what is compiled has imported it.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def restore_contents(tensors: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Gives each tensor the content of the one beside it, and leaves one that did not change alone."""
    with torch.no_grad():
        for tensor, content in tensors:
            if tensor.layout is not torch.strided or not torch.equal(tensor, content):  # sparse ones cannot be compared
                tensor.copy_(content)


def _remember(
    value: Any,
    containers: dict[int, tuple[Any, Any]],
    tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] | None,
) -> None:
    """Notes the content of a container and of everything in it; of a tensor, unless ``tensors`` is ``None``."""
    if isinstance(value, torch.Tensor):
        if tensors is not None and not (value.is_meta or isinstance(value, FakeTensor)):
            tensors.setdefault(id(value), (value, value.detach().clone()))
    elif isinstance(value, (dict, list, set, deque)):
        if id(value) not in containers:
            containers[id(value)] = (value, copy.copy(value))
            for item in value.values() if isinstance(value, dict) else value:
                _remember(item, containers, tensors)
    elif isinstance(value, tuple):
        for item in value:
            _remember(item, containers, tensors)


def _refill(container: Any, content: Any) -> None:
    """Gives a container its former content, and leaves one that did not change alone."""
    if isinstance(container, (list, deque)):
        if len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
            container.clear()
            container.extend(content)
    elif isinstance(container, set):
        container.intersection_update(content)
        container.update(content)
    elif len(container) != len(content) or any(
        key not in container or container[key] is not value for key, value in content.items()
    ):
        container.clear()
        container.update(content)

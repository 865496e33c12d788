"""Running the user's model without leaving a trace on it."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Puts back what running the model's own code may change: attributes of its modules, random states, caches."""
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    containers = [
        (value, copy.copy(value))
        for _, values in attributes
        for value in values.values()
        if isinstance(value, (dict, list, set))
    ]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for container, content in containers:
            _refill(container, content)
        for module, values in attributes:
            _refill(module.__dict__, values)


def _refill(container: Any, content: Any) -> None:
    """Gives a container its former content, and leaves one that did not change alone."""
    if isinstance(container, list):
        if len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
            container[:] = content
    elif isinstance(container, set):
        container.intersection_update(content)
        container.update(content)
    elif len(container) != len(content) or any(
        key not in container or container[key] is not value for key, value in content.items()
    ):
        container.clear()
        container.update(content)

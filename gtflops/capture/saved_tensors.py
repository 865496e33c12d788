"""What autograd keeps from the forward pass, beyond what its backward operators read."""

from collections.abc import Hashable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from gtflops.capture.checkpoints import NotUnpackedError, left_packed
from gtflops.capture.recording import Recorder

#: The tensors that an autograd node keeps, and whether it keeps them whichever of its gradients are asked for.
Saved = list[tuple[Any, list[torch.Tensor], bool]]


def saved_tensors(autograd_nodes: Iterable[Any], recorder: Recorder) -> Saved:
    """What each node has saved, before its backward runs. Tensors under a hook (a checkpoint's) are left out."""
    saved: Saved = []
    with recorder.rehearsal(), left_packed():
        for node in autograd_nodes:
            custom = isinstance(node, BackwardCFunction)
            names = ("saved_tensors",) if custom else _names(node.__class__)
            tensors: list[torch.Tensor] = []
            for name in names:
                try:
                    value = getattr(node, name)
                except (NotUnpackedError, RuntimeError):  # hooked, or freed by a backward inside of the forward
                    continue
                tensors += [leaf for leaf in _leaves(value) if isinstance(leaf, torch.Tensor)]
            if tensors:
                saved.append((node, tensors, custom))
    return saved


def unread(saved: Saved, recorder: Recorder) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """After the backward pass: the memory that was kept and not read, with the operators that it was kept for."""
    return tuple(kept for node, tensors, whole in saved for kept in recorder.kept_by(node, tensors, whole=whole))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


@cache
def _names(kind: Hashable) -> tuple[str, ...]:
    """The attributes by which autograd shows what a node of a kind has saved."""
    return tuple(name for name in dir(kind) if name.startswith("_saved_"))

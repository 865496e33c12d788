"""Activation checkpointing: seeing where the backward pass runs a part of the forward pass once more."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from gtflops.capture.recording import Recorder
from gtflops.graph import Phase


@contextmanager
def recorded_checkpoints(recorder: Recorder) -> Iterator[None]:
    """Tells ``recorder`` of recomputations inside.

    Non-reentrant checkpointing recomputes, when the first tensor that it saved is asked for, up to the last one that
    it had saved, which depends on what is trained. So each saved tensor is given an identity of its own at the place
    where it is saved: what reads it then depends on all that was recomputed until there.
    """
    enter, leave = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__
    recomputations: dict[int, ExitStack] = {}

    def enter_recorded(hooks: Any) -> Any:
        recorder.has_saved_tensor_hooks = True
        if recorder.phase is not Phase.BACKWARD:
            return enter(hooks)
        recomputation = recomputations[id(hooks)] = ExitStack()
        recomputation.enter_context(recorder.recomputation())
        torch._C._autograd._push_saved_tensors_default_hooks(
            lambda tensor: hooks.pack_hook(tensor.detach()), hooks.unpack_hook
        )
        return None

    def leave_recorded(hooks: Any, *error: Any) -> Any:
        try:
            return leave(hooks, *error)
        finally:
            if (recomputation := recomputations.pop(id(hooks), None)) is not None:
                recomputation.close()

    saved_tensors_hooks.__enter__ = enter_recorded  # type: ignore[method-assign]
    saved_tensors_hooks.__exit__ = leave_recorded  # type: ignore[method-assign]
    try:
        yield
    finally:
        saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]
        saved_tensors_hooks.__exit__ = leave  # type: ignore[method-assign]

"""Activation checkpointing: seeing where the backward pass runs a part of the forward pass once more."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from gtflops.capture.recording import Recorder
from gtflops.graph import Phase


class NotUnpackedError(Exception):
    """A saved tensor under a hook was looked at inside :func:`left_packed`."""


_looking = False


@contextmanager
def left_packed() -> Iterator[None]:
    """Looking at saved tensors inside unpacks none: it would recompute. NotUnpackedError instead."""
    global _looking
    _looking = True
    try:
        yield
    finally:
        _looking = False


class _Packed:
    """What a pack hook returned; it is unpacked once, as in a real step, even if it is asked for again."""

    def __init__(self, content: Any) -> None:
        self._content = content
        self._tensor: torch.Tensor | None = None

    def unpack(self, hook: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        if _looking:
            raise NotUnpackedError
        if self._tensor is None:
            self._tensor = hook(self._content)
            self._content = None
        return self._tensor


@contextmanager
def recorded_checkpoints(recorder: Recorder) -> Iterator[None]:
    """Tells ``recorder`` of recomputations inside.

    Non-reentrant checkpointing recomputes a region when the first tensor that it saved is asked for, and stops at the
    last one that it had saved, which depends on what is trained. So each saved tensor is given an identity of its own
    at the place where it is saved: what reads it then depends on all that was recomputed until there.
    """
    enter, leave = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__
    saved: dict[int, list[torch.Tensor]] = {}

    def enter_recorded(hooks: Any) -> Any:
        if recorder not in _get_current_dispatch_mode_stack():  # another thread's
            return enter(hooks)
        if recorder.phase is not Phase.BACKWARD:
            module = recorder.running_module

            def unpack(packed: _Packed) -> torch.Tensor:
                with recorder.within(module):  # what is recomputed belongs to the module that had it checkpointed
                    return packed.unpack(hooks.unpack_hook)

            torch._C._autograd._push_saved_tensors_default_hooks(
                lambda tensor: _Packed(hooks.pack_hook(tensor)), unpack
            )
            return None
        recorder.begin_recomputation()
        identities = saved[id(hooks)] = []

        def pack(tensor: torch.Tensor) -> Any:
            identities.append(tensor.detach())
            return hooks.pack_hook(identities[-1])

        torch._C._autograd._push_saved_tensors_default_hooks(pack, hooks.unpack_hook)
        return None

    def leave_recorded(hooks: Any, kind: Any = None, error: Any = None, traceback: Any = None) -> Any:
        if (identities := saved.pop(id(hooks), None)) is not None:
            # One that was not stopped on the way (early_stop=False) runs to its end, whatever is asked for.
            recorder.end_recomputation([] if error is not None else identities)
        return leave(hooks, kind, error, traceback)

    saved_tensors_hooks.__enter__ = enter_recorded  # type: ignore[method-assign]
    saved_tensors_hooks.__exit__ = leave_recorded  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]
        saved_tensors_hooks.__exit__ = leave  # type: ignore[method-assign]

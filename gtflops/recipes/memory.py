"""The memory that training takes at its highest."""

import ctypes
import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Memory:
    """``peak_bytes``, and in words what was measured."""

    peak_bytes: int
    measured: str


class PeakMemory:
    """Measures what runs inside: ``with PeakMemory(model) as peak: ...``, then ``peak.memory``.

    On a GPU, the most that PyTorch had allocated. On a CPU under Linux, the model's tensors and the rise of the
    process's resident memory above what it was at the start, so that what else the process holds does not count;
    ``None`` elsewhere.
    """

    memory: Memory | None = None

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = next(model.parameters()).device

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif _can_reset():
            _return_freed_memory()
            self._before = _resident("VmRSS")
            _CLEAR.write_text("5")  # the peak starts from here
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            self.memory = Memory(peak, "torch.cuda.max_memory_allocated during the training steps")
        elif hasattr(self, "_before"):
            own = {tensor for held in (self._model.parameters(), self._model.buffers()) for tensor in held}
            held = sum(tensor.numel() * tensor.element_size() for tensor in own)
            risen = max(0, _resident("VmHWM") - self._before)
            self.memory = Memory(held + risen, "the model and the rise of resident memory during the training steps")


def _can_reset() -> bool:
    return sys.platform == "linux" and _STATUS.is_file() and _CLEAR.is_file()


def _resident(which: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{which}:"))
    return int(line.split()[1]) * 1024


def _return_freed_memory() -> None:
    """Memory that was freed but kept for reuse would hide what training takes; glibc alone keeps so much."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

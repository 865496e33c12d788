"""Model + batch -> graph. The one room that runs models; needs torch."""

from gtflops.capture.architectures import Architecture, architecture, presets
from gtflops.capture.dispatch import ExecutedFlops
from gtflops.capture.tracing import Loss, Trace, batch_types, call_model, loss_of, trace
from gtflops.capture.unchanged import unchanged

__all__ = [
    "Architecture",
    "ExecutedFlops",
    "Loss",
    "Trace",
    "architecture",
    "batch_types",
    "call_model",
    "loss_of",
    "presets",
    "trace",
    "unchanged",
]

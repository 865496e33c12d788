"""Model + batch -> graph. The one room that runs models; needs torch."""

from gtflops.capture.architectures import Architecture, architecture, presets, takes_images
from gtflops.capture.batches import Loss, batch_types, call_model, loss_of
from gtflops.capture.dispatch import ExecutedFlops
from gtflops.capture.sharding import unsharded
from gtflops.capture.torch_formulas import torch_formula
from gtflops.capture.tracing import Trace, trace
from gtflops.capture.unchanged import unchanged
from gtflops.operators import add_fallback

add_fallback(torch_formula)

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
    "takes_images",
    "trace",
    "unchanged",
    "unsharded",
]

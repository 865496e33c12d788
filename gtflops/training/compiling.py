"""Training with torch.compile: which selections it can follow."""

import sys
import warnings

import torch

from gtflops.problem import Granularity


def warn_of_recompiles(model: torch.nn.Module, granularity: Granularity) -> None:
    """A UserWarning where re-selection would compile again and again, until torch.compile silently runs eagerly.

    A compiled graph is for tensors that are frozen or not as they were, and its input likewise. A layer that is trained
    or frozen as a whole needs four of them, which layers of one class share; a whole model needs one for each
    selection, and a tensor-wise selection one for nearly each layer.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        return
    from torch._dynamo import OptimizedModule

    compiled = [
        name
        for name, module in model.named_modules()
        if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
    ]
    if not compiled:
        return
    if "" in compiled:
        what = "the model is compiled as a whole, so that every selection compiles it again"
    elif granularity != "layer":
        what = f"{compiled[0]!r} is compiled and granularity is {granularity!r}, so that most selections compile again"
    else:
        return
    warnings.warn(
        f"{what}, up to torch._dynamo.config.recompile_limit, after which it silently runs eagerly; expected "
        "granularity='layer', and each layer compiled by itself: for layer in model.model.layers: layer.compile()",
        stacklevel=3,
    )

"""What a model's code does with ``requires_grad``: the one thing that a selection changes for it."""

import sys
from collections.abc import Container
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gtflops.capture.recording import is_models_or_layers

# Made anew at every access: equal, not identical.
_READ = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_WRITE = torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]


class RequiresGradMode(TorchFunctionMode):
    """Watches code that makes tensors require gradients, and code that asks whether they do.

    ``made`` are tensors other than parameters that were made to require one (``enable_input_require_grads`` does that):
    a step computes their gradients whatever is trained. ``asked`` are the lines whose answer depends on the selection;
    here, it is that of everything trained. ``trained_masks`` counts calls of attention whose mask requires a gradient.
    """

    def __init__(self, parameters: Container[int]) -> None:
        super().__init__()
        self.made: dict[int, torch.Tensor] = {}
        self.asked: dict[str, None] = {}
        self.trained_masks = 0
        self._parameters = parameters

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = False
        if func is torch.nn.functional.scaled_dot_product_attention:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            self.trained_masks += isinstance(mask, torch.Tensor) and mask.requires_grad
        elif func == _READ:
            frame = sys._getframe(1)
            if is_models_or_layers(frame.f_code):
                self.asked[f"{frame.f_code.co_filename}:{frame.f_lineno}"] = None
        elif func is torch.Tensor.requires_grad_:
            wanted = kwargs.get("requires_grad", args[1] if len(args) > 1 else True)
        elif func == _WRITE:
            wanted = args[1]
        if wanted and id(args[0]) not in self._parameters:
            self.made[id(args[0])] = args[0]
        return func(*args, **kwargs)

"""Batches and what is done with them: calling a model, taking the loss, naming their tensors."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gtflops.capture.dispatch import tensor_type
from gtflops.errors import InputError
from gtflops.operators import TensorType

#: A function of (model outputs, batch) that gives a scalar tensor.
Loss = Callable[[Any, Any], torch.Tensor]

#: Of a batch that was trimmed: int64 numbers of the positions, counted over all rows, that have a label.
TARGET_POSITIONS = "target_positions"


def call_model(model: torch.nn.Module, batch: Any) -> Any:
    """``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, ``model(batch)`` otherwise."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def loss_of(outputs: Any, batch: Any, loss: Loss | None, *, trained: bool = True) -> torch.Tensor:
    """The scalar loss of a step: ``loss(outputs, batch)``, or ``outputs.loss``. InputError if it is none, or if it
    needs no gradient although something is ``trained``."""
    value: Any
    if loss is not None:
        value = loss(outputs, batch)
        source = "the loss function returned"
    else:
        value = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        source = "the model's outputs have as .loss"
    if not isinstance(value, torch.Tensor):
        raise InputError(
            f"{source} {value!r}, expected a scalar tensor; put labels into the batch, "
            "or give loss=lambda outputs, batch: ..."
        )
    if value.numel() != 1:
        raise InputError(
            f"{source} a tensor of shape {tuple(value.shape)}, expected a scalar; reduce it, for example by .mean()"
        )
    if trained and not value.requires_grad:
        raise InputError(f"{source} a tensor that needs no gradient, expected one that depends on the parameters")
    return value


def plain(batch: Any) -> Any:
    """Mappings of any class (such as transformers' BatchEncoding) as dicts, which pytree knows."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def with_tensors_replaced(batch: Any, replace: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of ``batch`` with other tensors, also in the attributes of objects such as dataclasses."""

    def replaced(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return replace(leaf)
        own = {name: value for name, value in getattr(leaf, "__dict__", {}).items() if _holds_tensors(value)}
        if not own or isinstance(leaf, (torch.nn.Module, type)):
            return leaf
        copied = copy.copy(leaf)
        for name, value in own.items():
            copied.__dict__[name] = with_tensors_replaced(value, replace)
        return copied

    return pytree.tree_map(replaced, plain(batch))


def _holds_tensors(value: Any) -> bool:
    return any(
        isinstance(leaf, torch.Tensor) or any(map(_holds_tensors, getattr(leaf, "__dict__", {}).values()))
        for leaf in pytree.tree_leaves(plain(value))
        if not isinstance(leaf, (torch.nn.Module, type))
    )


def batch_tensors(batch: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a batch by key, position or attribute."""
    for path, leaf in pytree.tree_leaves_with_path(plain(batch)):
        keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        if isinstance(leaf, torch.Tensor):
            yield ".".join([prefix, *keys] if prefix else keys) or "0", leaf
        elif not isinstance(leaf, (torch.nn.Module, type)):
            for name, value in getattr(leaf, "__dict__", {}).items():
                if _holds_tensors(value):
                    yield from batch_tensors(value, ".".join([prefix, *keys, name] if prefix else [*keys, name]))


def batch_types(batch: Any) -> dict[str, TensorType]:
    """Shapes and dtypes of the tensors of a batch, named as in :attr:`gtflops.graph.Graph.batch`."""
    return {name: tensor_type(tensor) for name, tensor in batch_tensors(batch)}


def describe_batch(batch: Any) -> str:
    """Shapes and dtypes of a batch, for messages."""
    return str(
        pytree.tree_map_only(
            torch.Tensor,
            lambda tensor: f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}",
            plain(batch),
        )
    )

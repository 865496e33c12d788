"""Models that FSDP2 (``fully_shard``) has sharded: a stand-in with whole tensors, to trace or to save."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gtflops.errors import InputError

#: Where a model's hooks are kept, and what of them is kept beside them by the same keys.
_HOOKS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, spread over the processes of a group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # takes a while, and most runs have one process

    return isinstance(tensor, DTensor)


def unsharded(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` itself, or for a sharded one a copy with fake tensors of the whole shapes and without FSDP's hooks."""
    if not any(is_sharded(tensor) for tensor in model.parameters()):
        return model
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        with fake_mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    return with_parameters(model, whole)


def with_parameters(model: torch.nn.Module, replaced: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    """A copy of a sharded model as it was before ``fully_shard``, with other tensors in the place of its parameters.

    Everything else is the model's own: its buffers, its settings, the hooks of others.
    """
    from torch.distributed.fsdp import FSDPModule

    tensors: dict[int, torch.nn.Parameter] = {}
    copies: dict[int, torch.nn.Module] = {}
    dicts: dict[int, dict[str, Any]] = {}

    def parameter(tensor: torch.Tensor | None) -> torch.nn.Parameter | None:
        if tensor is None:
            return None
        if id(tensor) not in tensors:
            tensors[id(tensor)] = torch.nn.Parameter(replaced(tensor), requires_grad=tensor.requires_grad)
        return tensors[id(tensor)]

    def replaced_in(content: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
        """A dictionary that several modules have stays one: a module may stand for another, with its content."""
        if id(content) not in dicts:
            dicts[id(content)] = {name: change(value) for name, value in content.items()}
        return dicts[id(content)]

    def copy_of(module: torch.nn.Module) -> torch.nn.Module:
        if id(module) in copies:
            return copies[id(module)]
        kind = type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)
        copied: torch.nn.Module = object.__new__(kind)
        copies[id(module)] = copied
        own = copied.__dict__
        for name, value in module.__dict__.items():
            if isinstance(value, MethodType) and value.__self__ is module:  # accelerate's autocast
                value = MethodType(value.__func__, copied)
            elif isinstance(value, torch.nn.Module):
                value = copy_of(value)
            own[name] = value
        own["_buffers"] = replaced_in(module._buffers, lambda tensor: tensor)
        own["_parameters"] = replaced_in(module._parameters, parameter)
        own["_modules"] = replaced_in(module._modules, lambda child: child and copy_of(child))
        for hooks, besides in _HOOKS.items():
            kept = {key: hook for key, hook in own[hooks].items() if not _is_of_fsdp(hook)}
            for name in besides:
                own[name] = {key: value for key, value in own[name].items() if key in kept}
            own[hooks] = kept
        return copied

    return copy_of(model)


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


@contextmanager
def sharded_again(model: torch.nn.Module) -> Iterator[None]:
    """At the end, shards are where they were: FSDP2 leaves some tensors whole after a pass that has no backward."""
    try:
        yield
    finally:
        if any(is_sharded(tensor) for tensor in model.parameters()):
            from torch.distributed.fsdp import FSDPModule

            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def mesh_of(model: torch.nn.Module) -> Any:
    """The device mesh of a sharded model. InputError for one that is not FSDP2's alone."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Replicate, Shard

    sharded: dict[str, Any] = {name: tensor for name, tensor in model.named_parameters() if is_sharded(tensor)}
    name, first = next(iter(sharded.items()))
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise InputError(
            f"{name!r} is a DTensor, and no module was sharded by torch.distributed.fsdp.fully_shard: tensor "
            "parallelism is not supported; expected a model under fully_shard or DistributedDataParallel"
        )
    for name, tensor in sharded.items():
        shards = [placement for placement in tensor.placements if isinstance(placement, Shard)]
        if tensor.device_mesh != first.device_mesh:
            raise InputError(
                f"{name!r} lies on the mesh {tensor.device_mesh}, other tensors on {first.device_mesh}; expected one "
                "mesh for the whole model"
            )
        if len(shards) != 1 or any(not isinstance(placement, (Shard, Replicate)) for placement in tensor.placements):
            raise InputError(
                f"{name!r} is placed as {tensor.placements}, expected tensors that are sharded once, as fully_shard "
                "does on a mesh of one dimension, or of two with replicas"
            )
    mesh = first.device_mesh
    if mesh.ndim > 1 and mesh.size() != torch.distributed.get_world_size():
        raise InputError(
            f"the mesh {mesh} has {mesh.size()} of {torch.distributed.get_world_size()} processes in several "
            "dimensions; expected one of all processes, or of one dimension"
        )
    return mesh

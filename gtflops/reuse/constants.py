"""What computes the activations at a boundary: digests of weights and settings, and a quick look for changes."""

import functools
import hashlib
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from gtflops.reuse.digests import bytes_of, header_of

#: Of the activations' meaning: raised when what an entry holds, or how it is found, changes.
_FORMAT = 2
#: Values looked at in each tensor by :func:`fingerprint_of`.
_NUM_SAMPLES = 16
#: Settings that differ between runs, or change in a forward pass, and do not enter what a block computes.
_WITHOUT_EFFECT = frozenset(
    {
        "training",
        "gradient_checkpointing",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "use_cache",
        "name_or_path",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "torch_dtype",
        "dtype",
        "transformers_version",
    }
)


#: What any module has: its tensors and submodules, which are looked at apart, hooks, and methods that compute nothing.
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module())) | {"_compiled_call_impl", "train"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def digest_of(tensors: Mapping[str, torch.Tensor], modules: Mapping[str, torch.nn.Module], conditions: Any) -> str:
    """The digest of every weight and setting, and of ``conditions``: plain data such as the boundary's name.

    A setting is an attribute of a module that is a number, a text, a function, or a list or dictionary of such; its
    hooks; and, of a configuration object, what its ``to_dict()`` holds. 64 hexadecimal digits; it reads every weight
    once.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, torch.__version__, conditions]).encode())
    for name, tensor in tensors.items():
        digest.update(header_of(f"{name}@{tensor.device.type}", tensor))
        digest.update(bytes_of(tensor))
    configurations: dict[int, Any] = {}
    for module in modules.values():
        config = getattr(module, "config", None)
        if config is not None and id(config) not in configurations:
            configurations[id(config)] = _settings_of(config)
    digest.update(settings_of(modules).encode())
    digest.update(json.dumps(list(configurations.values()), sort_keys=True).encode())
    return digest.hexdigest()


def settings_of(modules: Mapping[str, torch.nn.Module]) -> str:
    """The settings and hooks of modules, but for those of their configurations."""
    listed = []
    for name, module in modules.items():
        own = {key: _plain(value) for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
        hooks = [_plain(hook) for its in _HOOKS for hook in vars(module)[its].values()]
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        listed.append([name, kind, {key: value for key, value in own.items() if key not in _WITHOUT_EFFECT}, hooks])
    return json.dumps(listed, sort_keys=True)


def fingerprint_of(tensors: Iterable[torch.Tensor]) -> tuple[Any, ...]:
    """Differs when any of the tensors was changed, at the cost of a look at each.

    PyTorch counts changes in place, but not those through ``.data``, so some values are looked at as well.
    """
    listed = list(tensors)
    samples: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    with torch.no_grad():
        for tensor in listed:
            step = max(1, tensor.numel() // _NUM_SAMPLES)
            sample = tensor.reshape(-1)[::step][:_NUM_SAMPLES]
            samples.setdefault((tensor.device, tensor.dtype), []).append(sample)
        taken = [torch.cat(alike).view(torch.uint8).cpu().numpy().tobytes() for alike in samples.values()]
    return (
        *((id(tensor), tensor.data_ptr(), None if tensor.is_inference() else tensor._version) for tensor in listed),
        *taken,
    )


def _matters(name: str) -> bool:
    return not name.startswith("_") and name not in _WITHOUT_EFFECT


def _settings_of(config: Any) -> Any:
    """Of a configuration; with its attention, which transformers keeps apart because it is none of the checkpoint."""
    if not hasattr(config, "to_dict"):
        return _plain(config)
    settings = {str(key): _plain(value) for key, value in config.to_dict().items() if _matters(str(key))}
    return {**settings, "attention": str(getattr(config, "_attn_implementation", None))}


def _plain(value: Any) -> Any:
    """The value, if it can be written down the same way in every run; else the name of its type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items() if _matters(str(key))}
    if isinstance(value, Sequence):
        return [_plain(inner) for inner in value]
    if isinstance(value, functools.partial):
        return ["partial", _plain(value.func), _plain(value.args), _plain(value.keywords)]
    if isinstance(value, types.MethodType):
        return ["method", _plain(value.__func__), type(value.__self__).__qualname__]
    if isinstance(value, types.FunctionType):
        return [f"{value.__module__}.{value.__qualname__}", *_code(value)]
    if isinstance(value, types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    return type(value).__qualname__


def _code(function: types.FunctionType) -> list[Any]:
    """What functions of one name may differ by: their code, and plain values that they close over."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    plain = [value for value in cells if value is None or isinstance(value, (bool, int, float, str))]
    code = function.__code__
    constants = [
        str(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
        for value in code.co_consts
        if not isinstance(value, types.CodeType)
    ]
    return [hashlib.sha256(code.co_code).hexdigest(), constants, list(code.co_names), plain]

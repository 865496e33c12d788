"""What computes the activations at a boundary: digests of weights and settings, and a quick look for changes."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from gtflops.reuse.digests import bytes_of, header_of
from gtflops.reuse.settings import Settings

#: Of the activations' meaning: raised when what an entry holds, or how it is found, changes.
_FORMAT = 3
#: Values looked at in each tensor by :func:`fingerprint_of`.
_NUM_SAMPLES = 16


def digest_of(tensors: Mapping[str, torch.Tensor], settings: Settings, conditions: Any) -> str:
    """The digest of every weight and setting, and of ``conditions``: plain data such as the boundary's name.

    64 hexadecimal digits; it reads every weight once.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, settings.digest, conditions]).encode())
    for name, tensor in (*tensors.items(), *(("", tensor) for tensor in settings.tensors)):
        digest.update(header_of(f"{name}@{tensor.device.type}", tensor))
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


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

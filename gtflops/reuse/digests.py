"""What tensors hold, in bytes that a hash or a checksum can take."""

import torch


def header_of(name: str, tensor: torch.Tensor) -> bytes:
    """What the bytes of a tensor do not say of it: its name, dtype and shape."""
    return f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The content in memory order, ``numel * itemsize`` bytes; no copy where the tensor is contiguous and on the CPU.

    >>> bytes_of(torch.tensor([1, 2], dtype=torch.uint8)).tobytes()
    b'\\x01\\x02'
    """
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data

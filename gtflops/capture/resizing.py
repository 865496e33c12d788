"""Batches of other sizes: the same tensors with another number of rows or another length."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from gtflops.capture.batches import TARGET_POSITIONS, plain
from gtflops.capture.unchanged import unchanged
from gtflops.errors import InputError
from gtflops.shapes import Sizes

# How transformers names what is not made of tokens: dimensions beyond the first are none of the lengths.
_WITHOUT_TOKENS = ("pixel_values", "input_features", "input_values")
# (batch, length, features): the features are no length, whatever their number.
_EMBEDDINGS = ("inputs_embeds", "decoder_inputs_embeds", "encoder_hidden_states", "encoder_outputs")
# Of a trimmed batch: flat positions, and the labels at them, ``1 x num_targets``.
_TARGETS = ("labels", "shift_labels")
_ENCODER = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "encoder_attention_mask")


@dataclass(frozen=True)
class Layout:
    """Which size of a batch each dimension of each of its tensors is.

    ``roles`` has, for each tensor leaf in order, the name of a size or ``None`` for each dimension; ``ambiguous`` says
    which sizes cannot be changed, and why.
    """

    batch: Any
    sizes: Sizes
    roles: tuple[tuple[str | None, ...], ...]
    ambiguous: Mapping[str, str]

    def resized(self, sizes: Sizes) -> Any:
        """The batch in other sizes, on the same devices and in the same memory formats.

        Its values are those of the original, spread out or thinned: a mask with padding keeps some, one without has
        none. InputError where it cannot be told which dimensions to change.
        """
        before, after = dict(self.sizes.items()), dict(sizes.items())
        for name, size in after.items():
            if name in self.ambiguous and size != before[name]:
                raise InputError(f"{name} {size}: {self.ambiguous[name]}")
        leaves, structure = pytree.tree_flatten(plain(self.batch))
        roles = iter(self.roles)
        resized = [
            _resized(
                leaf,
                [size if role is None else after[role] for size, role in zip(leaf.shape, next(roles), strict=True)],
            )
            if isinstance(leaf, torch.Tensor)
            else leaf
            for leaf in leaves
        ]
        return pytree.tree_unflatten(resized, structure)


def layout_of(batch: Any, *, has_decoder: bool) -> Layout:
    """Where a batch has its sizes: by the names that transformers gives to tensors, else by equal numbers.

    The batch size is dimension 0 of its tensors; a length is dimension 1 of the token ids (the first integer tensor of
    two dimensions or more, where none is called so) and every dimension equal to it. With a decoder, its tensors are
    those called ``decoder_...`` and ``labels``. Beside ``target_positions``, labels are those at these.
    InputError where dimension 0 is not the same throughout.
    """
    tensors = [
        (
            str(getattr(path[-1], "key", getattr(path[-1], "idx", ""))) if path else "",
            pytree.keystr(path),
            leaf.shape,
            leaf,
        )
        for path, leaf in pytree.tree_leaves_with_path(plain(batch))
        if isinstance(leaf, torch.Tensor)
    ]
    shapes = {name: tuple(shape) for name, _, shape, _ in tensors if len(shape)}
    if not shapes:
        raise InputError("the batch has no tensors with a dimension, so no sizes that could be others")
    batch_size = _first(shapes, ("input_ids", "inputs_embeds", "decoder_input_ids", *shapes), 0)
    assert batch_size is not None  # some tensor has a dimension
    decoder_len = _first(shapes, [name for name in shapes if name.startswith("decoder_")], 1)
    if decoder_len is None and has_decoder:
        decoder_len = _first(shapes, ("labels",), 1)
    ids = [name for name, _, shape, leaf in tensors if len(shape) > 1 and not _is_floating(leaf)]
    if decoder_len is not None:
        ids = [name for name in ids if name != "labels" and not name.startswith("decoder_")]
    ids = [name for name in ids if name not in _WITHOUT_TOKENS]
    seq_len = _first(shapes, ("input_ids", "inputs_embeds", *ids), 1)
    num_targets = _first(shapes, (TARGET_POSITIONS,), 0)
    sizes = Sizes(batch_size, seq_len, decoder_len, num_targets)
    ambiguous: dict[str, str] = {}
    for path, leaf in pytree.tree_leaves_with_path(plain(batch)):
        for label, size in sizes.items():
            if isinstance(leaf, int) and not isinstance(leaf, bool) and leaf == size > 1:
                ambiguous[label] = (
                    f"the batch's number {pytree.keystr(path)} is equal to it, so it cannot be told whether it would "
                    "change; profile the model on a batch of the sizes in question"
                )
    roles = tuple(_roles(name, where, leaf, sizes, ambiguous) for name, where, _, leaf in tensors)
    return Layout(batch, sizes, roles, ambiguous)


def _first(shapes: Mapping[str, Sequence[int]], names: Sequence[str], dimension: int) -> int | None:
    return next((shapes[name][dimension] for name in names if len(shapes.get(name, ())) > dimension), None)


def _roles(
    name: str, where: str, tensor: torch.Tensor, sizes: Sizes, ambiguous: dict[str, str]
) -> tuple[str | None, ...]:
    """The roles of one tensor's dimensions; notes what cannot be told in ``ambiguous``."""
    shape = tuple(tensor.shape)
    if sizes.num_targets is not None and name in (TARGET_POSITIONS, *_TARGETS):
        return ("num_targets",) if name == TARGET_POSITIONS else (None, "num_targets")
    lengths = {label: size for label, size in sizes.items() if label not in ("batch_size", "num_targets")}
    is_ids_of_decoder = name.startswith("decoder_") or (name == "labels" and "decoder_len" in lengths)

    def length_of(dimension: int) -> str | None:
        """The length that a dimension is, by its number."""
        equal = [label for label, size in lengths.items() if size == shape[dimension]]
        if len(equal) == 2:
            if is_ids_of_decoder or name in _ENCODER:
                return "decoder_len" if is_ids_of_decoder else "seq_len"
            reason = f"as long as both the encoder's tokens and the decoder's ({shape[dimension]})"
            ambiguous.update(dict.fromkeys(equal, _unclear(where, dimension, shape, reason)))
        return equal[0] if equal else None

    def role(dimension: int) -> str | None:
        if dimension == 0:
            if shape[0] == sizes.batch_size and (len(shape) > 1 or name == "labels"):
                return "batch_size"
            length = length_of(0) if len(shape) == 1 else None
            if shape[0] == sizes.batch_size:
                if length is not None:
                    reason = f"equal to the batch size and to {length}"
                    text = _unclear(where, 0, shape, reason)
                    ambiguous.update({"batch_size": text, length: text})
                return "batch_size"
            if length is None and shape[0] != 1:
                ambiguous["batch_size"] = _unclear(where, 0, shape, f"not the batch size {sizes.batch_size}, nor 1")
            return length
        if name in _WITHOUT_TOKENS or (dimension > 1 and name in _EMBEDDINGS):
            return None
        length = length_of(dimension)
        if length is not None and dimension > 1 and (lengths[length] == 1 or _is_features(name, tensor)):
            ambiguous[length] = _unclear(where, dimension, shape, f"equal to {length}, perhaps by chance")
        return length

    return tuple(role(dimension) for dimension in range(len(shape)))


def _is_features(name: str, tensor: torch.Tensor) -> bool:
    """Whether dimensions from the third on may well be features: of masks and of integers they are lengths."""
    return _is_floating(tensor) and "mask" not in name


def _is_floating(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _unclear(where: str, dimension: int, shape: Sequence[int], reason: str) -> str:
    return (
        f"dimension {dimension} of the batch's tensor {where or 'itself'}, of shape {tuple(shape)}, is {reason}, so it "
        "cannot be told whether it would change; profile the model on a batch whose sizes are all different"
    )


def _resized(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """``tensor`` in another shape, with its dimensions in the same order in memory and the same gaps between rows."""
    if tuple(shape) == tuple(tensor.shape):
        return tensor
    if tensor.layout is not torch.strided:
        raise InputError(f"the batch has a tensor of layout {tensor.layout}, expected strided ones to change its sizes")
    strides = [0] * tensor.dim()
    extent_before = extent = 1
    for dimension in sorted(range(tensor.dim() - 1, -1, -1), key=tensor.stride):
        stride = tensor.stride(dimension)
        if stride:
            gap = stride - extent_before if tensor.size(dimension) > 1 else 0
            strides[dimension] = max(extent + gap, 1)
            extent_before = stride * tensor.size(dimension) if tensor.size(dimension) > 1 else extent_before
            extent = strides[dimension] * shape[dimension]
    stored = [size if stride else 1 for size, stride in zip(shape, strides, strict=True)]
    fake_mode = tensor.fake_mode if isinstance(tensor, FakeTensor) else nullcontext()
    with torch.no_grad(), fake_mode:
        result = torch.empty_strided(stored, strides, dtype=tensor.dtype, device=tensor.device).expand(shape)
        if not (tensor.is_meta or isinstance(tensor, FakeTensor)):
            _fill(result, tensor)
    return result


def _fill(result: torch.Tensor, tensor: torch.Tensor) -> None:
    """Writes the values of ``tensor`` into its resized form, the first and the last of each dimension included."""
    values = tensor.detach()
    for dimension, (before, after) in enumerate(zip(tensor.shape, result.shape, strict=True)):
        if before != after and before:
            steps = torch.arange(after, device=tensor.device)
            values = values.index_select(dimension, steps * (before - 1) // max(after - 1, 1))
    if values.numel() and not values.is_complex():
        # Thinning may have lost what a mask is made of: the least and the largest value stay, if in one place each.
        values = values.contiguous()
        flat = values.view(-1)
        if flat.max() < tensor.max():
            flat[0] = tensor.max()
        if flat.min() > tensor.min():
            flat[-1] = tensor.min()
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in result.stride())
    result[once].copy_(values[once])


@contextmanager
def modes(model: torch.nn.Module, training: Sequence[bool]) -> Iterator[None]:
    """``model`` with its modules in training or evaluation mode as given, in the order of ``modules()``.

    InputError where it has another number of modules by now.
    """
    modules = list(model.modules())
    if len(modules) != len(training):
        raise InputError(
            f"the {type(model).__name__} has {len(modules)} modules by now, {len(training)} when it was profiled; "
            "profile it again"
        )
    if [module.training for module in modules] == list(training):
        yield
        return
    with unchanged(model):
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
        yield

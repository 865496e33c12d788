"""The examples of a batch: what makes each one the same when it comes again, in other company."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gtflops import blocks
from gtflops.capture.batches import TARGET_POSITIONS
from gtflops.errors import InputError
from gtflops.reuse.digests import bytes_of, header_of

#: Arguments of forward passes that only the loss reads.
TARGETS = blocks.TARGETS | {TARGET_POSITIONS}
#: Inputs with one column a token.
OF_TOKENS = frozenset({"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"})
#: Other inputs of transformers' models whose first axis is that of the examples, where there is no text beside them.
_WITH_ROWS_OF_EXAMPLES = frozenset({"pixel_values", "pixel_mask", "bool_masked_pos", "input_features", "input_values"})


@dataclass(frozen=True, slots=True)
class Example:
    """``identity`` is the digest of the example's own inputs.

    ``tokens`` are the columns (int64) that hold its tokens and not padding, of the batch's ``num_columns``; both are
    None where a row is kept whole. ``is_batch`` where all of a batch is one example.
    """

    identity: str
    tokens: torch.Tensor | None = None
    num_columns: int | None = None
    is_batch: bool = False


def examples_of(
    inputs: Mapping[str, Any], read: torch.Tensor | None = None, *, batch_first: bool = False
) -> list[Example]:
    """The examples of a batch, in order.

    ``inputs`` are the arguments of the forward pass without its targets. ``read`` (bool, ``batch_size x seq_len``) is
    true where the loss reads what is computed; None where that is not known.

    With an ``attention_mask`` (``batch_size x seq_len``) beside inputs of tokens, and ``read`` nowhere at padding,
    padding behind the last token is not part of an example, so that it is the same beside longer ones. Padding in front
    is: positions may depend on it. Else rows are examples with their padding, in batches of the same length alone.
    Where it is not clear which rows belong to which example, as with images beside text, the whole batch is one; so it
    is for names that are not known, whose first axis may be time, unless ``batch_first`` says that it is not.

    >>> batch = {"input_ids": torch.tensor([[5, 6, 0], [5, 6, 7]]),
    ...          "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    >>> short, long = examples_of(batch, torch.tensor([[True, False, False], [True, True, False]]))
    >>> alone, = examples_of({"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])},
    ...                      torch.tensor([[True, False]]))
    >>> alone.identity == short.identity, short.tokens, long.identity == short.identity
    (True, tensor([0, 1]), False)
    >>> short, long = examples_of(batch)
    >>> alone.identity == short.identity, short.tokens
    (False, None)
    """
    tensors, settings = _parted(inputs)
    batch_size = _batch_size(tensors)
    common = hashlib.sha256(repr(sorted(settings.items())).encode())
    if not _has_rows_of_examples(tensors, batch_size, batch_first):
        common.update(b"batch")
        return [Example(_with(common, tensors), is_batch=True)]

    mask = _mask_of_tokens(tensors, read)
    common.update(b"rows" if mask is None else b"tokens")  # what is kept of an example is another shape
    if mask is None:
        return [
            Example(_with(common, {name: tensor[row] for name, tensor in tensors.items()})) for row in range(batch_size)
        ]
    examples = []
    for row in range(batch_size):
        tokens = mask[row].nonzero().flatten()
        end = int(tokens[-1]) + 1 if len(tokens) else 0
        identity = _with(common, {name: tensor[row, :end] for name, tensor in tensors.items()})
        examples.append(Example(identity, tokens, mask.shape[1]))
    return examples


def _parted(inputs: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors on the CPU, by sorted names, and the rest."""
    tensors, settings = {}, {}
    for name, value in sorted(inputs.items()):
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                raise InputError(f"{name} of the batch requires a gradient, expected inputs that nothing is trained of")
            tensors[name] = value.detach().to("cpu")
        elif value is None or isinstance(value, (bool, int, float, str)):
            settings[name] = value
        else:
            raise InputError(
                f"{name} of the batch is of type {type(value).__name__}, expected a tensor, a number, a text or None: "
                "what an example is must be known to tell when it comes again"
            )
    if not any(tensor.dim() and len(tensor) for tensor in tensors.values()):
        raise InputError(f"the batch holds no tensor with examples, but {sorted(inputs)}; expected input_ids or alike")
    return tensors, settings


def _batch_size(tensors: Mapping[str, torch.Tensor]) -> int:
    main = next((name for name in ("input_ids", "inputs_embeds") if name in tensors), None)
    return len(tensors[main] if main else next(tensor for tensor in tensors.values() if tensor.dim()))


def _has_rows_of_examples(tensors: Mapping[str, torch.Tensor], batch_size: int, batch_first: bool) -> bool:
    """Whether row ``i`` of every tensor is of example ``i``.

    Images beside text may be several to an example and none to the next, and multimodal position ids have an axis in
    front of that of the examples: that the sizes are equal would be chance.
    """
    of_tokens = OF_TOKENS & tensors.keys()
    others = {name for name in tensors.keys() - of_tokens if not name.startswith("decoder_") and name not in TARGETS}
    return (
        all(tensor.dim() and len(tensor) == batch_size for tensor in tensors.values())
        and (batch_first or others <= _WITH_ROWS_OF_EXAMPLES)
        and not (others and of_tokens - {"attention_mask"})
        and ("position_ids" not in tensors or tensors["position_ids"].dim() == 2)
    )


def _mask_of_tokens(tensors: Mapping[str, torch.Tensor], read: torch.Tensor | None) -> torch.Tensor | None:
    """True at tokens, ``batch_size x seq_len``; None where rows are kept whole.

    So they are where a row has no token: what attention gives to nothing depends on its padding.
    """
    mask = tensors.get("attention_mask")
    if mask is None or read is None or mask.dim() != 2 or not tensors.keys() <= OF_TOKENS:
        return None
    if any(tensor.shape[:2] != mask.shape for tensor in (*tensors.values(), read)):
        return None
    mask = mask != 0
    return None if bool((read & ~mask).any()) or not bool(mask.any(dim=1).all()) else mask


def _with(common: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = common.copy()
    for name, tensor in tensors.items():
        digest.update(header_of(name, tensor))
        digest.update(bytes_of(tensor))
    return str(digest.hexdigest())

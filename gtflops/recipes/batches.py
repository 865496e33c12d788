"""Batches of token ids from examples; the loss is on the target only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gtflops.errors import InputError
from gtflops.recipes.datasets import END, Example

Batch = dict[str, torch.Tensor]

#: The label of positions without loss, as PyTorch's cross-entropy has it.
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids: what the model is given, and what it is to answer, its end included."""

    prompt: list[int]
    target: list[int]


def batches(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    batch_size: int,
    seq_len: int,
    seed: int | None = None,
    target_len: int | None = None,
) -> Iterator[Batch]:
    """Full batches of ``batch_size`` x ``seq_len`` tokens, padded on the right, without end.

    The order is shuffled anew each epoch from ``seed``, or left as it is without one; what does not fill a batch at
    the end of an epoch waits for another epoch's shuffle. With ``target_len``, for encoder-decoders, the prompt alone
    is in ``seq_len``, and labels are ``target_len`` long. Every example is encoded before the first batch: InputError
    names one whose target leaves no room.
    """
    if len(examples) < batch_size:
        raise InputError(f"{len(examples)} examples do not fill a batch of {batch_size}; expected at least as many")
    rows = [encode(example, tokenizer, seq_len=seq_len, target_len=target_len) for example in examples]
    return _endless(rows, tokenizer, batch_size, seq_len, seed, target_len)


def in_order(
    examples: Sequence[Example], tokenizer: Any, *, batch_size: int, seq_len: int, target_len: int | None = None
) -> list[Batch]:
    """Every example once, as in :func:`batches`; the last batch holds what is left."""
    rows = [encode(example, tokenizer, seq_len=seq_len, target_len=target_len) for example in examples]
    return [
        collate(rows[start : start + batch_size], tokenizer, seq_len=seq_len, target_len=target_len)
        for start in range(0, len(rows), batch_size)
    ]


def _endless(
    rows: Sequence[Encoded], tokenizer: Any, batch_size: int, seq_len: int, seed: int | None, target_len: int | None
) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist() if generator else range(len(rows))
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            chosen = [rows[index] for index in order[start : start + batch_size]]
            yield collate(chosen, tokenizer, seq_len=seq_len, target_len=target_len)


def encode(example: Example, tokenizer: Any, *, seq_len: int, target_len: int | None = None) -> Encoded:
    """Token ids of an example: its source is cut to what ``seq_len`` has room for, cue and target are kept whole.

    The tokenizer's own first token (OPT's ``</s>``, Llama's ``<s>``) comes first. InputError where no room is left.
    """
    where = f"{example.where}: " if example.where else ""
    opening = _opening(tokenizer)
    source, cue, target = (_tokens(text, tokenizer) for text in (example.source, example.cue, example.target))
    target = [*target, tokenizer.eos_token_id]
    if target_len is None:
        closing: list[int] = []
        room = seq_len - len(opening) - len(cue) - len(target)
        if room < 1:
            raise InputError(
                f"{where}a target of {len(target) - 1} tokens leaves no room for its prompt in {seq_len}; "
                f"expected seq_len of at least {seq_len - room + 1}"
            )
    else:
        closing = [tokenizer.eos_token_id]
        room = seq_len - len(opening) - len(cue) - 1
        if len(target) > target_len:
            raise InputError(
                f"{where}a target of {len(target) - 1} tokens does not fit into {target_len} labels; expected "
                f"target_len of at least {len(target)}"
            )
        if room < 1:
            raise InputError(f"{where}seq_len is {seq_len}, expected at least {seq_len - room + 1}")
    return Encoded([*opening, *source[:room], *cue, *closing], target)


def _tokens(text: str, tokenizer: Any) -> list[int]:
    tokens: list[int] = []
    for index, part in enumerate(text.split(END)):
        tokens += [tokenizer.eos_token_id] if index else []
        tokens += tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
    return tokens


def _opening(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, if it does."""
    first = tokenizer("")["input_ids"][:1]
    return list(first) if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def collate(rows: Sequence[Encoded], tokenizer: Any, *, seq_len: int, target_len: int | None = None) -> Batch:
    """One batch, padded on the right to ``seq_len`` (and its labels to ``target_len``)."""
    input_ids = torch.full((len(rows), seq_len), tokenizer.pad_token_id)
    attention_mask = torch.zeros((len(rows), seq_len), dtype=torch.int64)
    labels = torch.full((len(rows), target_len or seq_len), IGNORED)
    for index, row in enumerate(rows):
        tokens = row.prompt if target_len else [*row.prompt, *row.target]
        start = 0 if target_len else len(row.prompt)
        input_ids[index, : len(tokens)] = torch.tensor(tokens)
        attention_mask[index, : len(tokens)] = 1
        labels[index, start : start + len(row.target)] = torch.tensor(row.target)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

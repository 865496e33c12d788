"""Batches of token ids from examples; the loss is on the target only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from gtflops.errors import InputError
from gtflops.families import IGNORED
from gtflops.recipes.datasets import END, Example
from gtflops.trimming import by_length

Batch = dict[str, torch.Tensor]


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
    _require_a_batch(examples, batch_size)
    rows = [encode(example, tokenizer, seq_len=seq_len, target_len=target_len) for example in examples]
    return (
        collate([rows[index] for index in chosen], tokenizer, seq_len=seq_len, target_len=target_len)
        for order in _orders(len(rows), seed)
        for chosen in _full(order, batch_size)
    )


class EpochBatches:
    """The batches of one epoch of :func:`batches`, on ``device``; :meth:`set_epoch` says of which.

    Of ``parts`` processes that train together, each has every ``parts``-th batch, beginning at number ``part``; what
    does not give one to each is left out. With ``grouped``, examples of about the same length are in the same batches,
    and in those that the processes have at the same time.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        target_len: int | None = None,
        device: torch.device | None = None,
        part: int = 0,
        parts: int = 1,
        grouped: bool = False,
    ) -> None:
        _require_a_batch(examples, batch_size * parts)
        self._rows = [encode(example, tokenizer, seq_len=seq_len, target_len=target_len) for example in examples]
        self._tokenizer, self._seq_len, self._target_len = tokenizer, seq_len, target_len
        self._batch_size, self._seed, self._device, self._part, self._parts = batch_size, seed, device, part, parts
        self._grouped = grouped
        self._epoch = 0

    def __len__(self) -> int:
        return batches_in_epoch(len(self._rows), self._batch_size, self._parts)

    def set_epoch(self, epoch: int) -> None:
        """The order is that of this epoch, from 0 on; it depends on the seed and ``epoch`` alone."""
        self._epoch = epoch

    def _orders(self) -> Iterator[list[int]]:
        if not self._grouped:
            yield from _orders(len(self._rows), self._seed)
        lengths = [len(row.prompt) + len(row.target) for row in self._rows]
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield by_length(lengths, self._batch_size * self._parts, generator)

    def __iter__(self) -> Iterator[Batch]:
        order = next(islice(self._orders(), self._epoch, None))
        of_this_part = islice(_full(order, self._batch_size), self._part, len(self) * self._parts, self._parts)
        for chosen in of_this_part:
            rows = [self._rows[index] for index in chosen]
            batch = collate(rows, self._tokenizer, seq_len=self._seq_len, target_len=self._target_len)
            yield {name: tensor.to(self._device) for name, tensor in batch.items()}


def batches_in_epoch(num_examples: int, batch_size: int, parts: int = 1) -> int:
    """How many batches each of ``parts`` processes has in an epoch."""
    return num_examples // batch_size // parts


def in_order(
    examples: Sequence[Example], tokenizer: Any, *, batch_size: int, seq_len: int, target_len: int | None = None
) -> list[Batch]:
    """Every example once, as in :func:`batches`; the last batch holds what is left."""
    rows = [encode(example, tokenizer, seq_len=seq_len, target_len=target_len) for example in examples]
    return [
        collate(rows[start : start + batch_size], tokenizer, seq_len=seq_len, target_len=target_len)
        for start in range(0, len(rows), batch_size)
    ]


def _orders(num_examples: int, seed: int | None) -> Iterator[list[int]]:
    """The order of the examples in each epoch, without end."""
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    while True:
        yield torch.randperm(num_examples, generator=generator).tolist() if generator else list(range(num_examples))


def _full(order: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
    """The full batches of an order."""
    return (order[start : start + batch_size] for start in range(0, len(order) - batch_size + 1, batch_size))


def _require_a_batch(examples: Sequence[Example], size: int) -> None:
    if len(examples) < size:
        raise InputError(f"{len(examples)} examples do not fill a batch of {size}; expected at least as many")


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

"""Pairs of prompt and target, and batches of them: the loss is on the target only."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gtflops.errors import InputError
from gtflops.recipes.models import package_folder

Batch = dict[str, torch.Tensor]

#: The label of positions without loss, as PyTorch's cross-entropy has it.
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Example:
    """``source`` is cut where an example is too long; ``cue`` leads from it to ``target``, which the loss is on."""

    source: str
    cue: str
    target: str


def aclsum(split: Literal["train", "val", "test"]) -> list[Example]:
    """Abstracts of the ACL Anthology with a summary for each of three aspects (the package ``aclsum``)."""
    path = package_folder("aclsum", "aclsum") / "dataset" / f"{split}.jsonl"
    papers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Example(" ".join(paper["sentences"]["abstract"]), f" TL;DR ({aspect}): ", summary)
        for paper in papers
        for aspect, summary in paper["summary"].items()
    ]


def jsonl(path: Path) -> list[Example]:
    """A file with one JSON object a line, with the texts ``prompt`` and ``target``. InputError names a bad line."""
    examples = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}; expected a JSON-lines file") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} is no JSON: {error.msg}; expected an object a line") from error
        if not isinstance(row, Mapping) or not all(
            isinstance(row.get(key), str) and row[key] for key in ("prompt", "target")
        ):
            raise InputError(f"{path}:{number} has {_keys(row)}, expected non-empty texts 'prompt' and 'target'")
        examples.append(Example(row["prompt"], "", row["target"]))
    if not examples:
        raise InputError(f"{path} holds no examples, expected a JSON object with 'prompt' and 'target' a line")
    return examples


def _keys(row: Any) -> str:
    return f"the keys {sorted(row)}" if isinstance(row, Mapping) else f"a {type(row).__name__}"


def batches(
    examples: Sequence[Example], tokenizer: Any, *, batch_size: int, seq_len: int, seed: int | None = None
) -> Iterator[Batch]:
    """Full batches of ``batch_size`` x ``seq_len`` tokens, padded on the right, without end.

    The order is shuffled anew each epoch from ``seed``, or left as it is without one; what does not fill a batch at
    the end of an epoch waits for another epoch's shuffle.
    """
    if len(examples) < batch_size:
        raise InputError(f"{len(examples)} examples do not fill a batch of {batch_size}; expected at least as many")
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist() if generator else range(len(examples))
        for start in range(0, len(examples) - batch_size + 1, batch_size):
            rows = [_encode(examples[index], tokenizer, seq_len) for index in order[start : start + batch_size]]
            yield _collate(rows, tokenizer.pad_token_id, seq_len)


def _encode(example: Example, tokenizer: Any, seq_len: int) -> tuple[list[int], int]:
    """Token ids, and the number of them that are prompt."""
    source: list[int] = tokenizer(example.source, add_special_tokens=False)["input_ids"]
    cue: list[int] = tokenizer(example.cue, add_special_tokens=False)["input_ids"] if example.cue else []
    target: list[int] = tokenizer(example.target, add_special_tokens=False)["input_ids"]
    room = seq_len - len(cue) - len(target) - 1
    if room < 1:
        raise InputError(
            f"a target of {len(target)} tokens leaves no room for its prompt in {seq_len}; "
            f"expected seq_len of at least {seq_len - room + 1}"
        )
    prompt = source[:room] + cue
    return [*prompt, *target, tokenizer.eos_token_id], len(prompt)


def _collate(rows: Sequence[tuple[list[int], int]], padding: int, seq_len: int) -> Batch:
    input_ids = torch.full((len(rows), seq_len), padding)
    attention_mask = torch.zeros((len(rows), seq_len), dtype=torch.int64)
    labels = torch.full((len(rows), seq_len), IGNORED)
    for row, (tokens, num_prompt) in enumerate(rows):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        attention_mask[row, : len(tokens)] = 1
        labels[row, num_prompt : len(tokens)] = torch.tensor(tokens[num_prompt:])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

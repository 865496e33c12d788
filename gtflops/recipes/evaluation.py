"""How good a model's answers are: texts that it generates, or the choice that it finds likeliest."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from gtflops.families import IGNORED
from gtflops.recipes.batches import Batch, collate, encode
from gtflops.recipes.datasets import Example, Metric
from gtflops.recipes.metrics import accuracy, exact_match_and_f1, rouge


def mean_loss(model: Any, held_out: Sequence[Batch]) -> float:
    """Mean negative log-likelihood of a target token over all batches, in evaluation mode; NaN without any."""
    total, num_targets = 0.0, 0
    with _evaluating(model):
        for batch in held_out:
            # A causal model's first label has no position to be predicted from.
            labels = batch["labels"] if model.config.is_encoder_decoder else batch["labels"][:, 1:]
            targets = int((labels != IGNORED).sum())
            total += float(model(**batch).loss) * targets
            num_targets += targets
    return total / num_targets if num_targets else float("nan")


def quality(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    metric: Metric,
    *,
    seq_len: int,
    target_len: int,
    batch_size: int,
) -> dict[str, float]:
    """The metric of a data set on ``examples``, in percent; prompts are cut as they are in training."""
    sizes = {"seq_len": seq_len, "target_len": target_len, "batch_size": batch_size}
    if metric == "choices":
        return accuracy(likeliest(model, tokenizer, examples, **sizes), [example.target for example in examples])
    texts = generate(model, tokenizer, examples, **sizes)
    if metric == "answers":
        return exact_match_and_f1(texts, [example.answers or (example.target,) for example in examples])
    return rouge(texts, [example.target for example in examples])


def generate(
    model: Any, tokenizer: Any, examples: Sequence[Example], *, seq_len: int, target_len: int, batch_size: int
) -> list[str]:
    """What the model answers to each prompt: greedy, at most ``target_len`` tokens, padded on the left."""
    answers: list[str] = []
    labels_len = target_len if model.config.is_encoder_decoder else None
    with _evaluating(model):
        for part in _parts(examples, batch_size):
            prompts = [encode(example, tokenizer, seq_len=seq_len, target_len=labels_len).prompt for example in part]
            longest = max(map(len, prompts))
            padded = [[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
            real = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
            tokens = model.generate(
                input_ids=torch.tensor(padded, device=_device(model)),
                attention_mask=torch.tensor(real, device=_device(model)),
                max_new_tokens=target_len,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            new = tokens if model.config.is_encoder_decoder else tokens[:, longest:]
            answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def likeliest(
    model: Any, tokenizer: Any, examples: Sequence[Example], *, seq_len: int, target_len: int, batch_size: int
) -> list[str]:
    """The choice to which the model gives the highest probability after the prompt, of each example's ``choices``."""
    asked = [replace(example, target=choice) for example in examples for choice in example.choices]
    scores: list[float] = []
    sequence_to_sequence = model.config.is_encoder_decoder
    labels_len = target_len if sequence_to_sequence else None
    with _evaluating(model):
        for part in _parts(asked, batch_size):
            rows = [encode(example, tokenizer, seq_len=seq_len, target_len=labels_len) for example in part]
            batch = on_device(collate(rows, tokenizer, seq_len=seq_len, target_len=labels_len), _device(model))
            labels, logits = batch["labels"], model(**batch).logits
            if not sequence_to_sequence:
                # What a prompt's virtual tokens (prefix tuning by embeddings) add stands in front.
                labels, logits = labels[:, 1:], logits[:, logits.shape[1] - labels.shape[1] : -1]
            log_likelihood = torch.log_softmax(logits.float(), dim=-1).gather(2, labels.clamp(min=0).unsqueeze(2))
            scores += log_likelihood.squeeze(2).masked_fill(labels == IGNORED, 0).sum(1).tolist()
    remaining = iter(scores)
    return [
        max(zip((next(remaining) for _ in example.choices), example.choices, strict=True), key=lambda pair: pair[0])[1]
        for example in examples
    ]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where the model is."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def _parts(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    return (examples[start : start + size] for start in range(0, len(examples), size))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)

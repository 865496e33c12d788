"""A tokenizer with a token a word, for models with the vocabulary of ``small_models``."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from small_models import build

WORDS = (
    "a model learns what it costs and brings to be trained TL ; DR : question answer goal sol1 sol2 label 0 1 "
    "the cat sat who wrote this dialogue paper long short one two three"
)


def word_tokenizer(*, begins: bool = False) -> Any:
    """Words that it does not know are ``<unk>``; one that ``begins`` puts ``<bos>`` first, as Llama's does."""
    vocabulary = {word: index for index, word in enumerate(("<pad>", "<eos>", "<unk>", "<bos>", *WORDS.split()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def save_llama(folder: Path) -> Path:
    """A small Llama, weights and tokenizer, as save_pretrained writes them; the folder."""
    torch.manual_seed(0)
    build("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder

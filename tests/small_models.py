"""The six families of the main job in small configurations, and batches with padding."""

from typing import Any

import torch
import transformers
from transformers import BloomConfig, GPT2Config, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config

VOCABULARY = 97

_MODERN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_MODERN, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**_MODERN, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_MODERN, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**_MODERN),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.1,
        attention_dropout=0.1,
    ),
    "bloom": lambda: BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4, hidden_dropout=0.1, attention_dropout=0.1
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, attn_pdrop=0.1, resid_pdrop=0.1
    ),
}


def build(family: str, attention: str = "eager") -> Any:
    """A small model of the family with random weights, in training mode."""
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=attention).train()


def padded_batch(batch_size: int = 3, seq_len: int = 16) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the right, without loss on the padding."""
    input_ids = torch.randint(3, VOCABULARY, (batch_size, seq_len))
    attention_mask = torch.ones_like(input_ids)
    for row in range(1, batch_size):
        attention_mask[row, seq_len - 3 * row :] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill(attention_mask == 0, -100),
    }


class HalfUsed(torch.nn.Module):
    """A model with tensors that its loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x).sum()

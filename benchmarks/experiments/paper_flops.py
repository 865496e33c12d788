"""What the published fine-tuning runs cost in FLOPs: ``make experiment-flops`` writes ``results/paper_flops.json``.

Each model at full size on tensors without data, on the lengths of each data set's recipe, by each scheme: exact FLOPs
of a step, of which ``paper_flops_tables.py`` makes those of whole runs. A few minutes of one core.
"""

import json
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

import gtflops
from experiments.paper_flops_tables import RAW
from experiments.provenance import provenance
from gtflops.capture import architecture, presets
from gtflops.files import write_whole
from gtflops.profiling import Reuse, ReusedStep, Trainable
from gtflops.recipes.datasets import _RECIPES
from gtflops.recipes.schemes import scheme
from instances import BUDGETS, IMPORTANCES

MODELS = {
    "OPT-2.7B": "facebook/opt-2.7b",
    "OPT-6.7B": "facebook/opt-6.7b",
    "BLOOMZ-3B": "bigscience/bloomz-3b",
    "BLOOMZ-7B1": "bigscience/bloomz-7b1",
    "FLAN-T5-XL": "google/flan-t5-xl",
}
#: Training examples; lengths are those of gtflops' recipes.
DATASETS = {
    "SciTLDR": ("scitldr", 1_992),
    "DialogSum": ("dialogsum", 12_460),
    "WebQuestions": ("webquestions", 3_778),
    "PIQA": ("piqa", 16_113),
}
BATCH_SIZE, EPOCHS = 4, 5
#: Those that choose by no budget.
SCHEMES = ("full", "lora", "prefix", "top2", "bitfit")
REUSE: tuple[Reuse | None, ...] = (None, "prefix")
#: There are no weights to measure importances on, so they are drawn; `likeness` says how far from measured ones.
IMPORTANCE, SEED = "by size", 1
#: The model and the importances measured on it that drawn ones are held against.
MEASURED_ON = "HuggingFaceTB/SmolLM2-135M"

Row = dict[str, Any]


def main() -> None:
    rows = []
    for model in MODELS:
        for dataset in DATASETS:
            started = time.perf_counter()
            rows += [{"model": model, "dataset": dataset, **row} for row in cell(MODELS[model], *DATASETS[dataset])]
            print(f"{model} on {dataset}: {time.perf_counter() - started:.1f} s", flush=True)
    results = {
        "provenance": provenance("make experiment-flops", importance=SEED),
        "recipe": {"batch_size": BATCH_SIZE, "epochs": EPOCHS, "importance": f"synthetic, {IMPORTANCE}"},
        "likeness": likeness(),
    }
    parts = [f'"{key}": {json.dumps(value)}' for key, value in results.items()]
    listed = ",\n".join(json.dumps(row) for row in rows)  # a row a line
    write_whole(RAW, "{\n" + ",\n".join([*parts, f'"rows": [\n{listed}\n]']) + "\n}\n")


def cell(name: str, recipe: str, examples: int) -> Iterator[Row]:
    """A row for each scheme, and for each budget, with reuse over the epochs and without."""
    seq_len = _RECIPES[recipe].seq_len
    decoder_len = _RECIPES[recipe].target_len if is_encoder_decoder(name) else None
    sizes = {"examples": examples, "seq_len": seq_len, "decoder_len": decoder_len}
    built = architecture(name, batch_size=BATCH_SIZE, seq_len=seq_len, decoder_len=decoder_len)
    base = gtflops.profile(built.model, built.batch)
    base.require_prices()
    for label in SCHEMES:
        # Adapters change the model that they are put on.
        built = architecture(name, batch_size=BATCH_SIZE, seq_len=seq_len, decoder_len=decoder_len)
        try:
            # PEFT warns of names in transformers, and that weights are without data.
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                model = scheme(label).prepare(built.model)
        except gtflops.InputError as error:
            yield {**sizes, "scheme": label, "reuse": None, "not_priced": str(error)}
            continue
        profile = base if model is built.model else gtflops.profile(model.train(), built.batch)
        profile.require_prices()
        for reuse in REUSE:
            parts = {"products": products(profile, model)} if label == "lora" else {}
            yield {**sizes, "scheme": label, **cost(profile, model, reuse), **parts}
    importance = dict(zip(base.names, drawn(base).tolist(), strict=True))
    for reuse in REUSE:
        epochs_left = EPOCHS if reuse else None
        for budget in BUDGETS:
            row = {**sizes, "scheme": "greentrainer", "budget": budget, "reuse": reuse}
            try:
                chosen = gtflops.select(base, importance, budget, reuse=reuse, epochs_left=epochs_left)
            except gtflops.InfeasibleBudgetError:
                least = int(base.form("flops", epochs_left).alone().min())
                yield {**row, "least": least, "full": base.full_flops}
                continue
            found = {"captured": chosen.importance_captured, "optimal": chosen.optimal}
            yield {**row, **cost(base, chosen.mask, reuse), **found}


def is_encoder_decoder(name: str) -> bool:
    settings = dict(presets()[name])
    return bool(transformers.AutoConfig.for_model(settings.pop("model_type"), **settings).is_encoder_decoder)


def cost(profile: gtflops.Profile, trainable: Trainable, reuse: Reuse | None) -> Row:
    """FLOPs of a step. With reuse it is a later one, and ``stored`` what the first ones cost more."""
    chosen = profile.mask(trainable)
    row: Row = {
        "reuse": reuse,
        "tensors": int(chosen.sum()),
        "elements": sum(tensor.numel for tensor, one in zip(profile.tensors, chosen, strict=True) if one),
    }
    for ops in ("all", "matmul"):
        step = profile.step_flops(chosen, ops, reuse=reuse)
        row[ops] = {"forward": step.forward, "backward": step.backward, "stored": 0}
        if isinstance(step, ReusedStep):
            row[ops]["stored"] = step.stored
            row |= {"blocks": len(step.blocks), "cache_bytes_per_example": step.cache_bytes // BATCH_SIZE}
    return row


def products(profile: gtflops.Profile, adapted: torch.nn.Module) -> Row:
    """FLOPs of the matrix products of a step with adapters: forward and backward, by what is multiplied."""
    by_operator, by_module = profile.by_operator(adapted, "matmul"), profile.by_module(adapted, "matmul")
    parts = {
        "all": [by_module[""]],
        "attention": [step for op, step in by_operator.items() if "bmm" in op],
        "adapters": [step for path, step in by_module.items() if path.endswith((".lora_A.default", ".lora_B.default"))],
    }
    return {
        part: {"forward": sum(step.forward for step in steps), "backward": sum(step.backward for step in steps)}
        for part, steps in parts.items()
    }


# --- importances ------------------------------------------------------------------------------------------------------


def drawn(profile: gtflops.Profile) -> NDArray[np.float64]:
    return IMPORTANCES[IMPORTANCE](profile, np.random.default_rng(SEED))


def likeness() -> Row:
    """Importances measured on a model, and those drawn for it: where they lie, and how far they agree."""
    profile = gtflops.profile(MEASURED_ON, batch_size=BATCH_SIZE, seq_len=128)
    measured = IMPORTANCES["measured"](profile, np.random.default_rng(SEED))
    synthetic = drawn(profile)
    return {
        "model": MEASURED_ON,
        "correlation": float(np.corrcoef(measured, synthetic)[0, 1]),
        "shares": {"measured": shares(profile, measured), "synthetic": shares(profile, synthetic)},
    }


def shares(profile: gtflops.Profile, importance: NDArray[np.float64]) -> Mapping[str, float]:
    """Of all positive importance, what each kind of tensor has, and what the lower half of the layers has."""
    positive = np.maximum(importance, 0) / np.maximum(importance, 0).sum()
    kinds = {"MLP": ".mlp.", "attention": ".self_attn.", "embedding": "embed_tokens"}
    found = {kind: float(positive[[part in name for name in profile.names]].sum()) for kind, part in kinds.items()}
    layers = len(profile.blocks)
    lower = [f"model.layers.{number}." for number in range(layers // 2)]
    return found | {"lower half": float(positive[[name.startswith(tuple(lower)) for name in profile.names]].sum())}


if __name__ == "__main__":
    main()

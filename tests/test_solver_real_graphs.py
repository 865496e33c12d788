"""The graph form on the backward graphs of real models: what HiGHS proves to be the best, it finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode

import gtflops
from gtflops.capture import architecture
from gtflops.capture.architectures import presets
from gtflops.solver import GraphKnapsack, knapsack
from highs import highs_graph

SECONDS = 60.0
BUDGETS = (0.45, 0.55, 0.65, 0.8)
Attention = Literal["eager", "sdpa"]

OPT = presets()["facebook/opt-125m"]
LLAMA = presets()["TinyLlama/TinyLlama-1.1B"]
T5 = {"model_type": "t5", "decoder_start_token_id": 0}  # the defaults of its configuration are T5-small
BART = presets()["facebook/bart-large"]
MIXTRAL = presets()["mistralai/Mixtral-8x7B-v0.1"] | {"num_local_experts": 4}
ALBERT = {
    "model_type": "albert",  # layers share parameters; these are the sizes of albert-base
    "architectures": ["AlbertForMaskedLM"],
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}

MODELS: dict[str, tuple[dict[str, Any], Attention]] = {
    "opt": (OPT, "eager"),
    "llama": (LLAMA, "eager"),
    "llama-sdpa": (LLAMA, "sdpa"),
    "t5": (T5, "eager"),
    "bart": (BART, "eager"),
    "mixtral": (MIXTRAL, "eager"),
    "albert": (ALBERT, "eager"),
}


def profile_of(folder: Path, settings: dict[str, Any], attention: Attention) -> gtflops.Profile:
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    if attention == "eager":
        return gtflops.profile(folder, batch_size=4, seq_len=128)
    # A model by name is on no device, where SDPA comes apart; on the CPU it is one kernel, and the graph another.
    built = architecture(str(folder), batch_size=4, seq_len=128, attention=attention)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = built.model.to_empty(device="cpu")
        model.tie_weights()  # type: ignore[operator]
        batch = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in built.batch.items()}
    profile = gtflops.profile(model, batch)
    assert any("scaled_dot_product" in operator for operator in profile.by_operator())
    return profile


def importances(profile: gtflops.Profile) -> dict[str, NDArray[np.float64]]:
    """Skewed, as measured ones are; by size, so that no tensor is denser by far; and whole numbers full of ties."""
    rng = np.random.default_rng(len(profile.names))
    sizes = np.array([tensor.numel for tensor in profile.tensors], dtype=np.float64)
    return {
        "gamma": rng.gamma(0.5, 1.0, len(sizes)),
        "by size": sizes * rng.lognormal(0.0, 0.5, len(sizes)),
        "ties": rng.integers(-1, 4, len(sizes)).astype(np.float64),
    }


@pytest.mark.parametrize("model", MODELS)
def test_the_optimum_is_the_one_that_highs_proves(model: str, tmp_path: Path) -> None:
    profile = profile_of(tmp_path, *MODELS[model])
    segments = profile._segments
    rows, costs = (segments.dependencies, segments.gradient_of), segments.costs.sum(axis=0)
    solver = GraphKnapsack(*rows, costs)
    floor = profile.step_flops("none").total
    for budget in BUDGETS:
        limit = int(budget * profile.full_flops)
        for kind, importance in importances(profile).items():
            case = f"budget {budget}, importance {kind}"
            answer = highs_graph(*rows, costs, importance, limit - floor, SECONDS)
            assert answer.optimal, case
            assert answer.mask is not None, case
            # Its tolerances let HiGHS exceed the capacity, never miss what fits: a selection of its that fits is best.
            assert profile.step_flops(answer.mask).total <= limit, case
            result = solver.solve(importance, limit - floor)
            assert result.optimal, case
            assert profile.step_flops(result.mask).total == floor + result.cost <= limit, case
            # HiGHS stops at a gap of 1e-12 of all importance (of which the optimum is more than a thousandth).
            assert result.value > 1e-3 * importance[importance > 0].sum(), case
            assert result.value == pytest.approx(importance[answer.mask].sum(), rel=1e-9), case
            chain = knapsack(profile.t_dw, profile.t_dy, importance, limit - floor)
            assert chain.value <= result.value * (1 + 1e-13), case  # sums of equals may differ in their rounding

"""Seconds of a step as gtflops.measure_time predicts them, against steps of the real model."""

import time
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
import torch

import gtflops
from bench_main_job import smollm2

ROUNDS = 3

SELECTIONS: dict[str, Callable[[list[str]], Collection[str]]] = {
    "all": lambda names: names,
    "the top 6 of 30 layers": lambda names: [
        name for name in names if name.startswith(tuple(f"model.layers.{layer}." for layer in range(24, 30)))
    ],
    "a random half of the matrices": lambda names: (
        np.random.default_rng(0)
        .permutation(matrices := [name for name in names if "norm" not in name])[: len(matrices) // 2]
        .tolist()
    ),
    "norms only": lambda names: [name for name in names if "norm" in name],
    "attention only": lambda names: [name for name in names if ".self_attn." in name],
}


@pytest.fixture(scope="module")
def smol() -> tuple[torch.nn.Module, dict[str, torch.Tensor], gtflops.Profile]:
    model, batch = smollm2()
    seconds(model, batch, [name for name, _ in model.named_parameters()])  # warm-up
    return model, batch, gtflops.measure_time(gtflops.profile(model, batch))


def seconds(model: Any, batch: dict[str, torch.Tensor], names: Collection[str]) -> float:
    """Of one forward and backward pass that trains the named tensors."""
    chosen = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        parameter.grad = None
    start = time.perf_counter()
    model(**batch).loss.backward()
    return time.perf_counter() - start


@pytest.mark.parametrize("selection", SELECTIONS)
def test_step_time(benchmark: Any, smol: tuple[Any, Any, gtflops.Profile], selection: str) -> None:
    """Full steps run in between, so that a busy machine slows both down alike; the best of each count."""
    benchmark.group = "forward and backward pass, SmolLM2-135M, 2 x 128"
    model, batch, timed = smol
    names = SELECTIONS[selection](list(timed.names))
    own: list[float] = []
    full: list[float] = []
    benchmark.pedantic(
        lambda: own.append(seconds(model, batch, names)),
        setup=lambda: full.append(seconds(model, batch, timed.names)),
        rounds=ROUNDS,
    )
    predicted = timed.step_seconds(names)
    benchmark.extra_info["predicted seconds"] = predicted
    benchmark.extra_info["best measured seconds"] = min(own)
    benchmark.extra_info["predicted / measured"] = predicted / min(own)
    benchmark.extra_info["predicted share of a full step"] = predicted / timed.step_seconds("all")
    benchmark.extra_info["measured share"] = min(own) / min(full)
    benchmark.extra_info["share of FLOPs"] = timed.step_flops(names).total / timed.full_flops


def test_measure_time(benchmark: Any, smol: tuple[Any, Any, gtflops.Profile]) -> None:
    benchmark.group = "times of all operators, SmolLM2-135M, 2 x 128"
    benchmark.pedantic(lambda: gtflops.measure_time(smol[2]), rounds=3)

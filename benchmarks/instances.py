"""Instances of the selection problem: real backward graphs at full size, and families that are hard for knapsacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

import gtflops
from gtflops.capture.architectures import presets
from gtflops.solver import GraphKnapsack
from measure_importances import MEASURED

OPT, SMOLLM2 = "facebook/opt-2.7b", "HuggingFaceTB/SmolLM2-135M"

#: Name, and how many times its layers.
MODELS = {
    "OPT-2.7B": (OPT, 1),
    "SmolLM2-135M": (SMOLLM2, 1),
    "FLAN-T5-XL": ("google/flan-t5-xl", 1),
    "Llama-2-70B": ("meta-llama/Llama-2-70b", 1),
    "OPT-2.7B, 4x layers": (OPT, 4),
    "OPT-2.7B, 16x layers": (OPT, 16),
}
BUDGETS = (0.36, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True, eq=False)
class Structure:
    """A real backward graph."""

    profile: gtflops.Profile
    dependencies: tuple[tuple[int, ...], ...]
    tensor_segments: tuple[tuple[int, ...], ...]
    costs: NDArray[np.int64]

    @cached_property
    def floor(self) -> int:
        return self.profile.step_flops("none").total

    @cached_property
    def solver(self) -> GraphKnapsack:
        return GraphKnapsack(self.dependencies, self.tensor_segments, self.costs)


@dataclass(frozen=True, eq=False)
class Problem:
    """Costs in both forms; ``capacity`` is what a step may cost beyond what runs whatever is trained."""

    dw: NDArray[np.int64]
    dy: NDArray[np.int64]
    importance: NDArray[np.float64]
    capacity: int
    graph: Structure | None = None
    """None for families that are chains and nothing else."""


@cache
def structure(model: str) -> Structure:
    """One step of 4 x 512 tokens, attention eager."""
    name, times = MODELS[model]
    settings = presets()[name]
    with TemporaryDirectory() as folder:
        deeper = {"num_hidden_layers": times * settings["num_hidden_layers"]} if times > 1 else {}
        (Path(folder) / "config.json").write_text(json.dumps(settings | deeper), encoding="utf-8")
        profile = gtflops.profile(folder, batch_size=4, seq_len=512)
    segments = profile._segments
    return Structure(profile, segments.dependencies, segments.gradient_of, segments.costs.sum(axis=0))


# --- importances ----------------------------------------------------------------------------------------------------


def _by_size(profile: gtflops.Profile, rng: Generator) -> NDArray[np.float64]:
    """Proportional to the square root of the number of elements, times noise."""
    sizes = np.array([tensor.numel for tensor in profile.tensors], dtype=np.float64)
    return np.sqrt(sizes) * rng.lognormal(0.0, 0.5, len(sizes))


def _measured(profile: gtflops.Profile, rng: Generator) -> NDArray[np.float64]:
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    return np.array([measured[name] for name in profile.names])


IMPORTANCES: dict[str, Callable[[gtflops.Profile, Generator], NDArray[np.float64]]] = {
    "gamma": lambda profile, rng: rng.gamma(0.5, 1.0, len(profile.names)),
    "lognormal": lambda profile, rng: rng.lognormal(0.0, 1.5, len(profile.names)),
    "by size": _by_size,
    "measured": _measured,
}


def importances_of(model: str) -> list[str]:
    return [kind for kind in IMPORTANCES if kind != "measured" or model == "SmolLM2-135M"]


def real(model: str, importance: str, budget: float) -> Problem:
    graph = structure(model)
    profile = graph.profile
    return Problem(
        profile.t_dw,
        profile.t_dy,
        IMPORTANCES[importance](profile, np.random.default_rng(1)),
        int(budget * profile.full_flops) - graph.floor,
        graph,
    )


# --- hard families (D. Pisinger, "Where are the hard knapsack problems?", Computers & OR 32(9), 2005) ---------------

Items = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Weight-gradient costs, and importances."""


def _strongly_correlated(base: NDArray[np.int64], largest: int) -> Items:
    return base, base + largest / 10


def _inverse_strongly_correlated(base: NDArray[np.int64], largest: int) -> Items:
    return base + largest // 10, base.astype(np.float64)


def _subset_sum(base: NDArray[np.int64], largest: int) -> Items:
    return base, base.astype(np.float64)


def _equal_densities(base: NDArray[np.int64], largest: int) -> Items:
    """Six distinct costs, as transformers have them, and importance in proportion: all ties."""
    costs = base[np.arange(len(base)) % 6]
    return costs, costs / largest


FAMILIES: dict[str, Callable[[NDArray[np.int64], int], Items]] = {
    "strongly correlated": _strongly_correlated,
    "inverse strongly correlated": _inverse_strongly_correlated,
    "subset-sum": _subset_sum,
    "equal densities": _equal_densities,
}
#: Tensors and largest cost; 10,000 tensors at larger costs would take minutes in all.
HARD_SIZES = [*((size, largest) for size in (100, 1_000) for largest in (10**3, 10**6, 10**12)), (10_000, 10**3)]


def hard(family: str, tensors: int, largest: int, with_dy: bool) -> Problem:
    """Costs up to ``largest``; half of all of it as capacity; activation gradients of up to a tenth, or none."""
    rng = np.random.default_rng(1)
    dw, importance = FAMILIES[family](rng.integers(1, largest, size=tensors, endpoint=True), largest)
    dy = rng.integers(0, largest // 10 if with_dy else 0, size=tensors, endpoint=True)
    return Problem(dw, dy, importance, int(dw.sum() + dy.sum()) // 2)

"""What is to be run for the quality at equal total FLOPs, and in which order; results lie in a file a run."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results") / "quality"

#: The main one, and one of another kind in fewer cells.
ACLSUM, REVIEWS = DATA_SETS = ("aclsum", "drug-reviews")

#: Shares of :data:`EPOCHS` epochs of full fine-tuning.
TOTALS = (0.25, 0.5, 0.75, 1.0)
EPOCHS = 3
SEEDS = (1, 2, 3)

#: Learning rates are chosen from one grid for all schemes, by validation loss alone, on ACLSum, at each total and with
#: a seed that no table has. Where the search begins is a guess, or what was chosen at the total before: it ends at a
#: rate that is better than both beside it.
GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST_RATE = {"lora": 1e-3, "prefix": 1e-2, "reuse": 3e-4}
TUNING_SEED = 0

CORE = ("full", "lora", "top15", "gt@0.7", "auto", "reuse")
SCHEMES = (*CORE, "gt@0.5", "gt@0.9", "top5", "lisa", "prefix")
#: Other ways to choose tensors at the budget of gt@0.7, to measure importance and to select, at the rate of that.
ABLATIONS = ("exact@0.7", "random@0.7", "largest@0.7", "published@0.7", "two-pass@0.7", "once@0.7", "often@0.7")
#: Budgets of five epochs that are below the forward pass, by what they come to as a total.
BELOW_FORWARD = {5 * budget / EPOCHS: budget for budget in (0.3, 0.2)}


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: ``total`` is a share of three full epochs."""

    data: str
    scheme: str
    total: float
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """
        >>> Cell("aclsum", "gt@0.7", 0.25, 1e-4, 1).name
        'gt@0.7 total 0.25 rate 1e-04 seed 1'
        """
        return f"{self.scheme} total {self.total:g} rate {self.rate:.0e} seed {self.seed}"

    @property
    def path(self) -> Path:
        return RESULTS / self.data / f"{self.name.replace(' ', '-')}.json"

    @property
    def tunes(self) -> bool:
        """Whether it is for the choice of a rate: measured on validation examples alone."""
        return self.seed == TUNING_SEED

    @property
    def epochs(self) -> int:
        """What reuse and auto are told; others pass over the data until their total is spent."""
        return EPOCHS if self.total <= min(TOTALS) else 5


Read = Callable[[Cell], Mapping[str, Any] | None]


def result_of(cell: Cell) -> Mapping[str, Any] | None:
    """What a run left, if it was made."""
    if not cell.path.exists():
        return None
    result: dict[str, Any] = json.loads(cell.path.read_text(encoding="utf-8"))
    return result


def validation_loss(result: Mapping[str, Any]) -> float:
    """Of a target token; infinite where the run failed, as at a rate at which the loss is not finite."""
    if result.get("failed"):
        return math.inf
    losses = result["validation"]["losses"]
    return math.fsum(losses) / sum(result["validation"]["tokens"])


def rate_for(scheme: str, total: float, read: Read = result_of) -> tuple[float | None, Cell | None]:
    """The rate that was chosen for a scheme at a total, or else the run that is needed next to choose it.

    Between totals, the rate of the one below counts.
    """
    scheme = _tuned_as(scheme)
    first: float | None = FIRST_RATE.get(scheme, 1e-4)
    needed = None
    for tuned_at in [TOTALS[0], *(one for one in TOTALS[1:] if one <= total)]:
        if first is not None:
            first, needed = _search(scheme, tuned_at, first, read)
    return first, needed


def _search(scheme: str, total: float, first: float, read: Read) -> tuple[float | None, Cell | None]:
    def cell(rate: float) -> Cell:
        return Cell(ACLSUM, scheme, total, rate, TUNING_SEED)

    losses: dict[float, float] = {}
    wanted = [first]
    while wanted:
        for rate in wanted:
            if (result := read(cell(rate))) is None:
                return None, cell(rate)
            losses[rate] = validation_loss(result)
        best = GRID.index(min(losses, key=lambda rate: (losses[rate], rate)))  # lower where all runs failed
        wanted = [rate for rate in GRID[max(0, best - 1) : best + 2] if rate not in losses]
    return GRID[best], None


def _tuned_as(scheme: str) -> str:
    """Ways to choose within a budget are compared at one rate."""
    name, at, budget = scheme.partition("@")
    return f"gt@{budget}" if at and name != "gt" else scheme


def plan(read: Read = result_of) -> Iterator[Cell]:
    """Runs in the order of what they tell: what is chosen first, then few schemes at small totals, then the rest.

    A run whose rate is not chosen yet stands back for one that helps to choose it, so that what is left changes as
    results come in.
    """
    stages: Sequence[tuple[str, Sequence[str], Sequence[float], Sequence[int]]] = (
        (ACLSUM, CORE, (0.25,), (1,)),
        (ACLSUM, ("untrained",), (0.0,), (1,)),
        (REVIEWS, ("untrained",), (0.0,), (1,)),
        (REVIEWS, CORE, (0.25,), (1,)),
        (ACLSUM, CORE, (0.5,), (1,)),
        (ACLSUM, ("reuse",), tuple(BELOW_FORWARD), (1,)),
        (ACLSUM, CORE, (0.25,), SEEDS),
        (ACLSUM, ABLATIONS, (0.25,), (1,)),
        (REVIEWS, CORE, (0.25,), SEEDS),
        (ACLSUM, SCHEMES, (0.25, 0.5), (1,)),
        (ACLSUM, CORE, (0.5, 1.0), SEEDS),
        (ACLSUM, ABLATIONS, (0.25,), SEEDS),
        (ACLSUM, SCHEMES, TOTALS, SEEDS),
    )
    for data, schemes, totals, seeds in stages:
        for seed in seeds:
            for total in totals:
                for scheme in schemes:
                    rate, needed = (0.0, None) if scheme == "untrained" else rate_for(scheme, total, read)
                    if needed is not None:
                        yield needed
                    elif rate is not None:
                        yield Cell(data, scheme, total, rate, seed)

"""Tables and a figure of the quality at equal total FLOPs, from the raw results of quality.py."""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from experiments import drug_reviews
from experiments.cells import (
    ABLATIONS,
    ACLSUM,
    BELOW_FORWARD,
    CORE,
    GRID,
    RESULTS,
    REVIEWS,
    SCHEMES,
    TOTALS,
    TUNING_SEED,
    Cell,
    rate_for,
    validation_loss,
)
from experiments.provenance import described
from gtflops.recipes.datasets import load
from gtflops.recipes.metrics import rouge
from markdown_table import marked, table

#: Test examples that stand together are resampled together: the three aspects of a paper, a review by itself.
TOGETHER = {ACLSUM: 3, REVIEWS: 1}
RESAMPLES = 2000
LABELS = {
    "untrained": "without training",
    "full": "full, fewer steps",
    "lora": "LoRA",
    "prefix": "prefix tuning",
    "lisa": "LISA",
    "top5": "top 5 of 30 layers",
    "top15": "top 15 of 30 layers",
    "gt@0.5": "selection at 0.5",
    "gt@0.7": "selection at 0.7",
    "gt@0.9": "selection at 0.9",
    "reuse": "selection with reuse",
    "auto": "auto, reuse among what it may choose",
    "random@0.7": "random importances at 0.7",
    "largest@0.7": "largest importance first, at 0.7",
    "exact@0.7": "exact selection at 0.7, by the same rules",
    "published@0.7": "published recursion at 0.7, idealised",
    "two-pass@0.7": "two-pass importance at 0.7, of the real next step",
    "once@0.7": "selection at 0.7, once",
    "often@0.7": "selection at 0.7, every 25 steps",
}


@dataclass(frozen=True)
class Interval:
    """A mean with the 95 % interval of a bootstrap over test papers, or reviews."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Runs:
    """Of one scheme at one total: a result for each seed."""

    scheme: str
    total: float
    results: Sequence[Mapping[str, Any]]
    failed: int = 0
    """Runs that ended without a result: of a loss that was not finite, or a budget that nothing fits."""

    @property
    def number(self) -> str:
        return f"n={len(self.results)}" + (f", {self.failed} failed" if self.failed else "")

    def of_seeds(self, seeds: Collection[int]) -> "Runs":
        return replace(self, results=[result for result in self.results if result["cell"]["seed"] in seeds])

    @property
    def seeds(self) -> set[int]:
        return {result["cell"]["seed"] for result in self.results}

    @cached_property
    def losses(self) -> np.ndarray:
        """Sum over target tokens and their number, by paper; the mean over seeds."""
        return np.mean(
            [[self._by_paper(one["test"][of]) for of in ("losses", "tokens")] for one in self.results], axis=0
        )

    @property
    def loss(self) -> Interval:
        """Mean loss of a target token on the test examples."""
        return _interval(_per_token, *self.losses)

    def above(self, other: "Runs") -> Interval:
        """By how much the loss is above another's, on the same papers and by the seeds that both have."""
        both = self.seeds & other.seeds
        mine, others = self.of_seeds(both), other.of_seeds(both)
        return _interval(_per_token, mine.losses[0] - others.losses[0], mine.losses[1])

    @property
    def seeds_apart(self) -> float:
        """From the least to the greatest loss of a seed."""
        losses = [math.fsum(one["test"]["losses"]) / sum(one["test"]["tokens"]) for one in self.results]
        return max(losses) - min(losses)

    def rouge(self, name: str) -> Interval:
        """In percent, the mean over seeds."""
        each = [self._by_paper(_scores(tuple(one["test"]["texts"]))[name]) / self._together for one in self.results]
        return _interval(np.mean, np.mean(each, axis=0))

    @property
    def accuracy(self) -> Interval:
        """In percent of test examples whose likeliest choice is the right one, the mean over seeds."""
        targets = _targets(REVIEWS)
        each = [
            [100.0 * (chosen == target) for chosen, target in zip(one["test"]["chosen"], targets, strict=True)]
            for one in self.results
        ]
        return _interval(np.mean, np.mean(each, axis=0))

    @property
    def validation(self) -> float:
        """Mean loss of a target token on the validation examples, the mean over seeds that measured it."""
        return float(np.mean([validation_loss(one) for one in self.results if "validation" in one] or math.nan))

    @property
    def captured(self) -> float | None:
        """Share of the importance that is trained, the mean over selections; ``None`` where none was measured."""
        if self.scheme == "full":
            return 1.0
        each = [
            [one["captured"]] if "captured" in one else [made["captured"] for made in one["selections"]]
            for one in self.results
        ]
        known = [[share for share in shares if share is not None] for shares in each]
        return float(np.mean([np.mean(shares) for shares in known])) if all(known) else None

    def mean(self, field: str) -> float:
        return float(np.mean([result[field] for result in self.results]))

    @property
    def spent(self) -> float:
        """Steps executed and measuring planned, as a share of the total."""
        return (self.mean("executed") + self.mean("measuring")) / self.mean("until")

    @property
    def _together(self) -> int:
        return TOGETHER[self.results[0]["cell"]["data"]]

    def _by_paper(self, values: Sequence[float]) -> np.ndarray:
        return np.asarray(values, dtype=float).reshape(-1, self._together).sum(axis=1)


def _per_token(losses: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
    return losses.sum(axis=axis) / tokens.sum(axis=axis)


def _interval(statistic: Any, *samples: np.ndarray) -> Interval:
    found = bootstrap(samples, statistic, n_resamples=RESAMPLES, paired=True, method="percentile", rng=0)
    low, high = found.confidence_interval
    return Interval(float(statistic(*samples)), float(low), float(high))


@cache
def _targets(data: str) -> tuple[str, ...]:
    test = (drug_reviews.load() if data == REVIEWS else load(data)).test
    return tuple(example.target for example in test)


@cache
def _scores(texts: tuple[str, ...]) -> dict[str, list[float]]:
    """ROUGE of each of the first test examples, by name."""
    each = [rouge([text], [reference]) for text, reference in zip(texts, _targets(ACLSUM), strict=False)]
    return {name: [scores[name] for scores in each] for name in each[0]}


def read(folder: Path = RESULTS) -> list[Mapping[str, Any]]:
    """All raw results."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/*.json"))]


def runs_of(
    results: Iterable[Mapping[str, Any]], data: str = ACLSUM, tuned_at: float | None = None
) -> dict[tuple[str, float], Runs]:
    """What tables of a data set are made of, by scheme and total: runs at the rate that was chosen at their total, or
    at another one."""
    by_cell = {Cell(**result["cell"]): result for result in results}
    found: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for cell, result in by_cell.items():
        if cell.data != data or cell.seed == TUNING_SEED:
            continue
        tuned = cell.total if tuned_at is None else tuned_at
        if cell.scheme == "untrained" or rate_for(cell.scheme, tuned, by_cell.get)[0] == cell.rate:
            found.setdefault((cell.scheme, cell.total), []).append(result)
    runs = {}
    for key, each in found.items():
        finished = [result for result in each if not result.get("failed")]
        runs[key] = Runs(*key, finished, len(each) - len(finished))
    return runs


def rates(results: Sequence[Mapping[str, Any]]) -> str:
    """Validation loss by rate, the chosen one in bold."""
    by_cell = {Cell(**result["cell"]): result for result in results}
    rows = []
    for scheme in SCHEMES:
        for total in TOTALS:
            tuning = {
                cell.rate: one
                for cell, one in by_cell.items()
                if (cell.scheme, cell.total, cell.seed) == (scheme, total, TUNING_SEED)
            }
            if not tuning:
                continue
            chosen, _ = rate_for(scheme, total, by_cell.get)
            cells = []
            for rate in GRID:
                text = "" if rate not in tuning else f"{validation_loss(tuning[rate]):.3f}"
                cells.append(f"**{text}**" if rate == chosen else text)
            rows.append([LABELS[scheme], f"{total:g}", *cells])
    return table("scheme | total | " + " | ".join(f"{rate:.0e}" for rate in GRID), rows)


def losses(runs: Mapping[tuple[str, float], Runs], schemes: Sequence[str]) -> str:
    """Test loss by scheme and total."""
    rows = []
    for scheme in schemes:
        of_scheme = {total: runs[scheme, total] for total in TOTALS if (scheme, total) in runs}
        if of_scheme:
            rows.append([LABELS[scheme], *(_loss_of(of_scheme.get(total)) for total in TOTALS)])
    return table("scheme | " + " | ".join(f"total {total:g}" for total in TOTALS), rows)


def _loss_of(runs: Runs | None) -> str:
    if runs is None or not runs.results:
        return "" if runs is None else runs.number
    return f"{runs.loss}, {runs.number}"


def against_full(runs: Mapping[tuple[str, float], Runs]) -> str:
    """Test loss above that of full fine-tuning for the same FLOPs, on the same papers."""
    rows = []
    for scheme in SCHEMES[1:]:
        cells = [
            str(one.above(full))
            if (one := runs.get((scheme, total))) and (full := runs.get(("full", total))) and one.seeds & full.seeds
            else ""
            for total in TOTALS
        ]
        if any(cells):
            rows.append([LABELS[scheme], *cells])
    return table("scheme | " + " | ".join(f"total {total:g}" for total in TOTALS), rows)


def details(runs: Mapping[tuple[str, float], Runs]) -> str:
    """What each took, and how good its texts are."""
    rows = []
    for total in TOTALS:
        for scheme in (*SCHEMES, *ABLATIONS):
            if (one := runs.get((scheme, total))) is None or not one.results:
                continue
            energies = [result["energy"] for result in one.results if result["energy"].get("tracking") == "process"]
            rows.append(
                [
                    f"{total:g}",
                    LABELS[scheme],
                    f"{one.results[0]['cell']['rate']:.0e}",
                    f"{one.mean('steps'):.0f}",
                    f"{one.spent:.4f}",
                    f"{one.mean('measuring') / one.mean('until'):.4f}",
                    *(str(one.rouge(name)) for name in ("rouge1", "rouge2", "rougeL")),
                    f"{one.seeds_apart:.3f}" if len(one.results) > 1 else "",
                    f"{one.mean('train_seconds'):.0f}",
                    *_energy(energies),
                ]
            )
    return table(
        "total | scheme | rate | steps | of the total: steps executed, measuring planned | of it measuring | ROUGE-1 | "
        "ROUGE-2 | ROUGE-L | seeds apart | s | Wh | g CO2 at France's mean",
        rows,
    )


def _energy(energies: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Wh, and g of CO2, where the process was measured by itself: others ran beside it."""
    if not energies:
        return "", ""
    return tuple(f"{1000 * np.mean([energy[name] for energy in energies]):.2f}" for name in ("kwh", "co2_kg"))


def untrained(runs: Mapping[tuple[str, float], Runs]) -> str:
    one = runs.get(("untrained", 0.0))
    if one is None:
        return ""
    scores = ", ".join(f"{label} {one.rouge(name)}" for label, name in (("ROUGE-1", "rouge1"), ("ROUGE-L", "rougeL")))
    return f"Without training: loss {one.loss}, {scores}.\n"


def figure(runs: Mapping[tuple[str, float], Runs], path: Path) -> None:
    """Test loss against total FLOPs, with intervals, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "gtflops", "svg.fonttype": "none"})  # the same file for the same runs
    drawing = Figure(figsize=(8, 5), layout="constrained")
    axes = drawing.subplots()
    for number, scheme in enumerate(SCHEMES):
        points = [(t, runs[scheme, t].loss) for t in TOTALS if (scheme, t) in runs and runs[scheme, t].results]
        if points:
            shifted = [total + 0.006 * (number - len(SCHEMES) / 2) for total, _ in points]
            bars = np.array([[loss.value - loss.low, loss.high - loss.value] for _, loss in points]).T
            axes.errorbar(
                shifted, [loss.value for _, loss in points], yerr=bars, marker="o", capsize=2, label=LABELS[scheme]
            )
    axes.set_xlim(0.15, 1.1)
    axes.set_xticks(TOTALS)
    axes.set_xlabel("total FLOPs, as a share of three full epochs")
    axes.set_ylabel("test loss of a target token")
    axes.legend(fontsize="small")
    drawing.savefig(path, metadata={"Date": None})


def epochs(runs: Mapping[tuple[str, float], Runs]) -> str:
    """What the FLOPs of five epochs at 0.3 of full steps, and at 0.2, bring."""
    rows = []
    for (scheme, total), one in runs.items():
        if total not in BELOW_FORWARD or not one.results:
            continue
        captured = one.captured
        rows.append(
            (
                (-total, one.validation),
                [
                    f"{BELOW_FORWARD[total]:g}",
                    LABELS[scheme],
                    f"{one.mean('steps'):.0f}",
                    f"{one.spent:.4f}",
                    "not measured" if captured is None else f"{100 * captured:.1f}%",
                    f"{one.validation:.3f}",
                    str(one.loss),
                    one.number,
                ],
            )
        )
    if not rows:
        return ""
    return table(
        "budget of five epochs | scheme | steps | of the total: steps executed, measuring planned | importance "
        "captured | validation loss | test loss | runs",
        [row for _, row in sorted(rows, key=lambda each: each[0])],
    )


def reviews(runs: Mapping[tuple[str, float], Runs]) -> str:
    """Loss and accuracy where ratings are to be told."""
    rows = []
    for scheme in ("untrained", *CORE):
        if (one := runs.get((scheme, 0.0 if scheme == "untrained" else min(TOTALS)))) is None or not one.results:
            continue
        full = runs.get(("full", one.total))
        above = "" if full is None or scheme == "full" or not one.seeds & full.seeds else str(one.above(full))
        steps = ["", "", ""]
        if scheme != "untrained":
            steps = [f"{one.results[0]['cell']['rate']:.0e}", f"{one.mean('steps'):.0f}", f"{one.spent:.4f}"]
        rows.append([LABELS[scheme], *steps, f"{one.loss}, {one.number}", above, str(one.accuracy)])
    return table(
        "scheme | rate | steps | of the total | test loss of a target token | above full | accuracy in percent", rows
    )


def draw(path: Path) -> None:
    """The figure of all runs on ACLSum."""
    path.parent.mkdir(exist_ok=True)
    figure(runs_of(read()), path)


def section() -> str:
    """For RESULTS.md."""
    results = read()
    if not results:
        return ""
    runs = runs_of(results)
    full, full_of_reviews = (
        next((one["epoch_flops"] for one in results if one["cell"]["data"] == data), 0) for data in (ACLSUM, REVIEWS)
    )
    latest = max((result["made"] for result in results), key=lambda made: str(made["date"]))
    commits = ", ".join(sorted({result["made"]["commit"] for result in results}))
    setting = (
        f"{described({**latest, 'commit': commits})} SmolLM2-135M-Instruct on ACLSum: batches of 4 by length without "
        "padding, the head at target positions alone, matrix products in bfloat16, AdamW, the rate falling to 0 where "
        "the total is spent. Totals are shares of three full epochs; one is "
        f"{full:,} FLOPs. Reuse has its share of each step in three epochs at total {min(TOTALS):g}, in five "
        "at larger ones, and auto is told as many; the others pass over the data until the total is spent. A run ends "
        "before the step that its total does not pay for. Intervals (95 %) are of a bootstrap over the 100 test "
        f"papers, {RESAMPLES:,} resamples, of the mean over n seeds: how runs differ by their seed is not in them. "
        "Texts are greedy, for 50 papers. "
        f"{len(results)} runs are there.\n\n"
    )
    loss = (
        f"{untrained(runs)}\nTest loss of a target token:\n\n{losses(runs, (*SCHEMES, *ABLATIONS))}\n"
        "Test loss above that of full fine-tuning for the same FLOPs, by seeds that both have:\n\n"
        f"{against_full(runs)}\n"
        "Learning rates were chosen at each total by the validation loss of one run each, with a seed of their own; a "
        f"total has no results before that:\n\n{rates(results)}\n"
    )
    text = "## Quality at equal total FLOPs\n\n" + marked("quality", setting + loss)
    text += f"\nWhat the runs took, on a machine that did other things besides:\n\n{details(runs)}"
    if rows := epochs(runs):
        text += "\n### The FLOPs of five epochs below the forward pass\n\n" + marked("quality-epochs", rows)
    if rows := epochs(runs_of(results, tuned_at=min(TOTALS))):
        text += f"\n### The same at the rates of total {min(TOTALS):g}\n\n" + marked("quality-rates", rows)
    if of_reviews := runs_of(results, REVIEWS):
        text += (
            "\n### Ratings of reviews\n\nUCI's drug reviews, of which a package carries a part: 500 to train on, 240 "
            "to test with; negative, neutral or positive is to be told, by the likeliest of the three words. Total "
            f"{min(TOTALS):g} of three epochs, of {full_of_reviews:,} FLOPs each; the rates are those of ACLSum.\n\n"
            + marked("quality-reviews", reviews(of_reviews))
        )
    return text

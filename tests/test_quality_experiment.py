"""The experiment on quality at equal total FLOPs: what it runs, in which order, and what its tables are made of."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import gtflops
from gtflops.recipes.datasets import DataSet, Example
from gtflops.recipes.evaluation import likeliest
from gtflops.recipes.models import Pretrained
from small_models import build
from small_tokenizer import WORDS, word_tokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
EXAMPLES = tuple(
    Example("what it costs " * (1 + index % 3), " TL;DR:", ["a model learns", "the cat sat"][index % 2])
    for index in range(16)
)
#: All of one length, so that few shapes are trained on.
TRAIN = tuple(Example(f"{word} it costs", " TL;DR:", "the cat sat") for word in WORDS.split()[:18])
DATA = DataSet("words", TRAIN, EXAMPLES[:5], EXAMPLES[5:12], 16, 4, "rouge")


@pytest.fixture(scope="module")
def experiment() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(BENCHMARKS)
        from experiments import cells, quality, quality_tables, rules

        yield SimpleNamespace(cells=cells, quality=quality, tables=quality_tables, rules=rules)


def small() -> Pretrained:
    torch.manual_seed(0)
    return Pretrained(build("llama"), word_tokenizer(), "small")


def losses_by_rate(losses: Mapping[float, float]) -> Any:
    """Results of runs that choose a rate, as if they had these losses; none of other runs."""

    def read(cell: Any) -> Mapping[str, Any] | None:
        if not cell.tunes or cell.rate not in losses:
            return None
        loss = losses[cell.rate]
        return {"failed": "x"} if math.isinf(loss) else {"validation": {"losses": [loss * 3], "tokens": [3]}}

    return read


def test_the_rate_is_better_than_both_beside_it(experiment: SimpleNamespace) -> None:
    rate_for = experiment.cells.rate_for
    losses: dict[float, float] = {}
    true = {1e-5: 3.0, 3e-5: 2.0, 1e-4: 1.5, 3e-4: 1.0, 1e-3: 2.0, 3e-3: math.inf}
    asked = []
    while True:
        rate, needed = rate_for("full", 0.25, losses_by_rate(losses))
        if needed is None:
            break
        asked.append(needed.rate)
        losses[needed.rate] = true[needed.rate]
    assert rate == 3e-4
    assert asked == [1e-4, 3e-5, 3e-4, 1e-3], "and no other runs were made"
    assert rate_for("random@0.7", 0.25, losses_by_rate(losses))[0] is not None, "at the rate of gt@0.7"


def test_the_search_ends_at_the_ends_of_the_grid(experiment: SimpleNamespace) -> None:
    grid = experiment.cells.GRID
    falling = {rate: 1 / rate for rate in grid}
    assert experiment.cells.rate_for("full", 0.25, losses_by_rate(falling)) == (grid[-1], None)
    rising = {rate: math.inf if rate > 1e-4 else rate for rate in grid}
    assert experiment.cells.rate_for("lora", 0.25, losses_by_rate(rising)) == (grid[0], None)


def test_a_rate_is_chosen_at_each_total(experiment: SimpleNamespace) -> None:
    """From the rate of the total below it: here, more steps want a lower one."""
    best = {0.25: 1e-3, 0.5: 1e-4}
    asked = []

    def read(cell: Any) -> Mapping[str, Any] | None:
        if cell.total not in best:
            return None
        asked.append((cell.total, cell.rate))
        loss = abs(math.log(cell.rate / best[cell.total]))
        return {"validation": {"losses": [loss], "tokens": [1]}}

    rate_for = experiment.cells.rate_for
    assert rate_for("full", 0.5, read) == (1e-4, None)
    assert asked[-5:] == [(0.5, 1e-3), (0.5, 3e-4), (0.5, 3e-3), (0.5, 1e-4), (0.5, 3e-5)]
    assert rate_for("full", 1 / 3, read) == (1e-3, None)
    assert rate_for("full", 0.75, read) == (None, experiment.cells.Cell("aclsum", "full", 0.75, 1e-4, 0))


def test_the_plan_has_every_cell_and_chooses_rates_first(experiment: SimpleNamespace) -> None:
    cells = experiment.cells
    bare = list(cells.plan(lambda cell: None))
    assert {cell.scheme for cell in bare if not cell.tunes} == {"untrained"}, "nothing is run at a rate not chosen"
    known = losses_by_rate({rate: abs(math.log10(rate) + 4) for rate in cells.GRID})
    planned = {(cell.scheme, cell.total, cell.seed) for cell in cells.plan(known)}
    for scheme in cells.SCHEMES:
        assert {(scheme, total, seed) for total in cells.TOTALS for seed in cells.SEEDS} <= planned
    assert {scheme for scheme, _, _ in planned} == {*cells.SCHEMES, *cells.ABLATIONS, "untrained"}
    assert {("reuse", total, 1) for total in cells.BELOW_FORWARD} <= planned


@pytest.mark.parametrize(
    "scheme",
    [
        "full",
        "lora",
        "published@0.7",
        "reuse",
        "top1",
        *(
            pytest.param(scheme, marks=pytest.mark.slow)
            for scheme in (
                "prefix",
                "lisa",
                "gt@0.7",
                "random@0.7",
                "largest@0.7",
                "two-pass@0.7",
                "once@0.7",
                "often@0.7",
                "auto",
            )
        ),
    ],
)
def test_a_run_spends_its_total_and_no_more(
    scheme: str, experiment: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment.quality, "NUM_TEXTS", 3)
    made = small()
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    of_epoch = experiment.quality.epoch_flops(made.model, made.tokenizer, DATA)
    total = 1.0 if scheme in ("auto", "reuse") else 0.5
    cell = experiment.cells.Cell("words", scheme, total, 1e-3, 1)
    result = json.loads(json.dumps(experiment.quality.run(cell, made, DATA, of_epoch)))

    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())
    assert result["planned"] == result["executed"]
    spent = result["planned"] + result["measuring"]
    dearest = 2 * of_epoch / 4  # a step of the longest examples, and a measurement
    assert result["until"] == int(total * 3 * of_epoch)
    assert result["until"] - dearest <= spent <= result["until"]
    assert len(result["test"]["losses"]) == len(result["test"]["tokens"]) == 7
    assert len(result["test"]["texts"]) == 3
    assert len(result["validation"]["losses"]) == 5
    if scheme == "top1":
        assert 0 < result["captured"] < 1
    assert bool(result["selections"][0]["held"]) <= (scheme in ("auto", "reuse"))


def test_losses_are_those_of_each_example_alone(experiment: SimpleNamespace) -> None:
    made = small()
    found = experiment.quality.losses(made.model, made.tokenizer, DATA.test, DATA)
    for example, loss, count in zip(DATA.test, found["losses"], found["tokens"], strict=True):
        alone = experiment.quality.losses(made.model, made.tokenizer, [example], DATA)
        assert alone["tokens"] == [count]
        assert alone["losses"][0] == pytest.approx(loss, rel=1e-4)
    whole = experiment.quality.in_order(DATA.test, made.tokenizer, batch_size=7, seq_len=DATA.seq_len)[0]
    with torch.no_grad():
        mean = float(made.model(**whole).loss)
    assert math.fsum(found["losses"]) / sum(found["tokens"]) == pytest.approx(mean, rel=1e-4)


def test_what_rules_choose(experiment: SimpleNamespace) -> None:
    """Within the budget, but for the published rounding; and never more importance than the exact selection."""
    made = small()
    batch = experiment.quality.in_order(DATA.train, made.tokenizer, batch_size=4, seq_len=16)[0]
    profile = gtflops.profile(made.model, batch)
    drawn = np.random.default_rng(7).exponential(size=len(profile.names))
    importance = dict(zip(profile.names, drawn.tolist(), strict=True))
    limit = int(0.7 * profile.full_flops)
    best = gtflops.select(profile, importance, budget_flops=limit)
    values = {}
    for name, rule in experiment.rules.RULES.items():
        chosen = rule(profile, importance, limit, np.random.default_rng(1))
        values[name] = math.fsum(importance[one] for one in chosen)
        assert chosen
        if name != "published":
            assert profile.step_flops(chosen).total <= limit
            assert values[name] <= best.value * (1 + 1e-12)
    at_random = [experiment.rules.at_random(profile, importance, limit, np.random.default_rng(seed)) for seed in (1, 2)]
    assert set(at_random[0]) != set(at_random[1])
    assert values["exact"] == best.value > values["random"]


def result_of(cell: Any, losses: list[float], texts: list[str]) -> dict[str, Any]:
    """A raw result of a run, of papers with as many losses."""
    made = {"command": "x", "date": "2026-01-01", "commit": "c", "seeds": {}, "versions": {}, "python": "3"}
    return {
        "cell": asdict(cell),
        "epoch_flops": 100,
        "until": 75,
        "steps": 5,
        "planned": 60,
        "executed": 60,
        "measuring": 12,
        "train_seconds": 2.0,
        "energy": {"kwh": 0.001, "co2_kg": 0.0005},
        "test": {"losses": losses, "tokens": [2] * len(losses), "texts": texts},
        "made": {**made, "machine": {"system": "Linux", "cpu": "cpu", "cores": 2}},
    }


def test_tables_are_of_the_runs(experiment: SimpleNamespace, tmp_path: Path) -> None:
    cells, tables = experiment.cells, experiment.tables
    full = cells.Cell("aclsum", "full", 0.25, 1e-4, 1)
    tuning = [
        {"cell": asdict(cells.Cell("aclsum", "full", 0.25, rate, 0)), "validation": {"losses": [loss], "tokens": [1]}}
        for rate, loss in ((3e-5, 2.5), (1e-4, 2.0), (3e-4, 2.25))
    ]
    other = replace(full, seed=2)
    results = [
        *tuning,
        result_of(full, [2.0, 4.0, 6.0] * 2, ["a", "b", "c"] * 2),
        result_of(other, [4.0, 4.0, 4.0] * 2, ["a", "b", "c"] * 2),
        {"cell": asdict(replace(full, seed=3)), "failed": "the loss is nan"},
        result_of(replace(full, rate=3e-4, seed=3), [99.0] * 6, ["a", "b", "c"] * 2),
    ]
    runs = tables.runs_of(results)
    assert set(runs) == {("full", 0.25)}
    of_full = runs["full", 0.25]
    assert [one["cell"]["seed"] for one in of_full.results] == [1, 2], "the rate that was not chosen is left out"
    assert str(of_full.loss) == "2.000 (2.000 to 2.000)", "12 of 6 tokens, in both papers and by both seeds"
    assert of_full.seeds_apart == 0
    assert str(of_full.above(of_full)) == "0.000 (0.000 to 0.000)"
    assert "| full, fewer steps | 0.25 |  | 2.500 | **2.000** | 2.250 |" in tables.rates(results)
    assert "| full, fewer steps | 2.000 (2.000 to 2.000), n=2, 1 failed |" in tables.losses(runs, cells.SCHEMES)
    assert "| 0.25 | full, fewer steps | 1e-04 | 5 | 0.9600 | 0.1600 |" in tables.details(runs)
    tables.figure(runs, tmp_path / "figure.svg")
    assert "full, fewer steps" in (tmp_path / "figure.svg").read_text(encoding="utf-8")


def test_tables_of_five_epochs_and_of_reviews(experiment: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, tables = experiment.cells, experiment.tables
    known = losses_by_rate({rate: abs(math.log10(rate) + 4) for rate in cells.GRID})
    results = [
        {"cell": asdict(cells.Cell("aclsum", scheme, total, rate, 0)), "validation": {"losses": [loss], "tokens": [1]}}
        for scheme in ("full", "reuse", "top15")
        for total in (0.25, 0.5)
        for rate, loss in ((3e-5, 2.5), (1e-4, 2.0), (3e-4, 2.25), (1e-3, 3.0))
    ]
    validation = {"validation": {"losses": [5.0, 3.0], "tokens": [2, 2]}}
    selected = {"selections": [{"captured": 0.5}, {"captured": 0.25}]}
    for scheme, more in (("full", {}), ("reuse", selected), ("top15", {"captured": 0.125})):
        cell = cells.Cell("aclsum", scheme, 0.5, 1e-4, 1)
        results.append(result_of(cell, [2.0, 4.0, 6.0] * 2, []) | validation | more)
    table = tables.epochs(tables.runs_of(results))
    assert "| 0.3 | full, fewer steps | 5 | 0.9600 | 100.0% | 2.000 | 2.000 (2.000 to 2.000) | n=1 |" in table
    assert "| 0.3 | selection with reuse | 5 | 0.9600 | 37.5% |" in table
    assert "| 0.3 | top 15 of 30 layers | 5 | 0.9600 | 12.5% |" in table

    alone = [one for one in results if one["cell"]["total"] == 0.25 or one["cell"]["seed"] == 1]
    assert tables.runs_of(alone) == {}, "no rate was chosen at that total"
    assert tables.epochs(tables.runs_of(alone, tuned_at=0.25)) == table

    monkeypatch.setattr(tables, "_targets", lambda data: (" positive", " negative"))
    of_review = result_of(cells.Cell("drug-reviews", "full", 0.25, 1e-4, 1), [1.0, 3.0], [])
    of_review["test"]["chosen"] = [" positive", " neutral"]
    runs = tables.runs_of([*results, of_review], "drug-reviews")
    assert "| full, fewer steps | 1e-04 | 5 | 0.9600 | 1.000 (0.500 to 1.500), n=1 |  | 50.000" in tables.reviews(runs)
    assert {cell.data for cell in cells.plan(known)} == set(cells.DATA_SETS)


def test_choices_are_made_by_their_losses(experiment: SimpleNamespace) -> None:
    made = small()
    choices = ("the cat", "a model learns", "it")
    examples = [replace(one, target=choices[index % 3], choices=choices) for index, one in enumerate(DATA.test)]
    found = experiment.quality.of_choices(made.model, made.tokenizer, examples, DATA)
    sizes = {"seq_len": DATA.seq_len, "target_len": DATA.target_len, "batch_size": 4}
    assert found["chosen"] == likeliest(made.model, made.tokenizer, examples, **sizes)
    alone = experiment.quality.losses(made.model, made.tokenizer, examples, DATA)
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert found["tokens"] == alone["tokens"]


def test_one_process_has_a_cell_at_a_time(
    experiment: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment.cells, "RESULTS", tmp_path)
    cell = experiment.cells.Cell("words", "full", 0.5, 1e-3, 1)
    with experiment.quality.claimed(cell) as first, experiment.quality.claimed(cell) as second:
        assert (first, second) == (True, False)
    assert list(tmp_path.rglob("*.running")) == []
    claim = cell.path.with_suffix(".running")
    claim.write_text("999999999", encoding="utf-8")  # of a process that is gone
    with experiment.quality.claimed(cell) as again:
        assert again

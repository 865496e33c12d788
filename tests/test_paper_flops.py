"""The experiment on the published runs' FLOPs: what it measures, and that the tables in the tree are of that."""

import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gtflops

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OPT_27B = {"width": 2560, "inner": 10240, "layers": 32, "vocabulary": 50272}
OPT_125M = {"width": 768, "inner": 3072, "layers": 12, "vocabulary": 50272}


def linear(tokens: int, width: int, inner: int, layers: int, vocabulary: int) -> int:
    """FLOPs of the products with weights in OPT's forward pass, head included."""
    return 2 * tokens * (layers * (4 * width * width + 2 * width * inner) + width * vocabulary)


@pytest.fixture(scope="module")
def paper_flops() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(BENCHMARKS)
        from experiments import paper_flops

        yield paper_flops


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from experiments import paper_flops_tables

    return paper_flops_tables


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    return dict(json.loads((BENCHMARKS / "experiments" / "results" / "paper_flops.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def small(paper_flops: ModuleType) -> dict[tuple[str, str | None], dict[str, Any]]:
    """Rows of OPT-125M on WebQuestions, 4 x 160 tokens, by scheme (or budget) and reuse."""
    rows = list(paper_flops.cell("facebook/opt-125m", "webquestions", 3_778))
    return {(str(row.get("budget", row["scheme"])), row["reuse"]): row for row in rows}


def test_a_full_step_in_closed_form(small: dict[tuple[str, str | None], dict[str, Any]]) -> None:
    attention = 12 * 2 * 2 * 4 * 160 * 160 * 768  # scores, and values weighted by them
    forward = linear(4 * 160, **OPT_125M) + attention
    assert small["full", None]["matmul"] == {"forward": forward, "backward": 2 * forward, "stored": 0}
    assert small["full", None]["elements"] == 125_239_296
    assert small["full", "prefix"]["blocks"] == 0


def test_lora_and_prefix_tuning_in_closed_form(small: dict[tuple[str, str | None], dict[str, Any]]) -> None:
    tokens, width, layers, rank = 4 * 160, 768, 12, 8
    product = 2 * 4 * 160 * 160 * width
    projection = 2 * tokens * width * width
    adapter = 2 * tokens * width * rank
    assert small["lora", None]["products"] == {
        "all": {
            "forward": linear(tokens, **OPT_125M) + layers * (2 * product + 4 * adapter),
            # Four products of attention in each layer, but for the gradient of the lowest keys; of the lowest layer's
            # projections to queries, keys and values no gradient of the input, nor of the adapters on two of them.
            "backward": linear(tokens, **OPT_125M)
            - 3 * projection
            + (4 * layers - 1) * product
            + (8 * layers - 2) * adapter,
        },
        "attention": {"forward": 2 * layers * product, "backward": (4 * layers - 1) * product},
        "adapters": {"forward": 4 * layers * adapter, "backward": (8 * layers - 2) * adapter},
    }
    more = layers * 2 * 2 * 4 * 160 * 20 * width  # 20 virtual tokens more to attend to
    full = small["full", None]["matmul"]["forward"]
    assert small["prefix", None]["matmul"]["forward"] == full + more
    assert small["prefix", None]["elements"] == 20 * layers * 2 * width


def test_with_reuse_the_rows_are_the_mean_of_all_epochs(
    small: dict[tuple[str, str | None], dict[str, Any]], paper_flops: ModuleType, tables: ModuleType
) -> None:
    recipe = {"epochs": paper_flops.EPOCHS, "batch_size": paper_flops.BATCH_SIZE}
    assert tables.steps(small["full", None], recipe) == Fraction(3_778 * 5, 4)
    top2, reused = (tables.of_a_run(small["top2", reuse], recipe)["matmul"] for reuse in (None, "prefix"))
    ten_blocks = 10 * (2 * 640 * (4 * 768 * 768 + 2 * 768 * 3072) + 2 * 2 * 4 * 160 * 160 * 768)
    # Ten of twelve blocks are run in the first of five epochs alone.
    assert top2 - reused == Fraction(4, 5) * tables.petamacs(ten_blocks, small["top2", None], recipe)
    full = sum(small["full", None]["all"].values())
    for budget in paper_flops.BUDGETS:
        row = small[str(budget), "prefix"]
        step = row["all"]["forward"] + row["all"]["backward"] + row["all"]["stored"] / 5
        assert 0.9 * budget * full < step <= budget * full
        assert row["optimal"]


def test_what_is_not_feasible_or_not_priced_says_so(
    small: dict[tuple[str, str | None], dict[str, Any]], raw: dict[str, Any]
) -> None:
    """OPT-125M's head is large: the way to the last norm costs more than 0.36."""
    profile = gtflops.profile("facebook/opt-125m", batch_size=4, seq_len=160)
    row = small["0.36", None]
    assert "all" not in row
    assert row["least"] == profile.alone_flops.min() > 0.36 * row["full"]
    of_t5 = [row for row in raw["rows"] if row["model"] == "FLAN-T5-XL" and row["dataset"] == "PIQA"]
    assert {(row["seq_len"], row["decoder_len"]) for row in of_t5} == {(400, 4)}
    (bitfit,) = (row for row in of_t5 if row["scheme"] == "bitfit")
    assert "has no biases" in bitfit["not_priced"]


def test_raw_results_are_of_the_arithmetic_in_method(raw: dict[str, Any], tables: ModuleType) -> None:
    row = next(
        row for row in raw["rows"] if (row["model"], row["dataset"], row["scheme"]) == ("OPT-2.7B", "SciTLDR", "full")
    )
    assert row["matmul"] == {"forward": 11_178_659_020_800, "backward": 22_357_318_041_600, "stored": 0}
    assert linear(2048, **OPT_27B) + 32 * 2 * 2 * 4 * 512 * 512 * 2560 == 11_178_659_020_800
    assert tables.steps(row, raw["recipe"]) == 2_490
    assert round(float(tables.of_a_run(row, raw["recipe"])["matmul"]), 2) == 41.75


def test_raw_results_are_whole(raw: dict[str, Any]) -> None:
    """Every model, data set and scheme, each within its budget, and where from."""
    rows = raw["rows"]
    cells = {(row["model"], row["dataset"]) for row in rows}
    assert len(cells) == 5 * 4
    assert len({(row["model"], row["dataset"], row["scheme"], row.get("budget"), row["reuse"]) for row in rows}) == len(
        rows
    )
    full = {(row["model"], row["dataset"]): sum(row["all"].values()) for row in rows if row["scheme"] == "full"}
    for row in rows:
        if "budget" in row and "least" not in row:
            step = row["all"]["forward"] + row["all"]["backward"] + row["all"]["stored"] / raw["recipe"]["epochs"]
            assert step <= row["budget"] * full[row["model"], row["dataset"]]
            assert row["optimal"]
    assert {"date", "commit", "seeds", "versions", "machine"} <= raw["provenance"].keys()


def test_published_figures_are_within_two_percent_but_for_one(raw: dict[str, Any], tables: ModuleType) -> None:
    """GT-0.6 on WebQuestions, 14.0, is a whole number of PFLOPs, cut from 14.5."""
    away = {}
    for row in raw["rows"]:
        figures = tables.PUBLISHED.get(row["dataset"], {})
        if row["model"] == tables.OF and row["reuse"] is None and (name := tables.label(row)) in figures:
            run = tables.of_a_run(row, raw["recipe"])["matmul"]
            away[row["dataset"], name] = float(run) / figures[name] - 1
    assert len(away) == sum(map(len, tables.PUBLISHED.values())) == 13
    assert {name for name, difference in away.items() if abs(difference) > 0.02} == {("WebQuestions", "GT-0.6")}


def test_the_page_is_of_the_raw_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make experiments-tables` writes it; it fails for raw results or wording that are newer than the page."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from experiments.tables import HEAD, sections

    page = (BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8")
    assert page.count(HEAD) == 1
    assert HEAD + page.partition(HEAD)[2] == sections()


def test_the_parts_that_documents_take_over_are_there() -> None:
    page = (BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8")
    taken = [
        name
        for document in (BENCHMARKS.parent / "docs").glob("*.md")
        for name in re.findall(r'^--8<-- "benchmarks/RESULTS\.md:(\w+)"$', document.read_text(encoding="utf-8"), re.M)
    ]
    assert {"published", "quality", "time"} <= set(taken)
    for name in taken:
        assert page.count(f"[start:{name}]") == page.count(f"[end:{name}]") == 1


def test_each_command_leaves_the_others_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tables: ModuleType, raw: dict[str, Any]
) -> None:
    import write_results

    page = tmp_path / "RESULTS.md"
    page.write_text("# Benchmark results\n\nmeasured\n", encoding="utf-8")
    monkeypatch.setattr(write_results, "RESULTS", page)
    monkeypatch.setattr(write_results, "FIGURE", tmp_path / "figures" / "quality.svg")
    write_results.main(None)
    first = page.read_text(encoding="utf-8")
    assert first.startswith("# Benchmark results\n\nmeasured\n\n# Experiments\n")

    few = tmp_path / "paper_flops.json"
    changed = json.loads(json.dumps(raw))
    changed["rows"] = [row for row in raw["rows"] if row["model"] == "OPT-2.7B"]
    for row in changed["rows"]:
        if (row["dataset"], row["scheme"]) == ("PIQA", "bitfit"):
            row["matmul"]["forward"] += 2 * 10**15  # 1 PMAC a step
    few.write_text(json.dumps(changed), encoding="utf-8")
    monkeypatch.setattr(tables, "RAW", few)
    write_results.main(None)
    second = page.read_text(encoding="utf-8")
    assert second.startswith("# Benchmark results\n\nmeasured\n\n# Experiments\n")
    assert "BLOOMZ" not in second
    row = next(line for line in second.splitlines() if line.startswith("| BitFit |"))
    assert row.split(", ")[-1].startswith("20318"), row


def test_nothing_measured_gives_no_section(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tables: ModuleType) -> None:
    monkeypatch.setattr(tables, "RAW", tmp_path / "none.json")
    assert tables.section() == ""

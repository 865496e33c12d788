"""Reports: the numbers are the profile's, the page loads nothing, and a name is only ever text."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from markdown_it import MarkdownIt
from rich.console import Console

import gtflops
from gtflops.compiled import CompiledStep
from gtflops.errors import InputError
from gtflops.graph import Phase
from gtflops.operators import Flops
from gtflops.profiling import Profile, UnsupportedOperator
from gtflops.report import SUFFIXES, schema, write
from gtflops.report.budgets import budget_curve
from gtflops.report.grid import Grid
from gtflops.report.markdown import escape
from gtflops.report.summary import evenly, summarise, visible
from gtflops.report.terminal import profile_tables, selection_table
from gtflops.selection import Selection, select
from gtflops.training.energy import Energy
from gtflops.training.records import TrainingLog
from gtflops.units import format_seconds
from zoo import ZOO

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "a|b *c* [d](http://example.com) _e_ __f__ a_b",
    "`f` ``g\\",
    "line\nbreak\x1b[31m\u202e",
    "[bold red]markup[/] {{ 7*7 }} %{x} $y$ &amp; <b>bold</b>",
    "n" * 10_000,
)


class Net(torch.nn.Module):
    """Operators with several outputs, an input that two layers share, and a layer that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.left = torch.nn.Linear(8, 5)
        self.right = torch.nn.Linear(8, 5, bias=False)
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.relu(self.first(x)))
        gate: torch.Tensor = torch.tanh(self.left(x))
        return gate.mul(self.right(x))


def square(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = outputs.square().mean()
    return loss


@pytest.fixture(scope="module")
def profile() -> Profile:
    return gtflops.profile(Net(), torch.ones(4, 3), loss=square)


@pytest.fixture(scope="module")
def selection(profile: Profile) -> Selection:
    return select(profile, {tensor.name: tensor.numel for tensor in profile.tensors}, budget=0.7)


@pytest.fixture(scope="module")
def log(profile: Profile) -> TrainingLog:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = [torch.randn(4, 3) for _ in range(6)]
    trainer = gtflops.GreenTrainer(model, optimizer, profile, budget=0.7, every=2, loss=square, count_executed=True)
    return trainer.fit(batches)


@pytest.fixture(scope="module")
def hostile(profile: Profile) -> Profile:
    """The profile with hostile names wherever a model could put one."""
    assert len(profile.names) >= len(HOSTILE)
    named = dict(zip(profile.names, HOSTILE, strict=False))
    nodes = tuple(
        replace(
            node,
            name=named.get(node.name, node.name) if node.phase is Phase.PARAMETER else node.name,
            module=HOSTILE[index % len(HOSTILE)],
        )
        for index, node in enumerate(profile.graph.nodes)
    )
    gradients = {named.get(name, name): node for name, node in profile.graph.gradients.items()}
    return replace(
        profile,
        graph=replace(profile.graph, model=HOSTILE[0], nodes=nodes, gradients=gradients),
        unsupported=(UnsupportedOperator(HOSTILE[1], 3, HOSTILE),),
        notes=HOSTILE,
        versions={HOSTILE[0]: HOSTILE[1]},
    )


@pytest.fixture(scope="module")
def hostile_selection(hostile: Profile) -> Selection:
    importance = {tensor.name: float(tensor.numel) for tensor in hostile.tensors}
    return select(hostile, importance, budget=1.0, allow_unsupported=True)


@pytest.fixture(scope="module")
def hostile_log(hostile_selection: Selection, log: TrainingLog) -> TrainingLog:
    records = [replace(record, selection=hostile_selection, names=hostile_selection.names) for record in log.selections]
    return TrainingLog(log.steps, records, log.measuring_flops)


# --- one computation ----------------------------------------------------------------------------------------------


def test_parts_add_up_to_the_full_step(profile: Profile) -> None:
    cost = summarise(profile).cost
    assert cost.forward.all + cost.dy.all + cost.dw.all == cost.full.all == profile.full_flops
    assert cost.full.matmul == profile.step_flops("all", ops="matmul").total
    assert cost.forward.matmul == profile.step_flops("all", ops="matmul").forward
    assert (cost.dw.all, cost.dy.all) == (profile.t_dw.sum(), profile.t_dy.sum())


@pytest.mark.parametrize("rows", ["operators", "modules"])
def test_tables_add_up_to_the_full_step(profile: Profile, rows: str) -> None:
    summary = summarise(profile)
    for part in ("forward", "dy", "dw", "full"):
        for column in ("all", "matmul"):
            total = sum(getattr(getattr(row.cost, part), column) for row in getattr(summary, rows))
            assert total == getattr(getattr(summary.cost, part), column)


def test_operators_are_counted_once_each(profile: Profile) -> None:
    counts = {row.name: row.count for row in summarise(profile).operators}
    assert counts["aten.native_layer_norm.default"] == counts["aten.native_layer_norm_backward.default"] == 1
    assert counts["aten.addmm.default"] == 2
    assert "getitem" not in counts


def test_tensors_are_the_profile_s(profile: Profile, selection: Selection) -> None:
    rows = summarise(profile, selection).tensors
    assert [row.name for row in rows] == list(profile.names)
    assert [row.dw_flops for row in rows] == profile.t_dw.tolist()
    assert [row.dy_flops for row in rows] == profile.t_dy.tolist()
    assert [row.cumulative_dy_flops for row in rows] == profile.t_dy.cumsum().tolist()
    assert [row.alone_flops for row in rows] == [profile.step_flops([row.name]).total for row in rows]
    assert tuple(row.name for row in rows if row.selected) == selection.names
    assert [row.has_gradient for row in rows].count(False) == 2


def test_selected_step_adds_up(profile: Profile, selection: Selection) -> None:
    chosen = summarise(profile, selection).selection
    assert chosen is not None
    assert chosen.forward_flops + chosen.dy_flops + chosen.dw_flops == chosen.flops == selection.flops
    assert min(chosen.dy_flops, chosen.dw_flops) >= 0
    assert chosen.deepest == selection.names[-1]


def test_log_alone_reports_its_last_selection(profile: Profile, log: TrainingLog) -> None:
    summary = summarise(profile, log=log)
    assert summary.selection is not None
    assert summary.training is not None
    assert summary.selection.flops == log.selections[-1].selection.flops
    assert summary.training.steps[-1].cumulative_planned_flops == log.planned_flops
    assert summary.training.executed_flops == log.executed_flops == log.planned_flops
    assert [event.step for event in summary.training.selections] == [0, 2, 4]


def test_loss_that_is_not_finite_is_none(profile: Profile, log: TrainingLog, tmp_path: Path) -> None:
    broken = TrainingLog([replace(step, loss=float("nan")) for step in log.steps], log.selections)
    for suffix in (".json", ".md", ".html"):
        write(tmp_path / f"report{suffix}", profile, log=broken)
    assert read_json(tmp_path / "report.json")["training"]["steps"][0]["loss"] is None


@pytest.mark.parametrize("suffix", [".json", ".md", ".html"])
def test_energy_end_and_drop_of_a_run(profile: Profile, log: TrainingLog, tmp_path: Path, suffix: str) -> None:
    used = Energy(kwh=1.25, co2_kg=0.07, intensity=56.0, method="counted <by> hand")
    ended = TrainingLog(log.steps, log.selections, log.measuring_flops, stopped="all is spent", energy=used)
    path = tmp_path / f"report{suffix}"
    write(path, profile, log=ended)
    if suffix == ".json":
        training = read_json(path)["training"]
        assert training["energy"] == {"kwh": 1.25, "co2_kg": 0.07, "intensity": 56.0, "method": "counted <by> hand"}
        assert training["stopped"] == "all is spent"
        assert [step["predicted_drop"] is None for step in training["steps"]] == [False, *[True] * 5]
        return
    text = path.read_text()
    assert "1.25 kWh" in text
    assert "0.07 kg, at 56 g/kWh" in text
    assert "all is spent" in text
    assert "Drop of the loss, predicted and real" in text
    assert "<by>" not in text


def test_why_it_was_that_selection(profile: Profile, log: TrainingLog, tmp_path: Path) -> None:
    """Escaped, as all that is not the report's own."""
    why = "what is <stored> is kept"
    with_reason = TrainingLog(log.steps, [replace(log.selections[0], reason=why), *log.selections[1:]])
    for suffix in (".json", ".md", ".html"):
        write(tmp_path / f"why{suffix}", profile, log=with_reason)
    assert read_json(tmp_path / "why.json")["training"]["selections"][0]["reason"] == why
    assert f"* After step 0: {escape(why)}\n" in (tmp_path / "why.md").read_text()
    assert "<li>After step 0: what is &lt;stored&gt; is kept.</li>" in (tmp_path / "why.html").read_text()


@pytest.mark.parametrize("suffix", [".json", ".md", ".html"])
def test_energy_over_steps(profile: Profile, log: TrainingLog, tmp_path: Path, suffix: str) -> None:
    """The first step is one of a run without a meter, which a later one went on with."""
    used = [None, *(count / 8 for count in range(1, len(log.steps)))]
    steps = [
        replace(step, kwh=kwh, co2_kg=None if kwh is None else kwh / 4)
        for step, kwh in zip(log.steps, used, strict=True)
    ]
    with_energy, without = tmp_path / f"with{suffix}", tmp_path / f"without{suffix}"
    write(with_energy, profile, log=TrainingLog(steps, log.selections))
    write(without, profile, log=log)
    co2 = [None if kwh is None else kwh / 4 for kwh in used]
    if suffix == ".json":
        told = read_json(with_energy)["training"]["steps"]
        assert [(step["kwh"], step["co2_kg"]) for step in told] == list(zip(used, co2, strict=True))
        Draft202012Validator(schema()).validate(read_json(with_energy))
        assert {step["kwh"] for step in read_json(without)["training"]["steps"]} == {None}
    elif suffix == ".md":
        rows = markdown_tables(with_energy.read_text(encoding="utf-8"))[-2]
        assert rows[0][-2:] == ["kWh so far", "CO2 so far, kg"]
        assert [row[-2:] for row in rows[1:3]] == [["", ""], ["0.125", "0.03125"]]
        assert "so far, kg" not in without.read_text(encoding="utf-8")
    else:
        chart, none = (
            page_data(Page(path.read_text(encoding="utf-8")))["charts"]["training"] for path in (with_energy, without)
        )
        by_axis = {trace["yaxis"]: trace for trace in chart["data"]}
        assert (by_axis["y3"]["y"], by_axis["y4"]["y"]) == (used, co2)
        assert all(trace["x"] == list(range(len(steps))) for trace in chart["data"])
        assert chart["layout"]["yaxis4"]["range"] == [0, 1.25 * steps[-1].co2_kg]
        assert "energy and CO2 so far" in with_energy.read_text(encoding="utf-8")
        assert [trace["yaxis"] for trace in none["data"]] == ["y", "y2"]
        assert "CO2" not in "".join(strings(none))
        assert "energy and CO2" not in without.read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", [".json", ".md", ".html"])
def test_selections_without_importance(profile: Profile, log: TrainingLog, tmp_path: Path, suffix: str) -> None:
    steps = [replace(step, predicted_drop=None, real_drop=None) for step in log.steps]
    records = [replace(record, selection=None, importance_captured=None, budget=None) for record in log.selections]
    path = tmp_path / f"report{suffix}"
    write(path, profile, log=TrainingLog(steps, records))
    text = path.read_text()
    assert "Drop of the loss" not in text
    assert "estimated" not in text
    if suffix == ".json":
        assert [event["importance_captured"] for event in read_json(path)["training"]["selections"]] == [None] * 3


def test_selection_of_another_profile_is_refused(profile: Profile, hostile_selection: Selection) -> None:
    with pytest.raises(InputError, match="expected one of Net"):
        summarise(profile, hostile_selection)


def test_evenly_keeps_both_ends() -> None:
    for count in range(1, 40):
        for most in range(2, 12):
            shown = evenly(range(count), most)
            assert (shown[0], shown[-1]) == (0, count - 1)
            assert len(set(shown)) == len(shown) == min(count, most)


# --- JSON ---------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_json_holds_the_profile_s_numbers(
    profile: Profile, selection: Selection, log: TrainingLog, tmp_path: Path
) -> None:
    write(tmp_path / "report.json", profile, selection, log)
    data = read_json(tmp_path / "report.json")
    assert (data["format"], data["version"]) == ("gtflops-report", 2)
    assert data["flops"]["full"]["all"] == profile.full_flops
    assert data["flops"]["forward"]["all"] == profile.forward_flops
    assert data["flops"]["full"]["matmul"] == profile.step_flops("all", ops="matmul").total
    assert [row["dw_flops"] for row in data["tensors"]] == profile.t_dw.tolist()
    assert [row["dy_flops"] for row in data["tensors"]] == profile.t_dy.tolist()
    assert [tuple(row["shape"]) for row in data["tensors"]] == [tensor.shape for tensor in profile.tensors]
    assert [row["importance"] for row in data["tensors"]] == [selection.importance[name] for name in profile.names]
    assert data["selection"]["flops"] == selection.flops
    assert [event["names"] for event in data["training"]["selections"]] == [
        list(record.selection.names) for record in log.selections
    ]
    assert [step["loss"] for step in data["training"]["steps"]] == [step.loss for step in log.steps]


def test_json_keeps_names_exactly(hostile: Profile, tmp_path: Path) -> None:
    write(tmp_path / "report.json", hostile)
    assert [row["name"] for row in read_json(tmp_path / "report.json")["tensors"]] == list(hostile.names)


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    Draft202012Validator.check_schema(schema())
    return Draft202012Validator(schema())


def test_json_is_of_its_schema(
    validator: Draft202012Validator,
    profile: Profile,
    hostile: Profile,
    hostile_selection: Selection,
    hostile_log: TrainingLog,
    log: TrainingLog,
    tmp_path: Path,
) -> None:
    used = Energy(kwh=1.25, co2_kg=0.07, intensity=56.0, method="by hand")
    whole = TrainingLog(log.steps, log.selections, log.measuring_flops, stopped="all is spent", energy=used)
    timed = replace(profile, nanoseconds=np.arange(len(profile.graph.nodes), dtype=np.int64) * 1000)
    within_time = select(timed, {tensor.name: tensor.numel for tensor in profile.tensors}, 0.9, cost="time")
    compiled = replace(
        profile,
        compiled=CompiledStep((profile.names[0],), (), Flops(20, 2), 1, ()),
    )
    reports: list[tuple[Any, ...]] = [
        (profile,),
        (hostile, hostile_selection, hostile_log),
        (profile, None, whole),
        (timed, within_time),
        (compiled,),
    ]
    path = tmp_path / "report.json"
    for arguments in reports:
        write(path, *arguments)
        validator.validate(read_json(path))


def test_schema_knows_every_field(validator: Draft202012Validator, profile: Profile, log: TrainingLog) -> None:
    """A field that is added, or goes, without the schema saying so is found."""
    data = replace(summarise(profile, log=log), budgets=budget_curve(profile)).to_json()
    validator.validate(data)

    def objects(value: Any) -> list[dict[str, Any]]:
        if isinstance(value, list):
            return objects(value[0]) if value else []
        if isinstance(value, dict):
            return [value, *(found for item in value.values() for found in objects(item))]
        return []

    for record in objects(data):
        if record is data["versions"] or record is data["batch"]:
            continue  # maps by name
        record["unknown"] = 1
        assert not validator.is_valid(data)
        del record["unknown"]
        first = next(iter(record))
        kept = record.pop(first)
        assert not validator.is_valid(data), first
        record[first] = kept


# --- CSV ----------------------------------------------------------------------------------------------------------


def test_csv_has_a_row_for_each_tensor(hostile: Profile, hostile_selection: Selection, tmp_path: Path) -> None:
    write(tmp_path / "report.csv", hostile, hostile_selection)
    with (tmp_path / "report.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list(hostile.names)
    assert [int(row["dw_flops"]) for row in rows] == hostile.t_dw.tolist()
    assert [int(row["dy_flops"]) for row in rows] == hostile.t_dy.tolist()
    assert [row["shape"] for row in rows] == ["x".join(map(str, tensor.shape)) for tensor in hostile.tensors]
    assert [row["selected"] == "True" for row in rows] == hostile_selection.mask.tolist()


# --- what a budget buys -------------------------------------------------------------------------------------------


def test_budgets_are_selections_at_round_shares(profile: Profile) -> None:
    importance = {tensor.name: float(len(tensor.name)) for tensor in profile.tensors}
    curve = budget_curve(profile, importance)
    assert curve is not None
    assert curve.bought == "importance"
    assert curve.points[-1].budget_flops == profile.full_flops
    for share in (0.8, 0.9):
        (point,) = (point for point in curve.points if point.budget_flops == int(share * profile.full_flops))
        chosen = select(profile, importance, share)
        assert point.positions() == chosen.mask.nonzero()[0].tolist()
        assert (point.flops, point.captured) == (chosen.flops, chosen.importance_captured)
        assert (point.tensors, point.optimal) == (len(chosen.names), True)
        assert point.numel == sum(tensor.numel for tensor in profile.tensors if tensor.name in chosen.names)


def test_without_importance_a_budget_buys_elements(profile: Profile, tmp_path: Path) -> None:
    write(tmp_path / "report.json", profile)
    budgets = read_json(tmp_path / "report.json")["budgets"]
    assert budgets["bought"] == "elements"
    numel = [tensor.numel for tensor in profile.tensors]
    can_train = sum(tensor.numel for tensor in profile.tensors if tensor.has_gradient)
    for point in budgets["points"]:
        assert point["numel"] == sum(numel[place] for place in point["trains"])
        assert point["captured"] == point["numel"] / can_train


def test_importance_of_another_model_is_refused(profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lacks 9 of 9 tensors"):
        profile.report(tmp_path / "report.html", importance={"absent": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_buy_where_nothing_is_worth_anything(profile: Profile, tmp_path: Path) -> None:
    assert budget_curve(profile, dict.fromkeys(profile.names, 0.0)) is None
    for suffix in (".html", ".md", ".json"):
        profile.report(tmp_path / f"report{suffix}", importance=dict.fromkeys(profile.names, 0.0))
    assert read_json(tmp_path / "report.json")["budgets"] is None


def test_grid_has_a_place_for_every_tensor() -> None:
    names = [f"layers.{layer}.mlp.experts.{expert}.w.weight" for layer in range(300) for expert in range(3)]
    names += [f"odd{kind}.w{kind}" for kind in range(60)]
    grid = Grid.of(names)
    assert len(grid.layers) == 128
    assert len(grid.kinds) == 41
    assert sum(value or 0 for row in grid.summed([1] * len(names)) for value in row) == len(names)
    assert Grid.of([]).summed([]) == []


# --- HTML ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser makes of the page: tags, and text by the tag that holds it."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def within(self, tag: str) -> list[str]:
        return [text for holder, text in self.texts if holder == tag]


def page_of(path: Path, *args: Any) -> Page:
    write(path, *args)
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(profile: Profile, selection: Selection, log: TrainingLog, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(tmp_path_factory.mktemp("page") / "report.html", profile, selection, log)


@pytest.fixture(scope="module")
def hostile_page(
    hostile: Profile,
    hostile_selection: Selection,
    hostile_log: TrainingLog,
    tmp_path_factory: pytest.TempPathFactory,
) -> Page:
    return page_of(tmp_path_factory.mktemp("page") / "report.html", hostile, hostile_selection, hostile_log)


@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_page_loads_and_runs_nothing_but_itself(which: str, request: pytest.FixtureRequest) -> None:
    page: Page = request.getfixturevalue(which)
    assert page.open == []
    loading = {"src", "srcset", "data", "action", "formaction", "poster", "background", "ping"}
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "svg", "video", "audio"}
        assert not loading & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
        assert not re.search(r"url\(|@import", attributes.get("style") or "")
        assert (attributes.get("http-equiv") or "Content-Security-Policy") == "Content-Security-Policy"
    assert not re.search(r"url\(|@import", "".join(page.within("style")))
    policies = [attributes["content"] or "" for tag, attributes in page.tags if "http-equiv" in attributes]
    (policy,) = policies
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    nonce = policy.split("'nonce-")[1].split("'")[0]
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {"nonce": nonce}, {"nonce": nonce}]


def test_policy_comes_before_all_content(page: Page) -> None:
    assert [tag for tag, _ in page.tags][:4] == ["html", "head", "meta", "meta"]


def test_page_says_the_profile_s_numbers(page: Page, profile: Profile, selection: Selection) -> None:
    cells = page.within("td")
    for exact in (profile.full_flops, profile.forward_flops, int(profile.t_dw.sum()), int(profile.t_dy.sum())):
        assert f"{exact:,}" in cells
    assert any(f"{selection.flops:,} FLOP" in text for text in page.within("dd"))
    assert set(profile.names) <= set(page.within("code"))


def test_headings_are_in_order_and_tables_labelled(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") == 6
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in page.tags if tag == "th")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for reference in ("aria-labelledby", "for"):
            assert attributes.get(reference, ids[0]) in ids
        assert (attributes.get("href") or f"#{ids[0]}")[1:] in ids


def test_hostile_names_are_text(hostile_page: Page, hostile: Profile) -> None:
    titles = {attributes.get("title") for tag, attributes in hostile_page.tags if tag == "code"}
    shown = set(hostile_page.within("code")) | titles
    assert {visible(name) for name in hostile.names} <= shown
    assert all(len(text) <= 120 for text in hostile_page.within("code"))


def page_data(page: Page) -> Any:
    holder = "".join(page.within("script"))
    return json.loads(holder[: holder.index("/**")])  # plotly.js opens with a comment


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [found for item in value.values() for found in strings(item)]
    if isinstance(value, list):
        return [found for item in value for found in strings(item)]
    return [value] if isinstance(value, str) else []


def test_hostile_names_are_text_in_charts(hostile_page: Page) -> None:
    holder = "".join(hostile_page.within("script"))
    assert "<" not in holder[: holder.index("/**")]  # plotly.js opens with a comment
    charts = page_data(hostile_page)["charts"]
    assert set(charts) == {"depth", "costs", "frontier", "trained", "training", "selections"}
    ours = ("<br>", "<extra></extra>")
    for label in strings(charts):
        for tag in ours:
            label = label.replace(tag, "")
        assert not {"<", "\n"} & set(label)
        assert len(label) < 400
    assert any("&lt;script&gt;alert(1)&lt;/script&gt;" in label for label in strings(charts))


def test_charts_hold_the_costs(page: Page, profile: Profile, selection: Selection) -> None:
    charts = page_data(page)["charts"]
    by_axis: dict[str, dict[int, int]] = {}
    for trace in charts["depth"]["data"]:
        by_axis.setdefault(trace["yaxis"], {}).update(zip(trace["x"], trace["y"], strict=True))
    places = range(1, len(profile.names) + 1)
    assert [by_axis["y"][place] for place in places] == profile.t_dw.tolist()
    assert [by_axis["y2"][place] for place in places] == profile.t_dy.tolist()
    assert [by_axis["y3"][place] for place in places] == profile.t_dy.cumsum().tolist()
    assert [place - 1 for place in by_axis["y4"]] == selection.mask.nonzero()[0].tolist()
    (selection_map,) = charts["selections"]["data"]
    assert (len(selection_map["z"]), len(selection_map["x"])) == (len(profile.names), 4)


def test_page_is_light(profile: Profile, tmp_path: Path) -> None:
    write(tmp_path / "report.html", profile)
    assert (tmp_path / "report.html").stat().st_size < 5_500_000


def test_equal_reports_are_equal_files(profile: Profile, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.html", profile)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_html_without_the_extra_says_what_to_install(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(InputError, match=r"pip install 'gtflops\[report\]'"):
        write(tmp_path / "report.html", profile)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "report.md", profile)


# --- Markdown -----------------------------------------------------------------------------------------------------


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Rows of rendered cells, by a CommonMark parser with GitHub's tables."""
    tables: list[list[list[str]]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for before, token in pairwise(tokens):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and before.type in ("td_open", "th_open"):
            tables[-1][-1].append("".join(child.content for child in token.children or []))
        assert token.type != "html_block"
        assert not any(child.type in ("html_inline", "link_open", "image") for child in token.children or [])
    return tables


def test_markdown_parses_and_adds_up(profile: Profile, selection: Selection, log: TrainingLog, tmp_path: Path) -> None:
    write(tmp_path / "report.md", profile, selection, log)
    tables = markdown_tables((tmp_path / "report.md").read_text(encoding="utf-8"))
    assert [len(table) - 1 for table in tables] == [
        4,
        len(summarise(profile).modules),
        len(summarise(profile).operators),
        len(profile.names),
        12,
        6,
        3,
    ]
    assert all(len({len(row) for row in table}) == 1 for table in tables)
    assert tables[0][4][1] == f"{profile.full_flops:,}"
    assert [row[1] for row in tables[3][1:]] == list(profile.names)
    assert [row[5] for row in tables[3][1:] if row[5] != "no gradient"] == [
        f"{tensor.dw_flops:,}" for tensor in profile.tensors if tensor.has_gradient
    ]


def test_markdown_shows_hostile_names_as_text(
    hostile: Profile, hostile_selection: Selection, hostile_log: TrainingLog, tmp_path: Path
) -> None:
    write(tmp_path / "report.md", hostile, hostile_selection, hostile_log)
    tables = markdown_tables((tmp_path / "report.md").read_text(encoding="utf-8"))
    assert all(len({len(row) for row in table}) == 1 for table in tables)
    assert [row[1] for row in tables[3][1:]] == [visible(name) for name in hostile.names]


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.txt", "report", "report.html.gz", "report.htm"])
def test_other_suffix_is_refused(name: str, profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected \.html, \.md, \.json or \.csv"):
        write(tmp_path / name, profile)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_folder_that_cannot_be_written(suffix: str, profile: Profile, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("missing", "file"):
        with pytest.raises(InputError, match="expected a file in a writable folder"):
            write(tmp_path / folder / f"report{suffix}", profile)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_failure_leaves_the_old_file(
    suffix: str, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"report{suffix}"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(InputError, match="No space left"):
            write(path, profile)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write(path, profile)
    assert len(path.read_text(encoding="utf-8")) > 500
    assert list(tmp_path.iterdir()) == [path]


def test_report_needs_no_torch(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "profile.json")
    script = """
import sys, gtflops
profile = gtflops.Profile.load("profile.json")
for suffix in ("html", "md", "json", "csv"):
    profile.report(f"report.{suffix}")
from gtflops.report.terminal import profile_tables
profile_tables(profile)
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=60)


# --- notebooks and matplotlib -------------------------------------------------------------------------------------


def test_notebook_shows_profile_and_selection(profile: Profile, selection: Selection) -> None:
    shown = Page(profile._repr_html_())
    assert shown.open == []
    assert "Net" in shown.within("strong")
    assert {row.name for row in summarise(profile).modules if row.name} <= set(shown.within("th"))
    chosen = Page(selection._repr_html_())
    assert any(f"{selection.flops:,} FLOP" in text for text in chosen.within("td"))


def test_notebook_shows_hostile_names_as_text(hostile: Profile, hostile_selection: Selection) -> None:
    for source in (hostile._repr_html_(), hostile_selection._repr_html_()):
        shown = Page(source)
        assert shown.open == []
        assert not {tag for tag, _ in shown.tags} & {"script", "img", "b", "i", "a", "style"}
        assert not any(name.startswith("on") for _, attributes in shown.tags for name in attributes)


def test_plot_holds_the_costs(hostile: Profile, tmp_path: Path) -> None:
    figure = hostile.plot()
    weights, activations, summed = figure.axes
    assert [bar.get_height() for bar in weights.patches] == hostile.t_dw.tolist()
    assert [bar.get_height() for bar in activations.patches] == hostile.t_dy.tolist()
    assert summed.lines[0].get_ydata().tolist() == hostile.t_dy.cumsum().tolist()
    figure.savefig(tmp_path / "cost.png")


def test_plot_without_the_extra_says_what_to_install(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'gtflops\[plot\]'"):
        profile.plot()


# --- terminal -----------------------------------------------------------------------------------------------------


def printed(width: int, *renderables: Any) -> str:
    stream = StringIO()
    console = Console(file=stream, width=width, force_terminal=False)
    for renderable in renderables:
        console.print(renderable)
    return stream.getvalue()


@pytest.mark.parametrize("width", [60, 100])
def test_terminal_prints(width: int, profile: Profile, selection: Selection) -> None:
    text = printed(width, profile_tables(profile, top=3), selection_table(selection))
    assert all(len(line) <= width for line in text.splitlines())
    assert f"{profile.full_flops:,} FLOP" in text
    assert all(word in text for word in ("Full step", "t_dw", "Optimal"))


@pytest.mark.parametrize("width", [60, 200])
def test_terminal_shows_hostile_names_as_text(width: int, hostile: Profile, hostile_selection: Selection) -> None:
    text = printed(width, profile_tables(hostile, top=100), selection_table(hostile_selection))
    assert all(len(line) <= width for line in text.splitlines())
    assert not {"\x1b", "\u202e"} & set(text)
    if width == 200:
        assert "[bold red]markup[/]" in text
        assert "<script>alert(1)</script>" in text


def test_summary_of_a_saved_profile_is_the_same(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "profile.json")
    assert summarise(Profile.load(tmp_path / "profile.json")) == summarise(profile)


@pytest.mark.parametrize("suffix", [".html", ".md", ".json"])
def test_recomputation_has_a_part_of_its_own(tmp_path: Path, suffix: str) -> None:
    case = ZOO["checkpointed-blocks"]()
    profile = gtflops.profile(case.model, case.batch, case.loss)
    profile.report(tmp_path / f"report{suffix}")
    text = (tmp_path / f"report{suffix}").read_text()
    recompute = profile.step_flops("all").recompute
    if suffix == ".json":
        flops = json.loads(text)["flops"]
        assert flops["recompute"]["all"] == recompute
        assert (
            flops["full"]["all"]
            == profile.full_flops
            == sum(flops[part]["all"] for part in ("forward", "dy", "dw", "recompute"))
        )
    else:
        assert f"{recompute:,}" in text
        assert "Recomputed forward" in text


@pytest.mark.parametrize("suffix", [".html", ".md"])
def test_a_budget_of_time(profile: Profile, tmp_path: Path, suffix: str) -> None:
    """Says seconds, and both costs; the bar of FLOPs has no mark for a budget of time."""
    timed = replace(profile, nanoseconds=np.arange(len(profile.graph.nodes), dtype=np.int64) * 1000)
    importance = {tensor.name: tensor.numel for tensor in profile.tensors}
    chosen = select(timed, importance, 0.9, cost="time")
    write(tmp_path / f"time{suffix}", timed, chosen)
    text = (tmp_path / f"time{suffix}").read_text()
    assert chosen.seconds is not None
    assert chosen.budget_seconds is not None
    assert f"{format_seconds(chosen.budget_seconds)}, 90.0% of the time of a full step" in text
    assert "Measured time of a step" in text
    assert format_seconds(chosen.seconds) in text
    assert f"{chosen.flops:,} FLOP" in text
    assert "swatch mark" not in text

"""The HTML report in a real Chromium: drawn, moved, searched, read aloud, printed, and silent on the network.

These tests want a browser of the system (Debian's package ``chromium``), and are skipped without one; under
``make test-browser`` a skip is a failure.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

import gtflops
from gtflops.profiling import Profile
from gtflops.report import html, write
from gtflops.report.budgets import budget_curve
from gtflops.report.summary import TensorRow, summarise
from gtflops.selection import Selection
from test_report import Net, hostile, hostile_log, hostile_selection, log, profile, selection, square  # noqa: F401

pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        missing = "wants a browser: apt-get install chromium, then make test-browser"
        if os.environ.get("GTFLOPS_TEST_BROWSER") == "required":
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        # Without its sandbox, which root may not use; the pages are our own.
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose every message and request is an error, but for the file itself."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    said: list[str] = []
    requested: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("dialog", lambda dialog: said.append(dialog.message))
    opened.on("request", lambda request: requested.append(request.url))
    yield opened
    assert said == []
    assert [url for url in requested if not url.startswith(("file://", "data:", "blob:"))] == []
    context.close()


@pytest.fixture(scope="module")
def report(
    profile: Profile,  # noqa: F811
    selection: Selection,  # noqa: F811
    log: gtflops.training.TrainingLog,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    path = tmp_path_factory.mktemp("browser") / "report.html"
    write(path, profile, selection, log)
    return path


def opened(page: Page, path: Path) -> Page:
    """Loaded, which the scripts at its end are a part of."""
    page.goto(path.as_uri())
    return page


CHARTS = {"depth", "costs", "frontier", "trained", "training", "selections"}


def test_every_chart_is_drawn(page: Page, report: Path, profile: Profile) -> None:  # noqa: F811
    opened(page, report)
    drawn = page.evaluate(
        "[...document.querySelectorAll('[data-chart]')].map((chart) => [chart.dataset.chart, chart.data.length, "
        "chart.querySelector('.main-svg').getBoundingClientRect().height])"
    )
    assert {name for name, _, _ in drawn} == CHARTS
    assert all(traces > 0 and height > 100 for _, traces, height in drawn)
    bars = page.locator("[data-chart=depth] .bars path")
    assert bars.count() >= 2 * len(profile.names)


def facts(page: Page) -> dict[str, str]:
    return dict(
        zip(page.locator(".control dt").all_inner_texts(), page.locator(".control dd").all_inner_texts(), strict=True)
    )


def test_the_slider_changes_numbers_and_map(page: Page, report: Path, profile: Profile, selection: Selection) -> None:  # noqa: F811
    opened(page, report)
    curve = budget_curve(profile, selection.importance)
    assert curve is not None
    slider = page.get_by_role("slider", name="Budget")
    expect(page.locator("#slider-value")).to_have_text("70.0%")  # the selection's own
    cells = "document.querySelector('[data-chart=trained]').data[0].z.flat().filter((share) => share !== null)"
    shown = {}
    for key, place in (("Home", 0), ("ArrowRight", 1), ("End", len(curve.points) - 1)):
        slider.press(key)
        point = curve.points[place]
        assert page.locator("#slider-value").inner_text() == f"{point.budget_flops / profile.full_flops:.1%}"
        assert facts(page)["Tensors trained"] == f"{point.tensors} of {len(profile.names)}"
        assert facts(page)["Importance captured"] == f"{point.captured:.1%}"
        assert f"{point.flops / profile.full_flops:.2%}" in facts(page)["Exact cost of a step"]
        assert sum(page.evaluate(cells)) == point.tensors  # in this model each cell holds one tensor
        ring = page.evaluate("document.querySelector('[data-chart=frontier]').data[1].x[0]")
        assert ring == pytest.approx(100 * point.flops / profile.full_flops)
        assert f"Tensors trained: {facts(page)['Tensors trained']}" in (slider.get_attribute("aria-valuetext") or "")
        shown[key] = facts(page)
    assert shown["Home"] != shown["End"]


def test_search_filters_and_headings_sort(page: Page, report: Path, profile: Profile) -> None:  # noqa: F811
    opened(page, report)
    names = page.locator("#tensor-table tbody code")
    assert names.all_inner_texts() == list(profile.names)
    page.get_by_label("Find a tensor").fill("LEFT.")
    assert set(names.all_inner_texts()) == {"left.weight", "left.bias"}
    expect(page.locator(".search output")).to_have_text(f"2 of {len(profile.names)}")
    page.get_by_label("Find a tensor").fill("")
    heading = page.locator("#tensor-table th", has_text=re.compile("^t_dw$"))
    heading.get_by_role("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    by_cost = sorted(profile.tensors, key=lambda tensor: -tensor.dw_flops)
    assert names.first.inner_text() == by_cost[0].name
    heading.get_by_role("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="Tensor", exact=True).click()
    assert names.all_inner_texts() == sorted(profile.names)


def test_training_over_steps_seconds_and_flops(page: Page, report: Path, log: gtflops.training.TrainingLog) -> None:  # noqa: F811
    opened(page, report)
    last = "document.querySelector('[data-chart=training]').data[0].x.at(-1)"
    assert page.evaluate(last) == len(log.steps) - 1
    page.get_by_label("FLOPs", exact=True).check()
    assert page.evaluate(last) == log.planned_flops
    page.get_by_label("seconds", exact=True).check()
    assert page.evaluate(last) == pytest.approx(sum(step.seconds or 0 for step in log.steps))


def test_energy_is_drawn_over_what_is_asked_for(
    page: Page,
    profile: Profile,  # noqa: F811
    log: gtflops.training.TrainingLog,  # noqa: F811
    tmp_path: Path,
) -> None:
    """With its tick labels inside the chart, kWh on the left and CO2 on the right."""
    steps = [replace(step, kwh=2e-5 * step.step, co2_kg=1e-6 * step.step) for step in log.steps]
    write(tmp_path / "report.html", profile, log=gtflops.training.TrainingLog(steps, log.selections))
    opened(page, tmp_path / "report.html")
    chart = page.locator("[data-chart=training]")
    assert chart.locator(".scatterlayer .js-line").count() == 4
    page.get_by_label("FLOPs", exact=True).check()
    last = "document.querySelector('[data-chart=training]').data.map(({ x, y }) => [x.at(-1), y.at(-1)])"
    assert page.evaluate(last)[2:] == [[log.planned_flops, steps[-1].kwh], [log.planned_flops, steps[-1].co2_kg]]
    frame = chart.bounding_box()
    assert frame is not None
    for axis in ("y3", "y4"):
        labels = chart.locator(f".{axis}tick text")
        assert labels.count() > 1
        for label in labels.all():
            box = label.bounding_box()
            assert box is not None
            assert frame["x"] <= box["x"] < box["x"] + box["width"] <= frame["x"] + frame["width"]


def test_hostile_names_are_text(
    page: Page,
    hostile: Profile,  # noqa: F811
    hostile_selection: Selection,  # noqa: F811
    hostile_log: gtflops.training.TrainingLog,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Nothing of a name runs or becomes an element, in the table as it came, sorted anew, and in the charts."""
    write(tmp_path / "report.html", hostile, hostile_selection, hostile_log)
    opened(page, tmp_path / "report.html")
    page.get_by_role("button", name="Tensor", exact=True).click()
    page.get_by_role("slider").press("End")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 3
    assert page.locator("#tensor-table code", has_text="<script>alert(1)</script>").count() == 1
    for chart in page.locator("[data-chart]").all():
        assert chart.locator("a, b, i, script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 1280
    assert (
        page.evaluate("Math.max(...[...document.querySelectorAll('svg text')].map((text) => text.textContent.length))")
        < 100
    )


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_a_screen_reader_and_weak_eyes_can_use_it(browser: Browser, report: Path, scheme: str, width: int) -> None:
    """No violation of what axe-core checks: contrast, labels, order of headings, and the rest of WCAG it can see."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    page = opened(context.new_page(), report)
    found = Axe().run(page).response["violations"]
    assert [(one["id"], [node["target"] for node in one["nodes"]]) for one in found] == []
    context.close()


def test_fits_a_phone(browser: Browser, report: Path) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page = opened(context.new_page(), report)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for chart in page.locator("[data-chart]").all():
        box = chart.locator(".main-svg").first.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    context.close()


def test_the_keyboard_reaches_everything(page: Page, report: Path) -> None:
    opened(page, report)
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.id || document.activeElement.name || document.activeElement.textContent.trim()"
            )
        )
    assert {"To the figures", "Full step", "search", "Tensor", "t_dw", "slider", "over"} <= reached


def test_prints_whole(page: Page, report: Path) -> None:
    opened(page, report)
    page.emulate_media(media="print")
    depth = page.locator("[data-chart=depth] .main-svg").first
    expect(depth).to_have_attribute("width", "680")
    for hidden in ("nav", ".search", "#slider"):
        expect(page.locator(hidden)).to_be_hidden()
    assert page.locator("#tensor-table tbody tr").last.is_visible()
    clipped = (
        "[...document.querySelectorAll('.scroll')].filter((box) => box.scrollHeight > box.clientHeight + 1).length"
    )
    assert page.evaluate(clipped) == 0
    page.emulate_media(media="screen")
    expect(depth).not_to_have_attribute("width", "680")
    page.set_viewport_size({"width": 700, "height": 900})
    expect(depth).to_have_attribute("width", "660")
    expect(depth).to_have_attribute("height", "520")


def test_without_javascript_the_tables_are_there(browser: Browser, report: Path, profile: Profile) -> None:  # noqa: F811
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("#tensor-table tbody code").all_inner_texts() == list(profile.names)
    expect(page.locator("noscript").first).to_be_visible()
    expect(page.locator(".control")).to_be_hidden()
    context.close()


def test_100_000_tensors(page: Page, profile: Profile, tmp_path: Path) -> None:  # noqa: F811
    """The page opens, searches and sorts all of them, some rows at a time, in seconds of its own thread's time."""
    row = summarise(profile).tensors[0]
    costs = np.random.default_rng(0).integers(1, 10**9, 100_000).tolist()
    tensors: list[TensorRow] = [
        replace(
            row,
            name=f"layers.{place // 100}.experts.{place % 100}.weight",
            dw_flops=cost,
            alone_flops=None,
            alone_share=None,
        )
        for place, cost in enumerate(costs)
    ]
    path = tmp_path / "many.html"
    path.write_text(html.render(replace(summarise(profile), tensors=tuple(tensors))), encoding="utf-8")
    assert path.stat().st_size < 25_000_000
    page.set_default_timeout(120_000)  # other processes may take the time
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    opened(page, path)
    rows = page.locator("#tensor-table tbody tr")
    assert rows.count() == html.ROWS_SHOWN
    expect(page.locator(".search output")).to_have_text("100,000 of 100,000")
    page.get_by_label("Find a tensor").fill("layers.999.experts.99.")
    assert page.locator("#tensor-table tbody code").all_inner_texts() == ["layers.999.experts.99.weight"]
    page.get_by_label("Find a tensor").fill("")
    page.get_by_role("button", name="t_dw", exact=True).click()
    dearest = tensors[max(range(len(costs)), key=costs.__getitem__)].name
    assert page.locator("#tensor-table tbody code").first.inner_text() == dearest
    page.locator("#more").click()
    assert rows.count() == 2 * html.ROWS_SHOWN
    metrics = {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}
    assert metrics["ThreadTime"] < 10

"""The charts, as plain data for plotly.js. A colour is the name of a CSS variable, which the page fills in."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

from gtflops.report.budgets import BudgetCurve
from gtflops.report.summary import StepRow, Summary, TensorRow, evenly, module_group, shorten, visible
from gtflops.units import format_flops

Figure: TypeAlias = dict[str, Any]

#: Points of a line, bars, and columns of a map of selections, so that any model and any training give a light page.
POINTS_SHOWN = 2_000
BARS_SHOWN = 1_000
SELECTIONS_SHOWN = 200

_MOST_OFF_SCALE = 6
_MOST_TICKS = 7
_NAME_LENGTH = 70
_TICK_LENGTH = 24


def text(raw: str, most: int = _NAME_LENGTH) -> str:
    """A name for plotly, which takes some tags and entities in its labels for markup."""
    shown = shorten(visible(raw), most)
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


@dataclass(frozen=True, slots=True)
class _Bar:
    """A tensor, or, in a model of very many, some that lie next to each other."""

    label: str
    module: str
    dw: int
    dy: int
    trained: bool
    positions: range


def _bars_of(tensors: Sequence[TensorRow]) -> list[_Bar]:
    """In backward order; without a selection, all count as trained."""
    count = min(len(tensors), BARS_SHOWN)
    bars = []
    for place in range(count):
        positions = range(place * len(tensors) // count, (place + 1) * len(tensors) // count)
        inside = [tensors[position] for position in positions]
        label = text(inside[0].name)
        if len(inside) > 1:
            label += f"<br>and the next {len(inside) - 1:,}"
        bars.append(
            _Bar(
                label,
                inside[0].module,
                sum(tensor.dw_flops for tensor in inside),
                sum(tensor.dy_flops for tensor in inside),
                any(tensor.selected is not False for tensor in inside),
                positions,
            )
        )
    return bars


def cost_over_depth(summary: Summary) -> Figure:
    """Cost of each tensor in backward order; with a selection, which are trained."""
    bars = _bars_of(summary.tensors)
    count = len(bars)
    cumulative = list(accumulate(bar.dy for bar in bars))
    data: list[Figure] = []
    annotations = [_panel_title("Weight gradients, t_dw (FLOP)", 1.0)]
    annotations.append(_panel_title("Activation gradients, t_dy, and their sum (line, right)", 0.5))
    trained = [place for place, bar in enumerate(bars) if bar.trained]
    # A frozen tensor on the way to a deeper trained one passes its activation gradients on, so they are paid for.
    passed = range(trained[-1] + 1 if trained else 0)
    for axis, label, values, colour, paid in (
        ("y", "t_dw", [bar.dw for bar in bars], "--dw", set(trained)),
        ("y2", "t_dy", [bar.dy for bar in bars], "--dy", set(passed)),
    ):
        for places, shade in ((paid, colour), (set(range(count)) - paid, f"{colour}-soft")):
            if places:
                data.append(_bars(bars, sorted(places), values, axis, label, shade))
        annotations += _off_scale(values, axis)
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "x": list(range(1, count + 1)),
            "y": cumulative,
            "yaxis": "y3",
            "line": {"color": "--ink", "width": 1.5, "shape": "hv"},
            "hovertemplate": "t_dy so far %{y:.3s}FLOP<extra></extra>",
        }
    )
    layout: Figure = {
        "height": 520,
        "bargap": 0,
        "barmode": "overlay",
        "xaxis": {**_depth_axis(bars), "anchor": "y2"},
        "yaxis": {**_flops_axis(_scale_top([bar.dw for bar in bars])), "domain": [0.58, 0.95]},
        "yaxis2": {**_flops_axis(_scale_top([bar.dy for bar in bars])), "domain": [0.08, 0.45]},
        "yaxis3": {
            **_flops_axis(None),
            "overlaying": "y2",
            "side": "right",
            "showgrid": False,
            "tickmode": "auto",
            "range": [0, 1.08 * max([1, *cumulative])],
        },
        "annotations": annotations,
    }
    if summary.selection is not None:
        # A row of marks of its own: the choice must not be told by colour alone.
        data.append(
            {
                "type": "bar",
                "x": [place + 1 for place in trained],
                "y": [1] * len(trained),
                "yaxis": "y4",
                "width": 0.8,
                "marker": {"color": "--ink"},
                "customdata": [bars[place].label for place in trained],
                "hovertemplate": "trained: %{customdata}<extra></extra>",
            }
        )
        layout["yaxis4"] = {"domain": [0, 0.035], "range": [0, 1], "visible": False, "fixedrange": True}
        layout["xaxis"]["anchor"] = "y4"
        if trained:
            layout["shapes"] = [
                {
                    "type": "line",
                    "xref": "x",
                    "yref": "paper",
                    "x0": trained[-1] + 1.5,
                    "x1": trained[-1] + 1.5,
                    "y0": 0,
                    "y1": 0.95,
                    "line": {"color": "--ink", "width": 1, "dash": "dot"},
                }
            ]
    return {"data": data, "layout": layout}


def cost_map(summary: Summary) -> Figure:
    """Gradients' cost by layer and kind of tensor."""
    grid = summary.grid
    dw = grid.summed([tensor.dw_flops for tensor in summary.tensors])
    dy = grid.summed([tensor.dy_flops for tensor in summary.tensors])
    total = grid.summed([tensor.dw_flops + tensor.dy_flops for tensor in summary.tensors])
    known = [cost for row in total for cost in row if cost is not None]
    parts = [
        [
            "" if weight is None or passed is None else f"t_dw {format_flops(weight)}, t_dy {format_flops(passed)}"
            for weight, passed in zip(*rows, strict=True)
        ]
        for rows in zip(dw, dy, strict=True)
    ]
    figure = _map(summary, total, parts)
    top = _scale_top(known) or max(known, default=1)
    figure["data"][0] |= {
        "zmax": max(top, 1),
        "colorscale": [[0, "--frozen"], [1, "--heat"]],
        "showscale": True,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "tickformat": "~s", "nticks": 4, "len": 1, "xpad": 4},
    }
    return figure


def trained_map(summary: Summary) -> Figure:
    """Which share of a layer's tensors of a kind is trained; the page fills in what a budget buys."""
    empty = [[None] * len(summary.grid.layers) for _ in summary.grid.kinds]
    return _map(summary, empty, empty)


def frontier(summary: Summary, curve: BudgetCurve) -> Figure:
    """What each budget captures; the marks of the budget in hand, which the page moves, and of the selection."""
    full = summary.cost.full.all
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [100 * point.flops / full for point in curve.points],
            "y": [100 * point.captured for point in curve.points],
            "line": {"color": "--dw", "width": 2},
            "hovertemplate": f"%{{x:.1f}}% of a full step: %{{y:.1f}}% of {curve.bought}<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "markers",
            "x": [],
            "y": [],
            "marker": {"color": "--ink", "size": 12, "symbol": "circle-open", "line": {"width": 2.5}},
            "hoverinfo": "skip",
        },
    ]
    chosen = summary.selection
    if chosen is not None and curve.bought == "importance":
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [100 * chosen.flops / chosen.full_flops],
                "y": [100 * chosen.importance_captured],
                "marker": {"color": "--dy", "size": 12, "symbol": "diamond"},
                "hovertemplate": "the selection: %{x:.1f}%, %{y:.1f}%<extra></extra>",
            }
        )
    return {
        "data": data,
        "layout": {
            "height": 340,
            "hovermode": "closest",
            "xaxis": {"title": {"text": "FLOPs of a step, % of a full step", "standoff": 8}, "ticksuffix": "%"},
            "yaxis": {"rangemode": "tozero", "ticksuffix": "%", "domain": [0, 0.9]},
            "annotations": [_panel_title(f"Share of all {curve.bought} that is trained", 1.0)],
        },
    }


def loss_and_flops(summary: Summary) -> Figure:
    """Loss, FLOPs spent and, where it was measured, energy, over steps, seconds or FLOPs: ``over`` has what the page
    may lay along the axis."""
    assert summary.training is not None
    steps = evenly(summary.training.steps, POINTS_SHOWN)
    over = {"steps": {"title": "optimizer step", "x": [step.step for step in steps]}}
    if all(step.seconds is not None for step in summary.training.steps):
        elapsed = list(accumulate(step.seconds or 0.0 for step in summary.training.steps))
        over["seconds"] = {"title": "seconds of training steps", "x": evenly(elapsed, POINTS_SHOWN)}
    over["FLOPs"] = {
        "title": "planned FLOP of training steps",
        "x": [step.cumulative_planned_flops for step in steps],
    }
    flops_axis = {**_flops_axis(None), "rangemode": "tozero"}
    figure: Figure = {
        "over": over,
        "data": [
            _line(steps, [step.loss for step in steps], "y", "--dw", "loss %{y:.4g}"),
            _line(steps, [step.cumulative_planned_flops for step in steps], "y2", "--dy", "%{y:.4s}FLOP so far"),
        ],
        "layout": {
            "height": 420,
            "xaxis": {"title": {"text": "optimizer step"}, "anchor": "y2", "rangemode": "nonnegative"},
            "yaxis": {"domain": [0.58, 0.94]},
            "yaxis2": {**flops_axis, "domain": [0, 0.4]},
            "annotations": [_panel_title("Loss", 1.0), _panel_title("Planned FLOP of training steps, summed", 0.47)],
        },
    }
    if not summary.training.has_energy_by_step:
        return figure
    co2 = _line(steps, [step.co2_kg for step in steps], "y4", "--forward", "%{y:.4g} kg of CO2 so far")
    co2["line"]["dash"] = "dash"  # not told from the other by colour alone
    used_axis = {"tickformat": ".3~g", "rangemode": "tozero", "nticks": 5}
    most_co2 = max(step.co2_kg or 0.0 for step in steps)
    figure["data"] += [_line(steps, [step.kwh for step in steps], "y3", "--ink", "%{y:.4g} kWh so far"), co2]
    figure["layout"] |= {
        "height": 600,
        "xaxis": {**figure["layout"]["xaxis"], "anchor": "y3"},
        "yaxis": {"domain": [0.72, 0.96]},
        "yaxis2": {**flops_axis, "domain": [0.37, 0.61]},
        "yaxis3": {**used_axis, "domain": [0, 0.26]},
        "yaxis4": {
            **used_axis,
            "overlaying": "y3",
            "side": "right",
            "showgrid": False,
            "tickmode": "auto",
            # Where the grid's intensity does not change, both lines would else lie on each other.
            "range": [0, 1.25 * most_co2 or 1],
        },
        "annotations": [
            _panel_title("Loss", 1.0),
            _panel_title("Planned FLOP of training steps, summed", 0.65),
            _panel_title("Energy, kWh, and CO2, kg (dashed, right)", 0.3),
        ],
    }
    return figure


def selection_map(summary: Summary) -> Figure:
    """Which tensors were trained when: tensors in backward order downwards, steps to the right."""
    assert summary.training is not None
    events = evenly(summary.training.selections, SELECTIONS_SHOWN)
    chosen = [set(event.positions) for event in events]
    bars = _bars_of(summary.tensors)
    end = max(len(summary.training.steps), events[-1].step + 1)
    return {
        "data": [
            {
                "type": "heatmap",
                # Edges: a column is as wide as its selection lasted.
                "x": [*(event.step for event in events), end],
                "y": list(range(1, len(bars) + 1)),
                "z": [
                    [
                        int(bar.positions[0] in positions)
                        if len(bar.positions) == 1
                        else round(sum(place in positions for place in bar.positions) / len(bar.positions), 3)
                        for positions in chosen
                    ]
                    for bar in bars
                ],
                "zmin": 0,
                "zmax": 1,
                "colorscale": [[0, "--frozen"], [1, "--dw"]],
                "showscale": False,
                "hovertemplate": "tensor %{y} of the table<extra></extra>",
            }
        ],
        "layout": {
            "height": 420,
            "hovermode": "closest",
            "xaxis": {"title": {"text": "optimizer step"}},
            "yaxis": {
                **_depth_axis(bars),
                "title": {"text": ""},
                "range": [len(bars) + 0.5, 0.5],
            },
        },
    }


def _map(summary: Summary, values: Sequence[Sequence[float | None]], hover: Sequence[Sequence[str | None]]) -> Figure:
    """Layers to the right, from the loss to the input; kinds of tensors downwards."""
    grid = summary.grid
    columns, rows = len(grid.layers), len(grid.kinds)
    ticks = evenly(range(columns), _MOST_TICKS)
    short = [shorten(visible(_without_common_start(layer, grid.layers)), 14) for layer in grid.layers]
    return {
        # The page writes the two together over each cell.
        "layers": [text(layer) for layer in grid.layers],
        "kinds": [text(kind) for kind in grid.kinds],
        "data": [
            {
                "type": "heatmap",
                "x": list(range(columns)),
                "y": list(range(rows)),
                "z": values,
                "zmin": 0,
                "zmax": 1,
                "xgap": 1 if columns <= 64 else 0,
                "ygap": 1,
                "colorscale": [[0, "--frozen"], [1, "--dw"]],
                "showscale": False,
                "hoverongaps": False,
                "customdata": hover,
                "hovertemplate": "%{text}<br>%{customdata}<extra></extra>",
            }
        ],
        "layout": {
            "height": 90 + rows * (20 if rows <= 20 else 14),
            "hovermode": "closest",
            "xaxis": {
                "title": {"text": "layers: loss left, input right", "standoff": 8},
                "tickvals": ticks,
                "ticktext": [text(short[column]) for column in ticks],
                "tickangle": 0,
                "showgrid": False,
                "zeroline": False,
                "range": [-0.5, columns - 0.5],
            },
            "yaxis": {
                "tickvals": list(range(rows)),
                "ticktext": [text(kind, _TICK_LENGTH) for kind in grid.kinds],
                "showgrid": False,
                "zeroline": False,
                "range": [rows - 0.5, -0.5],
                "fixedrange": True,
            },
        },
    }


def _without_common_start(layer: str, layers: Sequence[str]) -> str:
    """A layer's path after the modules that all paths begin with: an axis has room for little."""
    paths = [other.split(".") for other in layers]
    common = 0
    while all(len(path) > common + 1 and path[common] == paths[0][common] for path in paths):
        common += 1
    return ".".join(layer.split(".")[common:]) or "root"


def _bars(bars: Sequence[_Bar], places: list[int], values: list[int], axis: str, label: str, colour: str) -> Figure:
    return {
        "type": "bar",
        "x": [place + 1 for place in places],
        "y": [values[place] for place in places],
        "yaxis": axis,
        "width": 0.8,
        "marker": {"color": colour},
        "customdata": [bars[place].label for place in places],
        "hovertemplate": f"%{{customdata}}<br>{label} %{{y:.3s}}FLOP<extra></extra>",
    }


def _line(steps: Sequence[StepRow], values: Sequence[float | None], axis: str, colour: str, hover: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines" if len(steps) > 1 else "markers",
        "x": [step.step for step in steps],
        "y": list(values),
        "yaxis": axis,
        "line": {"color": colour, "width": 1.75},
        "marker": {"color": colour},
        "hovertemplate": f"{hover}<extra></extra>",
    }


def _scale_top(values: Sequence[int]) -> int | None:
    """Where a scale ends that a few tensors (an embedding) would else press flat; ``None`` where none would."""
    ranked = sorted(values, reverse=True)
    if len(ranked) < 3 * _MOST_OFF_SCALE or ranked[0] <= 4 * ranked[_MOST_OFF_SCALE]:
        return None
    return ranked[_MOST_OFF_SCALE] * 5 // 4 or None


def _off_scale(values: Sequence[int], axis: str) -> list[Figure]:
    """Labels with the values of the bars that are cut."""
    top = _scale_top(values)
    if top is None:
        return []
    return [
        {
            "x": place,
            "xref": "x",
            "xanchor": "left" if place <= len(values) / 2 else "right",
            "y": top,
            "yref": axis,
            "yanchor": "top",
            "text": f"↑ {format_flops(value)}" if place <= len(values) / 2 else f"{format_flops(value)} ↑",
            "showarrow": False,
            "xshift": 4 if place <= len(values) / 2 else -4,
            "font": {"size": 11},
        }
        for place, value in enumerate(values, start=1)
        if value > top
    ]


def _flops_axis(top: int | None) -> Figure:
    axis: Figure = {"tickformat": "~s", "rangemode": "tozero", "nticks": 6}
    return axis if top is None else {**axis, "range": [0, top]}


def _depth_axis(bars: Sequence[_Bar]) -> Figure:
    """Ticks where a layer begins."""
    starts: list[tuple[int, str]] = []
    for place, bar in enumerate(bars, start=1):
        group = module_group(bar.module)
        if not starts or starts[-1][1] != group:
            starts.append((place, group))
    ticks = evenly(starts, _MOST_TICKS)
    return {
        "title": {"text": "tensors in backward order: loss left, input right", "standoff": 8},
        "tickvals": [place for place, _ in ticks],
        "ticktext": [text(".".join(group.split(".")[-2:]), 18) for _, group in ticks],
        "tickangle": 0,
        "range": [0.4, len(bars) + 0.6],
        "showgrid": False,
    }


def _panel_title(title: str, y: float) -> Figure:
    return {
        "text": title,
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "y": y,
        "yref": "paper",
        "yanchor": "top",
        "showarrow": False,
    }

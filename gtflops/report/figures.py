"""The charts, as plain data for plotly.js. A colour is the name of a CSS variable, which the page fills in."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from gtflops.report.summary import StepRow, Summary, TensorRow, evenly, module_group, shorten, visible
from gtflops.units import format_flops

Figure: TypeAlias = dict[str, Any]

#: Points of a line and columns of the selection map, so that a long training still gives a light page.
POINTS_SHOWN = 2_000
SELECTIONS_SHOWN = 200

_MOST_OFF_SCALE = 6
_MOST_TICKS = 7
_NAME_LENGTH = 70


def text(raw: str) -> str:
    """A name for plotly, which takes some tags and entities in its labels for markup."""
    shown = shorten(visible(raw), _NAME_LENGTH)
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def cost_over_depth(summary: Summary) -> Figure:
    """Cost of each tensor in backward order; with a selection, which are trained."""
    tensors = summary.tensors
    count = len(tensors)
    data: list[Figure] = []
    annotations = [_panel_title("Weight gradients, t_dw (FLOP)", 1.0)]
    annotations.append(_panel_title("Activation gradients, t_dy, and their sum (line, right)", 0.5))
    trained = [place for place, tensor in enumerate(tensors) if tensor.selected is not False]
    # A frozen tensor on the way to a deeper trained one passes its activation gradients on, so they are paid for.
    passed = range(trained[-1] + 1 if trained else 0)
    for axis, label, values, colour, paid in (
        ("y", "t_dw", [tensor.dw_flops for tensor in tensors], "--dw", set(trained)),
        ("y2", "t_dy", [tensor.dy_flops for tensor in tensors], "--dy", set(passed)),
    ):
        for places, shade in ((paid, colour), (set(range(count)) - paid, f"{colour}-soft")):
            if places:
                data.append(_bars(tensors, sorted(places), values, axis, label, shade))
        annotations += _off_scale(values, axis)
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "x": list(range(1, count + 1)),
            "y": [tensor.cumulative_dy_flops for tensor in tensors],
            "yaxis": "y3",
            "line": {"color": "--ink", "width": 1.5, "shape": "hv"},
            "hovertemplate": "t_dy so far %{y:.3s}FLOP<extra></extra>",
        }
    )
    layout: Figure = {
        "height": 520,
        "bargap": 0,
        "barmode": "overlay",
        "xaxis": {**_depth_axis(tensors), "anchor": "y2"},
        "yaxis": {**_flops_axis(_top(summary, "dw")), "domain": [0.58, 0.95]},
        "yaxis2": {**_flops_axis(_top(summary, "dy")), "domain": [0.08, 0.45]},
        "yaxis3": {
            **_flops_axis(None),
            "overlaying": "y2",
            "side": "right",
            "showgrid": False,
            "tickmode": "auto",
            "range": [0, 1.08 * max([1, *(tensor.cumulative_dy_flops for tensor in tensors)])],
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
                "customdata": [text(tensors[place].name) for place in trained],
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


def loss_and_flops(summary: Summary) -> Figure:
    """Loss and FLOPs spent, over the steps."""
    assert summary.training is not None
    steps = evenly(summary.training.steps, POINTS_SHOWN)
    return {
        "data": [
            _line(steps, [step.loss for step in steps], "y", "--dw", "loss %{y:.4g}"),
            _line(steps, [step.cumulative_planned_flops for step in steps], "y2", "--dy", "%{y:.4s}FLOP so far"),
        ],
        "layout": {
            "height": 420,
            "xaxis": {"title": {"text": "optimizer step"}, "anchor": "y2", "rangemode": "nonnegative"},
            "yaxis": {"domain": [0.58, 0.94]},
            "yaxis2": {**_flops_axis(None), "domain": [0, 0.4], "rangemode": "tozero"},
            "annotations": [_panel_title("Loss", 1.0), _panel_title("Planned FLOP of training steps, summed", 0.47)],
        },
    }


def selection_map(summary: Summary) -> Figure:
    """Which tensors were trained when: tensors in backward order downwards, steps to the right."""
    assert summary.training is not None
    events = evenly(summary.training.selections, SELECTIONS_SHOWN)
    chosen = [set(event.positions) for event in events]
    end = max(len(summary.training.steps), events[-1].step + 1)
    return {
        "data": [
            {
                "type": "heatmap",
                # Edges: a column is as wide as its selection lasted.
                "x": [*(event.step for event in events), end],
                "y": list(range(1, len(summary.tensors) + 1)),
                "z": [[int(place in positions) for positions in chosen] for place in range(len(summary.tensors))],
                "zmin": 0,
                "zmax": 1,
                "colorscale": [[0, "--frozen"], [1, "--dw"]],
                "showscale": False,
                "hovertemplate": "tensor %{y} of the table below<extra></extra>",
            }
        ],
        "layout": {
            "height": 420,
            "xaxis": {"title": {"text": "optimizer step"}},
            "yaxis": {
                **_depth_axis(summary.tensors),
                "title": {"text": ""},
                "range": [len(summary.tensors) + 0.5, 0.5],
            },
        },
    }


def _bars(
    tensors: Sequence[TensorRow], places: list[int], values: list[int], axis: str, label: str, colour: str
) -> Figure:
    return {
        "type": "bar",
        "x": [place + 1 for place in places],
        "y": [values[place] for place in places],
        "yaxis": axis,
        "width": 0.8,
        "marker": {"color": colour},
        "customdata": [text(tensors[place].name) for place in places],
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


def _top(summary: Summary, which: str) -> int | None:
    return _scale_top([getattr(tensor, f"{which}_flops") for tensor in summary.tensors])


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


def _depth_axis(tensors: Sequence[TensorRow]) -> Figure:
    """Ticks where a layer begins."""
    starts: list[tuple[int, str]] = []
    for place, tensor in enumerate(tensors, start=1):
        group = module_group(tensor.module)
        if not starts or starts[-1][1] != group:
            starts.append((place, group))
    ticks = evenly(starts, _MOST_TICKS)
    return {
        "title": {"text": "tensors in backward order: loss left, input right", "standoff": 8},
        "tickvals": [place for place, _ in ticks],
        "ticktext": [text(shorten(".".join(group.split(".")[-2:]), 18)) for _, group in ticks],
        "range": [0.4, len(tensors) + 0.6],
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

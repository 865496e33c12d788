"""A report as one HTML file that opens offline."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from gtflops.errors import InputError
from gtflops.report import figures
from gtflops.report.budgets import BudgetCurve, BudgetPoint
from gtflops.report.summary import CONVENTIONS, Cost, Summary, evenly, shape_text, share, shorten, visible
from gtflops.units import format_flops

#: A longer name is cut in the middle in tables; the whole one is in its tooltip.
_NAME_LENGTH = 120
#: Rows that are there at once; further tensors come as data, of which the page shows what is asked for.
ROWS_SHOWN = 1_000
#: Rows of the table of budgets, which the slider has in full.
_BUDGETS_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit of a column, so that its numbers align at the decimal point."""

    flops: int
    name: str

    @classmethod
    def for_values_up_to(cls, largest: int) -> "Unit":
        """The unit in which the largest value has two to four digits before the point."""
        thousands = min((len(str(largest)) - 2) // 3, 5) if largest >= 10_000 else 0
        return cls(1000**thousands, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")[thousands])

    def __call__(self, flops: int) -> str:
        if flops == 0 or self.flops == 1:
            return f"{flops:,}"
        return f"{flops / self.flops:,.3f}" if 2000 * flops >= self.flops else "<0.001"


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a stacked bar: its class, its label and its share of the whole bar in percent."""

    kind: str
    label: str
    value: str
    percent: float


@dataclass(frozen=True, slots=True)
class TensorTable:
    """The tensors as text: ``headings``, and a row of as many cells for each; the second cell is the name."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, summary: Summary) -> "TensorTable":
        tensors, selection = summary.tensors, summary.selection
        dtypes = {tensor.dtype for tensor in tensors}
        gradient = Unit.for_values_up_to(max((max(row.dw_flops, row.dy_flops) for row in tensors), default=0))
        step = Unit.for_values_up_to(summary.cost.full.all)
        headings = ["#", "Tensor", "Shape", "Parameters", "t_dw", "t_dy", "t_dy so far"]
        headings += ["Trained alone", "Of full"] if summary.has_alone else []
        headings += ["Type"] if len(dtypes) > 1 else []
        headings += ["Importance", "Trained"] if selection is not None else []
        rows = []
        for position, tensor in enumerate(tensors, start=1):
            row = [f"{position:,}", visible(tensor.name), shape_text(tensor.shape), f"{tensor.numel:,}"]
            if tensor.has_gradient:
                row += [gradient(cost) for cost in (tensor.dw_flops, tensor.dy_flops, tensor.cumulative_dy_flops)]
            else:
                row += ["no gradient", "–", "–"]
            if summary.has_alone:
                alone, of_full = tensor.alone_flops, tensor.alone_share
                row += ["–", "–"] if alone is None or not tensor.has_gradient else [step(alone), f"{of_full:.1%}"]
            row += [visible(tensor.dtype)] if len(dtypes) > 1 else []
            row += [f"{tensor.importance:.4g}", "yes" if tensor.selected else "–"] if selection is not None else []
            rows.append(tuple(row))
        units = f"t_dw and t_dy in {gradient.name}"
        units += f", steps in {step.name}" if summary.has_alone and step != gradient else ""
        same = f"; all {visible(dtypes.pop())}" if len(dtypes) == 1 else ""
        return cls(f"In backward order; {units}{same}. A heading sorts.", tuple(headings), tuple(rows))


def environment() -> jinja2.Environment:
    """Templates that escape what they are given, and fail for what they are not given."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("gtflops.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    made.filters.update(visible=visible, name=_name, shape=shape_text, exact="{:,}".format)
    return made


def render(summary: Summary) -> str:
    """The page. InputError where the packages of the extra ``report`` are missing."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError(
            "an HTML report needs plotly, which is not installed: pip install 'gtflops[report]'; "
            "reports as .md, .json and .csv need nothing more"
        ) from error

    table = TensorTable.of(summary)
    curve = summary.budgets
    return (
        environment()
        .get_template("template.html.jinja")
        .render(
            summary=summary,
            data={
                "charts": _charts(summary),
                "budgets": None if curve is None else _budgets(summary, curve),
                "rest": table.rows[ROWS_SHOWN:],
            },
            table=table,
            rows_shown=ROWS_SHOWN,
            bars_shown=figures.BARS_SHOWN,
            modules=sorted(summary.modules, key=lambda row: -row.cost.full.all)[:ROWS_SHOWN]
            if len(summary.modules) > ROWS_SHOWN
            else summary.modules,
            bought=[] if curve is None else [label for label, _ in _budget_facts(summary, curve, curve.points[0])],
            budget_rows=[] if curve is None else evenly(curve.points, _BUDGETS_SHOWN),
            conventions=CONVENTIONS,
            share=share,
            format_flops=format_flops,
            whole=whole_step(summary.cost),
            chosen=selected_step(summary),
            step_unit=Unit.for_values_up_to(summary.cost.full.all),
            plotly=Markup(get_plotlyjs()),
            nonce=_nonce(summary),
            longer_than=_NAME_LENGTH,
        )
    )


def _charts(summary: Summary) -> dict[str, figures.Figure]:
    charts = {"depth": figures.cost_over_depth(summary), "costs": figures.cost_map(summary)}
    if summary.budgets is not None:
        charts["frontier"] = figures.frontier(summary, summary.budgets)
        charts["trained"] = figures.trained_map(summary)
    if summary.training is not None and summary.training.steps:
        charts["training"] = figures.loss_and_flops(summary)
    if summary.training is not None and summary.training.selections:
        charts["selections"] = figures.selection_map(summary)
    return charts


def _budgets(summary: Summary, curve: BudgetCurve) -> dict[str, Any]:
    """What the slider shows at each budget, as text, with the tensors of each as a base64 bit set."""
    full = summary.cost.full.all
    wanted = full // 2
    if summary.selection is not None and summary.selection.budget_flops is not None:
        wanted = summary.selection.budget_flops
    points = [
        {
            "budget": f"{point.budget_flops / full:.1%}",
            "facts": [value for _, value in _budget_facts(summary, curve, point)],
            "at": [100 * point.flops / full, 100 * point.captured],
            "trains": base64.b64encode(point.trains).decode("ascii"),
        }
        for point in curve.points
    ]
    start = min(range(len(points)), key=lambda place: abs(curve.points[place].budget_flops - wanted))
    return {"points": points, "start": start, "cells": summary.grid.cells}


def _budget_facts(summary: Summary, curve: BudgetCurve, point: BudgetPoint) -> tuple[tuple[str, str], ...]:
    """Labels and values of what a budget buys."""
    positions = point.positions()
    return (
        ("Exact cost of a step", f"{format_flops(point.flops)}, {point.flops / summary.cost.full.all:.2%}"),
        *((("Importance captured", f"{point.captured:.1%}"),) if curve.bought == "importance" else ()),
        ("Tensors trained", f"{point.tensors:,} of {len(summary.tensors):,}"),
        ("Parameters trained", f"{point.numel:,} ({share(point.numel, summary.numel)})"),
        ("Deepest trained tensor", _name(summary.tensors[positions[-1]].name) if positions else "none"),
        ("Optimal", "yes, proven" if point.optimal else "not proven"),
    )


def _name(raw: str) -> str:
    return shorten(visible(raw), _NAME_LENGTH)


def _nonce(summary: Summary) -> str:
    """The mark without which the page runs no script: a name cannot hold the digest of itself."""
    return hashlib.sha256(repr(summary).encode()).hexdigest()[:32]


def whole_step(cost: Cost) -> Sequence[Segment]:
    whole = cost.full.all or 1
    return [
        Segment(kind, label, format_flops(flops.all), 100 * flops.all / whole)
        for kind, label, flops in cost.parts()[:-1]
    ]


def selected_step(summary: Summary) -> Sequence[Segment]:
    chosen = summary.selection
    if chosen is None:
        return []
    parts = (
        ("forward", "Forward pass", chosen.forward_flops),
        ("dy", "Activation gradients (dy)", chosen.dy_flops),
        ("dw", "Weight gradients (dw)", chosen.dw_flops),
    )
    return [Segment(kind, label, format_flops(flops), 100 * flops / chosen.full_flops) for kind, label, flops in parts]

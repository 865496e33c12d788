"""A report as one HTML file that opens offline."""

import hashlib
import json
from dataclasses import dataclass

from gtflops.errors import InputError
from gtflops.report import figures
from gtflops.report.summary import CONVENTIONS, Cost, Summary, shape_text, share, shorten, visible
from gtflops.units import format_flops

#: A longer name is cut in the middle in tables; the whole one is in its tooltip.
_NAME_LENGTH = 120


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


def render(summary: Summary) -> str:
    """The page. InputError where the packages of the extra ``report`` are missing."""
    try:
        import jinja2
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError(
            f"an HTML report needs {error.name}, which is not installed: pip install 'gtflops[report]'; "
            "reports as .md and .json need nothing more"
        ) from error

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gtflops.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters.update(visible=visible, name=_name, shape=shape_text, exact="{:,}".format)
    charts = {"depth": figures.cost_over_depth(summary)}
    if summary.training is not None and summary.training.steps:
        charts["training"] = figures.loss_and_flops(summary)
    if summary.training is not None and summary.training.selections:
        charts["selections"] = figures.selection_map(summary)
    gradients = [cost for row in summary.tensors for cost in (row.dw_flops, row.dy_flops)]
    return environment.get_template("template.html.jinja").render(
        summary=summary,
        charts=charts,
        conventions=CONVENTIONS,
        share=share,
        whole=_whole_step(summary.cost),
        chosen=_selected_step(summary),
        tensor_unit=Unit.for_values_up_to(max(gradients, default=0)),
        step_unit=Unit.for_values_up_to(summary.cost.full.all),
        plotly=Markup(get_plotlyjs()),
        nonce=_nonce(summary),
        longer_than=_NAME_LENGTH,
    )


def _name(raw: str) -> str:
    return shorten(visible(raw), _NAME_LENGTH)


def _nonce(summary: Summary) -> str:
    """The mark without which the page runs no script: a name cannot hold the digest of itself."""
    return hashlib.sha256(json.dumps(summary.to_json()).encode()).hexdigest()[:32]


def _whole_step(cost: Cost) -> list[Segment]:
    whole = cost.full.all or 1
    return [
        Segment(kind, label, format_flops(flops.all), 100 * flops.all / whole)
        for kind, label, flops in cost.parts()[:-1]
    ]


def _selected_step(summary: Summary) -> list[Segment]:
    chosen = summary.selection
    if chosen is None:
        return []
    parts = (
        ("forward", "Forward pass", chosen.forward_flops),
        ("dy", "Activation gradients (dy)", chosen.dy_flops),
        ("dw", "Weight gradients (dw)", chosen.dw_flops),
    )
    return [Segment(kind, label, format_flops(flops), 100 * flops / chosen.full_flops) for kind, label, flops in parts]

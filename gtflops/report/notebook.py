"""Profiles and selections as the output of a notebook's cell."""

from gtflops.profiling import Profile
from gtflops.report.html import environment, selected_step, whole_step
from gtflops.report.summary import share, summarise
from gtflops.selection import Selection
from gtflops.units import format_flops

_MODULES_SHOWN = 8


def profile_html(profile: Profile) -> str:
    """What a full step costs, and the modules where most of it goes."""
    summary = summarise(profile)
    full = summary.cost.full.all
    modules = sorted(summary.modules, key=lambda row: -row.cost.full.all)[:_MODULES_SHOWN]
    lines = [f"No price, counted as 0: {op.name}, {op.count:,} times." for op in summary.unsupported]
    if len(modules) < len(summary.modules):
        lines.insert(0, f"And {len(summary.modules) - len(modules):,} more modules: profile.report('report.html').")
    return _rendered(
        title=summary.model,
        subtitle=f"a full step costs {format_flops(full)}; {len(summary.tensors):,} tensors, "
        f"{summary.numel:,} parameters; {summary.inputs()}",
        segments=whole_step(summary.cost),
        headings=("Module", "Full step", "Share", "Forward", "Backward", "Parameters"),
        rows=[
            (
                row.name or "outside any submodule",
                format_flops(row.cost.full.all),
                share(row.cost.full.all, full),
                format_flops(row.cost.forward.all),
                format_flops((row.cost.backward + row.cost.recompute).all),
                f"{row.numel:,}",
            )
            for row in modules
        ],
        lines=lines,
    )


def selection_html(selection: Selection) -> str:
    """What is trained and what a step with it costs."""
    summary = summarise(selection.profile, selection)
    assert summary.selection is not None
    return _rendered(
        title=summary.model,
        subtitle=f"a step with this selection costs {format_flops(selection.flops)}; the bar is a full step",
        segments=selected_step(summary),
        headings=(),
        rows=summary.selection.facts(),
        lines=[],
    )


def _rendered(**values: object) -> str:
    return environment().get_template("notebook.html.jinja").render(**values)

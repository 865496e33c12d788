"""A report as Markdown (GitHub's, for the tables), with exact FLOPs."""

import re
from collections.abc import Iterable, Iterator

from gtflops.report.budgets import BudgetCurve
from gtflops.report.summary import CONVENTIONS, Summary, evenly, shape_text, share, visible

#: Rows of the tables of steps and budgets, which are a picture of the course; the JSON report has them all.
STEPS_SHOWN = 25
BUDGETS_SHOWN = 12

# Within a word, as most names have it, an underscore means nothing.
_SPECIAL = re.compile(r"[\\`*{}\[\]<>|&~$#]|(?<![^\W_])_|_(?![^\W_])")


def render(summary: Summary) -> str:
    """The whole document."""
    return "\n".join(_document(summary))


def _document(summary: Summary) -> Iterator[str]:
    yield f"# {escape(summary.model)}: what a training step costs\n"
    yield f"{summary.headline()}\n"
    yield f"Profiled on {escape(summary.inputs())}; {len(summary.tensors):,} tensors, {summary.numel:,} parameters.\n"
    yield "## What a full step costs\n"
    full = summary.cost.full
    yield from _table(
        ("Part", "FLOPs", "Share", "Matrix products", "Share of them"),
        (
            (part, f"{flops.all:,}", share(flops.all, full.all), f"{flops.matmul:,}", share(flops.matmul, full.matmul))
            for _, part, flops in summary.cost.parts()
        ),
    )
    yield "### By module\n"
    again = ("Recomputed",) if summary.cost.recompute.all else ()
    yield from _table(
        ("Module", "Forward", "Activation gradients", "Weight gradients", *again, "Full step", "Share", "Parameters"),
        (
            (
                name(row.name),
                f"{row.cost.forward.all:,}",
                f"{row.cost.dy.all:,}",
                f"{row.cost.dw.all:,}",
                *(f"{row.cost.recompute.all:,}" for _ in again),
                f"{row.cost.full.all:,}",
                share(row.cost.full.all, full.all),
                f"{row.numel:,}",
            )
            for row in summary.modules
        ),
    )
    yield "### By operator\n"
    yield from _table(
        ("Operator", "Kind", "Calls", "Forward", "Backward", "Of which matrix products", "Share of a full step"),
        (
            (
                name(row.name),
                row.kind or "no price",
                f"{row.count:,}",
                f"{row.cost.forward.all:,}",
                f"{row.cost.backward.all:,}",
                f"{row.cost.full.matmul:,}",
                share(row.cost.full.all, full.all),
            )
            for row in summary.operators
        ),
    )
    yield "### By tensor, in backward order\n"
    yield from _tensors(summary)
    if summary.budgets is not None:
        yield from _budgets(summary, summary.budgets)
    if summary.selection is not None:
        yield "## What is selected\n"
        yield from _facts(summary.selection.facts())
    if summary.training is not None:
        yield from _training(summary)
    yield from _uncertain(summary)


def _budgets(summary: Summary, curve: BudgetCurve) -> Iterator[str]:
    yield "## What a budget buys\n"
    if curve.bought == "elements":
        yield "No importances were given: this is how many elements of tensors each budget can train at most.\n"
    else:
        yield "The most importance that a step within each budget can train, with no other condition.\n"
    points = evenly(curve.points, BUDGETS_SHOWN)
    if len(points) < len(curve.points):
        yield f"{len(points)} of {len(curve.points):,} budgets:\n"
    captured = ("Importance captured",) if curve.bought == "importance" else ()
    yield from _table(
        ("Budget", "FLOPs of a step", *captured, "Tensors", "Parameters", "Share", "Proven"),
        (
            (
                share(point.budget_flops, summary.cost.full.all),
                f"{point.flops:,}",
                *(f"{point.captured:.1%}" for _ in captured),
                f"{point.tensors:,}",
                f"{point.numel:,}",
                share(point.numel, summary.numel),
                "yes" if point.optimal else "no",
            )
            for point in points
        ),
    )


def _training(summary: Summary) -> Iterator[str]:
    training = summary.training
    assert training is not None
    yield "## Training\n"
    yield from _facts(training.facts())
    steps = evenly(training.steps, STEPS_SHOWN)
    if len(steps) < len(training.steps):
        yield f"{len(steps)} of {len(training.steps):,} steps, evenly spaced:\n"
    used = ("kWh so far", "CO2 so far, kg") if training.has_energy_by_step else ()
    yield from _table(
        ("Step", "Loss", "Planned FLOPs", "Planned so far", *used),
        (
            (
                str(step.step),
                "none" if step.loss is None else f"{step.loss:.6g}",
                f"{step.planned_flops:,}",
                f"{step.cumulative_planned_flops:,}",
                *("" if value is None else f"{value:.4g}" for value in (step.kwh, step.co2_kg)[: len(used)]),
            )
            for step in steps
        ),
    )
    if training.selections:
        yield "### Selections\n"
        yield from _table(
            ("After step", "Tensors", "FLOPs of a step", "Importance captured", "Deepest tensor"),
            (
                (
                    str(event.step),
                    f"{len(event.positions):,}",
                    f"{event.flops:,}",
                    "" if event.importance_captured is None else f"{event.importance_captured:.1%}",
                    name(summary.tensors[event.positions[-1]].name) if event.positions else "none",
                )
                for event in training.selections
            ),
        )
        remarks = [(event.step, remark) for event in training.selections for remark in event.remarks]
        yield from (f"* After step {step}: {escape(remark)}" for step, remark in remarks)
        if remarks:
            yield ""


def _tensors(summary: Summary) -> Iterator[str]:
    header = ["#", "Tensor", "Shape", "Type", "Parameters", "t_dw", "t_dy", "t_dy so far"]
    if summary.has_alone:
        header += ["Trained alone", "Share"]
    if summary.selection is not None:
        header += ["Importance", "Trained"]
    rows = []
    for position, tensor in enumerate(summary.tensors, start=1):
        row = [str(position), name(tensor.name), shape_text(tensor.shape), tensor.dtype, f"{tensor.numel:,}"]
        costs = (tensor.dw_flops, tensor.dy_flops, tensor.cumulative_dy_flops)
        row += [f"{cost:,}" for cost in costs] if tensor.has_gradient else ["no gradient", "", ""]
        if summary.has_alone:
            row += [f"{tensor.alone_flops:,}", f"{tensor.alone_share:.1%}"] if tensor.has_gradient else ["", ""]
        if summary.selection is not None:
            row += [f"{tensor.importance:.4g}", "yes" if tensor.selected else "no"]
        rows.append(row)
    yield from _table(header, rows)


def _uncertain(summary: Summary) -> Iterator[str]:
    yield "## What is uncertain\n"
    if summary.unsupported:
        yield "Operators without a price, counted as 0 here; the true cost is higher:\n"
        yield from _table(
            ("Operator", "Calls", "Where"),
            (
                (name(op.name), f"{op.count:,}", ", ".join(name(module) for module in op.where))
                for op in summary.unsupported
            ),
        )
    else:
        yield "Every operator that ran has a price.\n"
    if summary.notes:
        yield from (f"* {escape(note)}" for note in summary.notes)
        yield ""
    yield "### Conventions\n"
    yield from (f"* {escape(convention)}" for convention in CONVENTIONS)
    yield ""
    made_by = ", ".join(f"{package} {version}" for package, version in summary.versions.items())
    yield f"Made by {escape(made_by)}.\n"


def _facts(facts: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield from (f"* {label}: {escape(value)}" for label, value in facts)
    yield ""


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    header = list(header)
    yield f"| {' | '.join(header)} |"
    yield f"|{'|'.join(' :-- ' if column == 0 else ' --: ' for column in range(len(header)))}|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def escape(text: str) -> str:
    """Text that Markdown and a table's cell take for itself.

    >>> escape("a|b <i>")
    'a&#124;b &#60;i&#62;'
    """
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", visible(text))


def name(text: str) -> str:
    """A name as code, or as text where it holds a bar or a backtick, which code in a table cannot everywhere."""
    text = visible(text)
    if not text.strip():
        return "outside any submodule"
    return escape(text) if "|" in text or "`" in text else f"`{text}`"

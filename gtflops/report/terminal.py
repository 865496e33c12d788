"""Tables for a terminal; printing them is the caller's."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from gtflops.curve import Frontier
from gtflops.operators import Entry
from gtflops.profiling import Profile
from gtflops.report.summary import CompiledSummary, share, shorten, summarise, visible
from gtflops.selection import Selection
from gtflops.units import Unit, format_exactly, format_flops, format_seconds

if TYPE_CHECKING:
    from gtflops.verification import Verification

_NAME_LENGTH = 120
_NUMBER_WIDTH = len("100.0%")
_MOST_EXPLANATIONS = 12


def profile_tables(profile: Profile, top: int = 10, unit: Unit = Unit.FLOPS) -> Group:
    """Totals, the ``top`` tensors with the most expensive gradients, and the ``top`` operators; what is uncertain."""
    summary = summarise(profile)
    full = summary.cost.full
    totals = _table(
        f"{summary.model}: a full training step", "Part", f"{unit.symbol}s", "Share", "Matrix products", "Share"
    )
    for _, part, flops in summary.cost.parts():
        totals.add_row(
            part,
            format_flops(flops.all, unit),
            share(flops.all, full.all),
            format_flops(flops.matmul, unit),
            share(flops.matmul, full.matmul),
            style="bold" if flops == full else "",
        )
    of = f"{len(summary.tensors):,} tensors, {summary.numel:,} parameters"
    totals.caption = Text(f"{format_exactly(full.all, unit)} {unit.symbol}; {of}")

    tensors = _table(
        f"Most expensive tensors, {min(top, len(summary.tensors))} of {len(summary.tensors):,}",
        "Tensor",
        "t_dw",
        "t_dy",
        "Trained alone",
    )
    for tensor in sorted(summary.tensors, key=lambda tensor: -(tensor.dw_flops + tensor.dy_flops))[:top]:
        costs = (tensor.dw_flops, tensor.dy_flops, tensor.alone_flops)
        tensors.add_row(_name(tensor.name), *("" if cost is None else format_flops(cost, unit) for cost in costs))

    again = ("Recomputed",) if summary.cost.recompute.all else ()
    operators = _table(
        f"Operators, {min(top, len(summary.operators))} of {len(summary.operators)}",
        "Operator",
        "Calls",
        "Forward",
        "Backward",
        *again,
        "Share",
    )
    for row in summary.operators[:top]:
        operators.add_row(
            _name(row.name),
            f"{row.count:,}",
            format_flops(row.cost.forward.all, unit),
            format_flops(row.cost.backward.all, unit),
            *(format_flops(row.cost.recompute.all, unit) for _ in again),
            share(row.cost.full.all, full.all),
        )
    compiled = () if summary.compiled is None else ("", _compiled_table(summary.compiled, unit))
    uncertain = _uncertain(profile)
    if summary.compiled is not None:
        for name, count in summary.compiled.unsupported.items():
            line = f"no price: {visible(name)}, {count:,} times, in the compiled graphs; counted as 0 there"
            uncertain.append(Text(line, style="bold red"))
    return Group(totals, *compiled, "", tensors, "", operators, *uncertain)


def _uncertain(profile: Profile) -> list[Text]:
    """What was assumed, and what has no price."""
    lines = [Text(f"note: {visible(note)}", style="dim") for note in profile.notes]
    for op in profile.unsupported:
        where = ", ".join(visible(module) or "no submodule" for module in op.where)
        line = f"no price: {visible(op.name)}, {op.count:,} times, in {where}; counted as 0 here"
        lines.append(Text(line, style="bold red"))
    return lines


def step_table(whole: Profile, profile: Profile, trained: Iterable[str], wish: str, unit: Unit = Unit.FLOPS) -> Group:
    """A step that trains some tensors of ``profile`` beside the full step of ``whole``; ``wish`` says which."""
    mask = profile.mask(trained)
    table = _table(None, "Part", "This step", "Full step", "Share of full")
    step, full = profile.step_flops(mask), whole.step_flops("all")
    for part in ("forward", "backward", "recompute", "total"):
        cost, of = getattr(step, part), getattr(full, part)
        if part == "recompute" and not cost and not of:
            continue
        flops = (format_flops(cost, unit), format_flops(of, unit))
        table.add_row(part.capitalize(), *flops, share(cost, of), style="bold" if part == "total" else "")
    numel = sum(tensor.numel for tensor, chosen in zip(profile.tensors, mask, strict=True) if chosen)
    all_numel = sum(tensor.numel for tensor in whole.tensors)
    exact = (
        f"{format_exactly(step.total, unit)} of {format_exactly(full.total, unit)} {unit.symbol}; "
        f"trained {mask.sum():,} tensors, {numel:,} parameters, in full {len(whole.names):,} and {all_numel:,}"
    )
    return Group(_title(f"{whole.graph.model}: a step that trains {wish}"), table, Text(exact), *_uncertain(profile))


def _compiled_table(compiled: CompiledSummary, unit: Unit) -> Table:
    """The eager prediction and what torch.compile would run, side by side."""
    trained = f"{compiled.tensors:,} of {compiled.all_tensors:,} tensors trained"
    table = _table(
        f"Eager and torch.compile, {trained}", "Part", "Eager", "Compiled", "Matrix products, eager", "Compiled"
    )
    for part, eager, priced in compiled.parts:
        columns = (eager.all, priced.all, eager.matmul, priced.matmul)
        table.add_row(
            part, *(format_exactly(flops, unit) for flops in columns), style="bold" if part == "total" else ""
        )
    table.caption = Text(
        f"Forward graphs: {compiled.graphs:,}, before fusion; recompute: forward operators run again in backward"
    )
    return table


def selection_table(selection: Selection, unit: Unit = Unit.FLOPS) -> Table:
    """What is trained and what a step with it costs."""
    summary = summarise(selection.profile, selection)
    assert summary.selection is not None
    table = Table(title=_title("Selection"), box=box.SIMPLE_HEAD, title_justify="left", show_header=False)
    table.add_column(style="dim", min_width=12)
    table.add_column(overflow="fold")
    for label, value in summary.selection.facts(unit):
        table.add_row(label, _name(value))
    return table


def frontier_table(frontier: Frontier, unit: Unit = Unit.FLOPS) -> Table:
    """What each budget buys, a row each."""
    problem, profile = frontier.problem, frontier.problem.profile
    time = () if profile.nanoseconds is None else ("Time",)
    table = _table(
        f"{profile.graph.model}: importance at each budget",
        "Budget",
        f"{unit.symbol}s",
        "Share",
        *time,
        "Importance captured",
        "Tensors",
        "Proved",
    )
    for budget, selection in zip(frontier.budgets.tolist(), frontier, strict=True):
        proved = "yes"
        if not selection.optimal:
            proved = f"within {share(selection.upper_bound - selection.value, selection.value)}"
        table.add_row(
            f"{budget / problem.full:.4f}",
            format_flops(selection.flops, unit),
            share(selection.flops, profile.full_flops),
            *(format_seconds(selection.seconds or 0.0) for _ in time),
            f"{selection.importance_captured:.2%}",
            f"{len(selection.names):,}",
            proved,
        )
    full = format_flops(problem.full, unit) if problem.cost == "flops" else format_seconds(problem.full / 1e9)
    table.caption = Text(f"Budget: share of a full step, {full}; {len(profile.tensors):,} tensors")
    return table


def verification_tables(profile: Profile, found: "Verification", unit: Unit = Unit.FLOPS) -> Group:
    """What was predicted and what three others counted, for each selection; differences in words."""
    table = _table(
        f"{profile.graph.model}: {unit.symbol}s of a step, predicted and executed",
        "Selection",
        "Tensors",
        "Predicted",
        "Executed",
        "Products",
        "PyTorch's",
    )
    for check in found.checks:
        executed = Text("equal", style="green")
        if not check.exact:
            executed = Text(_difference(check.executed - check.predicted, unit), style="bold red")
        by_pytorch = "equal"
        if check.pytorch != check.predicted_matmul:
            by_pytorch = (
                "failed" if check.pytorch is None else _difference(check.pytorch - check.predicted_matmul, unit)
            )
        table.add_row(
            _name(check.selection),
            f"{check.tensors:,}",
            format_exactly(check.predicted, unit),
            executed,
            format_exactly(check.predicted_matmul, unit),
            by_pytorch,
        )
    table.caption = "Products: matrix products and convolutions. PyTorch's: what its own counter says of those."
    explained = found.explanations()
    lines = [Text(f"- {visible(line)}") for line in explained[:_MOST_EXPLANATIONS]]
    if len(explained) > _MOST_EXPLANATIONS:
        lines.append(Text(f"- and {len(explained) - _MOST_EXPLANATIONS:,} more differences; --json lists all"))
    fvcore = found.fvcore
    if fvcore.flops is None:
        lines.append(Text(f"fvcore could not count the forward pass: {visible(fvcore.problem)}"))
    else:
        lines.append(
            Text(
                f"Forward pass, matrix products and convolutions: {format_exactly(found.forward_matmul, unit)} "
                f"predicted, {format_exactly(fvcore.flops, unit)} by fvcore{_AS_FLOPS[unit]}"
            )
        )
        if fvcore.skipped:
            skipped = ", ".join(f"{visible(op)} {count:,} times" for op, count in sorted(fvcore.skipped.items()))
            lines.append(Text(f"fvcore skipped: {skipped}", style="dim"))
    lines += [Text(f"note: {visible(note)}", style="dim") for note in found.notes]
    return Group(table, *lines)


#: What fvcore counts is MACs.
_AS_FLOPS = {Unit.FLOPS: " (MACs x 2)", Unit.MACS: ""}


def _difference(flops: int, unit: Unit) -> str:
    return f"{'+' if flops > 0 else ''}{format_exactly(flops, unit)}"


def operators_table(entries: Iterable[Entry]) -> Table:
    """The operator table itself: what is priced, how, and from where the formula is."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    for header, ratio in (("Operators", 4), ("Class", 1), ("FLOPs", 3), ("Source", 2)):
        table.add_column(header, overflow="fold", ratio=ratio)
    for entry in entries:
        names = " ".join(op.removeprefix("aten.") for op in entry.ops)
        table.add_row(Text(names), str(entry.kind), Text(entry.text), Text(entry.source))
    table.caption = Text(
        "x, y: elements that go in and that come out; other letters are sizes. What follows 'other:', and all of the "
        "classes that make no products, stands in the column of everything else."
    )
    return table


def used_operators_table(profile: Profile, kind: str | None = None, unit: Unit = Unit.FLOPS) -> Group:
    """What a full step of a model uses of the operator table; what has no price stands first."""
    summary = summarise(profile)
    full = summary.cost.full.all
    table = _table(
        f"{summary.model}: operators of a full training step",
        "Operator",
        "Class",
        "Forward",
        "Backward",
        "Matrix products",
        "Other",
        "Share",
    )
    table.columns[1].justify = "left"
    unpriced = [row for row in summary.operators if row.kind is None]
    priced = [row for row in summary.operators if row.kind is not None and kind in (None, row.kind)]
    for row in unpriced:
        calls = (f"{row.forward_count:,}", f"{row.count - row.forward_count:,}")
        table.add_row(_name(row.name), "no price", *calls, "unknown", "unknown", "unknown", style="bold red")
    for row in priced:
        flops = row.cost.full
        table.add_row(
            _name(row.name),
            row.kind,
            f"{row.forward_count:,}",
            f"{row.count - row.forward_count:,}",
            format_flops(flops.matmul, unit),
            format_flops(flops.other, unit),
            share(flops.all, full),
        )
    if not unpriced:
        return Group(table, Text("Every operator has a price or does no floating-point work."))
    warning = (
        f"{len(unpriced)} operators have no price, so what the step costs is not known; "
        "gtflops.register_flops gives them one."
    )
    return Group(table, Text(warning, style="bold red"))


def _table(title: str | None, first: str, *numbers: str) -> Table:
    table = Table(
        title=None if title is None else _title(title),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        padding=(0, 1, 0, 0),
    )
    table.add_column(first, overflow="fold")
    for header in numbers:
        # On a narrow terminal names are folded rather than numbers and headings.
        widest = max(_NUMBER_WIDTH, *map(len, header.split()))
        table.add_column(header, justify="right", overflow="fold", min_width=widest)
    return table


def _title(title: str) -> Text:
    return Text(shorten(visible(title), _NAME_LENGTH), style="bold")


def _name(name: str) -> Text:
    """A name from the model: shown as it is, markup and escape sequences included."""
    return Text(shorten(visible(name), _NAME_LENGTH))

"""Everything a report says, computed once; the renderers only lay it out."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gtflops.compiled import CompiledStep
from gtflops.errors import InputError
from gtflops.graph import GETITEM, Phase
from gtflops.operators import TensorType, lookup
from gtflops.profiling import Profile, UnsupportedOperator
from gtflops.report.budgets import BudgetCurve
from gtflops.report.grid import Grid
from gtflops.selection import Selection
from gtflops.units import FLOPS_PER_MAC, Unit, format_exactly, format_flops, format_seconds

if TYPE_CHECKING:
    from gtflops.training.energy import Energy
    from gtflops.training.records import TrainingLog

Item = TypeVar("Item")

FORMAT = "gtflops-report"
FORMAT_VERSION = 2

#: With more tensors, what a step costs that trains one alone would take longer than all else of a report.
_MOST_ALONE = 5_000

CONVENTIONS = (
    f"A FLOP is one floating-point addition or multiplication; a multiply-add (MAC) is {FLOPS_PER_MAC} FLOPs.",
    "All operators: everything that the operator table prices. Matrix products: only matrix products and "
    "convolutions, the convention of PyTorch's own FLOP counter.",
    "Weight gradients (dw): backward operators that exactly one tensor's gradient needs. Activation gradients (dy): "
    "those that several tensors' gradients need, or that run whatever is trained.",
    "Recomputed forward: what activation checkpointing runs once more in the backward pass; part of the full step, "
    "and of t_dw and t_dy.",
    "Backward order: tensors from the loss towards the input, by when their gradient becomes computable.",
    "t_dy of a tensor: activation gradients that it adds to what the tensors nearer to the loss already need. "
    "Trained alone: the exact cost of a step in which only this tensor is trained.",
    "Importance of a tensor: the sum over its elements of -(weight change of the optimizer) x (gradient), a "
    "first-order estimate of the drop in loss.",
    "Optimizer updates, communication and data loading are not counted.",
)


@dataclass(frozen=True, slots=True)
class Columns:
    """FLOPs of matrix products, and of everything else."""

    matmul: int = 0
    other: int = 0

    @property
    def all(self) -> int:
        return self.matmul + self.other

    def __add__(self, added: "Columns") -> "Columns":
        return Columns(self.matmul + added.matmul, self.other + added.other)

    def to_json(self) -> dict[str, int]:
        return {"all": self.all, "matmul": self.matmul}


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs of a full step, or of a part of the model in it."""

    forward: Columns = Columns()
    dy: Columns = Columns()
    dw: Columns = Columns()
    recompute: Columns = Columns()

    @property
    def backward(self) -> Columns:
        return self.dy + self.dw

    @property
    def full(self) -> Columns:
        return self.forward + self.backward + self.recompute

    def __add__(self, added: "Cost") -> "Cost":
        return Cost(
            self.forward + added.forward, self.dy + added.dy, self.dw + added.dw, self.recompute + added.recompute
        )

    def parts(self) -> tuple[tuple[str, str, Columns], ...]:
        """A name, a label and FLOPs of each part, the full step last; recomputation only where there is some."""
        again = (("recompute", "Recomputed forward", self.recompute),) if self.recompute.all else ()
        return (
            ("forward", "Forward pass", self.forward),
            ("dy", "Activation gradients (dy)", self.dy),
            ("dw", "Weight gradients (dw)", self.dw),
            *again,
            ("full", "Full step", self.full),
        )

    def to_json(self) -> dict[str, dict[str, int]]:
        names = ("forward", "dy", "dw", "backward", "recompute", "full")
        return {name: getattr(self, name).to_json() for name in names}


@dataclass(frozen=True, slots=True)
class OperatorCost:
    """An operator of the full step; ``kind`` is ``None`` where it has no price.

    ``forward_count`` of its ``count`` calls are in the forward pass.
    """

    name: str
    kind: str | None
    count: int
    forward_count: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class ModuleCost:
    """A layer, or another part of the model near its root; the empty name is what runs outside any submodule."""

    name: str
    numel: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class TensorRow:
    """A tensor in backward order; ``selected`` and ``importance`` are ``None`` without a selection, ``alone_flops`` and
    ``alone_share`` in models of very many tensors."""

    name: str
    module: str
    shape: tuple[int, ...]
    numel: int
    dtype: str
    dw_flops: int
    dy_flops: int
    cumulative_dy_flops: int
    alone_flops: int | None
    alone_share: float | None
    has_gradient: bool
    selected: bool | None
    importance: float | None


@dataclass(frozen=True, slots=True)
class SelectionSummary:
    """What is trained, and what a step with it costs: ``forward + dy + dw == flops``."""

    tensors: int
    all_tensors: int
    numel: int
    all_numel: int
    deepest: str | None
    budget_flops: int | None
    budget_seconds: float | None
    full_flops: int
    forward_flops: int
    dy_flops: int
    dw_flops: int
    flops: int
    seconds: float | None
    full_seconds: float | None
    value: float
    upper_bound: float
    optimal: bool
    importance_captured: float
    partial: tuple[str, ...]
    """Uses of tensors that are not trained through all of their uses."""

    def facts(self, unit: Unit = Unit.FLOPS) -> tuple[tuple[str, str], ...]:
        """Labels and values, as every renderer prints them."""
        if self.budget_flops is not None:
            budget = (
                f"{self.budget_flops / self.full_flops:.2%} of a full step, {format_flops(self.budget_flops, unit)}"
            )
        else:
            assert self.budget_seconds is not None
            budget = self._share_of_time(self.budget_seconds)
        cost = f"{format_exactly(self.flops, unit)} {unit.symbol}"
        measured = () if self.seconds is None else (("Measured time of a step", self._share_of_time(self.seconds)),)
        return (
            ("Budget", budget),
            ("Exact cost of a step", f"{cost}, {self.flops / self.full_flops:.2%} of a full step"),
            *measured,
            ("Tensors trained", f"{self.tensors:,} of {self.all_tensors:,}"),
            ("Parameters trained", f"{self.numel:,} of {self.all_numel:,} ({self.numel / self.all_numel:.1%})"),
            *((("By a partial gradient", ", ".join(map(visible, self.partial))),) if self.partial else ()),
            ("Deepest trained tensor", "none" if self.deepest is None else visible(self.deepest)),
            ("Importance selected", f"{self.value:.6g}"),
            ("Importance captured", f"{self.importance_captured:.2%} of all positive importance"),
            ("Upper bound", f"{self.upper_bound:.6g}, for any selection under these conditions"),
            ("Optimal", "yes, proven" if self.optimal else "not proven; the upper bound says how much may be missing"),
        )

    def _share_of_time(self, seconds: float) -> str:
        return f"{format_seconds(seconds)}, {share(seconds, self.full_seconds or 0.0)} of the time of a full step"


@dataclass(frozen=True, slots=True)
class CompiledSummary:
    """A step under ``torch.compile`` beside the eager prediction for the same tensors: (part, eager, compiled)."""

    tensors: int
    all_tensors: int
    graphs: int
    parts: tuple[tuple[str, Columns, Columns], ...]
    unsupported: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "tensors": self.tensors,
            "all_tensors": self.all_tensors,
            "graphs": self.graphs,
            "flops": {
                part: {"eager": eager.to_json(), "compiled": compiled.to_json()} for part, eager, compiled in self.parts
            },
            "unsupported": dict(self.unsupported),
        }


@dataclass(frozen=True, slots=True)
class SelectionEvent:
    """A selection made in training, after ``step`` steps; ``positions`` in backward order of what it trains."""

    step: int
    positions: tuple[int, ...]
    flops: int
    importance_captured: float | None
    """``None`` where the tensors were not selected by importance."""
    seconds: float
    reason: str | None
    """Why it was this one, where there was a choice besides the tensors."""
    partial: tuple[str, ...]
    """Uses of tensors that are not trained through all of their uses."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What there is to say of it in words."""
        return remarks(self.reason, self.partial)


@dataclass(frozen=True, slots=True)
class StepRow:
    """An optimizer step; ``loss`` is ``None`` where it was not finite or not observed."""

    step: int
    loss: float | None
    planned_flops: int
    cumulative_planned_flops: int
    executed_flops: int | None
    seconds: float | None
    predicted_drop: float | None
    """What the loss was to fall by, to first order; ``None`` in steps that were not checked."""
    real_drop: float | None
    kwh: float | None
    """What the run had used by the end of the step; ``None`` where that was not measured."""
    co2_kg: float | None


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """The training log; ``executed_flops`` is ``None`` unless every step was counted.

    ``stopped`` says why it ended before its last step, ``energy`` what it took, where that was measured.
    """

    steps: tuple[StepRow, ...]
    selections: tuple[SelectionEvent, ...]
    planned_flops: int
    executed_flops: int | None
    measuring_flops: int
    seconds: float
    stopped: str | None
    energy: "Energy | None"

    @property
    def has_energy_by_step(self) -> bool:
        """Whether some step says what the run had used by then."""
        return any(step.kwh is not None for step in self.steps)

    def facts(self) -> tuple[tuple[str, str], ...]:
        """Labels and values, as every renderer prints them."""
        losses = [step.loss for step in self.steps if step.loss is not None]
        executed = "not counted" if self.executed_flops is None else f"{self.executed_flops:,} FLOP"
        return (
            ("Steps", f"{len(self.steps):,}"),
            ("Loss, first and last step", f"{losses[0]:.4g}, {losses[-1]:.4g}" if losses else "none"),
            ("Training steps, planned", f"{self.planned_flops:,} FLOP"),
            ("Training steps, executed", executed),
            ("Selections", f"{len(self.selections):,}{self._measuring()}"),
            *self._drop(),
            ("Time", format_seconds(self.seconds)),
            *self._energy(),
            *(() if self.stopped is None else (("Ended early", self.stopped),)),
        )

    def _measuring(self) -> str:
        return f", measured with {format_flops(self.measuring_flops)} on top" if self.measuring_flops else ""

    def _drop(self) -> tuple[tuple[str, str], ...]:
        drops = [
            (step.predicted_drop, step.real_drop)
            for step in self.steps
            if step.predicted_drop is not None and step.real_drop is not None
        ]
        if not drops:
            return ()
        predicted, real = map(sum, zip(*drops, strict=True))
        said = f"{predicted:.4g}, {real:.4g}, summed over the steps that checked: {len(drops)}"
        return (("Drop of the loss, predicted and real", said),)

    def _energy(self) -> tuple[tuple[str, str], ...]:
        if self.energy is None:
            return ()
        used = self.energy
        return (
            ("Energy, estimated", f"{used.kwh:.4g} kWh; {used.method}"),
            ("CO2, estimated", f"{used.co2_kg:.4g} kg, at {used.intensity:.4g} g/kWh"),
        )


@dataclass(frozen=True)
class Summary:
    """A report. ``tensors`` stand in backward order, ``operators`` by falling cost, ``modules`` as they first run."""

    model: str
    batch: Mapping[str, TensorType]
    cost: Cost
    operators: tuple[OperatorCost, ...]
    modules: tuple[ModuleCost, ...]
    tensors: tuple[TensorRow, ...]
    selection: SelectionSummary | None
    training: TrainingSummary | None
    notes: tuple[str, ...]
    unsupported: tuple[UnsupportedOperator, ...]
    versions: Mapping[str, str]
    compiled: CompiledSummary | None
    budgets: BudgetCurve | None = None

    @property
    def numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @cached_property
    def grid(self) -> Grid:
        """Where each tensor lies in maps of the model."""
        return Grid.of([tensor.name for tensor in self.tensors])

    @property
    def has_alone(self) -> bool:
        """Whether the tensors say what a step costs that trains them alone."""
        return len(self.tensors) <= _MOST_ALONE

    def headline(self) -> str:
        """The answer in one sentence."""
        full = self.cost.full.all
        return (
            f"One full training step costs {format_flops(full)} ({full:,}): "
            f"{share(self.cost.forward.all, full)} forward pass, {share(self.cost.dy.all, full)} activation gradients, "
            f"{share(self.cost.dw.all, full)} weight gradients"
            + (f", {share(self.cost.recompute.all, full)} recomputed forward" if self.cost.recompute.all else "")
            + ". Matrix products are "
            f"{share(self.cost.full.matmul, full)} of it."
        )

    def inputs(self) -> str:
        """The batch that was profiled."""
        return ", ".join(
            f"{visible(name)}: {shape_text(tensor.shape)} {tensor.dtype}" for name, tensor in self.batch.items()
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, versioned."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "model": self.model,
            "batch": {
                name: {"shape": list(tensor.shape), "dtype": tensor.dtype} for name, tensor in self.batch.items()
            },
            "flops": self.cost.to_json(),
            "operators": [
                {
                    "name": row.name,
                    "kind": row.kind,
                    "count": row.count,
                    "forward_count": row.forward_count,
                    "flops": row.cost.to_json(),
                }
                for row in self.operators
            ],
            "modules": [{"name": row.name, "numel": row.numel, "flops": row.cost.to_json()} for row in self.modules],
            "tensors": [{**_fields(row), "shape": list(row.shape)} for row in self.tensors],
            "compiled": None if self.compiled is None else self.compiled.to_json(),
            "budgets": None if self.budgets is None else self._budgets_json(self.budgets),
            "selection": None
            if self.selection is None
            else {**_fields(self.selection), "partial": list(self.selection.partial)},
            "training": None if self.training is None else self._training_json(self.training),
            "notes": list(self.notes),
            "unsupported": [{"name": op.name, "count": op.count, "where": list(op.where)} for op in self.unsupported],
            "versions": dict(self.versions),
            "conventions": list(CONVENTIONS),
        }

    @staticmethod
    def _budgets_json(curve: BudgetCurve) -> dict[str, Any]:
        points = [{**_fields(point), "trains": point.positions()} for point in curve.points]
        return {"bought": curve.bought, "points": points}

    def _training_json(self, training: TrainingSummary) -> dict[str, Any]:
        return {
            **_fields(training),
            "energy": None if training.energy is None else asdict(training.energy),
            "steps": [_fields(step) for step in training.steps],
            "selections": [
                {
                    "step": event.step,
                    "names": [self.tensors[position].name for position in event.positions],
                    "flops": event.flops,
                    "importance_captured": event.importance_captured,
                    "seconds": event.seconds,
                    "reason": event.reason,
                    "partial": list(event.partial),
                }
                for event in training.selections
            ],
        }


def summarise(profile: Profile, selection: Selection | None = None, log: "TrainingLog | None" = None) -> Summary:
    """One pass over the graph of a profile, with what was selected and trained if it is given.

    ``budgets``, which takes longer than all else, is left to who needs it: :func:`gtflops.report.budgets.budget_curve`.
    """
    if selection is None and log is not None and log.selections:
        selection = log.selections[-1].selection
    given = [] if selection is None else [selection]
    given += [] if log is None else [record.selection for record in log.selections if record.selection is not None]
    for other in given:
        if other.profile.names != profile.names:
            raise InputError(
                f"a selection is of a profile of {other.profile.graph.model} with {len(other.profile.names)} tensors, "
                f"expected one of {profile.graph.model} with the same {len(profile.names)} tensors"
            )
    operators, modules = _by_operator_and_module(profile)
    cost = sum((row.cost for row in operators), Cost())
    return Summary(
        model=profile.graph.model,
        batch=profile.graph.batch,
        cost=cost,
        operators=operators,
        modules=modules,
        tensors=_tensors(profile, selection),
        selection=None if selection is None else _selection(profile, selection),
        training=None if log is None else _training(profile, log),
        notes=profile.notes,
        unsupported=profile.unsupported,
        versions=profile.versions,
        compiled=None if profile.compiled is None else _compiled(profile, profile.compiled),
    )


def _compiled(profile: Profile, compiled: CompiledStep) -> CompiledSummary:
    step = profile.step_flops(compiled.trainable)
    products = profile.step_flops(compiled.trainable, ops="matmul")
    parts = (
        ("forward", _columns(step.forward, products.forward), Columns(*compiled.forward)),
        ("backward", _columns(step.backward, products.backward), Columns(*compiled.backward)),
        ("recompute", _columns(step.recompute, products.recompute), Columns(*compiled.recompute)),
    )
    of_eager = sum((eager for _, eager, _ in parts), Columns())
    of_compiled = sum((priced for _, _, priced in parts), Columns())
    return CompiledSummary(
        tensors=len(compiled.trainable),
        all_tensors=len(profile.names),
        graphs=compiled.graphs,
        parts=(*parts, ("total", of_eager, of_compiled)),
        unsupported=compiled.unsupported,
    )


def _columns(everything: int, matmul: int) -> Columns:
    return Columns(matmul, everything - matmul)


def _by_operator_and_module(profile: Profile) -> tuple[tuple[OperatorCost, ...], tuple[ModuleCost, ...]]:
    nodes = profile.graph.nodes
    needed = profile.needed_by
    adding = {index for _, sums in profile.graph.uses for index in sums}
    counts: Counter[str] = Counter()
    forward_counts: Counter[str] = Counter()
    by_operator: dict[str, Cost] = {}
    by_module: dict[str, Cost] = {}
    for index, node in enumerate(nodes):
        flops = Columns(int(profile.prices[0, index]), int(profile.prices[1, index]))
        if node.phase is Phase.FORWARD:
            cost = Cost(forward=flops)
        elif node.phase is Phase.RECOMPUTE and needed[index]:
            cost = Cost(recompute=flops)
        elif index in adding:
            cost = Cost(dy=flops)
        elif node.phase is Phase.BACKWARD and needed[index]:
            of_one_tensor = needed[index].bit_count() == 1 and not needed[index] >> len(profile.names)
            cost = Cost(dw=flops) if of_one_tensor else Cost(dy=flops)
        else:
            continue
        # An operator priced by output carries its price on the nodes that pick its outputs.
        picks = node.call.op == GETITEM
        op = nodes[node.inputs[0]].call.op if picks else node.call.op
        counts[op] += not picks
        forward_counts[op] += not picks and node.phase is Phase.FORWARD
        by_operator[op] = by_operator.get(op, Cost()) + cost
        group = module_group(node.module)
        by_module[group] = by_module.get(group, Cost()) + cost
    numel: dict[str, int] = {}
    for tensor in profile.tensors:
        group = module_group(tensor.module)
        numel[group] = numel.get(group, 0) + tensor.numel
    operators = (
        OperatorCost(op, _kind(profile, op), counts[op], forward_counts[op], cost) for op, cost in by_operator.items()
    )
    return (
        tuple(sorted(operators, key=lambda row: (-row.cost.full.all, row.name))),
        tuple(ModuleCost(group, numel.get(group, 0), cost) for group, cost in by_module.items()),
    )


def _kind(profile: Profile, op: str) -> str | None:
    """The class of an operator, ``None`` where the profile has no price for it. What the table says now may differ
    from what it said when the profile was made."""
    if any(op == unsupported.name for unsupported in profile.unsupported):
        return None
    entry = lookup(op)
    return "registered elsewhere" if entry is None else str(entry.kind)


def module_group(module: str) -> str:
    """The layer that a module is part of, else the first two names of its path.

    >>> module_group("model.layers.3.mlp.up_proj"), module_group("model.embed_tokens"), module_group("lm_head")
    ('model.layers.3', 'model.embed_tokens', 'lm_head')
    """
    parts = module.split(".")
    end = next((position for position, part in enumerate(parts, start=1) if part.isdigit()), 2)
    return ".".join(parts[:end])


def _tensors(profile: Profile, selection: Selection | None) -> tuple[TensorRow, ...]:
    alone = profile.alone_flops.tolist() if len(profile.tensors) <= _MOST_ALONE else None
    return tuple(
        TensorRow(
            name=tensor.name,
            module=tensor.module,
            shape=tensor.shape,
            numel=tensor.numel,
            dtype=tensor.dtype,
            dw_flops=tensor.dw_flops,
            dy_flops=tensor.dy_flops,
            cumulative_dy_flops=cumulative,
            alone_flops=None if alone is None else alone[position],
            alone_share=None if alone is None else alone[position] / (profile.full_flops or 1),
            has_gradient=tensor.has_gradient,
            selected=None if selection is None else bool(selection.mask[position]),
            importance=None if selection is None else float(selection.importance[tensor.name]),
        )
        for position, (tensor, cumulative) in enumerate(
            zip(profile.tensors, accumulate(tensor.dy_flops for tensor in profile.tensors), strict=True)
        )
    )


def _selection(profile: Profile, selection: Selection) -> SelectionSummary:
    chosen = [tensor for tensor, selected in zip(profile.tensors, selection.mask, strict=True) if selected]
    dw = profile.own_flops(selection.mask)
    step = profile.step_flops(selection.mask)
    backward = step.backward + step.recompute
    return SelectionSummary(
        tensors=len(chosen),
        all_tensors=len(profile.tensors),
        numel=sum(tensor.numel for tensor in chosen),
        all_numel=sum(tensor.numel for tensor in profile.tensors),
        deepest=chosen[-1].name if chosen else None,
        budget_flops=selection.budget_flops,
        budget_seconds=selection.budget_seconds,
        full_flops=profile.full_flops,
        forward_flops=selection.flops - backward,  # with reuse, on average
        dy_flops=backward - dw,
        dw_flops=dw,
        flops=selection.flops,
        seconds=selection.seconds,
        full_seconds=None if profile.nanoseconds is None else profile.step_seconds("all"),
        value=selection.value,
        upper_bound=selection.upper_bound,
        optimal=selection.optimal,
        importance_captured=selection.importance_captured,
        partial=selection.partial,
    )


def _training(profile: Profile, log: "TrainingLog") -> TrainingSummary:
    return TrainingSummary(
        steps=tuple(
            StepRow(
                step=step.step,
                loss=_finite(step.loss),
                planned_flops=step.planned_flops,
                cumulative_planned_flops=cumulative,
                executed_flops=step.executed_flops,
                seconds=step.seconds,
                predicted_drop=_finite(step.predicted_drop),
                real_drop=_finite(step.real_drop),
                kwh=step.kwh,
                co2_kg=step.co2_kg,
            )
            for step, cumulative in zip(log.steps, accumulate(step.planned_flops for step in log.steps), strict=True)
        ),
        selections=tuple(
            SelectionEvent(
                step=record.step,
                positions=tuple(int(position) for position in np.flatnonzero(profile.mask(record.names))),
                flops=record.flops,
                importance_captured=record.importance_captured,
                seconds=record.seconds,
                reason=record.reason,
                partial=record.partial,
            )
            for record in log.selections
        ),
        planned_flops=log.planned_flops,
        executed_flops=log.executed_flops,
        measuring_flops=log.measuring_flops,
        seconds=log.seconds,
        stopped=log.stopped,
        energy=log.energy,
    )


def remarks(reason: str | None, partial: Iterable[str]) -> tuple[str, ...]:
    """Of a selection in training: why it is this one, and which tensors it trains through a part of their uses.

    >>> remarks(None, ["lm_head.weight"])
    ('partial gradient, not through all uses of the tensor: lm_head.weight',)
    """
    names = ", ".join(partial)
    parts = (reason, f"partial gradient, not through all uses of the tensor: {names}" if names else None)
    return tuple(part for part in parts if part is not None)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


# --- how values are written, the same in every renderer ---------------------------------------------------------


def share(part: float, whole: float) -> str:
    """A share in percent; of nothing, there is none."""
    return f"{part / whole:.1%}" if whole else "n/a"


def shape_text(shape: Iterable[int]) -> str:
    """Sizes with a multiplication sign between them; a scalar has an empty shape."""
    return " \N{MULTIPLICATION SIGN} ".join(map(str, shape)) or "scalar"


def visible(text: str) -> str:
    """Characters that would not show, or would act on a terminal or the direction of text, as escapes.

    >>> print(visible("a\\nb"))
    a\\nb
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def shorten(text: str, most: int) -> str:
    """The two ends of a long text: names of tensors differ at either.

    >>> shorten("0123456789", 5)
    '01…89'
    """
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """At most ``most`` (two or more) of the items, evenly spaced, the first and the last among them.

    >>> evenly(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= most:
        return list(items)
    return [items[place * (len(items) - 1) // (most - 1)] for place in range(most)]

"""What a run writes down: selections, steps, and the log of both."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from gtflops.profiling import Profile
from gtflops.selection import Selection
from gtflops.training.energy import Energy

if TYPE_CHECKING:
    from gtflops.importance import ImportanceCheck


@dataclass(frozen=True, slots=True)
class SelectionRecord:
    """What is trained from here on. ``step`` counts the optimizer steps before it.

    ``flops`` and ``full_flops`` are those of a step on the batch that it was made for, of the first once what ``held``
    blocks compute is stored; ``budget`` the share that was asked for (``None`` without one), ``seconds`` what measuring
    and selecting took. Where the tensors were selected by importance, ``importance_captured`` is the share of all
    positive importance that is trained, and ``selection`` has the proof and the importances, unless the record is from
    a log without them. ``partial`` are those of ``names`` that are uses of a tensor which is not trained through all of
    its uses: a partial gradient moves it. ``reason`` says why it is this selection, where there was a choice besides
    the tensors.
    """

    step: int
    epoch: int
    names: tuple[str, ...]
    flops: int
    full_flops: int
    budget: float | None
    seconds: float
    selection: Selection | None
    importance_captured: float | None = None
    held: tuple[str, ...] = ()
    reason: str | None = None
    partial: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data; :meth:`from_json` is the inverse."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "names": list(self.names),
            "partial": list(self.partial),
            "flops": self.flops,
            "full_flops": self.full_flops,
            "budget": self.budget,
            "seconds": self.seconds,
            "importance_captured": self.importance_captured,
            "held": list(self.held),
            "reason": self.reason,
            "selection": None if self.selection is None else self.selection.to_json(),
            "importance": None if self.selection is None else dict(self.selection.importance),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], profile: Profile) -> "SelectionRecord":
        """``profile`` is one of the model, of any batch."""
        selection = data["selection"]
        return cls(
            step=data["step"],
            epoch=data["epoch"],
            names=tuple(data["names"]),
            flops=data["flops"],
            full_flops=data["full_flops"],
            budget=data["budget"],
            seconds=data["seconds"],
            selection=None if selection is None else Selection.from_json(profile, selection, data["importance"]),
            importance_captured=data["importance_captured"],
            held=tuple(data.get("held", ())),
            reason=data.get("reason"),
            partial=tuple(data.get("partial", ())),
        )


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step. FLOPs of forward and backward on the batches that it saw, in their real shapes.

    ``full_flops`` is what the same batches cost with every tensor trained. ``loss``, ``executed_flops`` and
    ``seconds`` are ``None`` where they were not observed: in a loop of the user's own, or without ``count_executed``.
    ``learning_rate`` is that of the first parameter group, ``None`` for an optimizer that finds its own.
    The first step after a selection has what the loss was to fall by, to first order, and what it fell by, unless an
    estimate of late held at a learning rate that was no lower. ``reused`` says that no block was run whose activations
    are stored. ``kwh`` and ``co2_kg`` are what all of the run had used by the end of the step, where that is measured,
    read a second before at the earliest.
    """

    step: int
    epoch: int
    planned_flops: int
    full_flops: int
    learning_rate: float | None
    loss: float | None = None
    executed_flops: int | None = None
    seconds: float | None = None
    predicted_drop: float | None = None
    real_drop: float | None = None
    reused: bool = False
    kwh: float | None = None
    co2_kg: float | None = None

    @property
    def check(self) -> "ImportanceCheck | None":
        """Does the estimate hold? ``None`` for a step that did not check it."""
        if self.predicted_drop is None or self.real_drop is None or self.loss is None:
            return None
        from gtflops.importance import ImportanceCheck  # needs torch, without which a log can be read

        return ImportanceCheck(self.predicted_drop, self.loss, self.loss - self.real_drop)


@dataclass(slots=True)
class TrainingLog:
    """What was trained, in order. FLOPs of training steps; each selection adds about one full step to measure,
    and those after which the estimate is checked a forward pass.

    ``stopped`` says why a run ended before its batches did, ``energy`` what it took, where that was measured.
    """

    steps: list[StepRecord] = field(default_factory=list)
    selections: list[SelectionRecord] = field(default_factory=list)
    measuring_flops: int = 0
    stopped: str | None = None
    energy: Energy | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; :meth:`from_json` is the inverse."""
        return {
            "steps": [asdict(step) for step in self.steps],
            "selections": [record.to_json() for record in self.selections],
            "measuring_flops": self.measuring_flops,
            "stopped": self.stopped,
            "energy": None if self.energy is None else asdict(self.energy),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], profile: Profile) -> "TrainingLog":
        """``profile`` is one of the model, of any batch."""
        return cls(
            steps=[StepRecord(**step) for step in data["steps"]],
            selections=[SelectionRecord.from_json(record, profile) for record in data["selections"]],
            measuring_flops=data["measuring_flops"],
            stopped=data["stopped"],
            energy=None if data["energy"] is None else Energy(**data["energy"]),
        )

    @property
    def checked(self) -> tuple[StepRecord, ...]:
        """The steps that say what the loss was to fall by, and what it fell by."""
        return tuple(step for step in self.steps if step.predicted_drop is not None and step.real_drop is not None)

    @property
    def last_checked(self) -> StepRecord | None:
        """The last of :attr:`checked`; ``None`` where there is none."""
        return next((step for step in reversed(self.steps) if step.real_drop is not None), None)

    @property
    def planned_flops(self) -> int:
        return sum(step.planned_flops for step in self.steps)

    @property
    def full_flops(self) -> int:
        """What the same steps cost with every tensor trained."""
        return sum(step.full_flops for step in self.steps)

    @property
    def executed_flops(self) -> int | None:
        """``None`` unless every step was counted."""
        counted = [step.executed_flops for step in self.steps if step.executed_flops is not None]
        return sum(counted) if len(counted) == len(self.steps) else None

    @property
    def seconds(self) -> float:
        """Of the steps whose time was taken, and of selecting."""
        return sum(step.seconds or 0.0 for step in self.steps) + sum(record.seconds for record in self.selections)

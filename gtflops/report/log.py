"""A training log from the JSON lines of a run, checked against the profile that it is reported with."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gtflops.errors import InputError, SavedFileError
from gtflops.profiling import Profile
from gtflops.training.energy import Energy
from gtflops.training.records import SelectionRecord, StepRecord, TrainingLog
from gtflops.training.watching import read_log

END = "end"


def end_line(log: TrainingLog) -> str:
    """What is known only when a run is over, as the last line of its file: energy, why it ended, what it measured."""
    energy = log.energy
    record = {
        "record": END,
        "step": len(log.steps),
        "measuring_flops": log.measuring_flops,
        "stopped": log.stopped,
        "energy": None if energy is None else {name: getattr(energy, name) for name in energy.__slots__},
    }
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def training_log(path: Path, profile: Profile) -> TrainingLog:
    """The log of a run by the lines that :class:`gtflops.training.JsonLines` wrote, and :func:`end_line`.

    The lines have no importances, so that the selections of the log have none either, but for the share that each
    captured. InputError where there is no such file, where it has no step, or where it is of a model with other
    tensors; SavedFileError for a line that is damaged. Needs no torch.
    """
    log = TrainingLog()
    for line in _lines(path, read_log(path)):
        if line.record == "step":
            log.steps.append(
                StepRecord(
                    step=line.count("step"),
                    epoch=line.count("epoch"),
                    planned_flops=line.count("planned_flops"),
                    full_flops=line.count("full_flops"),
                    learning_rate=line.number("learning_rate"),
                    loss=line.number("loss"),
                    executed_flops=None if line.fields.get("executed_flops") is None else line.count("executed_flops"),
                    seconds=line.number("seconds"),
                    predicted_drop=line.number("predicted_drop"),
                    real_drop=line.number("real_drop"),
                    kwh=line.number("kwh"),
                    co2_kg=line.number("co2_kg"),
                    reused=line.fields.get("reused") is True,
                )
            )
        elif line.record == "selection":
            log.selections.append(
                SelectionRecord(
                    step=line.count("step"),
                    epoch=line.count("epoch"),
                    names=line.names(profile),
                    flops=line.count("flops"),
                    full_flops=line.count("full_flops"),
                    budget=line.number("budget"),
                    seconds=line.number("seconds") or 0.0,
                    selection=None,
                    importance_captured=line.number("importance_captured"),
                    held=tuple(map(str, line.fields.get("held") or ())),
                    reason=line.text("reason"),
                    partial=tuple(map(str, line.fields.get("partial") or ())),
                )
            )
        elif line.record == END:
            log.measuring_flops = line.count("measuring_flops")
            stopped, energy = line.fields.get("stopped"), line.fields.get("energy")
            log.stopped = None if stopped is None else str(stopped)
            if energy is not None:
                used = _Line(line.where, energy if isinstance(energy, dict) else {})
                kwh, co2_kg, intensity = (used.number(name) or 0.0 for name in ("kwh", "co2_kg", "intensity"))
                log.energy = Energy(kwh, co2_kg, intensity, str(used.fields.get("method")))
    if not log.steps and not log.selections:
        raise InputError(f"{path} has no steps, expected the JSON lines of a run, as gtflops train --log writes")
    return log


class _Line:
    """A record, with errors that say where it stands."""

    def __init__(self, where: str, fields: Mapping[str, Any]) -> None:
        self.where, self.fields = where, fields
        self.record = fields.get("record")

    def count(self, name: str) -> int:
        value = self.fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise SavedFileError(f"{self.where}: {name} is {value!r}, expected an integer from 0 on")
        return value

    def number(self, name: str) -> float | None:
        value = self.fields.get(name)
        if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
            raise SavedFileError(f"{self.where}: {name} is {value!r}, expected a number or null")
        return value

    def text(self, name: str) -> str | None:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, str):
            raise SavedFileError(f"{self.where}: {name} is {value!r}, expected a text or null")
        return value

    def names(self, profile: Profile) -> tuple[str, ...]:
        value = self.fields.get("names")
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise SavedFileError(f"{self.where}: names is a {type(value).__name__}, expected a list of tensors' names")
        try:
            profile.mask(value)
        except InputError as error:
            raise InputError(f"{self.where} is of a model with other tensors: {error}") from error
        return tuple(value)


def _lines(path: Path, records: list[dict[str, Any]]) -> Iterator[_Line]:
    return (_Line(f"{path}, line {number}", fields) for number, fields in enumerate(records, start=1))

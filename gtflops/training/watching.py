"""Watching a run: a file of JSON lines, a progress bar, TensorBoard. What the loop records is given to each of them."""

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from gtflops.errors import InputError, SavedFileError
from gtflops.files import write_whole
from gtflops.selection import Selection
from gtflops.units import format_seconds

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Watcher(Protocol):
    """What the loop calls. Subclass it and write what is of interest; a record is a dataclass with a ``step``."""

    def on_start(self, step: int, num_steps: int | None, resumed: bool) -> None:
        """A run begins after ``step`` optimizer steps, of ``num_steps`` in all where that is known."""
        return

    def on_selection(self, record: Any) -> None:
        """Tensors were selected, ``record.step`` steps having been made."""
        return

    def on_step(self, record: Any) -> None:
        """An optimizer step was made, ``record.step`` having been made before it."""
        return

    def on_end(self) -> None:
        """The run is over, for whatever reason."""
        return


class JsonLines(Watcher):
    """Appends each record to a file, as one JSON object a line, at once; :func:`read_log` reads it.

    A line has the fields of its record and ``"record"``, which is ``"step"`` or ``"selection"``. Of a
    :class:`gtflops.Selection` it has the numbers and the names of the selected tensors. What is not finite is ``null``.

    When a run is resumed, the lines of steps after its checkpoint are dropped: they are made again. A new run does not
    start in a file that has lines already, unless it may ``replace`` them.
    """

    def __init__(self, path: str | Path, *, replace: bool = False) -> None:
        self.path = Path(path)
        self._replace = replace

    def on_start(self, step: int, num_steps: int | None, resumed: bool) -> None:
        is_new = step == 0 and not resumed
        lines = read_log(self.path) if self.path.exists() and not (is_new and self._replace) else []
        if lines and is_new:
            raise InputError(
                f"{self.path} has {len(lines)} lines of another run; expected a new file, or a run that is resumed"
            )
        write_whole(self.path, "".join(_line(line) for line in lines if line["step"] < step))

    def on_selection(self, record: Any) -> None:
        self._append("selection", record)

    def on_step(self, record: Any) -> None:
        self._append("step", record)

    def _append(self, kind: str, record: Any) -> None:
        line = _line({"record": kind, **to_json(record)})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}; expected a file that can grow") from error


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a :class:`JsonLines` file, in order.

    A last line without its end is what a run leaves that is killed while writing; it is left out. SavedFileError for
    any other line that is no record.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; expected a file of JSON lines") from error
    except UnicodeDecodeError as error:
        raise SavedFileError(f"{path} is not UTF-8 text; expected the JSON lines of a training run") from error
    *whole, _ = text.split("\n")
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise SavedFileError(f"{path}, line {number} is no JSON ({error}): {line[:80]!r}") from None
        step = record.get("step") if isinstance(record, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or not isinstance(record.get("record"), str):
            raise SavedFileError(
                f"{path}, line {number} is {line[:80]!r}, expected an object with 'record' and an integer 'step'"
            )
        lines.append(record)
    return lines


def to_json(record: Any) -> dict[str, Any]:
    """The fields of a dataclass instance as JSON knows them, whatever fields it has.

    >>> import collections
    >>> Point = dataclasses.make_dataclass("Point", ["step", "loss", "at"])
    >>> to_json(Point(3, float("nan"), Path("x")))
    {'step': 3, 'loss': None, 'at': 'x'}
    """
    return {field.name: _plain(getattr(record, field.name), field.name) for field in dataclasses.fields(record)}


class ProgressBar(Watcher):
    """Steps, the loss, the share of a full run's FLOPs so far and the time left, in one line of a terminal.

    Prints nothing where the output is no terminal.
    """

    def __init__(self, console: Console | None = None, *, refresh_seconds: float = 0.1) -> None:
        self._console = Console(stderr=True) if console is None else console
        self._refresh_seconds = refresh_seconds
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._num_steps: int | None = None

    def on_start(self, step: int, num_steps: int | None, resumed: bool) -> None:
        if not self._console.is_terminal:
            return
        self.on_end()
        self._num_steps = num_steps
        self._made, self._seconds, self._flops, self._full_flops = 0, 0.0, 0, 0
        self._drawn = -math.inf
        self._progress = Progress(
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task("", total=num_steps, completed=step)
        self._progress.start()

    def on_selection(self, record: Any) -> None:
        self._seconds_of(record)

    def on_step(self, record: Any) -> None:
        if self._progress is None:
            return
        self._seconds_of(record)
        self._made += 1
        self._flops += record.planned_flops
        self._full_flops += getattr(record, "full_flops", 0)
        now = time.monotonic()
        last = record.step + 1 == self._num_steps
        self._progress.update(self._task, completed=record.step + 1, description=self._describe(record))
        if last or now - self._drawn >= self._refresh_seconds:
            self._progress.refresh()
            self._drawn = now

    def on_end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _seconds_of(self, record: Any) -> None:
        if self._progress is not None:
            self._seconds += record.seconds

    def _describe(self, record: Any) -> str:
        parts = [f"loss {record.loss:.4f}"]
        if self._full_flops:
            parts.append(f"{self._flops / self._full_flops:.1%} of full FLOPs")
        if self._num_steps is not None:
            left = (self._num_steps - record.step - 1) * self._seconds / self._made
            parts.append(f"{format_seconds(left)} left")
        return ", ".join(parts)


class TensorBoard(Watcher):
    """Each number of each record as a scalar ``gtflops/<field>``, in a folder that TensorBoard reads.

    When a run is resumed, TensorBoard drops what lies after its checkpoint.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise InputError(
                "writing for TensorBoard needs tensorboard, which is not installed: pip install gtflops[tensorboard]"
            ) from error
        self._writer: SummaryWriter | None = None

    def on_start(self, step: int, num_steps: int | None, resumed: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.on_end()
        self._writer = SummaryWriter(str(self.folder), purge_step=step)

    def on_selection(self, record: Any) -> None:
        self._add("selection_", record)

    def on_step(self, record: Any) -> None:
        self._add("", record)

    def on_end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, prefix: str, record: Any) -> None:
        if self._writer is None:
            raise InputError("this TensorBoard has not been started; expected on_start before any record")
        for name, value in to_json(record).items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(f"gtflops/{prefix}{name}", value, record.step)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any, name: str) -> Any:
    """A value of a field as JSON knows it."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Selection):
        numbers = ("flops", "budget_flops", "budget_seconds", "value", "upper_bound", "optimal", "names")
        return {key: _plain(getattr(value, key), key) for key in numbers}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, name) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(entry, name) for entry in value)
    if isinstance(value, Iterable):
        return [_plain(entry, name) for entry in value]
    raise InputError(f"field {name!r} is a {type(value).__name__}, which JSON has no form for")

"""How much CO2 a kilowatt-hour of the grid stands for, by time: from a file, a list or a function."""

import bisect
import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from numbers import Real
from pathlib import Path
from typing import TypeAlias, TypeGuard

from gtflops.errors import InputError

#: gCO2/kWh at a unix time.
Intensity: TypeAlias = Callable[[float], float]
Time: TypeAlias = float | str | datetime
#: A number, a file for :func:`read_intensity`, pairs of time and gCO2/kWh, or a function of the unix time.
IntensityLike: TypeAlias = float | str | Path | Iterable[tuple[Time, float]] | Intensity


@dataclass(frozen=True, slots=True)
class IntensitySeries:
    """Intensities by time: each holds until the next one, the last as long as the one before it.

    ``times`` are unix times, rising; ``values`` gCO2/kWh. Called with a unix time, it gives the intensity then, and
    InputError for a time that it does not cover.
    """

    times: tuple[float, ...]
    values: tuple[float, ...]
    source: str = "the series"

    def __post_init__(self) -> None:
        if len(self.times) != len(self.values) or len(self.times) < 2:
            raise InputError(
                f"{self.source} has {len(self.times)} times and {len(self.values)} intensities, expected at least two "
                "of each: the last one holds as long as the one before it"
            )
        for number, (time, value) in enumerate(zip(self.times, self.values, strict=True), start=1):
            if not math.isfinite(time):
                raise InputError(f"time {number} of {self.source} is {time!r}, expected a finite number of seconds")
            if number > 1 and time <= self.times[number - 2]:
                raise InputError(
                    f"time {number} of {self.source}, {_iso(time)}, is not after the one before it, "
                    f"{_iso(self.times[number - 2])}; expected rising times"
                )
            require_intensity(value, f"intensity {number} of {self.source}")

    @property
    def end(self) -> float:
        """The first unix time that is not covered any more."""
        return self.times[-1] + (self.times[-1] - self.times[-2])

    def __call__(self, time: float) -> float:
        if not self.times[0] <= time < self.end:
            raise InputError(
                f"{self.source} has no intensity for {_iso(time)}: it covers {_iso(self.times[0])} to "
                f"{_iso(self.end)}; expected a series that covers the whole run"
            )
        return self.values[bisect.bisect_right(self.times, time) - 1]


def intensity_of(value: IntensityLike) -> Intensity:
    """Any way to give an intensity, as a function of the unix time that checks what it returns."""
    if isinstance(value, IntensitySeries):
        return value
    if is_number(value):
        constant = require_intensity(value, "intensity")
        return lambda _: constant
    if isinstance(value, (str, Path)):
        return read_intensity(value)
    if callable(value):
        function = value
        return lambda time: require_intensity(function(time), f"the intensity at {_iso(time)}")
    if isinstance(value, Iterable):
        return _series(value)
    raise InputError(
        f"intensity is {value!r}, expected gCO2/kWh: a number, a CSV file, pairs of time and number, or a function of "
        "the unix time"
    )


def read_intensity(path: str | Path, *, time: str = "time", intensity: str = "intensity") -> IntensitySeries:
    """A CSV file with a header; ``time`` and ``intensity`` name its columns, others are left alone.

    Times are ISO 8601 (``2026-01-31T14:00``, ``2026-01-31 14:00:00+01:00``); without an offset they are UTC.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; expected a CSV file of intensities") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; expected a CSV file of intensities") from error
    rows = csv.DictReader(text.splitlines())
    columns = list(rows.fieldnames or ())
    if missing := [name for name in (time, intensity) if name not in columns]:
        raise InputError(
            f"{path} has no column {' and no column '.join(map(repr, missing))}; its columns: "
            f"{', '.join(map(repr, columns)) or 'none'}; name yours by read_intensity(path, time=, intensity=)"
        )
    times: list[float] = []
    values: list[float] = []
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        now = unix_time(row[time] or "", where)
        if times and now <= times[-1]:
            raise InputError(
                f"{where}: {_iso(now)} is not after the line before it, {_iso(times[-1])}; expected rising times"
            )
        try:
            value = float(row[intensity] or "")
        except ValueError:
            raise InputError(f"{where}: intensity is {row[intensity]!r}, expected a number of gCO2/kWh") from None
        times.append(now)
        values.append(require_intensity(value, f"{where}: intensity"))
    return IntensitySeries(tuple(times), tuple(values), str(path))


def unix_time(value: Time, what: str = "time") -> float:
    """Seconds since 1970 of a unix time, a datetime or ISO 8601 text; UTC where no offset is given.

    >>> unix_time("1970-01-01T01:00"), unix_time("1970-01-01T01:00+01:00"), unix_time(60)
    (3600.0, 0.0, 60.0)
    """
    if is_number(value):
        return float(value)
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            raise InputError(f"{what}: time is {value!r}, expected ISO 8601 such as 2026-01-31T14:00+01:00") from None
    if not isinstance(value, datetime):
        raise InputError(f"{what}: time is {value!r}, expected a unix time, a datetime or ISO 8601 text")
    return (value.replace(tzinfo=UTC) if value.tzinfo is None else value).timestamp()


def require_intensity(value: object, what: str) -> float:
    """The value as a float; InputError unless it is a number that an intensity can be."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise InputError(f"{what} is {value!r}, expected gCO2/kWh, a finite number that is not negative")
    return float(value)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is an integer or a float, numpy's among them, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _series(pairs: Iterable[tuple[Time, float]]) -> IntensitySeries:
    entries = list(pairs)
    for number, pair in enumerate(entries, start=1):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"entry {number} of the series is {pair!r}, expected a pair of time and gCO2/kWh")
    times = tuple(unix_time(time, f"entry {number} of the series") for number, (time, _) in enumerate(entries, start=1))
    return IntensitySeries(times, tuple(value for _, value in entries))


def _iso(time: float) -> str:
    try:
        return datetime.fromtimestamp(time, tz=UTC).isoformat(timespec="minutes").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return f"{time!r} s since 1970"

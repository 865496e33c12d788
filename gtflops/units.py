"""FLOPs and seconds as people write and read them. A multiply-add (MAC) is 2 FLOPs, decided here."""

import re
from collections.abc import Mapping
from enum import StrEnum
from fractions import Fraction

FLOPS_PER_MAC = 2


class Unit(StrEnum):
    """What costs are shown in; every one is kept in FLOPs."""

    FLOPS = "flops"
    MACS = "macs"

    @property
    def symbol(self) -> str:
        return "FLOP" if self is Unit.FLOPS else "MAC"

    @property
    def flops(self) -> int:
        return 1 if self is Unit.FLOPS else FLOPS_PER_MAC


_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
#: What a decimal prefix stands for.
FLOPS_BY_PREFIX = {prefix: 1000**power for power, prefix in enumerate(_PREFIXES)}


def format_flops(flops: float, unit: Unit = Unit.FLOPS) -> str:
    """Three significant digits and a decimal prefix.

    >>> format_flops(33_535_977_062_400)
    '33.5 TFLOP'
    >>> format_flops(33_535_977_062_400, Unit.MACS)
    '16.8 TMAC'
    >>> format_flops(999_999)
    '1.00 MFLOP'
    """
    return f"{_scaled(flops / unit.flops)}{unit.symbol}"


def format_exactly(flops: int, unit: Unit = Unit.FLOPS) -> str:
    """Every digit; half a MAC is what an addition alone is.

    >>> format_exactly(33_535_977_062_401), format_exactly(33_535_977_062_401, Unit.MACS)
    ('33,535,977,062,401', '16,767,988,531,200.5')
    """
    sign = "-" if flops < 0 else ""
    whole, rest = divmod(abs(flops), unit.flops)
    return f"{sign}{whole:,}" + (".5" if rest else "")


def _scaled(value: float) -> str:
    """Three significant digits, a space and the decimal prefix."""
    for prefix in _PREFIXES:
        if abs(value) < 999.5 or prefix == _PREFIXES[-1]:
            break
        value /= 1000
    if prefix == "":
        return f"{value:.0f} "
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {prefix}"


def format_seconds(seconds: float) -> str:
    """Seconds, minutes or hours.

    >>> format_seconds(0.0021), format_seconds(5), format_seconds(75), format_seconds(7384)
    ('2.1 ms', '5.0 s', '1 min 15 s', '2 h 3 min')
    """
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


_NUMBER = r"(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?"


def quantity_of(text: str) -> tuple[Fraction, str]:
    """A quantity as people write it, in ``"FLOP"`` or ``"s"``; a bare number has the unit ``""``.

    ValueError for what is none.

    >>> quantity_of("1.2 TFLOP"), quantity_of("600GMACs")
    ((Fraction(1200000000000, 1), 'FLOP'), (Fraction(1200000000000, 1), 'FLOP'))
    >>> quantity_of("20 ms"), quantity_of("0.5")
    ((Fraction(1, 50), 's'), (Fraction(1, 2), ''))
    """
    found = re.fullmatch(rf"\s*{_NUMBER}\s*([A-Za-z]*)\s*", text)
    unit = re.sub("(?i)(flop|mac)s?$", lambda name: name[1].upper(), found[3] if found else text)
    if not found or unit not in _UNITS:
        raise ValueError(f"{text!r} is no quantity")
    factor, of = _UNITS[unit]
    return Fraction(found[1] + (found[2] or "")) * factor, of


def count_of(text: str) -> int:
    """A count as people write it, with a decimal prefix or B for billions. ValueError for what is no whole number.

    >>> count_of("30M"), count_of("1.5B"), count_of("768")
    (30000000, 1500000000, 768)
    """
    found = re.fullmatch(rf"\s*{_NUMBER}\s*([A-Za-z]?)\s*", text)
    prefix = found and found[3].replace("B", "G")
    if not found or prefix not in FLOPS_BY_PREFIX:
        raise ValueError(f"{text!r} is no count")
    count = Fraction(found[1] + (found[2] or "")) * FLOPS_BY_PREFIX[prefix]
    if count.denominator != 1:
        raise ValueError(f"{text!r} is no whole number")
    return int(count)


#: How much a unit is of FLOPs or of seconds.
_UNITS: Mapping[str, tuple[Fraction, str]] = {
    "": (Fraction(1), ""),
    **{f"{prefix}FLOP": (Fraction(factor), "FLOP") for prefix, factor in FLOPS_BY_PREFIX.items()},
    **{f"{prefix}MAC": (Fraction(FLOPS_PER_MAC * factor), "FLOP") for prefix, factor in FLOPS_BY_PREFIX.items()},
    "us": (Fraction(1, 10**6), "s"),
    "ms": (Fraction(1, 1000), "s"),
    "s": (Fraction(1), "s"),
    "min": (Fraction(60), "s"),
    "h": (Fraction(3600), "s"),
}

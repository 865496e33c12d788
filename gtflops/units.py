"""FLOPs and seconds as people read them. A multiply-add (MAC) is 2 FLOPs, decided here."""

FLOPS_PER_MAC = 2

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
#: What a decimal prefix stands for.
FLOPS_BY_PREFIX = {prefix: 1000**power for power, prefix in enumerate(_PREFIXES)}


def format_flops(flops: float) -> str:
    """Three significant digits and a decimal prefix.

    >>> format_flops(33_535_977_062_400)
    '33.5 TFLOP'
    >>> format_flops(999_999)
    '1.00 MFLOP'
    """
    return f"{_scaled(flops)}FLOP"


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

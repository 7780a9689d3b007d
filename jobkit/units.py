"""Durations and sizes as people type them, parsed once at the edge; everything inside is seconds and bytes."""

import math
import re
from fractions import Fraction

from jobkit.errors import ConfigError

# Fractions, so that '9ms' is 0.009 and '1.001kB' is 1001: floats would give 0.009000000000000001 and 1000.
_SECONDS = {"ms": Fraction(1, 1000)} | {
    unit: Fraction(seconds) for unit, seconds in {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}.items()
}
_BYTES = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1024))
}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.ASCII)
_LONGEST = 100  # characters; Python refuses to read numbers of some thousand digits, with words of its own


def duration_s(text: str | float) -> float:
    """Parse '90', '90s', '1h30m', '250ms' into seconds.

    Raises:
        ConfigError: If the text is not a duration, or is not finite and positive or zero.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        seconds = _float(text)
    else:
        parts = _PART.findall(str(text).strip().lower())
        joined = "".join(number + unit for number, unit in parts)
        if not parts or len(joined) > _LONGEST or joined != re.sub(r"\s+", "", str(text).strip().lower()):
            raise ConfigError(f"{text!r} is not a duration; write seconds or a form like '90s', '10m', '1h30m'")
        if any(unit not in _SECONDS and not (unit == "" and len(parts) == 1) for _, unit in parts):
            raise ConfigError(f"{text!r} has an unknown unit of time; known are {', '.join(_SECONDS)}")
        seconds = _float(sum(Fraction(number) * _SECONDS.get(unit, 1) for number, unit in parts))
    if not math.isfinite(seconds) or seconds < 0:
        raise ConfigError(f"{text!r} is not a duration of zero or more seconds")
    return seconds


def _float(number: float | Fraction) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def size_bytes(text: str | int) -> int:
    """Parse '4GiB', '500MB', '1024' into bytes; a bare 'K', 'M', 'G' is a power of 1024.

    Raises:
        ConfigError: If the text is not a size.
    """
    match = _PART.fullmatch(str(text).strip().lower()) if len(str(text)) <= _LONGEST else None
    if match is None or match[2] not in _BYTES:
        raise ConfigError(f"{text!r} is not a size; write bytes or a form like '500MB', '4GiB'")
    return int(Fraction(match[1]) * _BYTES[match[2]])


def show_duration(seconds: float) -> str:
    """Write a duration for a person: '25 ms', '0.4 s', '12 s', '3 min 20 s', '2 h 5 min'."""
    if 0.0005 < seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def show_size(size: float) -> str:
    """Write a size for a person: '512 B', '1.2 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def counted(count: int, what: str) -> str:
    """Write how many there are of something: '1 step', '2,000 steps'."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def parse_limit(text: str) -> float | None:
    """Read a time limit as sbatch takes it ('90', '1:30:00', '2-12', '1-00:30:00') in seconds; None if it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, *fields = match.groups()
    units = (3600, 60, 1) if days or fields[2] else (60, 1, 0)
    return int(days or 0) * 86400.0 + sum(int(field or 0) * unit for field, unit in zip(fields, units, strict=True))

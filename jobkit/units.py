"""Durations and sizes as people type them, parsed once at the edge; everything inside is seconds and bytes."""

import math
import re

from jobkit.errors import ConfigError

_SECONDS = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1024))
}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


def duration_s(text: str | float) -> float:
    """Parse '90', '90s', '1h30m', '250ms' into seconds.

    Raises:
        ConfigError: If the text is not a duration, or is not finite and positive or zero.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        seconds = float(text)
    else:
        parts = _PART.findall(str(text).strip().lower())
        joined = "".join(number + unit for number, unit in parts)
        if not parts or joined != re.sub(r"\s+", "", str(text).strip().lower()):
            raise ConfigError(f"{text!r} is not a duration; write seconds or a form like '90s', '10m', '1h30m'")
        if any(unit not in _SECONDS and not (unit == "" and len(parts) == 1) for _, unit in parts):
            raise ConfigError(f"{text!r} has an unknown unit of time; known are {', '.join(_SECONDS)}")
        seconds = sum(float(number) * _SECONDS.get(unit, 1.0) for number, unit in parts)
    if not math.isfinite(seconds) or seconds < 0:
        raise ConfigError(f"{text!r} is not a duration of zero or more seconds")
    return seconds


def size_bytes(text: str | int) -> int:
    """Parse '4GiB', '500MB', '1024' into bytes; a bare 'K', 'M', 'G' is a power of 1024.

    Raises:
        ConfigError: If the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    if match is None or match[2] not in _BYTES:
        raise ConfigError(f"{text!r} is not a size; write bytes or a form like '500MB', '4GiB'")
    return int(float(match[1]) * _BYTES[match[2]])


def show_duration(seconds: float) -> str:
    """Write a duration for a person: '0.4 s', '12 s', '3 min 20 s', '2 h 5 min'."""
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

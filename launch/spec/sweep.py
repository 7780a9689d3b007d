"""A sweep: one command with {names} in it, and the values that each name takes; every combination is a point.

A point is a whole run in the sweep's directory, points/<n>/. Its number says which values it has, so nothing about it
has to be written before it starts.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from jobkit.errors import ConfigError

LIMIT = 10_000
"""More points than this are a mistake at the keyboard more often than a plan."""
Axes = Mapping[str, Sequence[str]]
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})")
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")
_PART = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_UNFILLED = re.compile(r"(?:[-\w.+]+=)?\{([A-Za-z_][A-Za-z0-9_]*)\}")
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def parse(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Read what `--sweep` was given: 'lr=1e-3,3e-4' or 'seed=0..9', both ends included.

    Raises:
        ConfigError: With the text and the remedy.
    """
    axes: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise ConfigError(f"--sweep {text!r} is not NAME=VALUES; write lr=1e-3,3e-4 or seed=0..9")
        if name in axes:
            raise ConfigError(f"--sweep {name} is given twice; put all its values into one: {name}=1,2,3")
        axes[name] = tuple(value for part in values.split(",") for value in _values(name, part.strip()))
        twice = sorted({value for value in axes[name] if axes[name].count(value) > 1}) if len(axes[name]) < 100 else []
        if twice or len(set(axes[name])) < len(axes[name]):
            raise ConfigError(f"--sweep {name} has {(twice or ['a value'])[0]} twice; every point is trained once")
    check_size(axes)
    return axes


def _values(name: str, part: str) -> Iterable[str]:
    if not part:
        raise ConfigError(f"--sweep {name} has an empty value; write {name}=1,2,3 or {name}=0..9")
    match = _RANGE.fullmatch(part)
    if match is None:
        left, dots, right = part.partition("..")
        if dots and any(_NUMBER.fullmatch(end) for end in (left, right.lstrip("."))):
            raise ConfigError(f"--sweep {name}={part} is no range, which has two whole numbers: 0..9; or write a list")
        return (part,)
    first, last = int(match[1]), int(match[2])
    if last < first:
        raise ConfigError(f"--sweep {name}={part} is empty; write the smaller number first: {last}..{first}")
    if last - first >= LIMIT:
        raise ConfigError(f"--sweep {name}={part} alone has {last - first + 1} points; at most {LIMIT} are allowed")
    return map(str, range(first, last + 1))


def count(axes: Axes) -> int:
    """Return how many points there are."""
    return math.prod(len(values) for values in axes.values())


def check_size(axes: Axes) -> None:
    """Refuse a sweep that is too large.

    Raises:
        ConfigError: With the number of points.
    """
    if count(axes) > LIMIT:
        sizes = " x ".join(str(len(values)) for values in axes.values())
        raise ConfigError(f"the sweep has {count(axes)} points ({sizes}); at most {LIMIT} are allowed")


def check(command: Sequence[str], axes: Axes) -> None:
    """Refuse a command that does not fit its sweep.

    Raises:
        ConfigError: If a {name} is unknown, a name is not used, or a brace is no placeholder.
    """
    if not all(axes.values()):
        raise ConfigError("a name of the sweep has no values; write lr=1e-3,3e-4 or seed=0..9")
    check_size(axes)
    matches = [match for word in command for match in _BRACES.finditer(word) if match[0] not in ("{{", "}}")]
    for match in matches:
        if match[1] is None or not _NAME.fullmatch(match[1]):
            raise ConfigError(f"{match[0]!r} in the command is no name of the sweep; write a brace itself twice: {{{{")
        if match[1] not in axes:
            raise ConfigError(
                f"the command has {match[0]}, but the sweep names {', '.join(axes)}; add --sweep {match[1]}=..."
            )
    for name in axes:
        if name not in {match[1] for match in matches}:
            raise ConfigError(f"--sweep {name} is not used: write {{{name}}} into the command where its value belongs")


def refuse_names(command: Sequence[str]) -> None:
    """Refuse a command of no sweep with a word that is, or ends in, a name of one: `--lr={lr}`.

    Raises:
        ConfigError: With the name.
    """
    for word in command:
        if (match := _UNFILLED.fullmatch(word)) is not None:
            raise ConfigError(
                f"{word!r} in the command is for a sweep, and there is none: add --sweep {match[1]}=VALUES, or write "
                "the value itself"
            )


def values(axes: Axes, point: int) -> dict[str, str]:
    """Return what each name is at a point; the last name changes fastest."""
    chosen = {}
    for name, choices in reversed(list(axes.items())):
        point, index = divmod(point, len(choices))
        chosen[name] = choices[index]
    return {name: chosen[name] for name in axes}


def fill(command: Sequence[str], chosen: Mapping[str, str]) -> tuple[str, ...]:
    """Put values into a command that `check` has passed."""
    return tuple(_BRACES.sub(lambda match: chosen[match[1]] if match[1] else match[0][0], word) for word in command)


def compact(numbers: Iterable[int]) -> str:
    """Write numbers the way sbatch's --array takes them: '0-3,7'."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def expand(text: str) -> set[int]:
    """Read what `compact` has written; anything else is no point."""
    points: set[int] = set()
    for part in text.split(","):
        if (ends := _PART.fullmatch(part)) is not None:
            points.update(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return points

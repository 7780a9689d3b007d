"""The guard through which all goes that the command line prints: a run's words never act on a terminal."""

import sys
from typing import Any, TextIO

from jobkit.printable import printable


class _Guarded:
    """A text stream that makes printable what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self.unguarded = stream

    def write(self, text: str) -> int:
        """Write a text."""
        self.unguarded.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)


def guard() -> None:
    """Guard standard output and standard error of this process from here on; one that is closed stays so."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:
            setattr(sys, name, _Guarded(stream))


def unguarded(stream: Any) -> Any:
    """Return what is behind a guard, for what is printable already."""
    return stream.unguarded if isinstance(stream, _Guarded) else stream


def dash(value: object) -> str:
    """Write a value, or a dash for None."""
    return "-" if value is None else str(value)


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Lay rows of words out in columns; the last one runs free."""
    lines = [tuple(word.replace("\n", " ") for word in line) for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(word.ljust(width) for word, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )

"""A drill's card as one self-contained HTML page, and as a picture: no script, no request to anywhere."""

import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobkit.printable import printable
from launch.drill.card import COLUMNS, MARK_TONES, VERDICT_TONES, cells, headline, mark, sections, title, tried
from launch.drill.verdict import Found, Result
from launch.report.png import write_figure
from launch.report.template import render


def page(result: Result) -> str:
    """Return the card as one page."""
    scope, *promised = tried(result)
    return render(
        "drill.html",
        title=title(result),
        command=shlex.join(result.command),
        tone=VERDICT_TONES[result.verdict],
        headline=headline(result),
        scope=scope,
        columns=COLUMNS,
        rows=[_row(outcome) for outcome in result.found],
        sections=sections(result),
        promised=". ".join(promised),
    )


def _row(outcome: Found) -> dict[str, Any]:
    shown = mark(outcome)
    return {
        "text": outcome.text,
        "done": outcome.done,
        "mark": shown,
        "tone": MARK_TONES[shown],
        "cells": list(cells(outcome)),
    }


# The picture.

_WIDTH, _LINE, _MARGIN = 10.0, 0.21, 0.3
"""Inches."""
_LETTERS = 126
"""That fit into a line."""
_TONES = {"good": "#1d7a46", "bad": "#c0392b", "warn": "#8a5a00", "dim": "#5b6672"}
_HELD, _AT = 4.3, (5.9, 6.6, 7.7, 8.8, 9.7)
"""Where the second column begins, and where the others end."""


def write_card(path: Path, result: Result) -> Path:
    """Draw the card into a PNG.

    Raises:
        ConfigError: If matplotlib is not installed, or the picture cannot be written there.
    """
    return write_figure(path, lambda plt: _draw(plt, result))


class _Word(NamedTuple):
    """A text in a line of the picture: where it stands, in inches, and how it looks."""

    x: float
    text: str
    how: dict[str, Any]


def _draw(plt: Any, result: Result) -> Any:
    lines: list[list[_Word]] = []

    def write(text: str, indent: float = 0.0, **how: Any) -> None:
        lines.extend([_Word(_MARGIN + indent, part, how)] for part in textwrap.wrap(printable(text), _LETTERS))

    def row(first: str, held: _Word, numbers: Sequence[str], **how: Any) -> None:
        right = [_Word(at, word, {"ha": "right"} | how) for at, word in zip(_AT, numbers, strict=True)]
        lines.append([_Word(_MARGIN, first, how), held, *right])

    write(headline(result), fontsize=14, fontweight="bold", color=_TONES[VERDICT_TONES[result.verdict]])
    lines.append([])
    for line in [title(result), *tried(result)]:
        write(line, color=_TONES["dim"])
    lines.append([])
    row("scenario", _Word(_HELD, "held", {"fontweight": "bold"}), COLUMNS, fontweight="bold")
    for outcome in result.found:
        tone = _TONES[MARK_TONES[mark(outcome)]]
        row(outcome.text, _Word(_HELD, mark(outcome), {"color": tone}), cells(outcome))
    for section in sections(result):
        lines.append([])
        write(section.title, fontweight="bold", color=_TONES[section.tone])
        for line in section.lines:
            write(line, 0.2)
    height = len(lines) * _LINE + 2 * _MARGIN
    figure = plt.figure(figsize=(_WIDTH, height))
    for number, words in enumerate(lines):
        y = 1 - (_MARGIN + (number + 0.5) * _LINE) / height
        for word in words:
            how = {"fontsize": 9, "va": "center", "parse_math": False} | word.how
            figure.text(word.x / _WIDTH, y, word.text, **how)
    return figure

"""A drill's card as one self-contained HTML page, and as a picture: no script, no request to anywhere."""

import html
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobkit.printable import printable
from launch.drill.card import COLUMNS, MARK_TONES, VERDICT_TONES, Section, cells, headline, mark, sections, title, tried
from launch.drill.verdict import Found, Result
from launch.report.png import write_figure

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --dim: #66727f; --back: #ffffff; --line: #dde3ea; --good: #1d7a46;
        --bad: #c0392b; --warn: #8a5a00; --box: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --dim: #98a4b0; --back: #14181d; --line: #2d353d; --good: #5fcf8d; --bad: #ff7b6b;
          --warn: #e6b455; --box: #1b2127; } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0 auto; padding: 24px;
       max-width: 960px }
h1 { font-size: 20px; margin: 0 0 4px } code { font-size: 14px; overflow-wrap: anywhere }
.dim { color: var(--dim) } .good { color: var(--good) } .bad { color: var(--bad) }
.verdict { font-size: 18px; font-weight: 600; margin: 16px 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.warn { color: var(--warn) }
.box { color: inherit; background: var(--box); border-left: 3px solid var(--line); padding: 8px 16px; margin: 16px 0;
       overflow-wrap: anywhere }
.box.bad { border-color: var(--bad) } .box.warn { border-color: var(--warn) }
td:first-child { min-width: 130px }
@media (max-width: 600px) { body { padding: 14px } th, td { font-size: 13px; padding-right: 8px } }
.small { font-size: 13px } ul { margin: 4px 0; padding-left: 20px }
"""


def _html(text: str) -> str:
    return html.escape(printable(text))


def page(result: Result) -> str:
    """Return the card as one page."""
    e = _html
    head = "".join(f'<th class="n">{name}</th>' for name in COLUMNS)
    rows = "".join(_row(outcome) for outcome in result.found)
    scope, *promised = tried(result)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{e(title(result))}</title><style>{_STYLE}</style></head><body>
<h1>jobkit drill</h1><code>{e(shlex.join(result.command))}</code>
<div class="verdict {VERDICT_TONES[result.verdict]}">{e(headline(result))}</div>
<p class="dim">{e(scope)}.</p>
<div class="scroll"><table><thead><tr><th>scenario</th><th>held</th>{head}</tr></thead>
<tbody>{rows}</tbody></table></div>
{"".join(_box(section) for section in sections(result))}
<p class="dim small">{e(". ".join(promised))}.</p>
</body></html>
"""


def _row(found: Found) -> str:
    e = _html
    row = "".join(f'<td class="n">{e(cell)}</td>' for cell in cells(found))
    lines = "".join(f"<li>{e(line)}</li>" for line in found.done)
    more = f'<ul class="small dim">{lines}</ul>' if lines else ""
    held = f'<td class="{MARK_TONES[mark(found)]}">{mark(found)}</td>'
    return f"<tr><td>{e(found.text)}{more}</td>{held}{row}</tr>"


def _box(section: Section) -> str:
    items = "".join(f"<li>{_html(line)}</li>" for line in section.lines)
    return f'<div class="box {section.tone}"><b>{_html(section.title)}</b><ul>{items}</ul></div>'


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

"""What a drill found, as a card for the terminal, as a picture of it, as a page and as JSON.

All say the same: the verdict first, then what was tried, what is wrong and why, what the verdict does not cover, and
what was not tried. The page is one file: no script, no request to anywhere.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text

from jobkit.units import show_duration
from launch.console import Console
from launch.drill.drill import NOT_ASKED
from launch.drill.reference import Reference
from launch.drill.scenarios import Scenario
from launch.drill.verdict import DrillResult, Trial, Verdict
from launch.printing import aligned
from launch.report.png import write_figure
from launch.report.template import render


def listed(wanted: Sequence[Scenario]) -> list[dict[str, Any]]:
    """Return the scenarios for JSON."""
    return [{"name": each.name, "text": each.text, "quick": each.quick} for each in wanted]


def listing(wanted: Sequence[Scenario]) -> str:
    """Return the scenarios for a person."""
    return aligned([("NAME", "QUICK", "WHAT"), *((one.name, "yes" if one.quick else "", one.text) for one in wanted)])


def show(result: DrillResult, written: Mapping[str, Path], *, kept: bool) -> None:
    """Print the card, and where else it was written, by what it is there."""
    console = Console(highlight=False)
    console.print(card(result))
    if kept:
        console.print(Text(f"the runs are kept in {result.place}"), soft_wrap=True)
    for what, path in written.items():
        console.print(Text(f"{what}: {path}"), soft_wrap=True)


# The words.

_COLUMNS = ("at step", "lost", "commit", "back", "bits")
"""Of a scenario: where it was interrupted, steps done again, seconds from the notice to the commit and from the end to
the next completed step, and how its state compares with the undisturbed run's."""


def _cells(trial: Trial) -> tuple[str, ...]:
    """Return a scenario's row, below `_COLUMNS`."""
    bits = {True: "same", False: "differ", None: "-"}[trial.identical]
    at = ", ".join(map(str, trial.at_steps)) or "-"
    return (
        at,
        number(trial.lost_steps),
        number(trial.commit_s, ".2f", " s"),
        number(trial.restart_s, ".2f", " s"),
        bits,
    )


def _title(result: DrillResult) -> str:
    """Return what was drilled."""
    return f"jobkit drill -- {shlex.join(result.command)}"


def headline(result: DrillResult) -> str:
    """Say the verdict, and for which steps."""
    reference, verdict = result.reference, result.verdict
    if verdict is Verdict.NOT_CERTIFIED:
        wrong = sum(bool(trial.broken) for trial in result.trials)
        return f"{verdict}: {wrong} of {len(result.trials)} scenarios broke a promise"
    if verdict is Verdict.NOT_JUDGED:
        missed = ", ".join(trial.name for trial in result.trials if trial.missed)
        why = f"{missed} could not be hit" if missed else "nothing that was asked for could be tried"
        return f"{verdict}: {why}"
    unasked = len(_unasked(result))
    few = f", in {len(result.trials)} of {len(result.trials) + unasked} scenarios" if unasked else ""
    if reference.whole:
        return f"{verdict}: every promise held, in all {reference.steps} steps{few}"
    return f"{verdict} for {_steps(reference)}: every promise held{few}"


def _steps(reference: Reference) -> str:
    if reference.whole:
        return f"all {reference.steps} steps"
    total = f" of {reference.total}" if reference.total is not None else ""
    return f"the first {reference.steps}{total} steps"


def _tried(result: DrillResult) -> list[str]:
    """Say how much was tried, and what is promised."""
    reference = result.reference
    per_step, start = show_duration(reference.step_s), show_duration(reference.start_s)
    number = f"{len(result.trials)} scenario" + "s" * (len(result.trials) != 1)
    return [
        f"{number} over {_steps(reference)}, in {show_duration(result.seconds)}: "
        f"{per_step} a step, the first after {start}, a save every {reference.save_every} for the drill",
        "promised: a notice costs no step, a kill the save interval and what is trained while a save is in flight, "
        f"here {reference.allowed_loss}; the run goes on by itself and ends with the undisturbed run's bits",
    ]


@dataclass(frozen=True)
class Section:
    """What a card says below its table.

    Args:
        title: What it is about.
        lines: A sentence each.
        tone: 'bad', 'warn' or 'dim'.
    """

    title: str
    lines: list[str]
    tone: str


def _sections(result: DrillResult) -> list[Section]:
    """Say what is wrong, why, what the verdict does not cover, what was not compared and what was not tried."""
    wrong = [each for each in result.trials if each.broken]
    parts = [Section(f"{each.name}: {each.text}", [*each.done, *_few(each.broken)], "bad") for each in wrong]
    why = result.diagnosis
    if why is not None:
        first = [f"first at step {why.step}: {why.tensor}"] if why.step is not None else []
        parts.append(Section(f"why: {why.name}", [*first, *why.evidence, f"remedy: {why.remedy}"], "warn"))
    parts.append(Section("warnings", list(result.warnings), "warn"))
    differing = {"metrics": result.aside, "files": result.files_aside}
    aside = [f"{what}: {', '.join(names)}" for what, names in differing.items() if names]
    parts.append(Section("not compared, since undisturbed runs differ in them too", aside, "dim"))
    parts.append(Section("not tried", _not_tried(result), "dim"))
    return [each for each in parts if each.lines]


_FEW = 5


def _few(lines: list[str]) -> list[str]:
    more = len(lines) - _FEW
    return lines if more <= 1 else [*lines[:_FEW], f"and {more} more, see --json"]


def _unseen(result: DrillResult) -> str:
    """Say what lies outside of the drilled steps, '' if nothing does."""
    if result.reference.whole:
        return ""
    return (
        f"what comes after step {result.reference.steps}, such as a learning rate that drops, early stopping, an "
        "evaluation every so many steps, another loop: --steps N, --at STEP and --full see more"
    )


def _unasked(result: DrillResult) -> list[str]:
    return [each.name for each in result.untried if each.why == NOT_ASKED]


def _not_tried(result: DrillResult) -> list[str]:
    unasked = _unasked(result)
    lines = [_unseen(result)]
    lines += [f"{each.text}: {each.why}" for each in result.untried if each.why != NOT_ASKED]
    lines.append(f"{NOT_ASKED}: {', '.join(unasked)}" if unasked else "")
    return [line for line in lines if line]


def number(value: float | None, form: str = "", unit: str = "") -> str:
    """Write a number for a person, '-' where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"


# The card, its picture, the page and the document.

_STYLES = {"good": "green", "bad": "red", "warn": "yellow", "dim": "dim"}
_MARK_TONES = {"yes": "good", "no": "bad", "missed": "warn"}
_VERDICT_TONES = {Verdict.CERTIFIED: "good", Verdict.NOT_CERTIFIED: "bad", Verdict.NOT_JUDGED: "warn"}


def card(result: DrillResult) -> Panel:
    """Draw the card."""
    return Panel(_body(result), title=Text(_title(result)), title_align="left", expand=False, padding=(1, 2))


def _body(result: DrillResult) -> Group:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("scenario")
    table.add_column("held")
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for trial in result.trials:
        table.add_row(trial.text, Text(trial.mark, style=_STYLES[_MARK_TONES[trial.mark]]), *_cells(trial))
    shown: list[RenderableType] = [
        Text(headline(result), style=f"bold {_STYLES[_VERDICT_TONES[result.verdict]]}"),
        *(Text(line) for line in _tried(result)),
        *([table] if result.trials else []),
    ]
    for section in _sections(result):
        lines = Table.grid(padding=(0, 1, 0, 0))
        for line in section.lines:
            lines.add_row(" -", Text(line))
        shown.append(Group(Text(section.title, style=f"bold {_STYLES[section.tone]}"), lines))
    return Group(*(Padding(each, (1 if number else 0, 0, 0, 0)) for number, each in enumerate(shown)))


_WIDTH, _LINE, _COLUMN, _MARGIN = 10.0, 0.21, 0.0727, 0.3
"""Of the picture, of a line and of a letter in it, and around them, in inches."""
_PAINT = {"green": "#1d7a46", "red": "#c0392b", "yellow": "#8a5a00", "dim": "#5b6672"}


def write_picture(path: Path, result: DrillResult) -> Path:
    """Draw the card into a PNG.

    Raises:
        ConfigError: If matplotlib is not installed, or the picture cannot be written there.
    """
    console = Console(width=int((_WIDTH - 2 * _MARGIN) / _COLUMN), highlight=False)
    lines = console.render_lines(Group(Text(_title(result), style="dim"), Text(), _body(result)), pad=False)
    height = len(lines) * _LINE + 2 * _MARGIN

    def picture(plt: Any) -> Any:
        figure = plt.figure(figsize=(_WIDTH, height))
        for number, line in enumerate(lines):
            column, y = 0, 1 - (_MARGIN + (number + 0.5) * _LINE) / height
            for text, style, _ in line:
                x = (_MARGIN + column * _COLUMN) / _WIDTH
                figure.text(x, y, text, fontsize=9, family="monospace", va="center", parse_math=False, **_ink(style))
                column += cell_len(text)
        return figure

    return write_figure(path, picture)


def _ink(style: Style | None) -> dict[str, Any]:
    """Say for matplotlib how a text looks that rich writes in a style."""
    style = style or Style.null()
    name = style.color.name if style.color is not None else "dim" if style.dim else ""
    return {"color": _PAINT.get(name), "fontweight": "bold" if style.bold else "normal"}


def page(result: DrillResult) -> str:
    """Return the card as one page."""
    scope, *promised = _tried(result)
    rows = [{"trial": each, "tone": _MARK_TONES[each.mark], "cells": _cells(each)} for each in result.trials]
    return render(
        "drill.html",
        title=_title(result),
        command=shlex.join(result.command),
        tone=_VERDICT_TONES[result.verdict],
        headline=headline(result),
        scope=scope,
        columns=_COLUMNS,
        rows=rows,
        sections=_sections(result),
        promised=". ".join(promised),
    )


def document(result: DrillResult) -> dict[str, Any]:
    """Return all that was found, for JSON."""
    reference, scenarios = result.reference, []
    for trial in result.trials:
        more = {"survived": trial.survived, "at_steps": trial.at_steps, "lost_steps": trial.lost_steps}
        scenarios.append(asdict(trial) | more | {"notice_to_commit_s": trial.commit_s, "restart_s": trial.restart_s})
    diagnosis = asdict(result.diagnosis) | {"name": result.diagnosis.name} if result.diagnosis else None
    return {
        "command": list(result.command),
        "verdict": result.verdict,
        "passed": result.passed,
        "headline": headline(result),
        "run": result.place,
        "seconds": round(result.seconds, 3),
        "steps": {"drilled": reference.steps, "of": reference.total, "all": reference.whole},
        "reference": asdict(reference) | {"allowed_loss": reference.allowed_loss},
        "scenarios": scenarios,
        "diagnosis": diagnosis,
        "warnings": list(result.warnings),
        "metrics_aside": list(result.aside),
        "files_aside": list(result.files_aside),
        "not_seen": _unseen(result),
        "not_tried": [asdict(each) for each in result.untried],
    }


def not_judged(command: Sequence[str], reason: str) -> dict[str, Any]:
    """Return what JSON says of a program that could not be drilled at all."""
    headline = f"{Verdict.NOT_JUDGED}: {reason}"
    return {"command": list(command), "verdict": Verdict.NOT_JUDGED, "passed": False, "headline": headline}

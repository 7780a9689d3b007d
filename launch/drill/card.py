"""What a drill shows: progress while it goes, and what it found, as a card for the terminal and as JSON.

Its page and its picture say the same, with the words that are made here: the verdict first, then what was tried, what
is wrong and why, what the verdict does not cover, and what was not tried.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jobkit.units import show_duration
from launch.console import Console
from launch.drill.drill import NOT_ASKED, Telling
from launch.drill.scenarios import Scenario, Shown
from launch.drill.verdict import Found, Result, Verdict
from launch.printing import aligned


def listed(wanted: Sequence[Scenario]) -> list[dict[str, Any]]:
    """Return the scenarios for JSON."""
    return [{"name": each.name, "text": each.text, "quick": each.quick} for each in wanted]


def listing(wanted: Sequence[Scenario]) -> str:
    """Return the scenarios for a person."""
    return aligned([("NAME", "QUICK", "WHAT"), *((one.name, "yes" if one.quick else "", one.text) for one in wanted)])


class _Lines(Telling):
    """Tells a line per event: for pipes, and for --json on standard error."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """Tell a line."""
        self._console.print(Text(text), soft_wrap=True)

    def ended(self, found: Found) -> None:
        """Tell how a scenario went."""
        self.say(f"  {'ok   ' if found.survived else 'FAIL '} {found.name}: {_in_short(found)}")


class _Live(_Lines):
    """Shows what every run is doing, below the lines, on a terminal."""

    def __init__(self, console: Console, live: Live) -> None:
        super().__init__(console)
        self._live = live
        self._moving: dict[str, str] = {}

    def moved(self, name: str, detail: str) -> None:
        """Show what a run is doing."""
        self._moving[name] = detail
        table = Table.grid(padding=(0, 2))
        for each, what in list(self._moving.items()):
            table.add_row("", Text(each, style="cyan"), Text(what, style="dim"))
        self._live.update(table)

    def say(self, text: str) -> None:
        """Tell a line above what moves."""
        self._moving.clear()
        super().say(text)

    def ended(self, found: Found) -> None:
        """Tell how a scenario went, and show it no more."""
        still = {name: detail for name, detail in self._moving.items() if name != found.name}
        super().ended(found)
        self._moving = still


@contextmanager
def telling(as_json: bool, wanted: Sequence[Scenario]) -> Iterator[Telling]:
    """Give what shows a drill's progress."""
    console = Console(stderr=as_json, highlight=False)
    if not console.is_terminal:
        yield _Lines(console)
        return
    with Live(console=console, refresh_per_second=5, transient=True) as live:
        yield _Live(console, live)


def _in_short(found: Found) -> str:
    if not found.survived:
        return (found.broken or [found.missed])[0]
    return f"{found.text}; {_number(found.lost_steps)} steps lost, {show_duration(found.seconds)}"


def show(result: Result, written: Mapping[str, Path], *, kept: bool) -> None:
    """Print the card, and where else it was written, by what it is there."""
    console = Console(highlight=False)
    console.print(card(result))
    if kept:
        console.print(Text(f"the runs are kept in {result.place}"), soft_wrap=True)
    for what, path in written.items():
        console.print(Text(f"{what}: {path}"), soft_wrap=True)


# The words.

COLUMNS = ("at step", "lost", "commit", "back", "bits")
"""Of a scenario: where it was interrupted, steps done again, seconds from the notice to the commit and from the end to
the next completed step, and how its state compares with the undisturbed run's."""


def cells(found: Found) -> tuple[str, ...]:
    """Return a scenario's row, below `COLUMNS`."""
    bits = {True: "same", False: "differ", None: "-"}[found.identical]
    at = ", ".join(map(str, found.at_steps)) or "-"
    return (at, _number(found.lost_steps), _seconds(found.commit_s), _seconds(found.restart_s), bits)


def mark(found: Found) -> str:
    """Say how a scenario went, in a word."""
    return "yes" if found.survived else "no" if found.broken else "missed"


def title(result: Result) -> str:
    """Return what was drilled."""
    return f"jobkit drill -- {shlex.join(result.command)}"


def headline(result: Result) -> str:
    """Say the verdict, and for which steps."""
    shown, verdict = result.shown, result.verdict
    if verdict is Verdict.NOT_CERTIFIED:
        wrong = sum(bool(outcome.broken) for outcome in result.found)
        return f"{verdict}: {wrong} of {len(result.found)} scenarios broke a promise"
    if verdict is Verdict.NOT_JUDGED:
        missed = ", ".join(outcome.name for outcome in result.found if outcome.missed)
        why = f"{missed} could not be hit" if missed else "nothing that was asked for could be tried"
        return f"{verdict}: {why}"
    unasked = len(_unasked(result))
    few = f", in {len(result.found)} of {len(result.found) + unasked} scenarios" if unasked else ""
    if shown.whole:
        return f"{verdict}: every promise held, in all {shown.steps} steps{few}"
    return f"{verdict} for {_steps(shown)}: every promise held{few}"


def _steps(shown: Shown) -> str:
    return f"all {shown.steps} steps" if shown.whole else f"the first {shown.steps} of {shown.total} steps"


def tried(result: Result) -> list[str]:
    """Say how much was tried, and what is promised."""
    shown = result.shown
    per_step, start = show_duration(shown.step_s), show_duration(shown.start_s)
    number = f"{len(result.found)} scenario" + "s" * (len(result.found) != 1)
    return [
        f"{number} over {_steps(shown)}, in {show_duration(result.seconds)}: "
        f"{per_step} a step, the first after {start}, a save every {shown.save_every} for the drill",
        "promised: a notice costs no step, a kill the save interval and what is trained while a save is in flight, "
        f"here {shown.allowed_loss}; the run goes on by itself and ends with the undisturbed run's bits",
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


def sections(result: Result) -> list[Section]:
    """Say what is wrong, why, what the verdict does not cover, what was not compared and what was not tried."""
    wrong = [each for each in result.found if each.broken]
    parts = [Section(f"{each.name}: {each.text}", [*each.done, *_few(each.broken)], "bad") for each in wrong]
    why = result.diagnosis
    if why is not None:
        first = [f"first at step {why.step}: {why.tensor}"] if why.step is not None else []
        parts.append(Section(f"why: {why.name}", [*first, *why.evidence, f"remedy: {why.remedy}"], "warn"))
    parts.append(Section("warnings", list(result.warnings), "warn"))
    aside = [f"{what}: {', '.join(names)}" for what, names in _aside(result).items() if names]
    parts.append(Section("not compared, since undisturbed runs differ in them too", aside, "dim"))
    parts.append(Section("not tried", _not_tried(result), "dim"))
    return [each for each in parts if each.lines]


_FEW = 5


def _few(lines: list[str]) -> list[str]:
    more = len(lines) - _FEW
    return lines if more <= 1 else [*lines[:_FEW], f"and {more} more, see --json"]


def _aside(result: Result) -> dict[str, tuple[str, ...]]:
    return {"metrics": result.aside, "files": result.files_aside}


def _unseen(result: Result) -> str:
    """Say what lies outside of the drilled steps, '' if nothing does."""
    if result.shown.whole:
        return ""
    return (
        f"what comes after step {result.shown.steps}, such as a learning rate that drops, early stopping, an "
        "evaluation every so many steps, another loop: --steps N, --at STEP and --full see more"
    )


def _unasked(result: Result) -> list[str]:
    return [each.name for each in result.untried if each.why == NOT_ASKED]


def _not_tried(result: Result) -> list[str]:
    unasked = _unasked(result)
    lines = [_unseen(result)]
    lines += [f"{each.text}: {each.why}" for each in result.untried if each.why != NOT_ASKED]
    lines.append(f"{NOT_ASKED}: {', '.join(unasked)}" if unasked else "")
    return [line for line in lines if line]


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


# The card and the document.

_STYLES = {"good": "green", "bad": "red", "warn": "yellow", "dim": "dim"}
MARK_TONES = {"yes": "good", "no": "bad", "missed": "warn"}
VERDICT_TONES = {Verdict.CERTIFIED: "good", Verdict.NOT_CERTIFIED: "bad", Verdict.NOT_JUDGED: "warn"}


def card(result: Result) -> Panel:
    """Draw the card."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("scenario")
    table.add_column("held")
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in result.found:
        table.add_row(outcome.text, Text(mark(outcome), style=_STYLES[MARK_TONES[mark(outcome)]]), *cells(outcome))
    shown: list[RenderableType] = [
        Text(headline(result), style=f"bold {_STYLES[VERDICT_TONES[result.verdict]]}"),
        *(Text(line) for line in tried(result)),
        *([table] if result.found else []),
    ]
    for section in sections(result):
        lines = Table.grid(padding=(0, 1, 0, 0))
        for line in section.lines:
            lines.add_row(" -", Text(line))
        shown.append(Group(Text(section.title, style=f"bold {_STYLES[section.tone]}"), lines))
    apart = Group(*(Padding(each, (1 if number else 0, 0, 0, 0)) for number, each in enumerate(shown)))
    return Panel(apart, title=Text(title(result)), title_align="left", expand=False, padding=(1, 2))


def document(result: Result) -> dict[str, Any]:
    """Return all that was found, for JSON."""
    shown, scenarios = result.shown, []
    for outcome in result.found:
        more = {"survived": outcome.survived, "at_steps": outcome.at_steps, "lost_steps": outcome.lost_steps}
        scenarios.append(
            asdict(outcome) | more | {"notice_to_commit_s": outcome.commit_s, "restart_s": outcome.restart_s}
        )
    diagnosis = asdict(result.diagnosis) | {"name": result.diagnosis.name} if result.diagnosis else None
    return {
        "command": list(result.command),
        "verdict": result.verdict,
        "passed": result.passed,
        "headline": headline(result),
        "run": result.place,
        "seconds": round(result.seconds, 3),
        "steps": {"drilled": shown.steps, "of": shown.total, "all": shown.whole},
        "reference": asdict(shown) | {"allowed_loss": shown.allowed_loss},
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

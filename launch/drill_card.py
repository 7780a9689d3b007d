"""What a drill shows: progress while it goes, a card for the terminal, a page, and JSON."""

import html as html_
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jobkit.units import show_duration
from launch.drill import Telling
from launch.printed import aligned
from launch.scenarios import Scenario
from launch.verdict import Found, Result


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
    if found.broken:
        return found.broken[0]
    return f"{found.text}; {_number(found.lost_steps)} steps lost, {show_duration(found.seconds)}"


def show(result: Result, *, kept: bool, html: Path | None) -> None:
    """Print the card."""
    console = Console(highlight=False)
    console.print(card(result))
    if kept:
        console.print(Text(f"the runs are kept in {result.place}"), soft_wrap=True)
    if html is not None:
        console.print(Text(f"page: {html}"), soft_wrap=True)


_COLUMNS = ("steps lost", "to commit", "restart", "bits")


def _cells(found: Found) -> tuple[str, ...]:
    bits = {True: "same", False: "differ", None: "-"}[found.identical]
    return (_number(found.lost_steps), _seconds(found.commit_s), _seconds(found.restart_s), bits)


def card(result: Result) -> Panel:
    """Draw the card."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("scenario")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("survived")
    for found in result.found:
        mark = "[green]yes[/green]" if found.survived else "[bold red]no[/bold red]"
        table.add_row(found.text, *_cells(found), mark)
    grid = Table.grid(padding=(1, 0, 0, 0))
    shown = result.shown
    grid.add_row(Text(f"{shown.steps} steps, a save every {shown.save_every}; {show_duration(result.seconds)} in all"))
    grid.add_row(table)
    for found in result.found:
        if found.broken:
            grid.add_row(Text("\n".join([f"{found.name}: {found.text}", *(f"  {line}" for line in found.broken)])))
    if result.diagnosis is not None:
        grid.add_row(Text("\n".join(_told(result)), style="yellow"))
    grid.add_row(f"[bold green]{VERDICTS[True]}[/]" if result.passed else f"[bold red]{VERDICTS[False]}[/]")
    title = f"jobkit drill -- {shlex.join(result.command)}"
    return Panel(grid, title=Text(title), title_align="left", expand=False, padding=(1, 2))


VERDICTS = {True: "certified: every promise held", False: "not certified: a promise did not hold"}


def _told(result: Result) -> list[str]:
    found = result.diagnosis
    assert found is not None
    lines = [found.name]
    if found.step is not None:
        lines.append(f"  first at step {found.step}: {found.tensor}")
    lines += [f"  {each}" for each in found.evidence]
    lines.append(f"  remedy: {found.remedy}")
    return lines


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def document(result: Result) -> dict[str, Any]:
    """Return all that was found, for JSON."""
    scenarios = []
    for found in result.found:
        told = asdict(found) | {"survived": found.survived, "lost_steps": found.lost_steps}
        told |= {"notice_to_commit_s": found.commit_s, "restart_s": found.restart_s}
        scenarios.append(told)
    diagnosis = asdict(result.diagnosis) | {"name": result.diagnosis.name} if result.diagnosis else None
    return {
        "command": list(result.command),
        "passed": result.passed,
        "run": result.place,
        "seconds": round(result.seconds, 3),
        "reference": asdict(result.shown),
        "scenarios": scenarios,
        "diagnosis": diagnosis,
    }


# The page.

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
.box { background: var(--box); border-left: 3px solid var(--warn); padding: 8px 16px; margin: 16px 0;
       overflow-wrap: anywhere }
td:first-child { min-width: 150px } @media (max-width: 600px) { body { padding: 14px } th, td { font-size: 13px } }
.small { font-size: 13px } ul { margin: 4px 0; padding-left: 20px }
"""


def page(result: Result) -> str:
    """Return the card as one self-contained HTML page: no script, no request to anywhere."""
    e = html_.escape
    shown = result.shown
    verdict, tone = VERDICTS[result.passed], "good" if result.passed else "bad"
    head = "".join(f'<th class="n">{name}</th>' for name in _COLUMNS)
    rows = "".join(_row(found) for found in result.found)
    box = ""
    if result.diagnosis is not None:
        first, *rest = _told(result)
        items = "".join(f"<li>{e(line.strip())}</li>" for line in rest)
        box = f'<div class="box"><b>{e(first)}</b><ul>{items}</ul></div>'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>jobkit drill: {e(shlex.join(result.command))}</title><style>{_STYLE}</style></head><body>
<h1>jobkit drill</h1><code>{e(shlex.join(result.command))}</code>
<div class="verdict {tone}">{e(verdict)}</div>
<p class="dim">{shown.steps} steps, a save every {shown.save_every} steps, {e(show_duration(shown.step_s))} a step;
first step after {e(show_duration(shown.start_s))}; the drill took {e(show_duration(result.seconds))}.</p>
{box}<div class="scroll"><table><thead><tr><th>scenario</th>{head}<th>survived</th></tr></thead>
<tbody>{rows}</tbody></table></div>
<p class="dim small">Promised: the run goes on by itself; no step lost on a notice, at most one save interval on a kill;
the same bits as the undisturbed run, to the last.</p>
</body></html>
"""


def _row(found: Found) -> str:
    e = html_.escape
    cells = "".join(f'<td class="n">{e(cell)}</td>' for cell in _cells(found))
    mark = '<td class="good">yes</td>' if found.survived else '<td class="bad">no</td>'
    lines = "".join(f"<li>{e(line)}</li>" for line in found.done)
    broken = "".join(f'<li class="bad">{e(line)}</li>' for line in found.broken)
    more = f'<ul class="small dim">{lines}{broken}</ul>' if lines or broken else ""
    return f"<tr><td>{e(found.text)}{more}</td>{cells}{mark}</tr>"

"""The report in a terminal."""

import time
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jobkit.units import show_duration, show_size
from launch.report.goodput import Attempt, Goodput, by_share, lost_of, lost_unseen
from launch.report.phases import COLORS, WORDS, percent
from launch.report.timeline import Phase

_BAR = 64
"""Cells of a bar."""
_LANES = 40
"""How many attempts have a lane; of more the newest are shown."""


def shown(found: Goodput) -> RenderableType:
    """Lay one run out for a terminal."""
    parts: list[RenderableType] = [_head(found)]
    if found.total_s:
        parts += [Text(), _shares(found), Text(), _timeline(found)]
    parts += [Text(), _attempts(found), Text(), _pairs(figures(found))]
    return Group(*parts)


def _head(found: Goodput) -> Text:
    attempts = f"{len(found.attempts)} attempt{'s' * (len(found.attempts) != 1)}"
    step = f", step {found.steps:,}" if found.steps is not None else ""
    state = f"  {found.state}" if found.state else ""
    text = Text(found.run, style="bold").append(state, style="bold green" if found.state == "done" else "bold")
    text.append(f"  {attempts}{step} in {show_duration(found.total_s)}", style="not bold")
    if found.reason and found.state not in ("done", found.reason):
        text.append(f"\n{found.reason}", style="not bold dim")
    return text


def _shares(found: Goodput) -> RenderableType:
    bar = Text()
    cells = _spread_cells([seconds for _, seconds in by_share(found)], _BAR)
    for (phase, _), count in zip(by_share(found), cells, strict=True):
        bar.append("█" * count, style=COLORS[phase])
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    for phase, seconds in by_share(found):
        name = Text("■ ", style=COLORS[phase]).append(WORDS[phase], style="default")
        table.add_row(name, percent(found.shares[phase]), show_duration(seconds))
    title = Text.assemble("goodput ", (percent(found.goodput), "bold"), f"  of {show_duration(found.total_s)}")
    return Group(title, bar, table)


def _spread_cells(amounts: Sequence[float], cells: int) -> list[int]:
    """Share out the cells of a bar: whole ones, the largest remainders rounded up."""
    total = sum(amounts)
    exact = [amount / total * cells for amount in amounts]
    given = [int(part) for part in exact]
    order = sorted(range(len(exact)), key=lambda index: given[index] - exact[index])
    for index in order[: cells - sum(given)]:
        given[index] += 1
    return given


def _timeline(found: Goodput) -> RenderableType:
    """Draw a lane for each attempt; a cell has the colour of what it was mostly spent on."""
    start, width = found.intervals[0].start, found.intervals[-1].end - found.intervals[0].start
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(justify="right", style="dim")
    for attempt in found.attempts[-_LANES:]:
        own = [one for one in found.intervals if one.attempt == attempt.attempt]
        lane = Text()
        for cell in range(_BAR):
            a, b = start + width * cell / _BAR, start + width * (cell + 1) / _BAR
            parts = [(min(b, one.end) - max(a, one.start), one.phase) for one in own if one.start < b and one.end > a]
            lane.append("▆" if parts else "·", style=COLORS[max(parts)[1]] if parts else "dim")
        table.add_row(str(attempt.attempt), lane)
    left = Text("0", style="dim")
    right = show_duration(width)
    axis = left.append(right.rjust(_BAR - 1))
    table.add_row("", axis)
    return table


def _attempts(found: Goodput) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in (("attempt", "right"), ("length", "right"), ("steps", "left"), ("lost", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("its end cost", justify="right", no_wrap=True)
    if found.cost is not None:
        table.add_column("money", justify="right", no_wrap=True)
    table.add_column("ended", overflow="fold")
    for one in found.attempts[-_LANES:]:
        money = [f"{one.cost:,.2f}"] if found.cost is not None else []
        cost = show_duration(one.ending_s) if one.ending_s else "-"
        table.add_row(
            str(one.attempt),
            show_duration(one.held_s),
            steps_of(one),
            lost_of(one),
            cost,
            *money,
            Text(end_of(one)),
        )
    return table


def steps_of(one: Attempt) -> str:
    """Write from where to where an attempt trained."""
    return "-" if one.from_step is None else f"{one.from_step:,} to {one.to_step:,}"


def end_of(one: Attempt) -> str:
    """Write how an attempt ended."""
    if one.ended is None:
        return "running"
    outcome = one.outcome or "unknown"
    if one.reason.startswith(outcome):
        return one.reason
    return outcome if one.reason in ("", "finished") else f"{outcome}: {one.reason}"


def figures(found: Goodput) -> Iterator[tuple[str, str]]:
    """Yield what is worth knowing beside the shares, as pairs of words for a person."""
    lost = f"{found.lost_steps:,} ({found.repeated_steps:,} trained again) of {found.executed_steps:,}"
    if lost_unseen(found):
        lost = (
            f"unknown, {show_duration(found.seconds[Phase.LOST])} of training: of an own loop only the saves are known"
        )
    yield "steps lost", lost
    if found.to_save:
        yield "saved on notice", f"{found.saved_on_notice} of {found.to_save}"
    if (commit := found.notice_to_commit_s) is not None:
        yield "notice to commit", f"{_seconds(commit.median)} median, {_seconds(commit.max)} longest"
    if (first := found.first_step_s) is not None:
        yield "time to first step", f"{_seconds(first.median)} median, {_seconds(first.max)} longest"
    if found.blocking_s is not None and found.durable_s is not None:
        size = f" of {show_size(found.save_bytes)}" if found.save_bytes is not None else ""
        yield "saves", f"{found.saves}{size}" + (f", {found.failed_saves} failed" if found.failed_saves else "")
        yield "a save blocks", f"{_seconds(found.blocking_s.median)} median, {_seconds(found.blocking_s.total)} in all"
        yield "durable after", f"{_seconds(found.durable_s.median)} median, {_seconds(found.durable_s.max)} longest"
    if found.compile_hits is not None:
        yield "compile cache", f"{found.compile_hits} hits, {found.compile_misses} misses"
    if found.stalls:
        yield "stalls", str(found.stalls)
    if found.cost is not None and found.cost_lost is not None:
        yield "money", f"{found.cost:,.2f}, of it {found.cost_lost:,.2f} not for training"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else show_duration(seconds)


def _pairs(pairs: Iterator[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in pairs:
        table.add_row(name, value)
    return table


def overview(runs: Sequence[Goodput]) -> Table:
    """Lay many runs out as a table."""
    priced = any(run.cost is not None for run in runs)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, name in enumerate(overview_head(priced=priced)):
        table.add_column(name, justify="left" if index < 2 else "right", no_wrap=index > 0, overflow="fold")
    for run in runs:
        table.add_row(*overview_row(run, priced=priced))
    return table


def overview_head(*, priced: bool) -> list[str]:
    """Name the columns of the table of many runs."""
    names = ["run", "state", "attempts", "step", "time", "goodput", "lost", "saved"]
    return [*names, "money"] if priced else names


def overview_row(found: Goodput, *, priced: bool) -> list[str]:
    """Write what the table of many runs says of one."""
    saved = f"{found.saved_on_notice}/{found.to_save}" if found.to_save else "-"
    step = "-" if found.steps is None else f"{found.steps:,}"
    row = [found.name, found.state or "-", str(len(found.attempts)), step, show_duration(found.total_s)]
    row += [percent(found.goodput), lost_of(found), saved]
    return [*row, "-" if found.cost is None else f"{found.cost:,.2f}"] if priced else row


def clock(t: float) -> str:
    """Write a moment for a person, in this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t))


WAITING = (Phase.QUEUE, Phase.IDLE)
"""Phases in which no attempt runs."""

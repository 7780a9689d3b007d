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


def shown(goodput: Goodput) -> RenderableType:
    """Lay one run out for a terminal."""
    parts: list[RenderableType] = [_head(goodput)]
    if goodput.total_s:
        parts += [Text(), _shares(goodput), Text(), _timeline(goodput)]
    parts += [Text(), _attempts(goodput), Text(), _pairs(figures(goodput))]
    return Group(*parts)


def _head(goodput: Goodput) -> Text:
    attempts = f"{len(goodput.attempts)} attempt{'s' * (len(goodput.attempts) != 1)}"
    step = f", step {goodput.steps:,}" if goodput.steps is not None else ""
    state = f"  {goodput.state}" if goodput.state else ""
    text = Text(goodput.run, style="bold").append(state, style="bold green" if goodput.state == "done" else "bold")
    text.append(f"  {attempts}{step} in {show_duration(goodput.total_s)}", style="not bold")
    if goodput.reason and goodput.state not in ("done", goodput.reason):
        text.append(f"\n{goodput.reason}", style="not bold dim")
    return text


def _shares(goodput: Goodput) -> RenderableType:
    bar = Text()
    cells = _spread_cells([seconds for _, seconds in by_share(goodput)], _BAR)
    for (phase, _), count in zip(by_share(goodput), cells, strict=True):
        bar.append("█" * count, style=COLORS[phase])
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    for phase, seconds in by_share(goodput):
        name = Text("■ ", style=COLORS[phase]).append(WORDS[phase], style="default")
        table.add_row(name, percent(goodput.shares[phase]), show_duration(seconds))
    title = Text.assemble("goodput ", (percent(goodput.goodput), "bold"), f"  of {show_duration(goodput.total_s)}")
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


def _timeline(goodput: Goodput) -> RenderableType:
    """Draw a lane for each attempt; a cell has the colour of what it was mostly spent on."""
    start, width = goodput.intervals[0].start, goodput.intervals[-1].end - goodput.intervals[0].start
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(justify="right", style="dim")
    for attempt in goodput.attempts[-_LANES:]:
        own = [one for one in goodput.intervals if one.attempt == attempt.attempt]
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


def _attempts(goodput: Goodput) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in (("attempt", "right"), ("length", "right"), ("steps", "left"), ("lost", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("its end cost", justify="right", no_wrap=True)
    if goodput.cost is not None:
        table.add_column("money", justify="right", no_wrap=True)
    table.add_column("ended", overflow="fold")
    for one in goodput.attempts[-_LANES:]:
        money = [f"{one.cost:,.2f}"] if goodput.cost is not None else []
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


def figures(goodput: Goodput) -> Iterator[tuple[str, str]]:
    """Yield what is worth knowing beside the shares, as pairs of words for a person."""
    lost = f"{goodput.lost_steps:,} ({goodput.repeated_steps:,} trained again) of {goodput.executed_steps:,}"
    if lost_unseen(goodput):
        unseen = show_duration(goodput.seconds[Phase.LOST])
        lost = f"unknown, {unseen} of training: of an own loop only the saves are known"
    yield "steps lost", lost
    if goodput.to_save:
        yield "saved on notice", f"{goodput.saved_on_notice} of {goodput.to_save}"
    if (commit := goodput.notice_to_commit_s) is not None:
        yield "notice to commit", f"{_seconds(commit.median)} median, {_seconds(commit.max)} longest"
    if (first := goodput.first_step_s) is not None:
        yield "time to first step", f"{_seconds(first.median)} median, {_seconds(first.max)} longest"
    if goodput.blocking_s is not None and goodput.durable_s is not None:
        size = f" of {show_size(goodput.save_bytes)}" if goodput.save_bytes is not None else ""
        yield "saves", f"{goodput.saves}{size}" + (f", {goodput.failed_saves} failed" if goodput.failed_saves else "")
        yield (
            "a save blocks",
            f"{_seconds(goodput.blocking_s.median)} median, {_seconds(goodput.blocking_s.total)} in all",
        )
        yield "durable after", f"{_seconds(goodput.durable_s.median)} median, {_seconds(goodput.durable_s.max)} longest"
    if goodput.compile_hits is not None:
        yield "compile cache", f"{goodput.compile_hits} hits, {goodput.compile_misses} misses"
    if goodput.stalls:
        yield "stalls", str(goodput.stalls)
    if goodput.cost is not None and goodput.cost_lost is not None:
        yield "money", f"{goodput.cost:,.2f}, of it {goodput.cost_lost:,.2f} not for training"


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


def overview_row(goodput: Goodput, *, priced: bool) -> list[str]:
    """Write what the table of many runs says of one."""
    saved = f"{goodput.saved_on_notice}/{goodput.to_save}" if goodput.to_save else "-"
    step = "-" if goodput.steps is None else f"{goodput.steps:,}"
    row = [goodput.name, goodput.state or "-", str(len(goodput.attempts)), step, show_duration(goodput.total_s)]
    row += [percent(goodput.goodput), lost_of(goodput), saved]
    return [*row, "-" if goodput.cost is None else f"{goodput.cost:,.2f}"] if priced else row


def clock(t: float) -> str:
    """Write a moment for a person, in this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t))


WAITING = (Phase.QUEUE, Phase.IDLE)
"""Phases in which no attempt runs."""

"""The report in a terminal."""

import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from jobkit.units import counted, show_duration, show_size
from launch.report.goodput import AttemptFigures, Goodput, Spread, by_share, lost_of, lost_unseen
from launch.report.phases import RunPhase, percent
from launch.report.timeline import lanes

_BAR = 64
"""Cells of a bar."""
_LANES = 40
"""How many attempts have a lane; of more the newest are shown."""


def laid_out(goodputs: Sequence[Goodput], verdict: str = "") -> RenderableType:
    """Lay one run out for a terminal, or many as a table, with what is said of all of them."""
    if len(goodputs) > 1:
        table = _table(overview(goodputs), left=("run", "state"), folds="run")
        return Group(table, Text(f"\n{verdict}")) if verdict else table
    return _run(goodputs[0])


def _run(goodput: Goodput) -> RenderableType:
    parts: list[RenderableType] = [_head(goodput)]
    if goodput.time.total_s:
        parts += [Text(), _shares(goodput), Text(), _timeline(goodput)]
    attempts = _table(attempts_table(goodput, most=_LANES), left=("steps", "ended"), folds="ended")
    return Group(*parts, Text(), attempts, Text(), in_pairs(figures(goodput)))


def _head(goodput: Goodput) -> Text:
    steps = goodput.progress.steps
    step = f", step {steps:,}" if steps is not None else ""
    state = f"  {goodput.state}" if goodput.state else ""
    text = Text(goodput.run, style="bold").append(state, style="bold green" if goodput.state == "done" else "bold")
    count, length = counted(len(goodput.attempts), "attempt"), show_duration(goodput.time.total_s)
    text.append(f"  {count}{step} in {length}", style="not bold")
    if goodput.reason and goodput.state not in ("done", goodput.reason):
        text.append(f"\n{goodput.reason}", style="not bold dim")
    return text


def _shares(goodput: Goodput) -> RenderableType:
    spent = by_share(goodput)
    bar = Text()
    edges = [round(_BAR * share) for share in accumulate(goodput.time.shares[phase] for phase, _ in spent)]
    for (phase, _), begin, end in zip(spent, [0, *edges[:-1]], edges, strict=True):
        bar.append("█" * (end - begin), style=phase.color)
    table = Table.grid(Column(), Column(justify="right"), Column(justify="right"), padding=(0, 2, 0, 0))
    for phase, seconds in spent:
        name = Text("■ ", style=phase.color).append(phase.words, style="default")
        table.add_row(name, percent(goodput.time.shares[phase]), show_duration(seconds))
    total = f"  of {show_duration(goodput.time.total_s)}"
    return Group(Text.assemble("goodput ", (percent(goodput.time.goodput), "bold"), total), bar, table)


def _timeline(goodput: Goodput) -> RenderableType:
    """Draw a lane for each attempt; a cell has the colour of what it was mostly spent on."""
    start, width = goodput.intervals[0].start, goodput.intervals[-1].end - goodput.intervals[0].start
    table = Table.grid(Column(justify="right", style="dim"), Column(), padding=(0, 1, 0, 0))
    numbers = [one.attempt for one in goodput.attempts]
    by_attempt = lanes(goodput.intervals, numbers)
    for number in numbers[-_LANES:]:
        own = [one for one in by_attempt[number] if not one.phase.waits]
        lane = Text()
        for cell in range(_BAR):
            a, b = start + width * cell / _BAR, start + width * (cell + 1) / _BAR
            parts = [(min(b, one.end) - max(a, one.start), one.phase) for one in own if one.start < b and one.end > a]
            lane.append("▆" if parts else "·", style=max(parts)[1].color if parts else "dim")
        table.add_row(str(number), lane)
    table.add_row("", Text("0" + show_duration(width).rjust(_BAR - 1), style="dim"))
    return table


def _table(rows: Sequence[Sequence[str]], *, left: Collection[str], folds: str) -> Table:
    """Make a table of rows below a head, of which one column may be narrower than what is in it."""
    columns = [
        Column(name, justify="left" if name in left else "right", no_wrap=name != folds, overflow="fold")
        for name in rows[0]
    ]
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table


def points_table(rows: Sequence[Sequence[str]], styles: Mapping[str, str]) -> Table:
    """Make a table of a sweep's points: rows below a head, one line each, the state in its colour.

    Args:
        rows: The head and the rows.
        styles: By state.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in rows[0]:
        table.add_column(name, no_wrap=True, overflow="ellipsis", ratio=1 if name == "REASON" else None)
    for row in rows[1:]:
        table.add_row(*(Text(word, style=styles.get(word, "")) for word in row))
    return table


def attempts_table(goodput: Goodput, *, most: int = sys.maxsize) -> list[list[str]]:
    """Lay the attempts out as rows below a head: of many the newest."""
    money = ["money"] if goodput.money.cost is not None else []
    rows = [["attempt", "length", "steps", "lost", "its end cost", *money, "ended"]]
    for one in goodput.attempts[-most:]:
        steps = "-" if one.from_step is None else f"{one.from_step:,} to {one.to_step:,}"
        cost = show_duration(one.ending_s) if one.ending_s else "-"
        money = [f"{one.cost:,.2f}"] if one.cost is not None else []
        rows.append([str(one.attempt), show_duration(one.held_s), steps, lost_of(one), cost, *money, _end_of(one)])
    return rows


def _end_of(one: AttemptFigures) -> str:
    """Write how an attempt ended."""
    if one.ended is None:
        return "running"
    outcome = one.outcome or "unknown"
    if one.reason.startswith(outcome):
        return one.reason
    return outcome if one.reason in ("", "finished") else f"{outcome}: {one.reason}"


def figures(goodput: Goodput) -> Iterator[tuple[str, str]]:
    """Yield what is worth knowing beside the shares, as pairs of words for a person."""
    progress, notices, saving, compiling = goodput.progress, goodput.preemption, goodput.saving, goodput.compiling
    lost = f"{progress.lost_steps:,} ({progress.repeated_steps:,} trained again) of {progress.executed_steps:,}"
    if lost_unseen(goodput):
        unseen = show_duration(goodput.time.seconds[RunPhase.LOST])
        lost = f"unknown, {unseen} of training: of an own loop only the saves are known"
    yield "steps lost", lost
    if notices.to_save:
        yield "saved on notice", f"{notices.saved_on_notice} of {notices.to_save}"
    if (commit := notices.notice_to_commit_s) is not None:
        yield "notice to commit", _longest(commit)
    if (first := goodput.first_step_s) is not None:
        yield "time to first step", _longest(first)
    if saving.blocking_s is not None and saving.durable_s is not None:
        size = f" of {show_size(saving.save_bytes)}" if saving.save_bytes is not None else ""
        yield "saves", f"{saving.saves}{size}" + (f", {saving.failed_saves} failed" if saving.failed_saves else "")
        blocked = saving.blocking_s
        yield "a save blocks", f"{_seconds(blocked.median)} median, {_seconds(blocked.total)} in all"
        yield "durable after", _longest(saving.durable_s)
    if compiling.cached is not None:
        counts = f"{compiling.compile_hits} hits, {compiling.compile_misses} misses"
        yield "compile cache", counts if compiling.cached else "none"
    if goodput.stalls:
        yield "stalls", str(goodput.stalls)
    if goodput.money.cost is not None:
        yield "money", f"{goodput.money.cost:,.2f}, of it {goodput.money.cost_lost:,.2f} not for training"


def _longest(spread: Spread) -> str:
    return f"{_seconds(spread.median)} median, {_seconds(spread.max)} longest"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else show_duration(seconds)


def in_pairs(pairs: Iterable[tuple[str, RenderableType]]) -> Table:
    """Lay pairs of a name and what it stands for out for a terminal."""
    table = Table.grid(Column(style="dim", no_wrap=True), Column(overflow="fold"), padding=(0, 2, 0, 0))
    for name, value in pairs:
        table.add_row(name, value)
    return table


def overview(goodputs: Sequence[Goodput]) -> list[list[str]]:
    """Lay many runs out as rows below a head."""
    priced = any(one.money.cost is not None for one in goodputs)
    rows = [["run", "state", "attempts", "step", "time", "goodput", "lost", "saved", *(["money"] if priced else [])]]
    for one in goodputs:
        step = "-" if one.progress.steps is None else f"{one.progress.steps:,}"
        saved = f"{one.preemption.saved_on_notice}/{one.preemption.to_save}" if one.preemption.to_save else "-"
        row = [one.name, one.state or "-", str(len(one.attempts)), step, show_duration(one.time.total_s)]
        money = ["-" if one.money.cost is None else f"{one.money.cost:,.2f}"] if priced else []
        rows.append([*row, percent(one.time.goodput), lost_of(one), saved, *money])
    return rows


def clock(t: float) -> str:
    """Write a moment for a person, in this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t))

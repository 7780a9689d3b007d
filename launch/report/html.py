"""The report as one HTML page: no script, no font, no request to anywhere, light or dark as its reader's machine is."""

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jobkit
from jobkit.contract import Outcome
from jobkit.errors import ConfigError
from jobkit.rundir.store import explain as says
from jobkit.units import show_duration
from launch.lifecycle.history import History, number_of
from launch.report.explain import explain
from launch.report.goodput import Attempt, Goodput, by_share, lost_of, measure
from launch.report.loss_curve import Curve, curve_of, nice_steps
from launch.report.phases import COLORS, MEANING, WORDS, ink_on, percent
from launch.report.template import render
from launch.report.terminal import WAITING, clock, end_of, figures, overview_head, overview_row, steps_of
from launch.report.timeline import Interval, Phase

_TICKS_S = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200]
_TICKS_S += [86400 * days for days in (1, 2, 5, 10, 20, 50, 100)]
_TICKS = 7
_LABEL_SHARE = 0.16
"""A part of the bar that is wide enough for its own name."""
LEFTWARDS = 80
"""A label that begins so far right, in per cent, is written to the left of its line."""
LETTER = 0.78
"""Width of a letter, in per cent of the narrowest plot that shows more than the first label (1000 px wide)."""


def write_page(path: Path, histories: Sequence[History]) -> Path:
    """Write the page of some runs.

    Raises:
        ConfigError: If it cannot be written there.
    """
    text = page(histories)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(says(error, f"cannot write {path}"))) from None
    return path


def page(histories: Sequence[History]) -> str:
    """Return the page of some runs."""
    goodputs = [measure(history) for history in histories]
    title = goodputs[0].name if len(goodputs) == 1 else f"{len(goodputs)} runs"
    return render(
        "report.html",
        version=jobkit.__version__,
        title=title,
        gutter=34,
        leftwards=LEFTWARDS,
        colors={str(phase): color for phase, color in COLORS.items()},
        overview=_overview(goodputs) if len(goodputs) > 1 else None,
        runs=[_run(one, history) for one, history in zip(goodputs, histories, strict=True)],
        footer=f"jobkit {jobkit.__version__}, {clock(time.time())}. Phases and figures: jobkit report --help.",
    )


def _overview(found: Sequence[Goodput]) -> dict[str, Any]:
    priced = any(one.cost is not None for one in found)
    return {
        "head": overview_head(priced=priced),
        "wide": ("attempts", "time", "saved"),
        "rows": [overview_row(one, priced=priced) for one in found],
        "time": show_duration(math.fsum(one.total_s for one in found)),
    }


def _run(found: Goodput, history: History) -> dict[str, Any]:
    lanes = _lanes(found, history)
    curve = curve_of(history, found)
    story = explain(found, history)
    return {
        "name": found.name,
        "state": found.state,
        "subtitle": _subtitle(found),
        "tiles": _tiles(found),
        "shares": _shares(found),
        "lanes": lanes,
        "lane_height": max(5, min(24, 900 // max(1, len(lanes)))),
        "lane_gap": 5 if len(lanes) <= 30 else 2,
        "ticks": _ticks(found),
        "legend": [
            _key(phase) for phase in Phase if any(one.phase is phase for one in found.intervals) and phase != "off"
        ],
        "noticed": any(lane["notices"] for lane in lanes),
        "curve": _curve(curve) if curve is not None else None,
        "story": [{"at": clock(one.t), "text": one.text} for one in story.story],
        "advice": [one.text for one in story.advice],
        "attempts": [_attempt(one) for one in found.attempts],
        "priced": found.cost is not None,
        "figures": list(figures(found)),
    }


def _subtitle(found: Goodput) -> str:
    words = [found.run]
    if found.submitted is not None:
        words.append(f"since {clock(found.submitted)}")
    if found.reason and found.reason != found.state:
        words.append(found.reason)
    return " · ".join(words)


def _tiles(found: Goodput) -> list[dict[str, str]]:
    def tile(name: str, value: str, note: str) -> dict[str, str]:
        return {"name": name, "value": value, "note": note}

    tiles = [tile("goodput", percent(found.goodput), f"of {show_duration(found.total_s)}")]
    step = "-" if found.steps is None else f"{found.steps:,}"
    count = len(found.attempts)
    tiles.append(tile("step", step, f"in {count} attempt{'s' * (count != 1)}"))
    tiles.append(tile("steps lost", lost_of(found), f"of {found.executed_steps:,} trained"))
    if found.to_save:
        commit = found.notice_to_commit_s
        note = f"{commit.median:.2f} s to the commit" if commit is not None else "none was committed"
        tiles.append(tile("saved on notice", f"{found.saved_on_notice} of {found.to_save}", note))
    if found.first_step_s is not None:
        tiles.append(tile("to the first step", show_duration(found.first_step_s.median), "median"))
    if found.cost is not None and found.cost_lost is not None:
        tiles.append(tile("money", f"{found.cost:,.2f}", f"of it {found.cost_lost:,.2f} not for training"))
    return tiles


def _key(phase: Phase) -> dict[str, str]:
    return {"name": WORDS[phase], "color": COLORS[phase], "meaning": MEANING[phase]}


def _shares(found: Goodput) -> list[dict[str, Any]]:
    shares = []
    for phase, seconds in by_share(found):
        share = found.shares[phase]
        label = WORDS[phase] if share > _LABEL_SHARE else ""
        shares.append(
            _key(phase)
            | {
                "share": percent(share),
                "time": show_duration(seconds),
                "flex": f"{share:.6f}",
                "label": label,
                "ink": ink_on(phase),
            }
        )
    return shares


# The timeline.


def _lanes(found: Goodput, history: History) -> list[dict[str, Any]]:
    """Lay a lane out for each attempt; the time before it lies in its lane, thin."""
    if not found.intervals:
        return []
    start, end = found.intervals[0].start, found.intervals[-1].end
    numbers = [one.attempt for one in found.attempts] or [0]
    parts: dict[int, list[dict[str, Any]]] = {number: [] for number in numbers}
    upcoming = iter([*numbers, numbers[-1]])
    lane = next(upcoming)
    seen = False
    for one in found.intervals:
        if one.attempt is not None:
            lane, seen = one.attempt, True
        elif seen:  # after an attempt: towards the next one, if there is one
            lane = next((number for number in numbers if number > lane), lane)
            seen = False
        if one.phase is not Phase.OFF:
            parts[lane].append(_part(one, start, end))
    every = max(1, math.ceil(len(numbers) / 45))
    notices = {life.number: _notices([*life.supervisor, *life.program], start, end) for life in history.lives}
    return [
        {
            "number": number,
            "name": str(number) if index % every == 0 else "",
            "parts": parts[number],
            "notices": notices.get(number, []),
        }
        for index, number in enumerate(numbers)
    ]


def _part(one: Interval, start: float, end: float) -> dict[str, Any]:
    width = 1000 / (end - start)
    where = f"attempt {one.attempt}: " if one.attempt is not None else ""
    return {
        "x": f"{(one.start - start) * width:.3f}",
        "width": f"{max(one.seconds * width, 0.6):.3f}",
        "color": COLORS[one.phase],
        "waiting": one.phase in WAITING,
        "title": f"{where}{WORDS[one.phase]}, {show_duration(one.seconds)}, from {clock(one.start)}",
    }


def _notices(events: Iterable[dict[str, Any]], start: float, end: float) -> list[dict[str, str]]:
    """Mark an attempt's first notice; the program hears it at the end of a step, and says how old it is then."""
    notices = [
        (event["t"] - (number_of(event.get("age_s")) or 0.0), event) for event in events if event["event"] == "notice"
    ]
    return [
        {
            "x": f"{1000 * (t - start) / (end - start):.3f}",
            "title": f"notice: {event.get('source', '')} at {clock(t)}",
        }
        for t, event in notices[:1]
        if start <= t <= end
    ]


def _ticks(found: Goodput) -> list[dict[str, Any]]:
    if not found.intervals:
        return []
    length = found.intervals[-1].end - found.intervals[0].start
    step = next((step for step in _TICKS_S if length / step <= _TICKS), math.ceil(length / _TICKS))
    count = min(_TICKS, int(length / step))
    size, unit = next((size, unit) for size, unit in _UNITS if step % size == 0 or size == 1)
    return [
        {"at": round(100 * step * index / length, 3), "label": f"{step * index // size} {unit}" if index else "0"}
        for index in range(count + 1)
    ]


_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


# The loss curve.


def _curve(curve: Curve) -> dict[str, Any]:
    left, right = curve.x
    low, high = curve.y

    def x(step: float) -> float:
        return (step - left) / (right - left)

    def y(value: float) -> float:
        return (value - low) / (high - low)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return "".join(
            f"{'L' if index else 'M'}{1000 * x(step):.1f} {1000 * (1 - y(value)):.1f}"
            for index, (step, value) in enumerate(points)
        )

    labels = legible([(100 * x(cut.step), _cut(cut.outcome, cut.lost)) for cut in curve.cuts])
    return {
        "title": f"{curve.name} by step, with every interruption" if curve.cuts else f"{curve.name} by step",
        "name": curve.name,
        "line": path(curve.line),
        "again": [path(points) for points in curve.again],
        "dots": "".join(f"M{1000 * x(step):.1f} {1000 * (1 - y(value)):.1f}h0" for step, value in curve.dots),
        "dots_name": curve.dots_name,
        "x": [{"at": round(100 * x(tick), 3), "label": _step(tick)} for tick in nice_steps(left, right, 8)],
        "y": [{"at": round(100 * y(tick), 3), "label": f"{tick:.6g}"} for tick in nice_steps(low, high, 5)],
        "cuts": [
            {
                "at": 100 * x(cut.step),
                "lost_at": f"{100 * x(cut.step - cut.lost):.3f}",
                "lost_width": f"{100 * (x(cut.step) - x(cut.step - cut.lost)):.3f}" if cut.lost else "",
                "told": cut.outcome == Outcome.PREEMPTED,
                "label": label,
                "title": f"attempt {cut.attempt} {_cut(cut.outcome, cut.lost)} at step {cut.step:,}",
            }
            for cut, label in zip(curve.cuts, labels, strict=True)
        ],
    }


def legible(labels: Sequence[tuple[float, str]]) -> list[str]:
    """Return labels beside each other that do not run into each other: in place of one that would, ''.

    Args:
        labels: Where each begins, or ends if beyond `LEFTWARDS`, in per cent of the width, rising; and its text.
    """
    shown, end = [], -math.inf
    for at, text in labels:
        width = LETTER * len(text)
        begin = at - width if at > LEFTWARDS else at
        shown.append(text if begin >= end else "")
        if begin >= end:
            end = begin + width
    return shown


def _step(step: float) -> str:
    return f"step {step:,.0f}" if step == 0 else f"{step:,.0f}"


def _cut(outcome: str, lost: int) -> str:
    return f"{outcome}, {lost:,} lost" if lost else outcome


def _attempt(one: Attempt) -> dict[str, str]:
    return {
        "number": str(one.attempt),
        "length": show_duration(one.held_s),
        "steps": steps_of(one),
        "lost": lost_of(one),
        "cost": show_duration(one.ending_s) if one.ending_s else "-",
        "money": "" if one.cost is None else f"{one.cost:,.2f}",
        "why": end_of(one),
    }

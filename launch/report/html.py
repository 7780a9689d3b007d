"""The report as one HTML page: no script, no font, no request to anywhere, light or dark as its reader's machine is."""

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jobkit
from jobkit.contract import Outcome
from jobkit.errors import ConfigError
from jobkit.rundir.ledger import Event
from jobkit.rundir.store import explain as explained
from jobkit.units import counted, show_duration
from launch.lifecycle.history import History, number_of
from launch.report.explain import explain
from launch.report.goodput import Goodput, by_share, lost_of, measure
from launch.report.lives import named
from launch.report.loss_curve import Curve, Point, curve_of, nice_steps
from launch.report.phases import RunPhase, percent
from launch.report.template import render
from launch.report.terminal import attempt_row, clock, figures, overview
from launch.report.timeline import Stretch, lanes, time_axis

_LABEL_SHARE = 0.16
"""A part of the bar that is wide enough for its own name."""


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
        raise ConfigError(str(explained(error, f"cannot write {path}"))) from None
    return path


def page(histories: Sequence[History]) -> str:
    """Return the page of some runs."""
    goodputs = [measure(history) for history in histories]
    head, *rows = overview(goodputs)
    return render(
        "report.html",
        version=jobkit.__version__,
        title=goodputs[0].name if len(goodputs) == 1 else f"{len(goodputs)} runs",
        gutter=34,
        colors={str(phase): phase.color for phase in RunPhase},
        overview={"head": head, "rows": rows, "wide": ("attempts", "time", "saved")} if len(goodputs) > 1 else None,
        total=show_duration(math.fsum(one.time.total_s for one in goodputs)),
        runs=[_run(one, history) for one, history in zip(goodputs, histories, strict=True)],
        footer=f"jobkit {jobkit.__version__}, {clock(time.time())}. Phases and figures: jobkit report --help.",
    )


def _run(goodput: Goodput, history: History) -> dict[str, Any]:
    drawn = _lanes(goodput, history) if goodput.intervals else []
    curve = curve_of(history, goodput)
    explanation = explain(goodput, history)
    present = {one.phase for one in goodput.intervals} - {RunPhase.OFF}
    since = [f"since {clock(goodput.submitted)}"] if goodput.submitted is not None else []
    reason = [goodput.reason] if goodput.reason and goodput.reason != goodput.state else []
    priced = goodput.money.cost is not None
    return {
        "name": goodput.name,
        "state": goodput.state,
        "subtitle": " · ".join([goodput.run, *since, *reason]),
        "tiles": _tiles(goodput),
        "shares": [
            {
                "phase": phase,
                "share": percent(goodput.time.shares[phase]),
                "time": show_duration(seconds),
                "flex": f"{goodput.time.shares[phase]:.6f}",
                "labelled": goodput.time.shares[phase] > _LABEL_SHARE,
            }
            for phase, seconds in by_share(goodput)
        ],
        "lanes": drawn,
        "lane_height": max(5, min(24, 900 // max(1, len(drawn)))),
        "lane_gap": 5 if len(drawn) <= 30 else 2,
        "ticks": _ticks(goodput) if goodput.intervals else [],
        "legend": [phase for phase in RunPhase if phase in present],
        "noticed": any(lane["notices"] for lane in drawn),
        "curve": _curve(curve) if curve is not None else None,
        "story": [{"at": clock(one.t), "text": one.text} for one in explanation.story],
        "advice": [one.text for one in explanation.advice],
        "attempts": [attempt_row(one, priced=priced) for one in goodput.attempts],
        "attempt_columns": [
            "attempt",
            "length",
            "steps",
            "lost",
            "its end cost",
            *(["money"] if priced else []),
            "why",
        ],
        "figures": list(figures(goodput)),
    }


def _tiles(goodput: Goodput) -> list[tuple[str, str, str]]:
    """Return the figures that come first: a name, a value and a note for each."""
    steps, notices, money = goodput.progress, goodput.preemption, goodput.money
    tiles = [
        ("goodput", percent(goodput.time.goodput), f"of {show_duration(goodput.time.total_s)}"),
        ("step", "-" if steps.steps is None else f"{steps.steps:,}", f"in {counted(len(goodput.attempts), 'attempt')}"),
        ("steps lost", lost_of(goodput), f"of {steps.executed_steps:,} trained"),
    ]
    if notices.to_save:
        commit = notices.notice_to_commit_s
        note = f"{commit.median:.2f} s to the commit" if commit is not None else "none was committed"
        tiles.append(("saved on notice", f"{notices.saved_on_notice} of {notices.to_save}", note))
    if goodput.first_step_s is not None:
        tiles.append(("to the first step", show_duration(goodput.first_step_s.median), "median"))
    if money.cost is not None:
        tiles.append(("money", f"{money.cost:,.2f}", f"of it {money.cost_lost:,.2f} not for training"))
    return tiles


# The timeline.


def _lanes(goodput: Goodput, history: History) -> list[dict[str, Any]]:
    """Lay a lane out for each attempt; the time before it lies in its lane, thin."""
    start, end = goodput.intervals[0].start, goodput.intervals[-1].end
    by_attempt = lanes(goodput.intervals, [one.attempt for one in goodput.attempts])
    every = max(1, math.ceil(len(by_attempt) / 45))
    notices = {life.number: _notices([*life.supervisor, *life.program], start, end) for life in history.lives}
    return [
        {
            "number": number,
            "name": str(number) if index % every == 0 else "",
            "parts": [_part(one, start, end) for one in lane],
            "notices": notices.get(number, []),
        }
        for index, (number, lane) in enumerate(by_attempt.items())
    ]


def _part(one: Stretch, start: float, end: float) -> dict[str, Any]:
    width = 1000 / (end - start)
    where = f"attempt {one.attempt}: " if one.attempt is not None else ""
    return {
        "x": f"{(one.start - start) * width:.3f}",
        "width": f"{max(one.seconds * width, 0.6):.3f}",
        "phase": one.phase,
        "title": f"{where}{one.phase.words}, {show_duration(one.seconds)}, from {clock(one.start)}",
    }


def _notices(events: Iterable[Event], start: float, end: float) -> list[dict[str, str]]:
    """Mark an attempt's first notice; the program hears it at the end of a step, and says how old it is then."""
    notices = [(event["t"] - (number_of(event.get("age_s")) or 0.0), event) for event in named(events, "notice")]
    return [
        {
            "x": f"{1000 * (t - start) / (end - start):.3f}",
            "title": f"notice: {event.get('source', '')} at {clock(t)}",
        }
        for t, event in notices[:1]
        if start <= t <= end
    ]


def _ticks(goodput: Goodput) -> list[dict[str, Any]]:
    length = goodput.intervals[-1].end - goodput.intervals[0].start
    size, unit = time_axis(length)
    return [
        {"at": round(100 * tick * size / length, 3), "label": f"{tick:g} {unit}" if tick else "0"}
        for tick in nice_steps(0, length / size, 7)
    ]


# The loss curve.


def _curve(curve: Curve) -> dict[str, Any]:
    def across(step: float) -> float:
        return 100 * curve.place((step, 0.0))[0]

    def spot(point: Point) -> str:
        x, y = curve.place(point)
        return f"{1000 * x:.1f} {1000 * (1 - y):.1f}"

    def path(points: Sequence[Point]) -> str:
        return "M" + "L".join(map(spot, points))

    return {
        "title": f"{curve.name} by step, with every interruption" if curve.cuts else f"{curve.name} by step",
        "name": curve.name,
        "line": path(curve.line),
        "again": [path(points) for points in curve.again],
        "dots": "".join(f"M{spot(point)}h0" for point in curve.dots),
        "dots_name": curve.dots_name,
        "x": [
            {"at": round(across(tick), 3), "label": "step 0" if tick == 0 else f"{tick:,.0f}"}
            for tick in nice_steps(*curve.x, 8)
        ],
        "y": [
            {"at": round(100 * curve.place((0.0, tick))[1], 3), "label": f"{tick:.6g}"}
            for tick in nice_steps(*curve.y, 5)
        ],
        "cuts": [
            {
                "at": across(cut.step),
                "lost_at": f"{across(cut.step - cut.lost):.3f}",
                "lost_width": f"{across(cut.step) - across(cut.step - cut.lost):.3f}" if cut.lost else "",
                "preempted": cut.outcome == Outcome.PREEMPTED,
                "label": cut.label,
                "leftwards": cut.leftwards,
                "title": f"attempt {cut.attempt} {cut.text} at step {cut.step:,}",
            }
            for cut in curve.cuts
        ],
    }

"""The report as one HTML page: no script, no font, no request to anywhere, light or dark as its reader's machine is."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobkit
from jobkit.contract import Outcome
from jobkit.errors import ConfigError
from jobkit.rundir.store import explain as explained
from jobkit.units import counted, show_duration
from launch.lifecycle.history import History, Life, number_of
from launch.report.explain import explain
from launch.report.goodput import Goodput, by_share, lost_of, measure
from launch.report.lives import named
from launch.report.loss_curve import Curve, Point, curve_of, nice_steps
from launch.report.phases import RunPhase, percent
from launch.report.sweep_page import sweep_of
from launch.report.template import render
from launch.report.terminal import attempts_table, clock, figures, overview
from launch.report.timeline import lanes, time_axis


@dataclass(frozen=True)
class Verdict:
    """What a page is about, and what came of it.

    Args:
        title: Of the page.
        text: The answer, in a sentence.
        good: Whether it is the one that was hoped for.
    """

    title: str
    text: str
    good: bool


def write_html(path: Path, histories: Sequence[History], verdict: Verdict | None = None) -> Path:
    """Write the page of some runs, of which there may be a verdict.

    Raises:
        ConfigError: If it cannot be written there.
    """
    text = html_of(histories, verdict)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(explained(error, f"cannot write {path}"))) from None
    return path


def html_of(histories: Sequence[History], verdict: Verdict | None = None) -> str:
    """Return the page of some runs, as text."""
    goodputs = [measure(history) for history in histories]
    head, *rows = overview(goodputs)
    sweep = sweep_of(histories, goodputs)
    if sweep is not None:
        verdict = Verdict(sweep["title"], sweep["verdict"], True)
        sweep["plot"] = _joint(*sweep["curves"]) if sweep["curves"] else None
    title = goodputs[0].name if len(goodputs) == 1 else f"{len(goodputs)} runs"
    return render(
        "report.html",
        version=jobkit.__version__,
        title=verdict.title if verdict is not None else title,
        verdict=verdict,
        sweep=sweep,
        gutter=34,
        label_share=0.16,  # a part of the bar that is wide enough for its own name
        colors={str(phase): phase.color for phase in RunPhase},
        overview={"head": head, "rows": rows, "wide": ("attempts", "time", "saved")} if len(goodputs) > 1 else None,
        total=show_duration(math.fsum(one.time.total_s for one in goodputs)),
        runs=[_run(one, history) for one, history in zip(goodputs, histories, strict=True)],
        footer=f"jobkit {jobkit.__version__}, {clock(time.time())}. Phases and figures: jobkit report --help.",
    )


def _run(goodput: Goodput, history: History) -> dict[str, Any]:
    drawn = list(_lanes(goodput, history)) if goodput.intervals else []
    curve = curve_of(history, goodput)
    explanation = explain(goodput, history)
    since = [f"since {clock(goodput.submitted)}"] if goodput.submitted is not None else []
    reason = [goodput.reason] if goodput.reason and goodput.reason != goodput.state else []
    shares = goodput.time.shares
    return {
        "name": goodput.name,
        "state": goodput.state,
        "subtitle": " · ".join([goodput.run, *since, *reason]),
        "tiles": list(_tiles(goodput)),
        "shares": [
            (phase, shares[phase], percent(shares[phase]), show_duration(seconds))
            for phase, seconds in by_share(goodput)
        ],
        "lanes": drawn,
        "lane_height": max(5, min(24, 900 // max(1, len(drawn)))),
        "lane_gap": 5 if len(drawn) <= 30 else 2,
        "ticks": _ticks(goodput) if goodput.intervals else [],
        "legend": [phase for phase in RunPhase if shares.get(phase)],
        "noticed": any(notices for *_, notices in drawn),
        "curve": _curve(curve) if curve is not None else None,
        "story": [(clock(one.t), one.text) for one in explanation.story],
        "advice": [one.text for one in explanation.advice],
        "attempts": attempts_table(goodput),
        "figures": list(figures(goodput)),
    }


def _tiles(goodput: Goodput) -> Iterator[tuple[str, str, str]]:
    """Yield the figures that come first: a name, a value and a note for each."""
    steps, notices, money = goodput.progress, goodput.preemption, goodput.money
    yield "goodput", percent(goodput.time.goodput), f"of {show_duration(goodput.time.total_s)}"
    yield "step", "-" if steps.steps is None else f"{steps.steps:,}", f"in {counted(len(goodput.attempts), 'attempt')}"
    yield "steps lost", lost_of(goodput), f"of {steps.executed_steps:,} trained"
    if notices.to_save:
        commit = notices.notice_to_commit_s
        note = f"{commit.median:.2f} s to the commit" if commit is not None else "none was committed"
        yield "saved on notice", f"{notices.saved_on_notice} of {notices.to_save}", note
    if goodput.first_step_s is not None:
        yield "to the first step", show_duration(goodput.first_step_s.median), "median"
    if money.cost is not None:
        yield "money", f"{money.cost:,.2f}", f"of it {money.cost_lost:,.2f} not for training"


# The timeline.


def _lanes(goodput: Goodput, history: History) -> Iterator[tuple[int, bool, list[Any], list[Any]]]:
    """Yield a lane for each attempt: its number, whether that is written, its stretches, its notice."""
    start, width = goodput.intervals[0].start, 1000 / (goodput.intervals[-1].end - goodput.intervals[0].start)
    by_attempt = lanes(goodput.intervals, [one.attempt for one in goodput.attempts])
    lives = {life.number: life for life in history.lives}
    every = max(1, math.ceil(len(by_attempt) / 45))
    for index, (number, lane) in enumerate(by_attempt.items()):
        stretches = []
        for one in lane:
            where = f"attempt {one.attempt}: " if one.attempt is not None else ""
            title = f"{where}{one.phase.words}, {show_duration(one.seconds)}, from {clock(one.start)}"
            x, length = (one.start - start) * width, max(one.seconds * width, 0.6)
            stretches.append((f"{x:.3f}", f"{length:.3f}", one.phase, title))
        notices = [
            (f"{(t - start) * width:.3f}", f"notice: {source} at {clock(t)}")
            for t, source in (_notices(lives[number]) if number in lives else [])
            if start <= t <= goodput.intervals[-1].end
        ]
        yield number, index % every == 0, stretches, notices


def _notices(life: Life) -> list[tuple[float, str]]:
    """Return an attempt's first notice; the program sees it at the end of a step, and says how old it is then."""
    events = named([*life.supervisor, *life.program], "notice")[:1]
    return [(event["t"] - (number_of(event.get("age_s")) or 0.0), event.get("source", "")) for event in events]


def _ticks(goodput: Goodput) -> list[tuple[float, str]]:
    length = goodput.intervals[-1].end - goodput.intervals[0].start
    size, unit = time_axis(length)
    ticks = nice_steps(0, length / size, 7)
    return [(round(100 * tick * size / length, 3), f"{tick:g} {unit}" if tick else "0") for tick in ticks]


# The loss curve.


def _spot(curve: Curve, point: Point) -> str:
    x, y = curve.place(point)
    return f"{1000 * x:.1f} {1000 * (1 - y):.1f}"


def _axes(curve: Curve) -> dict[str, Any]:
    steps, values = nice_steps(*curve.x, 8), nice_steps(*curve.y, 5)
    return {
        "x": [(round(100 * curve.place((step, 0.0))[0], 3), f"{step:,.0f}" if step else "step 0") for step in steps],
        "y": [(round(100 * curve.place((0.0, value))[1], 3), f"{value:.6g}") for value in values],
    }


def _joint(metric: str, curves: Sequence[tuple[str, Curve, bool]]) -> dict[str, Any]:
    lines = [(name, "M" + "L".join(_spot(curve, one) for one in curve.line), best) for name, curve, best in curves]
    return {"title": f"{metric} by step, every point", "lines": lines, **_axes(curves[0][1])}


def _curve(curve: Curve) -> dict[str, Any]:
    def across(step: float) -> float:
        return 100 * curve.place((step, 0.0))[0]

    def path(points: Sequence[Point]) -> str:
        return "M" + "L".join(_spot(curve, point) for point in points)

    return {
        "title": f"{curve.name} by step, with every interruption" if curve.cuts else f"{curve.name} by step",
        "name": curve.name,
        "line": path(curve.line),
        "again": [path(points) for points in curve.again],
        "dots": "".join(f"M{_spot(curve, point)}h0" for point in curve.dots),
        "dots_name": curve.dots_name,
        **_axes(curve),
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

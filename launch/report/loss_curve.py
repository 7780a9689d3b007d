"""What a loss curve shows: the finished history, what was trained and taken back, and where attempts ended."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from jobkit.contract import Outcome
from launch.lifecycle.history import History, drawn
from launch.report.goodput import Goodput

_POINTS = 600
"""More are not seen on a page; of each stretch the lowest and the highest value are kept."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Cut:
    """An attempt that ended before the run did.

    Args:
        step: Completed steps at its end.
        lost: Steps that were taken back.
    """

    attempt: int
    step: int
    lost: int
    outcome: str


@dataclass(frozen=True)
class Curve:
    """One metric of a run, ready to be drawn.

    Args:
        line: The finished history.
        again: Stretches that were trained and taken back.
        dots: The metric's namesake of the validation data, `val_loss` for `loss`.
        x, y: Ranges that hold all of it, never empty.
    """

    name: str
    line: list[Point]
    again: list[list[Point]]
    dots: list[Point]
    dots_name: str
    cuts: list[Cut]
    x: Point
    y: Point


def curve_of(history: History, found: Goodput) -> Curve | None:
    """Return the curve of the loss, of another metric where there is none of that name, None without any."""
    values = history.series.values if history.series is not None else {}
    if history.series is None or not values:
        return None
    name, _ = drawn(values)
    line = _finite(values[name])
    if len(line) < 2:
        return None
    dots = _finite(values.get(f"val_{name}", {}))
    repeated = history.series.repeated.get(name, {})
    earlier = _finite({step: recorded[-2] for step, recorded in repeated.items() if len(recorded) > 1})
    cuts = [
        Cut(one.attempt, one.to_step, one.lost_steps, one.outcome or "unknown")
        for one in found.attempts
        if one.ended is not None and one.outcome != Outcome.DONE and one.to_step is not None
    ]
    shown = [*line, *dots, *earlier]
    right = max([*(step for step, _ in shown), *(cut.step for cut in cuts)])
    left = min([*(step for step, _ in shown), *(cut.step - cut.lost for cut in cuts)])
    left = min(left, 0.0) if left < right / 10 else left
    return Curve(
        name,
        thinned(line),
        [thinned(part) for part in _stretches(earlier)],
        thinned(dots),
        f"val_{name}",
        cuts,
        _range([left, right], margin=0.0),
        _range([value for _, value in shown], margin=0.04),
    )


def _finite(values: Mapping[int, float]) -> list[Point]:
    return [(float(step), float(value)) for step, value in sorted(values.items()) if _is_finite(value)]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _range(values: Iterable[float], *, margin: float) -> Point:
    known = list(values)
    low, high = min(known), max(known)
    if high <= low:
        return low - 0.5, high + 0.5
    return low - margin * (high - low), high + margin * (high - low)


def _stretches(points: Sequence[Point]) -> list[list[Point]]:
    """Cut at gaps: points that are further apart than three times the usual distance belong to different ends."""
    if not points:
        return []
    gaps = sorted(b[0] - a[0] for a, b in pairwise(points))
    usual = gaps[len(gaps) // 2] if gaps else 0.0
    stretches = [[points[0]]]
    for before, point in pairwise(points):
        if point[0] - before[0] > 3 * usual:
            stretches.append([])
        stretches[-1].append(point)
    return stretches


def thinned(points: Sequence[Point], most: int = _POINTS) -> list[Point]:
    """Return at most so many points of the same shape: of each stretch the lowest and the highest."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept = []
    for begin in range(0, len(points), size):
        stretch = points[begin : begin + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def nice_steps(low: float, high: float, most: int) -> list[float]:
    """Return round values between two: multiples of 1, 2 or 5 times a power of ten, at most so many and one."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]

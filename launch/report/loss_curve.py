"""What a loss curve shows: the finished history, what was trained and taken back, and where attempts ended."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
        label: What stands above it; '' where that would run into another.
        leftwards: Whether the label ends there, rather than begins.
    """

    attempt: int
    step: int
    lost: int
    outcome: str
    label: str = ""
    leftwards: bool = False

    @property
    def text(self) -> str:
        """How it ended, and what that took back."""
        return f"{self.outcome}, {self.lost:,} lost" if self.lost else self.outcome


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

    def place(self, point: Point) -> Point:
        """Return where a point lies, in shares of the width from the left and of the height from below."""
        return (point[0] - self.x[0]) / (self.x[1] - self.x[0]), (point[1] - self.y[0]) / (self.y[1] - self.y[0])


def curve_of(history: History, goodput: Goodput) -> Curve | None:
    """Return the curve of the loss, of another metric where there is none of that name, None without any."""
    if history.series is None or not (values := history.series.values):
        return None
    name, dots_name = drawn(values)
    line, dots = _finite(values[name]), _finite(values.get(dots_name, {}))
    if len(line) < 2:
        return None
    repeated = history.series.repeated.get(name, {})
    earlier = _finite({step: recorded[-2] for step, recorded in repeated.items() if len(recorded) > 1})
    cuts = [
        Cut(one.attempt, one.to_step, one.lost_steps, one.outcome or "unknown")
        for one in goodput.attempts
        if one.ended is not None and one.outcome != Outcome.DONE and one.to_step is not None
    ]
    points = [*line, *dots, *earlier]
    right = max([*(step for step, _ in points), *(cut.step for cut in cuts)])
    left = min([*(step for step, _ in points), *(cut.step - cut.lost for cut in cuts)])
    x = _range([min(left, 0.0) if left < right / 10 else left, right], margin=0.0)
    return Curve(
        name,
        thinned(line),
        [thinned(part) for part in _stretches(earlier)],
        thinned(dots),
        dots_name,
        labelled(cuts, x),
        x,
        _range([value for _, value in points], margin=0.04),
    )


_LEFTWARDS = 0.8
"""Share of the width beyond which a label is written to the left of its line."""
_LETTER = 0.0078
"""Width of a letter, as a share of the narrowest plot that shows more than the first label."""


def labelled(cuts: Sequence[Cut], x: Point) -> list[Cut]:
    """Return cuts in order of their steps, with labels that do not run into each other: the first cut has one.

    Args:
        cuts: They, in any order.
        x: Range of the steps.
    """
    placed, end = [], -math.inf
    for cut in sorted(cuts, key=lambda cut: cut.step):
        at, width = (cut.step - x[0]) / (x[1] - x[0]), _LETTER * len(cut.text)
        leftwards = at > _LEFTWARDS
        begin = at - width if leftwards else at
        fits = begin >= end
        placed.append(replace(cut, label=cut.text if fits else "", leftwards=leftwards))
        end = begin + width if fits else end
    return placed


def _finite(values: Mapping[int, float]) -> list[Point]:
    """Return what can be drawn of a series: whoever logged may have logged anything."""
    return [
        (float(step), float(value))
        for step, value in sorted(values.items())
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def _range(values: Sequence[float], *, margin: float) -> Point:
    low, high = min(values), max(values)
    room = margin * (high - low) if high > low else 0.5
    return low - room, high + room


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


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return as many points of the same shape as are seen: of each stretch the lowest and the highest."""
    size = 1 if len(points) <= _POINTS else math.ceil(2 * len(points) / _POINTS)
    kept = []
    for begin in range(0, len(points), size):
        by_value = sorted(points[begin : begin + size], key=lambda point: point[1])
        kept += sorted({by_value[0], by_value[-1]})
    return kept


def nice_steps(low: float, high: float, most: int) -> list[float]:
    """Return round values between two: multiples of 1, 2 or 5 times a power of ten, at most so many and one."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]

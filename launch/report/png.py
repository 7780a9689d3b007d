"""The report as one picture: where the time went, a lane for each attempt, and the loss."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobkit.errors import ConfigError
from jobkit.rundir.store import explain
from jobkit.units import show_duration
from launch.lifecycle.history import History
from launch.report.goodput import Goodput, by_share, lost_of, measure
from launch.report.loss_curve import Curve, curve_of
from launch.report.phases import COLORS, WORDS, ink_on, percent
from launch.report.terminal import WAITING
from launch.report.timeline import Interval, Phase

_INK, _SOFT, _GRID = "#17202a", "#5b6672", "#e3e7ec"
_STYLE: dict[str, Any] = {
    "font.size": 10, "text.color": _INK, "axes.edgecolor": _SOFT, "axes.labelcolor": _SOFT, "xtick.color": _SOFT,
    "ytick.color": _SOFT, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "axes.titlelocation": "left", "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlecolor": _INK,
}  # fmt: skip
_UNITS = (
    (2 * 86400.0, 86400.0, "days"),
    (2 * 3600.0, 3600.0, "hours"),
    (180.0, 60.0, "minutes"),
    (0.0, 1.0, "seconds"),
)
_LANES = 60


def write_picture(path: Path, histories: Sequence[History]) -> Path:
    """Draw one run, or the shares of many, into a PNG.

    Raises:
        ConfigError: If matplotlib is not installed, or the picture cannot be written there.
    """
    goodputs = [measure(history) for history in histories]

    def draw(plt: Any) -> Any:
        return (
            _one(plt, goodputs[0], curve_of(histories[0], goodputs[0])) if len(goodputs) == 1 else _many(plt, goodputs)
        )

    return write_figure(path, draw)


def write_figure(path: Path, draw: Callable[[Any], Any]) -> Path:
    """Write what is drawn with pyplot into a PNG.

    Raises:
        ConfigError: If matplotlib is not installed, or the picture cannot be written there.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError("--png draws with matplotlib: pip install matplotlib") from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = _STYLE
    with plt.rc_context(style):
        figure = draw(plt)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=110, format="png")
        except OSError as error:
            raise ConfigError(str(explain(error, f"cannot write {path}"))) from None
        finally:
            plt.close(figure)
    return path


def _one(plt: Any, goodput: Goodput, curve: Curve | None) -> Any:
    lanes = max(1, min(_LANES, len(goodput.attempts)))
    heights = [0.42, 0.35 + 0.22 * min(lanes, 16), *([2.5] if curve is not None else [])]
    figure, panels = plt.subplots(
        len(heights), 1, figsize=(10, sum(heights) + 1.9), height_ratios=heights, layout="constrained", squeeze=False
    )
    figure.suptitle(_title(goodput), x=0.014, ha="left", fontsize=12.5, fontweight="bold")
    _bar(panels[0][0], goodput)
    _timeline(panels[1][0], goodput)
    if curve is not None:
        draw_curve(panels[2][0], curve)
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.12)
    shown = [phase for phase, _ in by_share(goodput)]
    keys = [plt.Rectangle((0, 0), 1, 1, color=COLORS[phase]) for phase in shown]
    words = [f"{WORDS[phase]} {percent(goodput.shares[phase])}" for phase in shown]
    figure.legend(
        keys, words, loc="outside lower left", ncols=4, frameon=False, fontsize=9, handlelength=1, handleheight=1
    )
    return figure


def _title(goodput: Goodput) -> str:
    words = [goodput.name, f"goodput {percent(goodput.goodput)} of {show_duration(goodput.total_s)}"]
    words.append(f"{lost_of(goodput)} of {goodput.executed_steps:,} steps lost")
    if goodput.to_save:
        words.append(f"{goodput.saved_on_notice} of {goodput.to_save} notices saved")
    return "   ".join(words)


def _bar(axes: Any, goodput: Goodput) -> None:
    left = 0.0
    for phase, _ in by_share(goodput):
        share = goodput.shares[phase]
        axes.barh(0, share, left=left, color=COLORS[phase], height=1, edgecolor="white", linewidth=0.5)
        if share > 0.07:
            axes.text(left + share / 2, 0, percent(share), ha="center", va="center", color=ink_on(phase))
        left += share
    axes.set(xlim=(0, max(left, 1e-9)), ylim=(-0.5, 0.5))
    axes.axis("off")


def _timeline(axes: Any, goodput: Goodput) -> None:
    if not goodput.intervals:
        axes.axis("off")
        return
    start, length = goodput.intervals[0].start, goodput.intervals[-1].end - goodput.intervals[0].start
    size, unit = next((size, unit) for least, size, unit in _UNITS if length >= least)
    numbers = [one.attempt for one in goodput.attempts][-_LANES:] or [0]
    lane = numbers[0]
    for index, one in enumerate(goodput.intervals):
        lane = _lane(goodput.intervals, index, lane)
        if one.phase is Phase.OFF or lane not in numbers:
            continue
        height = 0.24 if one.phase in WAITING else 0.78
        axes.barh(lane, one.seconds / size, left=(one.start - start) / size, height=height, color=COLORS[one.phase])
    axes.set(xlim=(0, length / size), ylim=(numbers[-1] + 0.6, numbers[0] - 0.6), xlabel=f"{unit} since the submit")
    axes.set_title("a lane for each attempt")
    axes.set_yticks(numbers[:: max(1, len(numbers) // 16)])
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _lane(intervals: Sequence[Interval], index: int, before: int) -> int:
    """Return the lane of an interval: its attempt's; of a wait that of the attempt it led to, or the last one's."""
    own = (one.attempt for one in intervals[index:] if one.attempt is not None)
    return next(own, before)


def draw_curve(axes: Any, curve: Curve) -> None:
    """Draw one metric of a run, with its interruptions and what was trained again."""
    for part in curve.again:
        axes.plot(*zip(*part, strict=True), color=COLORS[Phase.LOST], linewidth=5, alpha=0.45)
    axes.plot(*zip(*curve.line, strict=True), color=_INK, linewidth=1.1)
    if curve.dots:
        axes.plot(*zip(*curve.dots, strict=True), "o", color=COLORS[Phase.RESTORE], markersize=4)
        step, value = curve.dots[-1]
        axes.annotate(
            curve.dots_name, (step, value), (-4, 12), textcoords="offset points", color=COLORS[Phase.RESTORE],
            fontsize=9, ha="right",
        )  # fmt: skip
    for index, cut in enumerate(curve.cuts):
        color = COLORS[Phase.EMERGENCY if cut.outcome == "preempted" else Phase.LOST]
        axes.axvline(cut.step, color=color, linewidth=1.1, linestyle=(0, (4, 2)))
        if cut.lost:
            axes.axvspan(cut.step - cut.lost, cut.step, color=color, alpha=0.15, linewidth=0)
        if len(curve.cuts) <= 6:
            label = f"{cut.outcome}, {cut.lost:,} lost" if cut.lost else cut.outcome
            late = cut.step > curve.x[0] + 0.85 * (curve.x[1] - curve.x[0])
            height = 0.97 - 0.1 * (index % 2)
            axes.annotate(
                label, (cut.step, height), xycoords=("data", "axes fraction"), fontsize=9, color=_INK,
                xytext=(-4 if late else 4, 0), textcoords="offset points", va="top", ha="right" if late else "left",
            )  # fmt: skip
    axes.set(xlim=curve.x, ylim=curve.y, xlabel="step")
    axes.set_title(f"{curve.name}, with every interruption" if curve.cuts else curve.name)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.tick_params(length=3)


def _many(plt: Any, goodput: Sequence[Goodput]) -> Any:
    """Draw a bar for each of many runs."""
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.3 * len(goodput)), layout="constrained")
    for row, one in enumerate(goodput):
        left = 0.0
        for phase, _ in by_share(one):
            axes.barh(row, one.shares[phase], left=left, color=COLORS[phase], height=0.75)
            left += one.shares[phase]
        axes.text(0.01, row, percent(one.goodput), va="center", color="white", fontweight="bold", fontsize=9)
    axes.set_yticks(range(len(goodput)), [one.name for one in goodput])
    axes.set(xlim=(0, 1), ylim=(len(goodput) - 0.4, -0.6))
    axes.set_title("where the time of each run went")
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    shown = [phase for phase in Phase if phase is not Phase.OFF and any(one.seconds[phase] for one in goodput)]
    keys = [plt.Rectangle((0, 0), 1, 1, color=COLORS[phase]) for phase in shown]
    figure.legend(keys, [WORDS[phase] for phase in shown], loc="outside lower left", ncols=6, frameon=False, fontsize=9)
    return figure

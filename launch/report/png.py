"""The report as one picture: where the time went, a lane for each attempt, and the loss."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobkit.contract import Outcome
from jobkit.errors import ConfigError
from jobkit.rundir.store import explain
from jobkit.units import show_duration
from launch.lifecycle.history import History
from launch.report.goodput import Goodput, by_share, lost_of, measure
from launch.report.loss_curve import Curve, curve_of
from launch.report.phases import RunPhase, percent
from launch.report.timeline import lanes, time_axis

_INK, _SOFT, _GRID = "#17202a", "#5b6672", "#e3e7ec"
_STYLE: Any = {
    "font.size": 10, "text.color": _INK, "axes.edgecolor": _SOFT, "axes.labelcolor": _SOFT, "xtick.color": _SOFT,
    "ytick.color": _SOFT, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "axes.titlelocation": "left", "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlecolor": _INK,
}  # fmt: skip
_LANES = 60


def write_png(path: Path, histories: Sequence[History]) -> Path:
    """Draw one run, or the shares of many, into a PNG.

    Raises:
        ConfigError: If matplotlib is not installed, or the picture cannot be written there.
    """
    goodputs = [measure(history) for history in histories]
    if len(goodputs) > 1:
        return write_figure(path, lambda plt: _many(plt, goodputs))
    return write_figure(path, lambda plt: _one(plt, goodputs[0], curve_of(histories[0], goodputs[0])))


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

    with plt.rc_context(_STYLE):
        figure = draw(plt)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=110, format="png", metadata={"Software": "jobkit"})
        except OSError as error:
            raise ConfigError(str(explain(error, f"cannot write {path}"))) from None
        finally:
            plt.close(figure)
    return path


def _one(plt: Any, goodput: Goodput, curve: Curve | None) -> Any:
    heights = [0.42, 0.35 + 0.22 * max(1, min(16, len(goodput.attempts))), *([2.5] if curve is not None else [])]
    figure, panels = plt.subplots(
        len(heights), 1, figsize=(10, sum(heights) + 1.9), height_ratios=heights, layout="constrained"
    )
    figure.suptitle(_title(goodput), x=0.014, ha="left", fontsize=12.5, fontweight="bold")
    _shares(panels[0], 0, goodput, height=1, labels=True)
    panels[0].set(xlim=(0, 1), ylim=(-0.5, 0.5))
    panels[0].axis("off")
    _timeline(panels[1], goodput)
    if curve is not None:
        draw_curve(panels[2], curve)
        if curve.dots:
            where: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1.1), "borderpad": 0}
            panels[2].legend(ncols=2, frameon=False, fontsize=9, **where)
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.12)
    shares = {phase: f"{phase.words} {percent(goodput.time.shares[phase])}" for phase, _ in by_share(goodput)}
    _legend(figure, shares, columns=4)
    return figure


def _title(goodput: Goodput) -> str:
    words = [goodput.name, f"goodput {percent(goodput.time.goodput)} of {show_duration(goodput.time.total_s)}"]
    words.append(f"{lost_of(goodput)} of {goodput.progress.executed_steps:,} steps lost")
    if goodput.preemption.to_save:
        words.append(f"{goodput.preemption.saved_on_notice} of {goodput.preemption.to_save} notices saved")
    return "   ".join(words)


def _shares(axes: Any, row: int, goodput: Goodput, *, height: float, labels: bool) -> None:
    """Draw the shares of a run's time beside each other."""
    left = 0.0
    for phase, _ in by_share(goodput):
        share = goodput.time.shares[phase]
        axes.barh(row, share, left=left, color=phase.color, height=height, edgecolor="white", linewidth=0.5)
        if labels and share > 0.07:
            axes.text(left + share / 2, row, percent(share), ha="center", va="center", color=phase.ink)
        left += share


def _legend(figure: Any, labels: Mapping[RunPhase, str], *, columns: int) -> None:
    """Say below a figure what the colours of some phases mean."""
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=phase.color, label=label) for phase, label in labels.items()],
        loc="outside lower left", ncols=columns, frameon=False, fontsize=9, handlelength=1, handleheight=1,
    )  # fmt: skip


def _timeline(axes: Any, goodput: Goodput) -> None:
    if not goodput.intervals:
        axes.axis("off")
        return
    start, length = goodput.intervals[0].start, goodput.intervals[-1].end - goodput.intervals[0].start
    size, unit = time_axis(length)
    drawn = list(lanes(goodput.intervals, [one.attempt for one in goodput.attempts]).items())[-_LANES:]
    for number, lane in drawn:
        for one in lane:
            left, height = (one.start - start) / size, 0.24 if one.phase.waits else 0.78
            axes.barh(number, one.seconds / size, left=left, height=height, color=one.phase.color)
    numbers = [number for number, _ in drawn]
    axes.set(
        xlim=(0, length / size), ylim=(numbers[-1] + 0.6, numbers[0] - 0.6), xlabel=f"time since the submit ({unit})"
    )
    axes.set_title("a lane for each attempt")
    axes.set_yticks(numbers[:: max(1, len(numbers) // 16)])
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def draw_curve(axes: Any, curve: Curve) -> None:
    """Draw one metric of a run, with its interruptions and what was trained again; all words stand above the plot."""
    for part in curve.again:
        axes.plot(*zip(*part, strict=True), color=RunPhase.LOST.color, linewidth=5, alpha=0.45)
    axes.plot(*zip(*curve.line, strict=True), color=_INK, linewidth=1.1, label=curve.name)
    if curve.dots:
        color = RunPhase.RESTORE.color
        axes.plot(*zip(*curve.dots, strict=True), "o", color=color, markersize=4, label=curve.dots_name)
    for cut in curve.cuts:
        color = RunPhase.EMERGENCY.color if cut.outcome == Outcome.PREEMPTED else RunPhase.LOST.color
        axes.axvline(cut.step, color=color, linewidth=1.1, linestyle=(0, (4, 2)))
        if cut.lost:
            axes.axvspan(cut.step - cut.lost, cut.step, color=color, alpha=0.15, linewidth=0)
        axes.annotate(
            cut.label, (cut.step, 1), xycoords=("data", "axes fraction"), fontsize=9, color=_INK,
            xytext=(0, 3), textcoords="offset points", ha="right" if cut.leftwards else "left",
        )  # fmt: skip
    axes.set(xlim=curve.x, ylim=curve.y, xlabel="step")
    axes.set_title(f"{curve.name}, with every interruption" if curve.cuts else curve.name, pad=20)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.tick_params(length=3)


def _many(plt: Any, goodputs: Sequence[Goodput]) -> Any:
    """Draw a bar for each of many runs."""
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.3 * len(goodputs)), layout="constrained")
    for row, one in enumerate(goodputs):
        _shares(axes, row, one, height=0.75, labels=False)
        axes.text(0.01, row, percent(one.time.goodput), va="center", color="white", fontweight="bold", fontsize=9)
    axes.set_yticks(range(len(goodputs)), [one.name for one in goodputs])
    axes.set(xlim=(0, 1), ylim=(len(goodputs) - 0.4, -0.6), xticks=[])
    axes.set_title("where the time of each run went")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    spent = {phase for one in goodputs for phase, _ in by_share(one)}
    _legend(figure, {phase: phase.words for phase in RunPhase if phase in spent}, columns=6)
    return figure

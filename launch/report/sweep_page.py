"""A sweep on a page: its points in a table that can be sorted, the best one, and all their curves in one plot."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from jobkit.units import counted
from launch.lifecycle.history import History, drawn
from launch.report.goodput import Goodput
from launch.report.loss_curve import Curve, curve_of, thinned
from launch.report.phases import percent

_LINES = 60
"""More curves in one plot are a blur; the best one is always among them."""
_WIDE = ("state", "step", "goodput")
"""Columns that a phone has no room for."""


def sweep_of(histories: Sequence[History], goodputs: Sequence[Goodput]) -> dict[str, Any] | None:
    """Return what a page shows of a sweep; None if the runs are not the points of one.

    Args:
        histories: The points.
        goodputs: Their figures.
    """
    axes = list(histories[0].values)
    if len(histories) < 2 or not axes or any(list(history.values) != axes for history in histories):
        return None
    logged = dict.fromkeys(name for history in histories for name in _last(history))
    measured = dict.fromkeys(f"best {history.best[0]}" for history in histories if history.best)
    rows = []
    for history, goodput in zip(histories, goodputs, strict=True):
        values: dict[str, Any] = {name: _number(value) for name, value in history.values.items()}
        values |= _last(history) | ({f"best {history.best[0]}": history.best[2]} if history.best else {})
        values |= {"state": goodput.state, "step": goodput.progress.steps, "goodput": goodput.time.goodput}
        shown = {name: _shown(value) for name, value in values.items()} | dict(history.values)
        rows.append((values, shown | {"goodput": percent(goodput.time.goodput)}))
    best, judged = _best(histories, [values for values, _ in rows])
    names = [*axes, *measured, *logged, *_WIDE]
    ranks = [_ranks([values.get(name) for values, _ in rows]) for name in names]
    top = PurePath(histories[0].run).parent.parent.name
    return {
        "title": f"sweep {top}: {counted(len(rows), 'point')}",
        "verdict": f"best: {histories[best].name}, {judged}" if best is not None else "no point has a metric yet",
        "columns": [{"name": name, "wide": name in _WIDE, "number": name != "state"} for name in names],
        "narrow": len(names) - len(_WIDE),
        "rows": [
            {
                "best": index == best,
                "cells": [shown.get(name, "-") for name in names],
                "order": [(up[index], down[index]) for up, down in ranks],
            }
            for index, (_, shown) in enumerate(rows)
        ],
        "curves": _curves(histories, goodputs, best),
    }


def _last(history: History) -> dict[str, float]:
    """Return the last finite value of each metric that is drawn."""
    series = history.series.values if history.series is not None else {}
    kept = {name: [value for _, value in sorted(series.get(name, {}).items())] for name in drawn(series)}
    finite = {name: [value for value in values if math.isfinite(value)] for name, values in kept.items()}
    return {name: values[-1] for name, values in finite.items() if values}


def _best(histories: Sequence[History], rows: Sequence[dict[str, Any]]) -> tuple[int | None, str]:
    """Choose the best point: by `keep_best`, else by the lowest validation loss, else by the lowest loss."""
    judges = [(f"best {h.best[0]}", h.best[1]) for h in histories if h.best]
    judges += [(name, "min") for h in histories for name in sorted(_last(h), key=lambda name: "loss" in name[-8:])]
    judges.sort(key=lambda judge: (not judge[0].startswith("best "), not judge[0].startswith("val_")))
    for name, mode in judges:
        sign = 1.0 if mode == "min" else -1.0
        scored = [(sign * row[name], index) for index, row in enumerate(rows) if isinstance(row.get(name), float)]
        scored = [(score, index) for score, index in scored if score == score]
        if scored and (name.startswith("best ") or name.endswith("loss")):
            score, index = min(scored)
            return (
                index,
                f"{name.removeprefix('best ')} {sign * score:.6g} ({'lowest' if mode == 'min' else 'highest'})",
            )
    return None, ""


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _ranks(values: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Return the place of each value, rising and falling; what is absent comes last in both."""

    def places(*, falling: bool) -> list[int]:
        def key(index: int) -> Any:
            value = values[index]
            absent = value is None or value != value
            numeric = isinstance(value, int | float)
            return absent, not numeric, 0 if absent else (-value if falling else value) if numeric else str(value)

        numbers = [i for i in range(len(values)) if isinstance(values[i], int | float) or values[i] is None]
        texts = [i for i in range(len(values)) if i not in set(numbers)]
        ordered = [*sorted(numbers, key=key), *sorted(texts, key=key, reverse=falling)]
        ordered.sort(key=lambda index: key(index)[0])
        found = [0] * len(values)
        for place, index in enumerate(ordered):
            found[index] = place
        return found

    return places(falling=False), places(falling=True)


def _curves(
    histories: Sequence[History], goodputs: Sequence[Goodput], best: int | None
) -> tuple[str, list[Any]] | None:
    """Return the metric that is drawn, and each point's curve in ranges that hold all: name, curve, whether best."""
    drawn_of = list(_each_curve(histories, goodputs))
    names = [curve.name for _, curve in drawn_of]
    if not names:
        return None
    metric = max(set(names), key=names.count)
    same = [(index, curve) for index, curve in drawn_of if curve.name == metric]
    kept = [(index, curve) for index, curve in same if index != best][: _LINES - 1]
    kept += [(index, curve) for index, curve in same if index == best]  # last, and so above the others
    x = min(curve.x[0] for _, curve in kept), max(curve.x[1] for _, curve in kept)
    values = [value for _, curve in kept for _, value in curve.line]
    room = 0.04 * (max(values) - min(values)) or 0.5
    y = min(values) - room, max(values) + room
    lines = [(histories[index].name, replace(curve, x=x, y=y), index == best) for index, curve in kept]
    return metric, lines


def _each_curve(histories: Sequence[History], goodputs: Sequence[Goodput]) -> Iterator[tuple[int, Curve]]:
    for index, (history, goodput) in enumerate(zip(histories, goodputs, strict=True)):
        curve = curve_of(history, goodput)
        if curve is not None:
            yield index, replace(curve, line=thinned(curve.line))

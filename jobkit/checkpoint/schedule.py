"""When to save: by steps, by time, only what is best, or several of these; and how long a save will take."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from jobkit.checkpoint.interval import UNKNOWN_S, Cost, Interval
from jobkit.errors import ConfigError
from jobkit.rundir.retention import Keep
from jobkit.units import duration_s


@dataclass
class SaveEvery:
    """A parsed `save_every`, and when the next save is due.

    Args:
        every_steps: Save at multiples of this many completed steps, or as soon after as the save under way has ended; 0
            for never.
        every_s: Save this many seconds after the last save began; infinity for never.
        only_best: `save(metric=...)` saves only an improvement.
        auto: Whether `every_s` follows what saves cost and what is lost (see interval.py).
    """

    every_steps: int = 0
    every_s: float = math.inf
    only_best: bool = False
    auto: bool = False
    interval: Interval | None = None
    """What `every_s` follows, from when training begins."""
    begun_s: float = 0.0
    """When the save before the next one began."""
    _said_s: str | int | None = None
    next_step: float = math.inf
    """Completed steps at which the next save is due."""
    next_s: float = math.inf
    """Time, on the clock of `time.monotonic`, at which the next save is due."""

    @classmethod
    def parse(cls, text: str | int | tuple[str | int, ...] | None, *, keep_best: tuple[str, str] | None = None) -> Self:
        """Parse '500 steps', 500, '10m', 'auto', 'best', a tuple of these, or None.

        Raises:
            ConfigError: If the text or `keep_best` makes no sense.
        """
        if keep_best is not None and not (
            isinstance(keep_best, tuple | list) and len(keep_best) == 2 and keep_best[1] in ("min", "max")
        ):
            raise ConfigError(f"keep_best={keep_best!r}: give a metric and 'min' or 'max', ('val_loss', 'min')")
        made = cls()
        for item in () if text is None else text if isinstance(text, tuple | list) else (text,):
            made._add(item)
        if made.only_best and keep_best is None:
            raise ConfigError("save_every='best' needs to know what is best: keep_best=('val_loss', 'min')")
        return made

    def _add(self, item: str | int) -> None:
        if item == "best":
            self.only_best = True
            return
        if item == "auto":
            self.auto = True
            self._add_seconds(UNKNOWN_S, "auto")
            return
        steps = re.fullmatch(r"\s*([0-9]{1,18})\s*(?:steps?)?\s*", str(item)) if not isinstance(item, bool) else None
        if steps and int(steps[1]) > 0:
            if self.every_steps:
                raise ConfigError(
                    f"save_every gives two intervals in steps, {self.every_steps} and {steps[1]}: choose one"
                )
            self.every_steps = int(steps[1])
            return
        try:
            seconds = duration_s(item) if isinstance(item, str) else 0.0
        except ConfigError:
            seconds = 0.0
        if seconds <= 0:
            raise ConfigError(f"save_every={item!r}: give '500 steps', a duration like '10m', 'auto', 'best', or None")
        self._add_seconds(seconds, item)

    def _add_seconds(self, seconds: float, item: str | int) -> None:
        if self._said_s is not None:
            raise ConfigError(f"save_every gives two durations, {self._said_s!r} and {item!r}: choose one")
        self.every_s, self._said_s = seconds, item

    def begin(self, step: int, now_s: float) -> None:
        """Count from here: the run opened, or a save of this step began."""
        self.next_step = (step // self.every_steps + 1) * self.every_steps if self.every_steps else math.inf
        self.begun_s = now_s
        self._set_next(now_s)

    def _set_next(self, now_s: float) -> None:
        last_call_s = math.inf
        if self.interval is not None:
            self.every_s, last_call_s = self.interval.seconds(now_s), self.interval.last_call_s()
        self.next_s = self.begun_s + self.every_s
        if self.begun_s < last_call_s:
            self.next_s = min(self.next_s, last_call_s)

    def adapt(self, step: int, cost: Cost, now_s: float) -> dict[str, Any] | None:
        """Follow what the newest save cost.

        Returns:
            What is to be told of the interval, None if it is much the same as before.
        """
        assert self.interval is not None
        self.interval.saved(step, cost)
        self._set_next(now_s)
        return self.interval.news(now_s)

    def due(self, step: int, now_s: float) -> bool:
        """Tell whether a save is due."""
        return step >= self.next_step or now_s >= self.next_s

    def to_json(self, keep: Keep) -> str:
        """Write the strategy down for those who read the run directory."""
        return json.dumps(
            {
                "every_steps": self.every_steps,
                "every_s": None if math.isinf(self.every_s) or self.auto else self.every_s,
                "auto": self.auto,
                "only_best": self.only_best,
                "keep": keep.newest,
                "keep_best": keep.best,
            }
        )


_SAVE_BYTES_S, _UPLOAD_BYTES_S, _FIXED_S = 100e6, 20e6, 0.5
"""A first guess, on the slow side."""


_RECENT = 5


@dataclass
class Rates:
    """How long saves and uploads of this run took.

    Args:
        saves: (bytes, seconds until the local commit), oldest first.
        uploads: (bytes, seconds) of uploads.
        first: The run's very first save, which warms everything up: it tells something while there is no other.
    """

    saves: list[tuple[int, float]] = field(default_factory=list)
    uploads: list[tuple[int, float]] = field(default_factory=list)
    first: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def from_events(cls, events: Iterable[dict[str, Any]]) -> "Rates":
        """Read them from the ledger of an earlier attempt."""
        made = cls()
        for event in events:
            name, nbytes = event.get("event"), event.get("bytes")
            seconds = event.get("durable_s" if name == "saved" else "seconds")
            if name in ("saved", "uploaded") and isinstance(nbytes, int) and isinstance(seconds, int | float):
                made.add((nbytes, float(seconds)), name, event.get("reason"))
        return made

    def add(self, measured: tuple[int, float], event: str = "saved", reason: object = None) -> None:
        """Take another one: bytes, seconds.

        Args:
            measured: Bytes and seconds.
            event: 'saved' or 'uploaded'.
            reason: Why it was saved.
        """
        (self.uploads if event == "uploaded" else self.first if reason == "start" else self.saves).append(measured)

    def save_s(self, nbytes: int) -> float:
        """Expect how long a save takes: as long as the slowest of the last ones."""
        return _expected(self.saves or self.first, nbytes, _SAVE_BYTES_S)

    def upload_s(self, nbytes: int) -> float:
        """Expect how long an upload takes."""
        return _expected(self.uploads, nbytes, _UPLOAD_BYTES_S)


def _expected(measured: list[tuple[int, float]], nbytes: int, bytes_s: float) -> float:
    recent = measured[-_RECENT:]
    if not recent:
        return _FIXED_S + nbytes / bytes_s
    return max(seconds * max(1.0, nbytes / size if size else 1.0) for size, seconds in recent)

"""A wall clock that stands still: how a drill finds out whether a program's result depends on the time of day.

Durations (`time.monotonic`, `time.perf_counter`) go on, so that nothing waits for ever.
"""

import datetime
import time
from typing import Any


def freeze(at_s: float) -> None:
    """Make every wall clock that Python code can ask say `at_s`, seconds since the epoch."""
    localtime, gmtime = time.localtime, time.gmtime
    replaced: dict[str, Any] = {
        "time": lambda: at_s,
        "time_ns": lambda: int(at_s) * 10**9,
        "localtime": lambda seconds=None: localtime(at_s if seconds is None else seconds),
        "gmtime": lambda seconds=None: gmtime(at_s if seconds is None else seconds),
    }
    for name, function in replaced.items():
        setattr(time, name, function)

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Frozen":
            return cls.fromtimestamp(at_s, tz)

        @classmethod
        def today(cls) -> "Frozen":
            return cls.fromtimestamp(at_s)

        @classmethod
        def utcnow(cls) -> "Frozen":
            return cls.fromtimestamp(at_s, datetime.UTC).replace(tzinfo=None)

    datetime.datetime = Frozen  # type: ignore[misc]

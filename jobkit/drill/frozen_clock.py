"""A wall clock that stands still: how a drill finds out whether a program's result depends on the time of day.

Durations (`time.monotonic`, `time.perf_counter`) go on, so that nothing waits for ever.
"""

import ctypes
import datetime
import gc
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
    _put(datetime.date, "today", lambda cls: cls.fromtimestamp(at_s))
    _put(datetime.datetime, "now", lambda cls, tz=None: cls.fromtimestamp(at_s, tz))
    _put(datetime.datetime, "utcnow", lambda cls: cls.fromtimestamp(at_s, datetime.UTC).replace(tzinfo=None))


def _put(kind: type, name: str, function: Any) -> None:
    """Replace a class method of a type of C in place.

    A subclass in its place would be another type than the one that tensorflow, pandas and scikit-learn were compiled
    against: they end with a segmentation fault.
    """
    (namespace,) = gc.get_referents(vars(kind))
    namespace[name] = classmethod(function)
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(kind))

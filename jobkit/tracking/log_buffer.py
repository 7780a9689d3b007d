"""What `run.log` is given, until it is in the ledger."""

import contextlib
import math
import threading
import time
from typing import Any

from jobkit.errors import ConfigError
from jobkit.rundir.ledger import Ledger

_FLUSH_S = 0.5
"""Logged values reach the ledger at most this much later, and always before the commit of their step."""


class LogBuffer:
    """Logged values that are not in the ledger yet. Safe to use from several threads.

    JAX arrays are converted when they are ready, so that logging does not wait for the device.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, float, dict[str, Any]]] = []
        self._lock = threading.Lock()
        self._flushed_at = time.monotonic()

    def add(self, step: int, values: dict[str, Any]) -> bool:
        """Take the values of the step in progress; return whether it is time to flush."""
        with self._lock:
            self._pending.append((step, time.time(), values))
        return time.monotonic() - self._flushed_at >= _FLUSH_S

    def flush(self, ledger: Ledger, *, below: float = 0) -> None:
        """Write values to the ledger: all of steps below one, waiting for them, and those that are ready.

        Args:
            ledger: The program's.
            below: A number of steps; infinity for everything.
        """
        with self._lock:
            ready = sum(1 for at_step, _, _ in self._pending if at_step < below)
            while ready < len(self._pending) and all(map(_is_ready, self._pending[ready][2].values())):
                ready += 1
            batch, self._pending = self._pending[:ready], self._pending[ready:]
            self._flushed_at = time.monotonic()
            events = [
                {"t": at, "event": "metrics", "step": step, "values": _numbers(logged)} for step, at, logged in batch
            ]
            ledger.append_all([event for event in events if event["values"]])


def _is_ready(value: Any) -> bool:
    return not hasattr(value, "is_ready") or value.is_deleted() or bool(value.is_ready())


def _numbers(logged: dict[str, Any]) -> dict[str, float]:
    """Convert what can be converted: a step may have donated an array, and no commit may fail of that."""
    numbers = {}
    for name, value in logged.items():
        with contextlib.suppress(Exception):
            numbers[name] = float(value)
    return numbers


EVERYTHING = math.inf
"""Below it are all steps."""


def number(name: str, value: Any) -> float:
    """Return a value as a number.

    Raises:
        ConfigError: If it is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}={kind_of(value)} is not a number") from None


def kind_of(value: Any) -> str:
    """Say in words what a value is."""
    shape = value.shape if hasattr(type(value), "shape") else None
    return f"an array of shape {tuple(shape)}" if shape is not None else f"a {type(value).__name__}"

"""What `run.log` is given, until it is in the ledger."""

import math
import threading
import time
from typing import Any

from jobkit.ledger import Ledger

_FLUSH_S = 0.5
"""Logged values reach the ledger at most this much later, and always before the commit of their step."""


class Logged:
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
            while ready < len(self._pending) and all(
                value.is_ready() for value in self._pending[ready][2].values() if hasattr(value, "is_ready")
            ):
                ready += 1
            batch, self._pending = self._pending[:ready], self._pending[ready:]
            self._flushed_at = time.monotonic()
            ledger.append_all(
                [
                    {"t": at, "event": "metrics", "step": step, "values": {k: float(v) for k, v in values.items()}}
                    for step, at, values in batch
                ]
            )


EVERYTHING = math.inf
"""Below it are all steps."""

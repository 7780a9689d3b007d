"""What of a training is not saved, from the first failed interval to the next commit that holds something new.

Three things can be at fault. The *storage*: training goes on, since it may come back. The *state*: it holds what cannot
be saved, or is *unchanged* since the step before, so that what is saved is not what is trained. No later save will go
better then, and the run ends at the second in a row: what it trains would be lost at the first interruption. Where but
*numbers* change, a counter say, that is likely and no more, and it is only told.
"""

import time
from collections.abc import Mapping
from typing import Any

from jobkit import contract
from jobkit.errors import UnsavedError
from jobkit.rundir.ledger import Ledger, tail_events
from jobkit.rundir.store import Store
from jobkit.supervise.heartbeat import Heartbeat

STATE, STORAGE, UNCHANGED, NUMBERS = "state", "storage", "unchanged", "numbers"
_MOST = 2
_EARLIER = 16
"""So many earlier attempts are looked at: most of them did not reach an interval then."""


class Unsaved:
    """Counts failed intervals, tells the ledger and the supervisor's directory, and says when it is enough.

    The directory tells who looks on this machine also where the ledger lies on the storage that fails.

    Args:
        ledger: Where failures are written: `save_failed`; `unchanged`, and `changed` once that is over.
        heartbeat: Shows the one that lasts.
    """

    def __init__(self, ledger: Ledger, heartbeat: Heartbeat) -> None:
        self._ledger, self._heartbeat = ledger, heartbeat
        self._counts: dict[str, int] = {}

    def go_on(self, store: Store, attempt: int, step: int) -> None:
        """Count on from where interrupted attempts left off: a run that is killed at every interval ends as well.

        Args:
            store: The run directory.
            attempt: Number of this attempt.
            step: The step it goes on from.
        """
        for number in range(attempt - 1, max(-1, attempt - 1 - _EARLIER), -1):
            name = contract.events_file(number, 0)
            failed = [*tail_events(store, name, "save_failed"), *tail_events(store, name, "unchanged")]
            for event in failed:
                kind, at = str(event.get("kind")), event.get("step")
                lasts = isinstance(at, int) and (at > step if kind in (STATE, STORAGE) else at == step)
                self._counts[kind] = 1 if lasts and event.get("count") == 1 else 0
            if failed:
                return

    def failed(self, step: int, kind: str, reason: str, *, committed_step: int) -> UnsavedError | None:
        """Write down that an interval's step is not saved; return what ends the run, None while it goes on.

        Args:
            step: The step.
            kind: What is at fault: STATE, STORAGE, UNCHANGED or NUMBERS.
            reason: A sentence, with the remedy where there is one.
            committed_step: The newest committed step.
        """
        if kind in (UNCHANGED, NUMBERS):
            self._forget(NUMBERS if kind == UNCHANGED else UNCHANGED)
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        event = "save_failed" if kind in (STATE, STORAGE) else "unchanged"
        fields: dict[str, Any] = {
            "step": step,
            "kind": kind,
            "count": count,
            "reason": reason,
            "committed_step": committed_step,
        }
        self._ledger.append(event, **fields)
        self._heartbeat.show_unsaved({"t": time.time(), "event": event, **fields})
        if kind in (STORAGE, NUMBERS) or count < _MOST:
            return None
        # The fact first: of a long line a status shows the beginning.
        return UnsavedError(
            "nothing new was saved at two intervals in a row, so the run ends, "
            f"committed step {committed_step}: {reason}"
        )

    def saved(self) -> None:
        """Forget what failed: a step is committed."""
        if self._forget(STATE, STORAGE):
            self._heartbeat.show_unsaved(None)

    def changed(self, step: int) -> None:
        """Forget what was unchanged: this step is not."""
        if self._forget(UNCHANGED, NUMBERS):
            self._ledger.append("changed", step=step)
            self._heartbeat.show_unsaved(None)

    def stands(self, kind: str) -> bool:
        """Tell whether the last interval failed of this kind."""
        return self._counts.get(kind, 0) > 0

    def _forget(self, *kinds: str) -> bool:
        """Begin to count anew; tell whether there was anything."""
        return sum(self._counts.pop(kind, 0) for kind in kinds) > 0


def nothing_new(event: Mapping[str, Any]) -> str:
    """Say what an interval saved whose event is `unchanged`."""
    return "nothing new but numbers" if event.get("kind") == NUMBERS else "nothing new"

"""The emergency save: what is in hand is committed in the way that the time left allows.

The training thread comes here at the boundary where it stops, and the deadline saver where the training thread cannot.
"""

import contextlib
from collections.abc import Callable, Mapping

from jobkit import contract
from jobkit.checkpoint import state
from jobkit.checkpoint.checkpointer import Checkpoints
from jobkit.checkpoint.schedule import Rates
from jobkit.errors import JobkitError, SupersededError
from jobkit.preemption import plan
from jobkit.preemption.notice import Listener
from jobkit.preemption.plan import Choice, Plan, Situation
from jobkit.rundir.ledger import Event, Ledger, tail_events
from jobkit.rundir.store import Store


class Emergency:
    """Plans and makes the last save of an attempt.

    Args:
        store: The run directory.
        checkpoints: Where saves are made.
        ledger: Where each plan is written before it is acted upon.
        listener: Knows the deadline.
        attempt: Number of this attempt; the one before tells how long saves take.
        alone: Whether the attempt has one process; several cannot abandon a save, since they wait for each other.
    """

    def __init__(
        self, store: Store, *, checkpoints: Checkpoints, ledger: Ledger, listener: Listener, attempt: int, alone: bool
    ) -> None:
        self._checkpoints, self._ledger, self._listener, self._alone = checkpoints, ledger, listener, alone
        self._remote = store.remote is not None
        self._uploads = Rates.from_events(_told(store, attempt - 1, "supervisor", "uploaded"))
        earlier = Rates.from_events(_told(store, attempt - 1, 0, "saved"))
        checkpoints.rates.saves[:0], checkpoints.rates.first[:0] = earlier.saves, earlier.first

    def left_s(self) -> float | None:
        """Return the seconds until the program is killed, None where nobody said."""
        notice = self._listener.notice
        return None if notice is None else notice.left_s()

    def save_s(self, nbytes: int) -> float:
        """Expect how long a save takes from now on, the one in flight included that it would have to wait for."""
        now = self.situation(0, nbytes)
        waits = now.saving is not None and not now.can_abandon
        return now.save_s + (max(0.0, now.save_s - now.saving_for_s) if waits else 0.0)

    def situation(self, step: int, nbytes: int) -> Situation:
        """Put together what is known.

        Args:
            step: The newest step in hand.
            nbytes: Size of its state.
        """
        saving = self._checkpoints.saving_step
        return Situation(
            step=step,
            committed=self._checkpoints.committed_step,
            saving=saving,
            saving_for_s=self._checkpoints.saving_for_s if saving is not None else 0.0,
            nbytes=nbytes,
            save_s=self._checkpoints.rates.save_s(nbytes),
            upload_s=self._uploads.upload_s(nbytes) if self._remote else 0.0,
            left_s=self.left_s(),
            can_abandon=self._alone and not self._checkpoints.saving_asked,
        )

    def commit(
        self,
        step: int,
        snapshot: Callable[[], state.Snapshot],
        *,
        by: str,
        metrics: Mapping[str, float] | None = None,
        hear: Callable[[], None] = lambda: None,
    ) -> Plan:
        """Commit a step, and what is in flight, as well as the time that is left allows.

        Args:
            step: The newest step in hand.
            snapshot: Makes its state.
            by: Who saves, for the ledger: 'boundary' or 'guard'.
            metrics: Named numbers that were to be saved with it.
            hear: Called when the save in flight has ended, well or badly.

        Returns:
            The plan that was acted upon last.

        Raises:
            JobkitError: If the step could not be committed. What was committed before stands.
        """
        taken = snapshot()
        planned = self._plan(step, taken.nbytes, by)
        if planned.choice is Choice.PROMOTE:
            self._checkpoints.wait()
            hear()
            planned = self._plan(step, taken.nbytes, by) if step > self._checkpoints.committed_step else planned
        if planned.abandon:
            self._checkpoints.abandon(taken.nbytes)
        self._checkpoints.wait()
        hear()
        if self._checkpoints.committed_step < step or metrics:
            self._save(taken, step, metrics or {})
        return planned

    def _save(self, taken: state.Snapshot, step: int, metrics: Mapping[str, float]) -> None:
        """Save and wait; once more if that failed, since this is the last chance, and what failed may have passed."""
        for last in (not self._alone, True):
            try:
                self._checkpoints.save(taken, step, reason="notice", metrics=metrics)
                self._checkpoints.wait()
                error = self._checkpoints.take_error()
            except SupersededError:
                raise
            except JobkitError as raised:
                error = raised
            if error is None or self._checkpoints.committed_step >= step:
                return
            if last or isinstance(error, SupersededError):
                raise error
            self._checkpoints.tidy()  # what failed for want of room may find it

    def fits_deadline(self, nbytes: int) -> bool:
        """Tell whether one more save is expected to land before the deadline."""
        left_s = self.left_s()
        return left_s is None or self.save_s(nbytes) < left_s - 0.5

    def promote(self) -> None:
        """Wait for what is in flight, where there is nothing newer in hand."""
        if self._checkpoints.saving_step is not None:
            self._plan(-1, 0, "guard")
        left_s = self.left_s()
        self._checkpoints.wait(None if left_s is None else max(0.0, left_s))

    def _plan(self, step: int, nbytes: int, by: str) -> Plan:
        """Choose, and write down why before anything is done."""
        now = self.situation(step, nbytes)
        planned = plan.choose(now)
        self._ledger.append(
            "plan",
            choice=planned.choice,
            abandon=planned.abandon,
            step=step,
            committed_step=now.committed,
            saving=now.saving,
            saving_for_s=round(now.saving_for_s, 6),
            bytes=nbytes,
            estimate_s=round(planned.expected_s, 6),
            save_s=round(now.save_s, 6),
            upload_s=round(now.upload_s, 6),
            deadline_s=None if now.left_s is None else round(now.left_s, 6),
            by=by,
        )
        return planned


def _told(store: Store, attempt: int, writer: int | str, event: str) -> list[Event]:
    """Read what an earlier attempt tells of what saves cost; nothing that cannot be had now is worth waiting for."""
    with contextlib.suppress(JobkitError):
        return tail_events(store, contract.events_file(attempt, writer), event)
    return []

"""How an attempt ends on notice: what of it is written down, and leaving where the training thread cannot."""

import contextlib
import os
import sys
import time

from jobkit.checkpoint.checkpointer import Checkpoints
from jobkit.contract import Exit
from jobkit.errors import JobkitError, say
from jobkit.group import Group
from jobkit.preemption.notice import Listener
from jobkit.rundir import commits
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.store import Store
from jobkit.rundir.uploader import Uploader
from jobkit.supervise.heartbeat import Heartbeat, Phase
from jobkit.tracking.log_buffer import LogBuffer

PARTING_S = 3.0
"""How long the first process, if it does not end in order, waits for the others to be gone."""


class Stopping:
    """The end of one attempt on notice.

    Args:
        store: The run directory.
        group: The processes of the attempt.
        listener: Knows the notice.
        heartbeat: Knows the completed steps.
        ledger: The program's.
        checkpoints: Knows what is committed.
        log_buffer: Logged values that are to be on storage before the attempt ends.
        uploader: Carries saves to the run's URL, where no supervisor does.
    """

    def __init__(
        self,
        store: Store,
        *,
        group: Group,
        listener: Listener,
        heartbeat: Heartbeat,
        ledger: Ledger,
        checkpoints: Checkpoints,
        log_buffer: LogBuffer,
        uploader: Uploader | None,
    ) -> None:
        self._store, self._group, self._listener, self._heartbeat = store, group, listener, heartbeat
        self._ledger, self._checkpoints, self._log_buffer, self._uploader = ledger, checkpoints, log_buffer, uploader
        self._begun = False
        self.saved_at: float | None = None
        """When the deadline saver was through with saving, on the clock of `time.monotonic`."""

    def begin(self) -> None:
        """Write down, once, which notice is being served, and at which step."""
        notice = self._listener.notice
        assert notice is not None
        self._heartbeat.enter(Phase.STOPPING)
        if self._begun:
            return
        self._begun = True
        age_s, left_s = round(time.monotonic() - notice.at_s, 6), notice.left_s()
        self._ledger.append(
            "notice",
            source=notice.source,
            reason=notice.reason,
            age_s=age_s,
            deadline_s=None if left_s is None else round(left_s, 6),
            step=self._heartbeat.completed,
        )

    def end(self, why: str = "") -> str:
        """Write down how the notice was served.

        Args:
            why: Why the last boundary is not committed, '' if it is.

        Returns:
            The same in a sentence.
        """
        notice, step, completed = self._listener.notice, self._checkpoints.committed_step, self._heartbeat.completed
        assert notice is not None
        if step < 0:  # in the middle of a restore
            step = max(commits.steps(self._store), default=0)
        self._heartbeat.committed_step = self._checkpoints.committed_step
        committed_s = round((self.saved_at or time.monotonic()) - notice.at_s, 6)
        self._log_buffer.flush(self._ledger, below=step)
        lost = {"lost_steps": completed - step, "why": why} if why else {}
        self._ledger.append("stopped", durable=True, step=step, notice_to_commit_s=committed_s, **lost)
        line = f"{notice.source}: stopped after step {step}, committed {committed_s:.2f} s after the notice"
        if why:
            line = f"{notice.source}: stopped with step {step}, committed before, of {completed} completed ones: {why}"
        say(line)
        self._heartbeat.enter(Phase.STOPPED)
        return line

    def leave(self, why: str) -> None:
        """End the process where the training thread cannot: what is committed is all that can be.

        Args:
            why: Why the last boundary is not, '' if it is.
        """
        self.end(why)
        if self._uploader is not None:
            with contextlib.suppress(JobkitError):  # then the saves wait in the home
                self._uploader.close(deadline_s=0.0)
        sys.stdout.flush()
        sys.stderr.flush()
        self._group.leave(PARTING_S)
        self._checkpoints.tidy()
        os._exit(Exit.PREEMPTED)

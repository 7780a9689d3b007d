"""How a training ends: with its last step, early by its own decision, or on a notice."""

import contextlib
from typing import NoReturn

from jobkit import faults
from jobkit.errors import ConfigError, Preempted, StorageError, say
from jobkit.run.boundary import Boundary, Loop
from jobkit.run.leaving import Leaving
from jobkit.run.saving import Saving
from jobkit.run.session import Session
from jobkit.supervise.heartbeat import Phase
from jobkit.tracking.log_buffer import EVERYTHING

_END_S = 1800.0
"""How far apart the processes may come to the end of `steps()`."""


class Ending:
    """The end of one attempt's training, which another loop may take back.

    Args:
        session: What the attempt has open.
        saving: Saves.
        boundary: Knows who counts the steps.
    """

    def __init__(self, session: Session, saving: Saving, boundary: Boundary) -> None:
        self._session, self._saving, self._boundary = session, saving, boundary
        self.leaving = Leaving()
        self.known = False
        """Whether the program has been told of a notice."""

    def settle(self) -> None:
        """End normally: commit what a loop that was left early, or a loop of the program's own, still holds.

        Raises:
            Preempted: If a stop was said before the training had come to its end.
        """
        session, boundary = self._session, self._boundary
        self.leaving.settle()
        if boundary.loop is Loop.OURS:  # a variable holds what was left with `break`
            self.left_steps()
        elif boundary.loop is not Loop.DONE and (
            boundary.stopping or (session.agreement is None and session.listener.noticed)
        ):
            self.stop()
        elif self._saving.resumed:
            self._saving.finish()
            # Where an earlier attempt has saved steps the program knows how; perhaps there was nothing left to do.
            if session.step == 0 and boundary.loop is Loop.NONE:
                self._note_untrained()
            elif boundary.loop is Loop.THEIRS:
                self._note_finished()

    def _note_untrained(self) -> None:
        """Say that the run saw nothing of what the program did: a loop of its own, or no training at all."""
        if not self._session.group.first:
            return
        self._session.ledger.append("unsaved", durable=True, step=self._session.step)
        say(
            "warning: the program ended without one step of the run: what it trained is not saved, the state at the "
            "start alone is. Loop with 'for step in run.steps(n)', or call run.save(step) with the number of completed "
            "steps; to evaluate only, jobkit.load(...) takes no part in the run"
        )

    # On a notice.

    def stop(self, *, at_save: bool = False) -> NoReturn:
        """Serve the notice: commit the completed steps and leave.

        Args:
            at_save: In a loop of the program's own, whether its state is that of the completed steps.

        Raises:
            Preempted: Once it is done.
        """
        session, saver, checkpoints = self._session, self._session.deadline_saver, self._session.checkpoints
        with saver.lock:
            session.stopping.begin()
            served = saver.arrive()
            asked, self._boundary.asked = self._boundary.asked or {}, None
            if not (self._boundary.loop is Loop.OURS or at_save):
                # Which step the live state belongs to, only who counts the steps knows: what was begun counts.
                self._saving.finish()
            elif served and (checkpoints.committed_step >= session.step or not saver.fits_deadline()):
                pass  # what the deadline saver has committed is what can be
            else:
                saver.emergency.commit(
                    session.step, self._saving.snapshot, by="boundary", metrics=asked, hear=self._saving.hear_failure
                )
            summary = session.stopping.end()
            self._boundary.loop = Loop.LEFT
        if session.probe is not None:
            session.probe.stopped(session.step, self._saving.parts, self._saving.given)
        raise Preempted(summary)

    def _known(self) -> bool:
        """Tell whether a notice may be the reason for leaving a loop: only if the program knew of it, from a library
        perhaps that hears of signals as well.
        """
        listener = self._session.listener
        return self.known or (self._session.agreement is None and listener.noticed and listener.shared)

    # Early.

    def left_steps(self, again: bool = False) -> None:
        """Serve a `break` in `steps()`: the step in progress counts as completed, and the training has ended.

        Args:
            again: Whether the program enters the same loop again: that was no end of the training.
        """
        begun, checkpoints = self._boundary.step_begun, self._session.checkpoints
        self._session.heartbeat.step += begun
        if self._known():
            self.stop()
        if not again:
            checkpoints.loops.stop(self._session.step)
        self.finish()
        if not (again or begun):  # the step before may have been committed before it was left
            checkpoints.mark()

    def left_rounds(self, again: bool) -> None:
        """Serve a `break` in `through()`: the training has ended with the last save.

        Args:
            again: As in `left_steps`.
        """
        if self._known():
            self.stop()
        self.finish_rounds()
        checkpoints = self._session.checkpoints
        if not again and checkpoints.committed_step == self._session.step:
            checkpoints.loops.stop(self._session.step)
            checkpoints.mark()

    def settle_before(self, kind: str, total: int | None, data: str = "") -> None:
        """Serve the loop that was left before another one begins.

        Args:
            kind, total, data: Those of the new one, as in `EarlyStop`; a total of None is like no other.
        """
        self.leaving.settle(again=self._session.checkpoints.loops.newest == (kind, total, data))

    def stopped_early(self, kind: str, total: int, data: str = "") -> bool:
        """Begin a loop; return whether an earlier attempt has left it early, so that nothing of it is left.

        Args:
            kind, total, data: As in `EarlyStop`.
        """
        stop = self._session.checkpoints.loops.begin(kind, total, data)
        if stop is None:
            return False
        if stop.again:
            with contextlib.suppress(StorageError):  # every later commit tells as well
                self._session.checkpoints.mark()
            return False
        if self._session.group.first:
            say(f"the training was stopped early after step {stop.step}; to train on, give {kind}() another end")
        return True

    # With the last step.

    def finish(self) -> None:
        """Commit the last step of `steps()`.

        Raises:
            ConfigError: If another process is in the loop still.
            JobkitError: If it could not be committed.
        """
        session, saver, boundary = self._session, self._session.deadline_saver, self._boundary
        with saver.lock, session.heartbeat.during(Phase.SAVING):
            try:
                saver.barrier(f"end/{session.step}", _END_S)
            except TimeoutError:
                raise ConfigError(
                    f"process {session.group.index} ended its loop after {session.step} steps, and another process "
                    "did not: all have to leave it at the same step"
                ) from None
            saver.watching, boundary.loop = False, Loop.LEFT
            asked, boundary.asked = boundary.asked or {}, None
            self._saving.commit(asked)
        self._note_finished()

    def finish_rounds(self) -> None:
        """Wait for the last save of a loop of the program's own.

        Raises:
            JobkitError: If it could not be committed.
        """
        self._saving.finish()
        self._session.heartbeat.committed_step = self._session.checkpoints.committed_step
        if self._session.step > 0:  # else it was no training
            self._note_finished()

    def _note_finished(self) -> None:
        session, self._boundary.loop = self._session, Loop.DONE
        self._saving.begin_interval()  # if another loop follows
        session.heartbeat.enter(Phase.FINISHED)
        session.log_buffer.flush(session.ledger, below=EVERYTHING)
        session.ledger.append("finished", durable=True, step=session.step)
        faults.reach("finished")

    def take_back(self) -> None:
        """Take back that the run has come to its end, where another loop follows the last one."""
        if self._session.heartbeat.phase == Phase.FINISHED:
            self._session.heartbeat.enter(Phase.STEPPING)
            self._session.ledger.append("goes_on", step=self._session.step)

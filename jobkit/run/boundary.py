"""What is due between two steps of a run: a save, a stop, what is asked from outside."""

import enum
import math
import time
from collections.abc import Callable
from typing import NoReturn

from jobkit import contract
from jobkit.checkpoint import state
from jobkit.checkpoint.first_step_check import FirstStep
from jobkit.errors import JobkitError, SupersededError, say
from jobkit.preemption.stop_step import SAVE, STOP
from jobkit.run.saving import Saving
from jobkit.run.session import Session, silence_jax
from jobkit.rundir.commits import check_newest
from jobkit.rundir.control import says_stop
from jobkit.supervise.heartbeat import Phase

_LOOK_S = 2.0
"""How often an attempt looks whether a newer one has taken over, and whether somebody asks something of it."""
_LOGS, _LOGS_S = 3, 10.0
"""A program trains past the run that has logged so often, in so long a time, before any step of the run."""
NO_STEPS = (
    "the program logs, and the run has seen no step of it: what it trains is not saved, and is lost when it is "
    "interrupted. Loop with 'for step in run.steps(n)' or 'for epoch in run.epochs(n, batches)', or call "
    "run.save(step) with the number of completed steps"
)


class Loop(enum.Enum):
    """Who counts the steps of a run."""

    NONE = enum.auto()
    """Nobody has yet."""
    OURS = enum.auto()
    """`steps()`."""
    THEIRS = enum.auto()
    """The program, which tells of them with `save(step)`."""
    LEFT = enum.auto()
    """Nobody any more, and the end of the training is not committed: a notice, or a failure."""
    DONE = enum.auto()
    """Nobody any more: the training has come to its end, which is committed."""


class Boundary:
    """The boundaries between the steps of one attempt, wherever they are counted.

    Args:
        session: What the attempt has open.
        saving: Saves.
    """

    def __init__(self, session: Session, saving: Saving) -> None:
        self._session, self._saving = session, saving
        self.loop = Loop.NONE
        self.asked: dict[str, float] | None = None
        """The metrics of the save that the program has asked for at the end of this step; None if it has not."""
        self.stopping = False
        """Whether the processes have agreed to stop."""
        self.stepped = False
        """Whether a step of `steps()` is completed."""
        self.step_begun = True
        """Whether the step in progress has begun; not between an epoch's own beginning and its first step."""
        self.next_look_s = time.monotonic() + _LOOK_S
        self.started_with: FirstStep | None = None
        """What the run resumed with, where the first step is to change something of it."""
        self.unsaved_step: int | None = None
        """The step that `should_save` has not wanted saved last, in a loop of the program's own."""
        self.first_round = False
        """Whether the first round of `through` is going on, at the end of which there may be a save."""
        self._save_wanted = self._own = False
        self._rounds = self._logs = self._asks = 0
        self._warned = False
        self._first_log_s = 0.0

    def come(self, *, last: bool, stop: Callable[[], NoReturn]) -> None:
        """Come to the end of a step in `steps()` where something may be due, and do it.

        Args:
            last: Whether it is the loop's last step, behind which there is a commit in any case.
            stop: Serves a notice, before the deadline saver can act.
        """
        session, saver = self._session, self._session.deadline_saver
        if session.look.noticed or self.asked is not None or self._saving.strategy.due(session.step, time.monotonic()):
            # A program that runs far ahead of its device would wait for it with the lock in hand.
            saver.boundaries.wait_for_device(session.step, self._saving.parts)
        with saver.lock:
            saver.idle = False
            if not self.stepped:
                self._first_step()
            if time.monotonic() >= self.next_look_s:
                self._look()
            self._saving.hear_failure()
            to_stop, save = self._due()
            if to_stop and not last:
                stop()
            self.stopping |= to_stop  # if another loop follows: this is said once
            asked, self.asked = self.asked, None
            if asked is not None and (agreed := self._saving.agreed(asked)) is not None:
                self._saving.save("asked", agreed)
            elif save and not last:
                reason, self._save_wanted = "asked" if self._save_wanted else "interval", False
                saver.barrier(f"save/{session.step}")
                self._saving.save(reason, {})
            session.heartbeat.committed_step = session.checkpoints.committed_step

    def _first_step(self) -> None:
        session, self.stepped = self._session, True
        self._take_back_warning()
        session.deadline_saver.boundaries.measure_room()
        session.heartbeat.enter(Phase.STEPPING)
        session.ledger.append("first_step", step=session.step)
        session.note_compiled()
        state.check_savable(self._saving.parts)
        if self.started_with is not None and (warning := self.started_with.warning()):
            say(warning)

    def _look(self) -> None:
        """Look up from the loop, every now and then."""
        self.next_look_s = time.monotonic() + _LOOK_S
        self.look_at_signals()
        try:
            check_newest(self._session.store, self._session.attempt, "go on")
        except SupersededError:
            raise
        except JobkitError:
            pass  # a shared disk that does not answer just now
        self._saving.adapt_interval()
        self._hear_control()

    def look_at_signals(self) -> None:
        """Take back the signals that JAX or a library have taken since the run was opened."""
        if silence_jax(said=True):
            self._session.listener.retake()
        self._session.listener.look()

    def _hear_control(self) -> None:
        """Hear what is asked from outside, in process 0: the others hear it from there."""
        session = self._session
        if session.control is None:
            return
        if (request := session.control.new(contract.SAVE)) is not None:
            # In a loop of its own the next save is the program's.
            step = session.step if self.loop is Loop.OURS else session.step + 1
            session.ledger.append("save_asked", durable=True, id=request.get("id"), by=request.get("by"), step=step)
            self._save_wanted = True
            if session.agreement is not None:
                session.agreement.ask(SAVE)
        if not session.supervised and (request := session.control.new(contract.CANCEL)) is not None:
            session.listener.note("stop", says_stop(request))
            if session.agreement is not None:
                session.agreement.ask(STOP, source="stop", reason=says_stop(request))

    def _due(self) -> tuple[bool, bool]:
        """Tell whether to stop and whether to save at this boundary; the same in all processes of the attempt."""
        session, strategy, now = self._session, self._saving.strategy, time.monotonic()
        if session.agreement is None:
            save = (self._save_wanted or strategy.due(session.step, now)) and not session.checkpoints.saving
            return session.listener.noticed, save
        if now >= strategy.next_s:  # by the clock of process 0 alone
            strategy.next_s = math.inf
            session.agreement.ask(SAVE)
        due = session.barrier()
        return STOP in due, SAVE in due or session.step >= strategy.next_step

    # Between the rounds of a loop of the program's own.

    def should_stop(self) -> bool:
        """Tell whether to stop; the same in all processes at the same look, if all look equally often."""
        session = self._session
        if self.loop is not Loop.OURS and time.monotonic() >= self.next_look_s:
            self.next_look_s = time.monotonic() + _LOOK_S
            self.look_at_signals()
            self._hear_control()
        if session.agreement is None:
            return session.listener.noticed
        if self.loop is not Loop.OURS:  # steps() looks by itself
            session.looks += 1
            if session.look.noticed:
                self.stopping |= STOP in session.barrier()
        return self.stopping

    def begin_round(self) -> None:
        """Come to a look of a loop of the program's own: what lies between two of them is a round."""
        self._rounds += 1
        if self._rounds == 2:
            self.note_own_loop()
        self._session.heartbeat.beat()

    def should_save(self, step: int, *, stop: bool) -> bool:
        """Tell, in a loop of the program's own, whether to save; the same in all processes.

        Args:
            step: Completed steps.
            stop: Whether to stop.
        """
        session = self._session
        self.unsaved_step = step
        self._take_back_warning()
        if stop:
            return True
        due = self._save_wanted or self._saving.strategy.due(step, time.monotonic())
        if session.group.count == 1:
            due &= not session.checkpoints.saving
        else:
            self._asks += 1
            due = bool(session.group.share(f"should_save/{self._asks}", lambda: due))
        return due

    def saved_by_hand(self) -> None:
        """Come to a save of a loop of the program's own."""
        self._save_wanted, self.unsaved_step = False, None
        self._take_back_warning()

    def note_log(self) -> None:
        """Hear that the program logs; say so if it goes on like that while nobody counts the steps of the run."""
        if self.loop is not Loop.NONE or self.unsaved_step is not None or self.first_round:
            return
        self._logs, now = self._logs + 1, time.monotonic()
        self._first_log_s = self._first_log_s or now
        if self._warned or self._logs < _LOGS or now - self._first_log_s < _LOGS_S or not self._session.group.first:
            return
        self._warned = True
        fields = {"step": self._session.step, "reason": NO_STEPS, "seconds": round(now - self._first_log_s, 1)}
        self._session.ledger.append("no_steps", durable=True, **fields)
        self._session.heartbeat.show_unsaved({"t": time.time(), "event": "no_steps", **fields})
        say(f"warning: {NO_STEPS}")

    def _take_back_warning(self) -> None:
        if self._warned:
            self._warned, self._logs = False, 0
            self._session.ledger.append("steps_seen", step=self._session.step)
            self._session.heartbeat.show_unsaved(None)

    def note_own_loop(self) -> None:
        """Write down, once, that the program trains in a loop of its own, whose steps only its saves tell."""
        if not (self._own or self.stepped or self.loop is Loop.DONE):
            self._own = True
            self._session.heartbeat.enter(Phase.STEPPING)
            self._session.ledger.append("own_loop", step=self._session.step)
            self._session.note_compiled()

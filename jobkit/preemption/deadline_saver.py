"""Serve a notice where the training thread cannot: while it compiles, evaluates, waits for data, sits in a long step.

With a notice comes a thread. It does nothing while there is time, since the training thread stops best by itself, at
its next boundary. When the deadline demands it the thread commits the newest boundary in hand, and leaves. Where there
is none (see boundaries.py) the newest commit has to do, and that is said.

Several processes decide together, process 0 for all of them: all have come to the boundary, or all save a step that
each of them holds, or all leave with what is committed.
"""

import contextlib
import enum
import threading
import time
from collections.abc import Callable, Mapping

from jobkit.checkpoint import state
from jobkit.checkpoint.kinds import Held, Part
from jobkit.errors import StorageError
from jobkit.group import Group
from jobkit.preemption.boundaries import Boundaries
from jobkit.preemption.emergency_save import Emergency
from jobkit.preemption.notice import Listener
from jobkit.preemption.plan import MARGIN, UNKNOWN_S
from jobkit.preemption.stopping import Stopping

_LEAVE_S = 1.0
"""What remains between the commit and SIGKILL: a moment to leave, and what the estimate does not know."""
_IDLE_S = 5.0
"""A program that has not completed a step has nothing to lose: it need not wait for the deadline."""
_TICK_S = 0.2
_ANSWER_S = 5.0
"""How long another process may take to say what it holds."""


class Verdict(enum.StrEnum):
    """What the processes of an attempt do together."""

    GO = "go"
    """All have come to the boundary where they stop: each saves there."""
    HOLD = "hold"
    """All save a step that each of them holds, and leave."""


class DeadlineSaver:
    """Watches over the training thread of one attempt, from the notice on.

    Args:
        emergency: Commits.
        listener: Knows the notice.
        group: The processes of the attempt.
        stopping: Writes down that the attempt stopped, and ends the process.
        lost: Names a process that has ended badly, '' while all live.
    """

    def __init__(
        self,
        emergency: Emergency,
        *,
        listener: Listener,
        group: Group,
        stopping: Stopping,
        lost: Callable[[], str] = lambda: "",
    ) -> None:
        self.emergency, self._listener, self._group = emergency, listener, group
        self._stopping, self._lost = stopping, lost
        self.boundaries = Boundaries(noticed=lambda: listener.noticed, several=group.count > 1)
        self.lock = threading.Condition()
        """Held by the training thread at a boundary where something is due, and by this one's own while it acts."""
        self.watching = self.idle = True
        """Whether the boundaries are known: in `steps()`, and before there are any. Whether none has been reached."""
        self._verdict: Verdict | None = None
        self._failure = ""
        """Why the processes cannot decide together."""
        self._served = self._arrived = self._closed = False
        self._starting = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    # The training thread.

    def enter(self, step: int, parts: Mapping[str, Part]) -> None:
        """Come to the beginning of a loop, from which on the boundaries are known."""
        self.boundaries.begin(step, parts)
        self.watching = True

    def found_state(self, nbytes: int) -> None:
        """Know how much there is to save; watch no boundary yet, for the loop may be one of the user's own."""
        self.boundaries.nbytes, self.watching = nbytes, False

    def arrive(self) -> bool:
        """Come to the boundary where this process stops; return whether this has saved already.

        Collective: every process arrives, or none is waited for when the deadline comes. The lock is held.

        Raises:
            StorageError: If the processes cannot decide together.
        """
        self._arrived = True
        if self._group.count == 1:
            return self._served
        self.begin()
        self._group.put(f"deadline/arrived/{self._group.index}", True)
        while self._verdict is not Verdict.GO:  # with the other one this process is ended
            self._wait(_TICK_S)
        return False

    def barrier(self, name: str, timeout_s: float = float("inf")) -> None:
        """Come to a save that all make together, and wait until they have: who is stuck before it would keep the rest
        in the middle of it, where the deadline saver can do nothing.

        Collective: the lock is free while this waits.

        Args:
            name: Of the save, the same in all processes.
            timeout_s: How long the others may take.

        Raises:
            StorageError: If a process is lost.
            TimeoutError: If one does not come.
        """
        if self._group.count == 1:
            return
        deadline = time.monotonic() + timeout_s
        with self.lock:
            if self._group.first:
                for other in range(1, self._group.count):
                    self._await(f"deadline/meet/{name}/{other}", deadline)
                self._group.put(f"deadline/meet/{name}", True)
            else:
                self._group.put(f"deadline/meet/{name}/{self._group.index}", True)
                self._await(f"deadline/meet/{name}", deadline)

    def wait_while(self, busy: Callable[[], bool]) -> None:
        """Wait while something is busy; the lock is free meanwhile, so that the deadline saver can act."""
        with self.lock:
            while busy():
                self.lock.wait(_TICK_S / 10)

    def _await(self, key: str, deadline: float) -> None:
        while not self._heard(key, _TICK_S / 4):
            self._wait(_TICK_S / 100)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no process put {key} before the deadline")

    def _wait(self, seconds: float) -> None:
        self.lock.wait(seconds)
        if self._failure:
            raise StorageError(self._failure)

    def fits_deadline(self) -> bool:
        """Tell whether one more save is expected to land before the deadline."""
        return self.emergency.fits_deadline(self.boundaries.nbytes)

    def close(self) -> None:
        """Watch no longer. The training thread serves what comes, or the run is over."""
        with self.lock:
            self.watching, self._closed = False, True
        self._wake.set()
        with self._starting:  # another thread may just be at it
            thread = self._thread
        if thread is not None:
            thread.join(2 * _TICK_S)  # it may hang on words with other processes

    # The deadline saver's own thread.

    def begin(self) -> None:
        """Start watching: there is a notice. Any thread may call it, any number of times."""
        with self._starting:
            if self._thread is None and not self._closed:
                self.boundaries.from_s = 0.0
                self._thread = threading.Thread(target=self._run, name="jobkit-deadline", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        try:
            if self._group.count == 1:
                self._alone()
            elif self._group.first:
                self._decide()
            else:
                self._follow()
        except Exception as error:  # whatever it is, the training thread must not wait for this one
            self._fail(str(error) or type(error).__name__)

    def _wait_s(self) -> float:
        """Return how long there is nothing to do yet."""
        notice = self._listener.notice
        if notice is None:
            return float("inf")
        left_s = notice.left_s()
        if not self.watching:  # before, between and after loops, and in one of the user's own: left to the program
            return float("inf") if left_s is None or self._group.count > 1 else left_s - _LEAVE_S
        idle_s = _IDLE_S - (time.monotonic() - notice.at_s)
        if self.idle and self._group.count == 1:
            return idle_s if left_s is None else min(idle_s, left_s - _LEAVE_S)
        if left_s is None:
            if self._group.count > 1 or self._served:
                return float("inf")
            left_s = UNKNOWN_S - (time.monotonic() - notice.at_s)  # to save in time; nobody is made to leave
        return (
            left_s
            - _LEAVE_S
            - (MARGIN * self.emergency.save_s(self.boundaries.nbytes) if self.boundaries.held else 0.0)
        )

    def _alone(self) -> None:
        while not self._closed:
            wait_s = self._wait_s()
            if wait_s > 0:
                self._wake.wait(min(wait_s, _TICK_S))
                continue
            with self.lock:
                if self._closed or self._arrived:
                    return
                held = self.boundaries.held if self.watching else {}
                failure = self._save(max(self.boundaries.usable(held), default=-1), held)
                self._served = not failure
            # The training thread may still come, and then leaves in good order; or save, if that failed here.
            while not self.idle and not self._closed:
                left_s = self.emergency.left_s()
                if left_s is not None and left_s <= _LEAVE_S / 2:
                    break
                self._wake.wait(_TICK_S / 4)
            with self.lock:
                if not self._closed and not self._arrived:
                    self._stopping.leave(failure)
            return

    def _save(self, step: int, held: Mapping[int, Mapping[str, Held]]) -> str:
        """Commit a step that is held, or wait for what is in flight; return what went wrong, '' if nothing did."""
        self._stopping.begin()
        failure = "" if step >= 0 or self.idle or not self.watching else self.boundaries.why
        try:
            if step >= 0:
                self.emergency.commit(step, lambda: self._taken(held[step]), by="guard")
            else:
                self.emergency.promote()
        except Exception as error:  # whatever it is, what is in flight may still land
            failure = str(error).splitlines()[0] if str(error) else type(error).__name__
            with contextlib.suppress(Exception):
                self.emergency.promote()
        self._stopping.saved_at = time.monotonic()
        return failure

    def _taken(self, parts: Mapping[str, Held]) -> state.Snapshot:
        return state.take_whole(parts, shared=self._group.count > 1)

    # Several processes.

    def _decide(self) -> None:
        """Process 0: wait until all have arrived, or somebody cannot wait any longer."""
        others = list(range(1, self._group.count))
        while not self._closed and not (dead := self._lost()):
            while others and self._heard(f"deadline/arrived/{others[0]}", _TICK_S / 4):
                del others[0]
            if not others and self._arrived:
                self._group.put("deadline/word", Verdict.GO)
                return self._decided(Verdict.GO)
            if not others:
                self._wake.wait(0.002)
            if self._wait_s() <= 0 or self._heard("deadline/ask", 0.001):
                self._group.put("deadline/word", Verdict.HOLD)
                return self._together(self._common)
        if dead:
            self._group.put("deadline/word", dead)
            self._fail(dead)
        return None

    def _common(self, own: list[int] | None) -> int:
        """Return the newest step that all hold; -1 if there is none."""
        answers = [own] + [
            self._group.get(f"deadline/held/{other}", _ANSWER_S) for other in range(1, self._group.count)
        ]
        common = set.intersection(*(set(steps or []) for steps in answers))
        at = max(common, default=-1)
        self._group.put("deadline/step", at)
        return at

    def _follow(self) -> None:
        """Another process than the first: ask if it cannot wait, and do as all do."""
        asked = False
        while not self._closed:
            if not asked and self._wait_s() <= 0:
                asked = True
                self._group.put("deadline/ask", self._group.index)
            try:
                word = self._group.get("deadline/word", _TICK_S)
            except TimeoutError:
                continue
            if word == Verdict.HOLD:
                return self._together(self._answer)
            return self._decided(Verdict.GO) if word == Verdict.GO else self._fail(word)
        return None

    def _answer(self, own: list[int] | None) -> int:
        self._group.put(f"deadline/held/{self._group.index}", own)
        return int(self._group.get("deadline/step", 2 * _ANSWER_S))

    def _decided(self, verdict: Verdict) -> None:
        with self.lock:
            self._verdict = verdict
            self.lock.notify_all()

    def _fail(self, failure: str) -> None:
        """Let the training thread wait for the others no longer."""
        with self.lock:
            self._failure = failure
            self.lock.notify_all()

    def _together(self, agree: Callable[[list[int] | None], int]) -> None:
        """Save a step that all hold, and leave.

        Args:
            agree: Tells the others which steps this process holds; returns the one that all hold, or -1.
        """
        # The training thread may be at a boundary, in a save that the others would have to take part in.
        mine = self.lock.acquire(timeout=1.0)
        held = self.boundaries.held
        try:
            own = self.boundaries.usable(held) if mine and self.watching else None
        except Exception:
            own = None
        try:
            step = agree(own)
        except TimeoutError:
            step = -1
        if step < 0 and own:
            self.boundaries.why = "the processes do not all hold the same step"
        self._stopping.leave(self._save(step, held))

    def _heard(self, key: str, timeout_s: float) -> bool:
        try:
            self._group.get(key, timeout_s)
        except TimeoutError:
            return False
        return True

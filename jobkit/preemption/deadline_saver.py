"""Serve a notice where the training thread cannot: while it compiles, evaluates, waits for data, sits in a long step.

At a boundary the parts are held by reference (JAX's arrays never change); the step in progress may do with the live
ones what it likes. With a notice comes a thread. It does nothing while there is time, since the training thread stops
best by itself, at its next boundary. When the deadline demands it the thread commits the newest boundary in hand, and
leaves.

A program that donates its state destroys it with every step: then the newest commit has to do, and that is said.

Several processes decide together, process 0 for all of them: all have come to the boundary, or all save a step that
each of them holds, or all leave with what is committed.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jobkit.checkpoint import orbax_io, state
from jobkit.checkpoint.kinds import Held, Part
from jobkit.errors import StorageError
from jobkit.group import Group
from jobkit.preemption.emergency_save import Emergency
from jobkit.preemption.notice import Listener
from jobkit.preemption.plan import MARGIN, UNKNOWN_S

_SHARE = 0.01
"""What holding may cost of the time of a step."""
_LEAVE_S = 1.0
"""What remains between the commit and SIGKILL: a moment to leave, and what the estimate does not know."""
_IDLE_S = 5.0
"""A program that has not completed a step has nothing to lose: it need not wait for the deadline."""
_ROOM_BYTES = 1 << 30
"""What may be held of boundaries before the newest: those that the device has yet to get past, and those where another
process may be stuck."""
_SPARE = 0.5
"""How much of the memory that has never been used one boundary of a larger state may take."""
_RUNGS = tuple(4**power for power in range(7))
"""Of the multiples of each, several processes go on holding the last two."""
_TICK_S = 0.2
_ANSWER_S = 5.0
"""How long another process may take to say what it holds."""


class DeadlineSaver:
    """Watches over the training thread of one attempt, from the notice on.

    Args:
        emergency: Commits.
        listener: Knows the notice.
        group: The processes of the attempt.
        take: Makes a snapshot of held parts, after checking that it fits the run.
        begin: Called when the guard begins to act.
        leave: Writes down that the attempt stopped with a committed step, and ends the process.
        lost: Names a process that has ended badly, '' while all live.
    """

    def __init__(
        self,
        emergency: Emergency,
        *,
        listener: Listener,
        group: Group,
        take: Callable[[Mapping[str, Any]], state.Snapshot],
        begin: Callable[[], None],
        leave: Callable[[str], None],
        lost: Callable[[], str] = lambda: "",
    ) -> None:
        self.emergency, self._listener, self._group = emergency, listener, group
        self._take, self._begin, self._leave, self._lost = take, begin, leave, lost
        self.lock = threading.Condition()
        """Held by the training thread at a boundary where something is due, and by the guard while it acts."""
        self.held: dict[int, Mapping[str, Held]] = {}
        """Completed steps -> the parts as they were then: of the newest boundary, and of those before it that the
        device has not got past, or another process perhaps."""
        self.begun = 0
        """Where the loop began, which every process holds, however few of the others."""
        self.from_s = 0.0
        """A boundary is held when the last one that was is so long ago; more often would cost too much."""
        self.held_s = 0.0
        """When a boundary was last held, on the clock of `time.monotonic`."""
        self.between = 0
        """Every boundary is held whose step has none of these bits. Whatever the clocks say, several processes hold the
        same ones so, though they may find holding to cost more or less."""
        self.watching = self.idle = True
        """Whether the boundaries are known: in `steps()`, and before there are any. Whether none has been reached."""
        self.nbytes = 0
        self._room = 0
        """How many boundaries may be held before the newest. A large state may have no room beside itself."""
        self.saved_at: float | None = None
        """When the guard was through with saving, on the clock of `time.monotonic`."""
        self._cost_s = float("inf")
        self._why = "the last boundary was not held: holding one takes longer than a step"
        self._verdict: str | None = None
        self._held_step = 0
        self._served = self._arrived = self._closed = False
        self._starting = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    # The training thread.

    def enter(self, step: int, parts: Mapping[str, Part]) -> None:
        """Come to the beginning of a loop, from which on the boundaries are known."""
        self.measure_room()
        self.begun = step
        for _ in range(2):  # the first time tells nothing about the cost
            self.hold(step, parts)
        self.watching = True

    def hold(self, step: int, parts: Mapping[str, Part]) -> None:
        """Hold the parts as they are at this boundary."""
        begun = time.thread_time()  # of the clock on the wall a busy machine takes more than holding costs
        before = self.held
        try:
            now = {name: part.hold() for name, part in parts.items()}
            # The program may run ahead of the device, and further in one process than in another: what was computed
            # last is held until there is something newer, and what was begun since as far as it is small.
            room = self._room
            keep: list[int] = []
            if self._group.count > 1:
                keep = kept(before, room, self.begun)
            elif self._listener.noticed and room:
                keep = sorted(before)[-1:]
            if before and room and not _ready(now):
                computed = max((number for number in before if _ready(before[number])), default=min(before))
                newer = sorted(number for number in before if number > computed)
                keep += [computed, *newer[max(0, len(newer) - room) :]]
            self.held = {number: before[number] for number in sorted({*keep})} | {step: now}
        except Exception as error:  # a part's own get_state may raise anything
            self._why, self.held = f"the last boundary could not be held: {error}", {}
        # A garbage collection must not pass for the cost of it.
        self._cost_s = min(time.thread_time() - begun, 2 * self._cost_s)
        self.from_s = 0.0 if self._listener.noticed else self._cost_s / _SHARE
        self._space(step)

    def _space(self, step: int) -> None:
        """Find how far apart the steps are that are held, from how long the last ones took."""
        now_s = time.monotonic()
        if step > self._held_step:
            apart = max(1.0, self.from_s * (step - self._held_step) / max(1e-9, now_s - self.held_s))
            self.between = (1 << min(30, math.ceil(math.log2(apart)))) - 1
        self._held_step, self.held_s = step, now_s

    def found_state(self, nbytes: int) -> None:
        """Know how much there is to save; watch no boundary yet, for the loop may be one of the user's own."""
        self.nbytes, self.watching = nbytes, False

    def measure_room(self) -> None:
        """See how much room there is, once the program has used what it uses."""
        self._room = _ROOM_BYTES // max(1, self.nbytes)
        if self._room == 0 and self.nbytes <= _SPARE * orbax_io.spare_bytes():
            self._room = 1

    def skip(self) -> None:
        """Come to a boundary too soon after the last one that was held; that one stays, if there is room for both."""
        if self.held and not self._room:
            self.held = {}

    def wait_for_device(self, step: int, parts: Mapping[str, Part]) -> None:
        """Wait until the device has computed this boundary; meanwhile the guard may save one that is."""
        self.hold(step, parts)
        for leaf in _arrays(self.held.get(step, {})):
            with contextlib.suppress(RuntimeError):  # donated, or failed: who saves it says so
                leaf.block_until_ready()

    def arrive(self) -> bool:
        """Come to the boundary where this process stops; return whether the guard has saved already.

        Collective: every process arrives, or none is waited for when the deadline comes. The lock is held.

        Raises:
            StorageError: If the processes cannot decide together.
        """
        self._arrived = True
        if self._group.count == 1:
            return self._served
        self.begin()
        self._group.put(f"guard/arrived/{self._group.index}", True)
        while self._verdict != "go":  # with any other word the guard ends this process
            self.lock.wait(_TICK_S)
            if self._verdict not in (None, "go", "hold"):
                raise StorageError(self._verdict or "")
        return False

    def barrier(self, name: str, timeout_s: float = float("inf")) -> None:
        """Come to a save that all make together, and wait until they have: who is stuck before it would keep the rest
        in the middle of it, where the guard can do nothing.

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
                    self._await(f"guard/meet/{name}/{other}", deadline)
                self._group.put(f"guard/meet/{name}", True)
            else:
                self._group.put(f"guard/meet/{name}/{self._group.index}", True)
                self._await(f"guard/meet/{name}", deadline)

    def wait_while(self, busy: Callable[[], bool]) -> None:
        """Wait while something is busy; the lock is free meanwhile, so that the guard can act."""
        with self.lock:
            while busy():
                self.lock.wait(_TICK_S / 10)

    def _await(self, key: str, deadline: float) -> None:
        while not self._heard(key, _TICK_S / 4):
            self.lock.wait(_TICK_S / 100)
            if self._verdict not in (None, "go", "hold"):
                raise StorageError(self._verdict or "")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no process put {key} before the deadline")

    def fits_deadline(self) -> bool:
        """Tell whether one more save is expected to land before the deadline."""
        return self.emergency.fits_deadline(self.nbytes)

    def close(self) -> None:
        """Watch no longer. The training thread serves what comes, or the run is over."""
        with self.lock:
            self.watching, self._closed = False, True
        self._wake.set()
        with self._starting:  # another thread may just be at it
            thread = self._thread
        if thread is not None:
            thread.join(2 * _TICK_S)  # it may hang on words with other processes

    # The guard's own thread.

    def begin(self) -> None:
        """Start watching: there is a notice. Any thread may call it, any number of times."""
        with self._starting:
            if self._thread is None and not self._closed:
                self.from_s = 0.0
                self._thread = threading.Thread(target=self._run, name="jobkit-guard", daemon=True)
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
            with self.lock:
                self._verdict = str(error) or type(error).__name__
                self.lock.notify_all()

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
        return left_s - _LEAVE_S - (MARGIN * self.emergency.save_s(self.nbytes) if self.held else 0.0)

    def _alone(self) -> None:
        while not self._closed:
            wait_s = self._wait_s()
            if wait_s > 0:
                self._wake.wait(min(wait_s, _TICK_S))
                continue
            with self.lock:
                if self._closed or self._arrived:
                    return
                held = self.held if self.watching else {}
                failure = self._save(max(self._usable(held), default=-1), held)
                self._served = not failure
            # The training thread may still come, and then leaves in good order; or save, if that failed here.
            while not self.idle and not self._closed:
                left_s = self.emergency.left_s()
                if left_s is not None and left_s <= _LEAVE_S / 2:
                    break
                self._wake.wait(_TICK_S / 4)
            with self.lock:
                if not self._closed and not self._arrived:
                    self._leave(failure)
            return

    def _save(self, step: int, held: Mapping[int, Mapping[str, Held]]) -> str:
        """Commit a step that is held, or wait for what is in flight; return what went wrong, '' if nothing did."""
        self._begin()
        failure = "" if step >= 0 or self.idle or not self.watching else self._why
        try:
            if step >= 0:
                self.emergency.commit(step, lambda: self._take(held[step]), by="guard")
            else:
                self.emergency.promote()
        except Exception as error:  # whatever it is, what is in flight may still land
            failure = str(error).splitlines()[0] if str(error) else type(error).__name__
            with contextlib.suppress(Exception):
                self.emergency.promote()
        self.saved_at = time.monotonic()
        return failure

    def _usable(self, held: Mapping[int, Mapping[str, Held]]) -> list[int]:
        """Return the steps that can be saved: those that are computed, or the newest if none is."""
        whole = [step for step in held if not any(leaf.is_deleted() for leaf in _arrays(held[step]))]
        if held and not whole:
            self._why = f"the arrays of step {max(held)} are gone: the step in progress has donated them"
        return [step for step in whole if _ready(held[step])] or whole[-1:]

    # Several processes.

    def _decide(self) -> None:
        """Process 0: wait until all have arrived, or somebody cannot wait any longer."""
        others = list(range(1, self._group.count))
        while not self._closed and not (dead := self._lost()):
            while others and self._heard(f"guard/arrived/{others[0]}", _TICK_S / 4):
                del others[0]
            if not others and self._arrived:
                self._group.put("guard/word", "go")
                return self._hear("go")
            if not others:
                self._wake.wait(0.002)
            if self._wait_s() <= 0 or self._heard("guard/ask", 0.001):
                self._group.put("guard/word", "hold")
                return self._together(self._common)
        if dead:
            self._group.put("guard/word", dead)
            self._hear(dead)
        return None

    def _common(self, own: list[int] | None) -> int:
        """Return the newest step that all hold; -1 if there is none."""
        answers = [own] + [self._group.get(f"guard/held/{other}", _ANSWER_S) for other in range(1, self._group.count)]
        common = set.intersection(*(set(steps or []) for steps in answers))
        at = max(common, default=-1)
        self._group.put("guard/step", at)
        return at

    def _follow(self) -> None:
        """Another process than the first: ask if it cannot wait, and do as all do."""
        asked = False
        while not self._closed:
            if not asked and self._wait_s() <= 0:
                asked = True
                self._group.put("guard/ask", self._group.index)
            try:
                word = self._group.get("guard/word", _TICK_S)
            except TimeoutError:
                continue
            return self._together(self._answer) if word == "hold" else self._hear(word)
        return None

    def _answer(self, own: list[int] | None) -> int:
        self._group.put(f"guard/held/{self._group.index}", own)
        return int(self._group.get("guard/step", 2 * _ANSWER_S))

    def _hear(self, word: str) -> None:
        with self.lock:
            self._verdict = word
            self.lock.notify_all()

    def _together(self, agree: Callable[[list[int] | None], int]) -> None:
        """Save a step that all hold, and leave.

        Args:
            agree: Tells the others which steps this process holds; returns the one that all hold, or -1.
        """
        # The training thread may be at a boundary, in a save that the others would have to take part in.
        mine = self.lock.acquire(timeout=1.0)
        held = self.held
        try:
            own = self._usable(held) if mine and self.watching else None
        except Exception:
            own = None
        try:
            step = agree(own)
        except TimeoutError:
            step = -1
        if step < 0 and own:
            self._why = "the processes do not all hold the same step"
        self._leave(self._save(step, held))

    def _heard(self, key: str, timeout_s: float) -> bool:
        try:
            self._group.get(key, timeout_s)
        except TimeoutError:
            return False
        return True


def kept(steps: Iterable[int], room: int, begun: int) -> list[int]:
    """Return which of the boundaries that one of several processes holds it goes on holding, with the newest one.

    Another process may be stuck a step behind, and hold fewer: every second one, every fourth, ... Of what both could
    hold one is among these, as far as there is room.

    Args:
        steps: The boundaries.
        room: For how many there is room.
        begun: Where the loop began: held by all, it counts as a multiple of everything.
    """
    held = sorted(steps)
    chosen: set[int] = set()
    for rung in _RUNGS:
        chosen.update([step for step in held if step % rung == 0 or step == begun][-2:])
    return sorted(chosen)[-room:] if room else []


def _arrays(held: Mapping[str, Held]) -> list[Any]:
    leaves = (getattr(leaf, "_base_array", leaf) for part in held.values() for leaf in part.leaves)  # of a typed key
    return [leaf for leaf in leaves if hasattr(leaf, "is_ready")]


def _ready(held: Mapping[str, Held]) -> bool:
    """Tell whether the device has computed what is held; the newest first, since that fails soonest."""
    return all(leaf.is_deleted() or leaf.is_ready() for leaf in reversed(_arrays(held)))

"""Many processes, one step: how the processes of an attempt agree where all of them stop, or save.

Any process may get the notice, and their loops are apart by some steps. Who has something to ask opens a *round*. Each
process answers it from a thread, also while it compiles or computes, with a *bound*: the number of the next boundary
that it has certainly not passed. From then on it passes no boundary until process 0 has put all bounds together: the
largest of them is where everybody meets. Between rounds a step costs one look at a flag.

Why no process has passed the meeting point: the thread raises the flag before it reads the count of completed steps,
and the loop counts before it looks at the flag. So the loop either sees the flag at the boundary it has just counted,
and waits there, or its count is seen by the thread; in both cases it is below its own bound plus one.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from jobkit.errors import JobkitError, StorageError
from jobkit.group import Group

STOP, SAVE = "stop", "save"
_SLICE_S = 0.5
_PATIENCE_S = 20.0
"""How long a process may take to answer: its threads run while it computes, unless something holds the interpreter."""


class Rounds:
    """What one process knows of the rounds; the thread that answers and the loop share it.

    Args:
        count: Returns the boundaries that the loop has reached; read after the flag is up.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        self.noticed = False
        """Whether the loop has to look here at its next boundary: the one thing it reads at every step."""
        self._count = count
        self._open: dict[int, tuple[str, int | None]] = {}

    def begin(self, number: int, kind: str) -> int:
        """Take part in a round; return this process's bound."""
        self._open[number] = (kind, None)
        self.noticed = True
        return self._count() + 1

    def decide(self, number: int, at: int) -> None:
        """Learn at which boundary a round's deed is due."""
        self._open[number] = (self._open[number][0], at)

    @property
    def undecided(self) -> bool:
        """Whether the loop has to wait at the boundary it is at."""
        return any(at is None for _, at in self._open.values())

    def due(self, count: int) -> set[str]:
        """Return what is to be done at this boundary, once."""
        now = [number for number, (_, at) in self._open.items() if at is not None and at <= count]
        kinds = {self._open.pop(number)[0] for number in now}
        self.noticed = bool(self._open)
        return kinds


class Agreement:
    """One process's part in the rounds of its attempt.

    Args:
        group: The processes, more than one.
        count: Returns how many boundaries the loop has reached.
        on_stop: Called with what was said, when a round to stop begins.
        lost: Names a process that has ended badly, '' while all live.
    """

    def __init__(
        self,
        group: Group,
        count: Callable[[], int],
        *,
        on_stop: Callable[[dict[str, Any]], None] = lambda message: None,
        lost: Callable[[], str] = lambda: "",
    ) -> None:
        self.rounds = Rounds(count)
        self._group, self._on_stop, self._lost = group, on_stop, lost
        self._number = 0
        self._changed = threading.Condition()
        self._failure: JobkitError | None = None
        self._asked_to_stop = self._closing = False
        self._thread = threading.Thread(target=self._run, name="jobkit-agreement", daemon=True)
        self._thread.start()

    def ask(self, kind: str, **details: Any) -> None:
        """Open a round; if another one to stop was opened meanwhile, that serves as well. Any thread may ask."""
        if kind == STOP and self._asked_to_stop:
            return
        self._asked_to_stop |= kind == STOP
        number = self._number
        try:
            while not self._group.put(f"round/{number}", {"kind": kind, "from": self._group.index} | details):
                if self._group.get(f"round/{number}", _PATIENCE_S)["kind"] in (STOP, kind):
                    return
                number += 1
        except (JobkitError, TimeoutError) as error:
            self._fail(error)

    def barrier(self, count: int) -> set[str]:
        """Wait, at a boundary, until all open rounds are decided; return what is to be done at this one.

        Raises:
            StorageError: If there can be no agreement: a process is dead or does not answer.
        """
        with self._changed:
            while self.rounds.undecided and self._failure is None:
                self._changed.wait(_SLICE_S)
            if self._failure is not None:
                raise self._failure
            return self.rounds.due(count)

    def close(self) -> None:
        """Take part no longer; every process must have reached its last boundary."""
        self._closing = True
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing:
                try:
                    message = self._group.get(f"round/{self._number}", _SLICE_S)
                except TimeoutError:
                    continue
                self._answer(self._number, message)
                self._number += 1
        except Exception as error:  # whatever it is, the loop must not wait for this thread
            self._fail(error)

    def _answer(self, number: int, message: dict[str, Any]) -> None:
        with self._changed:
            bound = self.rounds.begin(number, message["kind"])
        if message["kind"] == STOP:
            self._asked_to_stop = True
            self._on_stop(message)
        if self._group.first:
            others = range(1, self._group.count)
            bounds = [bound] + [self._number_at(f"round/{number}/bound/{other}", message["kind"]) for other in others]
            at = -1 if None in bounds else max(value for value in bounds if value is not None)
            self._group.put(f"round/{number}/at", at)
        else:
            self._group.put(f"round/{number}/bound/{self._group.index}", bound)
            decided = self._number_at(f"round/{number}/at", message["kind"], rounds=2)
            at = -1 if decided is None else decided
        if at < 0 and self._closing:
            return
        if at < 0:
            raise StorageError(
                self._lost()
                or "one of the processes did not say in time at which step it can stop: look into the log of each of "
                "them, log-0.txt and so on"
            )
        with self._changed:
            self.rounds.decide(number, at)
            self._changed.notify_all()

    def _number_at(self, key: str, kind: str, *, rounds: int = 1) -> int | None:
        """Return the number under a key; None if who would say it is dead, or does not answer though it is urgent."""
        patience_s = rounds * _PATIENCE_S if kind == STOP else float("inf")  # a save has time
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline and not self._closing and not self._lost():
            try:
                number: int = self._group.get(key, _SLICE_S)
                return number
            except TimeoutError:
                pass
        return None

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._failure = error if isinstance(error, JobkitError) else StorageError(str(error))
            self.rounds.noticed = True
            self._changed.notify_all()

"""A run of the local backend seen and interrupted from outside; `jobkit demo` and `jobkit drill` are made of it.

What interrupts are real signals to real processes. jax is only in processes of their own.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jobkit import contract
from jobkit.errors import JobkitError
from jobkit.rundir import ledger
from jobkit.rundir.files import remove_tree
from jobkit.rundir.ledger import Event, read_json
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from jobkit.supervise.heartbeat import Beat, read_beat
from launch.lifecycle import lock, orphans

COMPARE_S = 900.0
"""How long a comparison of two runs may take."""
AIM_S = 0.004
"""How often the heartbeat is looked at: a small part of a step."""


def newest_attempt(store: Store) -> int | None:
    """Return the number of the newest attempt, None before there is one."""
    return max(store.numbers(contract.ATTEMPTS), default=None)


def living(store: Store, attempt: int) -> dict[str, Any] | None:
    """Return what the supervisor of a living attempt wrote down, None if there is none."""
    directory = contract.attempt_dir(attempt)
    if store.exists(f"{directory}/{contract.OUTCOME}"):
        return None
    try:
        link = read_json(store, f"{directory}/supervisor.json")
    except JobkitError:
        return None
    return link if link and isinstance(link.get("pid"), int) and link.get("heartbeat") else None


def beat_of(link: Mapping[str, Any]) -> Beat:
    """Return the newest heartbeat of a living attempt."""
    return read_beat(Path(str(link["heartbeat"])))


def send(pid: int, number: int) -> bool:
    """Send a signal; tell whether there was anybody to take it."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def first(store: Store, attempt: int, name: str) -> Event:
    """Return the first event of a kind in an attempt's ledger, empty if there is none."""
    return next((event for event in ledger.attempt_events(store, attempt) if event["event"] == name), {})


def end_now(store: Store) -> None:
    """Kill whatever lives of a run: its runner first, which would start more."""
    signed = lock.holder(store).get("pid") if lock.held(store) else None
    if isinstance(signed, int) and signed > 1 and signed != os.getpid():
        send(signed, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (left := [pid for pid in orphans.processes_of(store) if processes.alive(pid)]) and (
        time.monotonic() < deadline
    ):
        for pid in left:
            processes.send(pid, signal.SIGKILL)
        time.sleep(0.02)
    for attempt in store.numbers(contract.ATTEMPTS):  # their supervisors had no time to
        if (directory := orphans.heartbeat_directory(store, attempt)) is not None:
            remove_tree(directory)


@dataclass(frozen=True)
class Ending:
    """How one attempt ended and what it cost to go on.

    Args:
        outcome: One of `contract.Outcome`, None if it is not written.
        reason: Why, one clause.
        reached_step: Completed steps when it ended.
        resumed_step: Where the next attempt went on, 0 if it began afresh; None if there is none.
        commit_s: Seconds from the notice to the commit; None where there was no notice.
        restart_s: Seconds from its end to the end of the next one's first step, or of its loop if no step was left.
    """

    attempt: int
    outcome: str | None
    reason: str = ""
    reached_step: int | None = None
    resumed_step: int | None = None
    commit_s: float | None = None
    restart_s: float | None = None

    @property
    def lost_steps(self) -> int | None:
        """Completed steps that had to be done again."""
        if self.reached_step is None or self.resumed_step is None:
            return None
        return max(0, self.reached_step - self.resumed_step)


def ending_of(store: Store, attempt: int) -> Ending:
    """Read from the ledger how an attempt ended."""
    outcome = orphans.read_outcome(store, attempt) or {}
    later = [number for number in store.numbers(contract.ATTEMPTS) if number > attempt]
    # The next one may have died before it had restored anything.
    following = [event for number in later for event in ledger.attempt_events(store, number)]
    begun: Event = next((event for event in following if event["event"] in ("restored", "fresh")), {})
    back = next((event for event in following if event["event"] in ("first_step", "finished")), None)
    restart_s = None
    if back and isinstance(outcome.get("ended"), float):
        restart_s = round(back["t"] - outcome["ended"], 3)
        restart_s = restart_s if restart_s >= 0 else None  # it began before the old one had ended
    return Ending(
        attempt,
        outcome.get("outcome"),
        str(outcome.get("reason", "")),
        outcome.get("step"),
        begun.get("step"),
        first(store, attempt, "stopped").get("notice_to_commit_s"),
        restart_s,
    )


class Comparer:
    """Compares runs bit for bit, in one process of its own, since reading checkpoints needs jax.

    Args:
        home: An empty directory: from a bucket it reads what has got there, as another machine would.
    """

    def __init__(self, home: Path) -> None:
        self._mutex = threading.Lock()
        self._home = home
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "jobkit.compare", "-", "-"],
            env=os.environ | {"JAX_PLATFORMS": "cpu", contract.ENV_HOME: str(self._home)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # a Ctrl-C is ours to hear
        )

    def compare(self, a: str, b: str) -> dict[str, Any]:
        """Compare two runs.

        Returns:
            `jobkit.compare.Comparison` as JSON has it.

        Raises:
            JobkitError: If there is nothing to compare.
        """
        with self._mutex:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                self._process.stdin.write(f"{a}\t{b}\n")
                self._process.stdin.flush()
                if not select.select([self._process.stdout], [], [], COMPARE_S)[0]:
                    raise TimeoutError
                reply: dict[str, Any] = json.loads(self._process.stdout.readline())
            except (OSError, ValueError):  # it died, or it hangs: the next comparison is another one's
                self.close()
                self._process = self._start()
                raise JobkitError(f"{a} and {b} could not be compared: python -m jobkit.compare {a} {b}") from None
        if "error" in reply:
            raise JobkitError(f"the two runs could not be compared: {reply['error']}")
        return reply

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def comparer() -> Iterator[Comparer]:
    """Give a comparer with a home of its own."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="jobkit-compare-") as home, Comparer(Path(home)) as made:
        yield made


class MissedError(Exception):
    """What was waited for cannot come any more: the run was over before."""


class LateError(Exception):
    """What was waited for did not come in time."""


def wait_until(
    condition: Callable[[], Any], what: str, *, deadline_s: float, over: Callable[[], bool] = lambda: False
) -> Any:
    """Wait until something is true and return it.

    Args:
        condition: Asked every few milliseconds.
        what: For the error.
        deadline_s: When to give up, on the clock of `time.monotonic`.
        over: Whether it can no longer become true.

    Raises:
        MissedError: If it can no longer come.
        LateError: If it does not come in time.
    """
    while not (value := condition()):
        if over() and not condition():  # asked again: it may have come with the end
            raise MissedError(f"the run was over before {what}")
        if time.monotonic() > deadline_s:
            raise LateError(f"waited in vain until {what}")
        time.sleep(AIM_S)
    return value

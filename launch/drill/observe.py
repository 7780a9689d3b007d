"""A run of the local backend seen and signalled from outside: its heartbeats, its ledger, its processes.

What interrupts are real signals to real processes.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobkit import contract
from jobkit.contract import Outcome
from jobkit.errors import JobkitError
from jobkit.rundir import ledger
from jobkit.rundir.files import remove_tree
from jobkit.rundir.ledger import Event, read_json
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from jobkit.supervise.heartbeat import Beat, Phase, read_beat
from launch.lifecycle import lock, orphans

AIM_S = 0.004
"""How often the heartbeat is looked at: a small part of a step."""


@dataclass(frozen=True)
class Living:
    """One look at an attempt that lives.

    Args:
        attempt: Its number.
        supervisor: The process id of its supervisor.
        beat: Its newest heartbeat.
    """

    attempt: int
    supervisor: int
    beat: Beat

    @property
    def where(self) -> str:
        """What it does, for a person: 'step 7'."""
        return f"step {self.beat.step}" if self.beat.phase == Phase.STEPPING else self.beat.phase.words


def living(store: Store, attempt: int | None = None) -> Living | None:
    """Look at an attempt, the newest by default; None if it does not live."""
    number = max(store.numbers(contract.ATTEMPTS), default=None) if attempt is None else attempt
    if number is None or store.exists(f"{contract.attempt_dir(number)}/{contract.OUTCOME}"):
        return None
    try:
        link = read_json(store, f"{contract.attempt_dir(number)}/supervisor.json") or {}
    except JobkitError:
        return None
    pid, heartbeat = link.get("pid"), link.get("heartbeat")
    return Living(number, pid, read_beat(Path(str(heartbeat)))) if isinstance(pid, int) and heartbeat else None


def send(pid: int, number: int) -> bool:
    """Send a signal; tell whether there was anybody to take it. Nobody has the process id 0."""
    try:
        if pid:
            os.kill(pid, number)
    except ProcessLookupError:
        return False
    return bool(pid)


def first(store: Store, attempt: int, name: str) -> Event:
    """Return the first event of a kind in an attempt's ledger, empty if there is none."""
    return next((event for event in ledger.attempt_events(store, attempt) if event["event"] == name), {})


def end_now(store: Store) -> None:
    """Kill whatever lives of a run: its runner first, which would start more."""
    signed = lock.holder(store).get("pid") if lock.held(store) else None
    if isinstance(signed, int) and signed > 1 and signed != os.getpid():
        send(signed, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (left := [*filter(processes.alive, orphans.processes_of(store))]) and time.monotonic() < deadline:
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
        attempt: Its number; None where there was none.
        outcome: One of `contract.Outcome`, None if it is not written.
        reason: Why, one clause.
        reached_step: Completed steps when it ended.
        resumed_step: Where the next attempt went on, 0 if it began afresh; None if there is none.
        commit_s: Seconds from the notice to the commit; None where there was no notice.
        restart_s: Seconds from its end to the end of the next one's first step, or of its loop if no step was left.
    """

    attempt: int | None
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


class UnfinishedError(JobkitError):
    """A run that was to tell something did not come to its end."""


def must_end(*stores: Store) -> tuple[Store, ...]:
    """Return runs that were to tell something, if all of them came to their end.

    Raises:
        UnfinishedError: If one did not.
    """
    for store in stores:
        outcomes = [orphans.read_outcome(store, attempt) or {} for attempt in store.numbers(contract.ATTEMPTS)]
        if not outcomes or outcomes[-1].get("outcome") != Outcome.DONE:
            reasons = [outcome["reason"] for outcome in outcomes if outcome.get("reason")]
            reason = reasons[-1] if reasons else "it did not end in time"
            raise UnfinishedError(f"another run, {store.url}, came to nothing: {reason}")
    return stores


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

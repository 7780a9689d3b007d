"""Runs that were started by hand, by a program with a `Run` and without a submit: what they do, by their directory.

Nobody starts such a run again but who started it, so that no backend has it and no verb of one is for it: it is looked
at, asked to save or to stop (see save_and_stop.py), and removed.
"""

import os
import time
from dataclasses import dataclass

from jobkit import contract
from jobkit.contract import Outcome, State
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from launch.lifecycle import orphans, run_status
from launch.lifecycle.history import Pace, by_hand_outcome, count_of, number_of, pace
from launch.lifecycle.run_status import Ending, Status

NAME = "by hand"
"""What stands for a backend."""
_TOLD = 5
"""Of so many of the newest attempts a status tells how they ended."""
_CLOCK_S = 60.0
"""How far a clock may have been set between two looks at it."""


@dataclass(frozen=True)
class _Attempt:
    """One attempt, as its program wrote it down.

    Args:
        began: When it opened the run (epoch, s); None where that is not written.
        host: The machine that it was on.
        pid: Its process there.
        pace: How far it came.
        outcome: How it ended, as outcome.json has it; empty while that is not written.
    """

    number: int
    began: float | None
    host: str
    pid: int
    pace: Pace
    outcome: dict[str, object]

    @property
    def alive(self) -> bool | None:
        """Whether its program lives; None where this machine cannot tell."""
        if self.outcome or self.began is None:
            return False
        if self.host != os.uname().nodename:
            return None
        since_boot_s = time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else float("inf")
        return self.began > time.time() - since_boot_s - _CLOCK_S and processes.alive(self.pid)


def status(store: Store) -> Status:
    """Read what a run that was started by hand is doing.

    Args:
        store: The run.
    """
    numbers = store.numbers(contract.ATTEMPTS)
    attempts = [_read(store, number) for number in numbers[-_TOLD:]]
    newest = attempts[-1] if attempts else None
    alive = newest.alive if newest is not None else False
    committed = orphans.committed_step(store)
    updated = run_status.last_change(store, newest.number if newest is not None else None)
    running = newest is not None and alive is not False
    step = count_of(max(committed, newest.pace.steps if newest is not None else -1))
    begun = _read(store, numbers[0]).began if numbers else None
    ended = time.time() if running else updated
    state, reason = (State.RUNNING, "") if running else _end(newest, committed)
    return Status(
        run=store.url,
        name=store.path.name,
        backend=NAME,
        state=state,
        attempt=newest.number if newest is not None else None,
        attempts=len(numbers),
        step=step,
        committed_step=count_of(committed),
        metrics=run_status.newest_metrics(store, numbers),
        reason=reason,
        submitted=begun,
        started=newest.began if newest is not None else None,
        updated=updated,
        total_steps=newest.pace.total if newest is not None else None,
        stepped=newest.pace.at(None) if newest is not None else None,
        left_s=newest.pace.left_s(step, time.time()) if newest is not None and running else None,
        elapsed_s=max(0.0, ended - begun) if ended is not None and begun is not None else None,
        node=newest.host if newest is not None and running else "",
        set_aside=run_status.noted(store, numbers[-_TOLD:], 0, "set_aside", first_bytes=run_status.TAIL_BYTES),
        endings=[_ending(one) for one in (attempts[:-1] if running else attempts)],
        runner="alive" if running else "ended",
        host=newest.host if newest is not None and running and alive is None else "",
        sign_s=run_status.age(updated) if running and alive is None else None,
    )


def _read(store: Store, number: int) -> _Attempt:
    name = contract.events_file(number, 0)
    head = list(run_status.lines(store, name, first_bytes=run_status.TAIL_BYTES))
    tail = list(run_status.lines(store, name, last_bytes=run_status.TAIL_BYTES))
    opened = next((event for event in head if event["event"] == "opened"), {})
    outcome = orphans.read_outcome(store, number) or by_hand_outcome(tail)
    pid = min(count_of(opened.get("pid")) or 0, (1 << 31) - 1)
    began = number_of(opened.get("t"))
    return _Attempt(number, began, str(opened.get("host", "")), pid, pace(head, tail), outcome)


def _ending(one: _Attempt) -> Ending:
    outcome = one.outcome or by_hand_outcome([], over=True)
    return Ending(one.number, str(outcome.get("outcome", "")), str(outcome.get("reason", "")), count_of(one.pace.steps))


def _end(newest: _Attempt | None, committed: int) -> tuple[State, str]:
    """Return the state of a run of which nothing runs, and why."""
    again = f"; started again it goes on from step {committed}" if committed >= 0 else "; nothing is committed"
    if newest is None:
        return State.FAILED, f"no attempt has begun{again}"
    ending = _ending(newest)
    if ending.outcome == Outcome.DONE:
        return State.DONE, f"finished; step {committed} is committed" if committed >= 0 else "finished"
    state = State.CANCELLED if ending.outcome == Outcome.PREEMPTED else State.FAILED
    return state, ending.reason + again

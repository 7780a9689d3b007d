"""Asking something of a run that trains, and hearing what became of it: commit now, or stop until somebody resumes it.

The run may have been submitted to any backend or started by hand, here or on another machine with the same URL. All
that is known of it lies in its directory, so that an answer is one of: it is committed; nothing runs that could do it;
the attempt ended before it did; it has not answered yet.
"""

import contextlib
import os
import time
from collections.abc import Callable

import msgspec

from jobkit import contract
from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir import commits, remote_steps
from jobkit.rundir.ledger import Event, last_word, read_json, writer_events
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from jobkit.units import show_duration
from launch.backends import registry
from launch.lifecycle import orphans, run_status
from launch.lifecycle.history import count_of
from launch.lifecycle.submission import ask, ask_to_cancel, open_run, refresh
from launch.spec import jobspec as specs

_POLL_S, _POLL_REMOTE_S = 0.2, 2.0
PATIENCE_S = 300.0
"""How long an answer is waited for: a step, a compilation or an evaluation may be under way."""


class Answer(msgspec.Struct, frozen=True):
    """What became of a request.

    Args:
        run: The run.
        attempt: The attempt that was asked.
        done: Whether it is done; false without waiting.
        committed_step: Newest committed step, null if there is none.
    """

    run: str
    attempt: int | None
    done: bool
    committed_step: int | None


def save(
    url: str | os.PathLike[str],
    *,
    wait: bool = True,
    timeout_s: float = PATIENCE_S,
    progress: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Have a run commit its state at the end of the step in progress, and go on.

    Args:
        url: The run.
        wait: Whether to wait until it is committed.
        timeout_s: How long to wait.
        progress: Called with a line for a person when the waiting starts.

    Durability: after waiting the step is committed, on the run's URL where it has one.

    Raises:
        ConfigError: If nothing of the run trains; nothing is asked then.
        JobkitError: If it could not save, ended before, or does not answer in time.
    """
    store = open_run(url)
    attempt, deadline = _running(store), time.monotonic() + timeout_s
    if wait:
        progress(f"waiting until {store.url} has saved the step in progress (at most {show_duration(timeout_s)})")
    while not _events(store, attempt, "opened") and not _over(store, attempt):
        # What it finds when it opens the run was asked of another attempt.
        if not wait or time.monotonic() >= deadline:
            raise JobkitError(f"attempt {attempt} of {store.url} is still starting; ask again when it trains")
        _nap(store)
    before = _committed(store)
    identity = msgspec.json.decode(ask(store, contract.SAVE))["id"]
    if not wait:
        return Answer(store.url, attempt, False, count_of(before))
    while True:
        _nap(store)
        # First whether it is over: what it did until then is written.
        over = _over(store, attempt) or last_word(writer_events(store, attempt, "0")) in ("finished", "stopped")
        taken = [event for event in _events(store, attempt, "save_asked") if event.get("id") == identity]
        committed = _committed(store)
        if (taken and committed >= taken[0]["step"]) or (over and committed > before):
            return Answer(store.url, attempt, True, count_of(committed))
        failed = [event for event in _events(store, attempt, "save_failed") if taken and event["t"] >= taken[0]["t"]]
        if failed:
            raise JobkitError(f"{store.url} could not save: {failed[0].get('reason')}; {_newest(committed)}")
        if over:
            raise JobkitError(f"attempt {attempt} of {store.url} ended before it could save; {_newest(committed)}")
        if time.monotonic() >= deadline:
            raise JobkitError(
                f"{store.url} has not saved within {show_duration(timeout_s)}: it does between two steps, and will "
                f"yet if this attempt comes to the end of one; {_newest(committed)}"
            )


def stop(
    url: str | os.PathLike[str],
    *,
    wait: bool = True,
    timeout_s: float = PATIENCE_S,
    progress: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Have a run commit and stop, until somebody resumes it.

    Args:
        url: The run.
        wait: Whether to wait until nothing of it runs any more.
        timeout_s: How long to wait for a run that was not submitted; one that was gets its grace, and is then killed.
        progress: Called with a line for a person when the waiting starts.

    Durability: on return the wish is on storage; only `resume`, or starting the program anew by hand, overrules it.

    Raises:
        ConfigError: If the run is done, or was not submitted and does not run.
        JobkitError: If a run that was not submitted does not stop in time.
    """
    store = open_run(url)
    if _submitted(store):
        done = registry.cancel(url, wait=wait, word="stopped", progress=progress).over
        newest = max(store.numbers(contract.ATTEMPTS), default=None)
        return Answer(store.url, newest, done, count_of(_committed(store)))
    attempt = _running(store)
    ask_to_cancel(store, "stopped")
    if wait:
        progress(f"waiting for {store.url} to save and stop (at most {show_duration(timeout_s)})")
    deadline = time.monotonic() + timeout_s
    while wait and not _over(store, attempt):
        if time.monotonic() >= deadline:
            raise JobkitError(
                f"{store.url} has not stopped within {show_duration(timeout_s)}; it will when it comes to the end of a "
                f"step; {_newest(_committed(store))}"
            )
        _nap(store)
    return Answer(store.url, attempt, wait, count_of(_committed(store)))


def _running(store: Store) -> int:
    """Return the attempt of a run that trains just now.

    Raises:
        ConfigError: If none does, saying what the run is doing instead.
    """
    attempts = store.numbers(contract.ATTEMPTS)
    if _submitted(store):
        if specs.read(store).sweep:
            raise ConfigError(f"{store.url} is a sweep: name one of its points")
        status = registry.status(store)
        if status.state is not State.RUNNING:
            why = f"{status.state}: {status.reason}" if status.reason else str(status.state)
            raise ConfigError(f"nothing of {store.url} trains just now ({why}); {_newest(_committed(store))}")
    elif not attempts and not store.exists(contract.STRATEGY):
        raise ConfigError(f"{store.url} is not a run: it has no attempt yet; 'jobkit ls' lists the runs here")
    if not attempts or _over(store, attempts[-1]):
        last = f"attempt {attempts[-1]} has ended" if attempts else "no attempt has begun"
        raise ConfigError(f"nothing of {store.url} trains just now: {last}; {_newest(_committed(store))}")
    return attempts[-1]


def _submitted(store: Store) -> bool:
    return specs.exists(store) or specs.sweep_of(store) is not None


def _over(store: Store, attempt: int) -> bool:
    """Tell whether an attempt has ended."""
    if orphans.read_outcome(store, attempt) is not None or store.numbers(contract.ATTEMPTS)[-1] != attempt:
        return True
    supervisor = read_json(store, f"{contract.attempt_dir(attempt)}/supervisor.json")
    if supervisor is None:
        return orphans.ended_by_itself(store, attempt)
    if specs.exists(store) and run_status.last_life_event(store).get("event") == "ended":
        return True
    # As far as this machine can see: killed, and nobody was left to write that down.
    here = os.uname().nodename
    pids = [int(event.get("pid", 0)) for event in _events(store, attempt, "opened") if event.get("host") == here]
    return bool(pids) and not any(processes.alive(pid) for pid in [*pids, int(supervisor.get("pid", 0))])


def _events(store: Store, attempt: int, kind: str) -> list[Event]:
    """Return the events of a kind that process 0 of an attempt has written."""
    return [event for event in writer_events(store, attempt, "0") if event["event"] == kind]


def _committed(store: Store) -> int:
    """Return the newest committed step, on the URL where there is one; -1 if there is none."""
    return max(commits.steps(store) if store.remote is None else remote_steps.steps(store.remote), default=-1)


def _newest(committed: int) -> str:
    return f"its newest committed step is {committed}" if committed >= 0 else "it has committed nothing yet"


def _nap(store: Store) -> None:
    time.sleep(_POLL_S if store.remote is None else _POLL_REMOTE_S)
    with contextlib.suppress(JobkitError):  # a bucket that does not answer just now
        refresh(store)

"""What an attempt may leave behind when its supervisor was killed: processes that still run, an outcome not written."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jobkit import contract, decode, names
from jobkit.contract import Exit, Outcome
from jobkit.errors import ConfigError, DamagedError, JobkitError
from jobkit.rundir import commits, mirror, remote_steps
from jobkit.rundir.files import remove_tree
from jobkit.rundir.ledger import Event, attempt_events, last_word, read_json, writer_events
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from jobkit.supervise.heartbeat import SHARED, belongs, read_beat

NOTICE_S = 1.0
"""A program whose supervisor died notices by itself; only after this long it is told by SIGTERM."""

_ABORTED = 128 + signal.SIGABRT
_ENOUGH = 100
"""So many of the newest attempts tell what is committed on an object store; who looks often reads no thousands."""


def processes_of(store: Store) -> list[int]:
    """Return the live supervisors, programs and their children of a run, wherever in the family tree they are now."""
    return list(environments_of(store))


def environments_of(store: Store) -> dict[int, dict[str, str]]:
    """Return the same, each with the environment that it was started with."""
    marks = (contract.ENV_ATTEMPT, contract.ENV_SUPERVISOR, contract.ENV_RUNNER)
    # A person's shell may have JOBKIT_RUN exported; what we started has more than that.
    found = processes.with_environment(contract.ENV_RUN, store.url)
    found.pop(os.getpid(), None)
    return {pid: environ for pid, environ in found.items() if not environ.keys().isdisjoint(marks)}


class Clearing:
    """End a set of processes in good order: let them notice, then SIGTERM, then SIGKILL.

    Args:
        grace_s: Seconds from the start until SIGKILL.
        notice_s: Seconds from the start until SIGTERM.
    """

    def __init__(self, *, grace_s: float, notice_s: float = NOTICE_S) -> None:
        self._start = time.monotonic()
        self._grace_s, self._notice_s = grace_s, notice_s
        self._asked: set[int] = set()

    def step(self, left: Iterable[int]) -> None:
        """Do what is due now to those that are left."""
        alive = set(left)
        passed = time.monotonic() - self._start
        if passed >= max(self._grace_s, self._notice_s):
            for pid in alive:
                processes.send(pid, signal.SIGKILL)
        elif passed >= self._notice_s:
            # The topmost only: a program's worker processes must live while it saves.
            below = {child for pid in alive for child in processes.descendants(pid)}
            for pid in alive - below - self._asked:
                self._asked.add(pid)
                processes.send(pid, signal.SIGTERM)


def clear(store: Store, *, grace_s: float, tick: Callable[[], Iterable[int]] | None = None) -> None:
    """Wait until no process of a run is left, ending them in good order.

    Args:
        store: The run.
        grace_s: Seconds until SIGKILL.
        tick: Called between looks; returns further processes to end (orphans that hide their environment).
    """
    clearing = Clearing(grace_s=grace_s)
    while True:
        more = tick() if tick else ()
        left = [pid for pid in {*processes_of(store), *more} if processes.alive(pid)]
        if not left:
            return
        clearing.step(left)
        time.sleep(0.05)


def committed_step(store: Store) -> int:
    """Return the newest committed step, -1 if there is none; on an object store also those not in this home."""
    newest = max(commits.steps(store), default=-1)
    if store.remote is not None:
        for count, attempt in enumerate(reversed(store.numbers(contract.ATTEMPTS))):
            if newest >= 0 and count >= _ENOUGH:
                break
            newest = max(newest, (read_outcome(store, attempt) or {}).get("committed_step", -1))
    return newest


def _uploaded_step(store: Store) -> int:
    """Return the newest step that is committed on the run's URL, -1 where there is none, or none is to be learned."""
    with contextlib.suppress(JobkitError):
        return max(remote_steps.steps(store.remote), default=-1) if store.remote is not None else -1
    return -1


def last_step(store: Store, attempt: int) -> int:
    """Return the completed steps that an attempt's ledger shows, -1 if it shows none."""
    steps = [event["step"] for event in attempt_events(store, attempt) if isinstance(event.get("step"), int)]
    return max(steps, default=-1)


def program_pids(store: Store, attempt: int) -> list[int]:
    """Return the process ids of an attempt's programs, as far as they were started."""
    started = [event.get("pid") for event in attempt_events(store, attempt) if event["event"] == "started"]
    return [pid for pid in started if isinstance(pid, int)]


def read_outcome(store: Store, attempt: int) -> dict[str, Any] | None:
    """Read how an attempt ended, None if that is not written, or damaged.

    Raises:
        JobkitError: If the storage does not answer.
    """
    return _read(store, attempt, contract.OUTCOME)


def _read(store: Store, attempt: int, name: str) -> dict[str, Any] | None:
    try:
        outcome = read_json(store, f"{contract.attempt_dir(attempt)}/{name}")
        return None if outcome is None else decode.fields(outcome)
    except DamagedError:
        return None


def of_all_processes(store: Store, attempt: int) -> dict[str, Any] | None:
    """Put together how each of several processes of an attempt ended; None if not all supervisors wrote it.

    The first that ended badly is what became of the attempt: the others followed. Of those that made no progress it is
    the one that is behind: the others waited for it.
    """
    outcomes = []
    for name in store.names(contract.attempt_dir(attempt)):
        if name.startswith("process-"):
            with contextlib.suppress(JobkitError):
                one = _read(store, attempt, name) or {}
                if one.keys() >= {"exit_code", "processes", "process", "node", "reason", "step"}:
                    outcomes.append(one)
    outcomes.sort(key=lambda one: one.get("ended", 0))
    # Process 0 commits; another one that ended before may not have seen it.
    newest = {"committed_step": max((one.get("committed_step", -1) for one in outcomes), default=-1)}
    preempted = [one for one in outcomes if one["exit_code"] == Exit.PREEMPTED]
    # JAX aborts who still begins when another one has left on notice.
    bad = [
        one
        for one in outcomes
        if one["exit_code"] not in (Exit.DONE, Exit.PREEMPTED)
        and not (preempted and one["exit_code"] == _ABORTED and one.get("notice"))
    ]
    if not bad:
        whole = bool(outcomes) and len(outcomes) >= outcomes[0]["processes"]
        return [*preempted, *outcomes][0] | newest if whole else None
    # What is wrong with the program itself no other process has caused, though it may be written down later.
    first = [*(one for one in bad if one["exit_code"] == Exit.CONFIG), *bad][0]
    if stalled := [one for one in bad if one["exit_code"] == Exit.STALLED]:
        first = min(stalled, key=lambda one: (one["step"], one.get("silent_since", 0)))
    return first | newest | {"reason": f"process {first['process']} on {first['node']}: {first['reason']}"}


def supervisor_of(store: Store, attempt: int) -> dict[str, Any]:
    """Return what an attempt's supervisor said of itself when it began; empty if it has not, or that is damaged."""
    with contextlib.suppress(JobkitError):
        return read_json(store, f"{contract.attempt_dir(attempt)}/supervisor.json") or {}
    return {}


def heartbeat_directory(store: Store, attempt: int) -> Path | None:
    """Return the node-local directory that an attempt's supervisor shares with its program, None if there is none."""
    directory = Path(str(supervisor_of(store, attempt).get("heartbeat", "")))
    return directory if belongs(directory, store.path, attempt) else None


def write_outcome(
    store: Store,
    attempt: int,
    *,
    program_code: int | None,
    reason: str,
    preempted: bool = False,
    ended: float | None = None,
) -> None:
    """Write the outcome that a killed supervisor did not write; one that is there stays.

    Args:
        store: The run.
        attempt: Number of the attempt.
        program_code: Exit code of the program if it is known, 128+n for signal n.
        reason: What happened to the supervisor, and to the program.
        preempted: Whether a scheduler ended the attempt to start it again: nobody's failure.
        ended: When it ended, epoch seconds; by default when it gave its last sign of life.
    """
    name = f"{contract.attempt_dir(attempt)}/{contract.OUTCOME}"
    with contextlib.suppress(JobkitError):
        mirror.fetch_outcomes(store, attempt)
    together = of_all_processes(store, attempt)
    if together is not None and not (preempted and together["exit_code"] not in (Exit.DONE, Exit.PREEMPTED)):
        created = _create(store, name, together)
        if created and together["exit_code"] not in (Exit.DONE, Exit.PREEMPTED):
            # What process 0 printed itself tells little of which one ended the attempt: this is its log's last line.
            path = store.file(contract.log_file(attempt))
            with contextlib.suppress(OSError), open(path, "ab", buffering=0, opener=names.opener) as log:
                log.write(f"jobkit: {together['reason']}\n".encode())
        return
    link, made = heartbeat_directory(store, attempt), store.stat(contract.attempt_dir(attempt))
    events = attempt_events(store, attempt)
    if program_code is not None:
        program_code = _inside(events, program_code)
    code = int(Exit.PREEMPTED) if preempted else 137 if program_code is None else program_code
    started = events[0]["t"] if events else made.st_mtime if made else time.time()
    value = {
        "attempt": attempt,
        "exit_code": code,
        "outcome": Outcome.KILLED if program_code is None and not preempted else contract.outcome_of(code),
        "reason": reason,
        "step": max(last_step(store, attempt), read_beat(link).step if link else -1),
        "committed_step": max(committed_step(store), _uploaded_step(store)),
        "started": started,
        "ended": max(started, _last_sign(store, attempt, events, link)) if ended is None else ended,
        "notice": None,
    }
    _create(store, name, value)
    if link is not None:
        remove_tree(link)  # the supervisor had no time to


def _create(store: Store, name: str, outcome: dict[str, Any]) -> bool:
    """Create an outcome, on the URL too: nobody else uploads what is written for an attempt that is gone."""
    created = store.create(name, _json(outcome))
    if created and store.remote is not None:
        with contextlib.suppress(JobkitError):
            store.remote.create(name, _json(outcome).encode())
    return created


def _last_sign(store: Store, attempt: int, events: Sequence[Event], link: Path | None) -> float:
    """Return when an attempt was last seen to live, epoch seconds: nobody runs it while its machine is off, or its job
    waits to be started again.

    Args:
        store: The run.
        attempt: Number of the attempt.
        events: Of the attempt.
        link: Its supervisor's directory, where that is left.
    """
    signs = [float(event["t"]) for event in events]
    if store.remote is None:  # files of a home are as old as their download
        place = contract.attempt_dir(attempt)
        signs += [info.st_mtime for name in store.names(place) if (info := store.stat(f"{place}/{name}")) is not None]
    # What lies elsewhere may be of before the machine was switched on.
    beat = read_beat(link) if link is not None and link.is_relative_to(SHARED) else None
    if beat is not None and beat.at_s > 0:
        # A machine that has slept since is taken to have slept after it.
        signs.append(time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - beat.at_s))
    return min(time.time(), max(signs, default=0.0))


def _inside(events: Sequence[Event], code: int) -> int | None:
    """Return the exit code of a run inside a command that has ended, None if it was killed.

    In `sh -c 'python train.py; echo done'` the shell exits 0 whatever became of the training.

    Args:
        events: Of the attempt.
        code: The command's own.
    """
    word = last_word(events)
    if word == "stopped":
        return int(Exit.PREEMPTED)
    opened = any(event["event"] == "opened" for event in events)
    return None if code == 0 and opened and word != "finished" else code


def _json(outcome: dict[str, Any]) -> str:
    return json.dumps(outcome, indent=2) + "\n"


def close_attempts(store: Store, reason: str, *, preempted: bool = False) -> None:
    """Write an outcome for every attempt that has none, as of its last sign of life; no process of it may be left."""
    for attempt in store.numbers(contract.ATTEMPTS):
        if not store.exists(f"{contract.attempt_dir(attempt)}/{contract.OUTCOME}"):
            write_outcome(store, attempt, program_code=None, reason=reason, preempted=preempted)


def ended_by_itself(store: Store, attempt: int) -> bool:
    """Tell whether an attempt without a supervisor has ended, as far as this machine can see."""
    events = writer_events(store, attempt, "0")
    if last_word(events):
        return True  # nobody but the program itself could write down more
    here = os.uname().nodename
    pids = [int(event.get("pid", 0)) for event in events if event["event"] == "opened" and event.get("host") == here]
    return bool(pids) and not any(map(processes.alive, pids))


def opened_by(store: Store) -> int:
    """Return the process on this machine that has a run open which was started by hand; 0 if none is seen.

    It may be between two loops, or behind its last one, and have said that it is through.
    """
    here = os.uname().nodename
    for attempt in store.numbers(contract.ATTEMPTS)[-1:]:
        ledger = store.stat(contract.events_file(attempt, 0))
        for event in writer_events(store, attempt, "0"):
            pid = event.get("pid")
            if event["event"] == "opened" and event.get("host") == here and isinstance(pid, int) and ledger is not None:
                return pid if _has_open(pid, ledger) else 0
    return 0


def _has_open(pid: int, file: os.stat_result) -> bool:
    """Tell whether a process has a file open; one of somebody else's, or on a system that cannot tell, if it lives."""
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError as error:
        return (isinstance(error, PermissionError) or not os.path.isdir("/proc/self/fd")) and processes.alive(pid)
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{descriptor}"), file):
                return True
    return False


_CODES = {"finished": Exit.DONE, "stopped": Exit.PREEMPTED, "raised": Exit.FAILED}


def close_by_hand(store: Store) -> float | None:
    """Write how the attempts ended that a person started by hand; return when the last one did."""
    last: float | None = None
    for attempt in store.numbers(contract.ATTEMPTS):
        events = attempt_events(store, attempt)
        last = max([*([] if last is None else [last]), *(float(event["t"]) for event in events)], default=None)
        if read_outcome(store, attempt) is None:
            code = _CODES.get(last_word(writer_events(store, attempt, "0")))
            write_outcome(store, attempt, program_code=code, reason="it was started by hand", ended=last)
    return last


COPIED = "from"
"""Reason of a step that was copied out of another run."""


def remove_copies(store: Store) -> None:
    """Remove the step that a run was to begin with whose submit was killed, or has failed, before there was a run."""
    if store.exists(contract.RUN_JSON) or store.numbers(contract.ATTEMPTS):
        return
    for step in commits.steps(store):
        with contextlib.suppress(DamagedError):
            if commits.read(store, step).reason == COPIED:
                commits.remove(store, step)
    if store.remote is None or store.remote.find(contract.RUN_JSON):
        return
    for step in remote_steps.steps(store.remote):
        with contextlib.suppress(DamagedError):
            if remote_steps.read(store.remote, step).reason == COPIED:
                remote_steps.remove(store.remote, step)


@contextlib.contextmanager
def no_copies(store: Store) -> Iterator[None]:
    """Remove such a step that is left over; on an error inside, one that was copied meanwhile too."""
    remove_copies(store)
    try:
        yield
    except BaseException:
        with contextlib.suppress(JobkitError):
            remove_copies(store)
        raise


def check_copy(store: Store, step: int) -> None:
    """Refuse a new run whose beginning another machine's submit to the same URL has taken away as left over.

    Raises:
        ConfigError: If it is not there.
    """
    if store.remote is not None and step not in remote_steps.steps(store.remote):
        raise ConfigError(f"another submit to {store.url} got in between: submit again")

"""What a run is doing and has done, read from its directory alone."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from jobkit import contract, mirror
from jobkit.contract import State
from jobkit.control import says_stop
from jobkit.errors import JobkitError
from jobkit.heartbeat import Beat, read_beat
from jobkit.ledger import Event, read_json
from jobkit.storage import Store
from jobkit.units import show_duration
from launch import leftovers
from launch import spec as specs
from launch.lock import held

_TAIL_BYTES = 1 << 16
"""How much of a long ledger is read for the newest metrics; a status must not cost more as a run grows."""


class Job(Protocol):
    """A scheduler's job."""

    @property
    def id(self) -> str:
        """Its name there; '' if it was never submitted."""

    @property
    def state(self) -> str:
        """The scheduler's word, UNKNOWN if it does not answer, GONE if it has forgotten the job."""

    @property
    def reason(self) -> str:
        """Why it waits, or why it has ended; may be empty."""

    @property
    def active(self) -> bool:
        """Whether it may still do something."""

    @property
    def pending(self) -> bool:
        """Whether it waits to be started, for the first time or again."""


class Ending(msgspec.Struct, frozen=True):
    """How one attempt ended."""

    attempt: int
    outcome: str
    reason: str
    step: int | None = None
    committed_step: int | None = None
    duration_s: float | None = None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A run at one moment; JSON has null where a number is not known.

    Args:
        state: One of `contract.State`.
        attempt: Number of the newest attempt.
        attempts: How many attempts there were.
        step: Completed steps; of the running attempt, or where the last one ended.
        committed_step: Newest committed step.
        phase: What the running program is doing.
        metrics: Newest logged values.
        reason: Why the run is in this state, one clause.
        submitted, started, updated: Times of the submit, the newest attempt, the newest sign of life (epoch, s).
        notices: Preemption notices: attempt, t, source.
        endings: How the attempts ended, oldest first.
        job: Number of the run's job, for a scheduler.
        set_aside: Checkpoints that were found damaged: attempt, t, step, reason.
        storage: What is wrong with the run's URL, '' while uploads get there.
        runner: 'alive', 'gone' (killed: nothing will happen until `jobkit resume`) or 'ended'.
        values: Of a point of a sweep: what each name is there.
        points: Of a sweep: the status of each point; its own state is running while a point runs, and over when all
            are: failed or cancelled if one is, else done.
    """

    run: str
    name: str
    backend: str
    state: State
    attempt: int | None = None
    attempts: int = 0
    step: int | None = None
    committed_step: int | None = None
    phase: str | None = None
    metrics: dict[str, float | None] = {}
    reason: str = ""
    command: tuple[str, ...] = ()
    submitted: float | None = None
    started: float | None = None
    updated: float | None = None
    notices: list[dict[str, Any]] = []
    endings: list[Ending] = []
    job: str | None = None
    set_aside: list[dict[str, Any]] = []
    storage: str = ""
    runner: str = "alive"
    values: dict[str, str] = {}
    points: list["Status"] = []

    @property
    def ended(self) -> bool:
        """Whether the run's end is written down."""
        return self.runner == "ended"


def to_json(value: object) -> str:
    """Return one JSON document; values that JSON cannot say (NaN, infinities) become null."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def status(store: Store, *, assume_held: bool | None = None, job: Job | None = None) -> Status:
    """Read a run's status.

    Args:
        store: The run.
        assume_held: Whether the run's lock counts as held; by default it is looked at.
        job: What a scheduler says of the run's job; None for a run of the local backend.

    Raises:
        JobkitError: If it is not a run, or run.json is damaged.
    """
    if job is not None:
        alive = job.active or job.state == "UNKNOWN"
    else:  # the lock first: a runner writes its end before it lets go
        alive = _lives(store) if assume_held is None else assume_held
    result = _status(store, alive, job)
    if result.runner != "gone" or assume_held is not None:
        return result
    # Its end may have been written between the two looks; or it was resumed.
    if store.remote is not None and not held(store):
        with contextlib.suppress(JobkitError):
            mirror.refresh(store)
    return _status(store, alive if job is not None else _lives(store), job)


def _lives(store: Store) -> bool:
    """Tell whether a run has a runner, or is a point of a local sweep that will start it, for the first time or again.

    A point that is cancelled is not started.
    """
    if held(store):
        return True
    place = specs.sweep_of(store)
    return place is not None and held(place[0]) and not any(one.exists(contract.CANCEL) for one in (store, place[0]))


def of_sweep(store: Store, points: list[Status]) -> Status:
    """Put the status of a sweep together from those of its points.

    Args:
        store: The sweep.
        points: All of them, in order.
    """
    spec, (backend, created) = specs.read(store), specs.read_backend(store)
    counts = {state: sum(point.state is state for point in points) for state in State}
    if counts[State.RUNNING]:
        state = State.RUNNING
    elif counts[State.QUEUED] or counts[State.REQUEUED]:
        state = State.REQUEUED if counts[State.REQUEUED] else State.QUEUED
    else:
        state = next((bad for bad in (State.FAILED, State.CANCELLED) if counts[bad]), State.DONE)
    reason = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    alive = any(point.runner == "alive" for point in points)
    gone = any(point.runner == "gone" for point in points)
    return Status(
        run=store.url,
        name=spec.name,
        backend=backend,
        state=state,
        attempts=sum(point.attempts for point in points),
        reason=f"{reason}; continue with: jobkit resume {store.url}" if gone and state.over else reason,
        command=spec.command,
        submitted=created,
        updated=max((point.updated for point in points if point.updated is not None), default=None),
        job=next((jobs_[-1] for jobs_ in [jobs(store, backend)] if jobs_), None),
        runner="alive" if alive else "gone" if gone else "ended",
        points=points,
    )


def _status(store: Store, alive: bool, job: Job | None = None) -> Status:
    spec = specs.read(store)
    backend, created = specs.read_backend(store)
    attempts = store.numbers(contract.ATTEMPTS)
    newest = attempts[-1] if attempts else None
    endings = [ending for attempt in attempts if (ending := _ending(store, attempt)) is not None]
    running = newest is not None and (not endings or endings[-1].attempt != newest)
    running = running and not (job is not None and job.pending)
    state, reason, runner = _state(store, alive, attempted=newest is not None, running=running, job=job)
    beat = _beat(store, newest) if running and newest is not None else None
    if beat is None and state is State.RUNNING and not reason:
        reason = "starting"
    events = _attempt_tail(store, newest) if newest is not None else []
    committed = leftovers.committed_step(store)
    return Status(
        run=store.url,
        name=spec.name,
        backend=backend,
        state=state,
        attempt=newest,
        attempts=len(attempts),
        step=_step(beat, endings, committed),
        committed_step=committed if committed >= 0 else None,
        phase=beat.phase.name.lower() if beat is not None else None,
        metrics=_metrics(store, attempts, events),
        reason=reason,
        command=spec.command,
        submitted=created,
        started=_first_time(store, newest),
        updated=_updated(store, newest),
        notices=[notice for attempt in attempts for notice in _told(store, attempt, "supervisor", "notice")],
        set_aside=[event for attempt in attempts for event in _told(store, attempt, 0, "set_aside")],
        endings=endings,
        job=job.id if job is not None else None,
        storage=_outage(store, newest) if newest is not None and store.remote is not None else "",
        runner=runner,
        values=spec.values,
    )


def _state(store: Store, alive: bool, *, attempted: bool, running: bool, job: Job | None) -> tuple[State, str, str]:
    """Return (state, reason, runner)."""
    last = last_life_event(store)
    cancelled = _cancelled(store) is not None
    if last.get("event") == "ended":
        state, reason = _known_state(last.get("state")), str(last.get("reason", ""))
        if cancelled and state is State.FAILED:
            return State.CANCELLED, cancel_reason(store), "ended"
        return state, reason, "ended"
    if alive:
        stopping = "a cancel was asked for; stopping" if cancelled else ""
        if job is not None and not running and (job.pending or not attempted):
            waits = f"job {job.id} is {job.state.lower()}" + (f" ({job.reason})" if job.reason else "")
            return State.REQUEUED if attempted else State.QUEUED, stopping or waits, "alive"
        if running:
            return State.RUNNING, stopping, "alive"
        if attempted and last.get("event") != "decision":
            return State.RUNNING, stopping or "an attempt has ended; what comes next is being decided", "alive"
        if attempted:
            return State.REQUEUED, stopping or str(last.get("reason", "")), "alive"
        return State.QUEUED, stopping, "alive"
    if cancelled:
        return State.CANCELLED, cancel_reason(store), "gone"
    if job is not None and job.state == "CANCELLED":
        by = f" {job.reason}" if job.reason.startswith("by ") else ""
        return State.CANCELLED, f"job {job.id} was cancelled{by}", "gone"
    if job is None:
        gone = "the local runner is gone"
    elif job.id:
        told = f": {job.reason}" if job.reason else " and nothing has started the next"
        gone = f"job {job.id} has ended ({job.state.lower()}){told}"
        if not attempted and store.exists("slurm"):
            gone += f" (its output: {store.file('slurm')})"
    else:
        gone = "its job was never submitted"
    return State.FAILED, f"{gone}; continue with: jobkit resume {store.url}", "gone"


def _known_state(value: object) -> State:
    return State(str(value)) if value in list(State) else State.FAILED


def events(store: Store) -> list[Event]:
    """Return the launching side's ledger, in the order written."""
    return list(_lines(store.file(contract.EVENTS)))


def jobs(store: Store, backend: str) -> list[str]:
    """List a run's jobs of one scheduler that are in its ledger, oldest first."""
    told = (event for event in events(store) if event["event"] == "job" and "id" in event)
    return [str(event["id"]) for event in told if event.get("backend", "slurm") == backend]


def last_life_event(store: Store) -> Event:
    """Return the newest of submitted, resumed, decision, ended; empty if there is none."""
    for event in reversed(list(_lines(store.file(contract.EVENTS)))):
        if event["event"] in ("submitted", "resumed", "decision", "ended"):
            return event
    return {}


def _cancelled(store: Store) -> Store | None:
    """Return where a run's cancel is: with its sweep, for a point that has not started; None if there is none."""
    place = None if specs.exists(store) else specs.sweep_of(store)
    return next((one for one in (store, *(place[:1] if place else ())) if one.exists(contract.CANCEL)), None)


def cancel_reason(store: Store) -> str:
    """Say who cancelled or stopped a run."""
    try:
        return says_stop(read_json(_cancelled(store) or store, contract.CANCEL) or {})
    except JobkitError:
        return "cancelled"


def _lines(path: Path, *, tail_bytes: int | None = None) -> Iterator[Event]:
    """Yield the events of one ledger file, in the order written, torn lines left out."""
    try:
        with path.open("rb") as file:
            if tail_bytes is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - tail_bytes))
            content = file.read()
    except OSError:
        return
    for line in content.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("t"), int | float) and "event" in event:
            yield event


def _attempt_tail(store: Store, attempt: int) -> list[Event]:
    return list(_lines(store.file(contract.events_file(attempt, 0)), tail_bytes=_TAIL_BYTES))


def _metrics(store: Store, attempts: list[int], newest: list[Event]) -> dict[str, float | None]:
    """Return the newest logged values; of an earlier attempt while this one has none."""
    events = newest
    for attempt in reversed(attempts):
        values: dict[str, float | None] = {}
        for event in events if attempt == attempts[-1] else _attempt_tail(store, attempt):
            if event["event"] == "metrics" and isinstance(event.get("values"), dict):
                values |= {name: _finite(value) for name, value in event["values"].items()}
        if values:
            return values
    return {}


def _finite(value: object) -> float | None:
    if isinstance(value, int | float) and abs(value) < float("inf"):
        return float(value)
    return None


def _ending(store: Store, attempt: int) -> Ending | None:
    outcome = leftovers.read_outcome(store, attempt)
    if outcome is None:
        return None
    started, ended = outcome.get("started"), outcome.get("ended")
    timed = isinstance(started, int | float) and isinstance(ended, int | float)
    return Ending(
        attempt,
        str(outcome.get("outcome", "")),
        str(outcome.get("reason", "")),
        _count(outcome.get("step")),
        _count(outcome.get("committed_step")),
        ended - started if timed else None,  # type: ignore[operator]
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _beat(store: Store, attempt: int) -> Beat | None:
    """Return the live heartbeat of an attempt, None if there is none."""
    link = leftovers.heartbeat_directory(store, attempt)
    beat = read_beat(link) if link is not None else Beat()
    return beat if beat.at_s > 0 else None


def _step(beat: Beat | None, endings: list[Ending], committed: int) -> int | None:
    if beat is not None and beat.step >= 0:
        return beat.step
    known = endings[-1].step if endings else None
    return known if known is not None else _count(committed)


def _told(store: Store, attempt: int, writer: int | str, name: str) -> list[dict[str, Any]]:
    """Return the events of one kind that one writer of an attempt wrote down."""
    found = (event for event in _lines(store.file(contract.events_file(attempt, writer))) if event["event"] == name)
    wanted = ("t", "source", "step", "reason")
    return [{"attempt": attempt} | {key: event[key] for key in wanted if key in event} for event in found]


def _outage(store: Store, attempt: int) -> str:
    """Say since when, and why, nothing reaches the run's URL; '' if the newest upload did."""
    last: Event | None = None
    for writer in ("supervisor", 0):
        for event in _lines(store.file(contract.events_file(attempt, writer)), tail_bytes=_TAIL_BYTES):
            if event["event"] in ("upload_failed", "upload_back", "uploaded"):
                last = event
    if last is None or last["event"] != "upload_failed":
        return ""
    ago = show_duration(age(float(last["t"])) or 0.0)
    return f"uploads fail for {ago}, saves wait in {store.path}: {last.get('reason', '')}"


def _first_time(store: Store, attempt: int | None) -> float | None:
    if attempt is None:
        return None
    events = _lines(store.file(contract.events_file(attempt, "supervisor")))
    return next((float(event["t"]) for event in events), None)


def _updated(store: Store, attempt: int | None) -> float | None:
    """Return when a file of the run last changed that its life writes to."""
    names = [contract.EVENTS]
    if attempt is not None:
        names += [contract.events_file(attempt, 0), contract.events_file(attempt, "supervisor")]
        names += [contract.log_file(attempt), f"{contract.attempt_dir(attempt)}/{contract.OUTCOME}"]
    times = []
    for name in names:
        try:
            times.append(store.file(name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)


def age(moment: float | None) -> float | None:
    """Return how many seconds ago a moment was."""
    return None if moment is None else max(0.0, time.time() - moment)


def find_runs(directory: Path, *, depth: int = 3) -> list[Path]:
    """Return the run directories below a directory, oldest first."""
    found: list[tuple[float, Path]] = []
    _search(directory, depth, found)
    return [path for _, path in sorted(found)]


def _search(directory: Path, depth: int, found: list[tuple[float, Path]]) -> None:
    run = directory / contract.RUN_JSON
    try:
        found.append((run.stat().st_mtime, directory))
        return
    except OSError:
        pass
    if depth == 0:
        return
    try:
        entries = [entry.path for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for entry in sorted(entries):
        _search(Path(entry), depth - 1, found)

"""What a run is doing and has done, read from its directory alone."""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from jobkit import contract, decode
from jobkit.contract import State
from jobkit.errors import JobkitError
from jobkit.rundir import mirror
from jobkit.rundir.control import says_stop
from jobkit.rundir.ledger import Event, read_json
from jobkit.rundir.store import Store
from jobkit.supervise.heartbeat import Beat, Phase, read_beat
from jobkit.units import show_duration
from launch.lifecycle import lease, orphans
from launch.lifecycle.history import Pace, count_of, number_of, state_of
from launch.lifecycle.history import pace as pace_in
from launch.lifecycle.lease import Holder
from launch.lifecycle.lock import held
from launch.lifecycle.troubles import Trouble, standing, unsaved
from launch.spec import jobspec as specs

TAIL_BYTES = 1 << 16
"""How much of a long ledger is read for what is newest; a status must not cost more as a run grows."""
_RECENT = 100
"""Of so many of the newest attempts a status tells the endings and notices, for the same reason."""


class Job(msgspec.Struct, frozen=True):
    """A job as its scheduler shows it.

    Args:
        id: Its name there; '' if it was never submitted. A task of a SLURM array has `_n` behind the array's.
        state: The scheduler's word, UNKNOWN if it does not answer, GONE if it has forgotten the job.
        reason: Why it waits, or why it has ended; may be empty.
        active: Whether it may still do something.
        pending: Whether it waits to be started, for the first time or again.
        comment: What it was submitted with; of our SLURM jobs the run's URL.
    """

    id: str
    state: str
    reason: str = ""
    active: bool = False
    pending: bool = False
    comment: str = ""


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
        run, name, backend, command: As they were submitted.
        state: 'queued', 'running', 'requeued', 'done', 'failed' or 'cancelled'.
        attempt, attempts: Number of the newest attempt; how many there were.
        step: Completed steps; of the running attempt, or where the last one ended.
        committed_step: Newest committed step.
        phase: What the running program is doing.
        metrics: Newest logged values; null where a value is not finite.
        reason: Why the run is in this state, one clause.
        submitted, started, updated: Times of the submit, the newest attempt, the newest sign of life (epoch, s); of a
            run that was started by hand the first is when its first attempt began.
        total_steps: Steps at which the loop that runs, or ran last, ends; null for a loop of the program's own.
        stepped: When the newest completed step was, as far as it is known (epoch, s).
        left_s: Seconds until then, at the pace of this attempt so far.
        elapsed_s: Seconds from the submit until the end, or now.
        node, partition: Where the newest attempt runs, as far as it is known.
        notices: Preemption notices of the newest 100 attempts: attempt, t, source.
        endings: How the newest 100 attempts ended, oldest first.
        job: Number of the run's job, for a scheduler.
        set_aside: Checkpoints that the newest 100 attempts found damaged: attempt, t, step, reason.
        storage: What is wrong with the run's URL, '' while uploads get there.
        troubles: What else is wrong while it runs.
        runner: 'alive', 'gone' (killed: nothing will happen until `jobkit resume`) or 'ended'.
        host: The other machine whose local runner has the run; '' if it is this one, or a scheduler has it.
        sign_s: How many seconds ago that runner's last sign of life was, by the clock of the storage.
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
    total_steps: int | None = None
    stepped: float | None = None
    left_s: float | None = None
    elapsed_s: float | None = None
    node: str = ""
    partition: str = ""
    notices: list[dict[str, Any]] = []
    endings: list[Ending] = []
    job: str | None = None
    set_aside: list[dict[str, Any]] = []
    storage: str = ""
    troubles: list[Trouble] = []
    runner: str = "alive"
    host: str = ""
    sign_s: float | None = None
    values: dict[str, str] = {}
    points: list["Status"] = []

    @property
    def ended(self) -> bool:
        """Whether the run's end is written down."""
        return self.runner == "ended"

    @property
    def place(self) -> str:
        """Which other machine runs it, as the end of a sentence: ' on HOST (last sign 12 s ago)'; '' if none does."""
        return f" on {lease.shown(self.host, self.sign_s)}" if self.host else ""


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
    result = _status(store, *_alive(store, job, assume_held), job)
    if result.runner != "gone" or assume_held is not None:
        return result
    # Its end may have been written between the two looks; or it was resumed.
    if store.remote is not None and not held(store):
        with contextlib.suppress(JobkitError):
            mirror.refresh(store)
    return _status(store, *_alive(store, job, assume_held), job)


def _alive(store: Store, job: Job | None, assume_held: bool | None) -> tuple[bool, Holder | None]:
    """Tell whether a run goes on by itself, and which runner of another machine has it if one does.

    The lock is looked at before the ledger is: a runner writes its end before it lets go.
    """
    if job is not None:
        return job.active or job.state == "UNKNOWN", None
    if assume_held is not None:
        return assume_held, None
    if _lives(store):
        return True, None
    away = None if has_ended(store) or not specs.exists(store) else lease.elsewhere(store)
    return away is not None, away


def _lives(store: Store) -> bool:
    """Tell whether a run has a runner, or is a point of a local sweep that will start it, for the first time or again.

    A point that is cancelled is not started.
    """
    if held(store):
        return True
    place = specs.sweep_of(store)
    return place is not None and held(place[0]) and not any(one.exists(contract.CANCEL) for one in (store, place[0]))


def _status(store: Store, alive: bool, away: Holder | None, job: Job | None) -> Status:
    file = specs.read_file(store)
    attempts = store.numbers(contract.ATTEMPTS)
    newest = attempts[-1] if attempts else None
    recent = attempts[-_RECENT:]
    endings = [ending for attempt in recent if (ending := _ending(store, attempt)) is not None]
    running = newest is not None and (not endings or endings[-1].attempt != newest)
    running = running and not (job is not None and job.pending)
    state, reason, runner = _state(store, alive, newest=newest, running=running, job=job)
    committed = orphans.committed_step(store)  # before the heartbeat, which would be older than a commit else
    beat = _beat_of(store, newest) if running and newest is not None and away is None else None
    if beat is None and state is State.RUNNING and not reason and away is None:
        reason = "starting"
    if state is State.QUEUED and file.spec.after and _cancelled(store) is None:
        reason = ", ".join(filter(None, [reason, f"starts once {file.spec.after} has finished well"]))
    pace = pace_of(store, newest)
    step = _last_step(beat, endings, max(committed, pace.steps if running else -1))
    made = orphans.supervisor_of(store, newest) if running and newest is not None else {}
    return Status(
        run=store.url,
        name=file.spec.name,
        backend=file.backend,
        state=state,
        attempt=newest,
        attempts=len(attempts),
        step=step,
        committed_step=count_of(committed),
        phase=beat.phase.name.lower() if beat is not None else None,
        metrics=newest_metrics(store, recent),
        reason=reason,
        command=file.spec.command,
        submitted=file.created,
        started=_started_at(store, newest) if newest is not None else None,
        updated=last_change(store, newest),
        total_steps=pace.total,
        stepped=pace.at(time.monotonic() - beat.at_s if beat is not None and beat.step >= 0 else None),
        left_s=pace.left_s(step, time.time()) if beat is not None and beat.phase is not Phase.FINISHED else None,
        elapsed_s=elapsed_s(store, file.created),
        node=str(made.get("node", "")),
        partition=str(made.get("partition") or file.spec.sbatch.get("partition", "")),
        notices=noted(store, recent, "supervisor", "notice", last_bytes=TAIL_BYTES),
        # They are found before the first step.
        set_aside=noted(store, recent, 0, "set_aside", first_bytes=TAIL_BYTES),
        endings=endings,
        job=job.id if job is not None else None,
        troubles=_troubles(store, newest) if newest is not None and state is State.RUNNING else [],
        storage=_outage(store, newest) if newest is not None and store.remote is not None else "",
        runner=runner,
        host=away.host if away is not None and not state.over else "",
        sign_s=away.sign_s if away is not None and not state.over else None,
        values=file.spec.values,
    )


def _state(store: Store, alive: bool, *, newest: int | None, running: bool, job: Job | None) -> tuple[State, str, str]:
    """Return (state, reason, runner)."""
    last, attempted = last_life_event(store), newest is not None
    cancelled = _cancelled(store) is not None
    if last.get("event") == "ended":
        state, reason = state_of(last.get("state")), str(last.get("reason", ""))
        if cancelled and state is State.FAILED:
            return State.CANCELLED, cancel_reason(store), "ended"
        return state, reason, "ended"
    if alive:
        stopping = "a cancel was asked for; stopping" if cancelled else ""
        if job is not None and not running and (job.pending or not attempted):
            waits = f"job {job.id} is {job.state.lower()}" + f" ({job.reason})" * bool(job.reason)
            return State.REQUEUED if attempted else State.QUEUED, stopping or (waits if job.id else job.reason), "alive"
        if running or not attempted:
            return State.RUNNING if running else State.QUEUED, stopping, "alive"
        if last.get("event") == "resumed" and newest is not None and last.get("attempts") == newest + 1:
            return State.REQUEUED, stopping or "resumed", "alive"
        if last.get("event") != "decision" or last.get("attempt", newest) != newest:  # an earlier attempt's
            return State.RUNNING, stopping or "an attempt has ended; what comes next is being decided", "alive"
        if last.get("action") == "stop":
            return State.RUNNING, stopping or f"ending: {last.get('reason', '')}", "alive"
        return State.REQUEUED, stopping or str(last.get("reason", "")), "alive"
    if cancelled:
        return State.CANCELLED, cancel_reason(store), "gone"
    if job is not None and job.state == "CANCELLED":
        by = f" {job.reason}" if job.reason.startswith("by ") else ""
        return State.CANCELLED, f"job {job.id} was cancelled{by}", "gone"
    if job is None:
        gone = "the local runner is gone"
    elif job.id:
        detail = f": {job.reason}" if job.reason else " and nothing has started the next"
        gone = f"job {job.id} has ended ({job.state.lower()}){detail}"
        if not attempted and store.exists(contract.SLURM):
            gone += f" (its output: {store.file(contract.SLURM)})"
    else:
        gone = "its job was never submitted"
    return State.FAILED, f"{gone}; continue with: jobkit resume {store.url}", "gone"


def events(store: Store) -> list[Event]:
    """Return the launching side's ledger, in the order written."""
    return list(lines(store, contract.EVENTS))


def jobs(store: Store, backend: str) -> list[str]:
    """List a run's jobs of one scheduler that are in its ledger, oldest first."""
    entries = (event for event in events(store) if event["event"] == "job" and _JOB.fullmatch(str(event["id"] or "")))
    return [str(event["id"]) for event in entries if event.get("backend", "slurm") == backend]


_JOB = re.compile(r"\w[\w.:/-]{0,500}", re.ASCII)
"""A scheduler's name of a job; it becomes an argument of what asks for it."""


def last_life_event(store: Store) -> Event:
    """Return the newest of submitted, resumed, decision, ended; empty if there is none."""
    for some in ({"last_bytes": TAIL_BYTES}, {}):
        for event in reversed(list(lines(store, contract.EVENTS, **some))):
            if event["event"] in ("submitted", "resumed", "decision", "ended"):
                return event
    return {}


def has_ended(store: Store, state: State | None = None) -> bool:
    """Tell whether the end of a run is written down, in one state or any."""
    return (last := last_life_event(store)).get("event") == "ended" and state in (None, last.get("state"))


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


def lines(store: Store, name: str, **some: int) -> Iterator[Event]:
    """Yield the events of one ledger file, or of its `first_bytes` or `last_bytes`, in the order written."""
    try:
        content = store.read(name, **some)
    except FileNotFoundError:
        return
    for line in content.splitlines():
        if (event := decode.event(line)) is not None:
            yield event


def newest_metrics(store: Store, attempts: list[int]) -> dict[str, float | None]:
    """Return the newest logged values of some attempts: of an earlier one while the last has none."""
    for attempt in reversed(attempts):
        values: dict[str, float | None] = {}
        for event in lines(store, contract.events_file(attempt, 0), last_bytes=TAIL_BYTES):
            if event["event"] == "metrics":
                values |= {name: _finite(value) for name, value in event["values"].items()}
        if values:
            return values
    return {}


def _finite(value: object) -> float | None:
    if isinstance(value, int | float) and abs(value) < float("inf"):
        return float(value)
    return None


def _ending(store: Store, attempt: int) -> Ending | None:
    """Return how an attempt ended, None while that is not written."""
    outcome = orphans.read_outcome(store, attempt)
    if outcome is None:
        return None
    return Ending(
        attempt,
        outcome.get("outcome", ""),
        outcome.get("reason", ""),
        count_of(outcome.get("step")),
        count_of(outcome.get("committed_step")),
        outcome["ended"] - outcome["started"] if outcome.keys() >= {"started", "ended"} else None,
    )


def _beat_of(store: Store, attempt: int) -> Beat | None:
    """Return the live heartbeat of an attempt, None if there is none."""
    link = orphans.heartbeat_directory(store, attempt)
    beat = read_beat(link) if link is not None else Beat()
    return beat if beat.at_s > 0 else None


def _last_step(beat: Beat | None, endings: list[Ending], committed: int) -> int | None:
    """Return the completed steps: of the running attempt, or where the last one ended."""
    if beat is not None and beat.step >= 0:
        return beat.step
    known = endings[-1].step if endings else None
    # A program that was started by hand has no supervisor that writes down where it ended.
    return count_of(max(-1 if known is None else known, committed))


def noted(store: Store, attempts: list[int], writer: int | str, name: str, **some: int) -> list[dict[str, Any]]:
    """Return the events of one kind in the first or last bytes that one writer of each attempt wrote down."""
    wanted = ("t", "source", "step", "reason")
    return [
        {"attempt": attempt} | {key: event[key] for key in wanted if key in event}
        for attempt in attempts
        for event in lines(store, contract.events_file(attempt, writer), **some)
        if event["event"] == name
    ]


def pace_of(store: Store, attempt: int | None) -> Pace:
    """Read how far an attempt has come, from the ends of its ledger."""
    name = contract.events_file(0 if attempt is None else attempt, 0)
    return pace_in(list(lines(store, name, first_bytes=TAIL_BYTES)), list(lines(store, name, last_bytes=TAIL_BYTES)))


def elapsed_s(store: Store, since: float | None) -> float | None:
    """Return how long a run has gone on since a moment, until its end or now."""
    last = last_life_event(store)
    end = number_of(last["t"]) if last.get("event") == "ended" else time.time()
    return None if since is None or end is None else min(1e12, max(0.0, end - since))


def _troubles(store: Store, attempt: int) -> list[Trouble]:
    """Return what is wrong with an attempt that runs."""
    supervisor = lines(store, contract.events_file(attempt, "supervisor"), last_bytes=TAIL_BYTES)
    return [*standing(supervisor), *standing(filter(None, [unsaved(store, attempt)]))]


def _outage(store: Store, attempt: int) -> str:
    """Say since when, and why, nothing reaches the run's URL; '' if the newest upload did."""
    last: Event | None = None
    for writer in ("supervisor", 0):
        for event in lines(store, contract.events_file(attempt, writer), last_bytes=TAIL_BYTES):
            if event["event"] in ("upload_failed", "upload_back", "uploaded"):
                last = event
    if last is None or last["event"] != "upload_failed":
        return ""
    ago = show_duration(max(0.0, time.time() - last["t"]))
    return f"uploads fail for {ago}, saves wait in {store.path}: {last.get('reason', '')}"


def _started_at(store: Store, attempt: int) -> float | None:
    """Return when an attempt's supervisor began to write."""
    return next((float(event["t"]) for event in lines(store, contract.events_file(attempt, "supervisor"))), None)


def last_change(store: Store, attempt: int | None) -> float | None:
    """Return when a file of the run last changed that its life writes to."""
    names = [contract.EVENTS]
    if attempt is not None:
        names += [contract.events_file(attempt, 0), contract.events_file(attempt, "supervisor")]
        names += [contract.log_file(attempt), f"{contract.attempt_dir(attempt)}/{contract.OUTCOME}"]
    return max((info.st_mtime for name in names if (info := store.stat(name)) is not None), default=None)


def age(moment: float | None) -> float | None:
    """Return how many seconds ago a moment was."""
    return None if moment is None else max(0.0, time.time() - moment)

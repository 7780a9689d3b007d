"""Trackers: what `run.log` records also goes to TensorBoard, Weights & Biases or MLflow, as one run over all attempts.

A tracker follows the ledger, on a thread of its own: a value is in the ledger first, and is passed on from there. So a
tracker that is slow, unreachable or broken never holds training up, and gets later what it has missed, from a later
attempt if need be. A step that an interruption makes run twice is there once: TensorBoard is rewound; the others cannot
be, and keep the values that they have, which a training that resumes bit for bit computes again.

The adapters for the three are in adapters.py. Any object with the methods of `Tracker` will do as well.
"""

import contextlib
import importlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Protocol

from jobkit import contract, decode, names
from jobkit.errors import JobkitError, say
from jobkit.rundir import mirror
from jobkit.rundir.ledger import Event, life_events, read_json, read_lines
from jobkit.rundir.store import Store

_TICK_S = 1.0
"""How often the ledger is looked at; a tracker gets what came meanwhile in one piece."""
_RETRY_S = 30.0
_BATCH = 1000


@dataclass(frozen=True)
class Point:
    """What was logged at one moment.

    Args:
        step: The step in progress.
        at: Seconds since the epoch.
        values: By the names that `run.log` was given.
    """

    step: int
    at: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Opening:
    """What a tracker is told when an attempt begins.

    Args:
        store: The run directory; a tracker with files of its own keeps them below it.
        attempt: Number of the attempt.
        step: Where it goes on: what earlier attempts logged for this step and later ones is void.
        before: How the attempt before it ended, in a few words; '' for the first.
        known: What this tracker has remembered of the run.
        remember: Writes that down, durably; before anything is created elsewhere, so that it is found again.
    """

    store: Store
    attempt: int
    step: int
    before: str
    known: Mapping[str, str]
    remember: Callable[[dict[str, str]], None]

    @property
    def name(self) -> str:
        """A name for the run, for people."""
        return self.store.url.rstrip("/").rpartition("/")[2]


class Tracker(Protocol):
    """Where logged values go. All methods are called on one thread, in process 0; any of them may raise."""

    name: str

    def open(self, opening: Opening) -> Callable[[str], int]:
        """Begin the run there, or continue it.

        May be called again, after a failure, to begin anew.

        Returns:
            A function that tells for the name of a value the last step that the tracker has it for, -1 for none.
        """
        ...

    def send(self, points: Sequence[Point]) -> None:
        """Pass on what was logged, in rising order of steps; called with nothing, too, about once a second."""
        ...

    def close(self, ending: str) -> None:
        """End this attempt: 'done', 'preempted' (the run goes on) or 'failed'."""
        ...


class TrackerFeed:
    """The trackers of one attempt, each on its own thread.

    Args:
        store: The run directory.
        attempt: Number of the attempt.
        trackers: Which ones.
    """

    def __init__(self, store: Store, attempt: int, trackers: Sequence[Tracker]) -> None:
        self._store, self._attempt, self._trackers = store, attempt, trackers
        self._known_lock = threading.Lock()
        self._closing = threading.Event()
        self._ending = "failed"
        self._threads: list[threading.Thread] = []

    def start(self, step: int) -> None:
        """Begin to follow the attempt, which goes on at this step.

        Large packages are imported here, before any tracker's thread begins: until 3.11.8 CPython fails when two
        threads parse Python at a time, which importing some of them does (cpython issue 106905).
        """
        for tracker in self._trackers:
            with contextlib.suppress(Exception):  # it will be said when the tracker is opened
                for package in getattr(tracker, "packages", ()):
                    importlib.import_module(package)
        for tracker in self._trackers:
            name = f"jobkit-{tracker.name}"
            thread = threading.Thread(target=self._keep_feeding, args=(tracker, step), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self, ending: str, *, wait_s: float) -> None:
        """Pass the rest on and end; what a tracker has not taken after `wait_s` is left to the next attempt."""
        self._ending = ending
        self._closing.set()
        for thread in self._threads:
            thread.join(wait_s)

    def _keep_feeding(self, tracker: Tracker, step: int) -> None:
        for failures in count():
            last = self._closing.is_set()
            try:
                self._follow(tracker, step)
                return
            except (Exception, SystemExit) as error:  # whatever it is, it is not the training's
                if not failures:
                    say(f"{tracker.name} fails, training goes on: {type(error).__name__}: {str(error)[:300]}")
            if last:
                return
            self._closing.wait(_RETRY_S)

    def _follow(self, tracker: Tracker, step: int) -> None:
        with contextlib.suppress(JobkitError):  # an old ledger that cannot be had now
            mirror.fetch_ledgers(self._store, self._attempt)
        has = tracker.open(
            Opening(
                store=self._store,
                attempt=self._attempt,
                step=step,
                before=ending_of(self._store, self._attempt - 1),
                known=self._read_known().get(tracker.name, {}),
                remember=lambda known: self._remember(tracker.name, known),
            )
        )

        def send(points: Sequence[Point]) -> None:
            missing = [
                Point(point.step, point.at, values)
                for point in points
                if (values := {name: value for name, value in point.values.items() if point.step > has(name)})
            ]
            for begin in range(0, max(len(missing), 1), _BATCH):
                tracker.send(missing[begin : begin + _BATCH])

        send(list(logged_before(self._store, self._attempt, step)))
        tail = Tail(self._store.file(contract.events_file(self._attempt, 0)))
        closing = False
        while not closing:
            closing = self._closing.wait(_TICK_S)
            send(list(tail.read()))
        tracker.close(self._ending)

    def _read_known(self) -> dict[str, dict[str, str]]:
        remote = self._store.remote
        if remote is not None and not self._store.exists(contract.TRACKERS) and remote.find(contract.TRACKERS):
            self._store.write(contract.TRACKERS, remote.read(contract.TRACKERS))
        entries = read_json(self._store, contract.TRACKERS) or {}
        return {
            name: {key: text for key, text in known.items() if isinstance(text, str)}
            for name, known in entries.items()
            if isinstance(known, dict)
        }

    def _remember(self, name: str, known: dict[str, str]) -> None:
        with self._known_lock:
            content = json.dumps(self._read_known() | {name: known}, indent=1) + "\n"
            self._store.write(contract.TRACKERS, content)
            if self._store.remote is not None:
                self._store.remote.write(contract.TRACKERS, content.encode())


class Tail:
    """Reads what a ledger grows by."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> Iterator[Point]:
        """Yield what was logged since the last call; a line that is being written waits for the next."""
        with open(self._path, "rb", opener=names.opener) as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                if (event := decode.event(line)) is not None and (point := _point(event)) is not None:
                    yield point


def logged_before(store: Store, attempt: int, step: int) -> list[Point]:
    """Return what the attempts before this one logged, without what lies at or beyond the steps that were gone back to.

    Args:
        store: The run directory.
        attempt: The attempt.
        step: Where it goes on.
    """
    points: list[Point] = []

    def rewind(to: int) -> None:
        while points and points[-1].step >= to:
            points.pop()

    for earlier in takewhile(lambda number: number < attempt, store.numbers(contract.ATTEMPTS)):
        for event in read_lines(store, contract.events_file(earlier, 0)):
            if event["event"] in ("fresh", "restored") and isinstance(event.get("step", 0), int):
                rewind(event.get("step", 0))
            if (point := _point(event)) is not None:
                points.append(point)
    rewind(step)
    return points


def _point(event: Event) -> Point | None:
    """Return what an event says was logged, if it does."""
    match event:
        case {"event": "metrics", "step": int(step), "t": int() | float() as at, "values": dict(values)}:
            return Point(step, at, values)
    return None


def ending_of(store: Store, attempt: int) -> str:
    """Say in a few words how an attempt ended; '' if there was none."""
    if attempt < 0:
        return ""
    reason = "killed"
    for event in life_events(store, attempt):
        if event["event"] == "finished":
            return "finished"
        if event["event"] == "stopped":
            return f"{reason}, committed at step {event.get('step')}"
        if (field := {"exited": "reason", "raised": "error", "notice": "source"}.get(event["event"])) is not None:
            reason = str(event.get(field))
    return reason[:200]

"""The ledger: append-only events of a run, one JSON line each, written by every process of every attempt.

A line is one `write` to a file opened with O_APPEND, so that a SIGKILL tears at most the last line of one file;
the reader drops a torn line. The events, by who writes them:

    submitted, resumed, cancelled, stopped, decision, ended, job (id, backend), job_started,
    moved (source, target)                                  by the launching side, in events.jsonl
    started, notice (source, reason, deadline_s), stalled (phase, step, waited_s, budget_s, frame, stacks),
    put_off (deadline_s: a preemption on SLURM leaves longer), exited (longest_s: the longest without progress by
    phase)                                                  by the supervisor of an attempt
    metadata (source, kind, reason)                         by it: what a cloud says beside notices
    uploaded, upload_failed, upload_back, superseded        by whoever carries the run to its URL
    opened, fresh, restored, first_step, saved, scored (step, metrics: after its commit), skipped, save_failed,
    superseded, abandoned, set_aside, rehearsed, removed, interval, save_asked (id, by, step), notice, plan, stopped,
    finished, metrics, compiled, unsaved (it ended without one step of the run)
                                                            by the program
    probed, donated (step, leaves)                          by it, in a drill
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobkit import contract
from jobkit.errors import JobkitError
from jobkit.storage import Store, explain

Event = dict[str, Any]
"""One line: at least `t` (seconds since the epoch, of the writer's clock) and `event`."""


class Ledger:
    """Append events to one file. Safe to use from several threads.

    Args:
        path: The file; made with its directory when missing.
        clock: Seconds since the epoch.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise explain(error, f"cannot write {path}") from None
        self._path = path
        # A torn last line, of an earlier writer or of a disk that was full for a while, must not swallow the next one.
        self._torn = False
        if os.fstat(self._descriptor).st_size:
            with open(path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                self._torn = file.read() != b"\n"

    def append(self, event: str, *, durable: bool = False, **fields: Any) -> None:
        """Write one event.

        A ledger that cannot be written never stops a training: the failure is dropped here and shows itself where
        it matters, at the next commit to the same storage.

        Durability: after return the line survives a SIGKILL; with `durable` a power cut too.
        """
        self.append_all([{"t": self._clock(), "event": event, **fields}], durable=durable)

    def append_all(self, events: list[Event], *, durable: bool = False) -> None:
        """Write several events with one system call; they carry their own `t`."""
        if self._descriptor is None or not events:
            return
        lines = "".join(json.dumps(event, separators=(",", ":"), default=str) + "\n" for event in events).encode()
        if self._torn:
            lines = b"\n" + lines
        try:
            self._torn = os.write(self._descriptor, lines) < len(lines)
            if durable:
                os.fsync(self._descriptor)
        except OSError:
            pass

    def close(self) -> None:
        """Close the file; later appends are dropped."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def read_events(store: Store) -> list[Event]:
    """Read every event of a run, oldest first.

    Each event gains `attempt` (absent for the launching side's) and `writer` ('launcher', 'supervisor' or a process
    index as text).
    """
    events = [event | {"writer": "launcher"} for event in read_lines(store, contract.EVENTS)]
    for attempt in store.numbers(contract.ATTEMPTS):
        events += attempt_events(store, attempt)
    return sorted(events, key=lambda event: event["t"])


def attempt_events(store: Store, attempt: int) -> list[Event]:
    """Read every event of one attempt, oldest first."""
    events = []
    for name in store.names(contract.attempt_dir(attempt)):
        if name.startswith("events-") and name.endswith(".jsonl"):
            events += writer_events(store, attempt, name.removeprefix("events-").removesuffix(".jsonl"))
    return sorted(events, key=lambda event: event["t"])


def writer_events(store: Store, attempt: int, writer: str) -> list[Event]:
    """Read the events of one writer of one attempt, in the order written."""
    extra = {"attempt": attempt, "writer": writer}
    return [event | extra for event in read_lines(store, contract.events_file(attempt, writer))]


_METRICS = b'"event":"metrics"'


def life_events(store: Store, attempt: int, writers: tuple[int | str, ...] = (0, "supervisor")) -> list[Event]:
    """Read what happened to one attempt, oldest first, without its metrics, which may be millions of lines."""
    events = [
        event for writer in writers for event in read_lines(store, contract.events_file(attempt, writer), but=_METRICS)
    ]
    return sorted(events, key=lambda event: event["t"])


def read_lines(store: Store, name: str, *, but: bytes | None = None) -> list[Event]:
    """Read one ledger file in the order written, without lines that contain `but`.

    Torn lines are left out, and an absent file has none.
    """
    try:
        content = store.read(name)
    except FileNotFoundError:
        return []
    return _parsed(content, but)


def _parsed(content: bytes, but: bytes | None = None) -> list[Event]:
    events = []
    for line in content.splitlines():
        if but is not None and but in line:
            continue
        try:
            event = json.loads(line)
        except ValueError:
            continue  # torn by a SIGKILL or a full disk: normal input
        if isinstance(event, dict) and isinstance(event.get("t"), int | float) and "event" in event:
            events.append(event)
    return events


def tail_events(store: Store, name: str, event: str, nbytes: int = 1 << 20) -> list[Event]:
    """Read the newest events of one kind in one file, oldest first: what its last bytes hold; none without a file."""
    try:
        with open(store.file(name), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - nbytes))
            lines = [line for line in file.read().splitlines() if f'"{event}"'.encode() in line]
            return [found for found in _parsed(b"\n".join(lines)) if found["event"] == event]
    except OSError:
        return []


@dataclass
class Series:
    """What `run.log` recorded, as the finished history shows it.

    A step that an interruption made run twice counts once, with the value of the later attempt.
    """

    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """Metric name -> step -> value."""
    repeated: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    """Metric name -> step -> every value recorded for a step that ran more than once, oldest first."""


def read_metrics(store: Store) -> Series:
    """Read every logged metric of process 0, rewound at each resume: what lay beyond the restored step is gone."""
    series = Series()
    earlier: dict[str, dict[int, list[float]]] = {}  # what was logged for steps that a resume took back
    for attempt in store.numbers(contract.ATTEMPTS):
        logged: dict[str, dict[int, float]] = {}
        for event in read_lines(store, contract.events_file(attempt, 0)):
            step, values = event.get("step", 0), event.get("values")
            if not isinstance(step, int):
                continue
            if event["event"] in ("fresh", "restored"):
                for name, line in series.values.items():
                    for taken_back in [logged_at for logged_at in line if logged_at >= step]:
                        earlier.setdefault(name, {}).setdefault(taken_back, []).append(line.pop(taken_back))
            elif event["event"] == "metrics" and isinstance(values, Mapping):
                for name, value in values.items():
                    logged.setdefault(name, {})[step] = value
        for name, line in logged.items():
            known = series.values.setdefault(name, {})
            for step, value in line.items():
                before = [*earlier.get(name, {}).get(step, []), *([known[step]] if step in known else [])]
                if before:
                    series.repeated.setdefault(name, {})[step] = [*before, value]
                known[step] = value
    series.values = {name: line for name, line in series.values.items() if line}
    return series


def read_json(store: Store, name: str) -> dict[str, Any] | None:
    """Read one small JSON object of a run directory, None if it is absent.

    Raises:
        JobkitError: If it is there but is not a JSON object.
    """
    try:
        content = store.read(name)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise explain(error, f"cannot read {store.file(name)}") from None
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise JobkitError(f"{store.file(name)} is damaged: it is not a JSON object")
    return value

"""The ledger: append-only events of a run, one JSON line each, written by every process of every attempt.

A line is one `write` to a file opened with O_APPEND, so that a SIGKILL tears at most the last line of one file;
the reader drops a torn line. Every event, with who writes it, its fields and its meaning, stands in
docs/architecture.md; one that does not fails the build.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from jobkit import contract, decode, names
from jobkit.errors import DamagedError
from jobkit.rundir.store import Store, explain, in_words

Event = dict[str, Any]
"""One line: at least `t` (seconds since the epoch, of the writer's clock) and `event`."""


_MOST_PENDING_BYTES = 16 << 20
"""Lines that wait for a disk that is full or does not answer; of more than that the oldest go."""


class Ledger:
    """Append events to one file. Safe to use from several threads.

    Args:
        path: The file; made with its directory when missing.
        clock: Seconds since the epoch.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock, self.path = clock, path
        self._lock = threading.Lock()
        self._pending = bytearray()
        """Whole lines that are not in the file yet."""
        self._synced = True
        self._closed = False
        self._descriptor: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._open()
            # A torn last line, of an earlier writer or of a disk that was full for a while, must not swallow the next.
            self._torn = False
            if os.fstat(self._descriptor).st_size:
                with open(path, "rb", opener=names.opener) as file:
                    file.seek(-1, os.SEEK_END)
                    self._torn = file.read() != b"\n"
        except OSError as error:
            self.close()
            raise explain(error, f"cannot write {path}") from None

    def _open(self) -> int:
        return names.opener(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def append(self, event: str, *, durable: bool = False, **fields: Any) -> None:
        """Write one event.

        A ledger that cannot be written never stops a training: its lines wait for the next event or for `settle`, and
        the failure shows itself where it matters, at the next commit to the same storage.

        Durability: after return the line survives a SIGKILL, if the storage answers; with `durable` a power cut too.
        """
        self.append_all([{"t": self._clock(), "event": event, **fields}], durable=durable)

    def append_all(self, events: list[Event], *, durable: bool = False) -> None:
        """Write several events with one system call; they carry their own `t`."""
        if self._closed or not events:
            return
        lines = "".join(json.dumps(event, separators=(",", ":"), default=str) + "\n" for event in events).encode()
        with self._lock:
            self._pending += lines
            with contextlib.suppress(OSError):
                self._write_pending(durable)

    def flush(self) -> None:
        """Write what waits, durably.

        Raises:
            JobkitError: If it cannot be written.
        """
        with self._lock, in_words(f"cannot write {self.path}"):
            self._write_pending(True)

    def _write_pending(self, durable: bool) -> None:
        """Write the lines that are owed; one that was torn off is written again as a whole."""
        try:
            if self._descriptor is None:  # a handle that went stale stays so
                self._descriptor = self._open()
            while self._pending:
                head = b"\n" if self._torn else b""
                written = os.write(self._descriptor, head + self._pending) - len(head)
                whole = self._pending.rfind(b"\n", 0, written) + 1
                del self._pending[:whole]
                self._torn, self._synced = written > whole, False
            if durable and not self._synced:
                os.fsync(self._descriptor)
                self._synced = True
        except OSError:
            if len(self._pending) > _MOST_PENDING_BYTES:
                del self._pending[: self._pending.find(b"\n", len(self._pending) - _MOST_PENDING_BYTES) + 1]
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
            raise

    def close(self) -> None:
        """Write what waits, if that can be, and close the file; later appends are dropped."""
        with self._lock:
            if self._pending and not self._closed:
                with contextlib.suppress(OSError):
                    self._write_pending(False)
            self._closed = True
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


def last_word(events: Sequence[Event]) -> str:
    """Return how the program of an attempt came to its end by itself: 'stopped', 'finished' or 'raised'; '' if it has
    not, as far as its events tell, which are in the order written.
    """
    words = (event["event"] for event in reversed(events))
    word = next((word for word in words if word in ("stopped", "finished", "raised", "goes_on")), "")
    return "" if word == "goes_on" else word


_METRICS = b'"event":"metrics"'


def life_events(store: Store, attempt: int, writers: tuple[int | str, ...] = (0, "supervisor")) -> list[Event]:
    """Read what happened to one attempt, oldest first, without its metrics, which may be millions of lines."""
    events = [
        event for writer in writers for event in read_lines(store, contract.events_file(attempt, writer), but=_METRICS)
    ]
    return sorted(events, key=lambda event: event["t"])


def read_lines(store: Store, name: str, *, but: bytes | None = None, logged: int | None = None) -> list[Event]:
    """Read one ledger file in the order written; torn lines are left out, and an absent file has none.

    Args:
        store: The run.
        name: The file.
        but: Without lines that contain this.
        logged: Of logged values, of which there may be millions, so many lines at most, evenly, and the last one.
    """
    lines = (store.get(name) or b"").splitlines()
    if logged is not None:
        lines = _thinned(lines, logged)
    return _parsed(line for line in lines if but is None or but not in line)


def _thinned(lines: list[bytes], most: int) -> list[bytes]:
    logged = [index for index, line in enumerate(lines) if _METRICS in line]
    if len(logged) <= most:
        return lines
    kept = {*logged[:: -(-len(logged) // most)], logged[-1]}
    return [line for index, line in enumerate(lines) if index in kept or _METRICS not in line]


def _parsed(lines: Iterable[bytes]) -> list[Event]:
    """Read lines; one that a SIGKILL or a full disk has torn is normal input, and left out."""
    return [event for line in lines if (event := decode.event(line)) is not None]


def newest_event(store: Store, name: str, events: Collection[str]) -> Event:
    """Return the newest event of some kinds in one file, {} if there is none.

    It reads backwards, so that what it costs is how much was written since, not how long the file is.
    """
    wanted = [f'"event":"{event}"'.encode() for event in events]
    rest = b""
    with contextlib.suppress(OSError), open(store.file(name), "rb", opener=names.opener) as file:
        at = file.seek(0, os.SEEK_END)
        while at > 0:
            size = min(at, _BLOCK_BYTES)
            at = file.seek(at - size)
            first, newline, whole = (file.read(size) + rest).partition(b"\n")
            rest = first + newline
            if at == 0:
                whole = rest + whole
            for line in reversed(whole.splitlines()):
                if any(mark in line for mark in wanted) and (event := decode.event(line)) and event["event"] in events:
                    return event
    return {}


_BLOCK_BYTES = 1 << 18


def tail_events(store: Store, name: str, event: str, nbytes: int = 1 << 20) -> list[Event]:
    """Read the newest events of one kind in one file, oldest first: what its last bytes hold; none without a file."""
    mark, lines = f'"{event}"'.encode(), (store.get(name, last_bytes=nbytes) or b"").splitlines()
    return [entry for entry in _parsed(line for line in lines if mark in line) if entry["event"] == event]


@dataclass
class Series:
    """What `run.log` recorded, as the finished history shows it.

    A step that an interruption made run twice counts once, with the value of the later attempt.
    """

    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """Metric name -> step -> value."""
    repeated: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    """Metric name -> step -> every value recorded for a step that ran more than once, oldest first."""


def read_metrics(store: Store, *, only: Callable[[Collection[str]], Collection[str]] = lambda names: names) -> Series:
    """Read the logged metrics of process 0, rewound at each resume: what lay beyond the restored step is gone.

    Args:
        store: The run.
        only: Chooses among the names of the metrics that are known so far; the others are forgotten.
    """
    series = Series()
    earlier: dict[str, dict[int, list[float]]] = {}  # what was logged for steps that a resume took back
    for attempt in store.numbers(contract.ATTEMPTS):
        logged: dict[str, dict[int, float]] = {}
        for event in read_lines(store, contract.events_file(attempt, 0)):
            step, values = event.get("step", 0), event.get("values")
            if not isinstance(step, int):
                continue
            if event["event"] in ("fresh", "restored"):
                for name, line in series.values.items():  # whose steps rise
                    for taken_back in list(takewhile(step.__le__, reversed(line))):
                        earlier.setdefault(name, {}).setdefault(taken_back, []).append(line.pop(taken_back))
            elif event["event"] == "metrics" and isinstance(values, Mapping):
                for name, value in values.items():
                    logged.setdefault(name, {})[step] = value
        wanted = only({*series.values, *logged})
        for name in series.values.keys() - wanted:
            del series.values[name]
            series.repeated.pop(name, None)
            earlier.pop(name, None)
        for name, line in logged.items():
            if name not in wanted:
                continue
            known = series.values.setdefault(name, {})
            last = next(reversed(known), -1)
            for step, value in sorted(line.items()):
                before = [*earlier.get(name, {}).get(step, []), *([known[step]] if step in known else [])]
                if before:
                    series.repeated.setdefault(name, {})[step] = [*before, value]
                known[step] = value
            if min(line) < last:  # steps must rise: what a resume takes back is looked for from the end
                series.values[name] = dict(sorted(known.items()))
    series.values = {name: line for name, line in series.values.items() if line}
    return series


def read_json(store: Store, name: str) -> dict[str, Any] | None:
    """Read one small JSON object of a run directory, None if it is absent.

    Raises:
        DamagedError: If it is there but is not a JSON object.
        JobkitError: If the storage does not answer.
    """
    if (content := store.get(name)) is None:
        return None
    value = decode.json_object(content)
    if value is None:
        raise DamagedError(f"{store.file(name)} is damaged: it is not a JSON object")
    return value

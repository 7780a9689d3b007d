"""The ledger: torn lines, many writers, and the history that attempts leave together."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobkit import contract
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.ledger import Ledger, attempt_events, read_events, read_json, read_metrics
from jobkit.rundir.store import Store
from launch.lifecycle.history import drawn
from tests.harness.outage import Outage

_SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A run directory."""
    return Store(tmp_path / "run")


def ledger(store: Store, attempt: int = 0, writer: int | str = 0, *, at: float = 1.0) -> Ledger:
    """Open one writer's ledger with a clock that stands still."""
    return Ledger(store.file(contract.events_file(attempt, writer)), clock=lambda: at)


def attempt(store: Store, number: int, first: int, losses: dict[int, float], *, event: str = "restored") -> None:
    """Write what one attempt logs."""
    writer = ledger(store, number, at=float(number))
    writer.append(event, **({"step": first} if event == "restored" else {}))
    for step, loss in losses.items():
        writer.append("metrics", step=step, values={"loss": loss})
    writer.close()


# Writing and reading.


def test_events_come_back_with_their_writer(store: Store) -> None:
    """Events of the launcher, a supervisor and a program come back in the order of time, each with its writer."""
    for path, at in [(store.file(contract.EVENTS), 1.0), (store.file(contract.events_file(0, "supervisor")), 2.0)]:
        one = Ledger(path, clock=lambda at=at: at)
        one.append("x", text="ä\n\"'", number=1.5, none=None, path=Path("p"))
        one.close()
    ledger(store, 12, at=0.5).append("early", durable=True)
    events = read_events(store)
    assert [(event["event"], event["writer"], event.get("attempt")) for event in events] == [
        ("early", "0", 12),
        ("x", "launcher", None),
        ("x", "supervisor", 0),
    ]
    assert events[1] | {"t": 0, "writer": ""} == {
        "t": 0,
        "writer": "",
        "event": "x",
        "text": "ä\n\"'",
        "number": 1.5,
        "none": None,
        "path": "p",
    }
    assert attempt_events(store, 12) == events[:1]
    assert attempt_events(store, 13) == read_events(Store(store.file("no"))) == []


def test_a_closed_ledger_drops(store: Store) -> None:
    """What is appended after the close is dropped without a word; closing twice is no error."""
    one = ledger(store)
    one.append("kept")
    one.append_all([])
    one.close()
    one.append("dropped")
    one.close()
    assert [event["event"] for event in attempt_events(store, 0)] == ["kept"]


def test_a_ledger_that_cannot_be_made(tmp_path: Path) -> None:
    """Below a regular file the ledger is refused with the remedy."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another run directory"):
        ledger(Store(tmp_path / "file" / "run"))


def test_a_full_disk_stops_nothing(store: Store) -> None:
    """A ledger on a device without space raises nothing but where it is asked whether all is written."""
    one = ledger(store)
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), one._descriptor or 0)
    path = store.file(contract.events_file(0, 0))
    path.unlink()
    path.mkdir()  # it cannot be opened again
    one.append("lost", durable=True)
    with pytest.raises(JobkitError, match="cannot write"):
        one.flush()
    one.close()


_STALE = """
import sys, pathlib
from jobkit.errors import StorageError
from jobkit.rundir.ledger import Ledger
path, flag = map(pathlib.Path, sys.argv[1:])
one = Ledger(path)
one.append("before", durable=True)
flag.write_text("116 writes")
for number in range(200):
    one.append("meanwhile", number=number, durable=True)
try:
    one.flush()
    print("settled")
except StorageError as error:
    print(error)
flag.unlink()
one.flush()
print(len(path.read_bytes().splitlines()))
one.append("after")
one.close()
"""


def test_a_stale_ledger_is_opened_again(store: Store, tmp_path: Path) -> None:
    """What was appended while the disk did not answer is in the file, in order, as soon as it answers again."""
    outage = Outage(tmp_path, store.path)
    path, flag = store.file(contract.events_file(0, 0)), outage.environ["OUTAGE_WHILE"]
    script = [sys.executable, "-c", _STALE, str(path), flag]
    done = subprocess.run(script, env=os.environ | outage.environ, capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[1:] == ["201"]
    told = attempt_events(store, 0)
    assert [event["event"] for event in told] == ["before", *["meanwhile"] * 200, "after"]
    assert [event["number"] for event in told[1:-1]] == list(range(200))


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more lines than may wait for a disk the oldest go, and those that stay are whole."""
    monkeypatch.setattr("jobkit.rundir.ledger._MOST_PENDING_BYTES", 1000)
    path = tmp_path / "ledger"
    one = Ledger(path)
    path.unlink()
    path.mkdir()  # it cannot be opened again
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), one._descriptor or 0)
    for number in range(100):
        one.append("x", number=number)
    path.rmdir()
    one.flush()
    kept = [json.loads(line)["number"] for line in path.read_bytes().splitlines()]
    assert kept == list(range(100))[-len(kept) :]
    assert 10 < len(kept) < 40
    one.close()


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.none(), max_size=3), max_size=5),
    st.integers(0, 10**4),
)
@settings(deadline=None)
def test_a_torn_line_costs_one_event(fields: list[dict[str, Any]], cut: int) -> None:
    """Cut the file anywhere: all lines before the torn one are read, and a later writer's first event is too."""
    with tempfile.TemporaryDirectory() as directory:
        store = Store(directory)
        path = store.file(contract.events_file(0, 0))
        one = Ledger(path)
        one.append_all([{"t": index, "event": "x", "given": given} for index, given in enumerate(fields)])
        one.close()
        content = path.read_bytes()
        content = content[: cut % (len(content) + 1)]
        path.write_bytes(content)
        whole = len([line for line in content.split(b"\n") if line.endswith(b"}") and _complete(line)])
        later = ledger(store, at=100.0)
        later.append("later")
        later.append("latest")
        later.close()
        events = [
            {key: value for key, value in event.items() if key not in ("writer", "attempt")}
            for event in read_events(store)
        ]
        assert events[:-2] == [{"t": index, "event": "x", "given": given} for index, given in enumerate(fields[:whole])]
        assert [event["event"] for event in events[-2:]] == ["later", "latest"]


def _complete(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_are_readable(content: bytes) -> None:
    """Whatever a ledger holds, reading it raises nothing and yields only events with a time."""
    with tempfile.TemporaryDirectory() as directory:
        store = Store(directory)
        store.write(
            contract.events_file(0, 0), content + b'\n{"t":1,"event":"x"}\n[1]\n{"t":"1","event":"x"}\n{"t":1}\n7\n'
        )
        assert all(isinstance(event["t"], int | float) for event in read_events(store))
        assert read_events(store)[-1]["event"] == "x"
        read_metrics(store)


_BROKEN_OFF = """
import resource, sys
from pathlib import Path
from jobkit.rundir.ledger import Ledger
one = Ledger(Path(sys.argv[1]))
one.append("first")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (Path(sys.argv[1]).stat().st_size + 10, hard))
one.append("torn", text="x" * 100)
one.append("lost")
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
one.append("after")
one.append("last")
"""


def test_a_disk_that_was_full_for_a_while(store: Store) -> None:
    """What a full disk tore off or refused is written, whole and in order, once there is space again."""
    path = store.file(contract.events_file(0, 0))
    subprocess.run([sys.executable, "-c", _BROKEN_OFF, str(path)], check=True)
    assert path.read_bytes().splitlines()[1].startswith(b'{"t":')
    assert [event["event"] for event in attempt_events(store, 0)] == ["first", "torn", "lost", "after", "last"]


def _write(path: str, writer: int, gate: Any) -> None:
    one = Ledger(Path(path))
    gate.wait()
    for index in range(300):
        one.append("x", by=writer, index=index, filling="y" * (index % 50))
    os._exit(0)


def test_many_writers_of_one_file(store: Store) -> None:
    """Four processes append to one file at once: every event comes back whole, each writer's in its order."""
    path = store.file(contract.EVENTS)
    path.parent.mkdir(parents=True)
    gate = _SPAWN.Barrier(4)
    processes = [_SPAWN.Process(target=_write, args=(str(path), writer, gate), daemon=True) for writer in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    events = read_events(store)
    assert len(events) == 1200
    for writer in range(4):
        assert [event["index"] for event in events if event["by"] == writer] == list(range(300))


# Metrics over several attempts.


def test_a_step_that_ran_twice_counts_once(store: Store) -> None:
    """The later attempt's value stands; every value of the step is among the repeated ones, oldest first."""
    attempt(store, 0, 0, {0: 5.0, 1: 4.0, 2: 3.0}, event="fresh")
    attempt(store, 1, 1, {1: 4.0, 2: 3.5})
    attempt(store, 2, 2, {2: 3.25, 3: 2.0})
    series = read_metrics(store)
    assert series.values == {"loss": {0: 5.0, 1: 4.0, 2: 3.25, 3: 2.0}}
    assert series.repeated == {"loss": {1: [4.0, 4.0], 2: [3.0, 3.5, 3.25]}}


@pytest.mark.slow
def test_a_resume_takes_back_what_lay_beyond_it(store: Store) -> None:
    """What an attempt logged beyond the step that the next one resumed at is no part of the history."""
    attempt(store, 0, 0, {0: 5.0, 1: 4.0, 2: 3.0, 3: 2.0}, event="fresh")
    attempt(store, 1, 2, {2: 3.5})
    series = read_metrics(store)
    assert series.values == {"loss": {0: 5.0, 1: 4.0, 2: 3.5}}
    assert series.repeated == {"loss": {2: [3.0, 3.5]}}
    attempt(store, 2, 0, {}, event="fresh")
    assert read_metrics(store).values == read_metrics(store).repeated.get("nothing", {}) == {}


def test_logging_twice_within_a_step_is_no_repetition(store: Store) -> None:
    """The last of several values for one step of one attempt stands; the step did not run twice."""
    one = ledger(store)
    for loss in (3.0, 2.0, 1.0):
        one.append("metrics", step=0, values={"loss": loss})
    one.append("metrics", step=0, values={"other": math.nan})
    series = read_metrics(store)
    assert series.values["loss"] == {0: 1.0}
    assert math.isnan(series.values["other"][0])
    assert series.repeated == {}


def test_metrics_of_other_writers_do_not_count(store: Store) -> None:
    """Only process 0 of each attempt logs metrics; malformed ones are passed over."""
    ledger(store, 0, "supervisor").append("metrics", step=0, values={"loss": 1.0})
    ledger(store, 0, 1).append("metrics", step=0, values={"loss": 1.0})
    one = ledger(store, 0, 0)
    one.append("metrics", step="0", values={"loss": 1.0})
    one.append("metrics", step=0, values=[1.0])
    one.append("metrics", step=0)
    assert read_metrics(store).values == {}


def test_metrics_that_nobody_wants_are_forgotten(store: Store) -> None:
    """Only the metrics that are chosen among those known so far are held, whichever came first."""
    ledger(store, 0).append("metrics", step=0, values={"accuracy": 0.5, "a": 1.0})
    ledger(store, 1).append("metrics", step=1, values={"accuracy": 0.5, "loss": 2.0, "val_loss": 3.0})
    assert read_metrics(store, only=drawn).values == {"loss": {1: 2.0}, "val_loss": {1: 3.0}}
    assert read_metrics(store).values.keys() == {"accuracy", "a", "loss", "val_loss"}


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=6))
@settings(deadline=None)
def test_any_history_of_attempts(lives: list[tuple[int, int]]) -> None:
    """However attempts resume and die, each step's value is that of the last attempt on the way to the end."""
    with tempfile.TemporaryDirectory() as directory:
        store = Store(directory)
        expected: dict[int, float] = {}
        ran: dict[int, list[float]] = {}
        reached = 0
        for number, (back, ahead) in enumerate(lives):
            first = max(0, reached - back)
            reached = first + ahead
            expected = {step: value for step, value in expected.items() if step < first}
            losses = {step: number + step / 100 for step in range(first, reached)}
            attempt(store, number, first, losses, event="restored" if number else "fresh")
            expected |= losses
            for step, loss in losses.items():
                ran.setdefault(step, []).append(loss)
        series = read_metrics(store)
        assert series.values.get("loss", {}) == expected
        repeated = series.repeated.get("loss", {})
        assert {step: values for step, values in repeated.items() if step in expected} == {
            step: values for step, values in ran.items() if len(values) > 1 and step in expected
        }


# Small JSON files.


def test_small_json(store: Store) -> None:
    """A JSON object comes back, an absent file is None, anything else is named as damaged."""
    store.write("a.json", '{"x": [1, null]}')
    assert read_json(store, "a.json") == {"x": [1, None]}
    assert read_json(store, "b.json") is None
    for content in (b"", b"[1]", b"{", b"\xff", b"7"):
        store.write("a.json", content)
        with pytest.raises(JobkitError, match=r"a\.json is damaged"):
            read_json(store, "a.json")
    store.write("directory/x", "")
    with pytest.raises(JobkitError, match="cannot read"):
        read_json(store, "directory")

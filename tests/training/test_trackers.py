"""Trackers: a run that was interrupted is one run to them, whose series is the undisturbed run's."""

import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jobkit.run.session
from jobkit import contract
from jobkit.errors import ConfigError
from jobkit.rundir.ledger import Ledger, read_metrics
from jobkit.rundir.store import Store
from jobkit.tracking import adapters
from jobkit.tracking.adapters import TensorBoard, records, resolve
from jobkit.tracking.trackers import Opening, Point, Tail, TrackerFeed
from tests.fakes.gcs_server import GcsServer
from tests.harness import training

STEPS = 40
MISSING = [name for name, (_, package) in adapters.KNOWN.items() if importlib.util.find_spec(package) is None]
pytestmark = pytest.mark.skipif(bool(MISSING) and not os.environ.get("CI"), reason=f"not installed: {MISSING}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run MLflow's own server."""
    directory = tmp_path_factory.mktemp("mlflow")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.mlflow_server", str(directory)],
        stdout=subprocess.PIPE,
        stderr=(directory / "log").open("wb"),
        text=True,
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


def tensorboard_series(url: Path) -> dict[str, dict[int, float]]:
    """Read the event files as TensorBoard itself does; a step that is there twice is an error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(url / contract.TENSORBOARD), size_guidance={"scalars": 0})
    shown.Reload()
    return {tag: once((one.step, one.value) for one in shown.Scalars(tag)) for tag in shown.Tags()["scalars"]}


def once(pairs: Any) -> dict[int, float]:
    """Make a series of pairs, in which no step may come twice or out of order."""
    found: dict[int, float] = {}
    for step, value in pairs:
        assert step > max(found, default=-1), f"step {step} comes again"
        found[step] = value
    return found


def wandb_rows(url: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """Read W&B's offline files, oldest first: the ids in their records, and the rows of the history."""
    from wandb.proto import wandb_internal_pb2 as pb

    ids, rows = set(), []
    for path in sorted(url.glob("wandb/offline-run-*/run-*.wandb")):
        for content in records(path.read_bytes()):
            record = pb.Record()
            record.ParseFromString(content)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return ids, rows


TRACKERS = ("tensorboard", "wandb", "mlflow")


def _attempt(url: Path, server: str, **named: Any) -> tuple[int, str]:
    environment = {
        "MLFLOW_TRACKING_URI": server,
        "MLFLOW_EXPERIMENT_NAME": "tests",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": "0123456789" * 4,
        "WANDB_ERROR_REPORTING": "false",
    }
    return training.attempt(
        url, steps=STEPS, trackers=TRACKERS, save_every="10 steps", environment=environment, timeout_s=200, **named
    )


def _when_followed(run: Any, step: int, number: signal.Signals) -> None:
    """Send this process a signal once MLflow and TensorBoard have a step, and W&B has begun."""
    import wandb
    from mlflow import MlflowClient

    jobkit.run.session._TRACKERS_NOTICED_S = 60.0  # a busy machine
    run._session.log_buffer.flush(run._session.ledger, below=1 << 60)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(0.2)
        with contextlib.suppress(OSError, KeyError, ValueError):
            known = json.loads((Path(run.url) / contract.TRACKERS).read_text())["mlflow"]["run_id"]
            sent = {one.key: one.step for one in MlflowClient().get_run(known).data.to_proto().metrics}
            drawn = int((Path(run.url) / contract.TENSORBOARD_MARK).read_text())
            if min(sent["loss"], drawn) >= step and wandb.run is not None:
                break
    else:
        raise AssertionError("the trackers do not follow")
    assert sys.excepthook is jobkit.run.session._on_error  # W&B replaces it, and with it our exit codes
    os.kill(os.getpid(), number)


def _preempted(point: str, run: Any) -> None:
    if point == "step" and run.step == 14:
        _when_followed(run, 13, signal.SIGTERM)


def _killed(point: str, run: Any) -> None:
    if point == "step" and run.step == 27:  # seven steps after a commit
        _when_followed(run, 25, signal.SIGKILL)


@pytest.mark.slow
def test_a_run_interrupted_twice_is_one_run_everywhere(tmp_path: Path, server: str) -> None:
    """Preempted once and killed once: one run in TensorBoard, W&B and MLflow, each step once, as if undisturbed."""
    from mlflow import MlflowClient

    url, calm = tmp_path / "run", tmp_path / "calm"
    code, printed = training.attempt(calm, steps=STEPS, trackers=())
    assert code == 0, printed
    assert not (calm / contract.TENSORBOARD).exists()
    assert _attempt(url, server, hook=_preempted)[0] == 75
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (waiting,) = client.search_runs([experiment.experiment_id])
    assert waiting.info.status == "SCHEDULED"
    code, printed = _attempt(url, server, hook=_killed)
    assert code == -signal.SIGKILL, printed
    assert max(tensorboard_series(url)["loss"]) >= 25  # so that there is something to take back
    code, printed = _attempt(url, server)
    assert code == 0, printed
    assert "fails" not in printed
    assert "0123456789" not in printed + "".join(
        path.read_text(errors="replace") for path in url.rglob("*.json*") if path.is_file()
    )

    expected = read_metrics(Store(calm)).values["loss"]
    assert sorted(expected) == list(range(STEPS))
    assert read_metrics(Store(url)).values["loss"] == expected

    drawn = tensorboard_series(url)["loss"]
    assert drawn == {step: pytest.approx(value) for step, value in expected.items()}

    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert once((one.step, one.value) for one in sorted(history, key=lambda one: one.step)) == expected
    assert "SIGTERM, committed at step 15" in run.data.tags["jobkit.attempt.1"]
    assert "killed" in run.data.tags["jobkit.attempt.2"]

    ids, rows = wandb_rows(url)
    assert len(ids) == 1
    assert once((row["_step"], row["loss"]) for row in rows) == expected


@pytest.mark.slow
def test_a_tracker_that_fails_never_stops_a_training(tmp_path: Path) -> None:
    """With no MLflow server there the training ends well; it is said once; a later attempt sends everything."""
    url = tmp_path / "run"
    environment = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    code, printed = training.attempt(url, trackers=("mlflow",), environment=environment, timeout_s=120)
    assert code == 0
    assert printed.count("mlflow fails, training goes on") == 1


class Slow:
    """A tracker of one's own: takes its time, and sometimes fails."""

    name = "slow"

    def __init__(self) -> None:
        self.got: list[tuple[int, float]] = []
        self.ending = ""
        self.fail = False
        self.taken = threading.Event()

    def open(self, opening: Opening) -> Callable[[str], int]:
        """Go on behind what came before."""
        last = max((step for step, _ in self.got), default=-1)
        return lambda name: last

    def send(self, points: Sequence[Point]) -> None:
        """Take points."""
        if self.fail:
            raise OSError("no")
        self.got += [(point.step, point.values["loss"]) for point in points]
        self.taken.set()

    def close(self, ending: str) -> None:
        """Hear the end."""
        self.ending = ending


def test_what_a_tracker_missed_it_gets_from_a_later_attempt(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Down for a whole attempt, with a rewind in between: nothing is missing, nothing twice."""
    store, tracker = Store(tmp_path), Slow()
    for attempt, begin, end in ((0, 0, 20), (1, 10, 15), (2, 12, 30)):
        tracker.fail = attempt == 0
        ledger = Ledger(store.file(contract.events_file(attempt, 0)))
        ledger.append("restored" if attempt else "fresh", step=begin)
        following = TrackerFeed(store, attempt, [tracker])
        following.start(begin)
        for step in range(begin, end):
            ledger.append("metrics", step=step, values={"loss": attempt + step / 100})
        following.close("done", wait_s=10)
        ledger.close()
    assert [step for step, _ in tracker.got] == list(range(30))
    assert tracker.ending == "done"
    assert capfd.readouterr().err.count("slow fails, training goes on") == 1


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        (("tensorbord",), "known are tensorboard, wandb, mlflow"),
        ("tensorboard", "give a tuple"),
        ((object(),), "needs open, send and close"),
    ],
)
def test_a_wrong_tracker_is_refused(given_: Any, told: str) -> None:
    """A misspelt name, a string, an object that is none: refused before anything is done."""
    with pytest.raises(ConfigError, match=told):
        resolve(given_)


def test_one_that_is_not_installed_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install; by default nothing is asked for that is not there."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install wandb"):
        resolve(("wandb",))
    assert resolve(None) == []


def test_tensorboard_is_rewound_from_any_point(tmp_path: Path) -> None:
    """Whatever was written beyond the mark or beyond the resumed step is gone, whatever is missing is written again."""
    store = Store(tmp_path)
    tracker = TensorBoard()

    def opening(attempt: int, step: int) -> Opening:
        return Opening(store, attempt, step, "killed" if attempt else "", {}, lambda known: None)

    def send(has: Callable[[str], int], steps: range, add: float) -> None:
        for step in steps:
            if step > has("loss"):
                tracker.send([Point(step, time.time(), {"loss": step + add})])

    send(tracker.open(opening(0, 0)), range(20), 0.5)  # killed: the mark is older than the file
    tracker._writer.close()
    time.sleep(1.1)  # the second is in the files' names
    has = tracker.open(opening(1, 12))
    assert has("loss") < 12
    send(has, range(30), 0.25)
    tracker.close("preempted")
    assert (tmp_path / contract.TENSORBOARD_MARK).read_text() == "29\n"
    time.sleep(1.1)
    has = tracker.open(opening(2, 30))
    assert has("loss") == 28
    send(has, range(40), 0.25)
    tracker.close("failed")
    time.sleep(1.1)
    send(tracker.open(opening(3, 35)), range(50), 0.75)
    tracker.close("done")
    drawn = tensorboard_series(tmp_path)["loss"]
    assert sorted(drawn) == list(range(50))
    assert all(drawn[step] == step + (0.25 if step < 35 else 0.75) for step in range(12, 50))


@given(st.lists(st.binary(max_size=9000), max_size=40), st.integers(0, 200))
def test_the_log_format_of_wandbs_files(contents: list[bytes], cut: int) -> None:
    """Records of any size come out as they went in, over block boundaries; of a torn file all but the torn ones."""
    block, written = 1 << 15, bytearray(b":W&B\xe1\xbe\x00")
    for content in contents:
        rest, first = content, True
        while True:
            room = block - len(written) % block
            if room < 7:
                written += bytes(room)
                continue
            piece, rest = rest[: room - 7], rest[room - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not rest]
            written += bytes(4) + len(piece).to_bytes(2, "little") + bytes([kind]) + piece
            first = False
            if not rest:
                break
    assert list(records(bytes(written))) == contents
    torn = list(records(bytes(written[: max(len(written) - cut, 0)])))
    assert torn[:-1] == contents[: max(len(torn) - 1, 0)]


def test_a_line_that_is_being_written_waits(tmp_path: Path) -> None:
    """Half a line is not a point; the whole line is, once; what is no metric is skipped."""
    path = tmp_path / "events"
    line = json.dumps({"t": 1.0, "event": "metrics", "step": 3, "values": {"loss": 0.5}}) + "\n"
    path.write_text('{"t": 0.0, "event": "opened"}\ntorn{\n' + line + line[:20])
    tail = Tail(path)
    assert list(tail.read()) == [Point(3, 1.0, {"loss": 0.5})]
    with path.open("a") as file:
        file.write(line[20:])
    assert list(tail.read()) == [Point(3, 1.0, {"loss": 0.5})]
    assert list(tail.read()) == []


@pytest.mark.slow
def test_in_a_bucket_the_next_node_goes_on(tmp_path: Path) -> None:
    """Preempted on one node, finished on another: the event files in the bucket are one series, each step once."""
    url = f"gs://bucket/runs/drawn-{random.randrange(10**9)}"
    with GcsServer() as server:
        for node, code, at in (("one", 75, {14: "SIGTERM"}), ("two", 0, None)):
            environment = server.environment() | {contract.ENV_HOME: str(tmp_path / node)}
            ended, printed = training.attempt(
                url, at=at, trackers=("tensorboard",), environment=environment, log=tmp_path / "log", timeout_s=120
            )
            assert ended == code, printed
        inside = url.removeprefix("gs://bucket/") + "/"
        objects = {name.removeprefix(inside): content for name, content in server.storage.buckets["bucket"].items()}
    for name, stored in objects.items():
        if name.startswith(contract.TENSORBOARD):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(stored.data)
    assert len(list((tmp_path / contract.TENSORBOARD).iterdir())) == 2
    assert sorted(tensorboard_series(tmp_path)["loss"]) == list(range(training.STEPS))

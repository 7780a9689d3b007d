"""The trackers that jobkit knows: TensorBoard, Weights & Biases, MLflow. Their packages are imported on first use.

Secrets and addresses stay where these tools look for them: WANDB_API_KEY, WANDB_PROJECT, WANDB_MODE,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and so on, in the environment. What jobkit keeps is the identity of the run.
"""

import contextlib
import importlib.util
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jobkit import contract
from jobkit.errors import ConfigError
from jobkit.tracking.trackers import Opening, Point, Tracker

_FLUSH_S = 5.0
"""TensorBoard's file is synced this often at most."""


class TensorBoard:
    """Event files below the run directory, one for each attempt, which begins with the word to forget what is void.

    A mark beside them says up to which step everything is on the disk; from there on a new attempt writes again.
    """

    name = "tensorboard"

    def open(self, opening: Opening) -> Callable[[str], int]:
        """Begin a new file; the reader drops what earlier ones have from its first step on."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar
        from tensorboardX.summary import text as text_summary

        self._scalar, self._event = scalar, event_pb2.Event
        self._store = opening.store
        self._store.file(contract.TENSORBOARD).mkdir(exist_ok=True)
        begin = max(min(self._mark(), opening.step), 0)
        # Not tensorboardX's SummaryWriter: its flush() does not wait for its own queue.
        prefix = self._store.file(f"{contract.TENSORBOARD}/events")
        self._writer = EventsWriter(str(prefix), f".attempt{opening.attempt:05d}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=begin, session_log=start))
        if opening.before:
            text = f"attempt {opening.attempt} goes on at step {opening.step} after: {opening.before}"
            summary = text_summary("jobkit/interruptions", text)
            self._writer.write_event(self._event(wall_time=time.time(), step=opening.step, summary=summary))
        self._newest, self._flushed, self._flushed_at = begin, -1, 0.0
        return lambda name: begin - 1

    def send(self, points: Sequence[Point]) -> None:
        """Write scalars."""
        for point in points:
            for name, value in point.values.items():
                event = self._event(wall_time=point.at, step=point.step, summary=self._scalar(name, value))
                self._writer.write_event(event)
            self._newest = max(self._newest, point.step)
        if time.monotonic() - self._flushed_at >= _FLUSH_S and self._newest > self._flushed:
            self._flush()

    def close(self, ending: str) -> None:
        """Close the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.flush()
        self._store.write(contract.TENSORBOARD_MARK, f"{self._newest}\n")  # of that step more may come
        self._flushed, self._flushed_at = self._newest, time.monotonic()

    def _mark(self) -> int:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int(self._store.read(contract.TENSORBOARD_MARK))
        return 0  # a node that was never here before: write everything again


class WandB:
    """One run of Weights & Biases: its id is made once and given to every attempt with resume='allow'.

    A row is sent when its step is complete. Online the server knows which steps it has. Offline each attempt has a
    directory of its own below the run directory, which `wandb sync` puts together; what earlier ones hold is read from
    their files, since W&B writes late and loses the rest when the program is killed.
    """

    name = "wandb"
    packages = ("wandb",)

    def open(self, opening: Opening) -> Callable[[str], int]:
        """Begin or resume the run."""
        import wandb

        known = dict(opening.known)
        if not re.fullmatch("[0-9a-f]{16}", known.get("id", "")):  # it becomes a part of paths
            known["id"] = secrets.token_hex(8)
            opening.remember(known)
        root = opening.store.path
        opening.store.file("wandb")  # which W&B makes, or goes on in
        offline = list(_offline_steps(root, known["id"]))
        hooks = sys.exit, sys.excepthook
        try:
            self._run = wandb.init(
                id=known["id"],
                resume="allow",
                name=opening.name,
                dir=str(root),
                settings=wandb.Settings(console="off", silent=True),
            )
        finally:  # jobkit's exit codes come from its own
            sys.exit, sys.excepthook = hooks
        self._row: dict[str, Any] = {}
        self._step = -1
        attempts: dict[str, int | str] = {"attempt": opening.attempt, "resumed_at_step": opening.step}
        if opening.before:
            attempts["interrupted_by"] = opening.before
            self._run.tags = tuple(dict.fromkeys([*(self._run.tags or ()), "interrupted"]))
        self._run.config.update({"jobkit": attempts}, allow_val_change=True)  # type: ignore[no-untyped-call]
        last = max([self._run.starting_step - 1, *offline])
        return lambda name: last

    def send(self, points: Sequence[Point]) -> None:
        """Put values of one step into one row."""
        for point in points:
            if point.step != self._step:
                self._send_row()
            self._step = point.step
            self._row |= {**point.values, "_timestamp": point.at}

    def _send_row(self) -> None:
        if self._row:
            self._run.log(self._row, step=self._step)
            self._row = {}

    def close(self, ending: str) -> None:
        """End this attempt; W&B shows a run that goes on as preempting."""
        self._send_row()
        if ending == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code={"done": 0, "preempted": 75}.get(ending, 1))


def _offline_steps(root: Path, run_id: str) -> Iterator[int]:
    """Yield the steps that W&B's offline files of a run hold."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(root.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")):
        if path.is_symlink() or path.parent.is_symlink():
            continue  # as W&B makes for itself; another could lead anywhere
        for content in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            with contextlib.suppress(Exception):  # a torn record
                record.ParseFromString(content)
                for item in record.history.item:
                    if (item.key or "/".join(item.nested_key)) == "_step":
                        yield int(json.loads(item.value_json))


_BLOCK, _HEADER = 1 << 15, 7


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of one of W&B's files: LevelDB's log format, after a header of seven bytes.

    Each block of 32 KiB holds pieces: checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last).
    """
    at, whole = _HEADER, b""
    while at + _HEADER <= len(content):
        if at % _BLOCK > _BLOCK - _HEADER:  # no room for another piece: the rest of the block is empty
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        piece = content[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        whole = piece if kind in (1, 2) else whole + piece
        if kind in (1, 4):
            yield whole


class MLflow:
    """One run of MLflow: created once, with a token by which it is found again, and continued by every attempt."""

    name = "mlflow"
    packages = ("mlflow",)

    def open(self, opening: Opening) -> Callable[[str], int]:
        """Create the run, or continue it; the server knows which steps it has."""
        from mlflow import MlflowClient

        self._client = MlflowClient()
        known = dict(opening.known)
        if "token" not in known:
            known["token"] = secrets.token_hex(8)
            opening.remember(known)
        self._run_id = known.get("run_id") or self._find_or_create(known["token"], opening)
        if "run_id" not in known:
            opening.remember(known | {"run_id": self._run_id})
        self._client.update_run(self._run_id, status="RUNNING")
        self._client.set_tag(self._run_id, "jobkit.attempt", opening.attempt)
        if opening.before:
            text = f"goes on at step {opening.step} after: {opening.before}"
            self._client.set_tag(self._run_id, f"jobkit.attempt.{opening.attempt}", text)
        last = {metric.key: metric.step for metric in self._client.get_run(self._run_id).data.to_proto().metrics}
        return lambda name: last.get(name, -1)

    def _find_or_create(self, token: str, opening: Opening) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or self._experiment()
        # It may have been created by an attempt that was killed before it could write that down.
        runs = self._client.search_runs([experiment], f"tags.`jobkit.run` = '{token}'")
        if runs:
            return str(runs[0].info.run_id)
        tags = {"jobkit.run": token, "jobkit.url": opening.store.url}
        return str(self._client.create_run(experiment, tags=tags, run_name=opening.name).info.run_id)

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        experiment = self._client.get_experiment_by_name(name)
        return str(experiment.experiment_id if experiment is not None else self._client.create_experiment(name))

    def send(self, points: Sequence[Point]) -> None:
        """Log metrics, as many in one request as MLflow takes."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(point.at * 1000), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for begin in range(0, len(metrics), 1000):
            self._client.log_batch(self._run_id, metrics[begin : begin + 1000])

    def close(self, ending: str) -> None:
        """End this attempt; a run that goes on waits to be scheduled."""
        if ending == "preempted":
            self._client.update_run(self._run_id, status="SCHEDULED")
        else:
            self._client.set_terminated(self._run_id, "FINISHED" if ending == "done" else "FAILED")


KNOWN: dict[str, tuple[Callable[[], Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"),
    "wandb": (WandB, "wandb"),
    "mlflow": (MLflow, "mlflow"),
}
"""The trackers that jobkit knows, and the package that each one needs."""


def resolve(trackers: Sequence[str | Tracker] | None) -> list[Tracker]:
    """Make the trackers that `Run(trackers=...)` names; TensorBoard where it is installed if nothing was said.

    Raises:
        ConfigError: If one is unknown or not installed.
    """
    if trackers is None:
        trackers = ("tensorboard",) if importlib.util.find_spec("tensorboardX") else ()
    if isinstance(trackers, str):
        raise ConfigError(f"trackers={trackers!r}: give a tuple, ({trackers!r},)")
    return [_made(one) if isinstance(one, str) else _checked(one) for one in trackers]


def _made(name: str) -> Tracker:
    if name not in KNOWN:
        raise ConfigError(f"trackers: {name!r} is unknown; known are {', '.join(KNOWN)}")
    make, package = KNOWN[name]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"trackers: {name!r} needs a package: pip install {package}")
    return make()


def _checked(tracker: Tracker) -> Tracker:
    if not all(callable(getattr(tracker, method, None)) for method in ("open", "send", "close")):
        raise ConfigError(f"trackers: {tracker!r} is no tracker: it needs open, send and close")
    return tracker

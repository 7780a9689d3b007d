"""Save, commit, retain: orbax_io.py writes through Orbax, commits.py decides what is a checkpoint.

A save has two halves. On the training thread: the state is taken apart and Orbax takes its device-to-host copies. On a
thread of its own: Orbax writes to the stage, the files are made durable, measured and renamed into place, and only then
old steps go. One save is under way at a time.

In a run of several processes all of them save the same steps in the same order. Each writes and measures its own files;
process 0 commits when it has heard of all, and the others hear from it whether it did.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import msgspec

from jobkit import contract, faults, versions
from jobkit.checkpoint import orbax_io, state
from jobkit.checkpoint.first_step_check import FirstStepCheck
from jobkit.checkpoint.kinds import Part
from jobkit.checkpoint.restore import restore
from jobkit.checkpoint.schedule import Rates
from jobkit.checkpoint.table import table_of
from jobkit.errors import ConfigError, JobkitError, PackageError, StorageError, SupersededError, say
from jobkit.group import Group, raise_told, told_error
from jobkit.rundir import commits
from jobkit.rundir.commits import Commit, FileRecord, Keep
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.loops import Loops
from jobkit.rundir.store import Store, explain, files_below, free_bytes, remove_tree
from jobkit.supervise.heartbeat import Heartbeat
from jobkit.supervise.unsaved import NUMBERS, STORAGE, UNCHANGED, Unsaved
from jobkit.units import show_size

_ORBAX_TMP = ".orbax-checkpoint-tmp"
_SAVE_S = 1800.0
"""How long one process may take longer than the first to write its part of a save."""


@dataclass(frozen=True)
class Saved:
    """One committed save, as training felt it.

    Args:
        step: Completed steps.
        blocking_s: Seconds the training thread spent.
        durable_s: Seconds from the start of the save to its commit.
    """

    step: int
    blocking_s: float
    durable_s: float


class Checkpoints:
    """The checkpoints of one attempt's run directory.

    Args:
        store: The run directory.
        attempt: Number of this attempt; an attempt that is not the newest cannot commit.
        keep: What retention leaves.
        ledger: Where saves and removals are written.
        unsaved: Told of saves that fail, and of those that hold nothing new.
        busy: Tells whether retention has to wait: a notice is being served.
        before_commit: Called with the step on the saving thread before each commit, so that what was logged up to the
            step is safe when the step is.
        group: The processes that save together.
    """

    def __init__(
        self,
        store: Store,
        *,
        attempt: int,
        keep: Keep,
        ledger: Ledger,
        unsaved: Unsaved | None = None,
        busy: Callable[[], bool] = lambda: False,
        before_commit: Callable[[int], None] = lambda step: None,
        group: Group | None = None,
    ) -> None:
        self._store, self._attempt, self._keep, self._ledger = store, attempt, keep, ledger
        self._unsaved = unsaved or Unsaved(ledger, Heartbeat(None))
        self._busy, self._before_commit = busy, before_commit
        self._group = group or Group("")
        self._count = 0
        self._writer = orbax_io.Writer()
        self._spent: list[tuple[orbax_io.Writer, Path]] = []
        """Writers of saves that failed, which would raise what is left of that at the next; and where they wrote."""
        self._thread: threading.Thread | None = None
        self._error: JobkitError | None = None
        self._rehearsed = False
        self.loops = Loops()
        """Which loops were left early; every commit from there on knows."""
        self.first_step_check: FirstStepCheck | None = None
        """Compares what is committed with the step before, until there is a difference."""
        self.elsewhere: dict[int, dict[str, float]] = {}
        """Metrics of steps on the run's URL that are not in this home."""
        self.saving_step: int | None = None
        """Step of the save under way."""
        self.saving_asked = False
        """Whether the program asked for it, rather than the clock: its metrics may be the best there will be."""
        self.rates = Rates()
        """How long saves took."""
        self._begun = 0.0
        self._stage = Path()
        self._abandoned = self._publishing = False
        self._gate = threading.Lock()
        self.committed_step = -1
        """Newest step known to be committed, -1 if there is none."""
        self.last: Saved | None = None

    def save(self, snapshot: state.Snapshot, step: int, *, reason: str, metrics: Mapping[str, float]) -> None:
        """Start saving a step; waits for the one under way first. Of a committed step the metrics alone are kept.

        Durability: none on return; `wait` says when.

        Raises:
            JobkitError: If the save cannot be started. The step is not committed then.
        """
        self.wait()
        if step == self.committed_step:
            if metrics and self._group.first:
                self._score(step, metrics)
            return
        snapshot.check_whole()
        jax.block_until_ready(snapshot.arrays)  # type: ignore[no-untyped-call]  # the device's own time is none of the save's
        self._begun = begun = time.monotonic()
        self._abandoned = self._publishing = False
        self._count += 1
        stage = self._stage = Path(self._group.share(f"stage/{self._count}", lambda: str(self._new_stage(step))))
        faults.reach("before_write")
        try:
            upload = self._store.remote is not None
            self._writer.start(stage, snapshot.arrays, snapshot.nbytes, for_upload=upload)
        except Exception as error:
            self._renew_writer(stage)
            _discard(stage)
            raise self._reason(error, f"cannot save step {step} to {self._store.url}", step) from error
        commit = Commit(
            step=step,
            attempt=self._attempt,
            at=time.time(),
            reason=reason,
            files={},
            metrics=dict(metrics),
            topology=_topology(),
            versions=versions.found(),
            early_stops=[stop for stop in self.loops.early if stop.step <= step],
        )
        blocking_s = time.monotonic() - begun
        self.saving_step, self.saving_asked = step, reason == "asked" or bool(metrics)
        self._thread = threading.Thread(
            target=self._finish, args=(stage, snapshot, commit, begun, blocking_s), name="jobkit-save"
        )
        self._thread.start()

    def _score(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep metrics of a step that is committed already: of an evaluation after the save, say."""
        commits.score(self._store, step, metrics, attempt=self._attempt)
        self._ledger.append("scored", durable=True, step=step, metrics=dict(metrics))
        self._retain()  # it may have become the best

    def mark(self) -> None:
        """Keep beside the newest commit what has become of the loops since.

        Raises:
            JobkitError: If it cannot be written.
        """
        if self._group.first:
            early = self.loops.early
            commits.score(self._store, self.committed_step, {}, attempt=self._attempt, early_stops=early)

    def _new_stage(self, step: int) -> Path:
        stage = commits.new_stage(self._store, step, self._attempt)
        if self._group.count > 1:
            _beside(stage).mkdir()
        return stage

    def _finish(self, stage: Path, snapshot: state.Snapshot, commit: Commit, begun: float, blocking_s: float) -> None:
        """Write, commit, retain: the half of a save that training does not wait for."""
        try:
            faults.reach("during_write")
            new = self._commit(stage, snapshot, commit)
        except Exception as error:
            self._renew_writer(stage)
            if self._abandoned:  # then this is what was meant to happen
                self._ledger.append("abandoned", step=commit.step)
                return
            if self._group.first:
                _discard(stage)
            self._fail(
                self._reason(error, f"cannot commit step {commit.step} to {self._store.url}", commit.step), commit
            )
            return
        finally:
            self.saving_step = None
        durable_s = time.monotonic() - begun
        self.committed_step = max(self.committed_step, commit.step)
        self.last = Saved(commit.step, blocking_s, durable_s)
        self.rates.add((snapshot.nbytes, durable_s), reason=commit.reason)
        self._ledger.append(
            "saved" if new else "skipped",
            durable=True,
            step=commit.step,
            reason=commit.reason,
            blocking_s=round(blocking_s, 6),
            durable_s=round(durable_s, 6),
            bytes=snapshot.nbytes,
            metrics=dict(commit.metrics),
        )
        self._unsaved.saved()
        if not self._group.first:
            return
        try:
            self._rehearse(commit.step)
            self._compare(commit)
            self._retain()
        except JobkitError as error:
            self._fail(self._reason(error, "", commit.step), commit)

    def _reason(self, error: Exception, doing: str, step: int) -> JobkitError:
        """Say why a save failed: a newer attempt takes the files away, and what the disk says of that is no reason."""
        if not isinstance(error, SupersededError):
            try:
                commits.check_newest(self._store, self._attempt, f"save step {step}")
            except SupersededError as superseded:
                return superseded
            except JobkitError:
                pass
        return orbax_io.failure(error, doing)

    def _fail(self, error: JobkitError, commit: Commit) -> None:
        """Write down, and keep for `take_error`, why a save failed; to be superseded is none of the storage's doing."""
        if isinstance(error, SupersededError):
            self._ledger.append("superseded", step=commit.step, reason=str(error))
        else:
            self._unsaved.failed(commit.step, STORAGE, str(error), committed_step=self.committed_step)
        self._error = error

    def _compare(self, commit: Commit) -> None:
        """Look whether a step holds anything new, as long as none did; retention waits, the step before is needed."""
        if self.first_step_check is None:
            return
        if (repeated := self.first_step_check.repeated(commit.step)) is not None:
            kind, known = NUMBERS if repeated.but_numbers else UNCHANGED, self._unsaved.stands(NUMBERS)
            self._error = self._unsaved.failed(commit.step, kind, repeated.reason, committed_step=commit.step)
            if self._error is None and not known:
                say(f"warning: {repeated.reason}")
        elif self.first_step_check.seen:
            self._unsaved.changed(commit.step)

    def _commit(self, stage: Path, snapshot: state.Snapshot, commit: Commit) -> bool:
        """Commit what every process has written; tell whether the step is new."""
        if self._group.count == 1:
            self._wait_for_data(commit.step)
            names = files_below(stage) if stage.exists() else []
            measured = {name: self._measure(stage, name) for name in names}
            with self._gate:
                self._go_on()
                self._publishing = True
            return commits.publish(self._store, stage, state=_state_json(snapshot), commit=commit, measured=measured)
        try:
            self._wait_for_data(commit.step)
            own: dict[str, Any] = msgspec.to_builtins(_own_files(stage, snapshot, self._group.index))
        except Exception as error:
            own = told_error(orbax_io.failure(error, f"process {self._group.index} cannot write its part"))
        sent = self._group.gather(f"written/{self._count}", own, _SAVE_S)

        def publish() -> bool:
            for files in sent:
                raise_told(files)
            stage.mkdir(exist_ok=True)
            for path in _beside(stage).iterdir():
                os.rename(path, stage / path.name)
            _beside(stage).rmdir()
            measured = {name: msgspec.convert(record, FileRecord) for files in sent for name, record in files.items()}
            return commits.publish(self._store, stage, state=_state_json(snapshot), commit=commit, measured=measured)

        return bool(self._group.share(f"committed/{self._count}", publish))

    def _renew_writer(self, stage: Path) -> None:
        """Write the next save with another writer; several processes do not go on after a save that failed."""
        if self._group.count == 1:
            self._spent.append((self._writer, stage))
            self._writer = orbax_io.Writer()

    def _wait_for_data(self, step: int) -> None:
        self._writer.wait()
        faults.reach("after_data")
        self._before_commit(step)

    def _measure(self, stage: Path, name: str) -> FileRecord:
        self._go_on()
        return commits.measure(stage, [name])[name]

    def _go_on(self) -> None:
        if self._abandoned:
            raise StorageError("abandoned for a newer save")

    def abandon(self, nbytes: int = 0) -> bool:
        """Break the save in flight off, to make way for a newer one, and wait for that; tell whether it was possible.

        Orbax cannot be told to stop, so its directory is taken away: with a file in its place, the next write fails.
        What it has written stays until `tidy`, since to remove a GB takes a third of a second.

        Durability: what was committed before stays; of the step in flight nothing does.

        Args:
            nbytes: What is to be written next: without room for both, what was written goes first.
        """
        with self._gate:
            if self._group.count > 1 or self._publishing or not self.saving:
                return False
            self._abandoned = True
        orbax_io.silence()
        _take_away(self._stage)
        self.wait()
        with contextlib.suppress(OSError):
            if free_bytes(self._store.path) < _with_metadata(nbytes):
                self.tidy()
        return True

    def tidy(self) -> None:
        """Remove what saves that failed or were abandoned have left; the next attempt does it where there is no time.

        Again at the end: one of a writer's threads may have written on after another had failed.
        """
        for _, stage in self._spent:
            _discard(stage)

    @property
    def saving_for_s(self) -> float:
        """How long the save under way has been so."""
        return time.monotonic() - self._begun

    def _rehearse(self, step: int) -> None:
        """Read the attempt's first commit back the way a restore does: an untested restore is no checkpoint."""
        if self._rehearsed or self._busy():
            return
        begun = time.monotonic()
        wrong = commits.problems(self._store, step, stop=self._busy)
        if self._busy():
            return
        table = table_of(self._store, step)
        item = self._store.file(contract.step_dir(step)) / contract.ORBAX_ITEM
        try:
            for paths in orbax_io.batches(state.stored_paths(table)):
                if self._busy():
                    return
                for path, array in orbax_io.read(item, dict.fromkeys(paths), alone=True).items():
                    record = paths[path]
                    if record["is"] != "key" and (list(array.shape), array.dtype.name) != (
                        record["shape"],
                        record["dtype"],
                    ):
                        wrong.append(f"{'/'.join(path)} reads as {array.dtype} {array.shape}")
        except Exception as error:
            said = orbax_io.failure(error, f"cannot read step {step} of {self._store.url} back")
            if isinstance(said, PackageError) or orbax_io.system_error(error) is not None:
                raise said from error  # its bytes are as they were written
            wrong.append(str(error))
        if wrong:
            commits.check_newest(self._store, self._attempt, f"set step {step} aside")  # it may have removed the step
            commits.set_aside(self._store, step, wrong)
            self.committed_step = max(commits.steps(self._store), default=-1)
            raise StorageError(f"step {step} of {self._store.url} was written but does not read back: {wrong[0]}")
        self._rehearsed = True
        self._ledger.append("rehearsed", step=step, seconds=round(time.monotonic() - begun, 6))

    def _retain(self) -> None:
        faults.reach("before_retention")
        known = commits.metrics(self._store)
        for step in self._keep.superfluous(known):
            if self._busy():  # the grace period belongs to the save
                return
            commits.check_newest(self._store, self._attempt, f"remove step {step}")
            commits.remove(self._store, step)
            self._ledger.append("removed", step=step)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the save under way, if any, is committed or has failed."""
        thread = self._thread  # two threads may wait
        if thread is not None:
            thread.join(timeout_s)
            if not thread.is_alive() and self._thread is thread:
                self._thread = None

    @property
    def failed(self) -> bool:
        """Whether `take_error` has something to say."""
        return self._error is not None

    def take_error(self) -> JobkitError | None:
        """Return what went wrong on the saving thread since the last call."""
        error, self._error = self._error, None
        return error

    @property
    def saving(self) -> bool:
        """Whether a save is still being written or tidied up after."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def close(self) -> None:
        """Wait for the save under way and end Orbax's threads.

        Leaving without this would lose the save: Orbax needs the interpreter alive to finish.
        """
        self.wait()
        for writer, _ in self._spent:
            writer.close()
        self.tidy()
        self._writer.close()

    def best_step(self) -> int | None:
        """Return the best committed step by the metric of `keep_best`, None if there is none yet."""
        return self._keep.best_of(self._metrics())

    def _metrics(self) -> dict[int, dict[str, float]]:
        return self.elsewhere | commits.metrics(self._store)

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Tell whether a step with these metrics would be the best."""
        known = self._metrics()
        new = max(known, default=0) + 1
        return self._keep.best_of(known | {new: dict(metrics)}) == new

    def restore_newest(self, parts: Mapping[str, Part], *, prepare: Callable[[], None] = lambda: None) -> int | None:
        """Restore the newest committed step that is whole; damaged ones are set aside on the way.

        Args:
            parts: The program's parts.
            prepare: Called first, in process 0 alone.

        Returns:
            The restored step, None if the run has no checkpoint yet.

        Raises:
            ConfigError: If the program's state differs from the checkpoint's, or every checkpoint is damaged.
            StorageError: If reading fails.
        """

        def find() -> int | None:
            prepare()
            return self._newest_whole()

        step: int | None = self._group.share("restore", find)
        if step is not None:
            restore(self._store, step, parts)
            self.committed_step = step
        return step

    def _newest_whole(self) -> int | None:
        damaged = []
        # Every numbered directory: one without commit.json was committed by a rename and has lost it since.
        for step in reversed(self._store.numbers(contract.CHECKPOINTS)):
            wrong = commits.problems(self._store, step)
            if not wrong:
                return step
            commits.check_newest(self._store, self._attempt, f"set step {step} aside")
            moved = commits.set_aside(self._store, step, wrong)
            damaged.append(step)
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            self._ledger.append("set_aside", step=step, reason=wrong[0] + more, moved_to=str(moved), durable=True)
            say(f"checkpoint of step {step} is damaged: {wrong[0]}{more}; set aside as {moved}")
        remote = self._store.remote
        if damaged or self._store.names(contract.SET_ASIDE) or (remote is not None and remote.find(contract.SET_ASIDE)):
            raise ConfigError(
                f"every checkpoint of {self._store.url} is damaged and lies in {contract.SET_ASIDE}: "
                "mend the storage, or start again in a new run directory"
            )
        return None

    def check_space(self, nbytes: int) -> None:
        """Refuse a run directory that cannot hold one more checkpoint, before anything is computed.

        Raises:
            ConfigError: With what is needed and what is free, in a run's first attempt.
            StorageError: In a later one: there was room before, and may be again.
        """
        try:
            free = free_bytes(self._store.path)
        except OSError as error:
            raise explain(error, f"cannot look at {self._store.url}") from None
        needed = _with_metadata(nbytes)
        if free < needed:
            kind = StorageError if self._attempt else ConfigError
            raise kind(
                f"{self._store.url} has {show_size(free)} free and one checkpoint takes {show_size(needed)}: "
                "free space there, or choose another run directory"
            )


def _with_metadata(nbytes: int) -> int:
    """Return the bytes that a checkpoint takes on disk: Orbax's metadata comes on top of the state."""
    return int(nbytes * 1.05) + (1 << 20)


def _discard(stage: Path) -> None:
    """Remove a stage that will not be committed, with the temporary directory Orbax keeps beside it."""
    with contextlib.suppress(OSError):
        for path in stage.parent.glob(stage.name + "*"):
            remove_tree(path)
            with contextlib.suppress(OSError):
                path.unlink()  # what `_take_away` put in the way


def _take_away(stage: Path) -> None:
    """Put files where a stage, or Orbax's temporary directory of it, is or would be."""
    for path in (stage.with_name(stage.name + _ORBAX_TMP), stage):
        for number in range(10):  # tensorstore may make the directory again between the two calls
            with contextlib.suppress(OSError):
                os.rename(path, path.with_name(f"{path.name}.gone-{number}"))
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                break


def _beside(stage: Path) -> Path:
    """Return where the processes put files of their own while Orbax, which makes the stage itself, still writes."""
    return stage.with_name(stage.name + ".own")


def _own_files(stage: Path, snapshot: state.Snapshot, process: int) -> dict[str, FileRecord]:
    """Write what belongs to this process alone; measure that and its shards. Process 0's table comes at the commit."""
    directory, shards = _beside(stage), f"{contract.ORBAX_ITEM}/ocdbt.process_{process}"
    names = [contract.of_process(contract.LOCAL, process)]
    with (directory / names[0]).open("wb") as file:
        for array in snapshot.local:
            file.write(array.tobytes())
        file.flush()
        os.fsync(file.fileno())
    if process:
        names.append(contract.of_process(contract.STATE, process))
        with (directory / names[1]).open("w") as file:
            json.dump(_state_json(snapshot), file, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
    measured = commits.measure(stage, [f"{shards}/{name}" for name in files_below(stage / shards)])
    return commits.measure(directory, names) | measured


def _state_json(snapshot: state.Snapshot) -> dict[str, Any]:
    return {"parts": snapshot.table}


def _topology() -> dict[str, int | str]:
    return {
        "process_count": jax.process_count(),
        "device_count": jax.device_count(),
        "platform": jax.default_backend(),
    }

"""Save, commit, retain: saving.py takes one save to its end, commits.py decides what is a checkpoint.

A save has two halves. On the training thread: the state is taken apart and Orbax takes its device-to-host copies. On a
thread of its own: Orbax writes to the stage, the files are made durable, measured and renamed into place, and only then
old steps go. One save is under way at a time; in a run of several processes all of them save the same steps in the same
order.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jobkit import contract, faults, versions
from jobkit.checkpoint import orbax_io, state
from jobkit.checkpoint.apart.restoring import Apart
from jobkit.checkpoint.first_step_check import FirstStepCheck
from jobkit.checkpoint.kinds import Part
from jobkit.checkpoint.restore import read, read_back
from jobkit.checkpoint.saving import Save, SaveState, check_room, with_metadata
from jobkit.checkpoint.schedule import Rates
from jobkit.errors import ConfigError, DamagedError, JobkitError, StorageError, SupersededError, say
from jobkit.group import Group, raise_told, told_error
from jobkit.rundir import commits
from jobkit.rundir.commits import Commit
from jobkit.rundir.files import free_bytes
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.loops import Loops
from jobkit.rundir.retention import Keep
from jobkit.rundir.store import Store
from jobkit.supervise.heartbeat import Heartbeat
from jobkit.supervise.unsaved import NUMBERS, STORAGE, UNCHANGED, Unsaved


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
        stock: Whether stock Orbax shall write.
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
        stock: bool = False,
    ) -> None:
        self._store, self._attempt, self._keep, self._ledger = store, attempt, keep, ledger
        self._unsaved = unsaved or Unsaved(ledger, Heartbeat(None))
        self._busy, self._before_commit = busy, before_commit
        self._group, self._count = group or Group(""), 0
        self._writer = orbax_io.Writer(stock=stock, group=self._group)
        self._spent: list[tuple[orbax_io.Writer, Save]] = []
        """Writers of saves that failed, which would raise what is left of that at the next."""
        self._save: Save | None = None
        """The newest one."""
        self._error: JobkitError | None = None
        self._rehearsed = False
        self.loops = Loops()
        """Which loops were left early; every commit from there on knows."""
        self.first_step_check: FirstStepCheck | None = None
        """Compares what is committed with the step before, until there is a difference."""
        self.elsewhere: dict[int, dict[str, float]] = {}
        """Metrics of steps on the run's URL that are not in this home."""
        self.rates = Rates()
        """How long saves took."""
        self.committed_step = -1
        """Newest step known to be committed, -1 if there is none."""
        self.last: Save | None = None
        """The newest save that was committed."""

    @property
    def _apart(self) -> Apart | None:
        """What processes that share no disk do otherwise; None where they share one."""
        shared = self._store.remote is None or self._group.count == 1
        return None if shared else Apart(self._store, self._group, self._attempt, self._ledger)

    @property
    def saving(self) -> bool:
        """Whether a save is still being written or tidied up after."""
        return self._save is not None and self._save.running

    @property
    def saving_step(self) -> int | None:
        """Step of the save under way."""
        return self._save.step if self._save is not None and self._save.in_flight else None

    @property
    def saving_asked(self) -> bool:
        """Whether the program asked for it, rather than the clock: its metrics may be the best there will be."""
        return self._save is not None and self._save.asked

    @property
    def saving_for_s(self) -> float:
        """How long the save under way has been so."""
        return time.monotonic() - self._save.begun if self._save is not None else 0.0

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
        self._count += 1
        asked = reason == "asked" or bool(metrics)
        save = Save(self._store, self._group, self._count, step=step, attempt=self._attempt, asked=asked)
        faults.reach("before_write")
        try:
            upload = self._store.remote is not None
            self._writer.start(save.stage, snapshot.arrays, snapshot.nbytes, for_upload=upload)
        except Exception as error:
            self._renew_writer(save)
            save.discard()
            raise self._reason(error, f"cannot save step {step} to {self._store.url}", step) from error
        commit = Commit(
            step=step,
            attempt=self._attempt,
            at=time.time(),
            reason=reason,
            files={},
            metrics=dict(metrics),
            topology={
                "process_count": jax.process_count(),
                "device_count": jax.device_count(),
                "platform": jax.default_backend(),
            },
            versions=versions.found(),
            early_stops=[stop for stop in self.loops.early if stop.step <= step],
        )
        self._save = save
        save.start(lambda: self._finish(save, snapshot, commit))

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

    def _finish(self, save: Save, snapshot: state.Snapshot, commit: Commit) -> None:
        """Write, commit, retain: the half of a save that training does not wait for."""
        try:
            faults.reach("during_write")
            new = save.commit(self._writer, snapshot, commit, self._before_commit)
        except Exception as error:
            ended = save.end(SaveState.FAILED)
            self._renew_writer(save)
            if ended is SaveState.ABANDONED:  # then this is what was meant to happen
                self._ledger.append("abandoned", step=commit.step)
                return
            if self._group.first or self._apart is not None:
                save.discard()
            self._fail(error, f"cannot commit step {commit.step} to {self._store.url}", commit)
            return
        save.end(SaveState.COMMITTED)
        self.committed_step = max(self.committed_step, commit.step)
        self.last = save
        self.rates.add((snapshot.nbytes, save.durable_s), reason=commit.reason)
        self._ledger.append(
            "saved" if new else "skipped",
            durable=True,
            step=commit.step,
            reason=commit.reason,
            blocking_s=round(save.blocking_s, 6),
            durable_s=round(save.durable_s, 6),
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
            self._fail(error, "", commit)

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

    def _fail(self, raised: Exception, doing: str, commit: Commit) -> None:
        """Write down, and keep for `take_error`, why a save failed; to be superseded is none of the storage's doing."""
        error = self._reason(raised, doing, commit.step)
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

    def _renew_writer(self, save: Save) -> None:
        """Write the next save with another writer; several processes do not go on after a save that failed."""
        if self._group.count == 1:
            self._spent.append((self._writer, save))
            self._writer = self._writer.another()

    def abandon(self, nbytes: int = 0) -> bool:
        """Break the save in flight off, to make way for a newer one, and wait for that; tell whether it was possible.

        What it has written stays until `tidy`, since to remove a GB takes a third of a second.

        Durability: what was committed before stays; of the step in flight nothing does.

        Args:
            nbytes: What is to be written next: without room for both, what was written goes first.
        """
        if self._save is None or not self._save.running or not self._save.abandon(self._writer):
            return False
        self.wait()
        with contextlib.suppress(OSError):
            if free_bytes(self._store.path) < with_metadata(nbytes):
                self.tidy()
        return True

    def tidy(self) -> None:
        """Remove what saves that failed or were abandoned have left; the next attempt does it where there is no time.

        Again at the end: one of a writer's threads may have written on after another had failed.
        """
        for _, save in self._spent:
            save.discard()

    def _rehearse(self, step: int) -> None:
        """Read the attempt's first commit back the way a restore does: an untested restore is no checkpoint."""
        if self._rehearsed or self._busy():
            return
        begun = time.monotonic()
        wrong = read_back(self._store, step, stop=self._busy)
        if wrong is None:
            return
        if wrong:
            commits.check_newest(self._store, self._attempt, f"set step {step} aside")  # it may have removed the step
            commits.set_aside(self._store, step, wrong)
            self.committed_step = max(commits.steps(self._store), default=-1)
            raise StorageError(f"step {step} of {self._store.url} was written but does not read back: {wrong[0]}")
        self._rehearsed = True
        if self._apart is None:  # else nobody has read the parts of the others
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
        if self._save is not None:
            self._save.wait(timeout_s)

    @property
    def failed(self) -> bool:
        """Whether `take_error` has something to say."""
        return self._error is not None

    def take_error(self) -> JobkitError | None:
        """Return what went wrong on the saving thread since the last call."""
        error, self._error = self._error, None
        return error

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
            prepare: Called before a step is chosen, in process 0 alone, or where they share no disk in all.

        Returns:
            The restored step, None if the run has no checkpoint yet.

        Raises:
            ConfigError: If the program's state differs from the checkpoint's, or every checkpoint is damaged.
            StorageError: If reading fails.
        """

        def find() -> int | None:
            prepare()
            return self._newest_whole()

        if self._apart is not None:
            prepare()
        for turn in itertools.count():
            step: int | None = self._apart.newest(turn) if self._apart else self._group.share(f"restore/{turn}", find)
            if step is None:
                self._refuse_if_all_damaged()
                return None
            if (give_back := self._read(f"read/{turn}", step, parts)) is not None:
                give_back()
                self.committed_step = step
                return step
        raise AssertionError

    def read(self, step: int, parts: Mapping[str, Part]) -> Callable[[], None]:
        """Read a committed step, in every process; as `restore.read`."""
        return self._apart.read(step, parts) if self._apart else read(self._store, step, parts)

    def _read(self, key: str, step: int, parts: Mapping[str, Part]) -> Callable[[], None] | None:
        """Read a step in all processes; return what puts its values into the parts.

        Some of it may be damaged for one process alone: then it is set aside for all, and None returned.
        """
        give_back = None
        mine: dict[str, Any] = {}
        try:
            give_back = self.read(step, parts)
        except DamagedError as error:
            mine = {"damaged": [str(error)]}
        except JobkitError as error:
            if not (wrong := self._lost(step)):
                if self._group.count == 1:
                    raise
                mine = told_error(error)
            else:
                mine = {"damaged": wrong}
        said = self._group.gather(f"{key}/of", mine)

        def judge() -> bool:
            for one in said:
                raise_told(one)
            if wrong := [text for one in said for text in one.get("damaged", [])]:
                self._set_aside(step, wrong)
            return not wrong

        return give_back if self._group.share(key, judge) else None

    def _lost(self, step: int) -> list[str]:
        """Say what of a step that could not be read nobody can read: a bad sector, no passing failure."""
        with contextlib.suppress(JobkitError):
            return commits.problems(self._store, step) if self._apart is None else []
        return []

    def _newest_whole(self) -> int | None:
        """Return the newest step whose files are as committed, but for chunks: those are checked as they are read."""
        # Every numbered directory: one without commit.json was committed by a rename and has lost it since.
        for step in reversed(self._store.numbers(contract.CHECKPOINTS)):
            wrong = commits.problems(self._store, step, values=False)
            if not wrong:
                return step
            self._set_aside(step, wrong)
        return None

    def _refuse_if_all_damaged(self) -> None:
        """Refuse to begin again where there were steps, and none is left."""
        remote = self._store.remote
        if self._store.names(contract.SET_ASIDE) or (remote is not None and remote.find(contract.SET_ASIDE)):
            raise ConfigError(
                f"every checkpoint of {self._store.url} is damaged and lies in {contract.SET_ASIDE}: "
                "mend the storage, or start again in a new run directory"
            )

    def _set_aside(self, step: int, wrong: list[str]) -> None:
        commits.check_newest(self._store, self._attempt, f"set step {step} aside")
        moved = self._apart.set_aside(step, wrong) if self._apart else commits.set_aside(self._store, step, wrong)
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        self._ledger.append("set_aside", step=step, reason=wrong[0] + more, moved_to=str(moved), durable=True)
        say(f"checkpoint of step {step} is damaged: {wrong[0]}{more}; set aside as {moved}")

    def check_space(self, nbytes: int) -> None:
        """Refuse a run directory that cannot hold one more checkpoint, before anything is computed.

        Raises:
            ConfigError: With what is needed and what is free, in a run's first attempt.
            StorageError: In a later one: there was room before, and may be again.
        """
        check_room(self._store, nbytes, StorageError if self._attempt else ConfigError)

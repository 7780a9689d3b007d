r"""One save on its way: written through Orbax to a stage, measured, published. What its end means others decide.

    WRITING ---> PUBLISHING ---> COMMITTED
       |   \_________|_________> FAILED
       |_______________________> ABANDONED

It can be broken off while it is written, and no longer once it is published: what may be a step by the next instant has
to be waited for.

In a run of several processes each writes and measures its part, in a directory of its own; process 0 puts the parts
together and publishes when all have said that theirs are there, and tells the others whether it did. They wait for one
another, so that none of them can break a save off. Where they share no disk (rundir/apart/), each has its part in a
home of its own before process 0 commits.
"""

import contextlib
import enum
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from jobkit import contract, faults
from jobkit.checkpoint.layout import several
from jobkit.checkpoint.orbax_io import Writer, failure, part_of, silence
from jobkit.checkpoint.state import Snapshot
from jobkit.errors import JobkitError, StorageError
from jobkit.group import Group, raise_told, told_error
from jobkit.rundir import commits
from jobkit.rundir.apart import parts
from jobkit.rundir.apart.parts import Part
from jobkit.rundir.commits import Commit, FileRecord
from jobkit.rundir.files import files_below, free_bytes, remove_tree, sync_tree
from jobkit.rundir.store import Store, in_words
from jobkit.units import show_size

_ORBAX_TMP = ".orbax-checkpoint-tmp"
_SAVE_S = 1800.0
"""How long one process may take longer than the first to write its part of a save."""


class SaveState(enum.Enum):
    """How far a save is; the last three are its ends."""

    WRITING = enum.auto()
    PUBLISHING = enum.auto()
    COMMITTED = enum.auto()
    FAILED = enum.auto()
    ABANDONED = enum.auto()


class Save:
    """One save, from its stage to its end; it holds nothing of what is saved.

    Args:
        store: The run directory.
        group: The processes that save together.
        number: Which save of this attempt it is, the same in all processes.
        step: Completed steps.
        attempt: Number of this attempt.
        asked: Whether the program asked for it, rather than the clock.

    Raises:
        JobkitError: If the run directory cannot be written.
    """

    def __init__(self, store: Store, group: Group, number: int, *, step: int, attempt: int, asked: bool) -> None:
        self._store, self._group, self._number = store, group, number
        self.step, self.asked = step, asked
        self.begun = time.monotonic()
        self.blocking_s = self.durable_s = 0.0
        """Seconds that the training thread spent, and from the start to the commit."""
        self.state = SaveState.WRITING
        self._gate = threading.Lock()
        """Held while the state changes: nothing is published that was abandoned."""
        self._apart, self._attempt = group.count > 1 and store.remote is not None, attempt
        self.stage = Path(self._new_stage() if self._apart else group.share(f"stage/{number}", self._new_stage))
        self.thread: threading.Thread | None = None

    def _new_stage(self) -> str:
        return str(commits.new_stage(self._store, self.step, self._attempt))

    def start(self, finish: Callable[[], None]) -> None:
        """Go on in a thread of its own with what training does not wait for."""
        self.blocking_s = time.monotonic() - self.begun
        self.thread = threading.Thread(target=finish, name="jobkit-save")
        self.thread.start()

    @property
    def in_flight(self) -> bool:
        """Whether it has come to no end yet."""
        return self.state in (SaveState.WRITING, SaveState.PUBLISHING)

    @property
    def running(self) -> bool:
        """Whether its thread still works, be it only to tidy up after it."""
        return self.thread is not None and self.thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until its thread has ended."""
        if self.thread is not None:
            self.thread.join(timeout_s)

    def commit(self, writer: Writer, snapshot: Snapshot, commit: Commit, before: Callable[[int], None]) -> bool:
        """Commit what every process has written.

        Args:
            writer: Writes the arrays.
            snapshot: What is saved.
            commit: Its commit.json, without the files.
            before: Called with the step when all data is there.

        Returns:
            Whether the step is new.

        Raises:
            Exception: Whatever kept it from being committed, of Orbax's too.
        """
        together = self._group.count > 1
        own: dict[str, Any] = {}
        try:
            writer.wait()
            faults.reach("after_data")
            before(self.step)
            known = writer.measured
            own["files"] = msgspec.to_builtins(self._own_files(writer, snapshot) if together else self._measured(known))
            own["rows"] = writer.share.rows if writer.share is not None else {}
            if self._apart and not self._group.first:
                own["part"] = self._publish_part(own["files"])
        except Exception as error:
            if not together:
                raise
            own = told_error(failure(error, f"process {self._group.index} cannot write its part"))
        with self._gate:
            self._go_on()
            self.state = SaveState.PUBLISHING
        if not self._group.first:
            self._group.gather(f"written/{self._number}", own)

        def publish() -> dict[str, Any]:
            nonlocal commit
            try:
                sent = self._group.gather(f"written/{self._number}", own, _SAVE_S)
            except TimeoutError as error:
                raise StorageError(f"cannot commit step {self.step} to {self._store.url}: {error}") from None
            for part in sent:
                raise_told(part)
            measured = {
                name: msgspec.convert(record, FileRecord) for part in sent for name, record in part["files"].items()
            }
            if together:
                try:
                    self._put_together(writer, measured, sent)
                except Exception as error:
                    raise failure(error, f"cannot put the parts of step {self.step} together") from error
            table = _state_json(snapshot)
            if self._apart:
                named = {parts.name_of(self.step, at): part["part"] for at, part in enumerate(sent) if at}
                commit = msgspec.structs.replace(commit, parts=named)
            new = commits.publish(self._store, self.stage, state=table, commit=commit, measured=measured)
            return {"new": new, "steps": commits.steps(self._store) if self._apart else []}

        done = self._group.share(f"committed/{self._number}", publish)
        if self._apart and not self._group.first:
            with contextlib.suppress(JobkitError):  # the step is committed; what cannot be removed now can be later
                parts.keep(self._store, self._group.index, done["steps"])
        return bool(done["new"])

    def _publish_part(self, files: dict[str, Any]) -> str:
        """Have this process's part in its home; return its checksum."""
        process = self._group.index
        records = {name: msgspec.convert(record, FileRecord) for name, record in files.items()}
        part = Part(step=self.step, attempt=self._attempt, process=process, files=records)
        return parts.publish(self._store, part_of(self.stage, process), part)

    def _own_files(self, writer: Writer, snapshot: Snapshot) -> dict[str, FileRecord]:
        """Write what belongs to this process alone beside its arrays; make that durable, and measure it.

        Process 0's table comes at the commit.
        """
        process = self._group.index
        part, store = part_of(self.stage, process), contract.store_of(process)
        part.mkdir(exist_ok=True)
        with (part / contract.of_process(contract.LOCAL, process)).open("wb") as file:
            file.writelines(array.tobytes() for array in snapshot.local)
        if process:
            table = json.dumps(_state_json(snapshot), separators=(",", ":"))
            (part / contract.of_process(contract.STATE, process)).write_text(table)
        sync_tree(part)
        own = commits.measure(part, [name for name in _owned(process) if (part / name).exists()])
        if writer.share is not None:
            return own | writer.measured
        return own | commits.measure(self.stage, [f"{store}/{name}" for name in files_below(self.stage / store)])

    def _put_together(self, writer: Writer, files: Iterable[str], sent: list[dict[str, Any]]) -> None:
        """Make one stage of what all processes have written; where they share no disk, of this one's alone."""
        if writer.share is not None:
            os.rename(part_of(self.stage, 0), self.stage)
        self.stage.mkdir(exist_ok=True)
        for process in range(self._group.count):
            part = part_of(self.stage, process)
            for name in (*_owned(process), contract.store_of(process)):
                if (part / name).exists():
                    os.rename(part / name, self.stage / name)
            remove_tree(part)
        here = [name for name in files if not self._apart or not contract.process_of(name)]
        if absent := [name for name in here if not (self.stage / name).exists()]:
            raise StorageError(f"{absent[0]} is not in {self.stage}, though a process has written it")
        if writer.share is not None:
            several.merge(self.stage / contract.ORBAX_ITEM, writer.share.arrays, [one["rows"] for one in sent])

    def _measured(self, known: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
        """Measure what else there is in the stage, as long as the save is wanted."""
        measured = dict(known)
        for name in files_below(self.stage) if self.stage.exists() else ():
            self._go_on()
            if name not in known:
                measured |= commits.measure(self.stage, [name])
        return measured

    def _go_on(self) -> None:
        if self.state is SaveState.ABANDONED:
            raise StorageError("abandoned for a newer save")

    def end(self, state: SaveState) -> SaveState:
        """Come to an end, unless the save was abandoned; return what came of it."""
        with self._gate:
            if self.state is not SaveState.ABANDONED:
                self.state, self.durable_s = state, time.monotonic() - self.begun
            return self.state

    def abandon(self, writer: Writer) -> bool:
        """Break it off, if that is still possible, and tell whether it was; the thread ends soon.

        Stock Orbax cannot be stopped, so its directory is taken away: with a file in its place, the next write fails.
        """
        with self._gate:
            if self._group.count > 1 or self.state is not SaveState.WRITING:
                return False
            self.state = SaveState.ABANDONED
        silence()
        if not writer.cancel():
            _take_away(self.stage)
        return True

    def discard(self) -> None:
        """Remove a stage that will not be committed, with the temporary directory Orbax keeps beside it."""
        with contextlib.suppress(OSError):
            for path in self.stage.parent.glob(self.stage.name + "*"):
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


def _owned(process: int) -> tuple[str, str]:
    """Return the names of the files that one of several processes has for itself, but for its arrays."""
    return contract.of_process(contract.LOCAL, process), contract.of_process(contract.STATE, process)


def _state_json(snapshot: Snapshot) -> dict[str, Any]:
    return {"parts": snapshot.table}


def check_room(store: Store, nbytes: int, kind: type[JobkitError]) -> None:
    """Refuse a run directory that cannot hold one more checkpoint of so many bytes, with an error of this kind."""
    with in_words(f"cannot look at {store.url}"):
        free = free_bytes(store.path)
    needed = with_metadata(nbytes)
    if free < needed:
        raise kind(
            f"{store.url} has {show_size(free)} free and one checkpoint takes {show_size(needed)}: "
            "free space there, or choose another run directory"
        )


def with_metadata(nbytes: int) -> int:
    """Return the bytes that a checkpoint takes on disk: Orbax's metadata comes on top of the state."""
    return int(nbytes * 1.05) + (1 << 20)

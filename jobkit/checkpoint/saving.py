r"""One save on its way: written through Orbax to a stage, measured, published. What its end means others decide.

    WRITING ---> PUBLISHING ---> COMMITTED
       |   \_________|_________> FAILED
       |_______________________> ABANDONED

It can be broken off while it is written, and no longer once it is published: what may be a step by the next instant has
to be waited for.

In a run of several processes each writes and measures its own files; process 0 publishes when it has heard of all, and
the others hear from it whether it did. They wait for one another, so that none of them can break a save off.
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
from jobkit.checkpoint.orbax_io import Writer, failure, silence
from jobkit.checkpoint.state import Snapshot
from jobkit.errors import StorageError
from jobkit.group import Group, raise_told, told_error
from jobkit.rundir import commits
from jobkit.rundir.commits import Commit, FileRecord
from jobkit.rundir.files import files_below, remove_tree
from jobkit.rundir.store import Store

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
        self.stage = Path(group.share(f"stage/{number}", lambda: str(self._new_stage(attempt))))
        self.thread: threading.Thread | None = None

    def _new_stage(self, attempt: int) -> Path:
        stage = commits.new_stage(self._store, self.step, attempt)
        if self._group.count > 1:
            _beside(stage).mkdir()
        return stage

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
        several = self._group.count > 1
        try:
            writer.wait()
            faults.reach("after_data")
            before(self.step)
            known = writer.measured
            measured = _own_files(self.stage, snapshot, self._group.index) if several else self._measured(known)
            own: dict[str, Any] = msgspec.to_builtins(measured)
        except Exception as error:
            if not several:
                raise
            own = told_error(failure(error, f"process {self._group.index} cannot write its part"))
        with self._gate:
            self._go_on()
            self.state = SaveState.PUBLISHING
        sent = self._group.gather(f"written/{self._number}", own, _SAVE_S)

        def publish() -> bool:
            for files in sent:
                raise_told(files)
            if several:
                self.stage.mkdir(exist_ok=True)
                for path in _beside(self.stage).iterdir():
                    os.rename(path, self.stage / path.name)
                _beside(self.stage).rmdir()
            measured = {name: msgspec.convert(record, FileRecord) for files in sent for name, record in files.items()}
            table = _state_json(snapshot)
            return commits.publish(self._store, self.stage, state=table, commit=commit, measured=measured)

        return bool(self._group.share(f"committed/{self._number}", publish))

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


def _beside(stage: Path) -> Path:
    """Return where the processes put files of their own while Orbax, which makes the stage itself, still writes."""
    return stage.with_name(stage.name + ".own")


def _own_files(stage: Path, snapshot: Snapshot, process: int) -> dict[str, FileRecord]:
    """Write what belongs to this process alone; measure that and its shards. Process 0's table comes at the commit."""
    directory, shards = _beside(stage), f"{contract.ORBAX_ITEM}/ocdbt.process_{process}"
    contents: dict[str, Iterable[bytes]] = {
        contract.of_process(contract.LOCAL, process): (array.tobytes() for array in snapshot.local)
    }
    if process:
        table = json.dumps(_state_json(snapshot), separators=(",", ":"))
        contents[contract.of_process(contract.STATE, process)] = [table.encode()]
    for name, content in contents.items():
        with (directory / name).open("wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
    measured = commits.measure(stage, [f"{shards}/{name}" for name in files_below(stage / shards)])
    return commits.measure(directory, contents) | measured


def _state_json(snapshot: Snapshot) -> dict[str, Any]:
    return {"parts": snapshot.table}

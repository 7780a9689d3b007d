"""What a program tells its supervisor while it runs, through a page of shared memory; and how it notices its death.

The supervisor makes a small node-local directory and names it in `JOBKIT_SUPERVISOR`. A path rather than an inherited
descriptor, since launchers in between (`subprocess.run`, a shell, srun) close descriptors but pass the environment on.
It holds
    heartbeat     one record, rewritten in place by the program: pid, phase, step, committed step, time
    notice.json   what is known of a notice, before the program is signalled: source, reason, deadline
    unsaved.json  by the program, while what it trains is not saved: the event that says so (see unsaved.py)
    stacks        the program's Python stacks, written on SIGQUIT (see stacks.py)
    owner         whose it is: the number of the attempt and the run directory
    alive         a named pipe whose write end the supervisor keeps open: it hangs up when the supervisor is gone
"""

import contextlib
import enum
import json
import mmap
import os
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobkit import names

_RECORD = struct.Struct("<IIqqqq")  # version, pid, phase, step, committed step, time (CLOCK_MONOTONIC, ns)
_VERSION = 2
_UNSAVED = "unsaved.json"


class Phase(enum.IntEnum):
    """What a program is doing; a watchdog budgets each apart."""

    STARTING = 0
    """Imports; no signal handler of ours yet."""
    LISTENING = 1
    """A notice will be served from here on."""
    RESTORING = 2
    FIRST_STEP = 3
    """Compiling, mostly."""
    STEPPING = 4
    SAVING = 5
    """The loop waits for a save."""
    STOPPING = 6
    """Saving on notice."""
    FINISHED = 7
    """The last step is done; what follows is the program's own."""
    STOPPED = 8
    """Committed on notice and leaving, whatever a shell around the program makes of its exit code."""

    @property
    def words(self) -> str:
        """The phase as a person reads it: 'first step'."""
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class Beat:
    """One reading of the heartbeat.

    Args:
        step: Completed steps, -1 before the run's state is known.
        committed_step: Newest committed step, -1 if there is none.
        at_s: When it was written, on the clock of `time.monotonic` of this machine.
    """

    pid: int = 0
    phase: Phase = Phase.STARTING
    step: int = -1
    committed_step: int = -1
    at_s: float = 0.0


@dataclass(frozen=True)
class ShownNotice:
    """What a supervisor shows of a notice.

    Args:
        deadline_at: When the program is killed, on the clock of `time.monotonic` of this machine; None: unknown.
    """

    source: str
    reason: str
    deadline_at: float | None


class Heartbeat:
    """The program's end: one assignment per step, a fraction of a microsecond.

    Args:
        directory: The supervisor's directory; None (no supervisor) makes a heartbeat that nobody reads.
    """

    def __init__(self, directory: Path | None) -> None:
        self._page: mmap.mmap | bytearray = bytearray(_RECORD.size)
        if directory is not None:
            try:
                with open(directory / "heartbeat", "r+b") as file:
                    self._page = mmap.mmap(file.fileno(), _RECORD.size)
            except (OSError, ValueError):
                pass  # a supervisor on another node or of another version: training goes on unwatched
        self._directory = directory
        self._pid = os.getpid()
        self.phase = Phase.STARTING
        self.step = -1
        self.committed_step = -1

    @property
    def completed(self) -> int:
        """Completed steps; 0 before the run's state is known."""
        return max(0, self.step)

    def beat(self) -> None:
        """Publish phase, step and committed step as they stand now; only the loop does, for this is its progress."""
        _RECORD.pack_into(
            self._page, 0, _VERSION, self._pid, self.phase, self.step, self.committed_step, time.monotonic_ns()
        )

    def enter(self, phase: Phase) -> None:
        """Change phase and publish."""
        self.phase = phase
        self.beat()

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Be in a phase for a while, and then in the one before it again."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def show_unsaved(self, event: Mapping[str, Any] | None) -> None:
        """Show the event that says which step is not saved, and why; None once one is."""
        if self._directory is None:
            return
        with contextlib.suppress(OSError):  # a full /dev/shm, or a supervisor that is gone
            if event is None:
                (self._directory / _UNSAVED).unlink()
            else:
                _replace(self._directory / _UNSAVED, event)

    def bury(self) -> None:
        """Remove the directory of a supervisor that is gone."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


SHARED = Path("/dev/shm")


def _made_in(root: Path | None, owner: bytes) -> Path:
    """Make a supervisor's directory; on an error nothing is left behind."""
    directory = None
    try:
        directory = Path(tempfile.mkdtemp(prefix="jobkit-", dir=root))
        (directory / "heartbeat").write_bytes(bytes(_RECORD.size))
        (directory / "owner").write_bytes(owner)
        os.mkfifo(directory / "alive", 0o600)
    except OSError:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory


class Link:
    """The supervisor's end: makes the directory, reads the heartbeat, is the write end of the alive pipe.

    Args:
        run: The run directory on this node.
        attempt: Number of the attempt.

    Raises:
        OSError: If neither memory nor the system's directory for temporary files has room for it.
    """

    def __init__(self, run: Path, attempt: int) -> None:
        owner = f"{attempt} ".encode() + os.fsencode(run)
        try:
            self.directory = _made_in(SHARED, owner)
        except OSError:  # absent, read-only, or full: Docker gives a container 64 MB
            self.directory = _made_in(None, owner)
        # Read and write, so that opening does not wait for a reader. Not inherited by children, or the pipe would
        # never hang up.
        self._alive = os.open(self.directory / "alive", os.O_RDWR | os.O_CLOEXEC)

    def read(self) -> Beat:
        """Return the newest heartbeat; an empty one before the program's first."""
        return read_beat(self.directory)

    def show_notice(self, source: str, reason: str, deadline_at: float | None) -> None:
        """Show what is known of a notice; the program reads it when a signal comes, or a little later.

        Args:
            source: Where it came from.
            reason: What is known of the cause, for a person.
            deadline_at: When the program is killed, on the clock of `time.monotonic`; None where nobody said.
        """
        notice = {"source": source, "reason": reason, "deadline_at": deadline_at}
        with contextlib.suppress(OSError):  # a full /dev/shm: the signal alone is a notice too
            _replace(self.directory / "notice.json", notice)

    def close(self) -> None:
        """Remove the directory."""
        os.close(self._alive)
        shutil.rmtree(self.directory, ignore_errors=True)


def belongs(directory: Path, run: Path, attempt: int) -> bool:
    """Tell whether a supervisor's directory is that of an attempt, whatever a file of the run calls it.

    Args:
        directory: What may be it.
        run: The run directory on this node.
        attempt: Number of the attempt.
    """
    try:
        if not stat.S_ISDIR(os.lstat(directory).st_mode):
            return False
        with open(directory / "owner", "rb", opener=names.opener) as file:
            number, _, path = file.read(1 << 13).partition(b" ")
        return number == str(attempt).encode() and os.path.samefile(path, run)
    except (OSError, ValueError):
        return False


def read_beat(directory: Path) -> Beat:
    """Return the newest heartbeat in a supervisor's directory; an empty one where there is none."""
    try:
        version, pid, phase, step, committed, at_ns = _RECORD.unpack((directory / "heartbeat").read_bytes())
        if version == _VERSION:
            return Beat(pid, Phase(phase), step, committed, at_ns / 1e9)
    except (OSError, ValueError, struct.error):
        pass
    return Beat()


def read_unsaved(directory: Path) -> dict[str, Any] | None:
    """Return what the program says that it could not save, None if it says nothing."""
    try:
        event = json.loads((directory / _UNSAVED).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content))
    os.rename(new, path)


def read_notice(directory: Path) -> ShownNotice | None:
    """Return what the supervisor shows of a notice, None if it shows nothing."""
    try:
        notice = json.loads((directory / "notice.json").read_bytes())
        deadline_at = notice["deadline_at"]
        return ShownNotice(
            str(notice["source"]), str(notice["reason"]), None if deadline_at is None else float(deadline_at)
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def open_alive(directory: Path) -> int | None:
    """Open the read end of the alive pipe, None where there is none.

    Returns:
        A descriptor on which `select.poll` reports POLLHUP once the supervisor is gone.
    """
    try:
        pipe = os.open(directory / "alive", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    # A pipe hangs up only if it had a writer since it was opened: else one that is gone already would not be missed.
    with contextlib.suppress(OSError):
        os.close(os.open(directory / "alive", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    return pipe

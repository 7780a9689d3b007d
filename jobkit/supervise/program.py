"""The program of one attempt: CMD and all that it starts, from the start to the last of them that is reaped."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from jobkit import compilecache, contract, names
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir import commits, remote_steps
from jobkit.rundir.store import Store, explain
from jobkit.supervise import processes
from jobkit.supervise.heartbeat import Link, Phase
from jobkit.supervise.oom import Memory

_LEFTOVER_S = 5.0
"""What CMD leaves running when it ends gets this long between SIGTERM and SIGKILL."""
_SAVING_S = 60.0
"""A program that outlives the shell around it gets this long to end by itself, since it may be saving."""
_JAX = "JAX has removed its internal frames from the traceback"
"""JAX ends an error that was raised below its own functions with this, after a line of dashes."""


@dataclass(frozen=True)
class Attempt:
    """One attempt as its supervisor begins it.

    Args:
        store: The run directory.
        number: Number of the attempt.
        process: Index of our program in the attempt, and how many there are.
        command: CMD with its arguments.
        cwd: Where it runs; None for here.
        started: When, in seconds since the epoch.
        started_at: The same on the clock of `time.monotonic`.
    """

    store: Store
    number: int
    process: tuple[int, int]
    command: Sequence[str]
    cwd: Path | None
    started: float = field(default_factory=time.time)
    started_at: float = field(default_factory=time.monotonic)

    @property
    def log(self) -> Path:
        """Where the program's output goes."""
        return self.store.file(contract.log_file(self.number, self.process[0]))

    @property
    def alone(self) -> bool:
        """Whether the attempt has no other processes."""
        return self.process[1] == 1

    @property
    def writer(self) -> str:
        """Name of this supervisor's ledger."""
        return "supervisor" if self.process[0] == 0 else f"supervisor-{self.process[0]}"


_OF_ERRORS = (1, 2, 126)
"""Exit codes of Python after a traceback, and without its script; of a shell that cannot run a program."""
_NOBODY = "the JAX distributed service detected fatal errors"
"""What JAX's client says as it aborts a process whose service, or whose peer, does not answer any more."""
_GONE = (errno.EIO, errno.ESTALE, errno.ESHUTDOWN)
"""What a shared file system says while its server is away: NFS the first two, Lustre the third."""
_AWAY = re.compile(rf"\[Errno (?:{'|'.join(map(str, _GONE))})\]|: (?:{'|'.join(map(os.strerror, _GONE))})(?:$|:)")


_AHEAD_S = 10.0
"""A bucket that does not answer for so long is left to the program."""
_PART = 2
"""A step is left on the disk if it is larger than this part of the free memory."""
_AHEAD_BYTES = 128 << 10
"""Linux reads no more than this at one call, on most disks: what they read ahead by themselves."""


def get_ready(store: Store, attempt: int) -> None:
    """Have the newest step at hand by the time that the program, which is starting, restores it."""
    if store.remote is not None:
        with contextlib.suppress(JobkitError, OSError):  # the program says what is wrong
            remote_steps.fetch_ahead(store.with_deadline(_AHEAD_S), attempt=attempt)
    read_ahead(store)


def read_ahead(store: Store) -> bool:
    """Have the system read the newest committed step while the program imports; tell whether it was asked to.

    What is wrong with the step a restore says.
    """
    with contextlib.suppress(JobkitError, OSError):
        step = max(commits.steps(store), default=None)
        if step is None or (commit := commits.read(store, step)).nbytes > Memory().spare_bytes() // _PART:
            return False
        for name, nbytes in commit.sizes.items():
            with open(store.file(f"{contract.step_dir(step)}/{name}"), "rb", opener=names.opener) as file:
                for at in range(0, nbytes, _AHEAD_BYTES):
                    os.posix_fadvise(file.fileno(), at, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        return True
    return False


class Program:
    """CMD, in a process group of its own.

    Args:
        attempt: What is run.
        link: What it shares with us.
    """

    def __init__(self, attempt: Attempt, link: Link) -> None:
        self._attempt, self._link = attempt, link
        self.pid = 0
        self.codes: dict[int, int] = {}
        """Exit codes of everything reaped, by pid; negative for a death by signal."""
        self._ended_at = 0.0
        self._copied_bytes = 0

    @property
    def ended(self) -> bool:
        """Whether CMD itself has ended; what it started may live."""
        return self.pid in self.codes

    def start(self) -> str:
        """Start CMD, its output straight into the attempt's log; return why it cannot be started, '' if it is.

        Raises:
            JobkitError: If the log cannot be written.
        """
        with self._attempt.store.insist(self._open_log) as log:
            try:
                self._start(log)
                if self._attempt.alone:  # nobody waits for it
                    ready = (self._attempt.store, self._attempt.number)
                    threading.Thread(target=get_ready, args=ready, daemon=True).start()
                return ""
            except ConfigError as error:
                with contextlib.suppress(OSError):
                    log.write(f"jobkit: {error}\n".encode())
                return str(error)

    def _open_log(self) -> IO[bytes]:
        try:
            return open(self._attempt.log, "ab", buffering=0, opener=names.opener)
        except OSError as error:
            raise explain(error, f"cannot write {self._attempt.log}") from None

    def _start(self, log: IO[bytes]) -> None:
        attempt = self._attempt
        environment = os.environ | {
            contract.ENV_RUN: attempt.store.url,
            contract.ENV_ATTEMPT: str(attempt.number),
            contract.ENV_SUPERVISOR: str(self._link.directory),
            contract.ENV_PROCESS: str(attempt.process[0]),
            contract.ENV_PROCESSES: str(attempt.process[1]),
            "PYTHONUNBUFFERED": os.environ.get("PYTHONUNBUFFERED", "1"),
        }
        environment |= compilecache.environment(attempt.store, environment)
        for ours in filter(lambda variable: variable.ends_here, contract.VARIABLES):
            environment.pop(ours.name, None)
        try:
            # CMD's group is its own, so that a Ctrl-C at our terminal reaches it once, through us.
            process = subprocess.Popen(
                attempt.command,
                cwd=attempt.cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        except FileNotFoundError as error:
            if attempt.cwd is not None and not attempt.cwd.is_dir():
                message = f"the directory {attempt.cwd} does not exist: submit again from one that does"
                raise ConfigError(message) from error
            raise ConfigError(
                f"the command {attempt.command[0]!r} was not found: give its path, or install it where the job runs"
            ) from error
        except OSError as error:
            if error.errno in _GONE:
                raise explain(error, f"cannot start {attempt.command[0]!r}") from error
            raise ConfigError(f"the command {attempt.command[0]!r} cannot be started: {error.strerror}") from error
        process.returncode = 0  # reaped by our own waitpid: keeps Popen's destructor from looking for it
        self.pid = process.pid

    def look(self) -> bool:
        """Reap what has ended, and copy what was printed to our own output; tell whether CMD has ended."""
        self.codes.update(processes.reaped())
        self.copy_log()
        if self.ended and not self._ended_at:
            self._ended_at = time.monotonic()
        return self.ended

    def send(self, number: int) -> None:
        """Signal the process that listens for a notice, else CMD itself.

        A SIGTERM that comes during imports ends the program at once: no step was done, so nothing is lost, and its node
        is free sooner than if it were held back.
        """
        beat = self._link.read()
        listens = beat.phase >= Phase.LISTENING and beat.pid in processes.descendants()
        target = beat.pid if listens else self.pid
        if target in self.codes or not target:  # it has ended, or was not started yet
            return
        # What does not listen to a notice knows SIGTERM; SIGUSR1 or SIGHUP would be taken for something else.
        sent = number if listens or number in (signal.SIGKILL, signal.SIGINT) else signal.SIGTERM
        processes.send(target, signal.SIGTERM if sent == signal.SIGHUP else sent)

    def end_leftovers(self) -> bool:
        """End what CMD, which has ended, left running; tell whether something still is that is ours to end."""
        left = processes.descendants()
        if not left:
            return False
        beat = self._link.read()
        saving = beat.pid in left and Phase.LISTENING <= beat.phase <= Phase.STOPPING
        late = time.monotonic() - self._ended_at >= (_SAVING_S if saving else _LEFTOVER_S)
        # While the program saves, it alone is asked: its worker processes must live until it is through.
        asked = [beat.pid] if saving and not late else left
        sent = [processes.send(pid, signal.SIGKILL if late else signal.SIGTERM) for pid in asked]
        return any(sent)

    def copy_log(self) -> None:
        """Copy what the log has grown by to our own output, unless that is closed."""
        if sys.stdout is None:
            return
        with contextlib.suppress(OSError), open(self._attempt.log, "rb", opener=names.opener) as log:
            log.seek(self._copied_bytes)
            while chunk := log.read(1 << 16):
                self._copied_bytes += len(chunk)
                sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()

    @property
    def lost_its_disk(self) -> bool:
        """Whether CMD ended itself because a file that it read, its code say, was not to be had just then."""
        return self.codes.get(self.pid) in _OF_ERRORS and _AWAY.search(self.last_line()) is not None

    @property
    def lost_the_others(self) -> bool:
        """Whether JAX ended CMD because another process of the attempt was not to be reached."""
        aborted = (-signal.SIGABRT, 128 + signal.SIGABRT)  # the latter of a shell
        return self.codes.get(self.pid) in aborted and _NOBODY in self._tail(1 << 16)

    def _tail(self, nbytes: int) -> str:
        """Return the end of the log, empty where it cannot be read."""
        try:
            with open(self._attempt.log, "rb", opener=names.opener) as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - nbytes))
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    def last_line(self) -> str:
        """Return the last line of the log, which knows best why the program ended itself."""
        stripped = (line.strip() for line in reversed(self._tail(4096).split("\n")))
        return textwrap.shorten(next((line for line in stripped if line.strip("-") and _JAX not in line), ""), 500)

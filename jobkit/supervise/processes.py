"""Processes of this machine: who is whose child, who is alive, what belongs to a run; signals; a port to meet at.

Linux answers through /proc and prctl; elsewhere the answers are empty and the callers do without. The scan of
/proc/<pid>/stat is used rather than /proc/<pid>/task/*/children, which needs a kernel option (CONFIG_PROC_CHILDREN)
and is documented as unreliable while the children run (proc(5)). Not psutil either: its family tree fails as a whole
where /proc is mounted with hidepid=1.
"""

import contextlib
import ctypes
import os
import random
import select
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def become_subreaper() -> bool:
    """Make orphaned descendants of this process its children, instead of init's; tell whether it worked."""
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


class Signals:
    """Signals that a loop waits for, and the deaths of children: their handlers only wake it.

    Args:
        numbers: The signals.
    """

    def __init__(self, *numbers: signal.Signals) -> None:
        self._numbers = numbers
        self.first: int | None = None
        """The first that came."""

    def listen(self) -> None:
        """Install the handlers; on the main thread only."""
        self._wakeup, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in self._numbers:
            signal.signal(number, self._note)
        # Who starts us may have held them back until we can listen: a PID 1 would lose them (docker/Dockerfile).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or number

    def wait(self, seconds: float) -> list[int]:
        """Wait until something comes, at most so long; return the signals that came, in order."""
        # Not `poll`, which fails where no file may be opened any more (EINVAL, poll(2)).
        came = os.read(self._wakeup, 512) if select.select([self._wakeup], [], [], seconds)[0] else b""
        return [number for number in came if number in self._numbers]


def reaped() -> Iterator[tuple[int, int]]:
    """Reap the children that have ended, orphans too; yield pid and exit code, negative for a death by signal."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, os.waitstatus_to_exitcode(status)


def signal_on_parent_death(number: int) -> bool:
    """Ask the kernel to send this process a signal when its parent dies; tell whether it worked.

    The parent may have died already: the caller compares `os.getppid()` afterwards.
    """
    return _prctl(_PR_SET_PDEATHSIG, number)


def _prctl(option: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def descendants(pid: int | None = None) -> list[int]:
    """Return all processes below a process, its children first, zombies included; below this process by default."""
    offspring: dict[int, list[int]] = {}
    for child in _pids():
        if (entry := _stat(child)) is not None:
            offspring.setdefault(entry[1], []).append(child)
    pids: list[int] = []
    waiting = [os.getpid() if pid is None else pid]
    while waiting:
        below = offspring.get(waiting.pop(), [])
        pids += below
        waiting += below
    return pids


def send(pid: int, number: int) -> bool:
    """Send a signal to a process that may be gone; tell whether it was not refused, as for another user's process."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return True


def alive(pid: int) -> bool:
    """Tell whether a process exists and is not a zombie."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return state(pid) not in ("Z", "X")


def state(pid: int) -> str:
    """Return a process's state as proc(5) has it: R, S, D (in the kernel), T (stopped), t (traced), Z; '' if gone."""
    entry = _stat(pid) if pid > 0 else None
    return entry[0] if entry is not None else ""


def with_environment(name: str, value: str) -> dict[int, dict[str, str]]:
    """Return the live processes of this user that were started with `name=value` in their environment, and that.

    This finds what no family tree finds: trainers whose supervisor and runner were both killed.
    """
    environments = {}
    for pid in _pids():
        try:
            lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="surrogateescape").split("\0")
        except OSError:
            continue  # gone meanwhile, a kernel thread's, or another user's
        if f"{name}={value}" in lines:
            environments[pid] = dict(line.split("=", 1) for line in lines if "=" in line)
    return environments


def _pids() -> list[int]:
    try:
        return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
    except OSError:
        return []


def _stat(pid: int) -> tuple[str, int] | None:
    """Return (state letter, parent) of a process; its command name may hold spaces and parentheses."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[1])
    except (OSError, IndexError, ValueError):
        return None


def free_port() -> int:
    """Choose a port that nobody listens on, below those that the kernel hands out by itself."""
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port

"""The lock of a run: held exactly while a local runner or a supervisor of the run lives.

It is a flock on an open file that the submitting process hands to the runner and the runner to the supervisor, so
there is no instant between them at which it is free, and no SIGKILL can leave it behind. It is never unlocked, only
closed: LOCK_UN would take it from the heirs too.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jobkit import contract, decode, names
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.store import Store, explain
from jobkit.supervise import processes
from launch.lifecycle import lease

PROBE_S = 0.3
"""How long to try against a lock that `held` may be probing right now; a probe takes microseconds."""


class RunLock:
    """A held lock.

    Args:
        store: The run.
        descriptor: Where it is held, in this process.
    """

    def __init__(self, store: Store, descriptor: int) -> None:
        self._store = store
        self.descriptor = descriptor

    def sign(self, pid: int) -> None:
        """Write down who holds the lock, for people and for `cancel`."""
        content = json.dumps({"pid": pid, "host": socket.gethostname(), "since": time.time()}).encode()
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, content, 0)

    def close(self) -> None:
        """Give up this process's share; the lock is free when the last share is closed."""
        os.close(self.descriptor)


@dataclass(frozen=True)
class Claim:
    """What keeps others from starting a run while somebody does: nothing, where the backend knows itself who runs it.

    Args:
        lock: The run's lock, which goes to the runner.
        lease: The number of the lease that the runner is to hold; None to take one.
    """

    lock: RunLock | None = None
    lease: int | None = None

    def free(self, store: Store) -> None:
        """Let others start the run."""
        try:
            if self.lease is not None:
                lease.release(store, self.lease)
        finally:
            if self.lock is not None:
                self.lock.close()


def acquire(store: Store, *, wait_s: float = PROBE_S) -> RunLock | None:
    """Take the lock of an existing run directory, None if it stays held for `wait_s`.

    Raises:
        ConfigError: If the directory is not writable.
    """
    path = store.file(contract.LOCK)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            descriptor = names.opener(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise explain(error, f"cannot write {path}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A submit that failed removes what it made: a lock on a removed file locks nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return RunLock(store, descriptor)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise explain(error, f"cannot lock {path}") from None
        os.close(descriptor)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.02)


@contextlib.contextmanager
def acquired(store: Store, *, wait_s: float) -> Iterator[RunLock]:
    """Take the lock, after whoever starts the run this very moment; on an error inside it is free again.

    Raises:
        ConfigError: If it stays held for `wait_s`.
    """
    lock = acquire(store, wait_s=wait_s)
    if lock is None:
        by = f"pid {holder(store).get('pid', 'unknown')}"
        raise ConfigError(f"run {store.url} is being started this very moment ({by}): 'jobkit status {store.url}'")
    try:
        lock.sign(os.getpid())
        yield lock
    except BaseException:
        lock.close()
        raise


def held(store: Store) -> bool:
    """Tell whether a runner or supervisor of the run lives.

    Raises:
        StorageError: If the storage does not answer: that says nothing of a runner.
    """
    try:
        descriptor = store.insist(lambda: _open_to_look(store))
    except ConfigError:  # somebody else's run
        return False
    if descriptor is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(descriptor)
    return False


def _open_to_look(store: Store) -> int | None:
    try:
        return names.opener(store.file(contract.LOCK), os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise explain(error, f"cannot look at {store.file(contract.LOCK)}") from None


def holder(store: Store) -> dict[str, Any]:
    """Return who signed the lock last: pid, host, since; empty if nobody did."""
    try:
        return decode.fields(decode.json_object(store.read(contract.LOCK)) or {})
    except (FileNotFoundError, JobkitError):
        return {}


def runner_alive(store: Store) -> bool:
    """Tell whether the process that signed a held lock lives, as far as this machine can see."""
    signed = holder(store)
    if signed.get("host") != socket.gethostname():
        return bool(signed)
    pid = signed.get("pid")
    return isinstance(pid, int) and processes.alive(pid)


@contextlib.contextmanager
def cancel_mutex(store: Store) -> Iterator[None]:
    """Hold back everyone else who writes or removes cancel.json; a moment only."""
    descriptor = os.open(store.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

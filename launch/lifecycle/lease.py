"""Which machine's local runner has a run, and how fresh its last sign of life is.

The lock (lock.py) is seen on one machine only: the home of a run in a bucket is a node's own, and not every shared disk
passes locks on. So a runner also holds a lease, `leases/N` on the run's URL, which it writes again every minute. The
newest number has the run. A lease is taken by conditional creation, so that of several that try one gets it; whose
number is not the newest any more starts no further attempt. How old a sign is only the storage's own clock says: when
the lease was written, against when an object was that is written just now. No machine's clock is compared.
"""

import contextlib
import hashlib
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from jobkit import contract, names
from jobkit.errors import ConfigError, JobkitError, StorageError
from jobkit.patience import at_once
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store
from jobkit.units import show_duration

RENEW_S = 60.0
STALE_S = 600.0
"""A runner that has not given a sign for so long is taken for dead: its machine is off, or cannot reach the storage."""
_PATIENCE_S = 10.0
"""How long a bucket may take to answer the runner; it has an attempt to start, and looks again in a minute."""
_END_S = 5.0
"""How long it may take from the end of a run in its ledger to the end of its lease."""
_TRIES = 5
_LONGEST_HOST = 253
"""Letters of a host's name, as DNS has it; whoever may write there chooses it."""
_HOME = ".home"
"""Tells the home of a run in a bucket on this node from those on others, whatever they are called."""


class _Content(msgspec.Struct, kw_only=True):
    host: str
    kernel: str
    machine: str = ""
    pid: int
    home: str
    token: str
    over: bool = False


@dataclass(frozen=True)
class Holder:
    """Who took a run last.

    Args:
        number: Of its lease.
        token: The same as long as nobody else makes a lease of that number.
        host: Its machine.
        here: Whether its lock would be seen here, so that the lock tells whether it lives.
        over: Whether it has said that it is through.
        sign_s: How many seconds ago its last sign of life was; None where that cannot be told.
    """

    number: int
    token: str
    host: str
    here: bool
    over: bool
    sign_s: float | None

    @property
    def elsewhere(self) -> bool:
        """Whether it may well be alive on another machine."""
        return not (self.here or self.over) and (self.sign_s is None or self.sign_s < STALE_S)

    @property
    def place(self) -> str:
        """Where it is, for a person."""
        return shown(self.host, self.sign_s)


def shown(host: str, sign_s: float | None) -> str:
    """Say where a runner is, and how fresh its last sign: 'HOST (last sign 12 s ago)'."""
    ago = "unknown, since this account cannot write there" if sign_s is None else f"{show_duration(sign_s)} ago"
    return f"{host} (last sign {ago})"


def newest(store: Store) -> Holder | None:
    """Return who took a run last, None if nobody has.

    Raises:
        JobkitError: If the storage does not answer.
    """
    for _ in range(_TRIES):
        if not (numbers := _numbers(store)):
            return None
        name = _name(numbers[-1])
        try:
            content, written = _place(store).read(name), _modified(store, name)
        except FileNotFoundError:
            continue  # the run was removed this very moment
        try:
            lease = msgspec.json.decode(content, type=_Content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            lease = _Content(host="a machine that is not known", kernel="?", pid=0, home="", token="")
        # Containers of one machine have names of their own, and one kernel that keeps their locks. A machine that was
        # switched on again has another kernel, and many are called localhost.
        near = lease.kernel == _kernel() or (lease.host, lease.machine) == (socket.gethostname(), _machine())
        here = near and lease.home == _home(store)
        sign_s = None if here or lease.over else _since(store, written)
        return Holder(numbers[-1], lease.token, lease.host[:_LONGEST_HOST], here, lease.over, sign_s)
    raise StorageError(f"{store.url} lists {name}, which is not there")


def elsewhere(store: Store) -> Holder | None:
    """Return the runner that has a run on another machine, as far as its signs tell; None if there is none.

    A storage that does not answer is no sign of a death: then it is who was seen last.
    """
    try:
        _SEEN[store.url] = holder = newest(store)
    except StorageError:
        holder = _SEEN.get(store.url)
    return holder if holder is not None and holder.elsewhere else None


_SEEN: dict[str, Holder | None] = {}


def refuse_elsewhere(store: Store) -> None:
    """Raise ConfigError if a run has a runner on another machine."""
    if (holder := newest(store)) is not None and holder.elsewhere:
        raise ConfigError(_says_elsewhere(store, holder))


def _says_elsewhere(store: Store, holder: Holder) -> str:
    return (
        f"run {store.url} is running on {holder.place}: 'jobkit cancel {store.url}' ends it there; if that machine is "
        f"gone it counts as dead {show_duration(STALE_S)} after its last sign, and 'jobkit resume --take-over "
        f"{store.url}' does not wait for that"
    )


def claim(store: Store, *, take_over: bool = False, leaving: bool = False) -> int:
    """Take a run for a runner of this machine, whose lock is held; return the number of the lease.

    Args:
        store: The run.
        take_over: Whether to take it from a runner that gives signs of life elsewhere; that one then stops.
        leaving: Whether the run has ended, so that its runner can only be about to say that it is through.

    Durability: on storage on return. Of several callers exactly one gets the run.

    Raises:
        ConfigError: If it has a runner on another machine.
        JobkitError: If the storage does not answer.
    """
    deadline = time.monotonic() + _END_S
    while True:
        holder = newest(store)
        if holder is not None and holder.elsewhere and not take_over:
            if not leaving or time.monotonic() >= deadline:
                raise ConfigError(_says_elsewhere(store, holder))
            time.sleep(0.5)
            continue
        number = 0 if holder is None else holder.number + 1
        if _place(store).create(_name(number), _content(store)):
            with contextlib.suppress(JobkitError):  # of probes that were killed
                if store.remote is not None:
                    store.remote.remove(name for name in store.remote.find(contract.LEASES) if "/clock-" in name)
            return number
        take_over = False  # somebody was faster


def release(store: Store, number: int) -> None:
    """Say that a lease is over, so that nobody has to wait until it is stale.

    Raises:
        JobkitError: If the storage does not answer.
    """
    _place(store).write(_name(number), _content(store, over=True))


class Lease:
    """A lease that this process holds, renewed by a thread until closed.

    Args:
        store: The run.
        number: As `claim` returned it.
    """

    def __init__(self, store: Store, number: int) -> None:
        self._store, self._number = store.patient(at_once).with_deadline(_PATIENCE_S), number
        self._token = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jobkit-lease", daemon=True)
        self.lost = ""
        """Who has taken over, once somebody has: no further attempt may be started."""

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def look(self) -> bool:
        """See whether somebody has taken over; tell whether the storage has answered."""
        try:
            holder = newest(self._store)
        except (JobkitError, OSError):
            return False
        if holder is not None and holder.number == self._number:
            self._token = self._token or holder.token
        # With our number, but another's: the run was deleted, and submitted anew elsewhere.
        if holder is not None and (holder.number, holder.token) != (self._number, self._token):
            self.lost = f"the run was taken over by a runner on {holder.host}"
        return True

    def close(self) -> None:
        """End it, and say so unless somebody else has the run."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self.look()
        if not self.lost:
            with contextlib.suppress(JobkitError, OSError):
                release(self._store, self._number)

    def _run(self) -> None:
        while not self._closing.is_set():
            self.look()
            if self.lost:
                return
            with contextlib.suppress(JobkitError, OSError):
                _place(self._store).write(_name(self._number), _content(self._store, token=self._token))
            self._closing.wait(RENEW_S)


def _name(number: int) -> str:
    return f"{contract.LEASES}/{number}"


def _content(store: Store, *, token: str = "", over: bool = False) -> bytes:
    if store.remote is not None:
        store.create(_HOME, secrets.token_hex(16))
    content = _Content(
        host=socket.gethostname(),
        kernel=_kernel(),
        machine=_machine(),
        pid=os.getpid(),
        home=_home(store),
        token=token or secrets.token_hex(8),
        over=over,
    )
    return msgspec.json.encode(content)


def _kernel() -> str:
    """Return what tells this machine, since it was switched on, from any other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return secrets.token_hex(16)


def _machine() -> str:
    """Return what tells this installation from others of its name; machine-id(5) itself is to be kept confidential."""
    try:
        identity = Path("/etc/machine-id").read_bytes().strip()
    except OSError:
        return ""
    return hashlib.sha256(b"jobkit lease " + identity).hexdigest()[:16]


def _home(store: Store) -> str:
    """Return what tells this home from that of another node; the run directory itself is one for all."""
    if store.remote is None or not store.exists(_HOME):
        return ""
    return store.read(_HOME).decode(errors="replace")


def _numbers(store: Store) -> list[int]:
    if store.remote is None:
        return store.numbers(contract.LEASES)
    numbers = (names.number(name.removeprefix(f"{contract.LEASES}/")) for name in store.remote.find(contract.LEASES))
    return sorted(number for number in numbers if number is not None)


def _place(store: Store) -> Store | Remote:
    """Return where leases lie: on the run's URL, where all machines see them."""
    return store if store.remote is None else store.remote


def _modified(store: Store, name: str) -> float:
    if store.remote is not None:
        return store.remote.modified(name)
    if (info := store.stat(name)) is None:
        raise FileNotFoundError(name)
    return info.st_mtime


_OFFSETS: dict[str, tuple[float, float]] = {}
"""By URL: how far an object store's clock is ahead of this machine's uptime, and when it was asked."""


def _since(store: Store, written: float) -> float | None:
    """Return how many seconds ago something was written, by the storage's clock; None if it lets nobody write."""
    now, (offset, asked) = _uptime(), _OFFSETS.get(store.url, (0.0, -STALE_S))
    if store.remote is None or now - asked >= STALE_S:
        try:
            offset = _ask_clock(store) - now
        except ConfigError:
            return None
        _OFFSETS[store.url] = offset, now
    return max(0.0, _uptime() + offset - written)


def _uptime() -> float:
    """Return a time that nobody sets, and that passes while a machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _ask_clock(store: Store) -> float:
    """Return the time by the storage's clock: that of a file written just now."""
    probe = f"{contract.LEASES}/clock-{secrets.token_hex(8)}"
    _place(store).write(probe, b"what time is it?")
    try:
        return _modified(store, probe)
    except FileNotFoundError:  # taken for one that was killed
        return _ask_clock(store)
    finally:
        with contextlib.suppress(JobkitError):
            if store.remote is None:
                store.remove(probe)
            else:
                store.remote.remove([probe])

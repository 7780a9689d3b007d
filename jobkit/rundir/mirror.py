"""What a node's home and the run's URL tell each other: whose run it is, what it is, what was asked of it, its logs.

For a run on an object store everything is written to a home on this node first, which is a whole run directory: a save
is committed there in the time a local disk takes, and a restart on the same node restores from it. Steps go up through
the uploader, and come down through remote_steps.py.
"""

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Mapping

import msgspec

from jobkit import contract, names
from jobkit.errors import ConfigError, say
from jobkit.rundir import growing_files
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store, in_words

_ROOT_FILES = (contract.README, contract.EVENTS, contract.STRATEGY)


def fetch_request(store: Store, name: str) -> None:
    """Bring what was asked of the run on another machine into the home.

    Args:
        store: The run.
        name: `contract.CANCEL` or `contract.SAVE`.

    Raises:
        JobkitError: If the URL cannot be read.
    """
    if store.remote is None:
        return
    with contextlib.suppress(FileNotFoundError):
        content = store.remote.read(name)
        if store.get(name) != content:
            store.write(name, content)


def described(store: Store) -> list[str]:
    """List the files of a home that, beside run.json, say what the run is and what the launching side did."""
    code = [f"{contract.CODE}/{name}" for name in store.names(contract.CODE) if name.endswith(".tar.gz")]
    drawn = [f"{contract.TENSORBOARD}/{name}" for name in store.names(contract.TENSORBOARD) if "tfevents" in name]
    return [name for name in _ROOT_FILES if store.exists(name)] + code + drawn


def publish(store: Store) -> None:
    """Write what describes a new run to its URL, run.json first.

    Raises:
        ConfigError: If the URL holds a run already.
        JobkitError: If it cannot be written.
    """
    if store.remote is None:
        return
    if not store.remote.create(contract.RUN_JSON, store.read(contract.RUN_JSON)):
        raise ConfigError(f"{store.url} already holds a run: continue it with 'jobkit resume {store.url}'")
    upload_described(store)


def upload_described(store: Store) -> None:
    """Write what describes a run to its URL, from a launching side that has just added to it."""
    if store.remote is not None:
        for name in described(store):
            store.remote.write(name, store.read(name))


def upload_ledger(store: Store) -> None:
    """Write the launching side's ledger to the URL, from a launching side that has just added to it."""
    if store.remote is not None:
        store.remote.write(contract.EVENTS, store.read(contract.EVENTS))


_OTHERS = (contract.CHECKPOINTS, contract.CACHE, contract.LEASES, contract.RESTARTED, contract.POINTS)
_NOT_BROUGHT = tuple(f"{place}/" for place in _OTHERS)
"""What each who needs it fetches, or reads on the URL alone."""


def refresh(store: Store) -> None:
    """Bring what the URL knows of a run into the home: all but checkpoints and logs (see `fetch_logs`).

    For a home that nobody writes to just now.

    Ledgers and logs only grow, so that the longer one is the newer. The launching side's ledger is read before the rest
    is listed, and written after it: where it says that the run has ended, the logs are whole. Lines of it that are only
    here stay, unless another machine has taken the run over meanwhile and gone on from lines before them.

    The points of a sweep each have a home of their own, and are brought there.
    """
    if store.remote is None:
        return
    sizes = store.remote.find()
    for number, below in _points_in(sizes).items():
        _refresh(store.at(f"{store.url}/{contract.POINTS}/{number}"), below)
    _refresh(store, sizes)


def _points_in(sizes: Mapping[str, int]) -> dict[int, dict[str, int]]:
    """Return the files of each point of a sweep, by its number."""
    points: dict[int, dict[str, int]] = {}
    for name, size in sizes.items():
        top, _, inside = name.partition("/")
        number, _, file = inside.partition("/")
        if top == contract.POINTS and file and (point := names.number(number)) is not None:
            points.setdefault(point, {})[file] = size
    return points


def _refresh(store: Store, sizes: Mapping[str, int]) -> None:
    """Bring into a home what a listing has of a run, which is listed again where its ledger is newer there."""
    remote = store.bucket
    ledger = None
    if store.size(contract.EVENTS) != sizes.get(contract.EVENTS, -1):
        ledger = _newer(store, remote)
        sizes = remote.find()
    _bring(store, sizes, lambda name: not name.startswith(_NOT_BROUGHT) and not growing_files.is_log(name))
    if ledger is not None:
        store.write(contract.EVENTS, ledger)
    if contract.CANCEL not in sizes:
        store.remove(contract.CANCEL)


def _bring(store: Store, found: Mapping[str, int], wanted: Callable[[str], bool]) -> None:
    """Bring files of a listing into the home, as far as they are not there; what is gone meanwhile stays as it is."""
    for name, pieces in growing_files.grouped(found).items():
        if name != contract.EVENTS and wanted(name):
            with contextlib.suppress(FileNotFoundError):
                _bring_one(store, name, pieces)


def _bring_one(store: Store, name: str, pieces: growing_files.Parts) -> None:
    have, size = store.size(name), growing_files.size_of(pieces)
    if growing_files.is_growing(name):
        if have < size:
            growing_files.fetch(store, name, pieces)
    elif have < 0 or (have < size and name != contract.LOCK):
        store.write(name, store.bucket.read(name))
    elif _is_rewritten(name) and store.read(name) != (content := store.bucket.read(name)):
        store.write(name, content)


def fetch_logs(store: Store, attempt: int | None = None) -> None:
    """Bring what the programs of an attempt, or of all, have printed into the home, as far as the URL has it.

    Raises:
        JobkitError: If the URL cannot be read.
    """
    if store.remote is not None:
        place = contract.ATTEMPTS if attempt is None else contract.attempt_dir(attempt)
        _bring(store, store.remote.find(place), growing_files.is_log)


def _newer(store: Store, remote: Remote) -> bytes | None:
    """Return the launching side's ledger on the URL; None if it is the beginning of the home's, or is not there."""
    try:
        content = remote.read(contract.EVENTS)
    except FileNotFoundError:
        return None
    return None if (store.get(contract.EVENTS) or b"").startswith(content) else content


def _is_rewritten(name: str) -> bool:
    """Tell whether a file changes without growing: run.json when the run moves to another backend, what is asked of the
    run, and metrics.
    """
    return name in (contract.RUN_JSON, contract.CANCEL, contract.SAVE) or name.startswith(contract.SCORES + "/")


def fetch_ledgers(store: Store, attempt: int) -> None:
    """Bring what the processes and supervisors of earlier attempts wrote down into the home, where another node did.

    Raises:
        JobkitError: If the URL cannot be read.
    """
    if store.remote is None:
        return

    def wanted(name: str) -> bool:
        earlier, _, file = name.removeprefix(contract.ATTEMPTS + "/").partition("/")
        number = names.number(earlier)
        return number is not None and number < attempt and file.startswith("events-")

    _bring(store, store.remote.find(contract.ATTEMPTS), wanted)


def fetch_described(store: Store) -> None:
    """Bring what says what a run is, and its code, into the home of one of several processes that is not the run's own.

    Raises:
        JobkitError: If the URL cannot be read.
    """
    if store.remote is not None:
        set_other_aside(store)
        _bring(store, store.remote.find(contract.CODE) | {contract.RUN_JSON: 1}, lambda name: True)


def fetch_decisions(store: Store) -> None:
    """Bring what the launching side says of a run, its ledger and a cancel, into such a home.

    Raises:
        JobkitError: If the URL cannot be read.
    """
    if store.remote is not None:
        fetch_request(store, contract.CANCEL)
        if (ledger := _newer(store, store.remote)) is not None:
            store.write(contract.EVENTS, ledger)


def fetch_outcomes(store: Store, attempt: int) -> None:
    """Bring how each of several processes of an attempt ended into the home, where it was elsewhere.

    Raises:
        JobkitError: If the URL cannot be read.
    """
    if store.remote is not None:
        place = f"{contract.attempt_dir(attempt)}/process-"
        _bring(store, store.remote.find(contract.attempt_dir(attempt)), lambda name: name.startswith(place))


def claim(store: Store) -> int:
    """Claim the next attempt number, on the URL where there is one, and its directory."""
    if store.remote is None:
        return store.claim(contract.ATTEMPTS)
    _identify(store)
    local = max(store.numbers(contract.ATTEMPTS), default=-1)
    while True:
        number = max([*store.remote.numbers(contract.ATTEMPTS), local]) + 1
        token = msgspec.json.encode({"host": os.uname().nodename, "pid": os.getpid(), "at": time.time_ns()})
        if store.remote.create(f"{contract.attempt_dir(number)}/claim.json", token):
            store.write(f"{contract.attempt_dir(number)}/claim.json", token)
            return number


def _identify(store: Store) -> None:
    """Set aside what a home holds of another run of the same URL, which has an identity from then on."""
    mark(store.bucket)
    set_other_aside(store)


def mark(remote: Remote) -> None:
    """Give a URL an identity, unless it has one: a home tells by it what was once at the same URL."""
    if not remote.find(contract.ID):
        remote.create(contract.ID, secrets.token_hex(16).encode())


def set_other_aside(store: Store) -> None:
    """Set aside what a home holds of another run that was once at the same URL, if that has an identity."""
    try:
        identity = store.bucket.read(contract.ID)
    except FileNotFoundError:
        return
    if (known := store.get(contract.ID)) == identity:
        return
    if known is not None or store.names(contract.CHECKPOINTS):
        _set_home_aside(store, contract.CHECKPOINTS, contract.ATTEMPTS, contract.SCORES, contract.STRATEGY)
    store.write(contract.ID, identity)


def is_deleted(store: Store) -> bool:
    """Tell whether this is the home of a run of which nothing is left on its URL.

    Raises:
        JobkitError: If the URL cannot be read.
    """
    return store.remote is not None and store.exists(contract.RUN_JSON) and not store.remote.find()


def set_deleted_aside(store: Store) -> None:
    """Set aside what a home holds of a run that is deleted; nothing of it may be running.

    Raises:
        JobkitError: If the URL cannot be read, or the home cannot be written.
    """
    if is_deleted(store):
        stays = (contract.LOCK, contract.CACHE)
        _set_home_aside(store, *(name for name in store.names("") if name[0] != "." and name not in stays))


def _set_home_aside(store: Store, *names: str) -> None:
    """Move what a home holds out of the way; what makes it be done goes last, so that after a kill it is done again."""
    aside = store.file(f".old-{time.time_ns()}")
    with in_words(f"cannot move what {store.path} holds of another run", absent=True):
        aside.mkdir()
        for name in sorted(names, key=(contract.ID, contract.RUN_JSON).__contains__):
            with contextlib.suppress(FileNotFoundError):
                os.rename(store.file(name), aside / name)
    say(f"{store.path} held another run of the same URL; it lies in {aside} now")

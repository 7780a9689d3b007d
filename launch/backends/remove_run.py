"""Removing a run: what is jobkit's of it, in its directory and on its URL.

First run.json is replaced by one that says so: every reader refuses that, so that what a kill leaves half removed is
never taken for a run, shown, resumed, or submitted over. It goes last. Until then the removal can be repeated.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

import jobkit
from jobkit import contract, versions
from jobkit.errors import ConfigError
from jobkit.rundir import commits, mirror, remote_steps
from jobkit.rundir.store import Store, in_words
from jobkit.units import counted, show_duration, show_size
from launch.backends import by_hand, registry
from launch.lifecycle import lock, orphans, submission, verbs
from launch.spec import jobspec as specs

_SILENT_S = 3600.0
"""A run that was started by hand on another machine, and of which nothing was heard for so long, is over."""
_OURS = {*contract.LAYOUT, contract.STRATEGY, contract.TRACKERS}
_SUBMITTED = {contract.README, contract.CODE, contract.POINTS, contract.SLURM}
"""What of it a run that was started by hand has not: there it is somebody else's."""
_PASSING = re.compile(r"\.(old-.*|.*\.tmp|home)", re.DOTALL)
"""Hidden names of jobkit's own: what a kill left of a write, homes that were set aside."""


class Removal(msgspec.Struct, frozen=True):
    """A run that may be removed, or has been.

    Args:
        run: Its URL.
        what: What it is, for a person: its state, committed steps, size.
        kept: What lies in its directory and is not jobkit's: it stays.
    """

    run: str
    what: str
    kept: list[str] = []


def check(store: Store) -> Removal:
    """Say what a removal would remove; writes nothing.

    Args:
        store: The run.

    Raises:
        ConfigError: If it is no run or the point of a sweep, if it is alive, or if its directory is not its own.
    """
    kept = [name for name in _top(store) if not _ours(store, name)]
    size = show_size(sum(size for _, size in _files(store)))
    if is_half_removed(store):
        return Removal(store.url, f"what is left of a removal, {size}", kept)
    if specs.sweep_of(store) is not None or _is_point_in_bucket(store):
        raise ConfigError(f"{store.url} is a point of a sweep: remove the sweep as a whole")
    status = registry.status(store)
    silent = status.backend == by_hand.NAME and (status.sign_s or 0.0) > _SILENT_S
    if not status.state.over and not silent:
        verb = "stop" if status.backend == by_hand.NAME else "cancel"
        raise ConfigError(
            f"run {store.url} is {status.state}{status.place}: end it first with 'jobkit {verb} {store.url}'"
        )
    if status.backend == by_hand.NAME and (pid := orphans.opened_by(store)):
        raise ConfigError(f"run {store.url} was started by hand, and process {pid} has it open still: end that first")
    if specs.exists(store):
        backend = registry.of(store)
        each = specs.points(store, specs.read(store))
        if not backend.processes_here:  # of a sweep in a bucket the last job may be leaving still
            each = [one for one in each if store.remote is not None and specs.exists(one)]
        for one in dict.fromkeys((store, *each)):
            verbs.refuse_alive(backend, one)
    elif kept:
        own = " ".join(name for name in _top(store) if name not in kept)
        raise ConfigError(
            f"{store.url} was started by hand and its directory holds more than the run ({', '.join(kept[:3])}): "
            f"remove what is the run's yourself, there: {own}"
        )
    committed = commits.steps(store) if store.remote is None else remote_steps.steps(store.remote)
    steps = counted(len(committed), "committed step")
    last = f", last sign {show_duration(status.sign_s or 0.0)} ago" if silent else ""
    state = "by hand, " if status.backend == by_hand.NAME else ""
    words = f"a sweep of {counted(len(status.points), 'point')}" if status.points else steps
    return Removal(store.url, f"{state}{status.state}{status.place if silent else ''}{last}, {words}, {size}", kept)


def _is_point_in_bucket(store: Store) -> bool:
    """Tell whether a run lies in a bucket as a point of its sweep: a copy of one, elsewhere, is a run by itself."""
    if store.remote is None or not specs.exists(store):
        return False
    above = specs.read(store).sweep_url
    return bool(above) and store.url.startswith(f"{above}/{contract.POINTS}/")


def remove(store: Store) -> Removal:
    """Remove a run, or what is left of one.

    Args:
        store: The run.

    Returns:
        What was removed, and what was kept since it is not jobkit's.

    Durability: on return nothing of it is on storage, in its home on this machine neither.

    Raises:
        ConfigError: As `check`, and if it was resumed since then.
        JobkitError: If something cannot be removed; the removal can be repeated.
    """
    removal = check(store)
    held = lock.acquire(store)
    if held is None:
        raise ConfigError(submission.says_alive(store))
    try:
        _refuse_resumed(store)
        mark = msgspec.json.encode({"version": contract.RUN_VERSION, "jobkit": jobkit.__version__, "removing": True})
        if store.remote is not None:
            if store.remote.find():
                store.remote.write(contract.RUN_JSON, mark)
            ours = [name for name in store.remote.find() if _ours(store, name.partition("/")[0])]
        store.write(contract.RUN_JSON, mark)
        if store.remote is not None:
            _remove_homes(store, ours)
            store.remote.remove(name for name in ours if name != contract.RUN_JSON)
        with in_words(f"cannot remove {store.path}; repeat 'jobkit rm {store.url}'"):
            for name in store.names(""):
                if _ours(store, name) and name not in (contract.RUN_JSON, contract.LOCK):
                    _remove(store.file(name))
        for other in _other_homes(store):
            with in_words(f"cannot remove {other.path}; repeat 'jobkit rm {store.url}'"):
                for name in other.names(""):
                    if _ours(store, name):
                        _remove(other.file(name))
                with contextlib.suppress(OSError):
                    other.path.rmdir()
        if store.remote is not None:
            store.remote.remove([contract.RUN_JSON])
        with in_words(f"cannot remove {store.path}; repeat 'jobkit rm {store.url}'"):
            _remove(store.file(contract.LOCK))
            _remove(store.file(contract.RUN_JSON))
            with contextlib.suppress(OSError):
                store.path.rmdir()  # what is not ours keeps it
    finally:
        held.close()
    return removal


def _remove_homes(store: Store, listed: Iterable[str]) -> None:
    """Remove what the homes of a sweep's points on this machine hold of them; what is not ours keeps one.

    Args:
        store: The sweep.
        listed: What its URL holds still: so a removal that is repeated finds the homes again.
    """
    numbers = {name.split("/")[1] for name in listed if name.startswith(f"{contract.POINTS}/")}
    for number in sorted(filter(str.isdecimal, numbers)):
        point = store.at(f"{store.url}/{contract.POINTS}/{number}")
        with in_words(f"cannot remove {point.path}; repeat 'jobkit rm {store.url}'"):
            ours = [name for name in point.names("") if _ours(point, name)]
            for name in sorted(ours, key=contract.RUN_JSON.__eq__):
                _remove(point.file(name))
            with contextlib.suppress(OSError):
                point.path.rmdir()


def _refuse_resumed(store: Store) -> None:
    """Raise ConfigError if a run has got a job since it was checked; the lock is ours, and nobody can start it now."""
    mirror.refresh(store)  # a person may have taken long to say yes
    if specs.exists(store) and not is_half_removed(store):
        backend = registry.of(store)
        if not backend.processes_here:  # those hold the lock
            verbs.refuse_alive(backend, store)


def is_half_removed(store: Store) -> bool:
    """Tell whether a removal of the run was begun and has not come to its end."""
    return versions.is_removing(store.get(contract.RUN_JSON) or b"")


def _top(store: Store) -> list[str]:
    """List what is at the top of the run's directory, and of its URL."""
    remote = {name.partition("/")[0] for name in store.remote.find()} if store.remote is not None else set()
    return sorted({*store.names(""), *remote})


def _ours(store: Store, name: str) -> bool:
    ours = _OURS if store.exists(contract.RUN_JSON) else _OURS - _SUBMITTED
    return name in ours or _PASSING.fullmatch(name) is not None


def _other_homes(store: Store) -> list[Store]:
    """Return what other processes of a run on a URL had on this machine."""
    return [] if store.remote is None else [store.of_process(process) for process in store.processes_here()]


def _files(store: Store) -> Iterator[tuple[str, int]]:
    """Yield every file of a run, on its URL where it has one, and how large it is."""
    if store.remote is not None:
        yield from store.remote.find().items()
        return
    for directory, _, names in os.walk(store.path):
        for name in names:
            with contextlib.suppress(OSError):
                yield name, os.lstat(os.path.join(directory, name)).st_size


def _remove(path: Path) -> None:
    """Remove a file, or a directory with all below it, links themselves and not what they lead to."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

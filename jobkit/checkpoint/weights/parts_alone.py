"""Parts without taking part in a run: read from one, or from whatever has weights, and saved by themselves.

What `save` writes is a run directory that has nothing but one committed step, so that all that reads steps reads it.
Each save is a step of its own, which is committed before the one before it goes: killed at any instant it leaves one of
them, whole.
"""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import jax

from jobkit import contract, faults, versions
from jobkit.checkpoint import from_orbax, orbax_io, restore, state
from jobkit.checkpoint.kinds import Part, ValuePart, part_of
from jobkit.checkpoint.state import Snapshot
from jobkit.checkpoint.weights import source
from jobkit.errors import ConfigError, StorageError, say
from jobkit.rundir import commits, mirror, remote_steps
from jobkit.rundir.commits import Commit
from jobkit.rundir.files import remove_tree, sync_directory
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.store import Store, in_words

_LOCK = "checkpoints/.saving"


def load(url: str | os.PathLike[str], /, *, step: int | str = "latest", **parts: Any) -> Any:
    """Restore parts without taking part in a run: for evaluation, inference, a notebook.

    Args:
        url: A run directory, what `save` or `export_params` wrote, or a checkpoint of plain Orbax.
        step: Of a run, a committed step, 'latest', or 'best' (by the metric given to the run's `keep_best`).
        parts: As for `Run.resume`, any subset; NNX objects and iterators are changed in place.

    Returns:
        A namespace holding the value parts by name, each array in its dtype and shape, and on the devices that what was
        given for it is on.

    Raises:
        ConfigError: If there is no such step or part, or shapes or structure differ.
        StorageError: If the step is damaged.
    """
    made = _parts(parts)
    if step == "latest" and source.is_foreign(url):
        if fresh := from_orbax.start(url, made, every=True).fresh:
            say(f"as the program made it, since {os.fspath(url)} lacks it: {', '.join(fresh)}")
    else:
        store = Store(url)
        restore.fetch(store, step)
        number = restore.find_step(store, step)
        restore.restore(store, number, made, partial=True)
    return SimpleNamespace(**{name: part.value for name, part in made.items() if isinstance(part, ValuePart)})


def save(url: str | os.PathLike[str], /, **parts: Any) -> None:
    """Save parts without a run, for `load` or `Run(start_from=URL)` to begin with: jobkit.save(URL, model=model).

    Each file is written with its checksum and made durable before the save counts. What an earlier `save` left there is
    replaced, and is there until then.

    Args:
        url: A directory, or a URL that fsspec knows; new, empty, or what `save` wrote.
        parts: As for `Run.resume`: NNX objects, pytrees, iterators with a position.

    Raises:
        ConfigError: If a part cannot be saved, something else lies there, or another process saves there.
        StorageError: If it cannot be written.
    """
    if not parts:
        raise ConfigError("save() was given nothing to save: jobkit.save(URL, model=model)")
    if jax.process_count() > 1:
        raise ConfigError(
            f"save() writes what one process has, and {jax.process_count()} train here: save in the run, run.save(), "
            "and read that with jobkit.load"
        )
    snapshot = state.take_whole(_parts(parts))
    store = Store(url)
    if store.remote is None:
        with in_words(f"cannot write {store.path}"):
            _save_here(store, snapshot)
    else:
        _save_there(store, snapshot)


def _parts(given: Mapping[str, Any]) -> dict[str, Part]:
    return {name: part_of(name, value) for name, value in given.items()}


def _save_here(store: Store, snapshot: Snapshot) -> None:
    store.make()
    _check_free(store.url, store.names(""))
    with _alone(store):
        commits.sweep(store, attempt=1)
        earlier = store.numbers(contract.CHECKPOINTS)
        _write(store, max(earlier, default=-1) + 1, snapshot)
        for number in earlier:
            commits.remove(store, number)
    sync_directory(store.path)
    sync_directory(store.path.parent)


def _save_there(store: Store, snapshot: Snapshot) -> None:
    """Commit on this node, in a directory that nobody else has, then on the URL."""
    remote = store.bucket
    _check_free(store.url, sorted({name.partition("/")[0] for name in remote.find()}))
    mirror.mark(remote)
    earlier = remote_steps.group(remote.find(contract.CHECKPOINTS))
    number = max(earlier, default=-1) + 1
    with tempfile.TemporaryDirectory(prefix="jobkit-save-") as directory:
        local = Store(directory)
        local.remote = remote
        _write(local, number, snapshot)
        ledger = Ledger(local.file(contract.EVENTS))
        try:
            remote_steps.push(local, number, attempt=0, ledger=ledger, shown=True)
        finally:
            ledger.close()
        if remote.read(remote_steps.commit_name(number)) != local.read(remote_steps.commit_name(number)):
            raise StorageError(f"another process saved to {store.url} at the same time: what that saved is there")
    for older in earlier:
        remote_steps.remove(remote, older)


def _check_free(url: str, entries: list[str]) -> None:
    """Refuse to write into what somebody else made."""
    if {contract.RUN_JSON, contract.ATTEMPTS} & set(entries):
        raise ConfigError(f"{url} is a run: run.save() saves into it; give save() a directory of its own")
    if other := [name for name in entries if name not in (contract.CHECKPOINTS, contract.ID) and name[0] != "."]:
        raise ConfigError(f"{url} is not empty and holds no saved parts (it holds {other[0]!a}): choose another place")


@contextlib.contextmanager
def _alone(store: Store) -> Iterator[None]:
    """Keep other processes from saving to the same directory."""
    path = store.file(_LOCK)
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(f"another process is saving to {store.url}: give each a directory of its own") from None
    finally:
        os.close(descriptor)


def _write(store: Store, number: int, snapshot: Snapshot) -> None:
    """Write and commit a step."""
    stage = commits.new_stage(store, number, 0)
    writer = orbax_io.Writer()
    try:
        writer.start(stage, snapshot.arrays, snapshot.nbytes, for_upload=store.remote is not None)
        writer.wait()
        faults.reach("after_data")
        commit = Commit(
            step=number,
            attempt=0,
            at=time.time(),
            reason=commits.PARTS_ALONE,
            files={},
            topology={"process_count": 1},
            versions=versions.found(),
        )
        commits.publish(store, stage, state={"parts": snapshot.table}, commit=commit)
    except Exception as error:
        raise orbax_io.failure(error, f"cannot save to {store.url}") from error
    finally:
        writer.close()
        remove_tree(stage)

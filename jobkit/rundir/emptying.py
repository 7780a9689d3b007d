"""Emptying a node's home of a run in a bucket, once the run has ended for good and everything is on its URL.

What takes room goes: checkpoints, logs, the code, TensorBoard's files, compiled programs. What tells of the run, a few
small files, stays; everything else is fetched again by whoever needs it. Before anything is removed all of it must be
on the URL, and what the program wrote into the home itself, which goes nowhere, is never touched: nor is the unpacked
code, below which the program ran, if it left anything there.
"""

import contextlib
import os
import stat
import tarfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

from jobkit import contract
from jobkit.errors import StorageError
from jobkit.rundir import commits, growing_files, mirror, remote_steps, retention
from jobkit.rundir.files import remove_tree
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store, in_words
from jobkit.rundir.uploader import Outbox, files_in

Metrics = dict[int, dict[str, float]]
_REST_S = 60.0
"""How long may be sent what the supervisor of the last attempt, if it was killed, had left."""


def empty(store: Store) -> bool:
    """Remove from the home of a run that has ended what its URL has; tell whether that was everything.

    So it is done with the homes that other processes of the run had on this machine.

    Nothing of the run may be running. A kill at any instant leaves a home with less in it, and nothing damaged.

    Raises:
        JobkitError: If the URL cannot be read or written.
    """
    if store.remote is None:
        return False
    others = [store.of_process(process) for process in store.processes_here()]
    emptied = [_empty(one, store.remote, of_other=one is not store) for one in (store, *others)]
    return all(emptied)


def _empty(store: Store, remote: Remote, *, of_other: bool) -> bool:
    """Do so with one home: that of process 0, or that of another process, which has but parts of steps."""
    end = time.monotonic() + _REST_S
    later = max(store.numbers(contract.ATTEMPTS), default=-1) + 1
    Outbox(store, later).upload_earlier(go_on=lambda: time.monotonic() < end)
    listing = remote.find()
    if of_other:
        here = store.numbers(contract.CHECKPOINTS)
        there = (step for step in remote_steps.committed(remote_steps.group(listing)) if _is_up(remote, step, listing))
        if here and here[-1] > max(there, default=-1):  # what is older and not there never became a step
            return False
    else:
        metrics = commits.metrics(store)
        if any(not _is_up(remote, step, listing) for step in _wanted(store, remote, metrics, listing)):
            return False
        if remote.read(contract.EVENTS) != store.read(contract.EVENTS):
            return False
        here = list(metrics)
    sent = {name: growing_files.size_of(pieces) for name, pieces in growing_files.grouped(listing).items()}
    files = files_in(store, *map(contract.attempt_dir, store.numbers(contract.ATTEMPTS)), contract.SCORES)
    if any(sent.get(name) != size for name in files if (size := store.size(name)) >= 0):
        return False
    for step in here:
        commits.remove(store, step)
    with in_words(f"cannot empty {store.path}", absent=True):
        for name in (contract.STAGE, contract.TRASH, contract.CACHE):
            remove_tree(store.file(name))
        for name in [*filter(growing_files.is_log, files), *(name for name in mirror.described(store) if "/" in name)]:
            if sent.get(name) == store.size(name):
                _remove_copies(store, name)
    return True


def _wanted(store: Store, remote: Remote, here: Metrics, found: Mapping[str, int]) -> list[int]:
    """List the steps of the home that the URL is to have: all but those that it would not keep."""
    known: Metrics = {}
    for step in remote_steps.committed(remote_steps.group(found)):
        with contextlib.suppress(StorageError):  # damaged: then it is not there
            known[step] = remote_steps.metrics_of(remote, step, found)
    superfluous = retention.keep_of(store).superfluous(here | known)
    return [step for step in here if step in known or step not in superfluous]


def _is_up(remote: Remote, step: int, found: Mapping[str, int]) -> bool:
    """Tell whether the URL has a whole step of that number."""
    try:
        commit = remote_steps.read(remote, step)
    except StorageError:
        return False
    return all(found.get(f"{contract.step_dir(step)}/{name}") == size for name, size in commit.sizes.items())


def _remove_copies(store: Store, name: str) -> None:
    """Remove a file; with a snapshot of the code also what was unpacked from it, unless there is more in that."""
    if name.startswith(f"{contract.CODE}/"):
        tree = store.file(name.removesuffix(".tar.gz"))
        if tree.is_dir():
            if not _only_unpacked(store.file(name), tree):
                return
            # In one rename: what is there counts as whole, and the next attempt would run what is left.
            gone = commits.to_trash(store, tree)
            remove_tree(gone)
            with contextlib.suppress(OSError):
                gone.parent.rmdir()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(store.file(name))


def _only_unpacked(archive: Path, tree: Path) -> bool:
    """Tell whether no file below a directory is the program's own: new, or changed since it was unpacked."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            known = {member.name: member for member in tar.getmembers() if member.isreg()}
            for directory, _, files in os.walk(tree, onerror=_raise):
                if os.path.basename(directory) == "__pycache__":
                    continue
                for path in (Path(directory, file) for file in files):
                    info, member = path.lstat(), known.get(path.relative_to(tree).as_posix())
                    if stat.S_ISLNK(info.st_mode):
                        continue
                    if member is None or not stat.S_ISREG(info.st_mode) or info.st_size != member.size:
                        return False
                    if (unpacked := tar.extractfile(member)) is None or unpacked.read() != path.read_bytes():
                        return False
    except (OSError, EOFError, tarfile.TarError, zlib.error):
        return False
    return True


def _raise(error: OSError) -> None:
    raise error

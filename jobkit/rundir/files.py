"""Files and directories as a run needs them: made durable, listed as they are, measured, removed."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c

from jobkit import names

_SYNCS = 16
"""So many files are made durable at once."""


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    sync(path, os.O_DIRECTORY)


def sync_tree(root: Path) -> None:
    """Make every file and directory below `root`, and `root` itself, durable; of a link, that it is there.

    All at once: a disk writes what several wait for in one go.
    """
    paths = []
    for directory, _, files in os.walk(root, topdown=False, onerror=raise_unlisted):
        paths += [path for name in [*files, "."] if not (path := Path(directory, name)).is_symlink()]
    with ThreadPoolExecutor(min(_SYNCS, len(paths) or 1), thread_name_prefix="jobkit-sync") as pool:
        list(pool.map(sync, paths))


def sync(path: Path, flags: int = 0) -> None:
    """Make the content of a file durable."""
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def raise_unlisted(error: OSError) -> None:
    """Have `os.walk` leave out only what is not there: by itself it takes a directory it cannot list for empty."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@contextlib.contextmanager
def one_at_a_time(directory: Path) -> Iterator[bool]:
    """Let others that do the same below a directory wait, in this process and in others; it is made if it is not there.

    Yields whether they do: not every file system has such locks.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile has it, too
    finally:
        os.close(descriptor)


def files_below(root: Path) -> Iterator[str]:
    """Yield every file below `root`, relative to it, with forward slashes, in sorted order.

    A symbolic link is yielded as a file: nothing of ours makes one, so a checker should see it.
    """
    paths = []
    for directory, subdirectories, files in os.walk(root, onerror=raise_unlisted):
        linked = [name for name in subdirectories if os.path.islink(os.path.join(directory, name))]
        paths += [os.path.relpath(os.path.join(directory, name), root) for name in [*files, *linked]]
    yield from sorted(name.replace(os.sep, "/") for name in paths)


def crc32c(content: bytes) -> str:
    """Return the crc32c of some content as eight hexadecimal digits; object stores keep the same of every object."""
    return f"{google_crc32c.value(content):08x}"


def checksum(path: Path) -> tuple[int, str]:
    """Return a file's size in bytes and its crc32c."""
    value, size = 0, 0
    with open(path, "rb", opener=names.opener) as file:
        while chunk := file.read(1 << 22):
            value = google_crc32c.extend(value, chunk)
            size += len(chunk)
    return size, f"{value:08x}"


def free_bytes(path: Path) -> int:
    """Return what an ordinary user may still write at `path` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def remove_tree(path: Path) -> None:
    """Remove a directory and all below it; what is already gone is no error."""
    shutil.rmtree(path, ignore_errors=True)

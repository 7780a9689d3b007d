"""Where a run directory lies, and the only place that writes files durably.

A file is either there as a whole or not there: content goes to a temporary name, is fsynced, gets its name in one
step, and the directory is fsynced after it. What a SIGKILL leaves behind are temporary names, which no reader
looks at.
"""

import contextlib
import copy
import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import google_crc32c

from jobkit import contract
from jobkit.errors import ConfigError, JobkitError, StorageError
from jobkit.remote import Remote

_FULL = {
    errno.ENOSPC: "the disk is full: free space there, or run elsewhere",
    errno.EDQUOT: "the disk quota is used up: free space there, or run elsewhere",
}
"""Somebody else's files may be what fills it: a later attempt may find room again."""
_HOPELESS = {
    errno.EROFS: "the file system is read-only: choose another run directory",
    errno.EACCES: "permission denied: make it writable for this user, or choose another run directory",
    errno.EPERM: "not permitted: make it writable for this user, or choose another run directory",
    errno.ENOTDIR: "a part of that path is a file: choose another run directory",
    errno.EISDIR: "there is a directory of that name: choose another run directory",
}
"""No restart mends these: a person has to change permissions or remount."""


def explain(error: OSError, doing: str) -> JobkitError:
    """Turn an operating-system error into one of ours: hopeless ones are `ConfigError`, the rest `StorageError`.

    Args:
        error: What the system said.
        doing: What was tried, as the start of a sentence: 'cannot write runs/a'.
    """
    where = f" ({error.filename})" if error.filename and str(error.filename) not in doing else ""
    if error.errno in _HOPELESS:
        return ConfigError(f"{doing}{where}: {_HOPELESS[error.errno]}")
    return StorageError(f"{doing}{where}: {_FULL.get(error.errno or 0) or error.strerror or error}")


def local_path(url: str | os.PathLike[str]) -> Path:
    """Return the absolute local path that a run's URL names.

    Raises:
        ConfigError: If the URL is not on a file system of this machine.
    """
    text = os.fspath(url)
    if not text.strip():
        raise ConfigError("the run directory's URL is empty; give a path or a URL")
    parts = urlsplit(text)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{text!r} names another host; write file:///path")
        if parts.query or parts.fragment:
            raise ConfigError(f"{text!r}: '?' and '#' end a URL's path; write %3F and %23, or give a plain path")
        text = unquote(parts.path)
    elif is_remote(text):
        raise ConfigError(f"{text!r} is not on a file system: give a path or a file:// URL")
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):  # pathlib's gs://bucket; here it would be a directory 'gs:'
        raise ConfigError(f"{text!r} has lost a slash of its '://': give the URL as text, not as a Path")
    if not text or "\0" in text:
        raise ConfigError(f"{os.fspath(url)!r} names no path; give a path or a URL")
    try:
        return (Path(text) if parts.scheme == "file" else Path(text).expanduser()).absolute()
    except RuntimeError as error:
        raise ConfigError(f"{text!r}: {error}; write the path in full") from None


def is_remote(url: str | os.PathLike[str]) -> bool:
    """Tell whether a URL is reached through fsspec rather than through the file system."""
    text = os.fspath(url)
    return "://" in text and not text.startswith("file://")


def home_of(url: str) -> Path:
    """Return the node-local directory in which a run on an object store is written before it is uploaded.

    It lies in `JOBKIT_HOME`, else in the system's directory for temporary files, under a name made of the URL: the next
    attempt on this node finds there what an earlier one could not upload.

    Raises:
        ConfigError: If it cannot be made, or somebody else made it.
    """
    root = Path(os.environ.get(contract.ENV_HOME) or Path(tempfile.gettempdir()) / f"jobkit-{os.getuid()}")
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    home = root / f"{url.rstrip('/').rpartition('/')[2]}-{digest}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.stat().st_uid != os.getuid():
            raise ConfigError(f"{root} belongs to somebody else: set {contract.ENV_HOME} to a directory of yours")
        home.mkdir(exist_ok=True)
    except OSError as error:
        raise explain(error, f"cannot create {home}") from None
    return home


class Store:
    """A run directory: small whole files in, whole files out.

    Args:
        url: A path or a file:// URL, need not exist yet; or a URL of an object store, whose home on this node is what
            is read and written here, and what mirror.py carries to and fro.
        deadline_s: How long a request to an object store is tried again before it gives up.
    """

    def __init__(self, url: str | os.PathLike[str], *, deadline_s: float = 120.0) -> None:
        self.remote: Remote | None = None
        """The object store behind a home; None if the run directory is on a file system."""
        if is_remote(url):
            self.url = os.fspath(url).rstrip("/")
            self.path = home_of(self.url)
            self.remote = Remote(self.url, deadline_s=deadline_s)
        else:
            self.path = local_path(url)
            self.url = str(self.path)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def with_deadline(self, deadline_s: float) -> "Store":
        """Return the same run directory, whose object store is given up on after so many seconds."""
        other = copy.copy(self)
        if self.remote is not None:
            other.remote = Remote(self.url, deadline_s=deadline_s)
        return other

    def file(self, name: str) -> Path:
        """Return the path of a name inside the run directory."""
        return self.path / name

    def exists(self, name: str) -> bool:
        """Tell whether a file or directory of that name is there."""
        return self.file(name).exists()

    def names(self, name: str) -> list[str]:
        """List a directory in sorted order; an absent one is empty."""
        try:
            return sorted(os.listdir(self.file(name)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def numbers(self, name: str) -> list[int]:
        """List the entries of a directory whose names are numbers, in rising order."""
        return sorted(int(entry) for entry in self.names(name) if re.fullmatch("0|[1-9][0-9]{0,17}", entry))

    def read(self, name: str) -> bytes:
        """Return a file's content; raises FileNotFoundError if it is absent."""
        return self.file(name).read_bytes()

    def write(self, name: str, content: bytes | str) -> None:
        """Replace a file as a whole.

        Durability: the new content is on storage on return; a crash leaves the old or the new one.

        Raises:
            ConfigError: If no retry can help (no permission).
            StorageError: For any other failure, a full disk among them.
        """
        path = self.file(name)
        with _Writing(path) as temporary:
            _fill(temporary, content)
            os.replace(temporary, path)
            sync_directory(path.parent)

    def create(self, name: str, content: bytes | str) -> bool:
        """Create a file as a whole if none of that name exists; tell whether this call made it.

        Durability: on storage on return. Of several callers exactly one gets True.
        """
        path = self.file(name)
        with _Writing(path) as temporary:
            _fill(temporary, content)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            sync_directory(path.parent)
        return True

    def claim(self, name: str) -> int:
        """Create the next numbered directory below `name`; of several callers each gets a number of its own."""
        parent = self.file(name)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            while True:
                number = max(self.numbers(name), default=-1) + 1
                try:
                    (parent / str(number)).mkdir()
                except FileExistsError:
                    continue
                sync_directory(parent)
                return number
        except OSError as error:
            raise explain(error, f"cannot create a directory in {parent}") from None

    def tidy(self, name: str) -> None:
        """Remove what writers of a file that were killed have left beside it; nobody else may be writing it."""
        path = self.file(name)
        for left in path.parent.glob(_temporary(path.name, "*")):
            with contextlib.suppress(OSError):
                left.unlink()

    def remove(self, name: str) -> None:
        """Remove a file if it is there, durably."""
        path = self.file(name)
        try:
            path.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            raise explain(error, f"cannot remove {path}") from None
        sync_directory(path.parent)


def _temporary(name: str, token: str) -> str:
    return f".{name}.{token}.tmp"


class _Writing:
    """Give a temporary name beside `path`, translate errors, and leave nothing behind."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(_temporary(path.name, secrets.token_hex(6)))

    def __enter__(self) -> Path:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explain(error, f"cannot create {self._path.parent}") from None
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise explain(error, f"cannot write {self._path}") from None


def _fill(path: Path, content: bytes | str) -> None:
    with open(path, "xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Make every file and directory below `root`, and `root` itself, durable."""
    for directory, _, files in os.walk(root, topdown=False):
        for name in files:
            descriptor = os.open(os.path.join(directory, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(directory))


def files_below(root: Path) -> Iterator[str]:
    """Yield every file below `root`, relative to it, with forward slashes, in sorted order.

    A symbolic link is yielded as a file: nothing of ours makes one, so a checker should see it.
    """
    found = []
    for directory, subdirectories, files in os.walk(root):
        linked = [name for name in subdirectories if os.path.islink(os.path.join(directory, name))]
        found += [os.path.relpath(os.path.join(directory, name), root) for name in [*files, *linked]]
    yield from sorted(name.replace(os.sep, "/") for name in found)


def checksum(path: Path) -> tuple[int, str]:
    """Return a file's size in bytes and its crc32c as eight hexadecimal digits.

    crc32c because object stores keep the same one beside every object.
    """
    value, size = 0, 0
    with open(path, "rb") as file:
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

"""Where a run directory lies, and how its small files are written durably (docs/architecture.md: who writes others).

A file is either there as a whole or not there: content goes to a temporary name, is fsynced, gets its name in one
step, and the directory is fsynced after it. What a SIGKILL leaves behind are temporary names, which no reader
looks at.
"""

import contextlib
import copy
import errno
import functools
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar
from urllib.parse import unquote, urlsplit

from jobkit import contract, names
from jobkit.errors import ConfigError, JobkitError, StorageError
from jobkit.patience import Insist, at_once
from jobkit.rundir.files import sync_directory
from jobkit.rundir.remote import Remote

P = ParamSpec("P")
R = TypeVar("R")

_FULL = {
    errno.ENOSPC: "the disk is full: free space there, or run elsewhere",
    errno.EDQUOT: "the disk quota is used up: free space there, or run elsewhere",
}
"""Somebody else's files may be what fills it: a later attempt may find room again."""
_HOPELESS = {
    errno.EROFS: "the file system is read-only: choose another run directory",
    errno.EACCES: "permission denied: make it readable and writable for this user, or choose another run directory",
    errno.EPERM: "not permitted: make it readable and writable for this user, or choose another run directory",
    errno.ENOTDIR: "a part of that path is a file: choose another run directory",
    errno.ELOOP: f"there is a symbolic link: {names.NO_LINKS}",
    errno.ENXIO: "there is a pipe, a socket or a device of that name: choose another run directory",
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


@contextlib.contextmanager
def in_words(doing: str, *, absent: bool = False) -> Iterator[None]:
    """Turn the system's errors inside into ours; see `explain`.

    Args:
        doing: What is tried, as the start of a sentence.
        absent: Whether FileNotFoundError is an answer, and stays.
    """
    try:
        yield
    except OSError as error:
        if absent and isinstance(error, FileNotFoundError):
            raise
        raise explain(error, doing) from None


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
    elif re.match(r"(?:gs|gcs|s3|az|abfs|file)(?://|:)", text):
        raise ConfigError(f"{text!r} looks like a URL without its '://': write that, or ./{text} for a directory")
    if not text or "\0" in text or not names.is_text(text):
        raise ConfigError(f"{os.fspath(url)!a} names no path, in UTF-8; give a path or a URL")
    try:
        return (Path(text) if parts.scheme == "file" else Path(text).expanduser()).absolute()
    except RuntimeError as error:
        raise ConfigError(f"{text!r}: {error}; write the path in full") from None


def is_remote(url: str | os.PathLike[str]) -> bool:
    """Tell whether a URL is reached through fsspec rather than through the file system."""
    text = os.fspath(url)
    return "://" in text and not text.startswith("file://")


def home_of(url: str, process: int | None = None) -> Path:
    """Return the node-local directory in which a run on an object store is written before it is uploaded.

    It lies in `JOBKIT_HOME`, else in the system's directory for temporary files, under a name made of the URL: the next
    attempt on this node finds there what an earlier one could not upload. Of several processes of an attempt each has
    its own, whether or not they are on one node: process 0 the run's, the others one beside it.

    Args:
        url: The run's.
        process: Whose home; by default that of the process that this one is, if it is of this run.

    Raises:
        ConfigError: If it cannot be made, or somebody else made it.
    """
    if process is None:
        of_this = os.environ.get(contract.ENV_RUN, url).rstrip("/") == url.rstrip("/")
        process = contract.process_from()[0] if of_this else 0
    given = os.environ.get(contract.ENV_HOME)
    root = Path(given or Path(tempfile.gettempdir()) / f"jobkit-{os.getuid()}")
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    own = f".process-{process}" if process else ""
    home = root / f"{url.rstrip('/').rpartition('/')[2]}-{digest}{own}"
    with in_words(f"cannot create {home}"):
        if given:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if root.stat().st_uid != os.getuid():
                raise ConfigError(f"{root} belongs to somebody else: set {contract.ENV_HOME} to a directory of yours")
        else:  # where everybody may make one of that name
            _own(root)
        _own(home)
    return home


def _own(path: Path) -> None:
    """Make a directory that is this user's alone, or make sure that it is.

    Raises:
        ConfigError: If it is anything else: what lies there may be somebody else's work.
        OSError: If it cannot be made.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    wrong = ""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EACCES):
            raise
        wrong = "is no directory of yours but a symbolic link, a file or somebody else's"
    else:
        try:
            status = os.fstat(descriptor)
            if status.st_uid != os.getuid():
                wrong = "belongs to somebody else"
            elif status.st_mode & 0o022:
                wrong = f"can be written by others (mode {status.st_mode & 0o7777:04o})"
            elif status.st_mode & 0o077:
                os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)
    if wrong:
        raise ConfigError(
            f"{path} {wrong}: runs on an object store are kept there on this node, and it has to be yours alone: look "
            f"who made it and remove it, or set {contract.ENV_HOME} to a directory of yours"
        )


def _answered(
    doing: str, *, absent: bool = False
) -> Callable[[Callable[Concatenate["Store", str, P], R]], Callable[Concatenate["Store", str, P], R]]:
    """Have a method of a Store speak in errors of ours, and ask again for as long as the store has patience.

    Args:
        doing: What the method does, for messages.
        absent: Whether FileNotFoundError is its answer.
    """

    def decorate(method: Callable[Concatenate["Store", str, P], R]) -> Callable[Concatenate["Store", str, P], R]:
        @functools.wraps(method)
        def answered(self: "Store", name: str, /, *args: P.args, **named: P.kwargs) -> R:
            def once() -> R:
                with in_words(f"cannot {doing} {self.path / name}", absent=absent):
                    return method(self, name, *args, **named)

            return self.insist(once)

        return answered

    return decorate


class Store:
    """A run directory: small whole files in, whole files out.

    What the system says becomes an error of ours, as `explain` has it; that a file is absent is an answer and no error,
    but for `read`, which raises FileNotFoundError.

    Args:
        url: A path or a file:// URL, need not exist yet; or a URL of an object store, whose home on this node is what
            is read and written here, and what mirror.py carries to and fro.
        deadline_s: How long a request to an object store is tried again before it gives up.
    """

    def __init__(self, url: str | os.PathLike[str], *, deadline_s: float = 120.0) -> None:
        self.insist: Insist = at_once
        """Calls what needs the storage; again, while that does not answer, if the store is a patient one."""
        self.remote: Remote | None = None
        """The object store behind a home; None if the run directory is on a file system."""
        if is_remote(url):
            if "\0" in os.fspath(url) or not names.is_text(os.fspath(url)):
                raise ConfigError(f"{os.fspath(url)!a} is no URL, in UTF-8; give the run's")
            self.url = os.fspath(url).rstrip("/")
            self.path = home_of(self.url)
            self.remote = Remote(self.url, deadline_s=deadline_s)
        else:
            self.path = local_path(url)
            self.url = str(self.path)

    @property
    def bucket(self) -> Remote:
        """The object store behind a home, for what is done for a run that has one."""
        assert self.remote is not None
        return self.remote

    def of_process(self, process: int) -> "Store":
        """Return the same run on a URL as another process of an attempt on this node has it, in a home of its own."""
        other = copy.copy(self)
        other.path = home_of(self.url, process)
        return other

    def processes_here(self) -> list[int]:
        """List the processes but 0 of which a run on a URL has a home on this machine, beside its own."""
        before = f"{self.path.name}.process-"
        with in_words(f"cannot list {self.path.parent}"):
            ends = [name.removeprefix(before) for name in os.listdir(self.path.parent) if name.startswith(before)]
        return sorted(number for end in ends if (number := names.number(end)) is not None)

    def with_deadline(self, deadline_s: float) -> "Store":
        """Return the same run directory, whose object store is given up on after so many seconds."""
        other = copy.copy(self)
        if self.remote is not None:
            other.remote = Remote(self.url, deadline_s=deadline_s)
        return other

    def make(self, *, shared: bool = False) -> None:
        """Make the run directory, unless it is there: then its own mode says who may look into it.

        A new one is its owner's alone, and what is inside is protected by it. Below a directory that is meant for a
        group (setgid, or with a default ACL) it is that group's too, as far as the umask lets it.

        Args:
            shared: Whether it is everybody's, as far as the umask lets it.

        Raises:
            JobkitError: If it cannot be made.
        """
        with in_words(f"cannot create {self.path}"):
            if self.path.exists():
                return
            mode = 0o777 if shared else 0o770 if _for_a_group(self.path.parent) else 0o700
            self.path.mkdir(mode=mode, parents=True, exist_ok=True)

    def file(self, name: str) -> Path:
        """Return the path of a name inside the run directory.

        Raises:
            OutsideError: If it leads out of it, by itself or through a symbolic link.
        """
        return names.below(self.path, name)

    def patient(self, insist: Insist) -> "Store":
        """Return the same run directory, whose looks and writes are tried again while the storage does not answer."""
        other = copy.copy(self)
        other.insist = insist
        return other

    def at(self, url: str) -> "Store":
        """Return another run directory, looked at with the same patience."""
        return Store(url).patient(self.insist)

    def exists(self, name: str) -> bool:
        """Tell whether a file or directory of that name is there."""
        return self.stat(name) is not None

    @_answered("look at")
    def stat(self, name: str) -> os.stat_result | None:
        """Return what the file system knows of a name, None if it is absent."""
        try:
            return self.file(name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, name: str) -> int:
        """Return how many bytes a file has, -1 if it is absent."""
        info = self.stat(name)
        return -1 if info is None else info.st_size

    @_answered("list")
    def names(self, name: str) -> list[str]:
        """List a directory in sorted order, without names that are not one's inside; an absent one is empty."""
        path = self.file(name)
        try:
            return sorted(names.sift(os.listdir(path), where=str(path)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def numbers(self, name: str) -> list[int]:
        """List the entries of a directory whose names are numbers, in rising order."""
        return sorted(number for entry in self.names(name) if (number := names.number(entry)) is not None)

    @_answered("read", absent=True)
    def read(self, name: str, *, first_bytes: int = -1, last_bytes: int | None = None) -> bytes:
        """Return a file's content, or its first or last bytes; raises FileNotFoundError if it is absent."""
        try:
            with open(self.file(name), "rb", opener=names.opener) as file:
                if last_bytes is not None:
                    file.seek(max(0, file.seek(0, os.SEEK_END) - last_bytes))
                return file.read(first_bytes)
        except NotADirectoryError as error:
            raise FileNotFoundError(error.errno, error.strerror, error.filename) from None

    def get(self, name: str, *, last_bytes: int | None = None) -> bytes | None:
        """Return a file's content, or its last bytes; None if it is absent."""
        with contextlib.suppress(FileNotFoundError):
            return self.read(name, last_bytes=last_bytes)
        return None

    def write(self, name: str, content: bytes | str) -> None:
        """Replace a file as a whole.

        Durability: the new content is on storage on return; a crash leaves the old or the new one.

        Raises:
            ConfigError: If no retry can help (no permission).
            StorageError: For any other failure, a full disk among them.
        """
        path = self.file(name)

        def once() -> None:
            with _written(path, content) as temporary:
                os.replace(temporary, path)
                sync_directory(path.parent)

        self.insist(once)

    def create(self, name: str, content: bytes | str) -> bool:
        """Create a file as a whole if none of that name exists; tell whether this call made it.

        Durability: on storage on return. Of several callers exactly one gets True.
        """
        path = self.file(name)
        made = False

        def once() -> bool:
            nonlocal made
            with _written(path, content) as temporary:
                try:
                    os.link(temporary, path)
                    made = True
                except FileExistsError:
                    if not made:  # else this is another try: it is there and may not be durable yet
                        return False
                sync_directory(path.parent)
            return True

        return self.insist(once)

    @_answered("create a directory in")
    def claim(self, name: str) -> int:
        """Create the next numbered directory below `name`; of several callers each gets a number of its own."""
        self.make()
        parent = self.file(name)
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            number = max(self.numbers(name), default=-1) + 1
            try:
                (parent / str(number)).mkdir()
            except FileExistsError:
                continue
            sync_directory(parent)
            return number

    def tidy(self, name: str) -> None:
        """Remove what writers of a file that were killed have left beside it; nobody else may be writing it."""
        directory, _, last = name.rpartition("/")
        before, after = _temporary(last, "*").split("*")
        for leftover in (one for one in self.names(directory) if one.startswith(before) and one.endswith(after)):
            with contextlib.suppress(OSError):
                (self.file(directory) / leftover).unlink()

    @_answered("remove")
    def remove(self, name: str) -> None:
        """Remove a file if it is there, durably."""
        path = self.file(name)
        try:
            path.unlink()
        except FileNotFoundError:
            return
        sync_directory(path.parent)


def _for_a_group(path: Path) -> bool:
    """Tell whether what is made in a directory is meant for more people than who makes it."""
    while not path.exists():
        path = path.parent
    if path.stat().st_mode & stat.S_ISGID:
        return True
    try:
        return bool(os.getxattr(path, "system.posix_acl_default"))
    except (OSError, AttributeError):  # there is none; or the system has no such thing
        return False


def _temporary(name: str, token: str) -> str:
    return f".{name}.{token}.tmp"


@contextlib.contextmanager
def _written(path: Path, content: bytes | str) -> Iterator[Path]:
    """Write content durably under a temporary name beside a path; translate errors, and leave nothing behind."""
    temporary = path.with_name(_temporary(path.name, secrets.token_hex(6)))
    with in_words(f"cannot create {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with in_words(f"cannot write {path}"):
            with open(temporary, "xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

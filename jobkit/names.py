"""The one door for names that come from outside: listings, commit.json, scores, run.json, sweeps, archives.

Whoever may write to a bucket or to a shared directory chooses the names there, and each becomes a path on the machine
of whoever looks: `run//etc/x` and `run/../../x` are files of theirs. So a name is used only if it is inside the run,
and a symbolic link inside a run directory is not followed: jobkit makes none that it goes through. The path *to* the
run directory is the user's own word, and may be a link.
"""

import errno
import os
import re
import stat
import threading
from collections.abc import Iterable
from pathlib import Path

from jobkit.errors import ConfigError, OutsideError, say

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\\]")
_NUMBER = re.compile("0|[1-9][0-9]{0,17}")
_LONGEST_BYTES = 255
"""Of one part, on every file system in use; below it all of a name may have 4,095."""
NO_LINKS = (
    "jobkit follows none inside a run directory, where somebody else may have put it: put there what it names; to have "
    "a run on another disk, make the path to its directory the link"
)
_PART_BYTES = 200
_told: set[str] = set()
_telling = threading.Lock()


def inside(name: object) -> bool:
    """Tell whether a name is one inside a run: relative, of plain parts, whatever system takes it for a path."""
    if not isinstance(name, str) or _CONTROL.search(name) or not is_text(name):
        return False
    encoded = name.encode()
    parts = encoded.split(b"/")
    return len(encoded) < 4096 and all(part not in (b"", b".", b"..") and len(part) <= _LONGEST_BYTES for part in parts)


def check_place(url: str) -> None:
    """Refuse the place of a new run whose characters or length something on its way would stumble over.

    A newline is a line of its own to a scheduler's script, a backslash is a slash to tensorstore (whose arrays then lie
    elsewhere, and every checkpoint counts as damaged), and a run needs room for the names below it.

    Args:
        url: The run directory, in full.

    Raises:
        ConfigError: With what is wrong.
    """
    remote = "://" in url
    parts = url.partition("://")[2].rstrip("/").split("/") if remote else url.split("/")
    encoded = url.encode(errors="replace")
    longest = max(len(part.encode(errors="replace")) for part in parts)
    most = 800 if remote else 3000
    if not is_text(url):
        wrong = "is no UTF-8"
    elif (strange := _CONTROL.search(url)) is not None:
        wrong = f"holds {strange[0]!a}"
    elif longest > _PART_BYTES:
        wrong = f"has a part of {longest} bytes, and with what jobkit adds at most {_PART_BYTES} fit a file's name"
    elif len(encoded) > most:
        wrong = f"has {len(encoded)} bytes, and with what lies below it at most {most} fit a name"
    elif remote and {"", ".", ".."}.intersection(parts):
        wrong = "has a part that is empty, '.' or '..'"
    else:
        return
    raise ConfigError(f"the run directory {url[:100]!a} {wrong}: give another --run, of letters, digits, '.', '_', '-'")


def is_text(name: str) -> bool:
    """Tell whether a name can be written down: Python's word for bytes that are no UTF-8 can not."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def number(text: str) -> int | None:
    """Read a step, an attempt or a point out of a name, None where it is none: one number has one spelling."""
    return int(text) if _NUMBER.fullmatch(text) else None


def sift(names: Iterable[str], *, where: str) -> list[str]:
    """Return the names that are inside; the others are left alone, and told of once for each place.

    Args:
        names: As they were listed.
        where: The place, for people.
    """
    known = list(names)
    kept = [name for name in known if inside(name)]
    if len(kept) < len(known):
        strange = [name for name in known if not inside(name)]
        with _telling:
            new = where not in _told
            _told.add(where)
        if new:
            shown = ", ".join(ascii(name)[:100] for name in strange[:3])
            say(
                f"{where} holds {len(strange)} whose names are not allowed ({shown}): left alone, since they "
                "lead out of it or have characters that no file of a run has"
            )
    return kept


def below(root: Path, name: str) -> Path:
    """Return the path of a name below a directory.

    Args:
        root: The directory; it may be a symbolic link.
        name: A name inside; empty for the directory itself.

    Raises:
        OutsideError: If it leads out of the directory, by itself or through a symbolic link.
    """
    if not name:
        return root
    if not inside(name):
        raise OutsideError(f"{name!a} is no name inside {root}: it leads out of it, or no file can have it")
    path = os.fspath(root)
    for part in name.split("/"):
        path = f"{path}/{part}"
        try:
            mode = os.lstat(path).st_mode
        except OSError:
            break  # nothing there; or whoever opens it hears why not
        if stat.S_ISLNK(mode):
            raise OutsideError(f"{path} is a symbolic link: {NO_LINKS}")
    return root / name


def opener(path: str | os.PathLike[str], flags: int) -> int:
    """Open a regular file, for `open(..., opener=)`: never a link, nor a pipe that one would wait at for ever."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENXIO
        raise OSError(number, os.strerror(number), os.fspath(path))
    return descriptor

"""Files that only grow, on an object store, which cannot append: logs and ledgers go up in parts.

`attempts/0/log-0.txt` lies in `attempts/0/log-0.txt.d/`, each object named by the place of its first byte. Read in that
order, a byte that comes twice counts once. Whoever writes sends what is new and puts it together with small parts
before it, so that of a log of any size there are few parts and each byte is sent a few times at most. Every moment at
which a writer can be killed leaves parts that say the same where they overlap; another one goes on from what is there.

A file of an older jobkit is one object, under the name itself: the part at 0.
"""

import os
import re
from collections.abc import Callable, Mapping

from jobkit import names
from jobkit.errors import StorageError
from jobkit.rundir.store import Store, in_words

PART_BYTES = 1 << 22
"""Of the largest part: what is held in memory, and goes up in one request."""
_TRIES = 5
_PART = re.compile(r"(.+)\.d/([0-9]{15})")

Parts = dict[int, tuple[str, int]]
"""By the place of its first byte: the name and the size of an object."""


def is_growing(name: str) -> bool:
    """Tell whether a file of a run goes up in parts: the logs and ledgers of its attempts."""
    return re.fullmatch(r"attempts/[0-9]+/(log|events)-[^/]*\.(txt|jsonl)", name) is not None


def is_log(name: str) -> bool:
    """Tell whether a file holds what a program of an attempt has printed."""
    return is_growing(name) and name.rpartition("/")[2].startswith("log-")


def grouped(found: Mapping[str, int]) -> dict[str, Parts]:
    """Group a listing by file; one that is a single object is its own part at 0."""
    files: dict[str, Parts] = {}
    for name, size in found.items():
        part = _PART.fullmatch(name)
        file, place = (part[1], int(part[2])) if part is not None and is_growing(part[1]) else (name, 0)
        known = files.setdefault(file, {})
        if place not in known or known[place][1] < size:
            known[place] = name, size
    return files


def size_of(parts: Parts) -> int:
    """Return how many bytes there are from the beginning without a gap."""
    end = 0
    for place, (_, size) in sorted(parts.items()):
        if place > end:
            break
        end = max(end, place + size)
    return end


def fetch(store: Store, name: str, parts: Parts) -> None:
    """Bring what the home's copy of a file lacks; what it has stays as it is, so that several may do it at a time.

    Raises:
        JobkitError: If the URL cannot be read, or the home cannot be written.
    """
    for _ in range(_TRIES):
        if not parts:
            return
        try:
            _fetch(store, name, parts)
            return
        except FileNotFoundError:  # put together with others meanwhile
            parts = grouped(store.bucket.find(f"{name}.d")).get(name, {})
    raise StorageError(f"{store.url} lists parts of {name} that are not there when they are read")


def _fetch(store: Store, name: str, parts: Parts) -> None:
    path = store.file(name)
    with in_words(f"cannot write {path}", absent=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = names.opener(path, os.O_WRONLY | os.O_CREAT)
        try:
            have = os.fstat(descriptor).st_size
            for place, (part, size) in sorted(parts.items()):
                if place <= have < place + size:
                    content = memoryview(store.bucket.read(part))[have - place :]
                    while content:
                        written = os.pwrite(descriptor, content, have)
                        content, have = content[written:], have + written
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Sender:
    """Sends one growing file of a home.

    Args:
        store: The run.
        name: The file.
        parts: What is on the URL of it.
    """

    def __init__(self, store: Store, name: str, parts: Parts) -> None:
        self._remote, self._path, self._name = store.bucket, store.file(name), name
        self._parts: list[tuple[int, int]] = []
        """Place and size of those that another one may take in."""
        self._surplus: list[str] = []
        """What a writer that was killed has put together with others, and not removed."""
        self._sent = 0
        """Bytes on the URL."""
        for place, (part, size) in sorted(parts.items()):
            if place + size <= self._sent and part != name:
                self._surplus.append(part)
            elif place <= self._sent:
                self._sent = place + size
                self._parts += [(place, size)] if part != name else []
        self._shift = 0
        """Place on the URL of the first byte of the file: not 0 once it was cut off and began anew."""

    def send(self, go_on: Callable[[], bool]) -> bool:
        """Send what the file has grown by; tell whether all of it is on the URL now.

        Args:
            go_on: Asked between two parts.

        Raises:
            JobkitError: If the URL cannot be written, or the file not be read.
        """
        self._remote.remove(self._surplus)
        self._surplus = []
        try:
            doing = f"cannot read {self._path}"
            with in_words(doing, absent=True), open(self._path, "rb", opener=names.opener) as file:
                size = os.fstat(file.fileno()).st_size
                if self._shift + size < self._sent:
                    self._shift = self._sent  # somebody emptied it: what was sent stays, what follows is new
                while (begin := self._sent) < self._shift + size:
                    if not go_on():
                        return False
                    end = min(self._shift + size, begin + PART_BYTES)
                    self._put(file.fileno(), begin, end)
        except FileNotFoundError:
            pass
        return True

    def _put(self, descriptor: int, begin: int, end: int) -> None:
        covered = []
        # As in a binary counter: a part that takes in others is twice as large as the largest of them.
        for place, size in reversed(self._parts):
            if place < self._shift or place + size < begin or size > end - begin or end - place > PART_BYTES:
                break
            covered.append(place)
            begin = place
        content = os.pread(descriptor, end - begin, begin - self._shift)
        if len(content) < end - begin:
            raise StorageError(f"{self._path} became shorter while it was sent")
        self._remote.write(self._part(begin), content)
        self._remote.remove(self._part(place) for place in covered if place != begin)
        self._parts = [*self._parts[: len(self._parts) - len(covered)], (begin, end - begin)]
        self._sent = end

    def _part(self, place: int) -> str:
        return f"{self._name}.d/{place:015}"

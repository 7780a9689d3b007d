"""The step that all processes go on from, and of it what one of them needs, from its home or from the URL."""

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from jobkit import contract
from jobkit.errors import DamagedError, StorageError
from jobkit.rundir import commits, remote_steps
from jobkit.rundir.apart import parts, whole
from jobkit.rundir.commits import Commit
from jobkit.rundir.files import checksum, crc32c, remove_tree
from jobkit.rundir.remote import carry
from jobkit.rundir.store import Store, in_words

_UPLOADED_S, _POLL_S = 300.0, 2.0
"""How long nothing more may come of what supervisors carry there, and how often it is looked."""
Place = tuple[str, int, int]
"""File of a step, relative to it, offset and length."""


def newest(store: Store, said: list[Mapping[str, str]], attempt: int) -> int | None:
    """Return the newest step that is committed on the URL; None if there is none.

    One of which each part is in its process's home or on the URL is waited for, and committed there.

    Args:
        store: The run; process 0's home.
        said: What each process holds, as `parts.held` says, with the steps as text.
        attempt: Number of the attempt.

    Raises:
        JobkitError: If the URL does not answer, or such a step does not get there: no reason to lose it.
    """
    remote = store.bucket
    by_step = remote_steps.group(remote.find(contract.CHECKPOINTS))
    there = max(remote_steps.committed(by_step), default=None)
    here = commits.steps(store)
    for step in sorted({*here, *by_step}, reverse=True):
        if there is not None and step <= there:
            break
        if step in here:
            commit, by = commits.read(store, step), None
        elif (described := whole.description(remote, step, by_step[step])) is not None:
            commit, by = described[1], attempt
        else:
            continue
        if parts.expected(commit, said, lambda names: whole.checksums(remote, names)):
            wait_for(store, step, by)
            return step
    return there


def wait_for(store: Store, step: int, attempt: int | None = None) -> None:
    """Wait until a step that the homes have is on the URL, as long as more of it still gets there.

    Args:
        store: The run; this process's home.
        step: The step.
        attempt: Number of the attempt, if this process is to commit the step where supervisors cannot know of it: the
            one that carries process 0's part has lost what it knew with its home.

    Raises:
        StorageError: If no more does, or the URL does not answer.
    """
    remote = store.bucket
    most, deadline, seen = -1, 0.0, set[str]()
    while remote_steps.commit_name(step) not in (there := remote.find(contract.step_dir(step))):
        if attempt is not None and not whole.commit(remote, step, attempt, there, seen)[0]:
            return
        if (size := sum(there.values())) > most:
            most, deadline = size, time.monotonic() + _UPLOADED_S
        elif time.monotonic() >= deadline:
            raise StorageError(
                f"step {step} does not get from the homes of its processes to {store.url}: nothing of it has come for "
                f"{_UPLOADED_S:g} s, and it stays where it is"
            )
        time.sleep(_POLL_S)


class Partial:
    """What one process needs of a step, in a directory of its own until it is closed: a run directory with that step.

    Args:
        store: The run; this process's home.
        step: A step that is committed on the URL.
        attempt: Number of the attempt.
        process: Index of this process.
        count: Number of processes.
    """

    def __init__(self, store: Store, step: int, *, attempt: int, process: int, count: int) -> None:
        self._home, self._remote, self._process, self._count = store, store.bucket, process, count
        self._step = step
        self._root = commits.new_stage(store, step, attempt)
        self.store = Store(str(self._root))
        self.store.url = store.url
        self._below = contract.step_dir(step)

    def open(self) -> None:
        """Bring all but the arrays.

        Raises:
            DamagedError: If a file is not as it was committed.
            JobkitError: If the URL cannot be read, or the home not written.
        """
        step, url = self._step, self._home.url
        try:
            content = self._remote.read(remote_steps.commit_name(step))
        except FileNotFoundError:
            raise StorageError(f"step {step} of {url} is not there any more") from None
        self.commit: Commit = commits.parse(content, step, where=f"{url}/{remote_steps.commit_name(step)}")
        saved = self.commit.processes
        everyone = range(saved) if saved != self._count else [self._process]
        with in_words(f"cannot write to {self._root}"):
            self.store.file(self._below).mkdir(parents=True)
            self.store.file(remote_steps.commit_name(step)).write_bytes(content)
            whole = f"{contract.ORBAX_ITEM}/{contract.CHUNKS}" not in self.commit.files  # stock Orbax wrote it
            small = [name for name in self.commit.files if whole or _is_needed(name, everyone)]
            carry(f"downloading what describes step {step}", dict.fromkeys(small, 0), self.bring, shown=False)

    def bring(self, name: str) -> None:
        """Have a whole file of the step there.

        Raises:
            DamagedError: If it is not as it was committed.
        """
        target, expected = self.store.file(f"{self._below}/{name}"), self.commit.files[name]
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if self._link(name, target):
            return
        try:
            content = self._remote.read(f"{self._below}/{name}")
        except FileNotFoundError:
            raise DamagedError(f"{name} of step {self.commit.step} of {self._home.url} is missing") from None
        if (len(content), crc32c(content)) != (expected.size, expected.crc32c):
            raise DamagedError(f"{name} of step {self.commit.step} of {self._home.url} differs from its checksum")
        target.write_bytes(content)

    def bring_ranges(self, places: Iterable[Place]) -> None:
        """Have some ranges of files there; the rest of each file is a hole. Nothing of them is checked.

        Raises:
            DamagedError: If a file is not there.
        """
        ranges: dict[str, list[tuple[int, int]]] = {}
        for name, begin, nbytes in sorted(places):
            spans = ranges.setdefault(name, [])
            if spans and spans[-1][1] == begin:
                spans[-1] = spans[-1][0], begin + nbytes
            else:
                spans.append((begin, begin + nbytes))
        wanted: dict[str, tuple[str, int, int]] = {}
        for name, spans in ranges.items():
            target = self.store.file(f"{self._below}/{name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists() or self._link(name, target):
                continue
            with target.open("wb") as file:
                file.truncate(self.commit.files[name].size)
            wanted |= {f"{name}:{begin}": (name, begin, end) for begin, end in spans}

        def bring(key: str) -> None:
            name, begin, end = wanted[key]
            try:
                content = self._remote.read_range(f"{self._below}/{name}", begin, end)
            except FileNotFoundError:
                raise DamagedError(f"{name} of step {self.commit.step} of {self._home.url} is missing") from None
            with self.store.file(f"{self._below}/{name}").open("r+b") as file:
                file.seek(begin)
                file.write(content)

        sizes = {key: end - begin for key, (_, begin, end) in wanted.items()}
        carry(f"downloading of step {self.commit.step}", sizes, bring, shown=False)

    def _link(self, name: str, target: Path) -> bool:
        """Take a file from the home, if it is there as it was committed."""
        there, expected = self._home.file(f"{self._below}/{name}"), self.commit.files[name]
        with contextlib.suppress(OSError):
            if there.stat().st_size == expected.size and checksum(there) == (expected.size, expected.crc32c):
                os.link(there, target)
                return True
        return False

    def close(self) -> None:
        """Remove the directory."""
        remove_tree(self._root)


def _is_needed(name: str, everyone: Iterable[int]) -> bool:
    """Tell whether a file describes the step, or is what some processes had for themselves."""
    if contract.is_values(name):
        return False
    process = contract.process_of(name)
    return "/" in name or process in everyone if process else True

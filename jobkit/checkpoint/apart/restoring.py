"""Going on from a step on the URL: process 0 chooses it, and each process reads what its own shards need."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from jobkit import contract
from jobkit.checkpoint.kinds import Part
from jobkit.checkpoint.restore import read
from jobkit.errors import DamagedError, say
from jobkit.group import Group
from jobkit.rundir import commits, remote_steps
from jobkit.rundir.apart import fetching, parts
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.store import Store

_HELD_S = 600.0
"""How long a process may take longer than the first to say what its home has."""
_TRIES = 2
"""One bad download is no reason to lose a step."""


class Apart:
    """The homes of several processes, and the URL.

    Args:
        store: The run; this process's home.
        group: The processes.
        attempt: Number of the attempt.
        ledger: Where it is written what becomes of steps that are not gone on from.
    """

    def __init__(self, store: Store, group: Group, attempt: int, ledger: Ledger) -> None:
        self._store, self._group, self._attempt, self._ledger = store, group, attempt, ledger

    def newest(self, turn: int) -> int | None:
        """Choose the step that all go on from; what a home has of newer ones, which never became whole, goes.

        Raises:
            JobkitError: If the URL cannot be read, or a step that all homes have does not get there.
        """
        bucket = self._store.bucket
        there = self._group.share(f"there/{turn}", lambda: max(remote_steps.steps(bucket), default=-1))
        self._set_damaged_aside(there)
        held = {str(step): crc for step, crc in parts.held(self._store, self._group.index).items()}
        said = self._group.gather(f"held/{turn}", held, _HELD_S)
        step: int | None = self._group.share(
            f"restore/{turn}", lambda: fetching.newest(self._store, said, self._attempt)
        )
        if step is not None and self._group.first and step not in commits.steps(self._store):
            name = remote_steps.commit_name(step)  # retention, and metrics that come later, ask for it
            self._store.write(name, self._store.bucket.read(name))
        self._drop_newer(step)
        return step

    def _set_damaged_aside(self, there: int) -> None:
        """Move what this home has of steps that are newer than the newest on the URL out of the way, if it is damaged.

        Args:
            there: The newest on the URL, -1 for none.
        """
        for step in self._store.numbers(contract.CHECKPOINTS):
            if step > there and (wrong := parts.problems(self._store, step, self._group.index)):
                commits.check_newest(self._store.bucket, self._attempt, f"set step {step} aside")
                moved = commits.set_aside(self._store, step, wrong)
                self._ledger.append("set_aside", step=step, reason=wrong[0], moved_to=str(moved), durable=True)
                say(f"this process's part of step {step} is damaged: {wrong[0]}; set aside as {moved}")

    def _drop_newer(self, step: int | None) -> None:
        """Remove what this home has of steps that are newer than the one all go on from."""
        newer = [number for number in self._store.numbers(contract.CHECKPOINTS) if step is None or number > step]
        if newer:
            commits.check_newest(self._store.bucket, self._attempt, "remove steps")
        for number in newer:
            commits.remove(self._store, number)
            self._ledger.append("removed", step=number, reason="not all processes have their part of it")
            say(f"step {number} is not gone on from: not all processes have their part of it")

    def read(self, step: int, given: Mapping[str, Part]) -> Callable[[], None]:
        """Read what this process needs of a step; as `restore.read`."""
        for tried in range(_TRIES):
            index, count = self._group.index, self._group.count
            with contextlib.closing(
                fetching.Partial(self._store, step, attempt=self._attempt, process=index, count=count)
            ) as needed:
                try:
                    needed.open()
                    return read(needed.store, step, given, needed=needed)
                except DamagedError:
                    if tried + 1 == _TRIES:
                        raise
        raise AssertionError

    def set_aside(self, step: int, wrong: list[str]) -> Any:
        """Move a damaged step on the URL out of the way; return where it is."""
        remote_steps.set_aside(self._store.bucket, step, wrong)
        commits.remove(self._store, step)
        return f"{self._store.url}/{contract.SET_ASIDE}"

"""What an attempt writes beside checkpoints, on its way from the home to the run's URL: logs, ledgers, descriptions.

Small files go up whole when they have changed. Logs and ledgers go up in parts (growing_files.py), those of earlier
attempts too, whose supervisor was killed before it had sent all.
"""

from collections.abc import Callable

from jobkit import contract
from jobkit.rundir import growing_files
from jobkit.rundir.store import Store

_EVENTS_OF_TENSORBOARD = "tfevents"
_GROWN = 1.125
"""TensorBoard's files, which it reads as they are, go up whole, each time that they have grown by an eighth."""


class Outbox:
    """Carries the files of one attempt, and what earlier ones left of theirs in this home.

    Args:
        store: The run; its home.
        attempt: Number of the attempt.
        check: Called before a file of the whole run is replaced; raises if a newer attempt has begun.
    """

    def __init__(self, store: Store, attempt: int, check: Callable[[], None]) -> None:
        self._store, self._attempt, self._check = store, attempt, check
        self._stamps: dict[str, tuple[int, int]] = {}
        self._senders: dict[str, growing_files.Sender] | None = None
        """None until it is known what is on the URL."""
        self._left: list[str] = []
        """Files of earlier attempts that are not on the URL as they are here."""

    def upload(self, described: list[str], *, final: bool, go_on: Callable[[], bool]) -> bool:
        """Carry what is new, small files first; tell whether everything is on the URL now.

        Args:
            described: The files that describe the run.
            final: Whether nothing more will be written.
            go_on: Asked before each part of a log or ledger.

        Raises:
            JobkitError: If the URL cannot be written.
        """
        own = contract.attempt_dir(self._attempt)
        mine = [f"{place}/{name}" for place in (own, contract.SCORES) for name in self._store.names(place)]
        return self._send([*described, *(name for name in mine if "/." not in name)], final=final, go_on=go_on)

    def upload_earlier(self, *, go_on: Callable[[], bool]) -> bool:
        """Carry only what earlier attempts left; tell whether all of that is on the URL now.

        Args:
            go_on: Asked before each part of a log or ledger.

        Raises:
            JobkitError: If the URL cannot be written.
        """
        return self._send([], final=True, go_on=go_on)

    def _send(self, wanted: list[str], *, final: bool, go_on: Callable[[], bool]) -> bool:
        senders = self._begin() if self._senders is None else self._senders
        wanted = [*wanted, *self._left]
        for name in wanted:
            if not growing_files.is_growing(name):
                self._upload_whole(name, final=final)
        done = True
        # Ledgers before logs: they are smaller, and say more.
        for name in sorted(filter(growing_files.is_growing, wanted)):
            sender = senders.setdefault(name, growing_files.Sender(self._store, name, {}))
            done = sender.send(go_on) and done
        if done:
            self._left = []
        return done

    def _begin(self) -> dict[str, growing_files.Sender]:
        """See what is on the URL already."""
        remote = self._store.remote
        assert remote is not None
        there = growing_files.grouped(remote.find(contract.ATTEMPTS))
        code = remote.find(contract.CODE)
        for name in (f"{contract.CODE}/{file}" for file in self._store.names(contract.CODE)):
            if (info := self._store.stat(name)) is not None and code.get(name) == info.st_size:
                self._stamps[name] = info.st_size, info.st_mtime_ns  # named by its content
        for attempt in self._store.numbers(contract.ATTEMPTS):
            place = contract.attempt_dir(attempt)
            for name in (f"{place}/{file}" for file in self._store.names(place) if attempt < self._attempt):
                info = self._store.stat(name)
                have = growing_files.size_of(there.get(name, {})) if name in there else -1
                if (
                    "/." not in name
                    and info is not None
                    and (info.st_size > have if growing_files.is_growing(name) else have < 0)
                ):
                    self._left.append(name)
        self._senders = {
            name: growing_files.Sender(self._store, name, parts)
            for name, parts in there.items()
            if growing_files.is_growing(name)
        }
        return self._senders

    def _upload_whole(self, name: str, *, final: bool) -> None:
        remote, info = self._store.remote, self._store.stat(name)
        assert remote is not None
        if info is None:
            return
        stamp, sent = (info.st_size, info.st_mtime_ns), self._stamps.get(name)
        if stamp == sent:
            return
        waits = _EVENTS_OF_TENSORBOARD in name and not final
        if waits and sent is not None and sent[0] <= info.st_size < sent[0] * _GROWN:
            return
        if "/" not in name:
            self._check()
        remote.write(name, self._store.read(name))
        self._stamps[name] = stamp

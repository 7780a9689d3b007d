"""The uploader: threads of the supervisor that carry what is new in the home to the run's URL.

A step's files go up in parallel, each created only if it is not there yet, and commit.json last. A program that is
killed right after its local commit still gets its save into the bucket. Logs and ledgers, and what is asked of the run,
have threads of their own: neither keeps a checkpoint waiting.

Under a dead bucket the training goes on; saves wait in the home, as many as retention keeps, until the bucket is back.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable

from jobkit import contract, decode
from jobkit.errors import JobkitError, StorageError, SupersededError, say
from jobkit.rundir import commits, growing_files, mirror, remote_steps, retention
from jobkit.rundir.apart.sending import MissingPartError, Sender
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.store import Store

_TICK_S = 0.5
_TELL_S = 10.0
_FILES_S = 2.0
"""Logs and ledgers of a running attempt reach the URL this often."""
_REST_S = 10.0
"""How long logs and ledgers may take once everything else is there."""
_CANCEL_S = 2.0
"""A cancel that was written on another machine is seen after this long."""
_GROWN = 1.125
"""TensorBoard's files, which it reads as they are, go up whole, each time that they have grown by an eighth."""


class Uploader:
    """Carries one attempt's home to its URL until closed; has nothing to do for a run on a file system.

    Args:
        store: The run directory.
        attempt: Number of the attempt; the uploader commits nothing once a newer one exists.
        ledger: Where uploads and their failures are written.
        process: Index of the process whose home it is, and how many there are: process 0's carries what there is once,
            and hears what is asked of the run.
    """

    def __init__(self, store: Store, attempt: int, ledger: Ledger, *, process: tuple[int, int] = (0, 1)) -> None:
        # A dead bucket is told of soon; whoever carries tries again anyway.
        self._store = store.with_deadline(_TELL_S)
        self._attempt, self._ledger, self._leads = attempt, ledger, process[0] == 0
        self._sender = Sender(self._store, attempt, process[0], ledger) if process[1] > 1 else None
        self._since = time.time() - 0.05  # file systems keep coarse times
        self._done: set[int] = set()
        self._old_uploads = self._leads  # a peer's may be under way
        self._outbox = Outbox(self._store, attempt)
        self._failing: dict[str, float] = {}
        """What fails, and since when."""
        self._failing_lock = threading.Lock()
        self._closing = threading.Event()
        # A log of any size, or a bucket that is slow to take a step, must not keep the others waiting.
        self._threads = [
            threading.Thread(target=self._go_on, args=(name, every_s, work), name=f"jobkit-{name}", daemon=True)
            for name, every_s, work in (
                ("steps", _TICK_S, self._upload_steps),
                ("files", _FILES_S, self._upload_files_on),
                ("requests", _CANCEL_S, self._hear_requests),
            )
        ]
        self.superseded: SupersededError | None = None
        """Says which newer attempt has taken over, once one has; nothing is carried from then on."""

    def start(self) -> None:
        """Begin carrying, in threads."""
        if self._store.remote is not None:
            for thread in self._threads:
                thread.start()

    def close(self, *, deadline_s: float) -> None:
        """Carry everything that is left and end.

        Raises:
            StorageError: If the newest committed step is not on the URL after `deadline_s`, or lacks a part of another
                process before that; it stays in the home.
        """
        if self._store.remote is None:
            return
        self._closing.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        end = time.monotonic() + deadline_s
        while True:
            try:
                # At the end in any case: who decides whether the run goes on looks into the home.
                self._hear_requests()
                self._upload_steps(until=end)
                self.upload_files(until=max(end, time.monotonic() + _REST_S))
                return
            except SupersededError:
                raise
            except JobkitError as error:
                if time.monotonic() >= end or isinstance(error, MissingPartError):
                    raise StorageError(f"{error}; the newest saves wait in {self._store.path}") from error
                self._fails("the rest", error)
                time.sleep(_TICK_S)

    def _go_on(self, name: str, every_s: float, work: Callable[[], None]) -> None:
        while not self._closing.wait(every_s) and self.superseded is None:
            try:
                work()
            except Exception as error:  # whatever it is, saves must go on being carried
                self._fails(name, error)
            else:
                self._works(name)

    def _fails(self, name: str, error: Exception) -> None:
        ours = isinstance(error, JobkitError)
        reason = str(error) if ours else f"cannot upload to {self._store.url}: {type(error).__name__}: {error}"
        with self._failing_lock:
            if isinstance(error, SupersededError):
                if self.superseded is None:
                    self.superseded = error
                    self._ledger.append("superseded", reason=reason)
                return
            if not self._failing:
                self._ledger.append("upload_failed", reason=reason)
                say(f"{reason}; saves wait in {self._store.path} meanwhile")
            self._failing.setdefault(name, time.monotonic())

    def _works(self, name: str) -> None:
        with self._failing_lock:
            since = min(self._failing.values(), default=0.0)
            if self._failing.pop(name, None) is not None and not self._failing:
                self._ledger.append("upload_back", after_s=round(time.monotonic() - since, 3))

    def _hear_requests(self) -> None:
        for name in (contract.CANCEL, contract.SAVE) if self._leads else ():
            mirror.fetch_request(self._store, name)

    def _upload_steps(self, *, until: float | None = None) -> None:
        """Carry new steps, newest before older; one that cannot be carried holds up no other.

        Args:
            until: At the end: how long to wait for what others carry, on the clock of `time.monotonic`.
        """
        if self._old_uploads:
            self._old_uploads = False
            with contextlib.suppress(JobkitError):
                # Of dead attempts: this one has claimed its number, so that no older one can commit any more.
                self._store.bucket.abort_uploads()
        if self._sender is not None:
            if self._sender.carry_parts(until) and self._leads and self._said_what_to_keep():
                self._retain()
            return
        failed: JobkitError | None = None
        waiting = [step for step in reversed(commits.steps(self._store)) if step not in self._done]
        for step in waiting:
            try:
                if remote_steps.push(
                    self._store, step, attempt=self._attempt, ledger=self._ledger, shown=until is not None
                ):
                    self._done.add(step)
            except SupersededError:
                raise
            except JobkitError as error:
                failed = failed or error
        if waiting and failed is None and self._said_what_to_keep():
            self._retain()
        if failed is not None:
            raise failed

    def _said_what_to_keep(self) -> bool:
        """Tell whether the program of this attempt has said what to keep; what is in the home may be old."""
        stat = self._store.stat(contract.STRATEGY)
        return stat is not None and stat.st_mtime >= self._since

    def upload_files(self, *, until: float | None = None) -> None:
        """Carry the rest of logs, ledgers and what describes the run; what is not up in time waits in the home.

        Args:
            until: No further part of a log is sent then, on the clock of `time.monotonic`; by default in a few seconds.

        Raises:
            JobkitError: If the URL cannot be written.
        """
        if self._store.remote is None:
            return
        end = time.monotonic() + _REST_S if until is None else until
        if not self._outbox.upload(self._described(), final=True, go_on=lambda: time.monotonic() < end):
            say(f"not all logs of {self._store.url} are there yet; the rest waits in {self._store.path}")

    def _upload_files_on(self) -> None:
        self._outbox.upload(
            self._described(), final=False, go_on=lambda: not self._closing.is_set() and self.superseded is None
        )

    def _described(self) -> list[str]:
        """List what describes the run and is the running side's to say."""
        if not self._leads:
            return []
        saying = self._said_what_to_keep()
        return [name for name in mirror.described(self._store) if name != contract.STRATEGY or saying]

    def _retain(self) -> None:
        """Remove remote steps that retention does not keep, and what dead attempts left unfinished."""
        remote, keep = self._store.bucket, retention.keep_of(self._store)
        by_step = remote_steps.group(remote.find(contract.CHECKPOINTS))
        committed = remote_steps.committed(by_step)
        scores = remote.find(contract.SCORES)
        known = {step: remote_steps.metrics_of(remote, step, scores) for step in committed}
        newest, local = max(committed, default=-1), commits.steps(self._store)
        unfinished = [step for step in by_step.keys() - {*committed} if step < newest and step not in local]
        superfluous = keep.superfluous(known)
        if superfluous or unfinished:
            # What looks unfinished may be a newer attempt's upload.
            commits.check_newest(remote, self._attempt, f"commit to {remote.url}")
        for step in superfluous:
            remote_steps.remove(remote, step)
        for step in unfinished:
            remote.remove(by_step[step])


class Outbox:
    """Carries what an attempt writes beside checkpoints, and what earlier ones left of theirs in this home.

    Small files go up whole when they have changed. Logs and ledgers go up in parts (growing_files.py), those of earlier
    attempts too, whose supervisor was killed before it had sent all.

    Args:
        store: The run; its home.
        attempt: Number of the attempt.
    """

    def __init__(self, store: Store, attempt: int) -> None:
        self._store, self._attempt = store, attempt
        self._stamps: dict[str, tuple[int, int]] = {}
        self._senders: dict[str, growing_files.Sender] = {}
        self._left: list[str] | None = None
        """Files of earlier attempts that are not on the URL as they are here; None until it has been looked."""
        self._unsure = {attempt}
        """The attempts of this home of which it is not written down that all is on the URL."""

    def upload(self, described: list[str], *, final: bool, go_on: Callable[[], bool]) -> bool:
        """Carry what is new, small files first; tell whether everything is on the URL now.

        Args:
            described: The files that describe the run.
            final: Whether nothing more will be written.
            go_on: Asked before each part of a log or ledger.

        Raises:
            JobkitError: If the URL cannot be written.
        """
        own = files_in(self._store, contract.attempt_dir(self._attempt), contract.SCORES)
        return self._send([*described, *own], final=final, go_on=go_on)

    def upload_earlier(self, *, go_on: Callable[[], bool]) -> bool:
        """Carry only what earlier attempts left; tell whether all of that is on the URL now.

        What the home says of that is not believed: somebody may have removed something there.

        Args:
            go_on: Asked before each part of a log or ledger.

        Raises:
            JobkitError: If the URL cannot be written.
        """
        self._left = self._begin(believe=False)
        return self._send([], final=True, go_on=go_on)

    def _send(self, wanted: list[str], *, final: bool, go_on: Callable[[], bool]) -> bool:
        if self._left is None:
            self._left = self._begin(believe=True)
        sizes = {attempt: self._sizes(attempt) for attempt in self._unsure} if final else {}
        wanted = [*wanted, *self._left]
        for name in wanted:
            if not growing_files.is_growing(name):
                self._upload_whole(name, final=final)
        done = True
        # Ledgers before logs: they are smaller, and say more.
        for name in sorted(filter(growing_files.is_growing, wanted)):
            done = self._sender(name).send(go_on) and done
        if done:
            self._left = []
            for attempt, here in sizes.items():  # as they were before they were sent
                if here:
                    with contextlib.suppress(JobkitError):  # then it is asked once more
                        self._store.write(_sent_file(attempt), json.dumps(here).encode())
        return done

    def _sizes(self, attempt: int) -> dict[str, int]:
        return {name: self._store.size(name) for name in files_in(self._store, contract.attempt_dir(attempt))}

    def _sender(self, name: str) -> growing_files.Sender:
        if (sender := self._senders.get(name)) is None:
            parts = growing_files.grouped(self._store.bucket.find(f"{name}.d")).get(name, {})
            sender = self._senders[name] = growing_files.Sender(self._store, name, parts)
        return sender

    def _begin(self, *, believe: bool) -> list[str]:
        """List what earlier attempts left in this home; what others have there costs no request."""
        remote = self._store.bucket
        code = [f"{contract.CODE}/{file}" for file in self._store.names(contract.CODE)]
        there = remote.find(contract.CODE) if code else {}
        for name in code:
            if (info := self._store.stat(name)) is not None and there.get(name) == info.st_size:
                self._stamps[name] = info.st_size, info.st_mtime_ns  # named by its content
        left = []
        for attempt in (number for number in self._store.numbers(contract.ATTEMPTS) if number < self._attempt):
            sent = decode.json_object(self._store.get(_sent_file(attempt)) or b"") or {}
            unsure = [name for name, size in self._sizes(attempt).items() if not believe or sent.get(name) != size]
            left += [name for name in unsure if growing_files.is_growing(name) or not remote.has(name)]
            self._unsure |= {attempt} if unsure and believe else set()
        return left

    def _upload_whole(self, name: str, *, final: bool) -> None:
        if (info := self._store.stat(name)) is None:
            return
        stamp, sent = (info.st_size, info.st_mtime_ns), self._stamps.get(name)
        if stamp == sent:
            return
        waits = "tfevents" in name and not final
        if waits and sent is not None and sent[0] <= info.st_size < sent[0] * _GROWN:
            return
        if "/" not in name:  # of the whole run: a newer attempt's may be there
            commits.check_newest(self._store.bucket, self._attempt, f"commit to {self._store.url}")
        self._store.bucket.write(name, self._store.read(name))
        self._stamps[name] = stamp


def _sent_file(attempt: int) -> str:
    """Return where a home has the sizes of the files of an attempt that are on the URL."""
    return f"{contract.attempt_dir(attempt)}/.sent.json"


def files_in(store: Store, *places: str) -> list[str]:
    """List the files in some directories of a home, but for what is being written."""
    return [f"{place}/{name}" for place in places for name in store.names(place) if not name.startswith(".")]

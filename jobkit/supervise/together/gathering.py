"""How the processes of an attempt find each other through the run's URL, before any of them begins.

    joined-<i>.json   process i has come; created, so that its place in this attempt has one owner for good
    gathered.json     process 0's word, created: where they meet, or that the attempt never became whole and why

Everybody waits for a bounded time. All waiting is for one object, so that the requests of a process do not grow with
their number; only process 0 lists who has come. Killed at any instant, a process leaves its place taken: the attempt
never becomes whole, or ends as it does for any process that dies, and all meet in the next one.
"""

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Sequence

from jobkit import contract, decode, faults
from jobkit.contract import Exit
from jobkit.errors import JobkitError, StorageError, SupersededError
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store
from jobkit.supervise import processes

WAIT_S = 300.0
"""How long the processes of an attempt wait for each other, where `JOBKIT_GATHER_S` does not say."""
_FOR_FIRST_S = 30.0
"""How much longer the others wait for process 0's word, which says who is missing."""
_ASK_S, _SELDOM_S = 2.0, 5.0
"""How often the URL is asked, at first and later."""
_ANSWER_S = 10.0
"""How long it may take to answer once."""


class NotWholeError(JobkitError):
    """An attempt has not all its processes: nobody's failure, to be tried again."""

    exit_code = Exit.PREEMPTED


class Gathering:
    """One process of an attempt, from its coming until all are there.

    Args:
        store: The run, on a URL.
        attempt: Number of the attempt.
        index: Of this process.
        count: How many processes the attempt has.
    """

    def __init__(self, store: Store, attempt: int, index: int, count: int) -> None:
        self._remote = store.with_deadline(_ANSWER_S).bucket
        self._url, self._attempt, self._index, self._count = store.url, attempt, index, count
        self._token = _json(
            host=os.uname().nodename, pid=os.getpid(), at=time.time(), processes=count, token=secrets.token_hex(8)
        )
        self._joined = False
        self._began_at = self._next_at = time.monotonic()
        given = os.environ.get(contract.ENV_GATHER, "")
        self._wait_s = float(given) if given.replace(".", "", 1).isdigit() else WAIT_S
        self._trouble = ""
        """What the URL said when it was asked last, if it did not answer."""

    def look(self) -> str | None:
        """Do what is due; return where the processes meet, host:port, once all are there.

        Takes no longer than the URL does to answer, or not to.

        Raises:
            NotWholeError: If one of them does not come in time; the message names it.
            SupersededError: If a newer attempt has begun, or another process has this place.
            JobkitError: If the URL can never be used.
        """
        if (now := time.monotonic()) < self._next_at:
            return None
        waited_s = now - self._began_at
        try:
            self._join()
            where = self._lead(waited_s) if self._index == 0 else self._follow(waited_s)
            self._trouble = ""
        except StorageError as error:
            where, self._trouble = None, str(error)
            if waited_s > self._wait_s + _FOR_FIRST_S:
                raise NotWholeError(f"the processes of attempt {self._attempt} cannot gather: {error}") from None
        pause_s = _ASK_S if waited_s < 60 else _SELDOM_S
        self._next_at = time.monotonic() + min(pause_s, max(0.1, self._wait_s / 4))
        return where

    def give_up(self, reason: str) -> None:
        """Say why this process does not begin: as process 0 for all, unless all have come: then they wait for it."""
        if self._index == 0:
            self._say_missing(f"process 0 was stopped: {reason}")
        if self._joined:
            break_up(self._remote, self._attempt, self._index, reason)

    def _say_missing(self, reason: str, absent: Sequence[int] = ()) -> None:
        with contextlib.suppress(JobkitError):  # then they wait for their time to be over
            self._remote.create(contract.gathered_file(self._attempt), _json(missing=reason, absent=absent))

    def _join(self) -> None:
        if self._joined:
            return
        faults.reach("before_join")
        name = contract.joined_file(self._attempt, self._index)
        if not self._remote.create(name, self._token):
            raise SupersededError(f"another process has joined attempt {self._attempt} as process {self._index}")
        self._joined = True
        faults.reach("after_join")

    def _lead(self, waited_s: float) -> str | None:
        there = self._remote.find(contract.attempt_dir(self._attempt))
        places = range(self._count)
        missing = [index for index in places if contract.joined_file(self._attempt, index) not in there]
        gone = [index for index in places if contract.process_outcome(self._attempt, index) in there]
        if not missing and not gone:
            where = os.environ.get(contract.ENV_COORDINATOR) or f"{own_address()}:{processes.free_port()}"
            faults.reach("before_gathered")
            self._remote.create(contract.gathered_file(self._attempt), _json(coordinator=where, processes=self._count))
            return self._agreed()
        if not gone and waited_s < self._wait_s:
            self._check_newest()
            return None
        named = ", ".join(map(str, (gone or missing)[:20]))
        did = "left again" if gone else f"did not come within {self._wait_s:g} s"
        reason = f"process {named} of {self._count} {did}"
        self._say_missing(reason, () if gone else missing)
        raise NotWholeError(reason)

    def _follow(self, waited_s: float) -> str | None:
        if (where := self._agreed()) is not None:
            return where
        self._check_newest()
        if waited_s >= self._wait_s + _FOR_FIRST_S:
            raise NotWholeError(f"process 0 of {self._count} has not gathered the others within {waited_s:.0f} s")
        return None

    def _agreed(self) -> str | None:
        """Return what process 0 has said, once it has."""
        try:
            content = self._remote.read(contract.gathered_file(self._attempt))
        except FileNotFoundError:
            return None
        word = decode.json_object(content) or {}
        if not isinstance(where := word.get("coordinator"), str):
            raise NotWholeError(str(word.get("missing") or f"{contract.gathered_file(self._attempt)} is damaged"))
        faults.reach("after_gathered")
        return where

    def _check_newest(self) -> None:
        if is_claimed(self._remote, self._attempt + 1):
            raise SupersededError(f"attempt {self._attempt} is over: attempt {self._attempt + 1} has begun")


def open_attempt(remote: Remote, index: int) -> int | None:
    """Return the newest attempt if a process may join it in its place; None if the next one is to be waited for.

    For who is started by no launcher that knows the number. Where the place is taken, it was by an earlier life of the
    same machine's task, which is dead: the others are told so.

    Raises:
        JobkitError: If the URL cannot be read.
    """
    newest = max(remote.numbers(contract.ATTEMPTS), default=-1)
    if newest < 0:
        return None
    there = remote.find(contract.attempt_dir(newest))
    over = f"{contract.attempt_dir(newest)}/{contract.OUTCOME}" in there
    joined = contract.joined_file(newest, index) in there
    if joined and not over and contract.process_outcome(newest, index) not in there:
        break_up(remote, newest, index, "its machine was lost, and has come back", lost=True)
    return None if joined or over or contract.gathered_file(newest) in there else newest


def absent(remote: Remote, attempt: int) -> list[int]:
    """Return the processes that an attempt waited for in vain; none where it was whole, or ended for another reason.

    Raises:
        JobkitError: If the URL cannot be read.
    """
    try:
        word = decode.json_object(remote.read(contract.gathered_file(attempt))) or {}
    except FileNotFoundError:
        return []
    named = word.get("absent")
    return [index for index in named if isinstance(index, int)] if isinstance(named, list) else []


def break_up(remote: Remote, attempt: int, index: int, reason: str, *, lost: bool = False) -> None:
    """Tell the processes of an attempt that one of them has ended badly, unless one has before.

    Args:
        remote: The run's URL.
        attempt: Number of the attempt.
        index: Of the process.
        reason: Why it ended.
        lost: Whether its supervisor is gone too, so that nobody carries its part of a step any more.
    """
    with contextlib.suppress(JobkitError):  # else JAX's own heartbeats tell them, a little later
        remote.create(contract.broken_file(attempt), _json(process=index, reason=reason, lost=lost))


def is_claimed(remote: Remote, attempt: int) -> bool:
    """Tell whether an attempt has begun, with one small request however many there were."""
    try:
        remote.read(f"{contract.attempt_dir(attempt)}/claim.json")
    except FileNotFoundError:
        return False
    return True


def own_address() -> str:
    """Return an address of this machine at which others reach it: that of its way out, on which nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        probe.connect(("<broadcast>", 9))
        return str(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return "127.0.0.1"


def _json(**values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"

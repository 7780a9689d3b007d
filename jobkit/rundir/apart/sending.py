"""Parts on their way from the homes to the URL, and the commit there, once all of them have come.

Each process's supervisor carries its own part. Process 0's commits the step; where that does not do it in time, though
all parts are there, any other does: what it writes is the same, bytes that came with process 0's part.
"""

import contextlib
import time
from typing import NamedTuple

import msgspec

from jobkit import contract, faults, names
from jobkit.errors import JobkitError, StorageError, SupersededError, say
from jobkit.rundir import commits, remote_steps
from jobkit.rundir.apart import parts, whole
from jobkit.rundir.apart.parts import Part
from jobkit.rundir.commits import Commit
from jobkit.rundir.files import crc32c
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.remote import carry
from jobkit.rundir.store import Store, in_words

_POLL_S = 2.0
"""How often it is looked whether the other parts have come."""
_LONG_S, _SELDOM_S = 600.0, 30.0
"""After how long that is said, and how often it is looked then; a part may still come."""
_TAKE_OVER_S, _TAKE_OVER_LEAVING_S = 60.0, 15.0
"""How long process 0's supervisor may take for a commit, before that of process 1 makes it; see `_patience_s`."""
_OTHERS_S = 120.0
"""How long process 0's supervisor stays at the end for parts of others, once all that it carries itself is there."""


class MissingPartError(StorageError):
    """A part that another process carries has not come, and is waited for no longer."""


class _Sent(NamedTuple):
    crc: str
    begun: float
    at: float


class Sender:
    """Carries the parts of one home.

    Args:
        store: The run; its home.
        attempt: Number of the attempt.
        process: Whose home it is.
        ledger: Where uploads and their failures are written.
    """

    def __init__(self, store: Store, attempt: int, process: int, ledger: Ledger) -> None:
        self._store, self._attempt, self._process, self._ledger = store, attempt, process, ledger
        self._sent: dict[int, _Sent] = {}
        self._done: dict[int, str] = {}
        self._seen: dict[int, set[str]] = {}
        self._late: dict[int, float] = {}
        """When it was looked last for parts that are late."""
        self._missing: set[int] = set()
        """Processes whose parts had not come when it was looked last."""
        self._looked = 0.0

    def carry_parts(self, until: float | None = None) -> bool:
        """Carry what is new, newest before older; tell whether a step has become committed on the URL.

        Args:
            until: At the end: how long to wait for what others carry, on the clock of `time.monotonic`.

        Raises:
            SupersededError: If a newer attempt has begun on the URL.
            MissingPartError: If what is waited for at the end does not come.
            JobkitError: If something cannot be carried.
        """
        before = len(self._done)
        while waiting := self._carry(leaving=until is not None):
            if until is None:
                break
            since = time.monotonic() - max((sent.at for sent in self._sent.values()), default=0.0)
            if self._process and since > self._patience_s(leaving=True) + _TAKE_OVER_LEAVING_S:
                break  # what is missing is not this one's
            over = time.monotonic() >= until or (not self._process and since > _OTHERS_S)
            missing = {*self._missing}
            none_to_come = not self._process and missing <= whole.left(self._store.bucket, self._attempt, missing)
            if over or (none_to_come and self._carry(leaving=True)):
                raise MissingPartError(waiting)
            time.sleep(_POLL_S)
        return len(self._done) > before

    def _carry(self, *, leaving: bool) -> str:
        """Carry what is new, whatever of it fails; say what is still waited for, '' if nothing is."""
        waiting = ""
        if not leaving and time.monotonic() < self._looked + _POLL_S:
            return waiting
        self._looked = time.monotonic()
        self._missing.clear()
        failed: JobkitError | None = None
        for step in reversed(self._store.numbers(contract.CHECKPOINTS)):
            try:
                if missing := self._carry_step(step, leaving=leaving):
                    waiting = waiting or f"step {step} of {self._store.url} waits for {missing}"
            except SupersededError:
                raise
            except JobkitError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return waiting

    def _carry_step(self, step: int, *, leaving: bool) -> str:
        """Carry what this home has of a step, unless that is done; say what of it is still waited for."""
        name = remote_steps.commit_name(step) if self._process == 0 else parts.name_of(step, self._process)
        if (content := self._store.get(name)) is None or self._done.get(step) == (crc := crc32c(content)):
            return ""
        sent = self._sent.get(step)
        if sent is None or sent.crc != crc:
            begun = time.monotonic()
            if self._store.bucket.has(remote_steps.commit_name(step)):
                self._done[step] = crc
                return ""
            if not self._push(step, content, shown=leaving):
                return ""
            sent = self._sent[step] = _Sent(crc, begun, time.monotonic())
            self._seen.pop(step, None)
        if not (missing := self._commit(step, sent, leaving=leaving)):
            self._done[step] = crc
        return missing

    def _push(self, step: int, content: bytes, *, shown: bool) -> bool:
        """Carry the files of a part, and then what makes it one; False if the home has lost it meanwhile."""
        remote, place = self._store.bucket, contract.step_dir(step)
        part, target = self._part(step, content), parts.name_of(step, self._process)

        def none_yet() -> None:  # what an earlier attempt's part describes is about to be replaced
            remote.remove([target])

        with contextlib.ExitStack() as stack:
            stack.enter_context(in_words(f"cannot read step {step} of {self._store.path}", absent=True))
            try:
                files = {
                    name: stack.enter_context(open(self._store.file(f"{place}/{name}"), "rb", opener=names.opener))
                    for name in part.files
                }
            except FileNotFoundError:
                return False
            carry(
                f"uploading step {step}",
                part.sizes,
                lambda name: remote_steps.push_file(remote, part, name, files[name], self._attempt, none_yet),
                shown=shown,
            )
        faults.reach("before_part")
        commits.check_newest(remote, self._attempt, f"commit to {remote.url}")
        if not remote.create(target, content):  # of an earlier save of this step, which never became one
            remote.write(target, content)
        faults.reach("after_part")
        return True

    def _part(self, step: int, content: bytes) -> Part | Commit:
        if self._process:
            try:
                return parts.parse(content)
            except (msgspec.MsgspecError, ValueError) as error:
                raise StorageError(f"the part of step {step} in {self._store.path} is damaged: {error}") from None
        commit = commits.parse(content, step, where=str(self._store.file(remote_steps.commit_name(step))))
        return msgspec.structs.replace(commit, files=parts.own(commit) if commit.parts else commit.files)

    def _commit(self, step: int, sent: _Sent, *, leaving: bool) -> str:
        """Commit a step on the URL if all parts are there; say what is missing, '' if nothing is."""
        remote = self._store.bucket
        now = time.monotonic()
        if not leaving and now < self._late.get(step, now - _SELDOM_S) + _SELDOM_S:
            return "a part that is late"
        waited = now - sent.at
        if self._process and waited < self._patience_s(leaving=leaving):
            return "" if remote.has(remote_steps.commit_name(step)) else "commit.json"
        there = remote.find(contract.step_dir(step))
        if remote_steps.commit_name(step) in there:
            return ""
        missing, commit = whole.commit(remote, step, self._attempt, there, self._seen.setdefault(step, set()))
        if commit is not None:
            seconds = round(time.monotonic() - sent.begun, 6)
            self._ledger.append("uploaded", durable=True, step=step, seconds=seconds, bytes=commit.nbytes)
        if not missing:
            return ""
        self._missing.update(missing)
        named = f"the part of process {', '.join(map(str, missing))}"
        if waited > _LONG_S:
            if step not in self._late:
                say(f"step {step} of {self._store.url} has waited {_LONG_S:g} s for {named}, and waits on")
            self._late[step] = now
        return named

    def _patience_s(self, *, leaving: bool) -> float:
        """Return how long this process leaves a commit to others: the later, the more of them are before it.

        A thousand that made it at once would each read all parts, and write one object more often than a store allows.
        """
        share = 1 + (self._process.bit_length() - 1) / 4
        return share * (_TAKE_OVER_LEAVING_S if leaving else _TAKE_OVER_S)

"""Carry a run directory between its node-local home and its URL.

For a run on an object store everything is written to a home on this node first, which is a whole run directory: a save
is committed there in the time a local disk takes, and a restart on the same node restores from it. The mirror, threads
of the supervisor, carries what is new to the URL: a step's files in parallel, each created only if it is not there yet,
and commit.json last. A program that is killed right after its local commit still gets its save into the bucket. Logs
and ledgers (outbox.py), and what is asked of the run, have threads of their own: neither keeps a checkpoint waiting.

Under a dead bucket the training goes on; saves wait in the home, as many as retention keeps, until the bucket is back.
"""

import contextlib
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import IO, Any

import google_crc32c
import msgspec

from jobkit import contract, names
from jobkit.errors import ConfigError, DamagedError, JobkitError, StorageError, SupersededError, say
from jobkit.rundir import commits, growing_files
from jobkit.rundir.commits import Commit
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.outbox import Outbox
from jobkit.rundir.progress import transfer
from jobkit.rundir.remote import Remote, each
from jobkit.rundir.store import Store, checksum, in_words, remove_tree, sync_tree

_TICK_S = 0.5
_TELL_S = 10.0
_FILES_S = 2.0
"""Logs and ledgers of a running attempt reach the URL this often."""
_REST_S = 10.0
"""How long logs and ledgers may take once everything else is there."""
_CANCEL_S = 2.0
"""A cancel that was written on another machine is seen after this long."""
_ROOT_FILES = (contract.RUN_JSON, contract.README, contract.EVENTS, contract.STRATEGY)


class Mirror:
    """Carries one attempt's home to its URL until closed; has nothing to do for a run on a file system.

    Args:
        store: The run directory.
        attempt: Number of the attempt; the mirror commits nothing once a newer one exists.
        ledger: Where uploads and their failures are written.
    """

    def __init__(self, store: Store, attempt: int, ledger: Ledger) -> None:
        # A dead bucket is told of soon; whoever carries tries again anyway.
        self._store = store.with_deadline(_TELL_S)
        self._attempt, self._ledger = attempt, ledger
        self._since = time.time() - 0.05  # file systems keep coarse times
        self._done: set[int] = set()
        self._old_uploads = True
        self._outbox = Outbox(self._store, attempt, self._check_newest)
        self._failing: dict[str, float] = {}
        """What fails, and since when."""
        self._failing_lock = threading.Lock()
        self._closing = threading.Event()
        # A log of any size, or a bucket that is slow to take a step, must not keep the others waiting.
        self._threads = [
            threading.Thread(target=self._go_on, args=(name, every_s, work), name=f"jobkit-{name}", daemon=True)
            for name, every_s, work in (
                ("steps", _TICK_S, self._carry_steps),
                ("files", _FILES_S, self._carry_files_on),
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
            StorageError: If the newest committed step is not on the URL after `deadline_s`; it stays in the home.
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
                self._carry(until=max(end, time.monotonic() + _REST_S))
                return
            except SupersededError:
                raise
            except JobkitError as error:
                if time.monotonic() >= end:
                    raise StorageError(f"{error}; the newest saves wait in {self._store.path}") from error
                self._fails("the rest", error)
                time.sleep(_TICK_S)

    def _go_on(self, name: str, every_s: float, work: Callable[[], None]) -> None:
        while not self._closing.wait(every_s) and self.superseded is None:
            try:
                work()
            except SupersededError as error:
                self._give_way(error)
            except JobkitError as error:
                self._fails(name, error)
            except Exception as error:  # whatever it is, saves must go on being carried
                self._fails(name, StorageError(f"cannot upload to {self._store.url}: {type(error).__name__}: {error}"))
            else:
                self._works(name)

    def _give_way(self, error: SupersededError) -> None:
        with self._failing_lock:
            if self.superseded is None:
                self.superseded = error
                self._ledger.append("superseded", reason=str(error))

    def _fails(self, name: str, error: JobkitError) -> None:
        with self._failing_lock:
            if not self._failing:
                self._ledger.append("upload_failed", reason=str(error))
                say(f"{error}; saves wait in {self._store.path} meanwhile")
            self._failing.setdefault(name, time.monotonic())

    def _works(self, name: str) -> None:
        with self._failing_lock:
            since = min(self._failing.values(), default=0.0)
            if self._failing.pop(name, None) is not None and not self._failing:
                self._ledger.append("upload_back", after_s=round(time.monotonic() - since, 3))

    def _carry(self, *, until: float) -> None:
        """Carry everything that is left, steps first."""
        # At the end in any case: who decides whether the run goes on looks into the home.
        self._hear_requests()
        self._carry_steps(shown=True)
        self.carry_files(until=until)

    def _hear_requests(self) -> None:
        hear(self._store, contract.CANCEL)
        hear(self._store, contract.SAVE)

    def _carry_steps(self, *, shown: bool = False) -> None:
        """Carry new steps, newest before older; one that cannot be carried holds up no other."""
        assert self._store.remote is not None
        if self._old_uploads:
            self._old_uploads = False
            with contextlib.suppress(JobkitError):
                # Of dead attempts: this one has claimed its number, so that no older one can commit any more.
                self._store.remote.abort_uploads()
        failed: JobkitError | None = None
        waiting = [step for step in reversed(commits.steps(self._store)) if step not in self._done]
        for step in waiting:
            try:
                if push_step(self._store, step, attempt=self._attempt, ledger=self._ledger, shown=shown):
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
        found = self._store.stat(contract.STRATEGY)
        return found is not None and found.st_mtime >= self._since

    def carry_files(self, *, until: float | None = None) -> None:
        """Carry the rest of logs, ledgers and what describes the run; what is not up in time waits in the home.

        Args:
            until: No further part of a log is sent then, on the clock of `time.monotonic`; by default in a few seconds.

        Raises:
            JobkitError: If the URL cannot be written.
        """
        if self._store.remote is None:
            return
        end = time.monotonic() + _REST_S if until is None else until
        if not self._outbox.carry(self._described(), final=True, go_on=lambda: time.monotonic() < end):
            say(f"not all logs of {self._store.url} are there yet; the rest waits in {self._store.path}")

    def _carry_files_on(self) -> None:
        self._outbox.carry(
            self._described(), final=False, go_on=lambda: not self._closing.is_set() and self.superseded is None
        )

    def _described(self) -> list[str]:
        """List what describes the run and is the running side's to say."""
        saying = self._said_what_to_keep()
        return [
            name
            for name in described(self._store)
            if name != contract.RUN_JSON and (name != contract.STRATEGY or saying)
        ]

    def _check_newest(self) -> None:
        assert self._store.remote is not None
        check_newest(self._store.remote, self._attempt)

    def _retain(self) -> None:
        """Remove remote steps that retention does not keep, and what dead attempts left unfinished."""
        remote, strategy = self._store.remote, keep_of(self._store)
        assert remote is not None
        by_step = group(remote.find(contract.CHECKPOINTS))
        committed = {step for step, found in by_step.items() if _commit_name(step) in found}
        scores = remote.find(contract.SCORES)
        known = {step: metrics_of(remote, step, scores) for step in committed}
        newest, local = max(committed, default=-1), commits.steps(self._store)
        unfinished = [step for step in by_step.keys() - committed if step < newest and step not in local]
        superfluous = strategy.superfluous(known)
        if superfluous or unfinished:
            check_newest(remote, self._attempt)  # what looks unfinished may be a newer attempt's upload
        for step in superfluous:
            remove(remote, step)
        for step in unfinished:
            remote.remove(by_step[step])


def hear(store: Store, name: str) -> None:
    """Bring what was asked of the run on another machine into the home.

    Args:
        store: The run.
        name: `contract.CANCEL` or `contract.SAVE`.

    Raises:
        JobkitError: If the URL cannot be read.
    """
    if store.remote is None:
        return
    with contextlib.suppress(FileNotFoundError):
        content = store.remote.read(name)
        if not store.exists(name) or store.read(name) != content:
            store.write(name, content)


def described(store: Store) -> list[str]:
    """List the files of a home that say what the run is and what the launching side did."""
    code = [f"{contract.CODE}/{name}" for name in store.names(contract.CODE) if name.endswith(".tar.gz")]
    drawn = [f"{contract.TENSORBOARD}/{name}" for name in store.names(contract.TENSORBOARD) if "tfevents" in name]
    return [name for name in _ROOT_FILES if store.exists(name)] + code + drawn


def publish(store: Store) -> None:
    """Write what describes a new run to its URL, run.json first.

    Raises:
        ConfigError: If the URL holds a run already.
        JobkitError: If it cannot be written.
    """
    if store.remote is None:
        return
    if not store.remote.create(contract.RUN_JSON, store.read(contract.RUN_JSON)):
        raise ConfigError(f"{store.url} already holds a run: continue it with 'jobkit resume {store.url}'")
    carry_described(store)


def carry_described(store: Store) -> None:
    """Write what describes a run to its URL, from a launching side that has just added to it."""
    if store.remote is not None:
        for name in described(store):
            if name != contract.RUN_JSON:
                store.remote.write(name, store.read(name))


_NOT_BROUGHT = tuple(f"{place}/" for place in (contract.CHECKPOINTS, contract.CACHE, contract.LEASES))
"""What each who needs it fetches, or reads on the URL alone."""


def refresh(store: Store) -> None:
    """Bring what the URL knows of a run into the home: all but checkpoints and logs (see `fetch_logs`).

    For a home that nobody writes to just now.

    Ledgers and logs only grow, so that the longer one is the newer. The launching side's ledger is read before the rest
    is listed, and written after it: where it says that the run has ended, the logs are whole. Lines of it that are only
    here stay, unless another machine has taken the run over meanwhile and gone on from lines before them.
    """
    remote = store.remote
    if remote is None:
        return
    found = remote.find()
    ledger = None
    if _size(store, contract.EVENTS) != found.get(contract.EVENTS, -1):
        ledger = _newer(store, remote)
        found = remote.find()
    _bring(store, found, lambda name: not name.startswith(_NOT_BROUGHT) and not growing_files.is_log(name))
    if ledger is not None:
        store.write(contract.EVENTS, ledger)
    if contract.CANCEL not in found:
        store.remove(contract.CANCEL)


def _bring(store: Store, found: Mapping[str, int], wanted: Callable[[str], bool]) -> None:
    """Bring files of a listing into the home, as far as they are not there; what is gone meanwhile stays as it is."""
    for name, pieces in growing_files.grouped(found).items():
        if name != contract.EVENTS and wanted(name):
            with contextlib.suppress(FileNotFoundError):
                _bring_one(store, name, pieces)


def _bring_one(store: Store, name: str, pieces: growing_files.Parts) -> None:
    remote = store.remote
    assert remote is not None
    have, size = _size(store, name), growing_files.size_of(pieces)
    if growing_files.is_growing(name):
        if have < size:
            growing_files.fetch(store, name, pieces)
    elif have < 0 or (have < size and name != contract.LOCK):
        store.write(name, remote.read(name))
    elif _is_rewritten(name) and store.read(name) != (content := remote.read(name)):
        store.write(name, content)


def fetch_logs(store: Store, attempt: int | None = None) -> None:
    """Bring what the programs of an attempt, or of all, have printed into the home, as far as the URL has it.

    Raises:
        JobkitError: If the URL cannot be read.
    """
    if store.remote is not None:
        place = contract.ATTEMPTS if attempt is None else contract.attempt_dir(attempt)
        _bring(store, store.remote.find(place), growing_files.is_log)


def _newer(store: Store, remote: Remote) -> bytes | None:
    """Return the launching side's ledger on the URL; None if it is the beginning of the home's, or is not there."""
    try:
        content = remote.read(contract.EVENTS)
    except FileNotFoundError:
        return None
    have = store.read(contract.EVENTS) if store.exists(contract.EVENTS) else b""
    return None if have.startswith(content) else content


def _is_rewritten(name: str) -> bool:
    """Tell whether a file changes without growing: run.json when the run moves to another backend, what is asked of the
    run, and metrics.
    """
    return name in (contract.RUN_JSON, contract.CANCEL, contract.SAVE) or name.startswith(contract.SCORES + "/")


def _size(store: Store, name: str) -> int:
    """Return the size of a file in the home, -1 if it is not there."""
    found = store.stat(name)
    return -1 if found is None else found.st_size


def fetch_ledgers(store: Store, attempt: int) -> None:
    """Bring what the processes and supervisors of earlier attempts wrote down into the home, where another node did.

    Raises:
        JobkitError: If the URL cannot be read.
    """
    if store.remote is None:
        return

    def wanted(name: str) -> bool:
        earlier, _, file = name.removeprefix(contract.ATTEMPTS + "/").partition("/")
        number = names.number(earlier)
        return number is not None and number < attempt and file.startswith("events-")

    _bring(store, store.remote.find(contract.ATTEMPTS), wanted)


def keep_of(store: Store) -> commits.Keep:
    """Return what the program's `Run` keeps; everything while it has not said."""
    from jobkit.rundir.ledger import read_json

    with contextlib.suppress(DamagedError):  # of what is not written by a Run nothing is removed
        if (told := read_json(store, contract.STRATEGY)) is not None and (keep := _keep(told)) is not None:
            return keep
    return commits.Keep(newest=1 << 30)


def _keep(strategy: Mapping[str, Any]) -> commits.Keep | None:
    newest, best = strategy.get("keep", 1 << 30), strategy.get("keep_best")
    if type(newest) is not int or newest < 1:
        return None
    if best is None:
        return commits.Keep(newest)
    named = isinstance(best, list) and len(best) == 2 and isinstance(best[0], str) and best[1] in ("min", "max")
    return commits.Keep(newest, (best[0], best[1])) if named else None


def _commit_name(step: int) -> str:
    return f"{contract.step_dir(step)}/{contract.COMMIT}"


def group(found: Mapping[str, int]) -> dict[int, list[str]]:
    """Group object names below checkpoints/ by step."""
    steps: dict[int, list[str]] = {}
    for name in found:
        step = names.number(name.removeprefix(contract.CHECKPOINTS + "/").partition("/")[0])
        if step is not None:
            steps.setdefault(step, []).append(name)
    return steps


def read_remote(remote: Remote, step: int) -> Commit:
    """Read a remote step's commit.json."""
    try:
        return commits.parse(remote.read(_commit_name(step)), step, where=f"{remote.url}/{_commit_name(step)}")
    except FileNotFoundError:
        raise DamagedError(f"step {step} of {remote.url} is not committed") from None


def remote_steps(remote: Remote) -> list[int]:
    """List the committed steps on a URL, in rising order, with one request per thousand objects."""
    steps = group(remote.find(contract.CHECKPOINTS))
    return sorted(step for step, found in steps.items() if _commit_name(step) in found)


def remote_metrics(remote: Remote) -> dict[int, dict[str, float]]:
    """Return the metrics of every committed step on a URL."""
    found, scores = {}, remote.find(contract.SCORES)
    for step in remote_steps(remote):
        with contextlib.suppress(StorageError):
            found[step] = metrics_of(remote, step, scores)
    return found


def metrics_of(remote: Remote, step: int, scores: Container[str]) -> dict[str, float]:
    """Return the metrics of a step on a URL, those that came after its commit included.

    Args:
        remote: The URL.
        step: A committed step.
        scores: Names of the files there with such metrics.
    """
    commit = read_remote(remote, step)
    name = commits.score_file(commit)
    return dict((commits.scored(commit, remote.read(name)) if name in scores else commit).metrics)


def push_step(store: Store, step: int, *, attempt: int, ledger: Ledger, shown: bool = False) -> bool:
    """Upload a committed local step and commit it on the URL.

    Args:
        store: The run directory.
        step: A step that is committed in the home.
        attempt: Number of the attempt that uploads.
        ledger: Where the upload is written.
        shown: Whether a person at a terminal sees a progress bar.

    Returns:
        False if retention removed it locally before its files could be opened.

    Raises:
        SupersededError: If a newer attempt has begun on the URL.
        JobkitError: If the upload failed.
    """
    remote = store.remote
    assert remote is not None
    begun = time.monotonic()
    if _commit_name(step) in remote.find(contract.step_dir(step)):
        # Perhaps with other bytes, of an attempt on another node: what is committed on the URL is never touched.
        ledger.append("skipped", step=step, reason="committed on the URL before")
        return True
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_words(f"cannot read step {step} of {store.path}"))
        try:
            # Opened all at once, so that retention in the program may remove the step while it is being uploaded.
            content = store.read(_commit_name(step))
            commit = commits.parse(content, step, where=str(store.file(_commit_name(step))))
            root = contract.step_dir(step)
            files = {
                name: stack.enter_context(open(store.file(f"{root}/{name}"), "rb", opener=names.opener))
                for name in commit.files
            }
        except FileNotFoundError:
            return False
        with transfer(f"uploading step {step}", commit.nbytes, shown=shown) as advance:

            def push(name: str) -> None:
                _push_file(remote, commit, name, files[name], attempt)
                advance(commit.files[name].size)

            for _ in each(push, files):
                pass
    check_newest(remote, attempt)
    if not remote.create(_commit_name(step), content):
        ledger.append("skipped", step=step, reason="committed on the URL before")
        return True
    seconds = round(time.monotonic() - begun, 6)
    ledger.append("uploaded", durable=True, step=step, seconds=seconds, bytes=commit.nbytes)
    return True


def _push_file(remote: Remote, commit: Commit, name: str, file: IO[bytes], attempt: int) -> None:
    """Create one file; what a dead attempt left under its name gives way, what is the same stays."""
    target = f"{contract.step_dir(commit.step)}/{name}"
    content = file.read()
    expected = commit.files[name]
    if f"{google_crc32c.value(content):08x}" != expected.crc32c:
        raise StorageError(f"{name} of step {commit.step} changed on the local disk after its commit")
    for _ in range(5):
        if remote.create(target, content) or not content:
            return
        # Only the newest attempt may take a file away, and none of a step that has been committed meanwhile.
        check_newest(remote, attempt)
        if _commit_name(commit.step) in remote.find(contract.step_dir(commit.step)):
            raise StorageError(f"step {commit.step} of {remote.url} was committed by another attempt meanwhile")
        remote.remove([target])
    raise StorageError(f"{remote.url}/{target} is being written by another attempt")


def check_newest(remote: Remote, attempt: int) -> None:
    """Refuse to commit once a newer attempt has claimed the run.

    Raises:
        SupersededError: Naming it.
    """
    newest = max(remote_attempts(remote), default=attempt)
    if newest > attempt:
        raise SupersededError(f"attempt {attempt} may not commit to {remote.url}: attempt {newest} has taken over")


def remote_attempts(remote: Remote) -> list[int]:
    """List the attempts that claimed a number on a URL."""
    claimed = {name.removeprefix(contract.ATTEMPTS + "/").partition("/")[0] for name in remote.find(contract.ATTEMPTS)}
    return sorted(number for text in claimed if (number := names.number(text)) is not None)


def claim(store: Store) -> int:
    """Claim the next attempt number, on the URL where there is one, and its directory."""
    if store.remote is None:
        return store.claim(contract.ATTEMPTS)
    _identify(store)
    local = max(store.numbers(contract.ATTEMPTS), default=-1)
    while True:
        number = max([*remote_attempts(store.remote), local]) + 1
        token = msgspec.json.encode({"host": os.uname().nodename, "pid": os.getpid(), "at": time.time_ns()})
        if store.remote.create(f"{contract.attempt_dir(number)}/claim.json", token):
            store.write(f"{contract.attempt_dir(number)}/claim.json", token)
            return number


def _identify(store: Store) -> None:
    """Set aside what a home holds of another run that was once at the same URL."""
    remote = store.remote
    assert remote is not None
    if not remote.find(contract.ID):
        remote.create(contract.ID, secrets.token_hex(16).encode())
    identity = remote.read(contract.ID)
    if store.exists(contract.ID) and store.read(contract.ID) == identity:
        return
    if store.exists(contract.ID) or store.names(contract.CHECKPOINTS):
        _set_home_aside(store, contract.CHECKPOINTS, contract.ATTEMPTS, contract.SCORES, contract.STRATEGY)
    store.write(contract.ID, identity)


def is_deleted(store: Store) -> bool:
    """Tell whether this is the home of a run of which nothing is left on its URL.

    Raises:
        JobkitError: If the URL cannot be read.
    """
    return store.remote is not None and store.exists(contract.RUN_JSON) and not store.remote.find()


def set_deleted_aside(store: Store) -> None:
    """Set aside what a home holds of a run that is deleted; nothing of it may be running.

    Raises:
        JobkitError: If the URL cannot be read, or the home cannot be written.
    """
    if is_deleted(store):
        stays = (contract.LOCK, contract.CACHE)
        _set_home_aside(store, *(name for name in store.names("") if name[0] != "." and name not in stays))


def _set_home_aside(store: Store, *names: str) -> None:
    """Move what a home holds out of the way; what makes it be done goes last, so that after a kill it is done again."""
    aside = store.file(f".old-{time.time_ns()}")
    with in_words(f"cannot move what {store.path} holds of another run"):
        aside.mkdir()
        for name in sorted(names, key=(contract.ID, contract.RUN_JSON).__contains__):
            with contextlib.suppress(FileNotFoundError):
                os.rename(store.file(name), aside / name)
    say(f"{store.path} held another run of the same URL; it lies in {aside} now")


def fetch_newest(store: Store, ledger: Ledger, *, attempt: int) -> int | None:
    """Bring the newest whole step of the URL into the home, unless the home has it or a newer one.

    A step that does not check out is set aside on the URL, with the reason, and the next older one is taken.
    """
    remote = store.remote
    assert remote is not None
    for step in reversed(remote_steps(remote)):
        if any(have >= step and not commits.problems(store, have) for have in commits.steps(store)):
            return None
        try:
            wrong = fetch_step(store, step, attempt=attempt)
            if wrong:  # once more: one bad download is no reason to lose a step
                wrong = fetch_step(store, step, attempt=attempt)
        except FileNotFoundError:
            continue  # removed meanwhile
        if not wrong:
            return step
        set_aside(remote, step, wrong)
        ledger.append("set_aside", step=step, reason=wrong[0], durable=True)
    return None


def fetch_step(store: Store, step: int, *, attempt: int) -> list[str]:
    """Download a step into the home and check every byte; return what is wrong with it."""
    remote = store.remote
    assert remote is not None
    try:
        content = remote.read(_commit_name(step))
        commit = commits.parse(content, step, where=f"{remote.url}/{_commit_name(step)}")
    except DamagedError as error:
        return [str(error)]
    stage = commits.new_stage(store, step, attempt)
    try:
        with in_words(f"cannot write step {step} into {store.path}"):
            wrong = _fetch_files(remote, commit, f"downloading step {step}", stage)
            if wrong:
                return wrong
            stage.mkdir(exist_ok=True)
            (stage / contract.COMMIT).write_bytes(content)
            sync_tree(stage)
            final = store.file(contract.step_dir(step))
            if final.exists():  # damaged here: the home's own copy gives way to the URL's
                commits.set_aside(store, step, commits.problems(store, step))
            os.rename(stage, final)
        with contextlib.suppress(FileNotFoundError, JobkitError):
            store.write(commits.score_file(commit), remote.read(commits.score_file(commit)))
        return []
    finally:
        remove_tree(stage)


def _fetch_files(remote: Remote, commit: Commit, doing: str, stage: Path, *, keep: bool = True) -> list[str]:
    """Download a step's files in parallel; return what is wrong with them."""
    with transfer(doing, commit.nbytes) as advance:

        def fetch(name: str) -> str:
            wrong = _fetch_file(remote, commit, name, stage)
            if not keep:
                (stage / name).unlink(missing_ok=True)
            advance(commit.files[name].size)
            return wrong

        return [told for told in each(fetch, commit.files) if told]


def _fetch_file(remote: Remote, commit: Commit, name: str, stage: Path) -> str:
    """Download one file; return what is wrong with it, or ''."""
    try:
        remote.fetch(f"{contract.step_dir(commit.step)}/{name}", stage / name)
    except FileNotFoundError:
        return f"{name} is missing"
    size, crc = checksum(stage / name)
    expected = commit.files[name]
    return "" if (size, crc) == (expected.size, expected.crc32c) else f"{name} differs from its checksum"


def problems(store: Store, step: int) -> list[str]:
    """Check every byte of a step on the URL against its commit.json; return what is wrong."""
    remote = store.remote
    assert remote is not None
    try:
        commit = read_remote(remote, step)
    except DamagedError as error:
        return [str(error)]
    with tempfile.TemporaryDirectory(prefix="jobkit-verify-") as scratch:
        wrong = _fetch_files(remote, commit, f"verifying step {step}", Path(scratch), keep=False)
    prefix = contract.step_dir(step) + "/"
    present = {name.removeprefix(prefix) for name in remote.find(contract.step_dir(step))}
    extra = sorted(present - commit.files.keys() - {contract.COMMIT})
    return wrong + [f"{name} does not belong there" for name in extra]


def remove(remote: Remote, step: int) -> None:
    """Remove a step from a URL; commit.json first, so that no reader takes a half-removed step for whole."""
    found = remote.find(contract.step_dir(step))
    remote.remove([name for name in found if name == _commit_name(step)])
    remote.remove([name for name in found if name != _commit_name(step)])


def set_aside(remote: Remote, step: int, reasons: list[str]) -> None:
    """Move a damaged step on the URL out of the way, with the reason; commit.json goes first."""
    target = f"{contract.SET_ASIDE}/{step}-{int(time.time())}"
    found = sorted(remote.find(contract.step_dir(step)), key=lambda name: not name.endswith(contract.COMMIT))
    remote.write(f"{target}.reason.txt", "\n".join(reasons).encode())
    for name in found:
        remote.write(name.replace(contract.step_dir(step), target, 1), remote.read(name))
        remote.remove([name])

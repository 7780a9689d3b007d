"""Carry a run directory between its node-local home and its URL.

For a run on an object store everything is written to a home on this node first, which is a whole run directory: a save
is committed there in the time a local disk takes, and a restart on the same node restores from it. The mirror, a thread
of the supervisor, carries what is new to the URL: a step's files in parallel, each created only if it is not there yet,
and commit.json last. A program that is killed right after its local commit still gets its save into the bucket.

Under a dead bucket the training goes on; saves wait in the home, as many as retention keeps, until the bucket is back.
"""

import contextlib
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Container, Mapping
from pathlib import Path
from typing import IO

import google_crc32c
import msgspec

from jobkit import commits, contract
from jobkit.commits import Commit
from jobkit.errors import ConfigError, JobkitError, StorageError, SupersededError, say
from jobkit.ledger import Ledger
from jobkit.progress import transfer
from jobkit.remote import Remote, each
from jobkit.storage import Store, checksum, remove_tree, sync_tree

_TICK_S = 0.5
_TELL_S = 10.0
_FILES_S = 2.0
"""Logs and ledgers of a running attempt reach the URL this often."""
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
        self._sizes: dict[str, tuple[int, int]] = {}
        self._files_at = self._cancel_at = 0.0
        self._failing_since: float | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jobkit-mirror", daemon=True)
        self.superseded: SupersededError | None = None
        """Says which newer attempt has taken over, once one has; nothing is carried from then on."""

    def start(self) -> None:
        """Begin carrying, in a thread."""
        if self._store.remote is not None:
            self._thread.start()

    def close(self, *, deadline_s: float) -> None:
        """Carry everything that is left and end.

        Raises:
            StorageError: If the newest committed step is not on the URL after `deadline_s`; it stays in the home.
        """
        if self._store.remote is None:
            return
        self._closing.set()
        self._thread.join()
        end = time.monotonic() + deadline_s
        while True:
            try:
                self._carry(final=True)
                return
            except SupersededError:
                raise
            except JobkitError as error:
                if time.monotonic() >= end:
                    raise StorageError(f"{error}; the newest saves wait in {self._store.path}") from error
                self._hear(error)
                time.sleep(_TICK_S)

    def _run(self) -> None:
        assert self._store.remote is not None
        with contextlib.suppress(JobkitError):
            # Of dead attempts: this one has claimed its number, so that no older one can commit any more.
            self._store.remote.abort_uploads()
        while not self._closing.wait(_TICK_S):
            try:
                self._carry(final=False)
            except SupersededError as error:
                self.superseded = error
                self._ledger.append("superseded", reason=str(error))
                return
            except JobkitError as error:
                self._hear(error)
            except Exception as error:  # whatever it is, saves must go on being carried
                self._hear(StorageError(f"cannot upload to {self._store.url}: {type(error).__name__}: {error}"))
            else:
                if self._failing_since is not None:
                    self._ledger.append("upload_back", after_s=round(time.monotonic() - self._failing_since, 3))
                    self._failing_since = None

    def _hear(self, error: JobkitError) -> None:
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            self._ledger.append("upload_failed", reason=str(error))
            say(f"{error}; saves wait in {self._store.path} meanwhile")

    def _carry(self, *, final: bool) -> None:
        """Carry what is new: steps first, newest before older; one that cannot be carried holds up no other."""
        # At the end in any case: who decides whether the run goes on looks into the home.
        if final or time.monotonic() - self._cancel_at >= _CANCEL_S:
            self._cancel_at = time.monotonic()
            hear(self._store, contract.CANCEL)
            hear(self._store, contract.SAVE)
        failed: JobkitError | None = None
        waiting = [step for step in reversed(commits.steps(self._store)) if step not in self._done]
        for step in waiting:
            try:
                if push_step(self._store, step, attempt=self._attempt, ledger=self._ledger, shown=final):
                    self._done.add(step)
            except SupersededError:
                raise
            except JobkitError as error:
                failed = failed or error
        if waiting and failed is None and self._said_what_to_keep():
            self._retain()
        if final or time.monotonic() - self._files_at >= _FILES_S:
            self._files_at = time.monotonic()
            self.carry_files()
        if failed is not None:
            raise failed

    def _said_what_to_keep(self) -> bool:
        """Tell whether the program of this attempt has said what to keep; what is in the home may be old."""
        try:
            return self._store.file(contract.STRATEGY).stat().st_mtime >= self._since
        except OSError:
            return False

    def carry_files(self) -> None:
        """Carry logs, ledgers and what describes the run, as far as they have grown.

        Raises:
            JobkitError: If the URL cannot be written.
        """
        if self._store.remote is None:
            return
        own = contract.attempt_dir(self._attempt)
        mine = [f"{place}/{name}" for place in (own, contract.SCORES) for name in self._store.names(place)]
        for name in [*described(self._store), *(name for name in mine if "/." not in name)]:
            if name == contract.RUN_JSON or (name == contract.STRATEGY and not self._said_what_to_keep()):
                continue  # run.json is the launching side's
            info = self._store.file(name).stat()
            stamp = (info.st_size, info.st_mtime_ns)
            if self._sizes.get(name) != stamp:
                self._store.remote.write(name, self._store.read(name))
                self._sizes[name] = stamp

    def _retain(self) -> None:
        """Remove remote steps that retention does not keep, and what dead attempts left unfinished."""
        remote, strategy = self._store.remote, keep_of(self._store)
        assert remote is not None
        by_step = group(remote.find(contract.CHECKPOINTS))
        committed = {step for step, names in by_step.items() if _commit_name(step) in names}
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


def refresh(store: Store) -> None:
    """Bring what the URL knows of a run into the home: all but checkpoints; for a home that nobody writes to just now.

    Ledgers and logs only grow, so that the longer one is the newer. The launching side's ledger is read before the rest
    is listed, and written after it: where it says that the run has ended, the logs are whole.
    """
    remote = store.remote
    if remote is None:
        return
    found = remote.find()
    ledger = None
    if contract.EVENTS in found and _size(store, contract.EVENTS) < found[contract.EVENTS]:
        ledger = remote.read(contract.EVENTS)
        found = remote.find()
    for name, size in found.items():
        if name.startswith(contract.CHECKPOINTS + "/") or name == contract.EVENTS:
            continue
        have = _size(store, name)
        if have < 0 or (have < size and name != contract.LOCK):
            store.write(name, remote.read(name))
        elif _is_rewritten(name) and store.read(name) != (content := remote.read(name)):
            store.write(name, content)
    if ledger is not None:
        store.write(contract.EVENTS, ledger)
    if contract.CANCEL not in found:
        store.remove(contract.CANCEL)


def _is_rewritten(name: str) -> bool:
    """Tell whether a file changes without growing: run.json when the run moves to another backend, and metrics."""
    return name == contract.RUN_JSON or name.startswith(contract.SCORES + "/")


def _size(store: Store, name: str) -> int:
    """Return the size of a file in the home, -1 if it is not there."""
    path = store.file(name)
    return path.stat().st_size if path.exists() else -1


def fetch_ledgers(store: Store, attempt: int) -> None:
    """Bring what the processes and supervisors of earlier attempts wrote down into the home, where another node did.

    Raises:
        JobkitError: If the URL cannot be read.
    """
    if store.remote is None:
        return
    for name, size in store.remote.find(contract.ATTEMPTS).items():
        earlier, _, file = name.removeprefix(contract.ATTEMPTS + "/").partition("/")
        of_earlier = earlier.isdecimal() and int(earlier) < attempt and file.startswith("events-")
        if of_earlier and _size(store, name) < size:
            store.write(name, store.remote.read(name))


def keep_of(store: Store) -> commits.Keep:
    """Return what the program's `Run` keeps; everything while it has not said."""
    from jobkit.ledger import read_json

    strategy = read_json(store, contract.STRATEGY)
    if strategy is None:
        return commits.Keep(newest=1 << 30)
    best = strategy.get("keep_best")
    return commits.Keep(int(strategy["keep"]), (best[0], best[1]) if best else None)


def _commit_name(step: int) -> str:
    return f"{contract.step_dir(step)}/{contract.COMMIT}"


def group(found: Mapping[str, int]) -> dict[int, list[str]]:
    """Group object names below checkpoints/ by step."""
    steps: dict[int, list[str]] = {}
    for name in found:
        part = name.split("/")[1]
        if part.isdecimal():
            steps.setdefault(int(part), []).append(name)
    return steps


def read_remote(remote: Remote, step: int) -> Commit:
    """Read a remote step's commit.json."""
    try:
        return commits.parse(remote.read(_commit_name(step)), step, where=f"{remote.url}/{_commit_name(step)}")
    except FileNotFoundError:
        raise StorageError(f"step {step} of {remote.url} is not committed") from None


def remote_steps(remote: Remote) -> list[int]:
    """List the committed steps on a URL, in rising order, with one request per thousand objects."""
    steps = group(remote.find(contract.CHECKPOINTS))
    return sorted(step for step, names in steps.items() if _commit_name(step) in names)


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
        try:
            # Opened all at once, so that retention in the program may remove the step while it is being uploaded.
            content = store.read(_commit_name(step))
            commit = commits.parse(content, step, where=str(store.file(_commit_name(step))))
            root = store.file(contract.step_dir(step))
            files = {name: stack.enter_context((root / name).open("rb")) for name in commit.files}
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
    numbers = {name.split("/")[1] for name in remote.find(contract.ATTEMPTS)}
    return sorted(int(number) for number in numbers if number.isdecimal())


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
        aside = store.file(f".old-{time.time_ns()}")
        aside.mkdir()
        for name in (contract.CHECKPOINTS, contract.ATTEMPTS, contract.STRATEGY):
            with contextlib.suppress(FileNotFoundError):
                os.rename(store.file(name), aside / name)
        print(f"jobkit: {store.path} held another run of the same URL; it lies in {aside} now", file=sys.stderr)
    store.write(contract.ID, identity)


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
    except StorageError as error:
        return [str(error)]
    stage = commits.new_stage(store, step, attempt)
    try:
        wrong = _fetch_files(remote, commit, f"downloading step {step}", stage)
        if wrong:
            return wrong
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
    except StorageError as error:
        return [str(error)]
    with tempfile.TemporaryDirectory(prefix="jobkit-verify-") as scratch:
        wrong = _fetch_files(remote, commit, f"verifying step {step}", Path(scratch), keep=False)
    prefix = contract.step_dir(step) + "/"
    present = {name.removeprefix(prefix) for name in remote.find(contract.step_dir(step))}
    extra = sorted(present - commit.files.keys() - {contract.COMMIT})
    return wrong + [f"{name} does not belong there" for name in extra]


def remove(remote: Remote, step: int) -> None:
    """Remove a step from a URL; commit.json first, so that no reader takes a half-removed step for whole."""
    names = remote.find(contract.step_dir(step))
    remote.remove([name for name in names if name == _commit_name(step)])
    remote.remove([name for name in names if name != _commit_name(step)])


def set_aside(remote: Remote, step: int, reasons: list[str]) -> None:
    """Move a damaged step on the URL out of the way, with the reason; commit.json goes first."""
    target = f"{contract.SET_ASIDE}/{step}-{int(time.time())}"
    names = sorted(remote.find(contract.step_dir(step)), key=lambda name: not name.endswith(contract.COMMIT))
    remote.write(f"{target}.reason.txt", "\n".join(reasons).encode())
    for name in names:
        remote.write(name.replace(contract.step_dir(step), target, 1), remote.read(name))
        remote.remove([name])

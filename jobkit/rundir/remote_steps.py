"""The steps of a run on its URL: uploaded, listed, checked, downloaded, removed."""

import contextlib
import os
import time
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import IO, Protocol

from jobkit import contract, names
from jobkit.errors import DamagedError, JobkitError, StorageError
from jobkit.rundir import commits
from jobkit.rundir.commits import Commit, FileRecord
from jobkit.rundir.files import crc32c, one_at_a_time, remove_tree, sync_tree
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.remote import Remote, carry
from jobkit.rundir.store import Store, in_words


class Described(Protocol):
    """What is known of a step's files: by its commit, or of a part of it."""

    @property
    def step(self) -> int:
        """Completed steps."""

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """Size and checksum of each."""


def commit_name(step: int) -> str:
    """Return the name of the file that makes a step committed."""
    return f"{contract.step_dir(step)}/{contract.COMMIT}"


def group(found: Iterable[str]) -> dict[int, list[str]]:
    """Group the names of objects that are below checkpoints/ by step."""
    steps: dict[int, list[str]] = {}
    for name in found:
        place, _, below = name.partition("/")
        if place == contract.CHECKPOINTS and (step := names.number(below.partition("/")[0])) is not None:
            steps.setdefault(step, []).append(name)
    return steps


def read(remote: Remote, step: int) -> Commit:
    """Read a remote step's commit.json."""
    try:
        return commits.parse(remote.read(commit_name(step)), step, where=f"{remote.url}/{commit_name(step)}")
    except FileNotFoundError:
        raise DamagedError(f"step {step} of {remote.url} is not committed") from None


def steps(remote: Remote) -> list[int]:
    """List the committed steps on a URL, in rising order, with one request per thousand objects."""
    return committed(group(remote.find(contract.CHECKPOINTS)))


def committed(by_step: Mapping[int, Container[str]]) -> list[int]:
    """List the steps of grouped objects that are committed, in rising order."""
    return sorted(step for step, objects in by_step.items() if commit_name(step) in objects)


def metrics(remote: Remote) -> dict[int, dict[str, float]]:
    """Return the metrics of every committed step on a URL."""
    by_step, scores = {}, remote.find(contract.SCORES)
    for step in steps(remote):
        with contextlib.suppress(StorageError):
            by_step[step] = metrics_of(remote, step, scores)
    return by_step


def metrics_of(remote: Remote, step: int, scores: Container[str]) -> dict[str, float]:
    """Return the metrics of a step on a URL, those that came after its commit included.

    Args:
        remote: The URL.
        step: A committed step.
        scores: Names of the files there with such metrics.
    """
    commit = read(remote, step)
    name = commits.score_file(commit)
    return dict((commits.scored(commit, remote.read(name)) if name in scores else commit).metrics)


def push(store: Store, step: int, *, attempt: int, ledger: Ledger, shown: bool = False) -> bool:
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
    remote = store.bucket
    begun = time.monotonic()
    if remote.has(commit_name(step)):
        # Perhaps with other bytes, of an attempt on another node: what is committed on the URL is never touched.
        ledger.append("skipped", step=step, reason="committed on the URL before")
        return True
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_words(f"cannot read step {step} of {store.path}", absent=True))
        try:
            # Opened all at once, so that retention in the program may remove the step while it is being uploaded.
            content = store.read(commit_name(step))
            commit = commits.parse(content, step, where=str(store.file(commit_name(step))))
            root = contract.step_dir(step)
            files = {
                name: stack.enter_context(open(store.file(f"{root}/{name}"), "rb", opener=names.opener))
                for name in commit.files
            }
        except FileNotFoundError:
            return False

        def push(name: str) -> None:
            push_file(remote, commit, name, files[name], attempt)

        carry(f"uploading step {step}", commit.sizes, push, shown=shown)

    def fence() -> None:
        commits.check_newest(remote, attempt, f"commit to {remote.url}")

    fence()
    if not remote.create(commit_name(step), content, fence=fence):
        ledger.append("skipped", step=step, reason="committed on the URL before")
        return True
    seconds = round(time.monotonic() - begun, 6)
    ledger.append("uploaded", durable=True, step=step, seconds=seconds, bytes=commit.nbytes)
    return True


def push_file(
    remote: Remote,
    commit: Described,
    name: str,
    file: IO[bytes],
    attempt: int,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Create one file; what a dead attempt left under its name gives way, what is the same stays.

    Args:
        remote: The URL.
        commit: What is known of the step's files.
        name: Of the file, relative to the step.
        file: Its content.
        attempt: Number of the attempt.
        before: Called before something gives way.

    Raises:
        SupersededError: If a newer attempt has begun on the URL.
        JobkitError: If it cannot be created.
    """
    target = f"{contract.step_dir(commit.step)}/{name}"
    content = file.read()
    if crc32c(content) != commit.files[name].crc32c:
        raise StorageError(f"{name} of step {commit.step} changed on the local disk after its commit")
    for _ in range(5):
        if remote.create(target, content) or not content:
            return
        # Only the newest attempt may take a file away, and none of a step that has been committed meanwhile.
        commits.check_newest(remote, attempt, f"commit to {remote.url}")
        if commit_name(commit.step) in remote.find(contract.step_dir(commit.step)):
            raise StorageError(f"step {commit.step} of {remote.url} was committed by another attempt meanwhile")
        before()
        remote.remove([target])
    raise StorageError(f"{remote.url}/{target} is being written by another attempt")


def fetch_newest(store: Store, ledger: Ledger, *, attempt: int) -> int | None:
    """Bring the newest whole step of the URL into the home, unless the home has it or a newer one.

    A step that does not check out is set aside on the URL, with the reason, and the next older one is taken. Of what
    the home has, the values are left to be checked as they are read.
    """
    remote = store.bucket
    with in_words(f"cannot write into {store.path}"), one_at_a_time(store.file(contract.CHECKPOINTS)):
        for step in reversed(steps(remote)):
            here = (have for have in commits.steps(store) if have >= step)
            if any(not commits.problems(store, have, values=False) for have in here):
                return None
            try:
                wrong = fetch(store, step, attempt=attempt)
                if wrong:  # once more: one bad download is no reason to lose a step
                    wrong = fetch(store, step, attempt=attempt)
            except FileNotFoundError:
                continue  # removed meanwhile
            if not wrong:
                return step
            set_aside(remote, step, wrong)
            ledger.append("set_aside", step=step, reason=wrong[0], durable=True)
    return None


def fetch_ahead(store: Store, *, attempt: int) -> bool:
    """Bring the newest step of the URL into the home for a program that is starting, which waits for it as it restores.

    Returns:
        Whether there was a newer one than the home's, and it is whole; whatever is wrong with it `fetch_newest` finds.
    """
    with one_at_a_time(store.file(contract.CHECKPOINTS)) as alone:
        newest = max(steps(store.bucket), default=-1) if alone else -1
        return newest > max(commits.steps(store), default=-1) and not fetch(store, newest, attempt=attempt)


def fetch(store: Store, step: int, *, attempt: int) -> list[str]:
    """Download a step into the home and check every byte; return what is wrong with it."""
    remote = store.bucket
    try:
        content = remote.read(commit_name(step))
        commit = commits.parse(content, step, where=f"{remote.url}/{commit_name(step)}")
    except DamagedError as error:
        return [str(error)]
    stage = commits.new_stage(store, step, attempt)
    try:
        with in_words(f"cannot write step {step} into {store.path}", absent=True):
            wrong = download(remote, commit, f"downloading step {step}", into=stage)
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


def complete(store: Store, step: int) -> None:
    """Bring into the home what it lacks of a step that it has a part of.

    Raises:
        StorageError: If something is not as it was committed.
    """
    commit, place = commits.read(store, step), contract.step_dir(step)
    absent = {name: size for name, size in commit.sizes.items() if not store.exists(f"{place}/{name}")}

    def bring(name: str) -> None:
        content = store.bucket.read(f"{place}/{name}")
        if crc32c(content) != commit.files[name].crc32c:
            raise StorageError(f"step {step} of {store.url} is damaged: {name} differs from its checksum")
        store.write(f"{place}/{name}", content)

    carry(f"downloading step {step}", absent, bring)


def known(store: Store, step: int) -> Commit:
    """Read a committed step's commit.json, from the home, or else from the URL."""
    if store.remote is None or step in commits.steps(store):
        return commits.read(store, step)
    commit = read(store.remote, step)
    with contextlib.suppress(FileNotFoundError):
        return commits.scored(commit, store.remote.read(commits.score_file(commit)))
    return commit


def download(remote: Remote, commit: Commit, doing: str = "", *, into: Path | None = None) -> list[str]:
    """Download a step's files in parallel, into a directory if there is one; return what is wrong with them."""

    def fetch(name: str) -> str:
        try:
            content = remote.read(f"{contract.step_dir(commit.step)}/{name}")
        except FileNotFoundError:
            return f"{name} is missing"
        if into is not None:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            (into / name).write_bytes(content)
        expected = commit.files[name]
        same = (len(content), crc32c(content)) == (expected.size, expected.crc32c)
        return "" if same else f"{name} differs from its checksum"

    doing = doing or f"downloading step {commit.step}"
    return [problem for problem in carry(doing, commit.sizes, fetch) if problem]


def problems(store: Store, step: int) -> list[str]:
    """Check every byte of a step on the URL against its commit.json; return what is wrong."""
    remote = store.bucket
    try:
        commit = read(remote, step)
    except DamagedError as error:
        return [str(error)]
    wrong = download(remote, commit, f"verifying step {step}")
    prefix = contract.step_dir(step) + "/"
    present = {name.removeprefix(prefix) for name in remote.find(contract.step_dir(step))}
    own = {contract.COMMIT, *(name.removeprefix(prefix) for name in commit.parts)}
    extra = sorted(present - commit.files.keys() - own - ({contract.PART} if commit.parts else set()))
    return wrong + [f"{name} does not belong there" for name in extra]


def remove(remote: Remote, step: int) -> None:
    """Remove a step from a URL; commit.json first, so that no reader takes a half-removed step for whole."""
    remote.remove([commit_name(step)])
    remote.remove(remote.find(contract.step_dir(step)))


def set_aside(remote: Remote, step: int, reasons: list[str]) -> None:
    """Move a damaged step on the URL out of the way, with the reason; commit.json goes first."""
    target = f"{contract.SET_ASIDE}/{step}-{int(time.time())}"
    objects = sorted(remote.find(contract.step_dir(step)), key=lambda name: not name.endswith(contract.COMMIT))
    remote.write(f"{target}.reason.txt", "\n".join(reasons).encode())
    for name in objects:
        remote.write(name.replace(contract.step_dir(step), target, 1), remote.read(name))
        remote.remove([name])

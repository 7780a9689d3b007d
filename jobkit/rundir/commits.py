"""Committed steps: what makes a directory a checkpoint, checking one, and which may go. Knows neither jax nor Orbax.

A checkpoint exists exactly when its commit.json does and every file it lists is there. A save is written below
`checkpoints/.stage`, made durable, described by its commit.json, and only then renamed to `checkpoints/<step>`; the
rename is the commit. Removal renames to `checkpoints/.trash` first, so that no reader ever sees half a step. A step
that fails its check is renamed to `checkpoints/.set-aside`, with the reason, and never removed.
"""

import contextlib
import errno
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import msgspec

from jobkit import contract, decode, faults, names, versions
from jobkit.errors import ConfigError, DamagedError, JobkitError, StorageError, SupersededError
from jobkit.patience import Patience
from jobkit.rundir.files import checksum, crc32c, files_below, remove_tree, sync_directory, sync_tree
from jobkit.rundir.loops import EarlyStop
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store, explain, in_words

PARTS_ALONE = "parts"
"""Why parts were saved that are no run's: `jobkit.save`, whose steps count its saves."""
_UNSEALED = "00000000"
_EARLY_STOPS = "early stops"
"""Among the metrics beside a commit; `save` takes keywords as metrics, and this is none."""


class FileRecord(msgspec.Struct, frozen=True):
    """Size in bytes and crc32c (eight hexadecimal digits) of one file."""

    size: Annotated[int, msgspec.Meta(ge=0, lt=1 << 60)]
    crc32c: str


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """The content of commit.json.

    Args:
        step: Completed steps of the run at the save.
        attempt: The attempt that saved.
        at: Seconds since the epoch, of the writer's clock.
        reason: Why it was saved: 'start', 'interval', 'asked', 'notice', 'end', 'parts' without a run, 'from': a copy.
        files: Every file of the step but commit.json itself, by path relative to the step.
        metrics: Named values given to `save`; those that came after the commit are in a file beside it.
        topology: Process and device counts and platform.
        versions: Of jobkit, jax, flax, orbax-checkpoint, numpy, python.
        early_stops: The loops that were left early by then.
        parts: Of processes that share no disk: the files on the URL by which their parts are there, with checksums.
        seal: crc32c of commit.json itself, computed with this value at zeros.
    """

    version: int = contract.RUN_VERSION
    step: int
    attempt: int
    at: float
    reason: str
    files: dict[str, FileRecord]
    metrics: dict[str, float] = {}
    topology: dict[str, int | str] = {}
    versions: dict[str, str] = {}
    early_stops: list[EarlyStop] = []
    parts: dict[str, str] = {}
    seal: str = _UNSEALED

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: record.size for name, record in self.files.items()}

    @property
    def processes(self) -> int:
        """How many processes saved it together."""
        return int(self.topology.get("process_count", 1))

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.sizes.values())


class _Envelope(msgspec.Struct):
    """What the commit.json of every version has; both are required."""

    version: int
    seal: str


def steps(store: Store) -> list[int]:
    """List the committed steps in rising order. One directory listing and one existence check per step."""
    numbers = store.numbers(contract.CHECKPOINTS)
    return [step for step in numbers if store.exists(f"{contract.step_dir(step)}/{contract.COMMIT}")]


def read(store: Store, step: int) -> Commit:
    """Read a step's commit.json.

    Raises:
        DamagedError: If it is absent or damaged.
        StorageError: If the storage does not answer.
        ConfigError: If a newer jobkit wrote it.
    """
    name = f"{contract.step_dir(step)}/{contract.COMMIT}"
    try:
        content = store.read(name)
    except FileNotFoundError:
        raise DamagedError(f"step {step} of {store.url} is not committed: it has no {contract.COMMIT}") from None
    except ConfigError as error:  # nobody may read it, or it is a directory or a link
        raise DamagedError(str(error)) from None
    return with_scores(store, parse(content, step, where=str(store.file(name))))


def with_scores(store: Store, commit: Commit) -> Commit:
    """Add to a commit the metrics that came after it, as far as the home has them."""
    try:
        return scored(commit, store.read(score_file(commit)))
    except (FileNotFoundError, JobkitError):
        return commit


def score_file(commit: Commit) -> str:
    """Return where metrics of a step lie that came after its commit; of this very commit, by its seal."""
    return f"{contract.SCORES}/{commit.step}-{commit.seal}.json"


def scored(commit: Commit, content: bytes) -> Commit:
    """Add to a commit what came after it; a file that cannot be read adds nothing."""
    with contextlib.suppress(ValueError, TypeError, OverflowError, msgspec.ValidationError):
        scores = decode.json_object(content) or {}
        early = msgspec.convert(scores.pop(_EARLY_STOPS, commit.early_stops), list[EarlyStop])
        later = {name: float(value) for name, value in scores.items()}
        return msgspec.structs.replace(commit, metrics=commit.metrics | later, early_stops=early)
    return commit


def score(
    store: Store, step: int, later: Mapping[str, float], *, attempt: int, early_stops: Iterable[EarlyStop] | None = None
) -> None:
    """Keep metrics of a committed step, and that a loop was left there, beside its commit.

    The commit itself is never changed; `read` puts the two together.

    Durability: on storage on return.

    Raises:
        SupersededError: If a newer attempt has begun.
        StorageError: If the step cannot be read, or nothing can be written.
    """
    commit = read(store, step)
    check_newest(store, attempt, f"add metrics to step {step}")
    scores: dict[str, Any] = {**_told({**commit.metrics, **later})}
    early = commit.early_stops if early_stops is None else list(early_stops)
    if early:
        scores[_EARLY_STOPS] = msgspec.to_builtins(early)
    store.write(score_file(commit), json.dumps(scores, indent=1))


def parse(content: bytes, step: int, *, where: str) -> Commit:
    """Read the content of a commit.json.

    Args:
        content: The bytes as they were stored.
        step: The step whose directory it lies in.
        where: Its place, for messages.

    Raises:
        DamagedError: If it is damaged.
        ConfigError: If a newer jobkit wrote it.
    """
    try:
        envelope = msgspec.json.decode(content, type=_Envelope)
        unsealed = content.replace(f'"seal": "{envelope.seal}"'.encode(), f'"seal": "{_UNSEALED}"'.encode())
        if content != _sealed(unsealed) or envelope.seal != crc32c(unsealed):
            raise DamagedError(f"{where} is damaged: its content does not match its own crc32c")
        # Only a version whose seal fits is believed: a flipped bit there is damage, not a newer jobkit.
        versions.check_format(envelope.version, where)
        fields = decode.json_object(content) or {}
        fields["metrics"] = {name: float(value) for name, value in fields.get("metrics", {}).items()}
        commit = msgspec.convert(fields, Commit)
    except (msgspec.MsgspecError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedError(f"{where} is damaged: {error}") from None
    if commit.step != step:
        raise DamagedError(f"{where} is of step {commit.step}: the directory was renamed")
    directories = {str(above) for name in commit.files for above in PurePosixPath(name).parents}
    if strange := [name for name in commit.files if not names.inside(name) or name in {contract.COMMIT, *directories}]:
        raise DamagedError(f"{where} lists {strange[0]!a}, which is no file of its step: jobkit did not write it")
    return commit


def metrics(store: Store) -> dict[int, dict[str, float]]:
    """Return the metrics of every committed step whose commit.json can be read.

    A damaged one neither fails a save nor is removed by retention: the next restore that meets it sets it aside.
    """
    by_step = {}
    for step in steps(store):
        with contextlib.suppress(StorageError):
            by_step[step] = read(store, step).metrics
    return by_step


def problems(
    store: Store, step: int, *, stop: Callable[[], bool] = lambda: False, values: bool = True, part: bool = False
) -> list[str]:
    """Check every byte of a committed step against its commit.json.

    Args:
        store: The run directory.
        step: A committed step.
        stop: Tells whether to give up; then what is returned says nothing.
        values: Whether to read the files of chunks; of those that will be checked chunk by chunk the sizes do.
        part: Whether process 0's part of the step will do.

    Returns:
        What is wrong, one sentence each; empty if the step is whole.

    Raises:
        StorageError: If the storage does not answer, which says nothing of the step.
    """
    try:
        commit = read(store, step)
    except DamagedError as error:
        return [str(error)]
    root = store.file(contract.step_dir(step))
    with in_words(f"cannot list {root}"):
        present = set(files_below(root)) - {contract.COMMIT}
    last_s = time.monotonic() + _BAD_SECTOR_S
    asking = Patience(over=lambda: time.monotonic() >= last_s or stop())
    absent = sorted(commit.files.keys() - present)
    wrong = [f"{name} is missing" for name in absent if not (part and contract.process_of(name))]
    wrong += [f"{name} does not belong there" for name in sorted(present - commit.files.keys())]
    for name in sorted(present & commit.files.keys()):
        expected = commit.files[name]
        if stop():
            break
        try:
            if not values and _in_chunks(commit, name):
                size, crc = (root / name).lstat().st_size, expected.crc32c
            else:
                size, crc = _measured(root / name, asking)
        except OSError as error:
            linked = error.errno == errno.ELOOP
            wrong.append(f"{name} is a symbolic link" if linked else f"{name} cannot be read: {error.strerror}")
            continue
        if size != expected.size:
            wrong.append(f"{name} has {size} bytes instead of {expected.size}")
        elif crc != expected.crc32c:
            wrong.append(f"{name} has crc32c {crc} instead of {expected.crc32c}")
    return wrong


def _in_chunks(commit: Commit, name: str) -> bool:
    """Tell whether a file holds nothing but chunks, each with a checksum of its own, and is worth not to be read."""
    chunks = f"{contract.ORBAX_ITEM}/{contract.CHUNKS}" in commit.files and contract.is_values(name)
    return chunks and commit.files[name].size >= _SMALL_BYTES


_SMALL_BYTES = 1 << 22
_BAD_SECTOR_S = 5.0
"""A file system that is failing over answers EIO for a while, a bad sector for ever."""
_LOST = (
    errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM,
    errno.ELOOP, errno.ENXIO,
)  # fmt: skip
"""What the system says of a file that nobody can read any more; anything else passes, and is no damage."""


def _measured(path: Path, asking: Patience) -> tuple[int, str]:
    """Return a file's size and checksum.

    Raises:
        OSError: If the file is lost.
        StorageError: If the storage does not answer.
    """

    def once() -> tuple[int, str]:
        try:
            return checksum(path)
        except OSError as error:
            raise explain(error, f"cannot read {path}") from error

    try:
        return asking(once)
    except JobkitError as error:
        if isinstance(said := error.__cause__, OSError) and said.errno in _LOST:
            raise said from None
        raise


def _written(commit: Commit) -> bytes:
    """Write a commit down as JSON, which has no word for a diverged metric's nan and inf: those become text."""
    fields = msgspec.to_builtins(commit) | {"metrics": _told(commit.metrics)}
    return msgspec.json.format(msgspec.json.encode(fields), indent=1)


def _told(values: Mapping[str, float]) -> dict[str, float | str]:
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


def _sealed(content: bytes) -> bytes:
    """Put the crc32c of an unsealed commit.json into it."""
    return content.replace(f'"seal": "{_UNSEALED}"'.encode(), f'"seal": "{crc32c(content)}"'.encode())


def check_newest(place: Store | Remote, attempt: int, doing: str) -> None:
    """Refuse to go on once a newer attempt has begun, in the run directory or, for what is written there, on the URL.

    Raises:
        SupersededError: Naming it.
    """
    newest = max(place.numbers(contract.ATTEMPTS), default=attempt)
    if newest > attempt:
        raise SupersededError(f"attempt {attempt} may not {doing}: attempt {newest} has taken over")


def new_stage(store: Store, step: int, attempt: int) -> Path:
    """Return a path for one save to be written to; its parent exists, it does not.

    Raises:
        ConfigError, StorageError: If the run directory cannot be written.
    """
    stage = store.file(contract.STAGE)
    with in_words(f"cannot create {stage}"):
        stage.mkdir(parents=True, exist_ok=True)
    return stage / f"{attempt}-{step}-{secrets.token_hex(4)}"


def measure(root: Path, files: Iterable[str]) -> dict[str, FileRecord]:
    """Read files for their sizes and checksums.

    Args:
        root: Their directory.
        files: Their names, relative to it.
    """
    return {name: FileRecord(*checksum(root / name)) for name in files}


def publish(
    store: Store,
    stage: Path,
    *,
    state: Mapping[str, Any],
    commit: Commit,
    measured: Mapping[str, FileRecord] | None = None,
) -> bool:
    """Turn a finished stage into a committed step.

    Args:
        store: The run directory.
        stage: A directory holding the Orbax item.
        state: The leaf table, written to state.json.
        commit: All but the `files`, which are measured here.
        measured: Files of the stage that other processes wrote and measured.

    Returns:
        False if that step was committed before (a step that an interruption made run twice): the first one stays,
        since a committed step is never overwritten.

    Durability: the step survives a power cut on return.

    Raises:
        SupersededError: If a newer attempt has begun; this one is a leftover and may not publish.
        ConfigError: If nothing can be written and no retry can help.
        StorageError: For any other failure.
    """
    final = store.file(contract.step_dir(commit.step))
    try:
        stage.mkdir(exist_ok=True)  # Orbax made it, unless there was no array to write
        (stage / contract.STATE).write_text(json.dumps(state, separators=(",", ":")))
        known = measured or {}
        files = dict(known) | measure(stage, (name for name in files_below(stage) if name not in known))
        whole = msgspec.structs.replace(commit, files=files, seal=_UNSEALED)
        (stage / contract.COMMIT).write_bytes(_sealed(_written(whole)))
        sync_tree(stage)
        faults.reach("before_rename")
        check_newest(store, commit.attempt, f"commit step {commit.step}")
        os.rename(stage, final)
        faults.reach("after_rename")
        sync_directory(final.parent)
    except OSError as error:
        check_newest(store, commit.attempt, f"commit step {commit.step}")  # its sweep may have taken the stage away
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and final.is_dir():
            remove_tree(stage)
            if (final / contract.COMMIT).exists():
                return False
            raise ConfigError(f"{final} exists but jobkit did not commit it: move it away") from None
        raise explain(error, f"cannot commit step {commit.step} to {store.url}") from None
    return True


def set_aside(store: Store, step: int, reasons: Iterable[str]) -> Path:
    """Move a damaged step out of the way, with the reason beside it. Nothing is removed."""
    target = store.file(f"{contract.SET_ASIDE}/{step}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    with in_words(f"cannot set damaged step {step} of {store.url} aside"):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(store.file(contract.step_dir(step)), target)
        sync_directory(target.parent)
        sync_directory(store.file(contract.CHECKPOINTS))
        target.with_name(target.name + ".reason.txt").write_text("\n".join(reasons) + "\n")
    return target


def remove(store: Store, step: int) -> None:
    """Remove a committed step: out of sight in one rename, then from storage."""
    try:
        with in_words(f"cannot remove step {step} of {store.url}", absent=True):
            gone = to_trash(store, store.file(contract.step_dir(step)))
            sync_directory(store.file(contract.CHECKPOINTS))
    except FileNotFoundError:
        return
    faults.reach("during_retention")
    remove_tree(gone)


def to_trash(store: Store, path: Path) -> Path:
    """Take what is to be removed out of sight, in one rename; return where it is now, for whoever removes it."""
    trash = store.file(contract.TRASH)
    trash.mkdir(parents=True, exist_ok=True)
    gone = trash / f"{path.name}-{secrets.token_hex(4)}"
    os.rename(path, gone)
    return gone


def sweep(store: Store, *, attempt: int) -> None:
    """Remove what dead attempts left: stages of earlier attempts and steps on their way out.

    This fences off an attempt that is alive after all, stopped just before it commits: a stage goes in one rename, so
    that it has become a step before, which this attempt then finds, or never will.
    """
    stage, trash = store.file(contract.STAGE), store.file(contract.TRASH)
    for name in store.names(contract.STAGE):
        number = names.number(name.partition("-")[0])
        if number is not None and number < attempt:
            with contextlib.suppress(OSError):
                to_trash(store, stage / name)
    for name in store.names(contract.TRASH):
        remove_tree(trash / name)
        with contextlib.suppress(OSError):
            (trash / name).unlink()  # what stood in the way of a save that was abandoned is a file

"""The part of a step that one of several processes has in its home; process 0's home has what describes the whole.

A part is there exactly when its `part-<k>.json` is, which comes with it in one rename. Process 0's part is described by
the step's commit.json, which names the other parts and their checksums; it is written when all of them are there.
"""

import contextlib
import os
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from pathlib import Path

import msgspec

from jobkit import contract, faults, names
from jobkit.errors import StorageError
from jobkit.rundir import commits
from jobkit.rundir.commits import Commit, FileRecord
from jobkit.rundir.files import checksum, crc32c, remove_tree, sync_directory, sync_tree
from jobkit.rundir.store import Store, in_words


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """The content of part-<k>.json.

    Args:
        step: Completed steps of the run at the save.
        attempt: The attempt that saved.
        process: Whose part it is.
        files: Size and checksum of its files, by path relative to the step.
    """

    step: int
    attempt: int
    process: int
    files: dict[str, FileRecord]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: record.size for name, record in self.files.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.sizes.values())


def name_of(step: int, process: int) -> str:
    """Return the file that makes a part be there: in the process's home, and on the URL."""
    return f"{contract.step_dir(step)}/{contract.of_process(contract.PART, process)}"


def own(commit: Commit, process: int = 0) -> dict[str, FileRecord]:
    """Return those files of a step that are one process's part."""
    return {name: record for name, record in commit.files.items() if contract.process_of(name) == process}


def publish(store: Store, stage: Path, part: Part) -> str:
    """Turn a finished stage into a part; return the checksum by which process 0 knows it.

    Durability: the part survives a power cut on return.

    Raises:
        SupersededError: If a newer attempt has begun.
        JobkitError: If it cannot be written.
    """
    content = msgspec.json.format(msgspec.json.encode(part), indent=1)
    final = store.file(contract.step_dir(part.step))
    with in_words(f"cannot write the part of step {part.step} to {store.path}"):
        (stage / contract.of_process(contract.PART, part.process)).write_bytes(content)
        sync_tree(stage)
        faults.reach("before_rename")
        commits.check_newest(store, part.attempt, f"commit step {part.step}")
        if final.exists():  # of a save that never became a step: else this attempt would have begun with it
            remove_tree(commits.to_trash(store, final))
        os.rename(stage, final)
        faults.reach("after_rename")
        sync_directory(final.parent)
    return crc32c(content)


def problems(store: Store, step: int, process: int) -> list[str]:
    """Check every byte of the part of a step that a process has in its home; return what is wrong, if it is there.

    Raises:
        StorageError: If the storage does not answer, which says nothing of the step.
    """
    if process == 0:
        return commits.problems(store, step, part=True) if step in commits.steps(store) else []
    name = name_of(step, process)
    if (content := store.get(name)) is None:
        return []
    try:
        part = parse(content)
    except (msgspec.MsgspecError, ValueError) as error:
        return [f"{name} is damaged: {error}"]
    wrong = []
    for file, record in part.files.items():
        try:
            same = checksum(store.file(f"{contract.step_dir(step)}/{file}")) == (record.size, record.crc32c)
        except OSError as error:
            wrong.append(f"{file} cannot be read: {error.strerror}")
            continue
        if not same:
            wrong.append(f"{file} differs from its checksum")
    return wrong


def held(store: Store, process: int) -> dict[int, str]:
    """Return the steps of which a process has its part, with the part's checksum."""
    there = ((step, store.get(name_of(step, process))) for step in store.numbers(contract.CHECKPOINTS))
    return {step: crc32c(content) for step, content in there if content is not None}


def keep(store: Store, process: int, steps: Container[int]) -> None:
    """Remove the parts of all steps but some from a home."""
    for step in store.numbers(contract.CHECKPOINTS):
        if step not in steps and store.exists(name_of(step, process)):
            commits.remove(store, step)


def drop_partial(store: Store) -> None:
    """Remove from process 0's home what it has of steps without the others' parts: for a process that is alone now."""
    for step in commits.steps(store):
        with contextlib.suppress(StorageError):
            commit = commits.read(store, step)
            if commit.parts and any(store.size(f"{contract.step_dir(step)}/{name}") < 0 for name in commit.files):
                commits.remove(store, step)


def expected(
    commit: Commit,
    said: Sequence[Mapping[str, str]],
    there: Callable[[Collection[str]], Mapping[str, str]],
) -> bool:
    """Tell whether every part of a commit is in its process's home, or on the URL and in nobody's home another one.

    Args:
        commit: A step that is process 0's to describe.
        said: What each process holds: step, as text, and checksum.
        there: Tells checksums of parts on the URL.
    """
    held = {
        name: said[process].get(str(commit.step), "") if process < len(said) else ""
        for process in range(1, commit.processes)
        if (name := name_of(commit.step, process)) in commit.parts
    }
    absent = [name for name, crc in held.items() if not crc]
    known = {**held, **there(absent)} if absent else held
    return all(crc == commit.parts[name] for name, crc in known.items())


def parse(content: bytes) -> Part:
    """Read a part-<k>.json.

    Raises:
        ValueError: If it is none.
    """
    part = msgspec.json.decode(content, type=Part)
    if strange := [name for name in part.files if not names.inside(name)]:
        raise ValueError(f"{strange[0]!a} is no file of a step")
    return part

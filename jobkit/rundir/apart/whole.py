"""A step whose parts are all on the URL: it is whole, and whoever sees that commits it, with the same bytes."""

from collections.abc import Collection, Mapping

from jobkit import contract, decode
from jobkit.errors import DamagedError
from jobkit.rundir import commits, remote_steps
from jobkit.rundir.apart import parts
from jobkit.rundir.commits import Commit
from jobkit.rundir.files import crc32c
from jobkit.rundir.remote import Remote, carry


def commit(
    remote: Remote, step: int, attempt: int, there: Collection[str], seen: set[str]
) -> tuple[list[int], Commit | None]:
    """Commit a step on the URL if all its parts are there.

    Args:
        remote: The URL.
        step: One that is not committed there.
        attempt: Number of the attempt, which must be the newest.
        there: Names of the step's objects.
        seen: Parts that were looked at before, which is added to: what was there once stays.

    Returns:
        The processes whose part is missing; and the commit, if it was made now, by this process.

    Raises:
        SupersededError: If a newer attempt has begun on the URL.
        JobkitError: If the URL cannot be read or written.
    """
    if (described := description(remote, step, there)) is None:
        return [0], None
    content, wanted = described
    if missing := _missing(remote, wanted, there, seen):
        return missing, None

    def fence() -> None:
        commits.check_newest(remote, attempt, f"commit to {remote.url}")

    fence()
    made = remote.create(remote_steps.commit_name(step), content, fence=fence)
    return [], wanted if made else None


def description(remote: Remote, step: int, there: Collection[str]) -> tuple[bytes, Commit] | None:
    """Return process 0's part of a step on the URL, which describes the whole; None if it has not come as it should."""
    if (name := parts.name_of(step, 0)) not in there:
        return None
    try:
        content = remote.read(name)
        return content, commits.parse(content, step, where=f"{remote.url}/{name}")
    except (FileNotFoundError, DamagedError):
        return None


def left(remote: Remote, attempt: int, among: Collection[int]) -> set[int]:
    """Return those processes of an attempt that carry nothing any more: they said how they ended, or are lost."""
    there = remote.find(contract.attempt_dir(attempt))
    gone = {process for process in among if contract.process_outcome(attempt, process) in there}
    if (name := contract.broken_file(attempt)) in there:
        word = decode.json_object(remote.read(name)) or {}
        gone |= {process for process in among if word.get("lost") and process == word.get("process")}
    return gone


def checksums(remote: Remote, names: Collection[str]) -> Mapping[str, str]:
    """Return the checksums of some parts on the URL, as a commit names them; without those that are not there."""

    def look(name: str) -> str:
        try:
            return crc32c(remote.read(name))
        except FileNotFoundError:
            return ""

    found = carry("", dict.fromkeys(names, 0), look, shown=False)
    return {name: crc for name, crc in zip(names, found, strict=True) if crc}


def _missing(remote: Remote, wanted: Commit, there: Collection[str], seen: set[str]) -> list[int]:
    """Return the processes whose part of a commit is not on the URL."""
    new = [name for name in wanted.parts if name in there and name not in seen]
    seen.update(name for name, crc in checksums(remote, new).items() if crc == wanted.parts[name])
    others = {parts.name_of(wanted.step, process): process for process in range(1, wanted.processes)}
    return [process for name, process in others.items() if name in wanted.parts and name not in seen]

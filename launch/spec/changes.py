"""What differs between what a run ran and what it is to go on with: files and options, by name."""

import dataclasses
import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from jobkit.rundir.store import Store
from launch.spec import snapshot, unpacking

_SHOWN = 8
_NUMBER = re.compile(r"-\.?\d")


@dataclasses.dataclass(frozen=True)
class Changes:
    """Which files differ, by name, sorted; `name/` is a directory of which the other state has nothing."""

    changed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changed or self.added or self.removed)

    def __str__(self) -> str:
        groups = ((self.changed, "changed"), (self.added, "added"), (self.removed, "removed"))
        return "; ".join(f"{shown(names)} {what}" for names, what in groups if names)


def shown(names: Sequence[str]) -> str:
    """Name a few files, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def of_tree(tree: snapshot.Tree) -> dict[str, str]:
    """Return what a snapshot of a tree would hold: a digest of each file, by name."""
    return {entry.name: _digest(entry, content) for entry, content in snapshot.entries(tree)}


def of_archive(store: Store, code: str) -> dict[str, str]:
    """Return what a snapshot holds: a digest of each file, by name.

    Raises:
        ConfigError: If the archive is missing or damaged.
    """
    with tarfile.open(fileobj=io.BytesIO(unpacking.verified(store, code)), mode="r:") as tar:
        members = ((member, tar.extractfile(member) if member.isreg() else None) for member in tar)
        return {member.name: _digest(member, file.read() if file is not None else b"") for member, file in members}


def _digest(entry: tarfile.TarInfo, content: bytes) -> str:
    return hashlib.sha256(repr((entry.type, entry.mode, entry.linkname)).encode() + content).hexdigest()


def between(before: Mapping[str, str], after: Mapping[str, str]) -> Changes:
    """Return how one state of the code differs from an earlier one."""
    both = sorted(before.keys() & after.keys())
    return Changes(
        changed=tuple(name for name in both if before[name] != after[name]),
        added=_whole(after.keys() - before.keys(), before),
        removed=_whole(before.keys() - after.keys(), after),
    )


def _whole(names: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """Put a directory, with a slash behind it, in the place of all below it where the other state has nothing of it."""
    known = {above for name in others for above in PurePosixPath(name).parents}
    apart = ((name, [above for above in PurePosixPath(name).parents[:-1] if above not in known]) for name in names)
    return tuple(sorted({f"{above[-1]}/" if above else name for name, above in apart}))


def of_commands(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Return how a command differs from an earlier one: '--lr 0.1 -> 0.01', '--amp added'."""
    (words, options), (new_words, new_options) = _parsed(before), _parsed(after)
    told = [] if words == new_words else [f"{' '.join(words)} -> {' '.join(new_words)}"]
    for name in dict.fromkeys([*options, *new_options]):
        old, new = options.get(name), new_options.get(name)
        if old is None:
            told.append(" ".join([name, *new_options[name], "added"]))
        elif new is None:
            told.append(" ".join([name, *old, "removed"]))
        elif old != new:
            told.append(f"{name} {' '.join(old) or 'alone'} -> {' '.join(new) or 'alone'}")
    return told


def told(event: Mapping[str, Any]) -> str:
    """Say what differs, as an event new_code has it: 'train.py changed; --steps 40 -> 80'."""
    lists = {kind: value for kind, value in event.items() if isinstance(value, list)}
    names = {kind: tuple(map(str, lists.get(kind, ()))) for kind in ("changed", "added", "removed")}
    which = Changes(**names)
    parts = [str(which) if which else "", *map(str, lists.get("options", ()))]
    return "; ".join(filter(None, parts)) or "what differs is not known"


def _parsed(command: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Tell the options of a command, with what follows each, from its other words."""
    words: list[str] = []
    options: dict[str, list[str]] = {}
    name = ""
    for word in command:
        if word.startswith("-") and len(word) > 1 and not _NUMBER.match(word):
            name, equals, value = word.partition("=")
            options.setdefault(name, []).extend([value] if equals else [])
            name = "" if equals else name
        elif name:
            options[name].append(word)
            name = "" if not word else name
        else:
            words.append(word)
    return words, options

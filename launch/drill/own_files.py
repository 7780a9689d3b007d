"""The files that a program itself leaves below its run directory, and how those of two runs differ."""

import filecmp
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from jobkit import contract
from jobkit.rundir.store import Store
from launch.spec.snapshot import SKIPPED

Files = Mapping[str, Path]
"""Where each file lies, by its name below the run directory, or below the copy of the code, in which a program runs."""


def read(store: Store) -> Files:
    """Return the files of a run that are not jobkit's own; those of the copied code are among them."""
    files: dict[str, Path] = {}
    for entry in store.path.iterdir() if store.path.is_dir() else ():
        if entry.name == contract.CODE:
            for copy in filter(Path.is_dir, entry.iterdir()):
                files |= {str(path.relative_to(copy)): path for path in _below(copy)}
        elif not contract.is_own(entry.name):
            files |= {str(path.relative_to(store.path)): path for path in _below(entry)}
    return files


def _below(top: Path) -> Iterator[Path]:
    if top.is_symlink():
        return
    if top.is_file():
        yield top
    for directory, inner, names in os.walk(top):  # follows no links: what they lead to is no run's own
        inner[:] = sorted(set(inner) - SKIPPED)
        paths = (Path(directory, name) for name in sorted(names))
        yield from (path for path in paths if path.is_file() and not path.is_symlink())


@dataclass(frozen=True)
class Difference:
    """How the files of one run differ from those of another.

    Args:
        other: Both have them, and they differ.
        again: They differ in nothing but lines that stand in one of them several times.
        missing: The first run has them alone.
        extra: The second run has them alone, by name; the value is the directory in which the first one has nothing of
            the kind.
    """

    other: frozenset[str] = frozenset()
    again: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return self.other | self.again | self.missing | self.extra.keys()

    def without(self, varying: "Difference") -> "Difference":
        """Leave out what differs between undisturbed runs as well, and new names where those have new ones too."""
        places = {*varying.extra.values()}
        extra = {name: place for name, place in self.extra.items() if place not in places}
        names = varying.names
        return Difference(self.other - names, self.again - names, self.missing - names, extra)


def differ(one: Files, two: Files) -> Difference:
    """Compare the files of two runs."""
    both = one.keys() & two.keys()
    other = {name for name in both if not filecmp.cmp(one[name], two[name], shallow=False)}
    again = {name for name in other if _lines(one[name]) == _lines(two[name]) is not None}
    known = {str(parent) for name in one for parent in PurePosixPath(name).parents}
    extra = {name: _place(name, known) for name in two.keys() - both}
    return Difference(frozenset(other - again), frozenset(again), frozenset(one.keys() - both), extra)


def _place(name: str, known: set[str]) -> str:
    """Return the innermost directory around a file that is known."""
    return next((str(parent) for parent in PurePosixPath(name).parents if str(parent) in known), ".")


_LARGEST_BYTES = 1 << 24


def _lines(path: Path) -> list[str] | None:
    """Return the different lines of a text, in order; None of what is no text."""
    if path.stat().st_size > _LARGEST_BYTES:
        return None
    try:
        return list(dict.fromkeys(path.read_text(encoding="utf-8").splitlines()))
    except UnicodeDecodeError:
        return None

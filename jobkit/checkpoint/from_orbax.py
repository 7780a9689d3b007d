"""Begin with a checkpoint that was written elsewhere: a pretrained model, a training begun without jobkit, another run.

What is read is said in weights/source.py, how its names are matched with the program's parts in weights/matching.py.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobkit.checkpoint import state
from jobkit.checkpoint.kinds import Part
from jobkit.checkpoint.leaves import quoted, record_of, value_of
from jobkit.checkpoint.weights import matching, source
from jobkit.errors import ConfigError


@dataclass(frozen=True)
class Start:
    """What came of it.

    Args:
        step: Completed steps that the run counts on from: the checkpoint's where all NNX and value parts came from it
            and it has one, else 0.
        parts: Names of the parts that were restored.
        fresh: Names of the parts, and of leaves of parts, that stay as the program made them.
        unused: Names of what is there, and in no part.
    """

    step: int
    parts: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...] = ()


def start(url: str | os.PathLike[str], parts: Mapping[str, Part], *, every: bool = False) -> Start:
    """Put a checkpoint into a program's parts.

    Args:
        url: A checkpoint's directory, or a CheckpointManager's or a run's, of which the newest step is taken.
        parts: The program's parts. What has a part's name there is that part; where nothing has, what has a part's
            leaves. None is changed unless all fit.
        every: Whether every part has to be there.

    Raises:
        ConfigError: If there is no such checkpoint, no part is in it, or leaves differ; names them.
        StorageError: If it cannot be read.
    """
    found = source.read(url)
    # What a run of ours saved of the very same part needs no matching; objects have nothing else.
    same = {name: part for name, part in parts.items() if _is_same(name, part, found.table)}
    table: dict[str, Any] = {name: found.table[name] for name in same}
    arrays, fresh = dict(found.arrays), list[str]()
    able = {name: part for name, part in parts.items() if name not in same and part.kind != "object"}
    taken = state.take(able).table
    fits: dict[str, matching.Fit] = {}
    if able and not (same and found.table and not able.keys() & found.table.keys()):
        records = {name: taken[name]["leaves"] for name in able}
        fits = matching.match(found.items, able, records, where=os.fspath(url))
    for name, fit in fits.items():
        entry, fresh = taken[name], [*fresh, *fit.fresh]
        for path, value in fit.given.items():
            key = "/".join(path)
            record = entry["leaves"][key]
            if record["is"] == "scalar":
                entry["leaves"][key] = record_of(type(value_of(record, None))(value))[0]
            else:
                arrays[(*quoted(name, ()), *path)] = value
        table[name] = entry
    if absent := [name for name in parts if name not in table and (every or not table)]:
        has = ", ".join(matching.top_of(found.items))
        raise ConfigError(f"{os.fspath(url)} has no part {absent[0]!r}; it has {has}")
    state.give_back({name: part for name, part in parts.items() if name in table}, table, arrays)
    whole = all(name in table for name, part in parts.items() if part.kind != "object")
    labels = [fit.node.label for fit in fits.values()]
    unused = [name for name in matching.top_of(found.items) if name not in same and not _within(name, labels)]
    return Start(
        found.step if whole and found.step is not None else 0,
        tuple(name for name in parts if name in table),
        (*(name for name in parts if name not in table), *fresh),
        tuple(unused),
    )


def _is_same(name: str, part: Part, table: Mapping[str, object]) -> bool:
    if name not in table:
        return False
    try:
        state.check({name: part}, {name: table[name]}, where="there")
    except ConfigError:
        if part.kind == "object":
            raise
        return False
    return True


def _within(name: str, labels: list[tuple[str, ...]]) -> bool:
    """Tell whether a name on top of a checkpoint is, or is in, one of the places that were taken, or holds it."""
    return any(name in label[:2] or label == ("",) for label in labels)

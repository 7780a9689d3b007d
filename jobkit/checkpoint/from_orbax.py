"""Begin a run from a checkpoint that plain Orbax wrote: a pretrained model, or a training begun without jobkit.

Read is what `StandardCheckpointer`, `PyTreeCheckpointer` and `CheckpointManager` write, on any URL. Its names are
matched with the program's parts; shapes and dtypes must agree, since a silent cast would be another training.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jobkit import contract
from jobkit.checkpoint import state
from jobkit.checkpoint.kinds import Part
from jobkit.checkpoint.leaves import Record, names, quoted, record_of, several, value_of
from jobkit.errors import ConfigError, JobkitError, StorageError
from jobkit.rundir.files import files_below
from jobkit.rundir.remote import Remote, carry
from jobkit.rundir.store import is_remote, local_path

Leaves = dict[tuple[str, ...], Any]
"""A stored tree: path of names -> array or number."""

_MARK = "_METADATA"
"""The file that Orbax writes into every directory that holds a tree."""


@dataclass(frozen=True)
class Start:
    """What came of it.

    Args:
        step: Completed steps that the run counts on from: the checkpoint's where all NNX and value parts came from it
            and it has one, else 0.
        parts: Names of the parts that were restored.
        fresh: Names of the parts, and of leaves of parts, that stay as the program made them.
    """

    step: int
    parts: tuple[str, ...]
    fresh: tuple[str, ...]


def start(url: str | os.PathLike[str], parts: Mapping[str, Part]) -> Start:
    """Put a plain Orbax checkpoint into a program's parts.

    Args:
        url: A checkpoint's directory, or a CheckpointManager's, of which the newest step is taken.
        parts: The program's parts. A name on top of the tree, or an item's name, is the part's name; a tree with none
            of them is taken for the one part whose leaves it has. None is changed unless all fit.

    Raises:
        ConfigError: If there is no such checkpoint, no part is in it, or leaves differ; names them.
        StorageError: If it cannot be read.
    """
    items, step = _read(url)
    assigned = _assign(items, parts)
    table, arrays, fresh = {}, {}, [name for name in parts if name not in assigned]
    for name, leaves in assigned.items():
        entry = state.take({name: parts[name]}).table[name]
        given, absent = _fit(name, parts[name], entry["leaves"], leaves, where=os.fspath(url))
        fresh += absent
        for path, value in given.items():
            key = "/".join(path)
            record = entry["leaves"][key]
            if record["is"] == "scalar":
                entry["leaves"][key] = record_of(type(value_of(record, None))(value))[0]
            else:
                arrays[(*quoted(name, ()), *path)] = value
        table[name] = entry
    state.give_back({name: parts[name] for name in assigned}, table, arrays)
    whole = all(name in assigned for name, part in parts.items() if part.kind != "object")
    return Start(step if whole and step is not None else 0, tuple(assigned), tuple(fresh))


def _fit(
    name: str, part: Part, records: Mapping[str, Record], leaves: Leaves, *, where: str
) -> tuple[Leaves, list[str]]:
    """Find each leaf of a part among the stored ones; return (quoted path -> stored value, leaves that stay fresh)."""
    left = {tuple(quoted("", path)[1:]): value for path, value in leaves.items()}
    given: Leaves = {}
    fresh, problems = [], []
    for slot in part.slots()[0]:
        path = quoted("", slot.path)[1:]
        record = records["/".join(path)]
        if record.get("type") == "function":  # code, which stays as the program made it
            continue
        stored = left.pop(path, left.pop((*path, "value"), None))  # an nnx.State writes each variable's value below it
        if stored is None and slot.role.startswith("Rng"):
            given[path] = _plain(slot.value)
            fresh.append("/".join((name, *path)))
        elif stored is None:
            problems.append(f"{'/'.join((name, *path))} is not there")
        elif (difference := _difference(record, stored)) is not None:
            problems.append(f"{'/'.join((name, *path))}: {difference}")
        else:
            given[path] = stored
    problems += [f"{'/'.join((name, *path))} is only there" for path in left]
    if problems:
        raise ConfigError(
            f"the checkpoint {where} does not fit part {name!r}: {several(problems)}: "
            "give the part that it holds, or convert it first"
        )
    return given, fresh


def _plain(value: Any) -> Any:
    if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(value))
    return value


def _difference(record: Record, stored: Any) -> str | None:
    """Say how a stored value differs from what the program has, None if it fits."""
    shape, dtype = list(np.shape(stored)), np.asarray(stored).dtype
    if record["is"] == "scalar":
        if shape or record["type"] not in ("bool", "int", "float", "complex"):
            return f"{tuple(shape)} {dtype} there, a Python {record['type']} here"
        kind: Any = {"bool": bool, "int": int, "float": float, "complex": complex}[record["type"]]
        value = np.asarray(stored)[()]
        exact = kind is complex or not np.iscomplexobj(value)
        return None if exact and kind(value) == value else f"{value} there, a Python {record['type']} here"
    if record["is"] == "key":
        return None if shape[: len(record["shape"])] == record["shape"] and dtype == np.uint32 else "no key there"
    if shape != record["shape"] or (dtype.name != record["dtype"] and not isinstance(stored, bool | int | float)):
        return f"{tuple(shape)} {dtype} there, {tuple(record['shape'])} {record['dtype']} here"
    return None


def _assign(items: Mapping[str, Leaves], parts: Mapping[str, Part]) -> dict[str, Leaves]:
    """Choose the stored leaves of each part that has some."""
    able = {name: part for name, part in parts.items() if part.kind != "object"}
    whole = items.get("", {})
    assigned = {name: items[name] for name in able if name in items}
    for name in able:
        below = {path[1:]: value for path, value in whole.items() if path[0] == name}
        if below and name not in assigned:
            assigned[name] = below
    if assigned:
        return assigned
    for name, part in able.items():
        paths = {slot.path for slot in part.slots()[0]}
        if paths & ({*whole} | {path[:-1] for path in whole if path[-1] == "value"}):
            return {name: whole}
    has = sorted({*filter(None, items), *(path[0] for path in whole)})
    raise ConfigError(
        f"none of the parts {', '.join(able)} is in the checkpoint to start from, which has {', '.join(has)}: "
        "give resume() parts of these names"
    )


# Reading.


def _read(url: str | os.PathLike[str]) -> tuple[dict[str, Leaves], int | None]:
    """Read every item; return them by name ('' for a tree that is no item) and the step, if the path tells one."""
    text = os.fspath(url).rstrip("/")
    with contextlib.ExitStack() as stack:
        if is_remote(text):
            remote = Remote(text)
            sizes = remote.find()
            prefix, items = _locate(list(sizes), text)
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jobkit-start-")))
            wanted = {name: size for name, size in sizes.items() if name.startswith(prefix)}
            carry(f"downloading {text}", wanted, lambda name: remote.fetch(name, root / name))
        else:
            root = local_path(text)
            if not root.is_dir():
                raise ConfigError(f"there is no checkpoint to start from at {root}: no such directory")
            prefix, items = _locate(list(files_below(root)), text)
        return {name: _load(root / prefix / item) for name, item in items.items()}, _step(f"{text}/{prefix}")


def _locate(names: list[str], where: str) -> tuple[str, dict[str, str]]:
    """Return the prefix of the step to read ('' or '7/') and the directories of its trees below it, by item name."""
    steps = {int(match[1]) for name in names if (match := re.match(rf"(\d+)/([^/]+/)?{_MARK}$", name))}
    prefix = f"{max(steps)}/" if steps and _MARK not in names else ""
    below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if contract.COMMIT in below or contract.RUN_JSON in names or any(contract.CHECKPOINTS in name for name in names):
        url, inside, number = where.partition(f"/{contract.CHECKPOINTS}/")
        chosen = f", step={number.strip('/')}" if inside else ""
        raise ConfigError(f"{where} was written by jobkit: jobkit.load({url!r}{chosen}, model=...) reads it")
    if _MARK in below:
        return prefix, {"": ""}
    items = {name.split("/")[0] for name in below if re.match(rf"[^/]+/{_MARK}$", name)}
    if not items:
        raise ConfigError(f"there is no Orbax checkpoint to start from at {where}: no {_MARK} in it")
    return prefix, {"" if items == {"default"} else item: item for item in items}


def _step(path: str) -> int | None:
    last = path.rstrip("/").rpartition("/")[2]
    return int(last) if last.isdecimal() else None


def _load(path: Path) -> Leaves:
    """Read one tree as numpy arrays and Python numbers; keys as their data."""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            metadata = reader.metadata(path).item_metadata.tree
            args = jax.tree.map(_restore_args, metadata)
            tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))
    except JobkitError:
        raise
    except Exception as error:
        message = str(error).splitlines()[0] if str(error) else ""
        raise StorageError(f"cannot read the checkpoint {path}: {type(error).__name__}: {message}") from error
    return {names(path): _plain(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _restore_args(leaf: Any) -> Any:
    return ocp.RestoreArgs(restore_type=np.ndarray if type(leaf).__name__ == "ArrayMetadata" else None)

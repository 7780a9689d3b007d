"""Read what a run can begin with: any layout that Orbax writes, and checkpoints of jobkit's own.

DIR/_METADATA                     a tree: StandardCheckpointer, PyTreeCheckpointer
DIR/ITEM/_METADATA                its items: Checkpointer with a Composite, the v1 API
DIR/7/..., DIR/prefix_7/...       steps of either kind: a CheckpointManager of each API, flax.training.checkpoints
RUN, RUN/checkpoints/7            a run of jobkit's, or one step of it
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jax
import numpy as np
import orbax.checkpoint as ocp

from jobkit import contract
from jobkit.checkpoint import orbax_io, restore, state
from jobkit.checkpoint.leaves import FROM_JSON, Record, names, quote
from jobkit.errors import ConfigError, JobkitError, StorageError
from jobkit.rundir import commits
from jobkit.rundir.files import files_below
from jobkit.rundir.remote import Remote, carry
from jobkit.rundir.store import Store, is_remote, local_path

Leaves = dict[tuple[str, ...], Any]
"""A stored tree: quoted path -> array or number; keys as their data."""

_MARK = "_METADATA"
"""The file that Orbax writes into every directory that holds a tree."""
_WHOLE = "_CHECKPOINT_METADATA"
"""And into every checkpoint, which may hold several."""
_COMMITTED = "commit_success.txt"
_STEP = re.compile(r"(?:.*_)?(\d+)")


@dataclass
class Source:
    """What lies there.

    Args:
        items: Trees by name; '' for one that has none.
        step: Completed steps, if the place tells.
        table: Of a checkpoint of jobkit's the leaf table, by part.
        arrays: And the arrays of all of it, by quoted path.
    """

    items: dict[str, Leaves]
    step: int | None = None
    table: dict[str, Any] = field(default_factory=dict)
    arrays: dict[tuple[str, ...], Any] = field(default_factory=dict)


def read(url: str | os.PathLike[str]) -> Source:
    """Read all that lies at a URL; of several steps the newest that is complete.

    Raises:
        ConfigError: If there is no checkpoint.
        StorageError: If it cannot be read.
    """
    text = os.fspath(url).rstrip("/")
    if not is_remote(text):
        root = local_path(text)
        if not root.is_dir():
            raise ConfigError(f"there is no checkpoint to start from at {root}: no such directory")
        text = str(root)
    remote = Remote(text) if is_remote(text) else None
    sizes = remote.find() if remote is not None else dict.fromkeys(files_below(root), 0)
    if (own := _own(text, sizes)) is not None:
        return _read_own(*own)
    prefix, items = _locate(list(sizes), text)
    with contextlib.ExitStack() as stack:
        if remote is not None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jobkit-start-")))
            wanted = {name: size for name, size in sizes.items() if name.startswith(prefix)}
            carry(f"downloading {text}", wanted, lambda name: remote.fetch(name, root / name))
        return Source({name: _load(root / prefix / item) for name, item in items.items()}, _step(f"{text}/{prefix}"))


def is_foreign(url: str | os.PathLike[str]) -> bool:
    """Tell whether plain Orbax wrote what lies at a URL, and jobkit did not."""
    text = os.fspath(url).rstrip("/")
    if is_remote(text):
        remote = Remote(text)
        found = [] if remote.find(contract.CHECKPOINTS) else list(remote.find())
    else:
        root = local_path(text)
        foreign = root.is_dir() and not (root / contract.CHECKPOINTS).exists()
        found = list(files_below(root)) if foreign else []
    own = contract.RUN_JSON in found or contract.COMMIT in found
    return not own and any(name.rpartition("/")[2] == _MARK for name in found)


def _own(text: str, found: Mapping[str, int]) -> tuple[str, int | str] | None:
    """Return the run and the step of a place that jobkit wrote, None if it did not."""
    url, inside, number = text.partition(f"/{contract.CHECKPOINTS}/")
    if inside and number.isdecimal() and contract.COMMIT in found:
        return url, int(number)
    if contract.RUN_JSON in found or any(
        name.startswith(f"{contract.CHECKPOINTS}/") and name.endswith(f"/{contract.COMMIT}") for name in found
    ):
        return text, "latest"
    return None


def _read_own(url: str, step: int | str) -> Source:
    store = Store(url)
    restore.fetch(store, step)
    number = restore.find_step(store, step)
    table = state.table_of(store, number)
    stored = state.stored_paths(table)
    try:
        arrays = orbax_io.read(store, number, dict.fromkeys(stored), alone=True)
    except Exception as error:
        raise orbax_io.failure(error, f"cannot read step {number} of {store.url}") from error
    arrays |= state.local_arrays(table)
    items = {}
    for part, entry in table.items():
        if entry["kind"] != "object":
            values = {
                _path(key): _value(record, arrays.get((quote(part), *_path(key))))
                for key, record in entry["leaves"].items()
                if record.get("type") != "function"
            }
            items[part] = values
    counted = commits.read(store, number).reason != commits.PARTS_ALONE
    return Source(items, number if counted else None, table, arrays)


def _path(key: str) -> tuple[str, ...]:
    return tuple(key.split("/")) if key else ()


def _value(record: Record, array: Any) -> Any:
    if record["is"] == "scalar":
        return FROM_JSON[record["type"]](record["value"])
    return np.zeros(record["shape"], record.get("dtype") or np.uint32) if array is None else array


def _locate(found: list[str], where: str) -> tuple[str, dict[str, str]]:
    """Return the prefix of the step to read ('' or '7/') and the directories of its trees below it, by item name."""
    if not {_MARK, _WHOLE} & set(found):
        held = {name.split("/")[0] for name in found if re.match(rf"[^/]+/([^/]+/)?{_MARK}$", name)}
        steps = {name: int(match[1]) for name in held if (match := _STEP.fullmatch(name))}
        complete = {name: step for name, step in steps.items() if f"{name}/{_COMMITTED}" in found}
        if chosen := complete or steps:
            prefix = max(chosen, key=lambda name: chosen[name]) + "/"
            return prefix, _items([name.removeprefix(prefix) for name in found if name.startswith(prefix)], where)
    return "", _items(found, where)


def _items(found: list[str], where: str) -> dict[str, str]:
    if _MARK in found:
        return {"": ""}
    items = {name.split("/")[0] for name in found if re.match(rf"[^/]+/{_MARK}$", name)}
    if not items:
        raise ConfigError(f"there is no Orbax checkpoint to start from at {where}: no {_MARK} in it")
    return {"" if items == {"default"} else item: item for item in sorted(items)}


def _step(path: str) -> int | None:
    match = _STEP.fullmatch(path.rstrip("/").rpartition("/")[2])
    return int(match[1]) if match else None


def _load(path: Path) -> Leaves:
    """Read one tree as numpy arrays and Python numbers."""
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
    return {tuple(_quoted(names(path))): plain(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _quoted(path: tuple[str, ...]) -> Iterator[str]:
    """Quote names, unless they are: what jobkit exported, or plain Orbax reads of a run, has them so."""
    return (name if quote(unquote(name)) == name else quote(name) for name in path)


def plain(value: Any) -> Any:
    """Return a key's data, and anything else as it is."""
    if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(value))
    return value


def _restore_args(leaf: Any) -> Any:
    return ocp.RestoreArgs(restore_type=np.ndarray if type(leaf).__name__ == "ArrayMetadata" else None)

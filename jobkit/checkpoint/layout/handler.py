"""The writer as a handler of Orbax's, which a run saves through and any program may give to a `CheckpointManager`.

Whatever reads Orbax's checkpoints reads the result: `ocp.args.StandardRestore`, `ocp.args.PyTreeRestore`.
"""

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals

from jobkit.checkpoint.layout import reading, several, writing
from jobkit.checkpoint.layout.writing import Cancel, Path, Taken
from jobkit.checkpoint.leaves import DTYPES, names
from jobkit.errors import ConfigError
from jobkit.rundir.commits import FileRecord
from jobkit.rundir.files import sync_tree


class DirectCheckpointHandler(ocp.AsyncCheckpointHandler):  # type: ignore[misc]
    """Writes trees of arrays in Orbax's own layout, without Orbax's work per leaf, and reads what it wrote.

    For programs of one process:

        with ocp.CheckpointManager(directory, item_handlers=jobkit.DirectCheckpointHandler()) as manager:
            manager.save(step, args=jobkit.DirectSave(tree))
    """

    async def async_save(self, directory: Any, args: "DirectSave") -> list[Any]:
        """Take the arrays off the devices; what writes them is returned, for Orbax to wait for.

        Args:
            directory: Where; it exists and is empty.
            args: What to save.

        Returns:
            One future of Orbax's, done when the files are written.

        Raises:
            ConfigError: If the tree cannot be written so.
        """
        taken, work = _take(args), _Work.of(args)
        return [CommitFutureAwaitingContractedSignals(_write(directory, taken, work), name="jobkit-write")]

    def save(self, directory: Any, args: "DirectSave") -> None:
        """Write a tree, and return when it is written.

        Args:
            directory: Where; it exists and is empty.
            args: What to save.

        Raises:
            ConfigError: If the tree cannot be written so.
        """
        _Work.of(args).write(directory, _take(args))

    def restore(self, directory: Any, args: "DirectRestore | None" = None) -> Any:
        """Read a tree, every chunk checked against its crc32c.

        Args:
            directory: What `save` has written.
            args: What to restore; None for all of it.

        Returns:
            The arrays in the tree of `args.item`, each placed on devices as there; without one, arrays of numpy's in
            nested dicts.

        Raises:
            ConfigError: If the item has leaves that the checkpoint lacks, or of another dtype or shape, or another
                handler wrote it.
            StorageError: If it is damaged.
        """
        root = File(directory)
        table = reading.table_of(root)
        if table is None:
            raise ConfigError(f"{root} was not written by jobkit: restore it with ocp.args.StandardRestore()")
        if args is None or args.item is None:
            return nested(reading.read(root, table, {tuple(name.split(".")): None for name in table}))
        wanted = _named(args.item)
        for path, leaf in wanted.items():
            if (array := table.get(".".join(path))) is None:
                raise ConfigError(f"{root} has no {'/'.join(path)}; restore without an item to see what it has")
            if (here := _outline(leaf)) != (there := (array.dtype, tuple(array.shape))):
                raise ConfigError(f"{'/'.join(path)} is {there[0]} {there[1]} in {root}, and {here[0]} {here[1]} here")
        found = reading.read(root, table, {path: getattr(leaf, "sharding", None) for path, leaf in wanted.items()})
        return jax.tree.unflatten(jax.tree.structure(args.item), [found[path] for path in wanted])


def _take(args: "DirectSave") -> list[Taken]:
    """Take off the devices what this process writes of a tree.

    Raises:
        ConfigError: If the tree cannot be written so.
    """
    if (share := args.share) is not None:
        return several.take(dict(args.leaves()), share.arrays, share.process)
    if jax.process_count() > 1:
        raise ConfigError("DirectCheckpointHandler is for programs of one process: use ocp.args.StandardSave")
    return writing.take(args.leaves())


class _Work(NamedTuple):
    """How a tree is written; it holds nothing of the tree."""

    file_bytes: int
    cancel: Cancel
    sync: bool
    measured: dict[str, FileRecord]
    share: "Share | None"

    @classmethod
    def of(cls, args: "DirectSave") -> "_Work":
        """Take from a save all but the tree."""
        return cls(args.file_bytes, args.cancel, args.sync, args.measured, args.share)

    def write(self, directory: Any, taken: list[Taken]) -> None:
        """Write what was taken."""
        most, cancel, measured = self.file_bytes, self.cancel, self.measured
        if (share := self.share) is None:
            writing.write(File(directory), taken, file_bytes=most, cancel=cancel, measured=measured)
        else:
            share.rows = several.write(
                File(directory), taken, share.process, file_bytes=most, cancel=cancel, measured=measured
            )
        if self.sync:
            sync_tree(File(directory))


async def _write(directory: Any, taken: list[Taken], work: _Work) -> None:
    try:
        work.write(directory, taken)
    except BaseException as error:
        # Orbax keeps the error of a failed save, whose frames hold the arrays: a disk that is full for an hour would
        # fill the memory, too.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        taken.clear()


@dataclass
class Share:
    """What one of several processes that save a run together writes of the arrays that all of them have.

    Args:
        process: Its index.
        arrays: How they are shared out.
        rows: What it has written, once it has.
    """

    process: int
    arrays: dict[Path, several.Shared]
    rows: several.Rows = field(default_factory=dict)


@ocp.args.register_with_handler(DirectCheckpointHandler, for_save=True)
@dataclass
class DirectSave(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """What `DirectCheckpointHandler` is to save.

    Args:
        item: A tree of arrays and numbers, whose names must have no '.' in them; or None.
        arrays: Instead, path -> array, of which those of numpy's must not change until the save is done.
        file_bytes: Bytes at which a file of values ends, and an array is cut.
        cancel: Stops the save.
        sync: Whether the files are made durable; not where somebody else does.
        measured: Gets size and checksum of the large files once they are written, by name relative to the item.
        share: In a run of several processes, which alone merges what they write: what this one writes.
    """

    item: Any = None
    arrays: Mapping[Path, Any] | None = None
    file_bytes: int = writing.FILE_BYTES
    cancel: Cancel = field(default_factory=Cancel)
    sync: bool = True
    measured: dict[str, FileRecord] = field(default_factory=dict)
    share: Share | None = None

    def leaves(self) -> list[tuple[Path, Any]]:
        """Return the arrays with their paths; those of numpy's are copies.

        Raises:
            ConfigError: If a leaf cannot be written, or has a name that cannot.
        """
        if self.arrays is not None:
            return list(self.arrays.items())
        named = _named(self.item)
        if not named:
            raise ConfigError("there is no array in the tree, and so nothing to save")
        for path, leaf in named.items():
            name = "/".join(path)
            if any("." in one or "/" in one or not one for one in path):
                raise ConfigError(f"{name!a} has an empty name, or one with '.' or '/': rename it")
            if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                raise ConfigError(f"{name} is a typed key: save jax.random.key_data of it")
            dtype, shape = _outline(leaf)
            if dtype not in DTYPES or 0 in shape:
                raise ConfigError(f"{name} is a {type(leaf).__name__} of {dtype} {shape}, which cannot be saved so")
        return [(path, leaf if isinstance(leaf, jax.Array) else np.array(leaf)) for path, leaf in named.items()]


@ocp.args.register_with_handler(DirectCheckpointHandler, for_restore=True)
@dataclass
class DirectRestore(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """What `DirectCheckpointHandler` is to restore.

    Args:
        item: A tree of arrays, or of `jax.ShapeDtypeStruct` with shardings, of the names, dtypes and shapes that were
            saved; None for all as numpy.
    """

    item: Any = None


def only(*processes: int) -> ocp.options.MultiprocessingOptions:
    """Have Orbax do something in some of the processes, which meet in no barrier with the others."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    prefix = f"only-{processes[0]}" if len(processes) == 1 else None
    return ocp.options.MultiprocessingOptions(
        primary_host=processes[0], active_processes=set(processes), barrier_sync_key_prefix=prefix
    )


def _named(item: Any) -> dict[Path, Any]:
    """Return the leaves of a tree by path, in their order."""
    leaves = jax.tree_util.tree_leaves_with_path(item)
    named = {names(path): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ConfigError("two leaves have the same name, such as 1 and '1': rename one")
    return named


def _outline(leaf: Any) -> tuple[str, tuple[int, ...]]:
    """Return a leaf's dtype and shape; what is no array has those that numpy gives it."""
    array = leaf if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else np.asarray(leaf)
    return np.dtype(array.dtype).name, tuple(array.shape)


def nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Make nested dicts of what is named by paths."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree

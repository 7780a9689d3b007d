"""The writer as a handler of Orbax's, which a run saves through and any program may give to a `CheckpointManager`.

Whatever reads Orbax's checkpoints reads the result: `ocp.args.StandardRestore`, `ocp.args.PyTreeRestore`.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals

from jobkit.checkpoint.layout import reading, writing
from jobkit.checkpoint.layout.writing import Cancel, Path, Taken
from jobkit.errors import ConfigError


class DirectCheckpointHandler(ocp.AsyncCheckpointHandler):  # type: ignore[misc]
    """Writes trees of arrays in Orbax's own layout, without Orbax's work per leaf, and reads what it wrote.

    For programs of one process:

        with ocp.CheckpointManager(directory, item_handlers=jobkit.DirectCheckpointHandler()) as manager:
            manager.save(step, args=jobkit.DirectSave(tree))
    """

    async def async_save(self, directory: Any, args: "DirectSave") -> list[Any]:
        """Take the arrays off the devices; what writes them is returned, for Orbax to wait for.

        Raises:
            ConfigError: If the tree cannot be written so.
        """
        taken = writing.take(args.leaves())
        return [CommitFutureAwaitingContractedSignals(_write(directory, taken, args), name="jobkit-write")]

    def save(self, directory: Any, args: "DirectSave") -> None:
        """Write a tree, and return when it is written."""
        asyncio.run(_write(directory, writing.take(args.leaves()), args))

    def restore(self, directory: Any, args: "DirectRestore | None" = None) -> Any:
        """Read a tree, every chunk checked against its crc32c.

        Returns:
            The arrays in the tree of `args.item`, each placed on devices as there; without one, arrays of numpy's in
            nested dicts.

        Raises:
            ConfigError: If the item has leaves that the checkpoint lacks, or another handler wrote it.
            DamagedError: If it is damaged.
        """
        root = File(directory)
        table = reading.table_of(root)
        if table is None:
            raise ConfigError(f"{root} was not written by jobkit: restore it with ocp.args.StandardRestore()")
        if args is None or args.item is None:
            return nested(reading.read(root, table, {tuple(name.split(".")): None for name in table}))
        leaves, structure = jax.tree.flatten(args.item)
        paths = list(DirectSave(args.item).paths())
        if lacking := [path for path in paths if ".".join(path) not in table]:
            raise ConfigError(f"{root} has no {'/'.join(lacking[0])}; restore without an item to see what it has")
        shardings = [getattr(leaf, "sharding", None) for leaf in leaves]
        found = reading.read(root, table, dict(zip(paths, shardings, strict=True)))
        return jax.tree.unflatten(structure, [found[path] for path in paths])


async def _write(directory: Any, taken: list[Taken], args: "DirectSave") -> None:
    writing.write(File(directory), taken, file_bytes=args.file_bytes, cancel=args.cancel)


@ocp.args.register_with_handler(DirectCheckpointHandler, for_save=True)
@dataclass
class DirectSave(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """What `DirectCheckpointHandler` is to save.

    Args:
        item: A tree of arrays and numbers, whose names must have no '.' in them; or None.
        arrays: Instead, path -> array.
        file_bytes: Bytes at which a file of values ends, and an array is cut.
        cancel: Stops the save.
    """

    item: Any = None
    arrays: Mapping[Path, Any] | None = None
    file_bytes: int = writing.FILE_BYTES
    cancel: Cancel = field(default_factory=Cancel)

    def paths(self) -> list[Path]:
        """Return where the item's leaves lie, in their order."""
        return [path for path, _ in self.leaves()]

    def leaves(self) -> list[tuple[Path, Any]]:
        """Return the arrays with their paths.

        Raises:
            ConfigError: If two have the same name.
        """
        if self.arrays is not None:
            return list(self.arrays.items())
        found = [
            (tuple(_name(key) for key in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(self.item)
        ]
        for path, leaf in found:
            if any("." in name or "/" in name or not name for name in path):
                raise ConfigError(f"{'/'.join(path)!a} has an empty name, or one with '.' or '/': rename it")
            if np.asarray(leaf).dtype == object if not isinstance(leaf, jax.Array) else False:
                raise ConfigError(f"{'/'.join(path)} is a {type(leaf).__name__}, which is no array: leave it out")
        return found


@ocp.args.register_with_handler(DirectCheckpointHandler, for_restore=True)
@dataclass
class DirectRestore(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """What `DirectCheckpointHandler` is to restore.

    Args:
        item: A tree of arrays, or of `jax.ShapeDtypeStruct` with shardings, as it was saved; None for all as numpy.
    """

    item: Any = None


def _name(key: Any) -> str:
    return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))


def nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Make nested dicts of what is named by paths."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree

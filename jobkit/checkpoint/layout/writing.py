"""Arrays taken off the devices, and written in one pass over their bytes."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path as File
from typing import Any, NamedTuple

import google_crc32c
import jax
import numpy as np
import tensorstore as ts

from jobkit import contract
from jobkit.checkpoint.layout import store, texts
from jobkit.checkpoint.layout.table import Chunked, Index, chunk_key, cut, written

FILE_BYTES = 64 << 20
"""At so many bytes a file of values ends, and an array is cut."""
_TRANSACTION_BYTES = 16 << 20
"""What a transaction writes stays in memory until it is on the disk; two are under way at a time."""
_METADATA = "_METADATA"

Path = tuple[str, ...]


class CancelledError(Exception):
    """A save was told not to go on."""


class Cancel:
    """How whoever began a save has it stop."""

    def __init__(self) -> None:
        self._cancelled = False

    def set(self) -> None:
        """Have the save fail with CancelledError before its next chunk."""
        self._cancelled = True

    def check(self) -> None:
        """Raise CancelledError once it was set."""
        if self._cancelled:
            raise CancelledError("the save was cancelled")


class Taken(NamedTuple):
    """One array as it was at the save, in host memory.

    Args:
        path: Where it lies in the tree.
        shape: Its shape, in elements.
        shards: Its distinct shards, all of one shape, with their places in the grid of shards.
    """

    path: Path
    shape: Index
    shards: list[tuple[Index, np.ndarray]]


def take(arrays: Iterable[tuple[Path, Any]]) -> list[Taken]:
    """Bring arrays into host memory: on return the program may give them away. On a CPU nothing is copied.

    Args:
        arrays: Arrays of JAX's, all of whose devices belong to this process, or of numpy's, which must not change.
    """
    listed = list(arrays)
    if jax.default_backend() != "cpu":
        for _, array in listed:  # all at once: the devices work side by side
            if isinstance(array, jax.Array):
                array.copy_to_host_async()
    return [_taken(path, array) for path, array in listed]


def _taken(path: Path, array: Any) -> Taken:
    if not isinstance(array, jax.Array):
        whole = np.asarray(array)
        if not whole.dtype.isnative:
            whole = whole.astype(whole.dtype.newbyteorder("="))
        return Taken(path, whole.shape, [((0,) * whole.ndim, whole)])
    sharding = array.sharding
    if sharding.is_fully_replicated:
        whole = np.asarray(array.addressable_data(0) if len(sharding.device_set) > 1 else array)
        return Taken(path, array.shape, [((0,) * whole.ndim, whole)])
    shard = sharding.shard_shape(array.shape)
    shards = [
        (tuple((part.start or 0) // size for part, size in zip(one.index, shard, strict=True)), np.asarray(one.data))
        for one in array.addressable_shards
        if one.replica_id == 0
    ]
    return Taken(path, array.shape, shards)


def write(directory: File, taken: list[Taken], *, file_bytes: int, cancel: Cancel) -> None:
    """Write a tree below a directory that exists. Nothing is synced: whoever commits does that, all files at once.

    Args:
        directory: The item's.
        taken: The arrays; taken out one by one as they are written, so that their memory is free as soon as can be.
        file_bytes: Bytes at which a file of values ends, and an array is cut.
        cancel: Stops it at a chunk's boundary.

    Raises:
        CancelledError: If it was cancelled.
        ValueError, OSError: What tensorstore, or the system, says of the storage.
    """
    tree = texts.tree_text(tuple(array.path for array in taken))
    table: dict[str, Chunked] = {}
    taken.reverse()
    with _Transactions(store.create(directory, file_bytes)) as transactions:
        _write_all(taken, table, transactions, file_bytes, cancel)
    cancel.check()
    (directory / _METADATA).write_text(tree)
    (directory / contract.CHUNKS).write_bytes(written(table))


def _write_all(
    taken: list[Taken], table: dict[str, Chunked], transactions: "_Transactions", file_bytes: int, cancel: Cancel
) -> None:
    while taken:
        array = taken.pop()
        name = ".".join(array.path)
        entry = table[name] = _entry(array, file_bytes)
        shape, chunk = tuple(entry.shape), tuple(entry.chunk)
        transactions.write(f"{name}/zarr.json", texts.array_text(entry.dtype, shape, chunk))
        sums = {}
        for index, values in _chunks(array, chunk):
            cancel.check()
            content = values.tobytes()
            sums[index] = google_crc32c.value(content)  # while it is in the processor's cache
            transactions.write(chunk_key(name, index), content)
        entry.crc32c.extend(sums[index] for index in entry.indices)
        del array


def _entry(array: Taken, most_bytes: int) -> Chunked:
    shard = array.shards[0][1]
    return Chunked(shard.dtype.name, list(array.shape), list(cut(shard.shape, shard.itemsize, most_bytes)))


def _chunks(array: Taken, chunk: Index) -> Iterator[tuple[Index, np.ndarray]]:
    """Yield an array's chunks, each with its place in the grid of chunks."""
    for place, shard in array.shards:
        if shard.shape == chunk:
            yield place, shard
            continue
        per_shard = tuple(size // step for size, step in zip(shard.shape, chunk, strict=True))
        for inner in np.ndindex(per_shard):
            part = tuple(slice(at * step, (at + 1) * step) for at, step in zip(inner, chunk, strict=True))
            yield tuple(p * count + at for p, count, at in zip(place, per_shard, inner, strict=True)), shard[part]


class _Transactions:
    """Writes to a store, a few dozen MB at a time: while one transaction goes to the disk the next one is filled."""

    def __init__(self, values: Any) -> None:
        self._values = values
        self._earlier: Any = None
        self._begin()

    def _begin(self) -> None:
        self._now, self._nbytes = ts.Transaction(), 0
        self._into = self._values.with_transaction(self._now)

    def write(self, key: str, content: bytes) -> None:
        """Write one value."""
        self._into.write(key, content)
        self._nbytes += len(content)
        if self._nbytes >= _TRANSACTION_BYTES:
            self._wait()
            self._earlier = self._now.commit_async()
            self._begin()

    def __enter__(self) -> "_Transactions":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Have all of it in the store's files; of what failed, have nothing written on."""
        if kind is None:
            self._wait()
            self._now.commit_async().result()
            return
        with contextlib.suppress(Exception):
            self._wait()
        self._now.abort()

    def _wait(self) -> None:
        if self._earlier is not None:
            self._earlier.result()

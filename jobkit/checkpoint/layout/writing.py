"""Arrays taken off the devices, and written in one pass over their bytes."""

import contextlib
import io
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path as File
from typing import Any, NamedTuple

import google_crc32c
import jax
import numpy as np

from jobkit import contract
from jobkit.checkpoint.layout import ocdbt, texts
from jobkit.checkpoint.layout.table import Chunked, Index, chunk_key, cut, written
from jobkit.rundir.commits import FileRecord

FILE_BYTES = 64 << 20
"""At so many bytes a file of values ends, and an array is cut."""
_BUFFER_BYTES = 1 << 20
_SYNC_BYTES, _SYNCS = 16 << 20, 4
"""The disk gets so many bytes at a time, and is given more before it has them so often; then it is waited for."""
_LOOK_S = 0.05
"""How often it is looked meanwhile whether the save was cancelled."""
METADATA = "_METADATA"
"""Orbax's file of what the tree is."""

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
        chunk: Shape of a chunk; chosen by what is written if None.
        own: Places of the chunks that are written here; None for all that the shards have.
    """

    path: Path
    shape: Index
    shards: list[tuple[Index, np.ndarray]]
    chunk: Index | None = None
    own: frozenset[Index] | None = None


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


def write(
    directory: File, taken: list[Taken], *, file_bytes: int, cancel: Cancel, measured: dict[str, FileRecord]
) -> None:
    """Write a tree below a directory that exists. It is durable only when whoever commits has synced all files at once.

    Args:
        directory: The item's.
        taken: The arrays; taken out one by one as they are written, so that their memory is free as soon as can be.
        file_bytes: Bytes at which a file of values ends, and an array is cut.
        cancel: Stops it at a chunk's boundary.
        measured: Gets size and checksum of the files of values, by name relative to the directory.

    Raises:
        CancelledError: If it was cancelled.
        OSError: What the system says of the storage.
    """
    tree = texts.tree_text(tuple(array.path for array in taken))
    table, entries = write_files(directory, taken, file_bytes=file_bytes, cancel=cancel, measured=measured)
    write_tree(directory, entries)
    (directory / METADATA).write_text(tree)
    (directory / contract.CHUNKS).write_bytes(written(table))


def write_files(
    directory: File, taken: list[Taken], *, file_bytes: int, cancel: Cancel, measured: dict[str, FileRecord]
) -> tuple[dict[str, Chunked], list[ocdbt.Entry]]:
    """Write the files of values of a store alone; as `write`, without what makes an item of them.

    Returns:
        What lies where, and the entries of the store's tree.
    """
    table: dict[str, Chunked] = {}
    entries: list[ocdbt.Entry] = []
    taken.reverse()
    with _Values(directory, file_bytes, cancel) as values:
        while taken:
            _write_array(taken.pop(), table, entries, values, file_bytes, cancel)
        measured.update(values.measured())
    cancel.check()
    return table, entries


def write_tree(directory: File, entries: list[ocdbt.Entry]) -> None:
    """Write a store's tree, which makes files of values a store."""
    nodes, manifest = ocdbt.tree(tuple(entries))
    (directory / ocdbt.NODES).parent.mkdir()
    (directory / ocdbt.NODES).write_bytes(nodes)
    (directory / ocdbt.MANIFEST).write_bytes(manifest)


def _write_array(
    array: Taken,
    table: dict[str, Chunked],
    entries: list[ocdbt.Entry],
    values: "_Values",
    file_bytes: int,
    cancel: Cancel,
) -> None:
    name = ".".join(array.path)
    entry = table[name] = _entry(array, file_bytes)
    shape, chunk = tuple(entry.shape), tuple(entry.chunk)
    text = texts.array_text(entry.dtype, shape, chunk)
    entries.append((f"{name}/zarr.json", ocdbt.Place("", 0, len(text), text)))
    sums = {}
    for index, content in _chunks(array, chunk):
        if array.own is not None and index not in array.own:
            continue
        cancel.check()
        place, sums[index] = values.append(content)
        entries.append((chunk_key(name, index), place))
    if array.own is None and len(sums) != (count := math.prod(entry.grid)):
        raise ValueError(f"{name} has {count} chunks, of which {len(sums)} are here, and nobody else writes the others")
    entry.crc32c = list(sums.values()) if len(sums) == 1 else [sums[at] for at in entry.indices if at in sums]


def _entry(array: Taken, most_bytes: int) -> Chunked:
    shard = array.shards[0][1]
    chunk = array.chunk or cut(shard.shape, shard.itemsize, most_bytes)
    return Chunked(_name(shard.dtype), list(array.shape), list(chunk))


@cache
def _name(dtype: np.dtype) -> str:
    """Return a dtype's name, which numpy puts together at each call."""
    return str(dtype.name)


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


class _Values:
    """Values written one after another to files, of which the disk gets a part while the next one is written.

    Args:
        directory: The store's.
        file_bytes: Bytes at which a file ends.
        cancel: Ends the waiting for a disk that does not keep up.
    """

    def __init__(self, directory: File, file_bytes: int, cancel: Cancel) -> None:
        self._directory, self._file_bytes, self._cancel = directory, file_bytes, cancel
        (directory / contract.VALUES).mkdir()
        self._file: io.BufferedWriter | None = None
        self._nbytes, self._unsynced, self._crc = 0, 0, 0
        self._records: dict[str, FileRecord] = {}
        self._pool = ThreadPoolExecutor(_SYNCS, thread_name_prefix="jobkit-write")
        self._syncs: dict[Future[None], int] = {}
        """What the disk has not said that it has, with the descriptor of each."""
        self._refused: BaseException | None = None

    def append(self, values: np.ndarray) -> tuple[ocdbt.Place, int]:
        """Write an array's bytes; return where they lie, and their crc32c."""
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        if self._file is None:
            path = self._directory / self._name
            self._file = io.BufferedWriter(io.FileIO(path, "x"), _BUFFER_BYTES)
        place = ocdbt.Place(self._name, self._nbytes, content.nbytes)
        crc = google_crc32c.value(content)  # while it is in the processor's cache
        self._crc = google_crc32c.extend(self._crc, content) if self._nbytes else crc
        self._file.write(content.data)
        self._nbytes += content.nbytes
        self._unsynced += content.nbytes
        if self._nbytes >= self._file_bytes:
            self._end()
        elif self._unsynced >= _SYNC_BYTES:
            self._sync()
        return place, crc

    @property
    def _name(self) -> str:
        return f"{contract.VALUES}{len(self._records)}"

    def _sync(self) -> None:
        """Have the disk begin with what is written: what the commit syncs is then the rest."""
        assert self._file is not None
        self._file.flush()
        self._wait(_SYNCS - 1)
        descriptor = os.dup(self._file.fileno())
        self._syncs[self._pool.submit(_sync, descriptor)] = descriptor
        self._unsynced = 0

    def _wait(self, most: int) -> None:
        """Wait until the disk has all but so many of what it was given.

        Raises:
            CancelledError: If the save is cancelled meanwhile.
        """
        while len(self._syncs) > most:
            for one in wait(self._syncs, _LOOK_S, FIRST_COMPLETED).done:
                del self._syncs[one]
                self._refused = self._refused or one.exception()
            self._cancel.check()

    def _end(self) -> None:
        if self._file is not None:
            if self._unsynced >= _SYNC_BYTES:
                self._sync()
            self._file.close()
            self._records[self._name] = FileRecord(self._nbytes, f"{self._crc:08x}")
            self._file, self._nbytes, self._unsynced, self._crc = None, 0, 0, 0

    def measured(self) -> dict[str, FileRecord]:
        """End the last file; return the size and the checksum of each, once the disk has what it was given before.

        Raises:
            CancelledError: If the save is cancelled meanwhile.
            OSError: If it could not take it: nobody else hears of that.
        """
        self._end()
        self._wait(0)
        if self._refused is not None:
            raise self._refused
        return self._records

    def __enter__(self) -> "_Values":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close what a failure has left open, without waiting for the disk: nobody wants any more what it was given."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        for one, descriptor in self._syncs.items():
            if one.cancel():  # else its thread closes it
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._pool.shutdown(wait=kind is None)


def _sync(descriptor: int) -> None:
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)

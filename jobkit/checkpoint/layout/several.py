"""One step written by several processes: each its own chunks, into files of its own, without a word between them.

Who writes which chunk follows from the arrays' shardings alone: of the processes that hold a chunk, the one that has
the least to write. What makes these files one store is made afterwards, of what each process says it wrote where.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path as File
from typing import Any, NamedTuple

import jax
import numpy as np

from jobkit import contract
from jobkit.checkpoint.layout import ocdbt, texts
from jobkit.checkpoint.layout.table import Chunked, Index, chunk_key, cut, written
from jobkit.checkpoint.layout.writing import METADATA, Cancel, Path, Taken, write_files, write_tree
from jobkit.rundir.commits import FileRecord

CHUNK_BYTES = 4 << 20
"""A chunk's size at most, where an array can be cut so: what a process reads beside its own shards is a part of one."""
Rows = dict[str, list[tuple[int, int, str, int]]]
"""What one process wrote: name in the layout -> of each chunk its number, in C order of the grid, its crc32c, the file
where it lies, relative to the process's directory, and the offset there.
"""


class Shared(NamedTuple):
    """How one array is shared out.

    Args:
        dtype: Name of its dtype.
        shape: Its shape, in elements.
        shard: Shape of each shard, in elements.
        chunk: Shape of each chunk, in elements.
        writers: Place of a chunk -> the process that writes it.
    """

    dtype: str
    shape: Index
    shard: Index
    chunk: Index
    writers: dict[Index, int]


def share_out(arrays: Mapping[Path, jax.Array]) -> dict[Path, Shared]:
    """Say who writes what; the same in all processes, which give the same arrays in the same order."""
    outlines = tuple((array.dtype.name, array.shape, array.sharding) for array in arrays.values())
    return dict(zip(arrays, _share_out(outlines), strict=True))


@lru_cache(8)
def _share_out(outlines: tuple[tuple[str, Index, jax.sharding.Sharding], ...]) -> list[Shared]:
    bytes_of: dict[int, int] = {}
    shared = []
    for dtype, shape, sharding in outlines:
        shard, itemsize = sharding.shard_shape(shape), np.dtype(dtype).itemsize
        chunk = cut(shard, itemsize, CHUNK_BYTES)
        holders: dict[Index, set[int]] = {}
        regions: Mapping[Any, Any] = sharding.devices_indices_map(shape)
        for device, region in regions.items():
            place = tuple((part.start or 0) // size for part, size in zip(region, shard, strict=True))
            holders.setdefault(place, set()).add(int(device.process_index))
        writers = {}
        for place in sorted(holders):
            for index in _chunks_of(place, shard, chunk):
                writer = min(holders[place], key=lambda process: (bytes_of.get(process, 0), process))
                bytes_of[writer] = bytes_of.get(writer, 0) + itemsize * int(np.prod(chunk, dtype=np.int64))
                writers[index] = writer
        shared.append(Shared(dtype, shape, shard, chunk, writers))
    return shared


def _chunks_of(place: Index, shard: Index, chunk: Index) -> Iterable[Index]:
    """Yield the places of a shard's chunks."""
    counts = tuple(size // step for size, step in zip(shard, chunk, strict=True))
    for inner in np.ndindex(counts):
        yield tuple(at * count + one for at, count, one in zip(place, counts, inner, strict=True))


def take(arrays: Mapping[Path, jax.Array], shared_out: Mapping[Path, Shared], process: int) -> list[Taken]:
    """Bring what a process writes into host memory: on return the program may give it away.

    Args:
        arrays: Arrays of JAX's, across all processes.
        shared_out: What `share_out` says of them.
        process: This one.
    """
    chosen = []
    for path, shared in shared_out.items():
        own = frozenset(index for index, writer in shared.writers.items() if writer == process)
        shards: dict[Index, Any] = {}
        for one in arrays[path].addressable_shards if own else ():
            place = tuple((part.start or 0) // size for part, size in zip(one.index, shared.shard, strict=True))
            if place not in shards and not own.isdisjoint(_chunks_of(place, shared.shard, shared.chunk)):
                shards[place] = one.data
        if own:
            chosen.append((path, shared, own, shards))
    if jax.default_backend() != "cpu":
        for data in (data for *_, shards in chosen for data in shards.values()):
            data.copy_to_host_async()
    return [
        Taken(path, shared.shape, [(place, np.asarray(data)) for place, data in shards.items()], shared.chunk, own)
        for path, shared, own, shards in chosen
    ]


def write(
    directory: File,
    taken: list[Taken],
    process: int,
    *,
    file_bytes: int,
    cancel: Cancel,
    measured: dict[str, FileRecord],
) -> Rows:
    """Write what was taken into files of this process's, below the item's directory; as `writing.write`."""
    own = {".".join(array.path): array.own or frozenset() for array in taken}
    store, files = _store(process), dict[str, FileRecord]()
    (directory / store).mkdir()
    table, entries = write_files(directory / store, taken, file_bytes=file_bytes, cancel=cancel, measured=files)
    measured.update({f"{store}/{name}": record for name, record in files.items()})
    places, rows = dict(entries), Rows()
    for name, entry in table.items():
        mine = ((at, index) for at, index in enumerate(entry.indices) if index in own[name])
        rows[name] = []
        for (at, index), crc in zip(mine, entry.crc32c, strict=True):
            place = places[chunk_key(name, index)]
            rows[name].append((at, crc, place.file, place.offset))
    return rows


def _store(process: int) -> str:
    return contract.store_of(process).removeprefix(f"{contract.ORBAX_ITEM}/")


def merge(directory: File, arrays: Mapping[Path, Shared], written_by: Sequence[Rows]) -> None:
    """Make one store of what the processes have written, without reading any of it.

    Args:
        directory: The item's; the processes' directories are below it.
        arrays: How they were shared out.
        written_by: What each process wrote.

    Raises:
        ValueError: If a chunk was not written, or twice.
        OSError: What the system says of the storage.
    """
    table: dict[str, Chunked] = {}
    entries: list[ocdbt.Entry] = []
    for path, shared in arrays.items():
        name = ".".join(path)
        rows = sorted((*row, process) for process, one in enumerate(written_by) for row in one.get(name, []))
        if [row[0] for row in rows] != list(range(len(shared.writers))):
            raise ValueError(f"{name} was not the same array in all processes: its chunks do not fill it once")
        entry = table[name] = Chunked(
            shared.dtype, list(shared.shape), list(shared.chunk), [crc for _, crc, *_ in rows]
        )
        text = texts.array_text(shared.dtype, shared.shape, shared.chunk)
        entries.append((f"{name}/zarr.json", ocdbt.Place("", 0, len(text), text)))
        nbytes = entry.nbytes // len(rows)
        for index, (_, _, file, offset, process) in zip(entry.indices, rows, strict=True):
            entries.append((chunk_key(name, index), ocdbt.Place(f"{_store(process)}/{file}", offset, nbytes)))
    write_tree(directory, entries)
    (directory / METADATA).write_text(texts.tree_text(tuple(arrays)))
    (directory / contract.CHUNKS).write_bytes(written(table))

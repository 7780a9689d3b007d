"""Arrays read back from a step that this package wrote: many chunks at once, each checked as it comes.

A process reads only the chunks that its own shards overlap. A chunk goes from its file into memory that the next one
takes again, and from there to where it is wanted: nothing is copied twice, and nothing but the result is new memory.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path as File
from typing import Any, Literal, NamedTuple

import google_crc32c
import jax
import numpy as np

from jobkit import contract, names
from jobkit.checkpoint.layout import store
from jobkit.checkpoint.layout.table import Chunked, Index, chunk_key, parse
from jobkit.errors import DamagedError
from jobkit.supervise.oom import Memory

Path = tuple[str, ...]
_LEAST_BYTES = 64 << 20
_THREADS = 8
"""So many chunks are read at a time."""
_PIECE_BYTES = 1 << 20
"""A chunk's checksum is taken piece by piece, each while it is in the processor's cache."""


UNCOMMITTED: Literal["uncommitted"] = "uncommitted"
Placement = jax.sharding.Sharding | Literal["uncommitted"] | None
"""How an array is to be spread over devices; or on the one that JAX chooses; None for an array of numpy's."""


def table_of(directory: File) -> dict[str, Chunked] | None:
    """Read what lies where below an item's directory; None if stock Orbax wrote it.

    Raises:
        DamagedError: If it is no table.
        OSError: If it cannot be read.
    """
    try:
        content = (directory / contract.CHUNKS).read_bytes()
    except FileNotFoundError:
        return None
    try:
        return parse(content)
    except ValueError as error:  # msgspec's errors are ValueErrors
        raise DamagedError(f"{directory / contract.CHUNKS} is no table of chunks: {error}") from None


def read(
    directory: File, table: Mapping[str, Chunked], wanted: Mapping[Path, Placement], *, budget_bytes: int = 0
) -> dict[Path, Any]:
    """Read arrays.

    Args:
        directory: The item's.
        table: What lies where in it.
        wanted: Path -> where the array is to be.
        budget_bytes: Bytes in flight at most, or one array; a quarter of the free memory if 0.

    Raises:
        DamagedError: If a chunk is missing, or is not what was written.
        ValueError, OSError: What tensorstore, or the system, says of the storage.
    """
    readings = [_Reading(".".join(path), path, _array(directory, table, path), place) for path, place in wanted.items()]
    budget = budget_bytes or max(_LEAST_BYTES, Memory().spare_bytes() // 4)
    threads = min(_THREADS, max(1, budget // max((reading.chunk_nbytes for reading in readings), default=1)))
    found: dict[Path, Any] = {}
    waiting: deque[_Reading] = deque()
    in_flight = 0
    with _Chunks(directory) as chunks, ThreadPoolExecutor(threads, thread_name_prefix="jobkit-read") as pool:

        def finish(most: int) -> None:
            """Take what has been read, until no more than so many bytes are in flight."""
            nonlocal in_flight
            small: dict[Path, np.ndarray] = {}
            while waiting and in_flight > most and not waiting[0].left:
                done = waiting.popleft()
                in_flight -= done.nbytes
                made = found[done.path] = done.result()
                if done.place == UNCOMMITTED and isinstance(made, np.ndarray):
                    small[done.path] = made
            found.update(zip(small, jax.device_put(list(small.values())), strict=True))

        try:
            for run in _runs(readings, chunks):
                finish(budget)
                future = pool.submit(chunks.read, run)
                for reading, *_ in run:
                    reading.futures.append(future)
                    reading.left -= 1
                    if reading is not (waiting[-1] if waiting else None):
                        waiting.append(reading)
                        in_flight += reading.nbytes
            finish(-1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _array(directory: File, table: Mapping[str, Chunked], path: Path) -> Chunked:
    if (array := table.get(name := ".".join(path))) is None:
        raise DamagedError(f"{name} is not in {directory / contract.CHUNKS}")
    return array


def keys(table: Mapping[str, Chunked], wanted: Mapping[Path, Placement]) -> Iterator[str]:
    """Yield the keys of the chunks that `read` would read.

    Raises:
        DamagedError: If an array is not in the table.
    """
    for path, place in wanted.items():
        yield from _Reading(".".join(path), path, _array(File(), table, path), place).keys


class _Chunk(NamedTuple):
    """A chunk that is wanted: whose it is, its place in the grid, and where it lies, None if in the tree itself."""

    reading: "_Reading"
    at: Index
    place: tuple[str, int, int] | None


def _runs(readings: Iterable["_Reading"], chunks: "_Chunks") -> Iterator[list[_Chunk]]:
    """Group small chunks that follow each other in a file; what is larger is read alone.

    All chunks of an array are yielded before those of the next one.
    """
    run: list[_Chunk] = []
    nbytes = 0
    for reading in readings:
        for index, key in zip(reading.chunks, reading.keys, strict=True):
            place = chunks.places.get(key)
            end = run[-1].place if run else None
            follows = end and place and (end[0], end[1] + end[2]) == place[:2]
            if run and not (follows and nbytes + reading.chunk_nbytes <= _PIECE_BYTES):
                yield run
                run, nbytes = [], 0
            run.append(_Chunk(reading, index, place))
            nbytes += reading.chunk_nbytes
    if run:
        yield run


class _Chunks:
    """The chunks of an item.

    Args:
        directory: The item's.
    """

    def __init__(self, directory: File) -> None:
        self._directory = directory
        self.places = store.places(directory, lambda name: None)
        self._tree: Any = None
        self._own = threading.local()
        self._open: set[int] = set()

    def read(self, run: list[_Chunk]) -> None:
        """Read chunks into memory that the thread has for this, check them, and hand them on.

        Raises:
            DamagedError: If one is missing, or is not what was written.
            ValueError, OSError: What tensorstore, or the system, says of the storage.
        """
        content, crc = self._in_tree(run[0]) if run[0].place is None else self._in_files(run)
        at = 0
        for chunk in run:
            nbytes, expected = chunk.reading.chunk_nbytes, chunk.reading.checksums[chunk.at]
            values = content[at : at + nbytes]
            if (seen := crc if len(run) == 1 else google_crc32c.value(values)) != expected:
                raise DamagedError(f"{chunk.reading.key(chunk.at)} has crc32c {seen:08x} instead of {expected:08x}")
            if values.nbytes != nbytes:
                raise DamagedError(f"{chunk.reading.key(chunk.at)} has {values.nbytes} bytes instead of {nbytes}")
            chunk.reading.take(chunk.at, values)
            at += nbytes

    def _in_tree(self, chunk: _Chunk) -> tuple[np.ndarray, int]:
        """Read what an earlier jobkit had tensorstore put into the tree itself."""
        self._tree = self._tree or store.open_(self._directory)
        content = self._tree.read(key := chunk.reading.key(chunk.at)).result()
        if content.state != "value":
            raise DamagedError(f"{key} is missing")
        return np.frombuffer(content.value, np.uint8), google_crc32c.value(content.value)

    def _in_files(self, run: list[_Chunk]) -> tuple[np.ndarray, int]:
        """Read what lies in a file; return it, with its checksum if it is one chunk."""
        file, offset, nbytes = run[0].place or ("", 0, 0)
        nbytes = nbytes if len(run) == 1 else sum(chunk.reading.chunk_nbytes for chunk in run)
        descriptor = self._opened(file)
        if getattr(self._own, "memory", np.empty(0)).nbytes < nbytes:
            self._own.memory = _memory(max(nbytes, _PIECE_BYTES))
        content, crc, at = self._own.memory[:nbytes], 0, 0
        while at < nbytes:
            piece = content[at : at + _PIECE_BYTES]
            if not (got := os.preadv(descriptor, [piece], offset + at)):
                raise DamagedError(f"{run[0].reading.key(run[0].at)} is missing: {file} ends before it")
            if len(run) == 1:
                crc = google_crc32c.extend(crc, piece[:got])
            at += got
        return content, crc

    def _opened(self, file: str) -> int:
        """Return a descriptor of the thread's own, so that the system sees that the file is read on and on."""
        if getattr(self._own, "file", None) != file:
            if (before := getattr(self._own, "descriptor", None)) is not None:
                self._open.discard(before)
                os.close(before)
                self._own.file = self._own.descriptor = None
            try:
                self._own.descriptor = names.opener(self._directory / file, os.O_RDONLY)
            except FileNotFoundError:
                raise DamagedError(f"{file} is missing") from None
            self._open.add(self._own.descriptor)
            self._own.file = file
        descriptor: int = self._own.descriptor
        return descriptor

    def __enter__(self) -> "_Chunks":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open:
            with contextlib.suppress(OSError):
                os.close(descriptor)


class _Reading:
    """One array on its way in."""

    def __init__(self, name: str, path: Path, array: Chunked, place: Placement) -> None:
        self.path, self.place = path, place
        self._name, self._array = name, array
        self._shape, self._dtype = tuple(array.shape), np.dtype(array.dtype)
        self._regions: list[tuple[tuple[slice, ...], list[Any]]]
        """What is wanted, with the devices that want it."""
        if isinstance(place, jax.sharding.Sharding):
            by_region: dict[str, tuple[tuple[slice, ...], list[Any]]] = {}
            for device, index in place.addressable_devices_indices_map(self._shape).items():
                region = _bounded(index, self._shape)
                by_region.setdefault(str(region), (region, []))[1].append(device)
            self._regions = list(by_region.values())
        else:
            self._regions = [(tuple(slice(0, size) for size in self._shape), [])]
        self.chunks = list({index: None for region, _ in self._regions for index in _overlapped(array, region)})
        self.checksums = dict(zip(array.indices, array.crc32c, strict=True))
        self.chunk_nbytes = array.nbytes // max(1, len(array.crc32c))
        self.nbytes = len(self.chunks) * self.chunk_nbytes
        self.left = len(self.chunks)
        """How many of them nobody was asked for yet."""
        # What JAX makes of 64 bits, and which device it chooses, its settings of the calling thread say.
        chosen = place == UNCOMMITTED and jax.config.jax_default_device is not None  # type: ignore[attr-defined]
        large = self.chunk_nbytes >= _PIECE_BYTES
        self._at_once = large and place is not None and self._dtype.itemsize < 8 and not chosen
        self._parts: dict[int, Any] = {}
        """Of each region its array of numpy's, or its arrays on devices."""
        self._lock = threading.Lock()
        self.futures: list[Future[None]] = []

    def key(self, index: Index) -> str:
        """Return the key of a chunk."""
        return chunk_key(self._name, index)

    @property
    def keys(self) -> list[str]:
        """What is read."""
        return [self.key(index) for index in self.chunks]

    def take(self, index: Index, content: np.ndarray) -> None:
        """Put what is wanted of a chunk where it is wanted; its bytes are not kept."""
        values = content.view(self._dtype).reshape(self._array.chunk)
        bounds = tuple(slice(at * step, (at + 1) * step) for at, step in zip(index, self._array.chunk, strict=True))
        for number, (region, devices) in enumerate(self._regions):
            if region == bounds:
                self._parts[number] = self._placed(values, devices) if self._at_once else values.copy()
                continue
            both = tuple(
                slice(max(one.start, other.start), min(one.stop, other.stop))
                for one, other in zip(region, bounds, strict=True)
            )
            if all(one.start < one.stop for one in both):
                with self._lock:
                    if number not in self._parts:
                        self._parts[number] = np.empty([one.stop - one.start for one in region], self._dtype)
                self._parts[number][_within(both, region)] = values[_within(both, bounds)]

    def result(self) -> Any:
        """Return the array once all of it is there and checked; one that is uncommitted perhaps as numpy's still."""
        for future in self.futures:
            future.result()
        self.futures = []
        if not isinstance(self.place, jax.sharding.Sharding):
            return self._parts[0][0] if isinstance(self._parts[0], list) else self._parts[0]
        arrays: list[jax.Array] = []
        for number, (_, devices) in enumerate(self._regions):
            part = self._parts.pop(number)
            arrays += part if isinstance(part, list) else self._placed(part, devices)
        return jax.make_array_from_single_device_arrays(self._shape, self.place, arrays)

    def _placed(self, values: np.ndarray, devices: list[Any]) -> list[jax.Array]:
        """Return copies on devices."""
        made = [jax.device_put(values.copy() if _kept(device) else values, device) for device in devices or [None]]
        return jax.block_until_ready(made)  # type: ignore[no-untyped-call, no-any-return]


_ALIGNED, _OFF = 64, 8
"""Memory that begins at a multiple of the one becomes an array of JAX's as it is, on a CPU, and would not be ours any
more: ours begins so much behind it.
"""


def _memory(nbytes: int) -> np.ndarray:
    """Return memory of which JAX makes copies."""
    made = np.empty(nbytes + _ALIGNED + _OFF, np.uint8)
    begin = -made.ctypes.data % _ALIGNED + _OFF
    return made[begin : begin + nbytes]


@cache
def _kept(device: Any) -> bool:
    """Tell whether JAX makes an array of such memory as it is all the same; no version that is known does."""
    memory = _memory(1 << 16)
    memory[:] = 0
    made = jax.block_until_ready(jax.device_put(memory.view(np.float32), device))  # type: ignore[no-untyped-call]
    memory[:] = 1
    return bool(np.asarray(made).any())


def _within(part: tuple[slice, ...], region: tuple[slice, ...]) -> tuple[slice, ...]:
    """Return where a part of a region lies in it."""
    return tuple(slice(one.start - all_.start, one.stop - all_.start) for one, all_ in zip(part, region, strict=True))


def _bounded(index: Any, shape: Index) -> tuple[slice, ...]:
    """Write out where a region begins and ends."""
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _overlapped(array: Chunked, region: tuple[slice, ...]) -> Iterator[Index]:
    """Yield the places of the chunks that hold some of a region."""
    first = [part.start // step for part, step in zip(region, array.chunk, strict=True)]
    counts = [-(-part.stop // step) - at for part, step, at in zip(region, array.chunk, first, strict=True)]
    for inner in np.ndindex(tuple(counts)):
        yield tuple(at + begin for at, begin in zip(inner, first, strict=True))

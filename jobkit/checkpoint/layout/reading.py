"""Arrays read back from a step that this package wrote: all chunks at once, each checked as it comes.

A process reads only the chunks that its own shards overlap, within a budget of memory.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path as File
from typing import Any

import google_crc32c
import jax
import numpy as np

from jobkit import contract
from jobkit.checkpoint.layout import store
from jobkit.checkpoint.layout.table import Chunked, Index, chunk_key, parse
from jobkit.errors import DamagedError
from jobkit.supervise.oom import Memory

Path = tuple[str, ...]
_LEAST_BYTES = 64 << 20


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
    directory: File,
    table: Mapping[str, Chunked],
    wanted: Mapping[Path, jax.sharding.Sharding | None],
    *,
    budget_bytes: int = 0,
) -> dict[Path, Any]:
    """Read arrays.

    Args:
        directory: The item's.
        table: What lies where in it.
        wanted: Path -> how the array is to be spread over devices; None for an array of numpy's.
        budget_bytes: Bytes in flight at most, or one array; a quarter of the free memory if 0.

    Raises:
        DamagedError: If a chunk is missing, or is not what was written.
        ValueError, OSError: What tensorstore, or the system, says of the storage.
    """
    budget = budget_bytes or max(_LEAST_BYTES, Memory().spare_bytes() // 4)
    values = store.open_(directory)
    found: dict[Path, Any] = {}
    waiting: deque[_Reading] = deque()
    in_flight = 0
    for path, sharding in wanted.items():
        name = ".".join(path)
        if name not in table:
            raise DamagedError(f"{name} is not in {directory / contract.CHUNKS}")
        reading = _Reading(values, name, path, table[name], sharding)
        while waiting and in_flight + reading.nbytes > budget:
            done = waiting.popleft()
            found[done.path] = done.result()
            in_flight -= done.nbytes
        reading.start()
        waiting.append(reading)
        in_flight += reading.nbytes
    while waiting:
        done = waiting.popleft()
        found[done.path] = done.result()
    return found


def keys(table: Mapping[str, Chunked], wanted: Mapping[Path, jax.sharding.Sharding | None]) -> Iterator[str]:
    """Yield the keys of the chunks that `read` would read.

    Raises:
        DamagedError: If an array is not in the table.
    """
    for path, sharding in wanted.items():
        if (array := table.get(name := ".".join(path))) is None:
            raise DamagedError(f"{name} is not in {contract.CHUNKS}")
        yield from _Reading(None, name, path, array, sharding).keys


class _Reading:
    """One array on its way in."""

    def __init__(
        self, values: Any, name: str, path: Path, array: Chunked, sharding: jax.sharding.Sharding | None
    ) -> None:
        self.path = path
        self._values, self._name, self._array, self._sharding = values, name, array, sharding
        self._shape = tuple(array.shape)
        self._regions = [tuple(slice(0, size) for size in self._shape)]
        if sharding is not None:
            own = sharding.addressable_devices_indices_map(self._shape)
            self._regions = list({str(index): _bounded(index, self._shape) for index in own.values()}.values())
        self._chunks = {index: None for region in self._regions for index in _overlapped(array, region)}
        self.nbytes = len(self._chunks) * array.nbytes // max(1, len(array.crc32c))
        self._checksums = dict(zip(array.indices, array.crc32c, strict=True))
        self._futures: dict[Index, Any] = {}

    @property
    def keys(self) -> list[str]:
        """What is read."""
        return [chunk_key(self._name, index) for index in self._chunks]

    def start(self) -> None:
        """Ask for every chunk."""
        self._futures = {index: self._values.read(chunk_key(self._name, index)) for index in self._chunks}

    def result(self) -> Any:
        """Return the array once all of it is there and checked."""
        parts = {index: self._checked(index, future) for index, future in self._futures.items()}
        self._futures = {}
        if self._sharding is None:
            return self._region(self._regions[0], parts, own=True)
        made = {str(region): self._region(region, parts) for region in self._regions}
        dtype = np.dtype(self._array.dtype)
        return jax.make_array_from_callback(
            self._shape, self._sharding, lambda index: made[str(_bounded(index, self._shape))], dtype=dtype
        )

    def _checked(self, index: Index, future: Any) -> np.ndarray:
        content = future.result()
        key = chunk_key(self._name, index)
        if content.state != "value":
            raise DamagedError(f"{key} is missing")
        crc = google_crc32c.value(content.value)
        if crc != (expected := self._checksums[index]):
            raise DamagedError(f"{key} has crc32c {crc:08x} instead of {expected:08x}")
        dtype = np.dtype(self._array.dtype)
        return np.frombuffer(content.value, dtype).reshape(self._array.chunk)

    def _region(self, region: tuple[slice, ...], parts: Mapping[Index, np.ndarray], *, own: bool = False) -> Any:
        """Return what a region holds; `own` if somebody may write into it."""
        indices = list(_overlapped(self._array, region))
        if len(indices) == 1 and tuple(part.stop - part.start for part in region) == tuple(self._array.chunk):
            return parts[indices[0]].copy() if own else parts[indices[0]]
        made = np.empty([part.stop - part.start for part in region], np.dtype(self._array.dtype))
        for index in indices:
            inside, outside = [], []
            for part, at, step in zip(region, index, self._array.chunk, strict=True):
                begin, end = max(part.start, at * step), min(part.stop, (at + 1) * step)
                inside.append(slice(begin - at * step, end - at * step))
                outside.append(slice(begin - part.start, end - part.start))
            made[tuple(outside)] = parts[index][tuple(inside)]
        return made


def _bounded(index: Any, shape: Index) -> tuple[slice, ...]:
    """Write out where a region begins and ends."""
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _overlapped(array: Chunked, region: tuple[slice, ...]) -> Iterator[Index]:
    """Yield the places of the chunks that hold some of a region."""
    first = [part.start // step for part, step in zip(region, array.chunk, strict=True)]
    counts = [-(-part.stop // step) - at for part, step, at in zip(region, array.chunk, first, strict=True)]
    for inner in np.ndindex(tuple(counts)):
        yield tuple(at + begin for at, begin in zip(inner, first, strict=True))

"""What lies where in a step that this package wrote: each array's dtype, shape, chunks, and their checksums.

The table is a file of the step, `chunks.json`, and so covered by the commit. A step without one was written by stock
Orbax.
"""

import itertools
import math
from collections.abc import Iterator
from functools import cache
from typing import Annotated

import msgspec
import numpy as np

from jobkit.checkpoint.leaves import DTYPES

Index = tuple[int, ...]
"""Place of a chunk in an array's grid of chunks."""
_Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 50)]


class Chunked(msgspec.Struct):
    """One array, cut into chunks of one shape that fill it without rest.

    Args:
        dtype: Name of its dtype.
        shape: Its shape, in elements.
        chunk: Shape of a chunk, in elements.
        crc32c: Checksum of the stored bytes of each chunk, in C order of the grid, as numbers.
    """

    dtype: str
    shape: list[_Size]
    chunk: list[_Size]
    crc32c: list[int] = []

    @property
    def grid(self) -> Index:
        """How many chunks there are along each axis."""
        return tuple(size // step for size, step in zip(self.shape, self.chunk, strict=True))

    @property
    def indices(self) -> Iterator[Index]:
        """Every place of the grid, in C order."""
        return itertools.product(*(range(count) for count in self.grid))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def chunk_key(name: str, index: Index) -> str:
    """Return the key of a chunk in zarr's default encoding: 'net.w/c/0/1', of an array without axes 'net.w/c'."""
    return "/".join((name, "c", *map(str, index)))


_TRIED = 16
"""A chunk is not cut smaller than it could be by more than this."""


@cache
def cut(shape: Index, itemsize: int, most_bytes: int) -> Index:
    """Choose the shape of chunks of at most `most_bytes` bytes, which fill an array without rest.

    Of an array that cannot be cut into a reasonable number of such chunks, the whole shape is returned: of prime
    numbers of rows, say.

    Args:
        shape: Shape of the array, or of each of its shards, in elements.
        itemsize: Bytes of an element.
        most_bytes: Bytes of a chunk.
    """
    nbytes = math.prod(shape) * itemsize
    if nbytes <= most_bytes:
        return shape
    for axis, size in enumerate(shape):
        row = nbytes // size
        most = min(size, most_bytes // row)
        if rows := next((rows for rows in range(most, most // _TRIED, -1) if size % rows == 0), 0):
            return (*shape[:axis], rows, *shape[axis + 1 :])
    return shape


def parse(content: bytes) -> dict[str, Chunked]:
    """Read a table: name in the layout -> array.

    Raises:
        ValueError: If it is none, though its bytes are as committed.
    """
    table = msgspec.json.decode(content, type=dict[str, Chunked])
    for name, array in table.items():
        known = array.dtype in DTYPES and len(array.shape) == len(array.chunk) and 0 not in array.chunk
        if not known or any(size % step for size, step in zip(array.shape, array.chunk, strict=True)):
            raise ValueError(f"{name[:200]!a} has no chunks of {array.chunk} in {array.shape} of {array.dtype[:20]!a}")
        if math.prod(array.grid) != len(array.crc32c):
            raise ValueError(f"{name[:200]!a} has {len(array.crc32c)} checksums of {math.prod(array.grid)} chunks")
    return table


def written(table: dict[str, Chunked]) -> bytes:
    """Write a table down."""
    return msgspec.json.encode(table)

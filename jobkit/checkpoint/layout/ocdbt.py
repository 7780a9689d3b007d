"""The tree of a key-value store in OCDBT, tensorstore's format, in which Orbax keeps arrays: made in one go.

tensorstore writes it too, but copies every value twice on the way, and takes 30 us a key. What is written here is what
it documents as its storage format (kvstore/ocdbt): one manifest with one version, whose root is a B+tree over all keys.
Values of a few hundred bytes lie in the tree, others in files of values.
"""

import itertools
import secrets
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import google_crc32c

NODES = "nodes/0"
"""The file of all nodes, relative to the store."""
MANIFEST = "manifest.ocdbt"
_MANIFEST_MAGIC, _NODE_MAGIC = bytes.fromhex("0cdb3a2a"), bytes.fromhex("0cdb20de")
_CONFIG = b"\0", 100, 8 << 20, b"\4\0"
"""A single manifest; bytes of a value and of a node that tensorstore would make; 16 versions in it; no compression."""
_ARITY = 10_000
"""So many keys a node has at most."""


class Place(NamedTuple):
    """Where a value lies.

    Args:
        file: Its file, relative to the store; "" for a value in the tree.
        offset: In bytes.
        nbytes: How many there are.
        content: A value in the tree.
    """

    file: str
    offset: int
    nbytes: int
    content: bytes = b""


Entry = tuple[str, Place]
"""A key and its value."""


class _Node(NamedTuple):
    """A node in the file of nodes, with what is below it: keys, bytes of nodes, and of values outside of them."""

    first: bytes
    offset: int
    nbytes: int
    keys: int
    tree_bytes: int
    value_bytes: int


def tree(entries: tuple[Entry, ...]) -> tuple[bytes, bytes]:
    """Return the contents of `NODES` and `MANIFEST` for a store of these entries, whose keys differ.

    Nodes depend on the structure alone, and are made once for each.
    """
    nodes, height, root = _nodes(entries, _ARITY)
    config = secrets.token_bytes(16) + _CONFIG[0] + _varints(_CONFIG[1:3]) + _CONFIG[3]
    version = _varints([1, 1]) + bytes([height]) + _references([root], b"\0") + time.time_ns().to_bytes(8, "little")
    return nodes, _framed(_MANIFEST_MAGIC, config + _files([NODES]) + version + _varints([0]))


@lru_cache(4)
def _nodes(entries: tuple[Entry, ...], arity: int) -> tuple[bytes, int, _Node]:
    """Return all nodes, one after another, the height of the root, and the root."""
    ordered = sorted((key.encode(), place) for key, place in entries)
    made, level, height = bytearray(), [], 0
    for begin in range(0, len(ordered), arity):
        part = ordered[begin : begin + arity]
        content = _leaf([key for key, _ in part], [place for _, place in part])
        outside = sum(place.nbytes for _, place in part if place.file)
        level.append(_Node(part[0][0], len(made), len(content), len(part), len(content), outside))
        made += content
    while len(level) > 1:
        height += 1
        above = []
        for begin in range(0, len(level), arity):
            children = level[begin : begin + arity]
            content = _interior(children, height)
            sums = [sum(column) for column in list(zip(*children, strict=True))[3:]]
            above.append(_Node(children[0].first, len(made), len(content), sums[0], sums[1] + len(content), sums[2]))
            made += content
        level = above
    return bytes(made), height, level[0]


def _leaf(keys: Sequence[bytes], places: Sequence[Place]) -> bytes:
    files = sorted({place.file for place in places if place.file})
    number = {file: at for at, file in enumerate(files)}
    outside = [place for place in places if place.file]
    values = (
        _varints(place.nbytes for place in places)
        + bytes(bool(place.file) for place in places)
        + _varints(number[place.file] for place in outside)
        + _varints(place.offset for place in outside)
        + b"".join(place.content for place in places)
    )
    return _framed(_NODE_MAGIC, b"\0" + _files(files) + _keys(keys) + values)


def _interior(children: Sequence[_Node], height: int) -> bytes:
    keys = _keys([child.first for child in children], of_subtrees=bytes(len(children)))
    return _framed(_NODE_MAGIC, bytes([height]) + _files([NODES]) + keys + _references(children, bytes(len(children))))


def _references(nodes: Sequence[_Node], files: bytes) -> bytes:
    """Write references to nodes down: column by column, and first which file they lie in."""
    columns = list(zip(*nodes, strict=True))[1:]
    return files + b"".join(_varints(column) for column in columns)


def _files(names: Sequence[str]) -> bytes:
    """Write a table of files down: what each shares with the one before, the rest's length, that of its base."""
    encoded = [name.encode() for name in names]
    shared = [0] * max(0, len(names) - 1)
    return _varints([len(names), *shared, *map(len, encoded), *[0] * len(names)]) + b"".join(encoded)


def _keys(keys: Sequence[bytes], of_subtrees: bytes = b"") -> bytes:
    """Write sorted keys down: how much each shares with the one before, and the rest."""
    shared = [_shared(before, key) for before, key in itertools.pairwise(keys)]
    rests = [key[begin:] for begin, key in zip([0, *shared], keys, strict=True)]
    return _varints([len(keys), *shared, *map(len, rests)]) + of_subtrees + b"".join(rests)


def _shared(one: bytes, other: bytes) -> int:
    """Return how many bytes two keys have in common at their beginnings."""
    if other.startswith(one):
        return len(one)
    return next(at for at, (mine, theirs) in enumerate(zip(one, other, strict=False)) if mine != theirs)


def _varints(numbers: Iterable[int]) -> bytes:
    """Write numbers down, seven bits a byte, the low ones first."""
    out = bytearray()
    for number in numbers:
        while number > 0x7F:
            out.append(number & 0x7F | 0x80)
            number >>= 7
        out.append(number)
    return bytes(out)


def _framed(magic: bytes, body: bytes) -> bytes:
    """Put a head before a node or manifest of version 0 without compression, and its crc32c behind."""
    framed = magic + (len(magic) + 8 + 2 + len(body) + 4).to_bytes(8, "little") + b"\0\0" + body
    return framed + int(google_crc32c.value(framed)).to_bytes(4, "little")

"""The key-value store of a step's arrays, to be read: OCDBT, as Orbax's own, with values in files apart from the nodes.

Values are read by ranges and checked chunk by chunk, so that their files need no check of their own at a restore;
manifest and nodes are small and checked whole.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import tensorstore as ts


def open_(directory: Path) -> Any:
    """Return the store below a directory, to be read."""
    return ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}}).result()


def places(directory: Path, bring: Callable[[str], None]) -> dict[str, tuple[str, int, int]]:
    """Return where the value of each key lies, of those that have files of values: file, offset and length.

    Args:
        directory: The item's, whose manifest is there.
        bring: Called with each file of nodes that is read, relative to the directory, so that it is there.
    """
    base = ts.KvStore.open({"driver": "file", "path": f"{directory}/"}).result()
    found = {}
    root = ts.ocdbt.dump(base).result()["versions"][-1]["root"]
    nodes = [(root["location"], b"")] if "location" in root else []
    while nodes:
        location, prefix = nodes.pop()
        bring(_place(location)[0])
        for entry in ts.ocdbt.dump(base, location).result()["entries"]:
            if "indirect_value" in entry:
                found[(prefix + entry["key"]).decode()] = _place(entry["indirect_value"])
            elif "location" in entry:
                nodes.append((entry["location"], prefix + entry["subtree_common_prefix"]))
    return found


def _place(location: str) -> tuple[str, int, int]:
    """Take a place apart as tensorstore writes it: kind, directory, file, offset, length."""
    _, above, file, offset, nbytes = location.split(":")
    return unquote(above) + unquote(file), int(offset), int(nbytes)

"""The key-value store of a step's arrays: OCDBT, as Orbax's own, with the values in files apart from the nodes.

Values are read by ranges and checked chunk by chunk, so that their files need no check of their own at a restore;
manifest and nodes are small and checked whole.
"""

from pathlib import Path
from typing import Any

import tensorstore as ts

from jobkit import contract

_PLACES = {
    "value_data_prefix": contract.VALUES,
    "btree_node_data_prefix": "nodes/",
    "version_tree_node_data_prefix": "versions/",
}


def create(directory: Path, file_bytes: int) -> Any:
    """Return an empty store below a directory. What it writes is not synced: the commit does that, all at once.

    Args:
        directory: The item's.
        file_bytes: Bytes at which a file of values ends.
    """
    spec = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{directory}/"},
        "config": {"compression": None},
        "target_data_file_size": file_bytes,
        **_PLACES,
    }
    return ts.KvStore.open(spec, context=ts.Context({"file_io_sync": False})).result()


def open_(directory: Path) -> Any:
    """Return the store below a directory, to be read."""
    return ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}}).result()

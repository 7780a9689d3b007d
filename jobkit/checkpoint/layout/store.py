"""The key-value store of a step's arrays, to be read: OCDBT, as Orbax's own, with values in files apart from the nodes.

Values are read by ranges and checked chunk by chunk, so that their files need no check of their own at a restore;
manifest and nodes are small and checked whole.
"""

from pathlib import Path
from typing import Any

import tensorstore as ts


def open_(directory: Path) -> Any:
    """Return the store below a directory, to be read."""
    return ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}}).result()

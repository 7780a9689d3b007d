"""Does the installed Orbax read what we write? Tried once for each version on a tiny tree, and remembered."""

import functools
import json
import os
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jobkit.checkpoint.layout import writing
from jobkit.checkpoint.layout.handler import nested, only
from jobkit.errors import say

_LAYOUT = 2
"""Counted up when what we write changes, so that it is tried again."""


@functools.cache
def stock_reads_ours() -> bool:
    """Tell whether checkpoints can be written without stock Orbax; says so if they cannot."""
    versions = f"layout {_LAYOUT}, orbax-checkpoint {version('orbax-checkpoint')}, tensorstore {version('tensorstore')}"
    known: dict[str, bool] = {}
    with suppress(OSError, ValueError, RuntimeError):  # the last of a user without a home
        found = json.loads(_memory().read_text())
        known = found if isinstance(found, dict) else {}
    if known.get(versions) is not True:  # what failed is tried again: it may have been the disk
        if (wrong := _wrong()) is not None:
            say(
                f"warning: {versions.partition(', ')[2]} does not read what jobkit writes by itself ({wrong}): "
                "checkpoints are written through Orbax, which takes longer"
            )
            return False
        with suppress(OSError, RuntimeError):
            _remember({**known, versions: True})
    return True


def _memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jobkit" / "layout.json"


def _remember(known: dict[str, bool]) -> None:
    file = _memory()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
        json.dump(known, new)
    os.replace(new.name, file)


def _wrong() -> str | None:
    """Write a tiny tree and read it back through stock Orbax; say what is wrong, None if nothing is."""
    arrays: dict[writing.Path, np.ndarray] = {
        ("a",): np.arange(6, dtype=np.float32).reshape(2, 3),
        ("b", "c"): np.array(7, np.int32),
    }
    tree: dict[str, Any] = nested(arrays)
    try:
        with tempfile.TemporaryDirectory(prefix="jobkit-layout-") as directory:
            taken, cancel = writing.take(arrays.items()), writing.Cancel()  # one of several processes does this alone
            writing.write(Path(directory), taken, file_bytes=writing.FILE_BYTES, cancel=cancel, measured={})
            alone = only(jax.process_index())
            found = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone).restore(Path(directory))
        same = np.array_equal(found["a"], tree["a"]) and np.array_equal(found["b"]["c"], tree["b"]["c"])
    except Exception as error:  # whatever a version that nobody has seen yet may raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None if same else "other values came back"

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

from jobkit.checkpoint.layout import several, writing
from jobkit.checkpoint.layout.handler import nested, only
from jobkit.errors import say
from jobkit.rundir.commits import FileRecord

_LAYOUT = 3
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
    """Write a tiny tree, as one process and as two, and read it through stock Orbax; say what is wrong, if anything."""
    arrays: dict[writing.Path, np.ndarray] = {
        ("a",): np.arange(6, dtype=np.float32).reshape(2, 3),
        ("b", "c"): np.arange(2, dtype=np.int32).reshape(2, 1),
        ("d",): np.array(7, np.int32),
    }
    tree: dict[str, Any] = nested(arrays)
    try:
        for write in _of_one, _of_two:
            with tempfile.TemporaryDirectory(prefix="jobkit-layout-") as directory:
                write(Path(directory), arrays)
                alone = only(jax.process_index())  # one of several processes does this alone
                got = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone).restore(Path(directory))
            if not jax.tree.all(jax.tree.map(np.array_equal, got, tree)):
                return "other values came back"
    except Exception as error:  # whatever a version that nobody has seen yet may raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _of_one(directory: Path, arrays: dict[writing.Path, np.ndarray]) -> None:
    taken, cancel = writing.take(arrays.items()), writing.Cancel()
    writing.write(directory, taken, file_bytes=writing.FILE_BYTES, cancel=cancel, measured={})


def _of_two(directory: Path, arrays: dict[writing.Path, np.ndarray]) -> None:
    """Write a row each, and the first what has none."""
    shared: dict[writing.Path, several.Shared] = {}
    for path, array in arrays.items():
        writers: dict[tuple[int, ...], int] = (
            {(row,) + (0,) * (array.ndim - 1): row for row in range(2)} if array.ndim else {(): 0}
        )
        chunk = (1, *array.shape[1:]) if array.ndim else ()
        shared[path] = several.Shared(array.dtype.name, array.shape, array.shape, chunk, writers)
    rows = []
    for process in range(2):
        taken = []
        for path, array in arrays.items():
            own = frozenset(index for index, writer in shared[path].writers.items() if writer == process)
            if own:
                taken.append(writing.Taken(path, array.shape, [((0,) * array.ndim, array)], shared[path].chunk, own))
        files: dict[str, FileRecord] = {}
        bytes_, cancel = writing.FILE_BYTES, writing.Cancel()
        rows.append(several.write(directory, taken, process, file_bytes=bytes_, cancel=cancel, measured=files))
    several.merge(directory, shared, rows)

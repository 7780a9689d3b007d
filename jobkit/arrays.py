"""Orbax writes and reads the arrays of a checkpoint; how it is told to is here and nowhere else.

In a run of several processes all of them call the same in the same order, and each writes its own shards. They meet in
barriers of JAX's coordination service: Orbax is told who they are, since it would take the devices for that otherwise.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jobkit import contract, state
from jobkit.errors import JobkitError, StorageError
from jobkit.memory import Memory
from jobkit.storage import explain

# Measured at 1 GB (zstd costs 60 % of the time and a copy of the state in memory, and saves 7 % of weights).
_HANDLER_OPTIONS: dict[str, Any] = {"use_ocdbt": True, "use_zarr3": True, "use_compression": False}
_DATA_FILE_BYTES = 64 << 20
_BATCH_BYTES = 256 << 20
_BARRIER_S = 600
"""How long Orbax waits for the other processes."""


class Writer:
    """Writes the arrays of one checkpoint after another, in the background."""

    def __init__(self) -> None:
        self._orbax: ocp.AsyncCheckpointer | None = None

    def start(self, stage: Path, arrays: Mapping[str, Any], nbytes: int, *, for_upload: bool) -> None:
        """Take copies off the devices and begin writing to `stage`, which must not exist.

        Args:
            stage: Directory of the checkpoint.
            arrays: Nested dicts of arrays.
            nbytes: Bytes of all of them.
            for_upload: Whether the files will be carried to an object store.
        """
        if not arrays:  # Orbax refuses an empty tree
            return
        if self._orbax is None:
            everyone = _everyone()
            item = ocp.PyTreeCheckpointHandler(**_HANDLER_OPTIONS, multiprocessing_options=everyone)
            options = ocp.CompositeOptions(multiprocessing_options=everyone)
            handler = ocp.CompositeCheckpointHandler(composite_options=options, **{contract.ORBAX_ITEM: item})
            self._orbax = ocp.AsyncCheckpointer(handler, timeout_secs=_BARRIER_S, multiprocessing_options=everyone)
        if for_upload:
            size = _upload_bytes(nbytes)
            chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=size), arrays)
            args = ocp.args.PyTreeSave(arrays, chunked, ocdbt_target_data_file_size=size)
        else:
            args = ocp.args.PyTreeSave(arrays, ocdbt_target_data_file_size=_DATA_FILE_BYTES)
        self._orbax.save(stage, args=ocp.args.Composite(**{contract.ORBAX_ITEM: args}))

    def wait(self) -> None:
        """Wait until what was started is written; raises what Orbax raises."""
        if self._orbax is not None:
            self._orbax.wait_until_finished()

    def close(self) -> None:
        """End Orbax's threads."""
        if self._orbax is not None:
            with contextlib.suppress(Exception):  # it raises a failed save's error again, which `wait` told
                self._orbax.close()
            self._orbax = None


def silence() -> None:
    """Keep Orbax from telling at length how a save failed that was made to fail."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    earlier = sys.unraisablehook

    def hook(told: Any) -> None:
        # tensorstore tells this way of each array whose asyncio loop has gone.
        if str(told.exc_value) != "Event loop is closed":
            earlier(told)

    sys.unraisablehook = hook


def _everyone() -> ocp.options.MultiprocessingOptions:
    return _only(*range(jax.process_count()))


def _only(*processes: int) -> ocp.options.MultiprocessingOptions:
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(primary_host=processes[0], active_processes=set(processes))


def read(
    item: Path,
    wanted: Mapping[tuple[str, ...], Any],
    *,
    records: Mapping[Any, state.Record] | None = None,
    alone: bool = False,
) -> dict[tuple[str, ...], Any]:
    """Read arrays by quoted path.

    Args:
        item: The Orbax item's directory.
        wanted: Path -> the leaf in the running program, whose placement on devices the result takes.
        records: How each leaf was written down; without them all are read as numpy.
        alone: Whether this process reads by itself, rather than all processes together.
    """
    if not wanted:
        return {}
    args = {
        path: state.stored_args(records[path], live) if records else ocp.RestoreArgs(restore_type=np.ndarray)
        for path, live in wanted.items()
    }
    readers = _only(jax.process_index()) if alone else _everyone()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=readers)
    with ocp.Checkpointer(handler, multiprocessing_options=readers) as reader:
        tree = reader.restore(
            item,
            args=ocp.args.PyTreeRestore(
                item=nested(dict.fromkeys(wanted, 0)), restore_args=nested(args), partial_restore=True
            ),
        )
    return {path: _at(tree, path) for path in wanted}


def nested(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Make nested dicts of what is named by paths."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def batches(paths: Mapping[tuple[str, ...], state.Record]) -> Iterator[dict[tuple[str, ...], state.Record]]:
    """Group arrays so that one group is a few hundred MB at most."""
    batch: dict[tuple[str, ...], state.Record] = {}
    size = 0
    for path, record in paths.items():
        width = 16 if record["is"] == "key" else np.dtype(record["dtype"]).itemsize
        nbytes = width * int(np.prod(record["shape"], dtype=np.int64))
        if batch and size + nbytes > _BATCH_BYTES:
            yield batch
            batch, size = {}, 0
        batch[path] = record
        size += nbytes
    if batch:
        yield batch


_SYSTEM_TEXTS = {"No space left": 28, "Disk quota exceeded": 122, "Read-only file system": 30, "Permission denied": 13}


def storage_error(error: BaseException, doing: str) -> JobkitError:
    """Translate what Orbax and tensorstore raise; they wrap the system's error in text of their own."""
    if isinstance(error, JobkitError):
        return error
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return explain(cause, doing)
        for text, number in _SYSTEM_TEXTS.items():
            if text in str(cause):
                return explain(OSError(number, text), doing)
        cause = cause.__cause__ or cause.__context__
    return StorageError(f"{doing}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _upload_bytes(nbytes: int) -> int:
    """Choose the size of data files for a bucket: small enough that uploads run in parallel, not thousands of them."""
    return min(max(nbytes // 64, 8 << 20), 256 << 20)


def spare_bytes() -> int:
    """Return how many bytes of memory the program has never used: of a device, or where that is the host, of the host.

    Of several devices the first counts.
    """
    told = None
    with contextlib.suppress(Exception):  # a backend need not know
        told = jax.local_devices()[0].memory_stats()
    if told and "bytes_limit" in told:
        return max(0, int(told["bytes_limit"]) - int(told.get("peak_bytes_in_use", told["bytes_limit"])))
    return Memory().spare_bytes() // int(jax.process_count()) if jax.default_backend() == "cpu" else 0

"""The arrays of a run's own checkpoints, written and read: through our handler for Orbax, or through stock Orbax.

Both write the same layout. Our handler (`layout/`) does it without Orbax's work per leaf; stock Orbax writes where the
program asked for it, and where the installed Orbax reads our files no more.

Three other modules import it, none of which writes into a run: restore.py exports parameters, weights/source.py reads
what plain Orbax wrote, and leaves.py says how one array is to be read.

In a run of several processes all of them call the same in the same order. With our handler each writes what is its to
write, by itself; with stock Orbax they meet in barriers of JAX's coordination service: Orbax is told who they are: it
would take the devices for that otherwise.
"""

import contextlib
import errno
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from operator import getitem
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jobkit import contract
from jobkit.checkpoint.layout import reading, several
from jobkit.checkpoint.layout import store as layout
from jobkit.checkpoint.layout.handler import DirectCheckpointHandler, DirectSave, Share, nested, only
from jobkit.checkpoint.layout.probe import stock_reads_ours
from jobkit.checkpoint.layout.writing import FILE_BYTES, Cancel
from jobkit.checkpoint.leaves import Record, placement, stored_args
from jobkit.errors import ConfigError, JobkitError, PackageError, StorageError
from jobkit.group import Group
from jobkit.rundir.apart.fetching import Partial
from jobkit.rundir.commits import FileRecord
from jobkit.rundir.remote import IN_MEMORY_BYTES, PARALLEL
from jobkit.rundir.store import Store, explain
from jobkit.supervise.oom import Memory

# Measured at 1 GB (zstd costs 60 % of the time and a copy of the state in memory, and saves 7 % of weights).
_HANDLER_OPTIONS: dict[str, Any] = {"use_ocdbt": True, "use_zarr3": True, "use_compression": False}
_BATCH_BYTES = 256 << 20
_BARRIER_S = 600
"""How long Orbax waits for the other processes."""


class Writer:
    """Writes the arrays of one checkpoint after another, in the background.

    Args:
        stock: Whether stock Orbax shall write them.
        group: The processes that save together.
    """

    def __init__(self, *, stock: bool = False, group: Group | None = None) -> None:
        self._stock, self._group = stock, group or Group("")
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._cancel = Cancel()
        self._measured: dict[str, FileRecord] = {}
        self.share: Share | None = None
        """What this one of several processes writes into a directory of its own; None where stock Orbax writes."""

    def start(self, stage: Path, arrays: Mapping[tuple[str, ...], Any], nbytes: int, *, for_upload: bool) -> None:
        """Take copies off the devices and begin writing to `stage`, which must not exist.

        Args:
            stage: Directory of the checkpoint. One of several processes writes `part_of` it, but for stock Orbax, which
                has all of them write there.
            arrays: Quoted path -> array.
            nbytes: Bytes of all of them.
            for_upload: Whether the files will be carried to an object store.
        """
        self._measured, self.share = {}, None
        if not arrays:  # Orbax refuses an empty tree
            return
        if self._orbax is None:
            logging.getLogger("absl").addFilter(_matters)
            self._stock = self._stock or not self._group.share("layout", stock_reads_ours)
            if self._stock and self._group.count > 1 and for_upload:
                raise ConfigError(
                    "several processes on a URL share no disk, and stock Orbax needs one: leave out writer='orbax', "
                    f"or give a directory that all nodes share (jobkit is tested with orbax-checkpoint {TESTED})"
                )
            everyone = _everyone() if self._stock else only(self._group.index)
            item = (
                ocp.PyTreeCheckpointHandler(**_HANDLER_OPTIONS, multiprocessing_options=everyone)
                if self._stock
                else DirectCheckpointHandler()
            )
            # Else a thread that waits for a directory which could not be made would keep the process from ending.
            at_once = ocp.AsyncOptions(timeout_secs=_BARRIER_S, create_directories_asynchronously=self._stock)
            options = ocp.CompositeOptions(multiprocessing_options=everyone, async_options=at_once)
            handler = ocp.CompositeCheckpointHandler(composite_options=options, **{contract.ORBAX_ITEM: item})
            self._orbax = ocp.AsyncCheckpointer(handler, async_options=at_once, multiprocessing_options=everyone)
        if not self._stock:
            size = _upload_bytes(nbytes) if for_upload else FILE_BYTES
            self._cancel = Cancel()
            if self._group.count > 1:
                self.share = Share(self._group.index, several.share_out(arrays))
                stage = part_of(stage, self._group.index)
            direct = DirectSave(
                arrays=arrays,
                file_bytes=size,
                cancel=self._cancel,
                sync=False,
                measured=self._measured,
                share=self.share,
            )
            self._orbax.save(stage, args=ocp.args.Composite(**{contract.ORBAX_ITEM: direct}))
            return
        tree = nested(arrays)
        if for_upload:
            size = _upload_bytes(nbytes)
            chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=size), tree)
            args = ocp.args.PyTreeSave(tree, chunked, ocdbt_target_data_file_size=size)
        else:
            args = ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=FILE_BYTES)
        self._orbax.save(stage, args=ocp.args.Composite(**{contract.ORBAX_ITEM: args}))

    def wait(self) -> None:
        """Wait until what was started is written; raises what Orbax raises."""
        if self._orbax is not None:
            self._orbax.wait_until_finished()

    @property
    def measured(self) -> dict[str, FileRecord]:
        """Size and checksum of files of the stage, as far as they are known without reading, once it is written."""
        return {f"{contract.ORBAX_ITEM}/{name}": record for name, record in self._measured.items()}

    def another(self) -> "Writer":
        """Return a writer of the same kind, which knows of no save."""
        return Writer(stock=self._stock, group=self._group)

    def cancel(self) -> bool:
        """Have what was started fail before its next chunk, and tell whether it will: stock Orbax cannot be stopped."""
        self._cancel.set()
        return not self._stock

    def close(self) -> None:
        """End Orbax's threads."""
        if self._orbax is not None:
            with contextlib.suppress(Exception):  # it raises a failed save's error again, which `wait` told
                self._orbax.close()
            self._orbax = None


def part_of(stage: Path, process: int) -> Path:
    """Return where one of several processes writes its part of a stage."""
    return stage.with_name(f"{stage.name}.process_{process}")


def _matters(record: logging.LogRecord) -> bool:
    """Drop what Orbax warns of where it dates a checkpoint that is being written before it has its first date."""
    return not (str(record.msg).startswith("Metadata file does not exist") and contract.STAGE in str(record.args))


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
    return only(*range(jax.process_count()))


def read(
    store: Store,
    step: int,
    wanted: Mapping[tuple[str, ...], Any],
    *,
    records: Mapping[Any, Record] | None = None,
    alone: bool = False,
    partial: Partial | None = None,
) -> dict[tuple[str, ...], Any]:
    """Read arrays by quoted path.

    Args:
        store: The run directory.
        step: A committed step.
        wanted: Path -> the leaf in the running program, whose placement on devices the result takes.
        records: How each leaf was written down; without them all are read as numpy.
        alone: Whether this process reads by itself, rather than all processes together.
        partial: Brings what is read, where `store` is the directory that it brings it to.
    """
    if not wanted:
        return {}
    item = store.file(contract.step_dir(step)) / contract.ORBAX_ITEM
    if (table := reading.table_of(item)) is not None:
        placed = {path: _place(records[path], live) if records else None for path, live in wanted.items()}
        if partial is not None:
            places = layout.places(item, lambda name: partial.bring(f"{contract.ORBAX_ITEM}/{name}"))
            keys = (key for key in reading.keys(table, placed) if key in places)
            partial.bring_ranges((f"{contract.ORBAX_ITEM}/{(at := places[key])[0]}", at[1], at[2]) for key in keys)
        return reading.read(item, table, placed)
    args = {
        path: stored_args(records[path], live) if records else ocp.RestoreArgs(restore_type=np.ndarray)
        for path, live in wanted.items()
    }
    readers = only(jax.process_index()) if alone else _everyone()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=readers)
    with ocp.Checkpointer(handler, multiprocessing_options=readers) as reader:
        tree = reader.restore(
            item,
            args=ocp.args.PyTreeRestore(
                item=nested(dict.fromkeys(wanted, 0)), restore_args=nested(args), partial_restore=True
            ),
        )
    return {path: reduce(getitem, path, tree) for path in wanted}


def _place(record: Record, live: Any) -> reading.Placement:
    """Return where a leaf's array is to be."""
    place: reading.Placement = placement(record, live)
    return place or (reading.UNCOMMITTED if record["is"] == "jax" else None)


def batches(
    paths: Mapping[tuple[str, ...], Record], nbytes: int = _BATCH_BYTES
) -> Iterator[dict[tuple[str, ...], Record]]:
    """Group arrays so that one group is a few hundred MB at most, or one array."""
    batch: dict[tuple[str, ...], Record] = {}
    size = 0
    for path, record in paths.items():
        own = size_of(record)
        if batch and size + own > nbytes:
            yield batch
            batch, size = {}, 0
        batch[path] = record
        size += own
    if batch:
        yield batch


def size_of(record: Record) -> int:
    """Return the bytes of an array by its record; a key's are not written down, and few."""
    width = 16 if record["is"] == "key" else np.dtype(record["dtype"]).itemsize
    return width * int(np.prod(record["shape"], dtype=np.int64))


_SYSTEM_TEXTS = {
    "No space left": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "Read-only file system": errno.EROFS,
    "Permission denied": errno.EACCES,
    "Stale file handle": errno.ESTALE,
    "Input/output error": errno.EIO,
    "Too many open files": errno.EMFILE,
}
_MISTAKES = (TypeError, AttributeError, NameError, ImportError, NotImplementedError)
"""What a storage never answers, and a package of another version than the one that is called does."""
TESTED = "0.12.8"
"""The orbax-checkpoint of the tests; one that is known to be too old is refused before (versions.py)."""


def failure(error: BaseException, doing: str) -> JobkitError:
    """Say why Orbax failed: what the storage answered, or what no storage answers.

    Args:
        error: What Orbax and tensorstore raised; they wrap the system's error in text of their own.
        doing: What was tried, as the start of a sentence.
    """
    if isinstance(error, JobkitError):
        return error
    if (said := system_error(error)) is not None:
        return explain(said, doing)
    first = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if any(isinstance(cause, _MISTAKES) for cause in _causes(error)):
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
        return PackageError(
            f"{doing}: {_version_of(error)} failed as no storage makes it fail ({first}): "
            f"its traceback is in the log; jobkit is tested with {TESTED}: pip install 'orbax-checkpoint=={TESTED}'"
        )
    return StorageError(f"{doing}: {first}")


def system_error(error: BaseException) -> OSError | None:
    """Return what the system said behind an error of Orbax's, None if it said nothing."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return cause
        for text, number in _SYSTEM_TEXTS.items():
            if text in str(cause):
                return OSError(number, text)
        cause = cause.__cause__ or cause.__context__
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from; not what was handled meanwhile, which may be anything."""
    while error is not None:
        yield error
        error = error.__cause__


def _version_of(error: BaseException) -> str:
    """Name Orbax, and the package that it had called where the error comes from there, with their versions."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inner = frames[-1].partition(".")[0] if frames else ""
    where = f" (in {inner} {_installed(inner)})" if inner in ("tensorstore", "jax", "jaxlib", "numpy") else ""
    return f"orbax-checkpoint {_installed('orbax-checkpoint')}{where}"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _upload_bytes(nbytes: int) -> int:
    """Choose the size of data files for a bucket: those that go up in parallel fit in memory."""
    return min(max(nbytes // 64, 8 << 20), IN_MEMORY_BYTES // PARALLEL)


def spare_bytes() -> int:
    """Return how many bytes of memory the program has never used: of a device, or where that is the host, of the host.

    Of several devices the first counts.
    """
    stats = None
    with contextlib.suppress(Exception):  # a backend need not know
        stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return max(0, int(stats["bytes_limit"]) - int(stats.get("peak_bytes_in_use", stats["bytes_limit"])))
    return Memory().spare_bytes() // int(jax.process_count()) if jax.default_backend() == "cpu" else 0

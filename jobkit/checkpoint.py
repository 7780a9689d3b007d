"""Save, commit, verify, restore, retain: Orbax writes and reads the arrays, commits.py decides what is a checkpoint.

A save has two halves. On the training thread: the state is taken apart and Orbax takes its device-to-host copies. On a
thread of its own: Orbax writes to the stage, the files are made durable, measured and renamed into place, and only then
old steps go. One save is under way at a time.
"""

import contextlib
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jobkit import commits, contract, faults, mirror, state
from jobkit.commits import Commit, Keep
from jobkit.errors import ConfigError, JobkitError, StorageError
from jobkit.ledger import Ledger, read_json
from jobkit.storage import Store, explain, free_bytes, remove_tree
from jobkit.units import show_size

# Measured at 1 GB (zstd costs 60 % of the time and a copy of the state in memory, and saves 7 % of weights).
_HANDLER_OPTIONS: dict[str, Any] = {"use_ocdbt": True, "use_zarr3": True, "use_compression": False}
_DATA_FILE_BYTES = 64 << 20
_REHEARSAL_BYTES = 256 << 20


@dataclass(frozen=True)
class Saved:
    """One committed save, as training felt it.

    Args:
        step: Completed steps.
        blocking_s: Seconds the training thread spent.
        durable_s: Seconds from the start of the save to its commit.
    """

    step: int
    blocking_s: float
    durable_s: float


class Checkpoints:
    """The checkpoints of one attempt's run directory.

    Args:
        store: The run directory.
        attempt: Number of this attempt; an attempt that is not the newest cannot commit.
        keep: What retention leaves.
        ledger: Where saves, failures and removals are written.
        busy: Tells whether retention has to wait: a notice is being served.
        before_commit: Called on the saving thread before each commit, so that what was logged up to the step is safe
            when the step is.
    """

    def __init__(
        self,
        store: Store,
        *,
        attempt: int,
        keep: Keep,
        ledger: Ledger,
        busy: Callable[[], bool] = lambda: False,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._attempt, self._keep, self._ledger = store, attempt, keep, ledger
        self._busy, self._before_commit = busy, before_commit
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None
        self._error: JobkitError | None = None
        self._rehearsed = False
        self.elsewhere: dict[int, dict[str, float]] = {}
        """Metrics of steps on the run's URL that are not in this home."""
        self.saving_step: int | None = None
        """Step of the save under way."""
        self.committed_step = -1
        """Newest step known to be committed, -1 if there is none."""
        self.last: Saved | None = None

    def save(self, snapshot: state.Snapshot, step: int, *, reason: str, metrics: Mapping[str, float]) -> None:
        """Start saving a step; waits for the one under way first.

        Durability: none on return; `wait` says when.

        Raises:
            JobkitError: If the save cannot be started. The step is not committed then.
        """
        self.wait()
        if step == self.committed_step and not metrics:
            return
        begun = time.monotonic()
        stage = commits.new_stage(self._store, step, self._attempt)
        faults.reach("before_write")
        try:
            self._start_orbax(stage, snapshot)
        except Exception as error:
            _discard(stage)
            raise _storage_error(error, f"cannot save step {step} to {self._store.url}") from error
        commit = Commit(
            step=step,
            attempt=self._attempt,
            at=time.time(),
            reason=reason,
            files={},
            metrics=dict(metrics),
            topology=_topology(),
            versions=_versions(),
        )
        blocking_s = time.monotonic() - begun
        self.saving_step = step
        self._thread = threading.Thread(
            target=self._finish, args=(stage, snapshot, commit, begun, blocking_s), name="jobkit-save"
        )
        self._thread.start()

    def _start_orbax(self, stage: Path, snapshot: state.Snapshot) -> None:
        arrays = snapshot.arrays
        if not arrays:  # Orbax refuses an empty tree
            stage.mkdir()
            return
        if self._orbax is None:
            handler = ocp.CompositeCheckpointHandler(
                **{contract.ORBAX_ITEM: ocp.PyTreeCheckpointHandler(**_HANDLER_OPTIONS)}
            )
            self._orbax = ocp.AsyncCheckpointer(handler)
        if self._store.remote is None:
            item = ocp.args.PyTreeSave(arrays, ocdbt_target_data_file_size=_DATA_FILE_BYTES)
        else:
            size = _upload_bytes(snapshot.nbytes)
            chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=size), arrays)
            item = ocp.args.PyTreeSave(arrays, chunked, ocdbt_target_data_file_size=size)
        self._orbax.save(stage, args=ocp.args.Composite(**{contract.ORBAX_ITEM: item}))

    def _finish(self, stage: Path, snapshot: state.Snapshot, commit: Commit, begun: float, blocking_s: float) -> None:
        """Write, commit, retain: the half of a save that training does not wait for."""
        try:
            faults.reach("during_write")
            if self._orbax is not None and snapshot.arrays:
                self._orbax.wait_until_finished()
            faults.reach("after_data")
            self._before_commit()
            new = commits.publish(self._store, stage, state=_state_json(snapshot), commit=commit)
        except Exception as error:
            _discard(stage)
            self._error = _storage_error(error, f"cannot commit step {commit.step} to {self._store.url}")
            self._ledger.append("save_failed", step=commit.step, reason=str(self._error))
            return
        finally:
            self.saving_step = None
        durable_s = time.monotonic() - begun
        self.committed_step = max(self.committed_step, commit.step)
        self.last = Saved(commit.step, blocking_s, durable_s)
        self._ledger.append(
            "saved" if new else "skipped",
            durable=True,
            step=commit.step,
            reason=commit.reason,
            blocking_s=round(blocking_s, 6),
            durable_s=round(durable_s, 6),
            bytes=snapshot.nbytes,
            metrics=dict(commit.metrics),
        )
        try:
            self._rehearse(commit.step)
            self._retain()
        except JobkitError as error:
            self._ledger.append("save_failed", step=commit.step, reason=str(error))
            self._error = error

    def _rehearse(self, step: int) -> None:
        """Read the attempt's first commit back the way a restore does: an untested restore is no checkpoint."""
        if self._rehearsed or self._busy():
            return
        begun = time.monotonic()
        wrong = commits.problems(self._store, step)
        table = _table(self._store, step)
        try:
            for paths in _batches(state.stored_paths(table)):
                if self._busy():
                    return
                for path, array in _read(self._store, step, dict.fromkeys(paths)).items():
                    record = paths[path]
                    if record["is"] != "key" and (list(array.shape), array.dtype.name) != (
                        record["shape"],
                        record["dtype"],
                    ):
                        wrong.append(f"{'/'.join(path)} reads as {array.dtype} {array.shape}")
        except Exception as error:
            wrong.append(str(error))
        if wrong:
            commits.set_aside(self._store, step, wrong)
            self.committed_step = max(commits.steps(self._store), default=-1)
            raise StorageError(f"step {step} of {self._store.url} was written but does not read back: {wrong[0]}")
        self._rehearsed = True
        self._ledger.append("rehearsed", step=step, seconds=round(time.monotonic() - begun, 6))

    def _retain(self) -> None:
        faults.reach("before_retention")
        known = commits.metrics(self._store)
        for step in self._keep.superfluous(known):
            if self._busy():  # the grace period belongs to the save
                return
            commits.remove(self._store, step)
            self._ledger.append("removed", step=step)

    def wait(self) -> None:
        """Wait until the save under way, if any, is committed or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def failed(self) -> bool:
        """Whether `take_error` has something to say."""
        return self._error is not None

    def take_error(self) -> JobkitError | None:
        """Return what went wrong on the saving thread since the last call."""
        error, self._error = self._error, None
        return error

    @property
    def saving(self) -> bool:
        """Whether a save is still being written or tidied up after."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Wait for the save under way and end Orbax's threads.

        Leaving without this would lose the save: Orbax needs the interpreter alive to finish.
        """
        self.wait()
        if self._orbax is not None:
            with contextlib.suppress(Exception):  # it raises a failed save's error again, which `take_error` told
                self._orbax.close()
            self._orbax = None

    def best_step(self) -> int | None:
        """Return the best committed step by the metric of `keep_best`, None if there is none yet."""
        return self._keep.best_of(self._metrics())

    def _metrics(self) -> dict[int, dict[str, float]]:
        return self.elsewhere | commits.metrics(self._store)

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Tell whether a step with these metrics would be the best."""
        known = self._metrics()
        new = max(known, default=0) + 1
        return self._keep.best_of(known | {new: dict(metrics)}) == new

    def restore_newest(self, parts: Mapping[str, state.Part]) -> int | None:
        """Restore the newest committed step that is whole; damaged ones are set aside on the way.

        Returns:
            The restored step, None if the run has no checkpoint yet.

        Raises:
            ConfigError: If the program's state differs from the checkpoint's, or every checkpoint is damaged.
            StorageError: If reading fails.
        """
        damaged = []
        # Every numbered directory: one without commit.json was committed by a rename and has lost it since.
        for step in reversed(self._store.numbers(contract.CHECKPOINTS)):
            wrong = commits.problems(self._store, step)
            if not wrong:
                restore(self._store, step, parts)
                self.committed_step = step
                return step
            moved = commits.set_aside(self._store, step, wrong)
            damaged.append(step)
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            self._ledger.append("set_aside", step=step, reason=wrong[0] + more, moved_to=str(moved), durable=True)
            _say(f"checkpoint of step {step} is damaged: {wrong[0]}{more}; set aside as {moved}")
        remote = self._store.remote
        if damaged or self._store.names(contract.SET_ASIDE) or (remote is not None and remote.find(contract.SET_ASIDE)):
            raise ConfigError(
                f"every checkpoint of {self._store.url} is damaged and lies in {contract.SET_ASIDE}: "
                "mend the storage, or start again in a new run directory"
            )
        return None

    def check_space(self, nbytes: int) -> None:
        """Refuse a run directory that cannot hold one more checkpoint, before anything is computed.

        Raises:
            ConfigError: With what is needed and what is free.
        """
        try:
            free = free_bytes(self._store.path)
        except OSError as error:
            raise explain(error, f"cannot look at {self._store.url}") from None
        needed = int(nbytes * 1.05) + (1 << 20)  # Orbax's metadata comes on top
        if free < needed:
            raise ConfigError(
                f"{self._store.url} has {show_size(free)} free and one checkpoint takes {show_size(needed)}: "
                "free space there, or choose another run directory"
            )


def restore(store: Store, step: int, parts: Mapping[str, state.Part], *, partial: bool = False) -> None:
    """Put a committed, verified step into a program's parts.

    Args:
        store: The run directory.
        step: A step for which `commits.problems` is empty.
        parts: The program's parts. None is changed unless every value could be read; an object whose own loading
            fails leaves those before it changed.
        partial: Take only those of the checkpoint's parts that are given.

    Raises:
        ConfigError: If shapes, dtypes or structure differ; names the leaf.
        StorageError: If Orbax cannot read it although its bytes are as committed.
    """
    table = _table(store, step)
    if partial:
        absent = sorted(parts.keys() - table.keys())
        if absent:
            has = ", ".join(sorted(table))
            raise ConfigError(f"step {step} of {store.url} has no part {absent[0]!r}; it has {has}")
        table = {name: table[name] for name in parts}
    state.check(
        state.take(parts).table,
        table,
        where=f"from the checkpoint of step {step}",
    )
    live: dict[tuple[str, ...], Any] = {}
    for name, part in parts.items():
        if part.kind != "object":
            live |= {state.quoted(name, slot.path): slot.value for slot in part.slots()[0]}
    wanted = {path: live.get(path) for path in state.stored_paths(table)}
    try:
        arrays = _read(store, step, wanted, records=state.stored_paths(table))
    except Exception as error:
        raise _storage_error(error, f"cannot read step {step} of {store.url}") from error
    faults.reach("during_restore")
    state.give_back(parts, table, arrays)


def load(url: str | os.PathLike[str], /, *, step: int | str = "latest", **parts: Any) -> Any:
    """Restore parts of a run without taking part in it: for evaluation, inference, a notebook.

    Args:
        url: The run directory.
        step: A committed step, 'latest', or 'best' (by the metric given to the run's `keep_best`).
        parts: As for `Run.resume`, any subset; NNX objects and iterators are changed in place.

    Returns:
        A namespace holding the value parts by name.

    Raises:
        ConfigError: If there is no such step or part, or shapes differ.
        StorageError: If the step is damaged.
    """
    store = Store(url)
    fetch(store, step)
    number = find_step(store, step)
    made = {name: state.part_of(name, value) for name, value in parts.items()}
    restore(store, number, made, partial=True)
    from types import SimpleNamespace

    return SimpleNamespace(**{name: part.value for name, part in made.items() if isinstance(part, state.ValuePart)})


def fetch(store: Store, step: int | str) -> None:
    """Bring a step of a run on an object store into its home, unless it is there."""
    if store.remote is None:
        return
    mirror.refresh(store)
    known = {number: mirror.read_remote(store.remote, number).metrics for number in mirror.remote_steps(store.remote)}
    wanted = mirror.keep_of(store).best_of(known) if step == "best" else max(known, default=None)
    number = step if isinstance(step, int) else wanted
    if number is not None and number in known and number not in commits.steps(store):
        bring(store, number, attempt=0)


def bring(store: Store, step: int, *, attempt: int) -> None:
    """Bring a step that is committed on the URL, and not in the home, into the home.

    Raises:
        StorageError: If it is damaged.
    """
    wrong = mirror.fetch_step(store, step, attempt=attempt)
    if wrong:
        raise StorageError(f"step {step} of {store.url} is damaged: {wrong[0]}; choose another step")


def find_step(store: Store, step: int | str) -> int:
    """Return a committed and whole step: a number, 'latest' or 'best'.

    Raises:
        ConfigError: If there is none.
        StorageError: If it is damaged.
    """
    known = commits.steps(store)
    if not known:
        raise ConfigError(f"{store.url} has no committed checkpoint")
    number: int | None
    if step == "latest":
        number = known[-1]
    elif step == "best":
        strategy = (read_json(store, contract.STRATEGY) or {}).get("keep_best")
        if not strategy:
            raise ConfigError(f"{store.url} has no best step: its Run was given no keep_best=('metric', 'min')")
        keep = Keep(best=(strategy[0], strategy[1]))
        number = keep.best_of(commits.metrics(store))
        if number is None:
            raise ConfigError(f"no committed step of {store.url} has the metric {strategy[0]!r} yet")
    elif isinstance(step, int) and not isinstance(step, bool):
        number = step
    else:
        raise ConfigError(f"step {step!r} is neither a number nor 'latest' nor 'best'")
    if number not in known:
        raise ConfigError(f"step {number} of {store.url} is not committed; committed are {', '.join(map(str, known))}")
    wrong = commits.problems(store, number)
    if wrong:
        raise StorageError(f"step {number} of {store.url} is damaged: {wrong[0]}; choose another step")
    return number


def export_params(
    url: str | os.PathLike[str], out: str | os.PathLike[str], /, *, step: int | str = "latest"
) -> list[str]:
    """Write the parameters of a run alone, without optimizer, RNG and data position, for deployment.

    Parameters are the NNX variables that are neither optimizer, RNG nor metric state, and in value parts all below a
    key `params` or `batch_stats` (a Linen TrainState). Works without the training code.

    Args:
        url: The run directory.
        out: A directory that must not exist; a plain `ocp.StandardCheckpointer().restore(out)` reads it.
        step: A committed step, 'latest' or 'best'.

    Returns:
        The names of the exported leaves.

    Raises:
        ConfigError: If there is no such step, no parameter in it, or `out` exists.
    """
    store = Store(url)
    target = Path(out).expanduser().absolute()
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists: export never overwrites; choose another directory")
    parent = next(path for path in target.parents if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".jobkit-export-", dir=parent):
            pass
    except OSError:
        told = f"cannot export to {target}: {parent} is not a directory that can be written; choose another"
        raise ConfigError(told) from None
    fetch(store, step)
    number = find_step(store, step)
    stored = state.stored_paths(_table(store, number))
    wanted = {path: None for path, record in stored.items() if _is_param(path, record)}
    if not wanted:
        raise ConfigError(f"step {number} of {store.url} holds no parameters")
    arrays = _read(store, number, wanted)
    try:
        # Not the asynchronous one: when that fails, its threads keep the process from ever ending.
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(target, args=ocp.args.StandardSave(_nested(arrays)))
    except Exception as error:
        raise _storage_error(error, f"cannot write {target}") from error
    return ["/".join(path) for path in wanted]


def _is_param(path: tuple[str, ...], record: state.Record) -> bool:
    role = record.get("role")
    if role is None:
        return record["is"] != "key" and bool({"params", "batch_stats"} & set(path)) and "opt_state" not in path
    return not role.startswith(("Opt", "Rng", "MetricState"))


# Reading through Orbax.


def _table(store: Store, step: int) -> dict[str, Any]:
    """Return the leaf table of a step whose bytes were checked."""
    content = read_json(store, f"{contract.step_dir(step)}/{contract.STATE}")
    if content is None:
        raise StorageError(f"step {step} of {store.url} has no {contract.STATE}")
    table: dict[str, Any] = content["parts"]
    return table


def _state_json(snapshot: state.Snapshot) -> dict[str, Any]:
    return {"version": contract.RUN_VERSION, "parts": snapshot.table}


def _read(
    store: Store, step: int, wanted: Mapping[tuple[str, ...], Any], *, records: Mapping[Any, state.Record] | None = None
) -> dict[tuple[str, ...], Any]:
    """Read arrays by quoted path; with records they are placed like the live leaves given, else numpy."""
    if not wanted:
        return {}
    args = {
        path: state.stored_args(records[path], live) if records else ocp.RestoreArgs(restore_type=np.ndarray)
        for path, live in wanted.items()
    }
    item = _nested(dict.fromkeys(wanted, 0))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(
            store.file(contract.step_dir(step)) / contract.ORBAX_ITEM,
            args=ocp.args.PyTreeRestore(item=item, restore_args=_nested(args), partial_restore=True),
        )
    return {path: _at(tree, path) for path in wanted}


def _nested(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
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


def _batches(paths: Mapping[tuple[str, ...], state.Record]) -> Iterator[dict[tuple[str, ...], state.Record]]:
    """Group arrays so that one group is a few hundred MB at most."""
    batch: dict[tuple[str, ...], state.Record] = {}
    size = 0
    for path, record in paths.items():
        width = 16 if record["is"] == "key" else np.dtype(record["dtype"]).itemsize
        nbytes = width * int(np.prod(record["shape"], dtype=np.int64))
        if batch and size + nbytes > _REHEARSAL_BYTES:
            yield batch
            batch, size = {}, 0
        batch[path] = record
        size += nbytes
    if batch:
        yield batch


def _discard(stage: Path) -> None:
    """Remove a stage that will not be committed, with the temporary directory Orbax keeps beside it."""
    with contextlib.suppress(OSError):
        for path in stage.parent.glob(stage.name + "*"):
            remove_tree(path)


_SYSTEM_TEXTS = {"No space left": 28, "Disk quota exceeded": 122, "Read-only file system": 30, "Permission denied": 13}


def _storage_error(error: BaseException, doing: str) -> JobkitError:
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


def _topology() -> dict[str, int | str]:
    return {
        "process_count": jax.process_count(),
        "device_count": jax.device_count(),
        "platform": jax.default_backend(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("jobkit", "jax", "flax", "optax", "orbax-checkpoint", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _say(message: str) -> None:
    """Tell the person reading the log."""
    import sys

    print(f"jobkit: {message}", file=sys.stderr, flush=True)

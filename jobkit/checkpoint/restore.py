"""Read checkpoints back: into the program that goes on, into any other, or the parameters alone for deployment."""

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jobkit import contract, faults
from jobkit.checkpoint import orbax_io, state
from jobkit.checkpoint.kinds import Part
from jobkit.checkpoint.layout.handler import nested
from jobkit.checkpoint.leaves import Record, quoted
from jobkit.errors import ConfigError, DamagedError, PackageError, StorageError, end_in_words
from jobkit.rundir import commits, mirror, remote_steps, retention
from jobkit.rundir.apart.fetching import Partial, wait_for
from jobkit.rundir.store import Store


def restore(store: Store, step: int, parts: Mapping[str, Part], *, partial: bool = False) -> None:
    """Put a committed step into a program's parts; as `read`.

    Args:
        store: The run directory.
        step: A step for which `commits.problems` finds nothing, be it without its values.
        parts: The program's parts. None is changed unless every value could be read; an object whose own loading
            fails leaves those before it changed.
        partial: Take only those of the checkpoint's parts that are given.
    """
    read(store, step, parts, partial=partial)()


def read(
    store: Store, step: int, parts: Mapping[str, Part], *, partial: bool = False, needed: Partial | None = None
) -> Callable[[], None]:
    """Read a committed step, and return what puts its values into the parts.

    Args:
        store: The run directory.
        step: As for `restore`.
        parts: The program's parts, which stay as they are.
        partial: Take only those of the checkpoint's parts that are given.
        needed: Brings what is read into its own `store`, which is read then.

    Raises:
        ConfigError: If shapes, dtypes or structure differ; names the leaf.
        DamagedError: If a chunk is not what was committed.
        StorageError: If it cannot be read although its bytes are as committed.
    """
    table = _own(store, step, parts if partial else None)
    state.check(parts, table, where=f"from the checkpoint of step {step}")
    live: dict[tuple[str, ...], Any] = {}
    for name, part in parts.items():
        if part.kind != "object":
            live |= {quoted(name, slot.path): slot.value for slot in part.slots()[0]}
    arrays, stored = state.local_arrays(table), state.stored_paths(table)
    try:
        wanted = {path: live.get(path) for path in stored}
        arrays |= orbax_io.read(store, step, wanted, records=stored, partial=needed)
    except Exception as error:
        if isinstance(error, DamagedError):
            raise
        raise orbax_io.failure(error, f"cannot read step {step} of {store.url}") from error
    faults.reach("during_restore")
    return lambda: state.give_back(parts, table, arrays)


def read_back(store: Store, step: int, *, stop: Callable[[], bool]) -> list[str] | None:
    """Read a committed step the way a restore does, in this process alone; of processes that share no disk, its part.

    Args:
        store: The run directory.
        step: A committed step.
        stop: Tells whether to give up.

    Returns:
        What is wrong with it, one sentence each; None if it was given up.

    Raises:
        JobkitError: If it could not be read, although its bytes are as they were written.
    """
    try:
        part = bool(commits.read(store, step).parts)  # then no home has all of it
    except DamagedError as error:
        return [str(error)]
    wrong = commits.problems(store, step, stop=stop, part=part)
    if stop():
        return None
    if wrong or part:
        return wrong
    stored = state.stored_paths(state.table_of(store, step))
    try:
        for batch in orbax_io.batches(stored):
            if stop():
                return None
            for path, array in orbax_io.read(store, step, dict.fromkeys(batch), alone=True).items():
                kept, now = (batch[path]["shape"], batch[path].get("dtype")), (list(array.shape), array.dtype.name)
                if batch[path]["is"] != "key" and now != kept:
                    wrong.append(f"{'/'.join(path)} reads as {array.dtype} {array.shape}")
    except DamagedError as error:
        wrong.append(str(error))
    except Exception as error:
        said = orbax_io.failure(error, f"cannot read step {step} of {store.url} back")
        if isinstance(said, PackageError) or orbax_io.system_error(error) is not None:
            raise said from error
        wrong.append(str(error))
    return wrong


def _own(store: Store, step: int, parts: Iterable[str] | None) -> dict[str, Any]:
    """Return the leaf table that is this process's.

    Args:
        store: The run directory.
        step: A committed step.
        parts: Only these parts; None for all.

    Raises:
        ConfigError: If a part is not there, or was not the same in each of another number of processes.
    """
    saved = commits.read(store, step).processes
    index, count = jax.process_index(), jax.process_count()
    tables = (state.table_of(store, step, process) for process in ([index] if saved == count else range(saved)))
    table = next(tables)
    if parts is not None:
        if absent := sorted(set(parts) - table.keys()):
            has = ", ".join(sorted(table))
            raise ConfigError(f"step {step} of {store.url} has no part {absent[0]!r}; it has {has}")
        table = {name: table[name] for name in parts}
    for other in tables:
        for name in table:
            if table[name] != other.get(name):
                raise ConfigError(
                    f"part {name!r} of step {step} of {store.url} was another one in each of the {saved} processes "
                    f"that saved it, and this attempt has {count}: resume with {saved} processes, or give resume() "
                    "a part whose state does not depend on the process (a data iterator over global batches)"
                )
    return table


def fetch(store: Store, step: int | str) -> None:
    """Bring a step of a run on an object store into its home, unless it is there."""
    if store.remote is None:
        return
    mirror.set_other_aside(store)
    mirror.refresh(store)
    scores = store.remote.find(contract.SCORES)
    known = {at: remote_steps.metrics_of(store.remote, at, scores) for at in remote_steps.steps(store.remote)}
    wanted = retention.keep_of(store).best_of(known) if step == "best" else max(known, default=None)
    number = step if isinstance(step, int) else wanted
    if number is not None and number in known and number not in commits.steps(store):
        bring(store, number, attempt=0)
    elif number is not None and number in known:
        remote_steps.complete(store, number)


def bring(store: Store, step: int, *, attempt: int) -> None:
    """Bring a step that is committed on the URL, and not in the home, into the home.

    Raises:
        StorageError: If it is damaged.
    """
    wrong = remote_steps.fetch(store, step, attempt=attempt)
    if wrong:
        raise StorageError(f"step {step} of {store.url} is damaged: {wrong[0]}; choose another step")


def find_step(store: Store, step: int | str, *, apart: bool = False) -> int:
    """Return a committed and whole step: a number, 'latest' or 'best'.

    Args:
        store: The run directory.
        step: What is meant.
        apart: Whether processes that share no disk will read it: then it is one of the URL, once it is there.

    Raises:
        ConfigError: If there is none.
        StorageError: If it is damaged.
    """
    there = remote_steps.metrics(store.bucket) if apart else {}
    known = sorted({*commits.steps(store), *there})
    if not known:
        if store.remote is None and not store.path.is_dir():
            raise ConfigError(f"{store.url} does not exist; give the directory of a run ('jobkit ls' lists those here)")
        raise ConfigError(f"{store.url} has no committed checkpoint: it is no run, or has not saved yet")
    number: int | None
    if step == "latest":
        number = known[-1]
    elif step == "best":
        keep = retention.keep_of(store)
        if keep.best is None:
            raise ConfigError(f"{store.url} has no best step: its Run was given no keep_best=('metric', 'min')")
        number = keep.best_of(there | commits.metrics(store))
        if number is None:
            raise ConfigError(f"no committed step of {store.url} has the metric {keep.best[0]!r} yet")
    elif isinstance(step, int) and not isinstance(step, bool):
        number = step
    else:
        meant = int(step) if isinstance(step, str) and step.isdecimal() else known[-1]
        raise ConfigError(f"step {step!r} is neither a whole number nor 'latest' nor 'best'; write step={meant}")
    if number not in known:
        raise ConfigError(f"step {number} of {store.url} is not committed; committed are {', '.join(map(str, known))}")
    if apart:
        wait_for(store, number)
        return number
    wrong = commits.problems(store, number, values=False)  # those are checked as they are read
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
        The names of the exported leaves, as `params/dense/kernel`; each has its dtype and its whole shape.

    Raises:
        ConfigError: If there is no such step, no parameter in it, or `out` exists or cannot be written.
        StorageError: If the step is damaged, or the storage does not answer.
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
        message = f"cannot export to {target}: {parent} is not a directory that can be written; choose another"
        raise ConfigError(message) from None
    fetch(store, step)
    number = find_step(store, step)
    stored = state.stored_paths(state.table_of(store, number))
    wanted = {path: None for path, record in stored.items() if _is_param(path, record)}
    if not wanted:
        raise ConfigError(f"step {number} of {store.url} holds no parameters")
    params = orbax_io.read(store, number, wanted)
    try:
        # Not the asynchronous one: when that fails, its threads keep the process from ever ending.
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(target, args=ocp.args.StandardSave(nested(params)))
    except Exception as error:
        raise orbax_io.failure(error, f"cannot write {target}") from error
    return ["/".join(path) for path in wanted]


def _is_param(path: tuple[str, ...], record: Record) -> bool:
    role = record.get("role")
    if role is None:
        return record["is"] != "key" and bool({"params", "batch_stats"} & set(path)) and "opt_state" not in path
    return not role.startswith(("Opt", "Rng", "MetricState"))


end_in_words()  # a script that loads a run has no `Run`, which sees to that

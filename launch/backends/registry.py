"""The table of backends, by name; of a run, its backend, and what can be done to it."""

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from jobkit import contract, names
from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store, is_remote
from launch.backends import by_hand, new_code
from launch.backends.cloud.aws import Aws
from launch.backends.cloud.gcp import Gcp
from launch.backends.local import Local
from launch.backends.slurm.backend import Slurm
from launch.lifecycle import run_status, submission, verbs
from launch.lifecycle.run_status import Job, Status
from launch.lifecycle.verbs import Backend, Progress
from launch.spec import jobspec as specs

_BY_NAME: dict[str, Backend] = {each.name: each for each in (Local(), Slurm(), Gcp(), Aws())}
NAMES = tuple(_BY_NAME)
_PATIENCE_S = 20.0
_DEPTH = 3
"""How far below a directory or URL a run is looked for."""


def named(name: str) -> Backend:
    """Return a backend by name.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in _BY_NAME:
        raise ConfigError(f"--on {name!r} is not a backend; available: {', '.join(NAMES)}")
    return _BY_NAME[name]


OPTIONS = frozenset[str]().union(*(each.options for each in _BY_NAME.values()))
"""Options that not every backend has to know."""


def knowing(option: str) -> list[str]:
    """Name the backends that know an option; see `Backend.options`."""
    return [name for name, backend in _BY_NAME.items() if option in backend.options]


def of(store: Store) -> Backend:
    """Return the backend of a run.

    Raises:
        JobkitError: If it is not a run, or its run.json is damaged.
    """
    return named(specs.read_file(store).backend)


def status(store: Store) -> Status:
    """Read what a run is doing; see `verbs.status`."""
    if specs.begun_by_hand(store):
        return by_hand.status(store)
    return verbs.status(of(store), store)


def resume(run: str | os.PathLike[str], *, clear_cancel: bool = True, take_over: bool = False) -> State:
    """Continue a run; see `verbs.resume`."""
    store = submission.open_run(run)
    change = new_code.write_down
    return verbs.resume(of(store), store, clear_cancel=clear_cancel, take_over=take_over, change=change)


def cancel(
    run: str | os.PathLike[str],
    *,
    wait: bool = True,
    word: str = "cancelled",
    progress: Progress = lambda text: None,
) -> State:
    """End a run for good; see `verbs.cancel`."""
    store = submission.open_run(run)
    return verbs.cancel(of(store), store, wait=wait, word=word, progress=progress)


def listed(stores: Sequence[Store], report: Callable[[str], None]) -> list[Status]:
    """Read the status of any number of runs, leaving out, and reporting, those that cannot be read."""
    readable: dict[Store, Backend | None] = {}
    for store in stores:
        try:
            readable[store] = None if specs.begun_by_hand(store) else of(store)
            run_status.events(store)
        except JobkitError as error:
            readable.pop(store, None)
            report(str(error))
    jobs, statuses = {}, []
    for each in {backend for backend in readable.values() if backend is not None}:  # each scheduler is asked once
        jobs[each] = _jobs(each, [store for store in readable if readable[store] is each])
    for store, backend in readable.items():
        try:
            statuses.append(by_hand.status(store) if backend is None else verbs.status(backend, store, jobs[backend]))
        except JobkitError as error:
            report(str(error))
    return statuses


def _jobs(backend: Backend, stores: Sequence[Store]) -> Mapping[str, Job]:
    """Ask once for all; where one of them cannot be read, for each, so that it hides no other."""
    try:
        return verbs.jobs_of(backend, stores)
    except JobkitError:
        each: dict[str, Job] = {}
        for store in stores:
            with contextlib.suppress(JobkitError):  # its status says why
                each |= verbs.jobs_of(backend, [store])
        return each


def runs_below(directory: str) -> tuple[str, list[str]]:
    """Find the runs below a directory or a bucket's URL; return how the place is called, and the runs.

    Raises:
        ConfigError: If it is not a directory.
    """
    if is_remote(directory):
        top = directory.rstrip("/")
        return top, [f"{top}/{name}".rstrip("/") for name in _runs_among(Remote(top, deadline_s=_PATIENCE_S).find())]
    path = submission.open_run(directory).path
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory; name one that holds runs: jobkit ls DIRECTORY")
    return str(path), [str(run) for run in find_runs(path)]


def find_runs(directory: Path, *, depth: int = _DEPTH) -> list[Path]:
    """Return the run directories below a directory, oldest first: submitted ones and those begun by hand."""
    return [path for _, path in sorted(_search(directory, depth))]


def _search(directory: Path, depth: int) -> Iterator[tuple[float, Path]]:
    for name in (contract.RUN_JSON, contract.STRATEGY):
        with contextlib.suppress(OSError):
            yield (directory / name).stat().st_mtime, directory
            return
    below: list[str] = []
    with contextlib.suppress(OSError):
        entries = os.scandir(directory) if depth else ()
        below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    for name in filter(names.is_text, below):
        yield from _search(directory / name, depth - 1)


def _runs_among(files: Collection[str]) -> list[str]:
    """Return which names hold a run, of the files below a URL; '' for the URL itself. What lies in a run is none."""
    marks = (f"/{name}".rpartition("/") for name in files if name.count("/") <= _DEPTH)
    tops: list[str] = []
    for top in sorted({f"{place}/" for place, _, name in marks if name in (contract.RUN_JSON, contract.STRATEGY)}):
        if not any(map(top.startswith, tops)):
            tops.append(top)
    return [top.strip("/") for top in tops]

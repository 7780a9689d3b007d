"""Which backend a run was submitted to, and its verbs: the one place that knows them all."""

import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError
from jobkit.storage import Store
from launch import local, local_sweep, report, scontrol, slurm, submission
from launch import spec as specs
from launch.report import Status

_BY_NAME: dict[str, ModuleType] = {local.BACKEND: local, slurm.BACKEND: slurm}
NAMES = tuple(_BY_NAME)


def named(name: str) -> ModuleType:
    """Return a backend by name.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in _BY_NAME:
        raise ConfigError(f"--on {name!r} is not a backend; available: {', '.join(NAMES)}")
    return _BY_NAME[name]


def of(store: Store) -> ModuleType:
    """Return the backend of a run.

    Raises:
        JobkitError: If it is not a run, or its run.json is damaged.
    """
    return named(specs.read_backend(store)[0])


def _verbs(store: Store) -> ModuleType:
    """Return the module that resumes and cancels a run or a sweep."""
    backend = of(store)
    return local_sweep if backend is local and specs.read(store).sweep else backend


def status(store: Store) -> Status:
    """Read what a run is doing."""
    return _told(store, _jobs([store]))


def _told(store: Store, jobs: Mapping[str, scontrol.Job]) -> Status:
    spec = specs.read(store)
    told = [report.status(one, job=jobs.get(one.url)) for one in specs.points(store, spec)]
    return report.of_sweep(store, told) if spec.sweep else told[0]


def _jobs(stores: Sequence[Store]) -> dict[str, scontrol.Job]:
    """Ask each scheduler once."""
    mine = [store for store in stores if of(store) is slurm]
    return slurm.jobs_of([one for store in mine for one in specs.points(store, specs.read(store))])


def resume(run: str | os.PathLike[str], *, clear_cancel: bool = True) -> State:
    """Continue a run; see the backend's own `resume`."""
    state: State = _verbs(submission.open_run(run)).resume(run, clear_cancel=clear_cancel)
    return state


def cancel(
    run: str | os.PathLike[str],
    *,
    wait: bool = True,
    word: str = "cancelled",
    progress: Callable[[str], None] = lambda text: None,
) -> State:
    """End a run for good; see the backend's own `cancel`."""
    state: State = _verbs(submission.open_run(run)).cancel(run, wait=wait, word=word, progress=progress)
    return state


def listed(stores: Sequence[Store], tell: Callable[[str], None]) -> list[Status]:
    """Read the status of any number of runs, leaving out, and telling of, those that cannot be read."""
    readable, found = [], []
    for store in stores:
        try:
            of(store)
            readable.append(store)
        except JobkitError as error:
            tell(str(error))
    jobs = _jobs(readable)
    for store in readable:
        try:
            found.append(_told(store, jobs))
        except JobkitError as error:
            tell(str(error))
    return found

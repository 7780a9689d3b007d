"""Which backend a run was submitted to, found by name in the one table there is, and its verbs.

What differs between backends beyond the verbs is known elsewhere too; docs/architecture.md says where.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from jobkit import contract
from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store, is_remote
from launch.backends import local, local_sweep
from launch.backends.cloud import aws, gcp
from launch.backends.cloud.managed import Managed
from launch.backends.slurm import backend as slurm
from launch.lifecycle import run_status, submission
from launch.lifecycle.run_status import Job, Status
from launch.spec import jobspec as specs
from launch.spec.jobspec import JobSpec


class Verbs(Protocol):
    """What can be done to a run, or to a sweep."""

    def resume(self, url: str | os.PathLike[str], *, clear_cancel: bool = True) -> State:
        """Continue a run that is not done and not alive."""

    def cancel(
        self,
        url: str | os.PathLike[str],
        *,
        wait: bool = True,
        word: str = "cancelled",
        progress: Callable[[str], None] = lambda text: None,
    ) -> State:
        """End a run for good."""


class Backend(Verbs, Protocol):
    """What every backend can do."""

    def submit(self, spec: JobSpec) -> Store:
        """Start a run."""

    def refuse_alive(self, store: Store) -> None:
        """Raise ConfigError if a run may be alive."""


_BY_NAME: dict[str, Backend] = {
    local.BACKEND: local,
    slurm.BACKEND: slurm,
    gcp.BACKEND: gcp.BATCH,
    aws.BACKEND: aws.BATCH,
}
NAMES = tuple(_BY_NAME)


def named(name: str) -> Backend:
    """Return a backend by name.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in _BY_NAME:
        raise ConfigError(f"--on {name!r} is not a backend; available: {', '.join(NAMES)}")
    return _BY_NAME[name]


def of(store: Store) -> Backend:
    """Return the backend of a run.

    Raises:
        JobkitError: If it is not a run, or its run.json is damaged.
    """
    return named(specs.read_backend(store)[0])


def _verbs(store: Store) -> Verbs:
    """Return what resumes and cancels a run or a sweep."""
    backend = of(store)
    return local_sweep if backend is local and specs.read(store).sweep else backend


def status(store: Store) -> Status:
    """Read what a run is doing."""
    return _told(store, _jobs([store]))


def _told(store: Store, jobs: Mapping[str, Job]) -> Status:
    spec = specs.read(store)
    told = [run_status.status(one, job=jobs.get(one.url)) for one in specs.points(store, spec)]
    return run_status.of_sweep(store, told) if spec.sweep else told[0]


def _jobs(stores: Sequence[Store]) -> dict[str, Job]:
    """Ask each scheduler."""
    found: dict[str, Job] = {}
    for backend in {id(backend): backend for backend in map(of, stores)}.values():
        mine = [store for store in stores if of(store) is backend]
        if backend is slurm:
            found |= slurm.jobs_of([one for store in mine for one in specs.points(store, specs.read(store))])
        elif isinstance(backend, Managed):
            found |= backend.jobs_of(mine)
    return found


def resume(run: str | os.PathLike[str], *, clear_cancel: bool = True, take_over: bool = False) -> State:
    """Continue a run; see the backend's own `resume`.

    Raises:
        ConfigError: If it is to be taken over from a scheduler, which knows itself whether its job lives.
    """
    store = submission.open_run(run)
    if not take_over:
        return _verbs(store).resume(run, clear_cancel=clear_cancel)
    if of(store) is not local:
        name = specs.read_backend(store)[0]
        raise ConfigError(f"only a local runner is taken over; of {store.url} {name} tells whether it lives: resume it")
    if specs.read(store).sweep:
        return local_sweep.resume(run, clear_cancel=clear_cancel, take_over=True)
    return local.resume(run, clear_cancel=clear_cancel, take_over=True)


def cancel(
    run: str | os.PathLike[str],
    *,
    wait: bool = True,
    word: str = "cancelled",
    progress: Callable[[str], None] = lambda text: None,
) -> State:
    """End a run for good; see the backend's own `cancel`."""
    return _verbs(submission.open_run(run)).cancel(run, wait=wait, word=word, progress=progress)


def listed(stores: Sequence[Store], tell: Callable[[str], None]) -> list[Status]:
    """Read the status of any number of runs, leaving out, and telling of, those that cannot be read."""
    readable, found = [], []
    for store in stores:
        try:
            of(store)
            run_status.events(store)
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


def runs_below(directory: str) -> tuple[str, list[str]]:
    """Find the runs below a directory or a bucket's URL; return how the place is called, and the runs.

    Raises:
        ConfigError: If it is not a directory.
    """
    if is_remote(directory):
        top = directory.rstrip("/")
        found = Remote(top, deadline_s=_PATIENCE_S).find()
        names = [name.removesuffix(contract.RUN_JSON).rstrip("/") for name in found if _is_run_file(name)]
        return top, [f"{top}/{name}".rstrip("/") for name in sorted(names)]
    path = submission.open_run(directory).path
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory; name one that holds runs: jobkit ls DIRECTORY")
    return str(path), [str(run) for run in run_status.find_runs(path)]


def _is_run_file(name: str) -> bool:
    return name == contract.RUN_JSON or (name.endswith(f"/{contract.RUN_JSON}") and name.count("/") <= 3)


_PATIENCE_S = 20.0


def runs_of_gcp(project: str, region: str) -> tuple[str, list[str]]:
    """Find the runs that have jobs in a project and region; return how the place is called, and the runs."""
    return f"{region} of project {project or 'that is signed in to'}", gcp.BATCH.runs(project, region)

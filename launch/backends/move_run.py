"""A run goes on somewhere else, under its one run directory: `jobkit resume RUN --on BACKEND`.

The job that it had there must be over. run.json then names the new backend and its options; the move is in the ledger.
Everything else is a resume like any other: attempts go on counting, and what an old attempt still tries to commit, on a
machine that nobody can see, is refused by its successor's claim.
"""

import os

import msgspec

from jobkit.contract import State
from jobkit.errors import ConfigError
from jobkit.rundir.store import Store
from launch.backends import local, registry
from launch.backends.cloud.managed import Managed
from launch.backends.slurm import backend as slurm
from launch.lifecycle import lease, submission
from launch.spec import container
from launch.spec import jobspec as specs
from launch.spec.jobspec import JobSpec
from launch.spec.placement import Where


def resume(url: str | os.PathLike[str], place: Where, *, take_over: bool = False) -> State:
    """Continue a run on a backend, or with other options on the one it had.

    Args:
        url: The run.
        place: Where it is to go on.
        take_over: Whether to take it from the local runner of another machine that gives signs of life.

    Durability: on return run.json is on storage, on the run's URL too, and the new backend has the run.

    Raises:
        ConfigError: If the run is alive, or the new backend cannot run it; it is as it was then.
    """
    store = submission.open_run(url)
    spec, (old, created) = specs.read(store), specs.read_backend(store)
    cancels = {one: submission.cancel_content(one) for one in (store, *specs.points(store, spec))}
    if registry.status(store).state is State.DONE:
        return State.DONE
    if place.backend != old and (spec.sweep or spec.sweep_url):
        raise ConfigError(f"{store.url} belongs to a sweep, which goes on where it was submitted: --on {old}")
    if take_over and old == local.BACKEND:
        local.refuse_alive(store, take_over=True)
    else:
        registry.named(old).refuse_alive(store)
    new = _checked(store, _merged(spec, place, same=place.backend == old), place.backend)
    if old == local.BACKEND != place.backend:  # a runner that lives all the same stops
        lease.release(store, lease.claim(store, take_over=take_over))
    if place.backend != old:
        submission.record(store, "moved", source=old, target=place.backend, by=submission.who())
    specs.rewrite(store, new, place.backend, created)
    for one in filter(specs.exists, cancels):
        submission.take_back_cancel(one, cancels[one])
    return registry.resume(store.url, clear_cancel=False, take_over=take_over and place.backend == local.BACKEND)


def _merged(spec: JobSpec, place: Where, *, same: bool) -> JobSpec:
    """Return what is asked for: on the backend that the run had, what is not said stays."""
    price = spec.price_per_hour if place.price_per_hour is None else place.price_per_hour
    sbatch = (spec.sbatch if same else {}) | place.sbatch
    tasks = spec.sbatch.get("ntasks-per-node")
    if tasks is not None:
        sbatch = {"ntasks-per-node": tasks} | sbatch
    cloud = place.cloud
    if same and cloud is not None and spec.cloud is not None:
        cloud = msgspec.structs.replace(spec.cloud, **{name: getattr(cloud, name) for name in place.given})
    container = place.container or (spec.container if same else None)
    return msgspec.structs.replace(spec, sbatch=sbatch, cloud=cloud, container=container, price_per_hour=price)


def _checked(store: Store, spec: JobSpec, name: str) -> JobSpec:
    """Refuse what the new backend cannot do; return the specification with what it leaves open filled in."""
    specs.check(spec)
    backend = registry.named(name)
    if isinstance(backend, Managed):
        return backend.completed(store, spec)
    if name == slurm.BACKEND:
        slurm.check(spec.sbatch, grace_s=spec.grace_s)
    if spec.container is not None:
        container.refuse_foreign(spec.container, name)
        if name == local.BACKEND:
            container.check_docker()
            container.check_image(spec.container)
        else:
            spec = msgspec.structs.replace(spec, container=container.in_full(spec.container, os.getcwd()))
    if name in (slurm.BACKEND, local.BACKEND) and spec.code is None and not os.path.isdir(spec.root):
        raise ConfigError(f"{spec.root} does not exist here, and run {store.url} has no snapshot of its code")
    return spec

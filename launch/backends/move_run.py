"""A run goes on somewhere else, under its one run directory: `jobkit resume RUN --on BACKEND`.

The job that it had there must be over. run.json then names the new backend and its options; the move is in the ledger.
Everything else is a resume like any other: attempts go on counting, and what an old attempt still tries to commit, on a
machine that nobody can see, is refused by its successor's claim.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence

import msgspec

from jobkit.contract import State
from jobkit.errors import ConfigError
from jobkit.rundir.store import Store
from launch.backends import new_code, registry
from launch.lifecycle import submission, verbs
from launch.spec import jobspec as specs
from launch.spec.cloud_options import Cloud
from launch.spec.command import with_setup
from launch.spec.jobspec import JobSpec
from launch.spec.profiles import Placement


def resume(
    url: str | os.PathLike[str],
    place: Placement | None = None,
    *,
    command: Sequence[str] | None = None,
    setup: Sequence[str] | None = None,
    take_over: bool = False,
) -> State:
    """Continue a run on a backend, or with other options on the one it had, or with other code.

    Args:
        url: The run.
        place: Where it is to go on; None for where it was.
        command: Given, it goes on with the code as it is now and with this command, empty for the one that it has, and
            does so too if it is done.
        setup: Lines of `--setup` from now on, none where it is empty; None for nothing said.
        take_over: Whether to take it from the local runner of another machine that gives signs of life.

    Durability: on return run.json is on storage, on the run's URL too, and the new backend has the run.

    Raises:
        ConfigError: If the run is alive, or the new backend cannot run it; it is as it was then.
    """
    store = submission.open_run(url)
    file = specs.read_file(store)
    spec, name = file.spec, file.backend
    old, new = registry.named(name), registry.named(name if place is None else place.backend)
    moves = new is not old
    cancels = verbs.cancels_of(store)
    again = command is not None
    if not again and verbs.status(old, store).state is State.DONE:
        return State.DONE
    if moves and (spec.sweep or spec.sweep_url):
        raise ConfigError(f"{store.url} belongs to a sweep, which goes on where it was submitted: --on {name}")
    verbs.refuse_alive(old, store, take_over=take_over)
    change = new_code.write_down if command is None else new_code.prepare(store, command)
    if place is None and setup is not None:  # their digest is written down
        place = Placement(name, {}, None if spec.cloud is None else {}, None, None)
    if place is None:
        return verbs.resume(old, store, take_over=take_over, cancels=cancels, change=change, again=again)
    merge = functools.partial(_fitting, store, place, setup, moves=moves)
    planned = merge(spec)  # before anything is claimed; again, should somebody have changed it until then

    def merged(now: JobSpec) -> JobSpec:
        return planned if now == spec else merge(now)

    move = functools.partial(_moved, store, name, place.backend, merged, take_over=take_over)
    over = take_over and new.processes_here
    return verbs.resume(new, store, take_over=over, cancels=cancels, change=change, again=again, setup=setup, move=move)


@contextlib.contextmanager
def _moved(
    store: Store, source: str, target: str, merge: Callable[[JobSpec], JobSpec], *, take_over: bool
) -> Iterator[JobSpec]:
    """Have run.json name the backend that a run goes on with, and what it is to have there; yield that.

    The run is claimed. On an error inside run.json is what it was when it was claimed.

    Args:
        store: The run.
        source, target: The backends that it had, and is to have.
        merge: Returns what it is to have, of what it had.
        take_over: As of `resume`.
    """
    file, old = verbs.unmoved(store, source), registry.named(source)
    merged = merge(file.spec)
    if source != target:
        if not old.processes_here:  # those hold what is claimed; somebody else may have resumed it there
            verbs.refuse_alive(old, store)
        old.leave(store, take_over=take_over)
        submission.record(store, "moved", source=source, target=target, by=submission.who())
    specs.rewrite(store, merged, target, file.created)
    try:
        yield merged
    except ConfigError:
        specs.rewrite(store, file.spec, source, file.created)
        if source != target:
            submission.record(store, "moved", source=target, target=source, by=submission.who())
        raise


def _fitting(store: Store, place: Placement, setup: Sequence[str] | None, spec: JobSpec, *, moves: bool) -> JobSpec:
    """Return what a run is to have on a backend; raises ConfigError if that cannot work there, writes nothing."""
    backend = registry.named(place.backend)
    merged = msgspec.structs.replace(
        _merged(spec, place, same=not moves),
        setup=tuple(setup or ()),
        setup_digest=spec.setup_digest if setup is None and "setup" in backend.options else "",
    )
    with_setup(store, merged, setup)
    specs.check(merged)
    return backend.fit(store, merged, moved=True)


def _merged(spec: JobSpec, place: Placement, *, same: bool) -> JobSpec:
    """Return what is asked for: on the backend that the run had, what is not said stays."""
    kept = {name: getattr(place, name) for name in ("price_per_hour", "max_time_s", "max_cost")}
    kept = {name: value for name, value in kept.items() if value is not None}
    sbatch = (spec.sbatch if same else {}) | place.sbatch
    tasks = spec.sbatch.get("ntasks-per-node")
    if tasks is not None:
        sbatch = {"ntasks-per-node": tasks} | sbatch
    cloud = None
    if place.cloud is not None:
        cloud = msgspec.structs.replace((spec.cloud if same else None) or Cloud(), **place.cloud)
    container = place.container or (spec.container if same else None)
    return msgspec.structs.replace(spec, sbatch=sbatch, cloud=cloud, container=container, **kept)

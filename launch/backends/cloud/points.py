"""The points of a sweep in a bucket: each is a whole run there, with its own code and jobs of its own.

Where only so many may run at once (`--array-parallelism`) the points are in lanes: the job of one that is over submits
the job of the next in its lane, which takes the role that a successor takes. No machine has to stay on for that.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from jobkit import contract
from jobkit.errors import ConfigError, JobkitError, say
from jobkit.rundir import mirror
from jobkit.rundir.files import remove_tree
from jobkit.rundir.ledger import Event
from jobkit.rundir.store import Store
from launch.lifecycle import run_status
from launch.lifecycle.history import count_of
from launch.lifecycle.submission import ask_to_cancel, record, who
from launch.spec import jobspec as specs
from launch.spec import snapshot
from launch.spec.jobspec import JobSpec

Submit = Callable[[Store, JobSpec], None]
"""Submits the job of a point, unless it has one."""
End = Callable[[Sequence[Store], JobSpec], None]
"""Ends the jobs of points that were submitted just now, and waits a while until they are over."""
_AT_ONCE = 8
T = TypeVar("T")


def enqueue(store: Store, spec: JobSpec, numbers: Sequence[int], submit: Submit, end: End) -> None:
    """Make the runs of points that are not there, and submit the jobs of as many as may run at once.

    Args:
        store: The sweep.
        spec: What was submitted, with the lines of `--setup`.
        numbers: The points that are to run.
        submit: Submits a job.
        end: Ends jobs.

    Raises:
        JobkitError: If a job is refused; nothing was started, and no run was made then.
    """
    stores = specs.points(store, spec)
    points = [stores[number] for number in numbers]
    lanes = spec.parallel or len(points)
    _each(mirror.set_deleted_aside, points)
    fresh = [point for point in points if not specs.exists(point)]
    begun: list[Store] = []
    with contextlib.ExitStack() as undone:
        undone.callback(lambda: _undo(begun, fresh, spec, end))
        _each(lambda number: _make(store, stores[number], spec.point(number)), numbers)
        for position, point in enumerate(points):
            if lanes < len(points) and not has_job(point):  # of one that has a job a VM has the ledger
                behind = numbers[position - lanes] if position >= lanes else None
                record(point, "lane", behind=behind, then=next(iter(numbers[position + lanes :]), None))
                mirror.upload_ledger(point)
        for point in points[:lanes]:
            if not has_job(point):
                begun.append(point)
            submit(point, msgspec.structs.replace(specs.read(point), setup=spec.setup))
        undone.pop_all()


def _make(store: Store, point: Store, spec: JobSpec) -> None:
    """Make the run of a point, on its URL too; one that is half made is completed."""
    there, newest = specs.exists(point), _newest(point, "submitted", "resumed", "job", "lane", "ended")["event"]
    if there and newest not in ("", "submitted"):
        return
    point.make(shared=spec.shared)
    if not there:
        if newest:  # of a VM that was heard once more after its submit was taken back
            point.bucket.remove([contract.EVENTS])
            point.remove(contract.EVENTS)
        if spec.code is not None:
            name = snapshot.archive_name(spec.code)
            point.write(name, store.read(name))
        specs.write_readme(point, spec)
        specs.create(point, spec, specs.read_file(store).backend)
    point.bucket.create(contract.RUN_JSON, point.read(contract.RUN_JSON))
    if not run_status.events(point):
        record(point, "submitted", command=list(spec.command), code=spec.code, by=who())
    mirror.upload_described(point)


def _undo(begun: Sequence[Store], fresh: Sequence[Store], spec: JobSpec, end: End) -> None:
    """End the jobs that were submitted just now, and remove the runs that were made for them."""
    made = [point for point in fresh if specs.exists(point)]
    if begun:  # a VM that is up already neither goes on nor has the next point of its lane begin
        _each(_tried(ask_to_cancel), made)
        with contextlib.suppress(JobkitError):
            end(begun, spec)
    _each(_tried(lambda point: point.bucket.remove(point.bucket.find())), made)
    for point in made:
        remove_tree(point.path)


def _each(do: Callable[[T], object], what: Iterable[T]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(do, what):
            pass


def _tried(do: Callable[[Store], object]) -> Callable[[Store], None]:
    def tried(point: Store) -> None:
        with contextlib.suppress(JobkitError):
            do(point)

    return tried


def _newest(point: Store, *names: str) -> Event:
    """Return the newest event of some names in a point's ledger."""
    return next((event for event in reversed(run_status.events(point)) if event["event"] in names), {"event": ""})


def has_job(point: Store) -> bool:
    """Tell whether a job of a point is written down, and no end after it."""
    return bool(_newest(point, "submitted", "resumed", "job", "ended")["event"] == "job")


def behind(point: Store, *, passed: bool = False) -> Store | None:
    """Return the point that has to be over before another one is submitted; None if that has ended, or waits for none.

    Its job, which is written down a moment before the service knows it, is not looked at.

    Args:
        point: The other one.
        passed: Whether it may have ended, if it never had a job: the one before it passes it by.
    """
    names = ("submitted", "resumed", "lane")
    ends = () if passed and _newest(point, *names, "job")["event"] != "job" else ("ended",)
    lane = _newest(point, *names, *ends)
    number = count_of(lane.get("behind")) if lane["event"] == "lane" else None
    return None if number is None or number >= _number(point) else _other(point, number)


def _number(point: Store) -> int:
    return int(point.url.rpartition("/")[2])


def _other(point: Store, number: int) -> Store:
    return point.at(f"{point.url.rpartition('/')[0]}/{number}")


def start_next(point: Store, submit: Submit) -> None:
    """Submit the next point of a lane, from inside the job of one that is over; whoever is killed may do it again.

    Args:
        point: The one that is over.
        submit: Submits a job.
    """
    then: Store | None = point
    while then is not None and (then := _next(then)) is not None:
        mirror.refresh(then)
        if point.at(point.url.rpartition(f"/{contract.POINTS}/")[0]).bucket.find(contract.CANCEL):
            break
        if run_status.has_ended(then) or then.exists(contract.CANCEL):
            continue
        try:
            submit(then, specs.read(then))
        except ConfigError as error:
            say(f"the next point, {then.url}, could not be submitted: {error}")
            record_refused(point, error)
        break


def record_refused(point: Store, error: JobkitError) -> None:
    """Write down, on the URL too, that the next point of a lane could not be submitted, and why."""
    record(point, "lane", refused=str(error))
    mirror.upload_ledger(point)


def _next(point: Store) -> Store | None:
    lanes = [event for event in run_status.events(point) if event["event"] == "lane" and "then" in event]
    number = count_of(lanes[-1].get("then")) if lanes else None
    return None if number is None or number <= _number(point) else _other(point, number)

"""The jobs of a run: what its ledger has of them, what SLURM and its accounting say of them, and how they are ended."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

from jobkit import contract
from jobkit.errors import JobkitError
from jobkit.rundir.store import Store
from jobkit.units import show_duration
from launch.backends.slurm import scontrol
from launch.backends.slurm.batch_script import BACKEND
from launch.backends.slurm.scontrol import SlurmError
from launch.lifecycle import run_status
from launch.lifecycle.run_status import Job
from launch.lifecycle.verbs import Progress, UnknownError, alive
from launch.spec import jobspec as specs
from launch.spec import sweep

WAKER = "jobkit-wake "
"""Begins the comment of a job that is none of a run's own but helps one to start, before the run's URL."""
_POLL_S = 0.5


def jobs(store: Store) -> list[str]:
    """List the numbers of a run's jobs that are in its ledger, oldest first; of a point also its tasks of arrays."""
    own = run_status.jobs(store, BACKEND)
    place = specs.sweep_of(store)
    if place is not None:
        events = [event for event in run_status.events(place[0]) if event["event"] == "job" and "array" in event]
        own += [f"{event['id']}_{place[1]}" for event in events if place[1] in sweep.expand(str(event["array"]))]
    return sorted(set(own), key=scontrol.number)


def queued(stores: Sequence[Store]) -> dict[str, list[Job]]:
    """Ask SLURM once for the jobs of any number of runs that it still knows, oldest first, by the run's URL.

    Also those that a submit, killed the moment after, did not write down.

    Raises:
        JobkitError: If SLURM does not answer.
    """
    by_key: dict[str, list[Job]] = defaultdict(list)
    for job in scontrol.queue() if stores else []:
        task = f"/{contract.POINTS}/{job.id.partition('_')[2]}" if "_" in job.id else ""
        for key in {job.id, job.comment + task} - {""}:
            by_key[key].append(job)
    mine = {}
    for store in stores:
        known = {job.id: job for key in (store.url, *jobs(store)) for job in by_key.get(key, ())}
        mine[store.url] = sorted(known.values(), key=lambda job: scontrol.number(job.id))
    return mine


def jobs_of(stores: Sequence[Store]) -> dict[str, Job]:
    """Return the job that counts, by the run's URL: the newest that is active, else the newest.

    A job that SLURM has forgotten is as the accounting says, GONE without one; where SLURM does not answer it is
    UNKNOWN.
    """
    try:
        known = queued([store for store in stores if run_status.last_life_event(store).get("event") != "ended"])
    except JobkitError as error:
        unknown = str(error)
        return {store.url: Job((jobs(store) or [""])[-1], "UNKNOWN", unknown) for store in stores}
    by_url = {}
    for store in stores:
        table = known.get(store.url, [])
        active = [job for job in table if job.active]
        forgotten = Job((jobs(store) or [""])[-1], "GONE")
        by_url[store.url] = active[-1] if active else table[-1] if table else forgotten
    # Of those whose end is not written down; SLURM forgets a job minutes after its end, its accounting does not.
    gone = [store.url for store in stores if store.url in known and by_url[store.url].state == "GONE"]
    records = scontrol.accounted(by_url[url].id for url in gone)
    return by_url | {url: records[by_url[url].id] for url in gone if by_url[url].id in records}


def refuse_alive(stores: Sequence[Store]) -> None:
    """Raise ConfigError if a run has a job that is not over, or nobody can tell."""
    try:
        known = queued(stores)
    except JobkitError as error:
        raise UnknownError(f"cannot tell whether run {stores[0].url} is alive: {error}; try again") from None
    for one in stores:
        for job in known[one.url][-1:]:
            if job.active:
                raise alive(one, job)


def end(members: Callable[[], Sequence[Store]], *, grace_s: float, wait: bool, progress: Progress) -> None:
    """End the jobs of runs, which are asked for at each look; return when none is left, or at once."""
    asked = time.monotonic()
    signalled: set[str] = set()
    wakers = {f"{WAKER}{one.url}" for one in members()}
    _scancel([job.id for job in scontrol.queue() if job.active and job.comment in wakers])
    while True:
        active = {job.id: job for table in queued(members()).values() for job in table if job.active}
        if not active:
            return
        insist = time.monotonic() - asked > grace_s
        ended = [job.id for job in active.values() if job.pending or (insist and f"{job.id}!" not in signalled)]
        asked_now = [job.id for job in active.values() if job.state == "RUNNING" and job.id not in {*signalled, *ended}]
        if asked_now and wait and not signalled:
            shown = f"job{'s' * (len(asked_now) > 1)} {', '.join(asked_now[:5])}"
            progress(f"waiting for {shown} to save and stop (killed after {show_duration(grace_s)})")
        signalled |= {f"{job}!" for job in ended} | set(asked_now)
        _scancel(ended)
        _scancel(asked_now, "--signal=TERM")
        if not wait:
            return
        time.sleep(_POLL_S)


def _scancel(jobs: Sequence[str], *options: str) -> None:
    if jobs:
        with contextlib.suppress(SlurmError):  # one has ended this very moment
            scontrol.run("scancel", *options, *jobs)

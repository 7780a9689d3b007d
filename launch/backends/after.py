"""A run starts once another one has finished well: `jobkit submit --after RUN`.

The other run is known by its URL, which outlives its jobs: each of those may hand over to a successor. So it is the run
that is looked at, never one of its jobs: by the local runner now and then, on SLURM by the job when it starts, which
lets a job behind the newest one of the other take over while that goes on. A run that has begun never waits again.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from jobkit import contract
from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError, say
from jobkit.rundir.store import Store, is_remote
from launch.lifecycle import run_status, submission
from launch.lifecycle.run_status import Job
from launch.lifecycle.submission import Plan
from launch.lifecycle.verbs import Backend
from launch.spec import jobspec as specs
from launch.spec.jobspec import JobSpec

Jobs = Callable[[Sequence[Store]], Mapping[str, Job]]
"""Returns the newest jobs of runs, as `Backend.jobs` does."""
_PAUSE_S, _PAUSE_BUCKET_S = 2.0, 15.0
"""How long between two looks at a run: in a directory, in a bucket."""
_SURE_S = 10.0
"""How long a run whose end is not written down has to have nothing that lives before it counts as over: whoever waits
for it may be starting another runner."""
_MOST_JOBS = 100
"""A job waits for at most so many others: when it starts it looks again."""


@dataclasses.dataclass(frozen=True)
class Other:
    """What is known of the run that another one starts after.

    Args:
        state: DONE once it has finished well; FAILED or CANCELLED if it will not by itself; another while it goes on.
        reason: Which run it is, its state and why, as one clause; empty once it is done.
        jobs: Its jobs that are not over, by number.
        sure: Whether its end is written down, where it is over.
    """

    state: State
    reason: str = ""
    jobs: tuple[str, ...] = ()
    sure: bool = True


def look(url: str, backend: str, jobs: Jobs) -> Other:
    """Look at the run that another one starts after.

    Args:
        url: The run; of a sweep all points count.
        backend: Of the run that is to start.
        jobs: Of that backend.

    Raises:
        ConfigError: If it is no run, or goes on where this backend cannot see it.
        JobkitError: If its storage does not answer.
    """
    store = submission.open_run(url)
    file = specs.read_file(store)
    members = specs.points(store, file.spec)
    if file.backend != backend and not all(map(run_status.has_ended, members)):
        instead = f"wait for it here: jobkit wait {store.url} && jobkit submit ..."
        raise ConfigError(f"{store.url} is --on {file.backend}, whose end is not seen --on {backend}; {instead}")
    known = jobs(members) if file.backend == backend else {}
    each = [run_status.status(one, job=known.get(one.url)) for one in members]
    first = next((one for one in each if not one.state.over), None)
    first = first or next((one for one in each if one.state is not State.DONE), None)
    if first is None:
        return Other(State.DONE)
    active = [job.id for job in known.values() if job.active]
    if file.spec.sweep:  # the whole array for any of its tasks
        active = list(dict.fromkeys(job.partition("_")[0] for job in active))
    because = f": {first.reason}" if first.reason else ""
    reason = f"{first.run} is {first.state}{because}"
    return Other(first.state, reason, tuple(active[-_MOST_JOBS:]), sure=first.runner != "gone")


def due(store: Store, spec: JobSpec) -> bool:
    """Tell whether a run has to wait for another one: it starts after that, and no attempt of it has begun."""
    return bool(spec.after) and not store.numbers(contract.ATTEMPTS)


def jobs_before(backend: Backend, store: Store, spec: JobSpec) -> tuple[str, ...]:
    """Return the jobs after which the first one of a run is to start; none where it need not wait.

    Raises:
        JobkitError: If the other run cannot be read.
    """
    return look(spec.after, backend.name, backend.jobs).jobs if due(store, spec) else ()


def check_backend(backend: Backend, spec: JobSpec) -> None:
    """Refuse a run that starts after another one where its backend cannot wait.

    Raises:
        ConfigError: With the remedy.
    """
    if spec.after and not backend.waits:
        raise ConfigError(f"--after {spec.after}: a job --on {backend.name} cannot wait for a run; {_instead(spec)}")


def _instead(spec: JobSpec) -> str:
    return f"wait for it here: jobkit wait {spec.after} && jobkit submit ..."


def check(backend: Backend, plan: Plan) -> Plan:
    """Check what a run is to start after; return the plan with that run's whole URL.

    Args:
        backend: Where the run is to start.
        plan: Its submit.

    Raises:
        ConfigError: If the other run will not finish, or cannot be waited for from there, with the remedy.
    """
    spec = plan.spec
    if not spec.after:
        return plan
    check_backend(backend, spec)
    if spec.sweep:
        raise ConfigError(f"--after {spec.after} is for one run, and this is a sweep; {_instead(spec)}")
    if specs.begun_by_hand(plan.store):
        raise ConfigError(
            f"--after {spec.after}: {plan.store.url} has begun already, by hand: leave it out, or give a new --run"
        )
    other = submission.open_run(spec.after)
    if other.url == plan.store.url:
        raise ConfigError(f"--after {spec.after}: a run cannot start after itself; name another one")
    reason = _bad_end(backend, other.url, f"--after {spec.after}")
    if reason:
        raise ConfigError(f"--after {spec.after}: {reason}; see to that first, or leave --after out")
    return dataclasses.replace(plan, spec=msgspec.structs.replace(spec, after=other.url))


def check_resumed(backend: Backend, store: Store, spec: JobSpec) -> None:
    """Refuse to resume a run that has not begun, while the one that it starts after will not finish.

    One that is to go on with its waiting, since only its runner was killed, is not refused: its runner sees to it.

    Raises:
        ConfigError: With the remedy.
    """
    if not due(store, spec):
        return
    check_backend(backend, spec)
    if not run_status.has_ended(store):
        return
    reason = _bad_end(backend, spec.after, f"{store.url} starts after {spec.after}")
    if reason:
        raise ConfigError(f"{store.url} starts after another run, and {reason}; resume that first")


def _bad_end(backend: Backend, url: str, who: str) -> str:
    """Say how the other run has ended, where it has ended otherwise than well; else ''.

    Raises:
        ConfigError: If it cannot be looked at, after `who`.
    """
    try:
        found = look(url, backend.name, backend.jobs)
    except ConfigError as error:
        raise ConfigError(f"{who}: {error}") from None
    return found.reason if found.state.over and found.state is not State.DONE else ""


class Watch:
    """Looks at the run that another one starts after, again and again.

    Args:
        store: The run that is to start.
        spec: What was submitted.
        jobs: Of its backend.
    """

    def __init__(self, store: Store, spec: JobSpec, jobs: Jobs) -> None:
        self._store, self._after, self._jobs = store, spec.after, jobs
        self._backend = specs.read_file(store).backend
        self._over_since: float | None = None
        self._said = ""
        self.pause_s = _PAUSE_BUCKET_S if is_remote(spec.after) else _PAUSE_S
        """How long to wait before the next look, in seconds."""

    def look(self) -> Other:
        """Look; a storage or a scheduler that does not answer is no end. The reason of one says what to do then."""
        try:
            other = look(self._after, self._backend, self._jobs)
        except ConfigError as error:
            other = Other(State.FAILED, str(error), sure=False)
        except JobkitError as error:
            other = Other(State.QUEUED, str(error))
            if str(error) != self._said:
                say(str(error))
            self._said = str(error)
        if not other.state.over or other.sure:
            self._over_since = None
        else:
            now = time.monotonic()
            self._over_since = now if self._over_since is None else self._over_since
            if now - self._over_since < _SURE_S:
                return Other(State.QUEUED, other.reason)
        if other.state.over and other.state is not State.DONE:
            again = f"once it is done: jobkit resume {self._store.url}"
            return dataclasses.replace(other, reason=f"not started, since {other.reason}; {again}")
        return other

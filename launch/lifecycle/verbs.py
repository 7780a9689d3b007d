"""What a person does to a run, once for every backend: submit, look, resume, cancel; and what a backend does for that.

A run, and a sweep, which is one run for each of its points, go through the same verbs. What a verb promises holds on
every backend: nothing is left of a submit that was refused, nothing but a resume overrules a cancel, and nothing that
is done or alive is started again.
"""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.store import Store
from launch.lifecycle import run_status, submission
from launch.lifecycle.lock import Claim, acquired
from launch.lifecycle.run_status import Job, Status
from launch.lifecycle.submission import Plan
from launch.spec import jobspec as specs
from launch.spec.command import with_setup
from launch.spec.finding import Finding
from launch.spec.jobspec import JobSpec, RunFile

_POLL_S = 1.0
_STARTING_S = 30.0
"""How long somebody else may take to have a scheduler start a run."""
Progress = Callable[[str], None]
"""Called with a line for a person when a waiting begins."""


Change = Callable[[Store, JobSpec], JobSpec]
"""Writes down what a run, which nobody else can start meanwhile, goes on with, and returns that."""


class UnknownError(ConfigError):
    """Nobody can tell whether a run is alive."""


def alive(store: Store, job: Job) -> ConfigError:
    """Say that a run has a job that is not over, and what can be done."""
    doing = f"job {job.id} is {job.state.lower()}" if job.id else f"it {job.reason or job.state.lower()}"
    return ConfigError(
        f"run {store.url} is alive: {doing}: 'jobkit logs -f {store.url}' or 'jobkit cancel {store.url}'"
    )


@dataclass(frozen=True)
class Cancelled:
    """A run whose cancel is written down, and that may still run.

    Args:
        store: The run or sweep.
        left: The run, or the points that are not over.
        cancels: What was written as the cancel of each.
        wait: Whether to wait until nothing of it runs.
        progress: Called with a line for a person when the waiting starts.
    """

    store: Store
    left: Sequence[Store]
    cancels: Mapping[Store, bytes]
    wait: bool
    progress: Progress


class Backend(ABC):
    """Where runs are. A new one implements what is abstract here, and has the verbs.

    Attributes:
        name: As `--on` and run.json have it.
        options: Those that it knows of the options that not every backend has, as the command line spells them.
        waits: Whether a run of it can start after another one.
        runtimes: Runtimes of containers that it knows, its default first.
        processes_here: Whether its runs are processes of the machine that submits: those can be watched, signalled and
            taken over.
    """

    name: ClassVar[str]
    options: ClassVar[frozenset[str]] = frozenset()
    waits: ClassVar[bool] = False
    runtimes: ClassVar[tuple[str, ...]] = ()
    processes_here: ClassVar[bool] = False

    @abstractmethod
    def check(self, spec: JobSpec, *, look: bool = True) -> Plan:
        """Check what is to be submitted and fill in what it leaves open; writes nothing that lasts.

        Args:
            spec: What is to be submitted.
            look: Whether a bucket is asked what it has of the run.

        Raises:
            ConfigError: If it cannot work here, with the remedy.
        """

    @abstractmethod
    def fit(self, store: Store, spec: JobSpec, *, moved: bool) -> JobSpec:
        """Check what a run that exists is to go on with, and fill in what it leaves open; writes nothing that lasts.

        Args:
            store: The run.
            spec: What it is to go on with.
            moved: Whether that is another backend, or other options, than it had.

        Raises:
            ConfigError: If it cannot work here, with the remedy.
        """

    def examine(self, spec: JobSpec) -> list[Finding]:
        """Say what runs would come upon here; changes nothing."""
        raise ConfigError(f"--on {self.name}: there is nothing to examine; try it: jobkit demo")

    def preview(self, plan: Plan) -> str:
        """Return what a submit would send; empty where nothing is sent."""
        return ""

    def refuse_taken(self, plan: Plan) -> None:
        """Raise ConfigError if a submit would find the run directory taken; writes nothing."""
        submission.refuse_taken(plan)

    def finish(self, plan: Plan) -> bool:
        """Do what is left of the same submit, killed half-way; tell whether there was one."""
        return False

    @abstractmethod
    def enqueue(self, store: Store, spec: JobSpec, points: Sequence[int]) -> None:
        """Have the scheduler start a run, of a sweep some points; where it raises, nothing was started.

        Raises:
            ConfigError: If the scheduler refuses.
        """

    def hand_over(self, store: Store, claim: Claim) -> State:
        """Give a run to what starts its attempts, and the claim with it; return the state that it is in then."""
        claim.free(store)
        return State.QUEUED

    @contextlib.contextmanager
    def claim(self, store: Store, spec: JobSpec, *, take_over: bool) -> Iterator[Claim]:
        """Refuse a run that is alive, and keep others from starting it; on an error inside it is free again.

        Args:
            store: The run.
            spec: What was submitted.
            take_over: Whether to take it from a machine that gives signs of life; only where `processes_here`.

        Raises:
            ConfigError: If it is alive.
        """
        with acquired(store, wait_s=_STARTING_S) as lock:  # of two resumes the second comes upon the first one's job
            refuse_alive(self, store)
            yield Claim(lock)

    @abstractmethod
    def refuse_alive(self, store: Store, *, take_over: bool = False) -> None:
        """Raise ConfigError if a run, or a point of a sweep, is alive; UnknownError if nobody can tell."""

    def record_resumed(self, store: Store, left: Iterable[Store]) -> None:
        """Write down that a person resumes a run.

        Args:
            store: The run or sweep.
            left: The run, or the points that are not done.
        """
        for one in filter(specs.exists, left):
            submission.record_begun_afresh(one)

    def jobs(self, stores: Sequence[Store]) -> Mapping[str, Job]:
        """Return the scheduler's newest job of each run, by the run's URL; empty where there is no scheduler.

        A job's state is UNKNOWN where the scheduler does not answer, and GONE where it has forgotten the job.
        """
        return {}

    @abstractmethod
    def stop(self, cancelled: Cancelled) -> None:
        """End what still runs of a run that was cancelled, and write the end down where nothing does any more."""

    def leave(self, store: Store, *, take_over: bool) -> None:  # noqa: B027  (nothing to let go of is the rule)
        """Let go of a run that moves to another backend."""

    def beside(self, store: Store, command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Return how a command is run beside a live attempt: its words, and what the environment gains."""
        raise ConfigError(f"--on {self.name} offers no shell beside a run; its own console may")

    def service_log(self, store: Store) -> list[str]:
        """Return what the service's own log has of a run's newest job, oldest first."""
        return []

    def runs(self, project: str, region: str) -> list[str]:
        """Return the URLs of the runs that have jobs in a project and region.

        Raises:
            ConfigError: If this backend cannot tell.
        """
        raise ConfigError(f"--on {self.name} lists no runs; give a directory or a bucket's URL instead")


def refuse_alive(backend: Backend, store: Store, *, take_over: bool = False) -> None:
    """Raise ConfigError if a run is alive; a job that is leaving after the run's end gets time to be gone."""
    deadline = time.monotonic() + submission.LEAVING_S
    while True:
        try:
            return backend.refuse_alive(store, take_over=take_over)
        except UnknownError:
            raise
        except ConfigError:
            ended = all(map(run_status.has_ended, specs.points(store, specs.read(store))))
            if not ended or time.monotonic() >= deadline:
                raise
        time.sleep(_POLL_S)


def submit(backend: Backend, spec: JobSpec, *, begin: Callable[[Store], dict[str, Any]] | None = None) -> Store:
    """Start a run.

    Args:
        backend: Where.
        spec: What to run.
        begin: See `submission.new_run`.

    Durability: on return run.json is on storage, and the run goes on without this process.

    Raises:
        ConfigError: If the specification cannot work, or the run directory is taken; nothing is left behind then.
    """
    plan = backend.check(spec)
    if backend.finish(plan):
        return plan.store
    with submission.new_run(plan, backend.name, begin) as (store, spec, lock):
        backend.enqueue(store, spec, range(len(specs.points(store, spec))))
    backend.hand_over(store, Claim(lock))
    return store


def status(backend: Backend, store: Store, jobs: Mapping[str, Job] | None = None) -> Status:
    """Read what a run is doing.

    Args:
        backend: Its backend.
        store: The run or sweep.
        jobs: What `jobs_of` said; by default it is asked.

    Raises:
        JobkitError: If it is not a run, or its run.json is damaged.
    """
    spec = specs.read(store)
    jobs = jobs_of(backend, [store]) if jobs is None else jobs
    each = [run_status.status(one, job=jobs.get(one.url)) for one in specs.points(store, spec)]
    return _of_sweep(store, each) if spec.sweep else each[0]


def _of_sweep(store: Store, points: list[Status]) -> Status:
    """Put the status of a sweep together from those of its points.

    Args:
        store: The sweep.
        points: All of them, in order.
    """
    file = specs.read_file(store)
    counts = {state: sum(point.state is state for point in points) for state in State}
    order = (State.RUNNING, State.REQUEUED, State.QUEUED, State.FAILED, State.CANCELLED)
    state = next((state for state in order if counts[state]), State.DONE)
    reason = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    runners = {point.runner for point in points}
    if "gone" in runners and state.over:
        reason += f"; continue with: jobkit resume {store.url}"
    return Status(
        run=store.url,
        name=file.spec.name,
        backend=file.backend,
        state=state,
        attempts=sum(point.attempts for point in points),
        reason=reason,
        command=file.spec.command,
        submitted=file.created,
        updated=max((point.updated for point in points if point.updated is not None), default=None),
        elapsed_s=run_status.elapsed_s(store, file.created),
        job=next(reversed(run_status.jobs(store, file.backend)), None),
        runner=next((runner for runner in ("alive", "gone") if runner in runners), "ended"),
        troubles=[
            msgspec.structs.replace(trouble, text=f"point {number}: {trouble.text}")
            for number, point in enumerate(points)
            for trouble in point.troubles
        ],
        points=points,
    )


def jobs_of(backend: Backend, stores: Sequence[Store]) -> Mapping[str, Job]:
    """Return the jobs of runs, and of the points of sweeps, of one backend, by their URLs."""
    return backend.jobs([one for store in stores for one in specs.points(store, specs.read(store))])


def cancels_of(store: Store) -> dict[str, bytes | None]:
    """Return the cancels of a run, or of a sweep and its points, that this machine knows of, by their URLs."""
    return {one.url: submission.cancel_content(one) for one in (store, *specs.points(store, specs.read(store)))}


def resume(
    backend: Backend,
    store: Store,
    *,
    clear_cancel: bool = True,
    take_over: bool = False,
    cancels: Mapping[str, bytes | None] | None = None,
    change: Change = lambda store, spec: spec,
    again: bool = False,
    setup: Sequence[str] | None = None,
    move: Callable[[], AbstractContextManager[JobSpec]] | None = None,
) -> State:
    """Have a run, or the points of a sweep that are not done, go on from what is committed.

    Args:
        backend: Its backend.
        store: The run or sweep.
        clear_cancel: Whether an earlier cancel is taken back; one that comes meanwhile never is.
        take_over: Whether to take it from the runner of another machine without waiting until that counts as dead.
        cancels: Those that are taken back, as `cancels_of` returned them; by default the ones that there are now.
        change: Called with the run and what it is to go on with, before anything is started.
        again: Whether a run that is done goes on too.
        setup: Lines of `--setup`, which no run directory has.
        move: Has run.json name this backend, and what the run is to have there; on an error inside it is as it was.

    Returns:
        Its state then; DONE, and nothing started, if it is done.

    Raises:
        ConfigError: If it is alive, or its backend refuses it.
    """
    if take_over and not backend.processes_here:
        name = backend.name
        raise ConfigError(f"only a local runner is taken over; of {store.url} {name} tells whether it lives: resume it")
    spec = specs.read(store)
    members = specs.points(store, spec)
    cancels = cancels_of(store) if cancels is None else cancels
    left = members if again else not_done(backend, members)
    if not left:
        return State.DONE
    with backend.claim(store, spec, take_over=take_over) as claim:
        if claim.lock is not None and not again:  # its runner may have written the end until it was free
            left = not_done(backend, members)
        if left:
            with contextlib.nullcontext(unmoved(store, backend.name).spec) if move is None else move() as spec:
                spec = change(store, backend.fit(store, with_setup(store, spec, setup), moved=False))
                if not spec.sweep:
                    submission.make_point(store)
                for one in filter(specs.exists, dict.fromkeys((store, *left))):
                    if clear_cancel:
                        submission.take_back_cancel(one, cancels[one.url])
                backend.record_resumed(store, left)
                backend.enqueue(store, spec, [members.index(one) for one in left])
    if left:
        return backend.hand_over(store, claim)
    claim.free(store)
    return State.DONE


def unmoved(store: Store, name: str) -> RunFile:
    """Read run.json again where a run is claimed: what was read before, others may have changed until then.

    Raises:
        ConfigError: If the run has moved to another backend than `name` meanwhile.
    """
    file = specs.read_file(store)
    if file.backend != name:
        raise ConfigError(f"run {store.url} has moved to {file.backend} this very moment: 'jobkit status {store.url}'")
    return file


def cancel(
    backend: Backend,
    store: Store,
    *,
    wait: bool = True,
    word: str = "cancelled",
    progress: Progress = lambda text: None,
) -> State:
    """End a run, or all points of a sweep, for good: nothing of it is ever started again, unless a person resumes it.

    Args:
        backend: Its backend.
        store: The run or sweep.
        wait: Whether to wait until nothing of it runs any more.
        word: 'cancelled', or 'stopped' by who means to go on later.
        progress: Called with a line for a person when the waiting starts.

    Durability: on return cancel.json is on storage, on the run's URL too; nothing overrules it but `resume`.

    Raises:
        ConfigError: If it is already done.
        JobkitError: If the scheduler does not answer; the cancel stands all the same.
    """
    spec = specs.read(store)
    members = specs.points(store, spec)
    problems: list[JobkitError] = []
    states = _states(backend, members, problems if spec.sweep else None)
    if set(states.values()) == {State.DONE}:
        what = "sweep" if spec.sweep else "run"
        raise ConfigError(f"{what} {store.url} is already done; there is nothing to cancel")
    if not spec.sweep:
        submission.make_point(store)
    cancels = {store: submission.ask_to_cancel(store, word)}
    if spec.sweep:
        # A point that is made from now on looks for the sweep's own cancel; one may have begun since the look before.
        now = _states(backend, members, problems)
        over = {one for one, state in now.items() if state is State.DONE or (state.over and states[one].over)}
        members = [one for one in members if one not in over]
        for one in filter(specs.exists, members):
            try:
                cancels[one] = submission.ask_to_cancel(one, word)
            except JobkitError as error:  # the others are asked all the same
                problems.append(error)
    backend.stop(Cancelled(store, members, cancels, wait, progress))
    if problems:
        raise problems[0]
    after = set(_states(backend, members).values())
    return next((state for state in after if not state.over), State.DONE if after == {State.DONE} else State.CANCELLED)


def _states(
    backend: Backend, members: Sequence[Store], problems: list[JobkitError] | None = None
) -> dict[Store, State]:
    """Return the states of runs; one that cannot be read is no reason to leave the others, where problems are taken."""
    jobs, states = backend.jobs(members), {}
    for one in members:
        try:
            states[one] = run_status.status(one, job=jobs.get(one.url)).state
        except JobkitError as error:
            if problems is None:
                raise
            problems.append(error)
            states[one] = State.RUNNING  # as far as anybody knows
    return states


def not_done(backend: Backend, members: Sequence[Store]) -> list[Store]:
    """Return the runs that are not done."""
    return [one for one, state in _states(backend, members).items() if state is not State.DONE]

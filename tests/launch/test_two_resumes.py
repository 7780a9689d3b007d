"""Two people who do something to one run at the same moment, where a scheduler says what is alive."""

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from jobkit.contract import State
from jobkit.errors import ConfigError
from jobkit.rundir.store import Store
from launch.backends import move_run, registry, remove_run
from launch.lifecycle import lock, submission, verbs
from launch.lifecycle.lock import RunLock
from launch.lifecycle.run_status import Job
from launch.lifecycle.submission import Plan, prepare
from launch.lifecycle.verbs import Backend, Cancelled
from launch.spec import jobspec as specs
from launch.spec.jobspec import JobSpec
from launch.spec.profiles import Placement


class Queue(Backend):
    """A scheduler that takes its time: a job is to be seen only when its submission is through."""

    name = "slurm"

    def __init__(self) -> None:
        self.ids: list[str] = []

    def check(self, spec: JobSpec, *, look: bool = True) -> Plan:
        """See `Backend`."""
        return prepare(spec, look=look)

    def fit(self, store: Store, spec: JobSpec, *, moved: bool) -> JobSpec:
        """See `Backend`."""
        return spec

    def enqueue(self, store: Store, spec: JobSpec, points: Sequence[int]) -> None:
        """See `Backend`."""
        time.sleep(0.5)
        self.ids.append(str(len(self.ids) + 1))

    def jobs(self, stores: Sequence[Store]) -> Mapping[str, Job]:
        """See `Backend`."""
        return {store.url: Job(id="".join(self.ids[-1:]), state="GONE") for store in stores}

    def refuse_alive(self, store: Store, *, take_over: bool = False) -> None:
        """See `Backend`."""
        if self.ids:
            raise verbs.alive(store, Job(id=self.ids[-1], state="PENDING"))

    def stop(self, cancelled: Cancelled) -> None:
        """See `Backend`."""


class Elsewhere(Queue):
    """Another one, with a limit.

    Args:
        full: Whether it refuses what is submitted.
    """

    name = "gcp"

    def __init__(self, *, full: bool = False) -> None:
        super().__init__()
        self.full = full

    def enqueue(self, store: Store, spec: JobSpec, points: Sequence[int]) -> None:
        """See `Backend`."""
        if self.full:
            raise ConfigError("the queue is full")
        super().enqueue(store, spec, points)


def use(monkeypatch: pytest.MonkeyPatch, *backends: Backend) -> None:
    """Have the registry know backends."""
    for backend in backends:
        monkeypatch.setitem(registry._BY_NAME, backend.name, backend)


THERE = Placement(Elsewhere.name, {}, None, None, None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Make a run that has failed."""
    (tmp_path / "train.py").touch()
    spec = JobSpec(command=("python3", "train.py"), run=str(tmp_path / "run"), cwd=str(tmp_path))
    with submission.new_run(prepare(spec), Queue.name) as (made, _, lock):
        submission.end(made, State.FAILED, "the disk was full")
    lock.close()
    return made


def test_one_of_two_resumes_submits(store: Store) -> None:
    """The other one comes upon its job and says so: two jobs of one run would train against each other."""
    backend = Queue()

    def resume(_: int) -> str:
        try:
            return str(verbs.resume(backend, Store(store.url)))
        except ConfigError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        said = sorted(pool.map(resume, range(2)))
    assert backend.ids == ["1"], said
    alive = f"run {store.url} is alive: job 1 is pending: 'jobkit logs -f {store.url}' or 'jobkit cancel {store.url}'"
    assert said == sorted([str(State.QUEUED), alive])


def test_a_resume_that_is_refused_leaves_the_run_free(store: Store) -> None:
    """The next one is not kept waiting for it."""
    backend = Queue()
    backend.ids.append("1")
    submission.record_begun_afresh(store)  # whose job is alive
    for _ in range(2):
        with pytest.raises(ConfigError, match="job 1 is pending"):
            verbs.resume(backend, store)
    backend.ids.clear()
    assert verbs.resume(backend, store) is State.QUEUED


def test_a_move_comes_upon_a_job_that_has_been_started_meanwhile(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that one person resumes where it was while another one moves it is started once, and stays there."""
    begun, asked = threading.Event(), threading.Event()

    class Slow(Queue):
        """Submits only when somebody else has seen that there is no job yet."""

        def enqueue(self, store: Store, spec: JobSpec, points: Sequence[int]) -> None:
            """See `Backend`."""
            asked.clear()
            begun.set()
            assert asked.wait(20)
            super().enqueue(store, spec, points)

        def refuse_alive(self, store: Store, *, take_over: bool = False) -> None:
            """See `Backend`."""
            super().refuse_alive(store)
            asked.set()

    here, there = Slow(), Elsewhere()
    use(monkeypatch, here, there)
    with ThreadPoolExecutor(1) as pool:
        resumed = pool.submit(verbs.resume, here, Store(store.url))
        assert begun.wait(20)
        with pytest.raises(ConfigError, match="job 1 is pending"):
            move_run.resume(store.url, THERE)
        assert resumed.result() is State.QUEUED
    assert (here.ids, there.ids, specs.read_file(store).backend) == (["1"], [], "slurm")


@pytest.mark.parametrize("full", [False, True])
def test_a_move_undoes_nothing_of_somebody_else(store: Store, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    """Another command that the run is given while a move is looking stays, whether the move is refused or not."""

    class Changed(Queue):
        """Somebody changes the run while it is asked what is alive."""

        def refuse_alive(self, store: Store, *, take_over: bool = False) -> None:
            """See `Backend`."""
            file = specs.read_file(store)
            changed = msgspec.structs.replace(file.spec, command=("python3", "mended.py"))
            specs.rewrite(store, changed, file.backend, file.created)

    use(monkeypatch, Changed(), Elsewhere(full=full))
    with pytest.raises(ConfigError, match="the queue is full") if full else contextlib.nullcontext():
        move_run.resume(store.url, THERE)
    file = specs.read_file(store)
    assert (file.backend, file.spec.command) == ("slurm" if full else "gcp", ("python3", "mended.py"))


def test_a_run_that_has_moved_meanwhile_is_not_started_where_it_was(store: Store) -> None:
    """Who resumes it on the backend that it had when he looked is told where it is now."""
    backend, file = Queue(), specs.read_file(store)
    specs.rewrite(store, file.spec, Elsewhere.name, file.created)
    with pytest.raises(ConfigError, match="has moved to gcp"):
        verbs.resume(backend, store)
    assert backend.ids == []


def test_a_run_that_was_resumed_before_its_removal_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that somebody submits between the look and the lock of `jobkit rm` keeps the run."""
    backend, acquire = Queue(), lock.acquire
    use(monkeypatch, backend)

    def acquire_late(store: Store) -> RunLock | None:
        submission.record_begun_afresh(store)
        backend.ids.append("1")
        return acquire(store)

    monkeypatch.setattr(lock, "acquire", acquire_late)
    with pytest.raises(ConfigError, match="job 1 is pending"):
        remove_run.remove(store)
    assert specs.read(store).command == ("python3", "train.py")

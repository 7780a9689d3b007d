"""Two `jobkit resume` of one run at the same moment, where a scheduler says what is alive."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobkit.contract import State
from jobkit.errors import ConfigError
from jobkit.rundir.store import Store
from launch.lifecycle import submission, verbs
from launch.lifecycle.run_status import Job
from launch.lifecycle.submission import Plan, prepare
from launch.lifecycle.verbs import Backend, Cancelled
from launch.spec.jobspec import JobSpec


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

"""Runs of several processes that share nothing but a bucket, from their submit to their end."""

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from jobkit import contract
from jobkit.rundir.ledger import read_json
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from launch.backends.local import Local
from launch.lifecycle import run_status, submission, verbs
from launch.lifecycle.submission import open_run
from launch.spec.jobspec import JobSpec
from tests.harness import jobs, machines
from tests.harness.jobs import Project, until, until_over

PROGRAM = '''\
"""apart.py: process 1 of attempt 0 does what its first word says, the others wait for it; later attempts end well."""
import os, signal, sys, time
here = os.environ["JOBKIT_ATTEMPT"], os.environ["JOBKIT_PROCESS"]
print("process", here[1], "meets the others at", os.environ["JOBKIT_COORDINATOR"], flush=True)
if here == ("0", "1") and sys.argv[1] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if here[0] == "0":
    time.sleep(600)
'''


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Run a bucket's server, which this process's clients use; yield what others need for that."""
    with machines.bucket(tmp_path / "here") as server:
        yield server.environment()


@pytest.fixture
def specified(tmp_path: Path) -> Iterator[Callable[..., JobSpec]]:
    """Yield what specifies a run of apart.py in the bucket."""
    for project in jobs.project(tmp_path):
        (project.path / "apart.py").write_text(PROGRAM)
        yield functools.partial(_spec, project, tmp_path.name)


def _spec(project: Project, run: str, word: str, **options: object) -> JobSpec:
    spec = project.spec(run="r", **options)
    return msgspec.structs.replace(spec, command=("python", "apart.py", word), run=f"gs://bucket/{run}")


@pytest.mark.slow
def test_several_local_processes_have_homes_of_their_own(
    environment: dict[str, str], specified: Callable[..., JobSpec]
) -> None:
    """One of two is killed: both are ended, meet in the next attempt, and all they wrote is on the URL."""
    store = verbs.submit(Local(), specified("die", sbatch={"ntasks-per-node": "2"}))
    status = until_over(store, seconds=180)
    assert (status.state, jobs.outcomes(store)) == ("done", ["killed", "done"])
    assert status.endings[0].reason == f"process 1 on {os.uname().nodename}: killed by SIGKILL"
    there = store.bucket.find("attempts/1")
    wanted = ["outcome.json", "process-0.json", "process-1.json", "joined-0.json", "joined-1.json", "gathered.json"]
    assert {f"attempts/1/{name}" for name in wanted} <= there.keys()
    assert {name.split("/")[2] for name in there if "/log-" in name} == {"log-0.txt.d", "log-1.txt.d"}
    assert sorted(path.name.partition(".")[2] for path in store.path.parent.iterdir()) == ["", "process-1"]


class Vm:
    """A VM of a batch service's job: a home and a directory for temporary files that no other one has.

    Args:
        url: The run.
        index: Which one of the job's.
        count: How many there are.
        place: Where its disk is.
        environment: What leads to the bucket.
    """

    def __init__(self, url: str, index: int, count: int, place: Path, environment: dict[str, str]) -> None:
        self._url, self.place = url, place / f"vm-{index}"
        (self.place / "tmp").mkdir(parents=True, exist_ok=True)
        self._environment = environment | {
            contract.ENV_HOME: str(self.place / "home"),
            "TMPDIR": str(self.place / "tmp"),
            "BATCH_TASK_INDEX": str(index),
            "BATCH_TASK_COUNT": str(count),
            contract.ENV_JOB: "job-1",
            contract.ENV_BACKEND: "gcp",
        }
        self.start(0)

    def start(self, retries: int) -> None:
        """Start it, as the service does after a loss too."""
        given = os.environ | self._environment | {"BATCH_TASK_RETRY_ATTEMPT": str(retries)}
        with open(self.place / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "launch.backends.cloud.vm_job", self._url],
                env=given,
                cwd=self.place,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def lose(self) -> None:
        """Take it away at this instant, with all that runs on it."""
        for pid in [self.process.pid, *processes.descendants(self.process.pid)]:
            processes.send(pid, signal.SIGKILL)
        self.process.wait()

    def log(self) -> str:
        """Return what was printed on it."""
        return (self.place / "log").read_text()


@pytest.fixture
def vms(
    tmp_path: Path, environment: dict[str, str], specified: Callable[..., JobSpec]
) -> Iterator[tuple[Store, list[Vm]]]:
    """Yield a run that was submitted to a batch service, and its three VMs."""
    with submission.new_run(submission.prepare(specified("wait")), "gcp") as (store, _, lock):
        lock.close()
    started = [Vm(store.url, index, 3, tmp_path, environment) for index in range(3)]
    yield store, started
    for vm in started:
        vm.lose()


def _runs(store: Store, attempt: int) -> Callable[[], bool]:
    """Return what tells whether all three processes of an attempt print."""
    return lambda: len([name for name in store.bucket.find(f"attempts/{attempt}") if "/log-" in name]) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 2])
def test_a_vm_of_three_is_lost_and_comes_back(vms: tuple[Store, list[Vm]], lost: int) -> None:
    """The others end, all meet in the next attempt, and every VM ends well when the run has."""
    store, started = vms
    until(_runs(store, 0), "all three run", seconds=120)
    started[lost].lose()
    started[lost].start(1)
    codes = [vm.process.wait(timeout=150) for vm in started]
    logs = "\n".join(vm.log() for vm in started)
    assert codes == [0, 0, 0], logs
    assert sorted(store.bucket.numbers(contract.ATTEMPTS)) == [0, 1], logs
    assert (read_json(open_run(store.url), "attempts/1/outcome.json") or {})["outcome"] == "done"
    assert run_status.has_ended(open_run(store.url))
    again = Vm(store.url, 1, 3, started[1].place.parent, {})
    assert again.process.wait(timeout=60) == 0, "a run that has ended began again"
    assert sorted(Remote(store.url).numbers(contract.ATTEMPTS)) == [0, 1]

"""The life of a run, the same on every backend: a new backend gets a place here, and has to pass.

Each place is a real one or executes what it is asked to run: this machine, a SLURM cluster, a Google Batch and an AWS
Batch that start VMs as processes, with their buckets. What the command line says there is what these tests read.
"""

import contextlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest

from jobkit import contract
from jobkit.contract import State
from jobkit.errors import ConfigError
from jobkit.supervise import processes
from launch.backends import registry
from launch.lifecycle import run_status, submission
from tests.fakes.aws_batch_server import QUEUE, AwsBatchServer
from tests.fakes.gcp_batch_server import BatchServer
from tests.fakes.gcs_server import GcsServer
from tests.harness import jobs
from tests.harness.desk import Desk
from tests.harness.slurm import Cluster

COMMIT = """
    home = Store(os.environ["JOBKIT_RUN"])
    home.file("checkpoints").mkdir(exist_ok=True)
    made = commits.Commit(step=step, attempt=attempt, reason="interval", at=time.time(), files={})
    commits.publish(home, commits.new_stage(home, step, attempt), state={}, commit=made)
"""
"""A real step, without an array."""
PROGRAM = "from jobkit.rundir import commits\nfrom jobkit.rundir.store import Store\n" + re.sub(
    r"(?<=def commit\(step\):).*?(?=\n    heartbeat)", COMMIT.rstrip(), jobs.JOB, flags=re.DOTALL
).replace('Path(os.environ["JOBKIT_RUN"])', 'Store(os.environ["JOBKIT_RUN"]).path')
WATCHED_S = 90.0


@dataclass
class Place:
    """Where a run lives.

    Args:
        desk: Who submits it.
        url: The run.
        words: What a submit here says.
        preempt: Takes the machine of a run's attempt away, with notice.
        hold: Has what is submitted wait in the queue, with what options it returns; None where there is no queue.
    """

    desk: Desk
    url: str
    words: tuple[str, ...]
    preempt: Callable[[], None]
    hold: Callable[[], tuple[str, ...]] | None = None

    def submit(self, *plan: str, options: tuple[str, ...] = (), code: int = 0) -> str:
        """Submit the program; return what was said."""
        words = ("--run", self.url, *self.words, "--grace", "10s", *options, "--", "python", "job.py", *plan)
        return self.desk.jobkit("submit", *words, code=code)

    def jobkit(self, verb: str, *options: str, code: int = 0) -> str:
        """Say something about the run."""
        return self.desk.jobkit(verb, self.url, *options, code=code)

    def exists(self) -> bool:
        """Tell whether there is a run."""
        return bool(fsspec.url_to_fs(self.url)[0].exists(f"{self.url}/{contract.RUN_JSON}"))

    def watch(self, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Look again and again, and see a status that makes sense each time, until one is as wanted."""
        deadline, attempts = time.monotonic() + WATCHED_S, 0
        while True:
            told = self.desk.status(self.url)
            assert told["state"] in list(State), told
            assert told["attempts"] >= attempts, "an attempt was forgotten"
            attempts = told["attempts"]
            assert told["runner"] != "gone", told
            assert told["points"] or len(told["endings"]) in (attempts, attempts - 1), told
            if until(told):
                return told
            assert time.monotonic() < deadline, told
            assert told["runner"] == "alive", told
            time.sleep(0.2)

    def until_over(self) -> dict[str, Any]:
        """Wait for the end."""
        return self.watch(lambda told: told["state"] in ("done", "failed", "cancelled"))

    def marker(self, name: str) -> Path:
        """Return a file that the program can touch, wherever it is."""
        return self.desk.home / name

    def until_there(self, marker: Path) -> None:
        """Wait until the program has touched a file."""
        self.watch(lambda told: marker.exists())


@contextlib.contextmanager
def on_local(desk: Desk, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Yield this machine, where whoever shares it asks the supervisor to stop."""
    desk.use(monkeypatch, desk.gcs.environment())
    url = str(desk.home / "run")

    def preempt() -> None:
        store = submission.open_run(url)
        os.kill(jobs.supervisor_pid(store, store.numbers(contract.ATTEMPTS)[-1]), signal.SIGTERM)

    yield Place(desk, url, (), preempt)
    with contextlib.suppress(ConfigError):  # it is done, or was never made
        registry.cancel(url)


@contextlib.contextmanager
def on_slurm(desk: Desk, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Yield a cluster, whose nodes a job of higher priority takes."""
    cluster: Cluster = request.getfixturevalue("cluster")
    cluster.tidy()
    desk.use(monkeypatch, desk.gcs.environment() | cluster.environment)
    monkeypatch.setenv("PYTHONPATH", str(jobs.ROOT))

    def preempt() -> None:
        cluster.preempt(seconds=1)

    words = ("--on", "slurm", "-p", "requeue5")
    yield Place(desk, str(desk.home / "run"), words, preempt, lambda: ("--sbatch", "begin=now+1hour"))
    cluster.tidy()


@contextlib.contextmanager
def on_gcp(desk: Desk, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Yield a Google Batch with a bucket."""
    with BatchServer(desk.gcs.environment()) as batch:
        desk.use(monkeypatch, desk.gcs.environment() | batch.environment)

        def preempt() -> None:
            batch.preempt(list(batch.jobs.values())[-1])

        def hold() -> tuple[str, ...]:
            batch.queue_s = 3600.0
            return ()

        words = ("--on", "gcp", "--region", "us-central1", "--image", "registry/train:1")
        yield Place(desk, f"gs://bucket/runs/{random.randrange(10**9)}", words, preempt, hold)


@contextlib.contextmanager
def on_aws(desk: Desk, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Yield an AWS Batch with a bucket."""
    moto: dict[str, str] = request.getfixturevalue("moto")
    with AwsBatchServer(moto) as service:
        desk.use(monkeypatch, desk.gcs.environment() | moto | service.environment)
        fsspec.filesystem("s3").clear_instance_cache()
        bucket = f"bucket-{random.randrange(10**9)}"
        fsspec.filesystem("s3").mkdir(bucket)

        def preempt() -> None:
            service.reclaim(service.newest())

        def hold() -> tuple[str, ...]:
            service.queue_s = 3600.0
            return ()

        words = ("--on", "aws", "--queue", QUEUE, "--image", "registry/train:1")
        yield Place(desk, f"s3://{bucket}/run", words, preempt, hold)


PLACES = {"local": on_local, "slurm": on_slurm, "gcp": on_gcp, "aws": on_aws}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Seat a user at each place."""
    with GcsServer() as gcs:
        desk = Desk(tmp_path, gcs)
        desk.write(PROGRAM, "job.py")
        with PLACES[request.param](desk, request, monkeypatch) as found:
            yield found
    left = {pid for pid in processes.with_environment(contract.ENV_RUN, found.url) if processes.alive(pid)}
    assert not left, "processes of the run are left"


def test_every_backend_has_a_place() -> None:
    """A backend that lives no life here does not count."""
    assert tuple(PLACES) == registry.NAMES


@pytest.mark.slow
def test_a_life(place: Place) -> None:
    """Dry run, submit, preempted, failed, done, more with other code; what is alive or taken is refused in words."""
    begun, plan = place.marker("begun"), ("commit:1,touch:{},hold", "exit:3", "commit:9,exit:0")
    plan = (plan[0].format(begun), *plan[1:])
    assert place.submit(*plan, options=("--dry-run",))
    assert not place.exists()
    place.submit(*plan)
    place.until_there(begun)
    assert place.desk.status(place.url)["state"] == "running"
    assert re.search("already holds another job|is alive", place.submit("exit:0", code=2))
    assert "is alive" in place.jobkit("resume", code=2)
    place.preempt()
    told = place.until_over()
    assert [ending["outcome"] for ending in told["endings"]] == ["preempted", "failed", "done"], told
    assert (told["state"], told["attempts"]) == ("done", 3)
    assert "already done" in place.jobkit("cancel", code=2)
    assert "already done" in place.jobkit("resume")
    assert "attempt 2: commit:9,exit:0" in place.jobkit("logs", "--attempt", "2")
    (listed,) = json.loads(place.desk.jobkit("ls", place.url.rpartition("/")[0], "--json"))
    assert (listed["run"], listed["state"], listed["backend"]) == (told["run"], "done", told["backend"])
    place.desk.write(PROGRAM + 'print("other code", flush=True)\n', "job.py")
    place.jobkit("resume", "--new-code", "--", "python", "job.py", "read:job.py,commit:99999")
    before, told = told, place.watch(lambda told: told["state"] == "done")
    assert (told["attempts"], told["committed_step"]) == (4, 99999)
    assert "other code\n" in place.jobkit("logs", "--attempt", "3")
    (event,) = [one for one in run_status.events(submission.open_run(place.url)) if one["event"] == "new_code"]
    assert (event["changed"], event["committed"], event["attempts"]) == (["job.py"], before["committed_step"], 3)


@pytest.mark.slow
def test_a_failure_is_for_a_person(place: Place) -> None:
    """More failures than are allowed end the run; a resume begins afresh."""
    place.submit("commit:1,exit:3", "commit:2,exit:3", "commit:3,exit:0", options=("--max-failures", "1"))
    told = place.until_over()
    assert (told["state"], len(told["endings"])) == ("failed", 2), told
    assert "--max-failures" in told["reason"]
    place.jobkit("resume")
    told = place.watch(lambda told: told["state"] == "done")
    assert [ending["outcome"] for ending in told["endings"]] == ["failed", "failed", "done"]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["cancel", "stop"])
def test_a_cancel_is_for_good(place: Place, verb: str) -> None:
    """What runs saves and stops, and nothing brings it back but a person."""
    begun, again = place.marker("begun"), place.marker("again")
    place.submit(f"touch:{begun},hold", f"touch:{again},exit:0")
    place.until_there(begun)
    place.jobkit(verb)
    told = place.desk.status(place.url)
    assert (told["state"], told["attempts"]) == ("cancelled", 1), told
    assert ("stopped" if verb == "stop" else "cancelled") in told["reason"]
    time.sleep(3.0)
    assert not again.exists()
    assert place.desk.status(place.url)["state"] == "cancelled"
    place.jobkit("resume")
    told = place.watch(lambda told: told["state"] == "done")
    assert told["attempts"] == 2
    assert again.exists()


@pytest.mark.slow
def test_a_cancel_in_the_queue(place: Place) -> None:
    """What has not begun never does; where there is no queue, what is over can be cancelled too."""
    begun = place.marker("begun")
    if place.hold is None:
        place.submit("exit:3", options=("--max-failures", "0"))
        place.until_over()
    else:
        place.submit(f"touch:{begun},exit:0", options=place.hold())
        told = place.watch(lambda told: told["state"] == "queued")
        assert told["attempts"] == 0
    place.jobkit("cancel")
    time.sleep(2.0)
    assert place.desk.status(place.url)["state"] == "cancelled"
    assert not begun.exists()


@pytest.mark.slow
def test_setup_lines(place: Place) -> None:
    """Lines of --setup go before each job, a successor too; a resume asks for them, as no run directory has them."""
    line = "export WORD='from  setup'"
    if place.hold is None:  # no jobs
        assert "--setup is for --on slurm or gcp or aws" in place.submit("exit:0", options=("--setup", line), code=2)
        assert not place.exists()
        place.submit("exit:1")
        place.until_over()
        assert "--setup is for --on slurm or gcp or aws" in place.jobkit("resume", "--setup", line, code=2)
        return
    place.desk.write('import os; print(os.environ.get("WORD"), flush=True)\n' + PROGRAM, "job.py")
    assert line in place.submit("exit:0", options=("--setup", line, "--dry-run")).replace("\\n", "\n")
    begun = place.marker("begun")
    place.submit(f"touch:{begun},hold", "exit:3", "exit:0", options=("--setup", line, "--max-failures", "0"))
    place.until_there(begun)
    place.preempt()
    assert place.until_over()["attempts"] == 2
    assert "from  setup" not in fsspec.open(f"{place.url}/{contract.RUN_JSON}").open().read().decode()
    assert "never taken from a run directory" in place.jobkit("resume", code=2)
    place.jobkit("resume", "--setup", line)
    assert place.watch(lambda told: told["state"] == "done")["attempts"] == 3
    for attempt in "012":
        assert "from  setup\n" in place.jobkit("logs", "--attempt", attempt)


@pytest.mark.slow
def test_sweep(place: Place) -> None:
    """Each point is a run, with its own end."""
    place.submit("exit:{code}", options=("--sweep", "code=0,3", "--max-failures", "0"))
    told = place.watch(lambda told: told["state"] in ("done", "failed", "cancelled"))
    assert [point["state"] for point in told["points"]] == ["done", "failed"]


@pytest.mark.slow
def test_a_move(place: Place) -> None:
    """Stopped here, it goes on at this machine; the move is in the ledger, and the attempts go on counting."""
    begun = place.marker("begun")
    place.submit(f"touch:{begun},hold", "exit:0")
    place.until_there(begun)
    assert "is alive" in place.jobkit("resume", "--on", "local", "--price-per-hour", "2", code=2)
    before = place.desk.status(place.url)["backend"]
    place.jobkit("stop")
    place.jobkit("resume", "--on", "local", "--price-per-hour", "2")
    told = place.watch(lambda told: told["state"] == "done")
    assert (told["backend"], told["attempts"]) == ("local", 2)
    moves = [event for event in run_status.events(submission.open_run(place.url)) if event["event"] == "moved"]
    assert [(event["source"], event["target"]) for event in moves] == [(before, "local")] * (before != "local")

"""A shared disk that does not answer for a while under jobs of a real SLURM cluster: they go on by themselves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness import jobs
from tests.harness.login import Login
from tests.harness.outage import Outage

PROGRAM = ("sh", "-c", "test $JOBKIT_ATTEMPT != 0 || exec sleep 300")
"""Waits in its first attempt, and is done in the second."""


def submit(login: Login, outage: Outage, monkeypatch: pytest.MonkeyPatch) -> str:
    """Submit the program, with all that SLURM starts for it under the outage; return once it runs."""
    with monkeypatch.context() as patch:
        for name, value in outage.environ.items():
            patch.setenv(name, value)
        job = login.submit_command(*PROGRAM)
    jobs.until(lambda: jobs.program_pid(login.store), "the program runs", seconds=60)
    return job


@pytest.mark.slow
def test_a_job_goes_on_after_an_outage(login: Login, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program is killed while the disk does not answer: the batch process waits, and goes on in the same job."""
    outage = Outage(tmp_path, login.store.path)
    job = submit(login, outage, monkeypatch)
    with outage.during():
        os.kill(jobs.program_pid(login.store), signal.SIGKILL)
        time.sleep(6)
        assert login.cluster.job(job)["JobState"] == "RUNNING"
    told = login.until(lambda told: told["state"] in ("done", "failed"))
    assert (told["state"], told["job"]) == ("done", job)
    assert [outcome["outcome"] for outcome in login.outcomes()] == ["killed", "done"]
    printed = "".join(path.read_text() for path in login.store.file("slurm").glob("*.out"))
    assert printed.count("asking again until the storage answers") >= 1
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_job_that_starts_in_an_outage(login: Login, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that SLURM stops and starts again, all while the disk does not answer, goes on when it does."""
    outage = Outage(tmp_path, login.store.path)
    job = submit(login, outage, monkeypatch)
    with outage.during():
        login.cluster.run("scontrol", "requeue", job)
        login.cluster.wait_state(job, "PENDING")
        login.cluster.start_now(job)
        login.cluster.wait_state(job, "RUNNING")
        time.sleep(5)
        assert login.cluster.job(job)["JobState"] == "RUNNING"
    told = login.until(lambda told: told["state"] in ("done", "failed"))
    assert (told["state"], told["attempts"]) == ("done", 2)
    assert [outcome["outcome"] for outcome in login.outcomes()] == ["preempted", "done"]


STARTS = """
import sys
from jobkit.errors import StorageError
from launch.backends.slurm import job as slurm_job
outage, real = iter([StorageError("the bucket does not answer")]), slurm_job.open_run

def open_run(url):
    for error in outage:
        raise error
    return real(url)

slurm_job.open_run = open_run
sys.exit(slurm_job.main(sys.argv[1:]))
"""
"""What a job runs, on a node that does not reach the bucket in the time that a person at a prompt would wait."""


def test_a_job_that_starts_while_the_bucket_does_not_answer(tmp_path: Path) -> None:
    """It asks again, and finds out what is to be done, instead of ending a run that nobody would start again."""
    for project in jobs.project(tmp_path):
        store = project.submit("exit:0")
        jobs.until_over(store)
    ended = subprocess.run(
        [sys.executable, "-c", STARTS, store.url],
        env=os.environ | {"SLURM_JOB_ID": "7", "PYTHONPATH": str(jobs.ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "asking again until the storage answers" in ended.stderr
    assert "this job has nothing to do" in ended.stderr

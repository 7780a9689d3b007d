"""More preemptions than a batch service starts one job again: the job submits its successor, once, and it goes on."""

import contextlib
import io
import random
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from jobkit.contract import State
from jobkit.rundir import mirror
from launch.lifecycle import run_status, submission
from tests.cloud.conftest import GCP
from tests.fakes.aws_batch_server import QUEUE, AwsBatchServer
from tests.fakes.gcp_batch_server import BatchServer
from tests.fakes.gcs_server import GcsServer
from tests.harness.desk import URL, Desk
from tests.launch.test_conformance import PROGRAM


def submit(desk: Desk, plan: list[str], *options: str) -> str:
    """Submit the program; return what was said beside what was printed."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        desk.jobkit(*GCP, "--grace", "10s", *options, "--", "python", "job.py", *plan, errors=False)
    return errors.getvalue()


def newest(batch: BatchServer) -> Any:
    """Return the job that was created last."""
    return list(batch.jobs.values())[-1]


def holding(desk: Desk, attempt: int) -> None:
    """Wait until an attempt of the program holds, with a status that makes sense each time."""

    def condition(told: dict[str, Any]) -> bool:
        assert told["state"] in ("queued", "running", "requeued"), told
        assert told["runner"] == "alive", told
        return (desk.home / f"held-{attempt}").exists()

    desk.until(condition)


def plan(desk: Desk, holds: int) -> list[str]:
    """Return what the attempts do: hold until they are preempted, so often; then end well."""
    return [*(f"touch:{desk.home}/held-{attempt},hold" for attempt in range(holds)), "exit:0"]


def ids(batch: BatchServer) -> list[str]:
    """Return the numbers of the jobs there are."""
    return [job.id.rpartition("-")[2] for job in batch.jobs.values()]


@pytest.mark.slow
def test_preempted_25_times(desk: Desk, batch: BatchServer) -> None:
    """Three jobs, one after the other, and every status on the way makes sense; no attempt is lost or repeated."""
    submit(desk, plan(desk, 25))
    for attempt in range(25):
        holding(desk, attempt)
        batch.preempt(newest(batch))
    told = desk.until_over()
    assert (told["state"], told["attempts"]) == ("done", 26), told
    assert {ending["outcome"] for ending in told["endings"][:25]} == {"preempted"}
    newest(batch).thread.join(20)
    assert [job.codes for job in batch.jobs.values()] == [[75] * 9 + [0], [75] * 9 + [0], [75] * 5 + [0]]
    assert ids(batch) == ["0", "1", "2"]
    assert told["job"] == newest(batch).id


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["without a notice", "before", "after"])
def test_lost_where_it_hands_over(desk: Desk, batch: BatchServer, lost: str) -> None:
    """The VM goes before it can ask, before the service has heard it, or before the answer: there is one successor."""
    batch.lives = 9
    submit(desk, plan(desk, 1), "--setup", "export WORD=1", "--max-restarts", "12")
    holding(desk, 0)
    first = newest(batch)
    if lost == "without a notice":
        batch.power_off(first)
    else:
        batch.lose_at_submit = [lost]
        batch.preempt(first)
    told = desk.until_over()
    assert (told["state"], told["attempts"]) == ("done", 2), told
    assert told["endings"][0]["outcome"] == "preempted"
    first.thread.join(20)
    assert first.codes[9:] == [50001, 0]
    assert ids(batch) == ["0", "1"]
    task = newest(batch).asked["taskGroups"][0]["taskSpec"]
    assert task["maxRetryCount"] == (1 if lost == "without a notice" else 2)
    assert "export WORD=1" in str(task["runnables"][0]["container"]["commands"])


@pytest.mark.slow
def test_lost_for_good_where_it_hands_over(desk: Desk, batch: BatchServer) -> None:
    """In the last life of a job that is so too: the run has failed, and a resume is the very job that was meant."""
    batch.lives = 10
    batch.lose_at_submit = ["before"]
    submit(desk, plan(desk, 0))
    told = desk.until_over()
    assert told["state"] == "failed", told
    assert "its 10 restarts are used up; continue with: jobkit resume" in told["reason"]
    desk.jobkit("resume", URL)
    assert desk.until_over()["state"] == "done"
    assert ids(batch) == ["0", "1"]
    events = run_status.events(submission.open_run(URL))
    told_of = [event["event"] for event in events if event["event"] in ("resumed", "job")]
    assert told_of[-2:] == ["resumed", "job"], "what it has of a job since then is in the ledger too"


@pytest.mark.slow
def test_without_the_role(desk: Desk, batch: BatchServer) -> None:
    """It is said at the submit, written down when it happens, and the run ends as one whose restarts are used up."""
    batch.cloud.bindings.clear()
    batch.lives = 9
    said = submit(desk, plan(desk, 2))
    assert "roles/batch.jobsEditor" in said
    assert "after 10 restarts" in said
    for attempt in range(2):
        holding(desk, attempt)
        if attempt:
            batch.power_off(newest(batch))
        else:
            batch.preempt(newest(batch))
    told = desk.until_over()
    assert told["state"] == "failed", told
    assert "its 10 restarts are used up; continue with: jobkit resume" in told["reason"]
    store = submission.open_run(URL)
    refused = [str(event["refused"]) for event in run_status.events(store) if "refused" in event]
    assert len(refused) == 2, "that of the last VM, which was lost without a notice, is on the URL too"
    assert all("roles/batch.jobsEditor" in why for why in refused)
    assert "roles/batch.jobsEditor" in desk.jobkit("explain", URL)
    assert ids(batch) == ["0"]
    batch.cloud.bindings.append({"role": "roles/editor", "members": ["serviceAccount:x"]})
    desk.jobkit("resume", URL)
    assert desk.until_over()["state"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize(("before", "jobs"), [(18, ["0", "1"]), (19, ["0"])])
def test_lost_before_any_attempt(desk: Desk, batch: BatchServer, before: int, jobs: list[str]) -> None:
    """The twentieth VM in a row that comes up without an attempt begun submits no other job: that would go on for ever.

    What earlier ones wrote down of themselves is put into the ledger while the job waits.
    """
    batch.lives, batch.queue_s = 10, 4.0
    submit(desk, plan(desk, 0))
    store = submission.open_run(URL)
    for restarts in range(before):
        submission.record(store, "job_started", job="earlier", backend="gcp", restarts=restarts, attempts=0)
    mirror.upload_ledger(store)
    assert desk.until_over()["state"] == "done"
    assert ids(batch) == jobs
    events = run_status.events(submission.open_run(URL))
    begun = [event["attempts"] for event in events if event["event"] == "job_started"][before:]
    assert begun == [0] * len(jobs)
    refused = [str(event["refused"]) for event in events if "refused" in event]
    assert refused == (["20 VMs in a row were lost before they began an attempt"] if before == 19 else [])


@pytest.mark.slow
def test_a_cancel_follows_the_successor(desk: Desk, batch: BatchServer) -> None:
    """The successor waits for a VM: it is what status names, `resume` refuses and `cancel` ends."""
    batch.lives = 9
    submit(desk, plan(desk, 1))
    holding(desk, 0)
    batch.queue_s = 60.0
    batch.preempt(newest(batch))
    told = desk.until(lambda told: told["state"] == "requeued")
    deadline = time.monotonic() + 20
    while len(batch.jobs) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    told = desk.status()
    assert (told["state"], told["job"]) == ("requeued", newest(batch).id), told
    assert "is alive: job" in desk.jobkit("resume", URL, code=2)
    desk.jobkit("cancel", URL)
    assert newest(batch).state == "CANCELLED"
    assert desk.status()["state"] == "cancelled"


@pytest.mark.slow
def test_on_aws(moto: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tenth instance of a job on AWS Batch submits another job."""
    with GcsServer() as unused, AwsBatchServer(moto) as service:
        desk = Desk(tmp_path, unused)
        desk.use(monkeypatch, moto | service.environment)
        fsspec.filesystem("s3").clear_instance_cache()
        bucket = f"bucket-{random.randrange(10**9)}"
        fsspec.filesystem("s3").mkdir(bucket)
        desk.write(PROGRAM, "job.py")
        url = f"s3://{bucket}/run"
        words = ("--on", "aws", "--queue", QUEUE, "--image", "registry/train:1", "--run", url)
        service.lives = 8
        desk.jobkit("submit", *words, "--", "python", "job.py", *plan(desk, 1))
        desk.until(lambda told: (desk.home / "held-0").exists(), url=url)
        service.reclaim(service.newest())
        told = desk.until(lambda told: State(told["state"]).over, url=url)
        assert (told["state"], told["attempts"]) == ("done", 2), told
        assert [job.name.rpartition("-")[2] for job in service.jobs.values()] == ["0", "1"]
        service.newest().thread.join(20)
        assert [job.codes[-1] for job in service.jobs.values()] == [0, 0]

"""Sweeps on Google Batch: each point is a run in the bucket with a job of its own, at most so many at once."""

import os
import shutil
import subprocess
import sys
import time
from typing import Any

import pytest

from jobkit import contract
from launch.lifecycle import run_status, submission
from tests.cloud.conftest import GCP
from tests.fakes.gcp_batch_server import BatchServer, RefusedError
from tests.harness.desk import URL, Desk


def submit(
    desk: Desk, *options: str, plan: tuple[str, ...] = ("exit:0,exit:{a}",), last: int = 5, code: int = 0
) -> str:
    """Submit a sweep of points 0 to `last`."""
    words = ("--grace", "10s", "--sweep", f"a=0..{last}", *options, "--", "python", "job.py", *plan)
    return desk.jobkit(*GCP, *words, code=code)


def live(batch: BatchServer) -> list[Any]:
    """Return the jobs that are not over."""
    return [job for job in batch.jobs.values() if not job.over]


@pytest.mark.slow
def test_preempted_again_and_again(desk: Desk, batch: BatchServer) -> None:
    """Six points, two at once, each preempted once: all finish, and every status on the way makes sense."""
    submit(desk, "--array-parallelism", "2", plan=(f"touch:{desk.home}/held-{{a}},hold", "exit:0"))
    preempted: set[str] = set()
    deadline = time.monotonic() + 300
    while (told := desk.status())["state"] != "done":
        assert time.monotonic() < deadline, told
        assert told["state"] in ("queued", "running", "requeued"), told
        assert [point["runner"] in ("alive", "ended") for point in told["points"]] == [True] * 6, told
        assert len(live(batch)) <= 2 + 1, "a job submits the next one before it ends itself"
        for number, point in enumerate(told["points"]):
            job = next((one for one in live(batch) if one.id == point["job"]), None)
            if job is not None and job.id not in preempted and (desk.home / f"held-{number}").exists():
                preempted.add(job.id)
                batch.preempt(job)
    assert [point["state"] for point in told["points"]] == ["done"] * 6
    assert len(batch.jobs) == 6
    assert len(preempted) == 6
    assert [point["attempts"] for point in told["points"]] == [2] * 6
    assert desk.jobkit("ls", URL.rpartition("/")[0]).count(URL) == 1
    assert "already done" in desk.jobkit("resume", URL)


@pytest.mark.slow
def test_cancel_and_resume(desk: Desk, batch: BatchServer) -> None:
    """A cancel ends what runs, what waits for a VM and what waits for another point; a resume takes up all of them."""
    batch.queue_s = 3600.0
    submit(desk, "--array-parallelism", "2")
    told = desk.status()
    assert (told["state"], len(batch.jobs)) == ("queued", 2), told
    assert "waits until point 0 is over" in told["points"][2]["reason"]
    assert "is alive" in desk.jobkit("resume", URL, code=2)
    desk.jobkit("cancel", URL)
    assert {point["state"] for point in desk.status()["points"]} == {"cancelled"}
    assert not live(batch)
    batch.queue_s = 0.0
    desk.jobkit("resume", URL)
    told = desk.until_over()
    assert {point["state"] for point in told["points"]} == {"done"}, told
    assert len(batch.jobs) == 8
    assert "exit:0" in desk.jobkit("logs", URL)


@pytest.mark.slow
def test_a_submit_that_is_killed_and_repeated(desk: Desk, batch: BatchServer) -> None:
    """SIGKILL before the service hears of the third job: the same submit again ends with one job for each point.

    Its lines of --setup, which are not in run.json, are in each.
    """
    options = ("--grace", "10s", "--sweep", "a=0..5", "--setup", "export WORD=1")
    words = (*options, "--", "python", "job.py", "exit:0,exit:{a}")
    batch.queue_s = 3600.0
    environ = os.environ | {contract.ENV_FAULT: "before_create:3"}
    killed = subprocess.run([sys.executable, "-m", "launch", *GCP, *words], env=environ, check=False)
    assert (killed.returncode, len(batch.jobs)) == (-9, 2)
    desk.jobkit(*GCP, *words)
    assert len(batch.jobs) == 6
    commands = [job.asked["taskGroups"][0]["taskSpec"]["runnables"][0]["container"]["commands"] for job in live(batch)]
    assert ["export WORD=1" in str(each) for each in commands] == [True] * 6
    assert [point["state"] for point in desk.status()["points"]] == ["queued"] * 6
    assert "already holds this very job" in desk.jobkit(*GCP, *words, code=2)
    assert len(batch.jobs) == 6


@pytest.mark.slow
def test_a_refusal_leaves_nothing(desk: Desk, batch: BatchServer) -> None:
    """Where the service refuses the third job, the first two end, one of which trains, and nothing of a run is left."""
    create, made = batch._create, []

    def refuse(*asked: Any) -> dict[str, Any]:
        if len(made) == 2:
            deadline = time.monotonic() + 20
            while not (desk.home / "held-0").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            raise RefusedError(403, "PERMISSION_DENIED", "Permission 'batch.jobs.create' denied.")
        made.append(asked)
        return create(*asked)

    plan = (f"touch:{desk.home}/held-{{a}},hold",)
    batch._create = refuse  # type: ignore[method-assign]
    assert "roles/batch.jobsEditor" in submit(desk, plan=plan, code=2)
    assert (desk.home / "held-0").exists()
    assert (len(batch.jobs), live(batch), desk.gcs.names()) == (2, [], [])
    batch.queue_s, batch._create = 3600.0, create  # type: ignore[method-assign]
    submit(desk, plan=plan)
    assert len(live(batch)) == 6
    assert desk.status()["state"] == "queued"


@pytest.mark.slow
def test_without_the_role(desk: Desk, batch: BatchServer) -> None:
    """A point that is over cannot have the next one begin: it is written down, and a resume goes on, no submit."""
    batch.cloud.bindings.clear()
    submit(desk, "--array-parallelism", "5")
    told = desk.until(lambda told: told["state"] == "failed")
    assert [point["state"] for point in told["points"]] == ["done"] * 5 + ["failed"]
    events = run_status.events(submission.open_run(f"{URL}/points/0"))
    assert [str(event["refused"]) for event in events if "refused" in event]
    said = desk.jobkit("explain", f"{URL}/points/0")
    assert "The next point of the sweep could not be submitted: Google Batch refused" in said
    assert "continue it with 'jobkit resume" in submit(desk, "--array-parallelism", "5", code=2)
    desk.jobkit("resume", URL)
    assert desk.until_over()["state"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["rm", "elsewhere"])
def test_removed_and_submitted_again(desk: Desk, batch: BatchServer, how: str) -> None:
    """A sweep that was removed, by us or by other means, is trained anew by the same submit: nothing here outlives it.

    A point alone is not removed, and nothing is while a job of a point that is done is leaving.
    """
    batch.settle_s = 2.0
    submit(desk, last=1)
    assert desk.until_over()["state"] == "done"
    assert "is a point of a sweep: remove the sweep" in desk.jobkit("rm", f"{URL}/points/1", "--yes", code=2)
    if how == "rm":
        desk.jobkit("rm", URL, "--yes")
        assert not live(batch)
        assert not [path for path in (desk.home / "disk").iterdir() if path.name.startswith(("0-", "1-"))]
    else:
        for job in batch.jobs.values():
            job.thread.join(20)
        for name in desk.gcs.names():
            desk.gcs.remove(name)
    assert not desk.gcs.names()
    submit(desk, last=1)
    assert len(batch.jobs) == 4
    told = desk.until_over()
    assert (told["state"], told["attempts"]) == ("done", 2), told


@pytest.mark.slow
def test_an_outage_where_a_lane_goes_on(desk: Desk, batch: BatchServer) -> None:
    """While the service takes no job of the next point, that of the last one is started again, and asks again."""
    create = batch._create

    def unwell(*asked: Any) -> dict[str, Any]:
        if batch.jobs and not batch.only_job().codes:
            raise RefusedError(503, "UNAVAILABLE", "The service is currently unavailable.")
        return create(*asked)

    batch._create = unwell  # type: ignore[method-assign]
    submit(desk, "--array-parallelism", "1", last=1)
    told = desk.until_over()
    assert (told["state"], len(batch.jobs)) == ("done", 2), told
    first, _ = batch.jobs.values()
    first.thread.join(20)
    assert first.codes == [75, 0]
    assert [point["attempts"] for point in told["points"]] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("--no-wait",)], ids=["waiting", "not waiting"])
def test_one_point_that_waits_is_cancelled(desk: Desk, batch: BatchServer, how: tuple[str, ...]) -> None:
    """Without a VM that could do it the next point of its lane is submitted, but only where it held a place."""
    batch.queue_s = 3600.0
    submit(desk, "--array-parallelism", "2")
    desk.jobkit("cancel", f"{URL}/points/3", *how)
    assert len(batch.jobs) == 2
    desk.jobkit("cancel", f"{URL}/points/0", *how)
    told = desk.status()["points"]
    assert [point["state"] for point in told] == ["cancelled", *["queued"] * 2, "cancelled", *["queued"] * 2]
    assert sorted(job.id for job in live(batch)) == sorted(told[number]["job"] for number in (1, 2))
    assert "waits until point 2 is over" in told[4]["reason"]
    desk.jobkit("cancel", URL)
    assert not live(batch)
    assert len(batch.jobs) == 3


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [(), ("--array-parallelism", "2")], ids=["all", "lanes"])
def test_the_status_of_a_submit_that_was_killed(desk: Desk, batch: BatchServer, parallel: tuple[str, ...]) -> None:
    """Status, ls and cancel of a sweep of which only some points were made say what there is, on any machine."""
    words = ("--grace", "10s", "--sweep", "a=0..3", *parallel, "--", "python", "job.py", "exit:0,exit:{a}")
    batch.queue_s = 3600.0
    environ = os.environ | {contract.ENV_FAULT: "before_create:2"}
    killed = subprocess.run([sys.executable, "-m", "launch", *GCP, *words], env=environ, check=False)
    assert (killed.returncode, len(batch.jobs)) == (-9, 1)
    prefix = URL.removeprefix("gs://bucket/")
    for name in desk.gcs.names(prefix=f"{prefix}/points/2/") + desk.gcs.names(prefix=f"{prefix}/points/3/"):
        desk.gcs.remove(name)
    shutil.rmtree(desk.home / "disk")
    told = desk.status()
    assert (told["state"], len(told["points"])) == ("queued", 4), told
    assert told["points"][3]["runner"] == "gone", told
    assert URL.rpartition("/")[2] in desk.jobkit("ls", URL.rpartition("/")[0])
    desk.jobkit(*GCP, *words)
    batch.queue_s = 0.0
    desk.jobkit("cancel", URL)
    assert {point["state"] for point in desk.status()["points"]} == {"cancelled"}

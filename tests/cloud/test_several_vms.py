"""Runs on several VMs of Google Batch, which share nothing but the bucket; each is lost, and comes back, alone."""

import json
from typing import Any

import numpy as np
import pytest

import jobkit
from tests.cloud.conftest import GCP
from tests.fakes.gcp_batch_server import BatchServer, Job
from tests.harness.desk import URL, Desk

PROGRAM = '''\
"""apart.py: hold until a signal comes, in as many attempts as the first word says; end well in the next one."""
import os, pathlib, signal, sys, time
attempt = int(os.environ["JOBKIT_ATTEMPT"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path(sys.argv[2], f"held-{attempt}-{os.environ['JOBKIT_PROCESS']}").touch()
if attempt < int(sys.argv[1]):
    time.sleep(600)
'''
STEPS = 2000
TRAIN = f"""
import os, sys, time
import jobkit
jobkit.initialize()
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
start = np.arange(12, dtype=np.float32).reshape(6, 2)
pause_s = 0.5 if int(os.environ["JOBKIT_ATTEMPT"]) < int(sys.argv[1]) else 0.0
with jobkit.Run(os.environ["JOBKIT_RUN"], save_every="4 steps" if pause_s else "500 steps") as run:
    run.resume(total=jax.make_array_from_callback((6, 2), rows, lambda index: start[index]), seen=0)
    for step in run.steps({STEPS}):
        run.state.total += float(step)
        run.state.seen += 1
        time.sleep(pause_s)
"""


def submit(desk: Desk, nodes: int, holds: int, *options: str) -> str:
    """Submit the program."""
    desk.write(PROGRAM, "apart.py")
    words = ("--nodes", str(nodes), "--grace", "10s", *options)
    return desk.jobkit(*GCP, *words, "--", "python", "apart.py", str(holds), str(desk.home))


def newest(batch: BatchServer) -> Job:
    """Return the job that was created last."""
    return list(batch.jobs.values())[-1]


def holding(desk: Desk, attempt: int, nodes: int) -> int:
    """Wait until all processes of an attempt hold, or of a later one, with a status that makes sense each time.

    Returns:
        The attempt.
    """

    def condition(told: dict[str, Any]) -> bool:
        assert told["state"] in ("queued", "running", "requeued"), told
        assert told["runner"] == "alive", told
        newest = told["attempts"] - 1
        return newest >= attempt and all((desk.home / f"held-{newest}-{index}").exists() for index in range(nodes))

    return int(desk.until(condition, seconds=240)["attempts"]) - 1


def lose(batch: BatchServer, index: int, *, notice: bool) -> None:
    """Take the VM of a task of the newest job away."""
    if notice:
        batch.preempt(newest(batch), index)
    else:
        batch.power_off(newest(batch), index)


def ended(batch: BatchServer) -> list[str]:
    """Wait until the service has ended its jobs; return how."""
    for job in batch.jobs.values():
        job.thread.join(30)
    return [job.state for job in batch.jobs.values()]


def test_what_is_asked_for(desk: Desk) -> None:
    """The request has a task for each VM and no VM with two of them; what is no number is refused, elsewhere too."""
    group = json.loads(submit(desk, 3, 0, "--dry-run"))["taskGroups"][0]
    assert {name: group[name] for name in group if name != "taskSpec"} == {
        "taskCount": "3", "parallelism": "3", "taskCountPerNode": "1",
    }  # fmt: skip
    words = ("--image", "registry/train:1", "--run", URL, "--dry-run", "--", "python", "apart.py")
    assert "'0' is no number of VMs" in desk.jobkit(*GCP, "--nodes", "0", *words[4:], code=2)
    refused = desk.jobkit(*GCP, "--nodes", "2", "--ntasks-per-node", "2", *words[4:], code=2)
    assert "of several VMs each has one process" in refused
    for on, rest in (("local", words[4:]), ("aws", words)):
        assert "--nodes is for --on slurm or gcp" in desk.jobkit("submit", "--on", on, "--nodes", "2", *rest, code=2)


@pytest.mark.slow
def test_each_is_lost_and_comes_back(desk: Desk, batch: BatchServer) -> None:
    """The others wait where they are for a lost one, meet it in the next attempt, and all tasks end well."""
    submit(desk, 3, 2)
    holding(desk, 0, 3)
    lose(batch, 2, notice=False)
    holding(desk, 1, 3)
    lose(batch, 0, notice=True)
    told = desk.until_over()
    assert (told["state"], told["attempts"]) == ("done", 3), told
    assert ended(batch) == ["SUCCEEDED"]
    assert [task.codes for task in newest(batch).members] == [[75, 0], [0], [50001, 0]]


@pytest.mark.slow
def test_a_cancel_reaches_all(desk: Desk, batch: BatchServer) -> None:
    """Also while one VM of two is waited for: nothing runs afterwards, and the run is cancelled."""
    submit(desk, 2, 9)
    holding(desk, 0, 2)
    batch.boot_s = 60.0
    lose(batch, 1, notice=True)
    desk.until(lambda told: told["attempts"] == 2)
    assert desk.status()["state"] == "running"
    desk.jobkit("cancel", URL)
    assert desk.status()["state"] == "cancelled"
    assert not newest(batch).members[0].vm


@pytest.mark.slow
def test_another_vm_uses_its_restarts_up(desk: Desk, batch: BatchServer) -> None:
    """The first VM has never been lost: its job submits the successor because another one's restarts run out."""
    batch.lives = {1: 9}
    submit(desk, 2, 2)
    holding(desk, 0, 2)
    lose(batch, 1, notice=True)
    holding(desk, 1, 2)
    assert len(batch.jobs) == 2
    lose(batch, 1, notice=False)
    told = desk.until_over()
    assert (told["state"], told["attempts"], told["job"]) == ("done", 3, newest(batch).id), told
    assert ended(batch) == ["SUCCEEDED", "SUCCEEDED"]


@pytest.mark.slow
def test_restarts_that_one_has_used_up(desk: Desk, batch: BatchServer) -> None:
    """With --max-restarts the others do not wait for ever for a VM that does not come back."""
    batch.given["JOBKIT_GATHER_S"] = "6"
    submit(desk, 2, 99, "--max-restarts", "1")
    attempt = holding(desk, 0, 2)
    lose(batch, 1, notice=True)
    holding(desk, attempt + 1, 2)
    lose(batch, 1, notice=True)
    told = desk.until_over()
    assert told["state"] == "failed", told
    assert told["reason"].startswith("process 1 did not come: its restarts are used up; continue with: jobkit resume")
    assert ended(batch) == ["FAILED"]


@pytest.mark.slow
def test_a_training_on_three(desk: Desk, batch: BatchServer) -> None:
    """Twice one of them is taken away with notice: all commit and go on from there, every step is done once."""
    desk.write(TRAIN, "train.py")
    desk.jobkit(*GCP, "--nodes", "3", "--grace", "10s", "--", "python", "train.py", "2")
    for attempt, index in enumerate((2, 1)):
        desk.until(lambda told: told["attempts"] == attempt + 1, seconds=300)  # noqa: B023
        desk.until_committed(max(desk.committed(), default=0) + 1, seconds=180)
        lose(batch, index, notice=True)
    told = desk.until_over(seconds=400)
    assert (told["state"], told["attempts"]) == ("done", 3), told
    assert [ending["outcome"] for ending in told["endings"]] == ["preempted", "preempted", "done"]
    assert ended(batch) == ["SUCCEEDED"]
    assert [task.codes for task in newest(batch).members] == [[0], [75, 0], [75, 0]]
    assert desk.committed()[-1] == STEPS
    state = jobkit.load(URL, total=np.zeros((6, 2), np.float32), seen=0)
    assert state.seen == STEPS
    assert (np.asarray(state.total) == np.arange(12).reshape(6, 2) + STEPS * (STEPS - 1) // 2).all()


@pytest.mark.slow
def test_a_vm_comes_late(desk: Desk, batch: BatchServer) -> None:
    """One that waits for capacity longer than the others wait for it: they try again, until it is there."""
    batch.given["JOBKIT_GATHER_S"] = "4"
    submit(desk, 2, 1)
    holding(desk, 0, 2)
    batch.boot_s = 12.0
    lose(batch, 1, notice=True)
    told = desk.until_over()
    assert told["state"] == "done", told
    assert told["attempts"] >= 3, "no attempt was begun while it was away"
    assert ended(batch) == ["SUCCEEDED"]

"""Sweeps on a real cluster: one array, points that live and die on their own, and a status that is right throughout."""

import json
import random
import time
from typing import Any

import pytest

from jobkit.rundir.store import Store
from launch.lifecycle import run_status
from tests.harness.login import Login
from tests.harness.slurm import SlurmError

_PROGRAM = """\
import json, os, signal, sys, time
from pathlib import Path
from jobkit.supervise.heartbeat import Heartbeat, Phase
run, told, (number, steps, pause) = Path(os.environ["JOBKIT_RUN"]), [], map(float, sys.argv[1:4])
heartbeat = Heartbeat(Path(os.environ["JOBKIT_SUPERVISOR"]))
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
heartbeat.enter(Phase.LISTENING)
def commit(step):
    (run / f"checkpoints/{step}").mkdir(parents=True, exist_ok=True)
    (run / f"checkpoints/{step}/commit.json").write_text("{}")
    heartbeat.committed_step = step
step = max([0, *(int(path.parent.name) for path in run.glob("checkpoints/*/commit.json"))])
while step < steps and not told:
    time.sleep(pause)
    step += 1
    heartbeat.step = step
    heartbeat.beat()
    print(json.dumps([number, step]), flush=True)
    if step % 10 == 0:
        commit(step)
commit(step)
if step < steps:
    heartbeat.enter(Phase.STOPPED)
    sys.exit(75)
heartbeat.enter(Phase.FINISHED)
"""


def submit(login: Login, *options: str, steps: int = 40, pause_s: float = 0.1) -> str:
    """Submit a sweep over x; return the array's number."""
    (login.home / "train.py").write_text(_PROGRAM)
    return login.submit_command("python", "train.py", "{x}", str(steps), str(pause_s), options=options)


def point(login: Login, number: int) -> Store:
    """Return the run of a point."""
    return Store(login.home / "run" / "points" / str(number))


def counted(login: Login, number: int) -> list[int]:
    """Return the steps that a point has done, over all its attempts; each was done with the point's own value."""
    steps = []
    for attempt in point(login, number).numbers("attempts"):
        log = point(login, number).file(f"attempts/{attempt}/log-0.txt")  # of one killed at once there is none
        for line in log.read_text().splitlines() if log.exists() else ():
            if line.startswith("["):
                value, step = json.loads(line)
                assert value == number + 1
                steps.append(step)
    return steps


@pytest.mark.slow
def test_twenty_points_under_random_preemptions(login: Login) -> None:
    """Twenty points on nodes that are taken away at random: all end complete, and the status is right at every poll."""
    draw = random.Random(20)
    submit(login, "-p", "requeue5", "--sweep", "x=1..20", "--sbatch", "cpus-per-task=2", pause_s=0.15)
    before: list[dict[str, Any]] = []
    deadline, preemptions = time.monotonic() + 150, 0
    while True:
        told = login.status()
        assert time.monotonic() < deadline, told
        points = told["points"]
        assert [p["values"] for p in points] == [{"x": str(number)} for number in range(1, 21)]
        states = {p["state"] for p in points}
        assert states <= {"queued", "running", "requeued", "done"}, told
        for old, new in zip(before, points, strict=False):
            assert old["state"] != "done" or new["state"] == "done", (old, new)
            assert new["attempts"] >= old["attempts"], (old, new)
            assert (new["committed_step"] or 0) >= (old["committed_step"] or 0), (old, new)
            assert new["state"] != "queued" or old["state"] == "queued", (old, new)
            assert new["state"] != "done" or new["committed_step"] == 40, new
        assert (told["state"] == "done") == (states == {"done"})
        if states == {"done"}:
            break
        before = points
        if preemptions < 8 and "running" in states:
            preemptions += 1
            login.cluster.preempt([draw.choice(login.cluster.nodes)], seconds=0.2)
        time.sleep(0.7)
    attempts = [p["attempts"] for p in points]
    assert preemptions > 2
    assert sum(attempts) > 20, "no preemption hit"
    for number in range(20):
        assert counted(login, number) == list(range(1, 41)), "a step was lost or done twice"
    login.until_no_job()


@pytest.mark.slow
def test_a_thousand_points(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand points are one sbatch and five files; they start with their own values, and a cancel ends all."""
    count = login.home / "count"
    (login.home / "bin").mkdir()
    shim = login.home / "bin" / "sbatch"
    shim.write_text(f'#!/bin/sh\necho >> {count}\nexec {login.cluster.slurm.programs["sbatch"]} "$@"\n')
    shim.chmod(0o755)
    monkeypatch.setitem(login.cluster.environment, "PATH", f"{shim.parent}:{login.cluster.environment['PATH']}")
    login.cluster.run("scontrol", "update", "PartitionName=requeue0", "State=DOWN")  # nothing starts yet
    try:
        job = submit(login, "--sweep", "x=1..1000", "--array-parallelism", "3", steps=2)
        assert count.read_text().count("\n") == 1
        files = [path for path in login.store.path.rglob("*") if path.is_file()]
        assert len(files) <= 5, files
        assert login.cluster.run("squeue", "--array", "--noheader", "--me").count("\n") == 1000
    finally:
        login.cluster.run("scontrol", "update", "PartitionName=requeue0", "State=UP")
    told = login.until(lambda told: sum(p["state"] == "done" for p in told["points"]) >= 4)
    assert told["job"] == job
    assert len(told["points"]) == 1000
    for number, state in enumerate(p["state"] for p in told["points"]):
        if state == "done":
            assert counted(login, number) == [1, 2]
    login.jobkit("cancel", "run")
    told = login.status()
    assert told["state"] == "cancelled"
    assert {p["state"] for p in told["points"]} == {"done", "cancelled"}
    login.until_no_job()
    assert "points/999" not in {path.name for path in login.store.file("points").iterdir()}


@pytest.mark.slow
def test_points_are_on_their_own(login: Login) -> None:
    """One point fails, one is cancelled alone, one is cancelled by scancel: no other is touched; each is resumed."""
    (login.home / "train.py").write_text(
        "import os, sys\nif sys.argv[1] == '1' and not os.path.exists(sys.argv[4]): sys.exit(3)\n" + _PROGRAM
    )
    mended = login.home / "mended"
    job = login.submit_command("python", "train.py", "{x}", "60", "0.1", str(mended), options=["--sweep", "x=1..4"])
    login.until(lambda told: all((p["step"] or 0) > 3 for p in told["points"][1:]))
    login.jobkit("cancel", "run/points/1")
    login.cluster.run("scancel", f"{job}_2")
    told = login.until(lambda told: all(p["state"] not in ("queued", "running", "requeued") for p in told["points"]))
    assert told["state"] == "failed"
    assert [p["state"] for p in told["points"]] == ["failed", "cancelled", "cancelled", "done"]
    assert "1 done" in told["reason"]
    assert "scancel" in told["points"][2]["reason"]
    mended.touch()
    login.jobkit("resume", "run/points/1")
    assert "is alive: job" in login.jobkit("resume", "run", code=2)
    login.until(lambda told: told["points"][1]["state"] == "done")
    login.until_no_job()
    login.jobkit("resume", "run")
    told = login.until(lambda told: told["state"] == "done")
    arrays = [event["array"] for event in run_status.events(login.store) if event["event"] == "job"]
    assert arrays == ["0-3", "0,2"]
    for number in range(4):
        assert counted(login, number) == list(range(1, 61))
    printed = login.jobkit("logs", "run")
    assert "==> point 1, attempt 1 <==" in printed
    assert login.jobkit("status", "run").splitlines()[-1].split()[:3] == ["3", "4", "done"]
    assert "is already done" in login.jobkit("cancel", "run", code=2)


@pytest.mark.slow
def test_a_point_that_has_to_go_on_elsewhere(login: Login) -> None:
    """A point that a node failed twice goes on without it in a job of its own, and the others in the array."""
    dies = "if number == 1 and step == 10 * (int(os.environ['JOBKIT_ATTEMPT']) + 1) < 30: os.kill(os.getpid(), 9)"
    (login.home / "train.py").write_text(
        _PROGRAM.replace("        commit(step)\n", f"        commit(step)\n        {dies}\n")
    )
    command = ("python", "train.py", "{x}", "40", "0.2")
    job = login.submit_command(*command, options=["--sweep", "x=1,2", "--sbatch", "exclusive"])
    told = login.until(lambda told: told["state"] in ("done", "failed", "cancelled"))
    assert told["state"] == "done", told
    assert [p["attempts"] for p in told["points"]] == [3, 1]
    assert told["points"][0]["job"].isdecimal()
    assert told["points"][1]["job"] == f"{job}_1"
    assert counted(login, 0) == list(range(1, 41))


def test_a_sweep_that_slurm_refuses(login: Login) -> None:
    """An array that is larger than the cluster allows is one sentence, and nothing is left behind."""
    (login.home / "train.py").write_text(_PROGRAM)
    options = ("--on", "slurm", "--run", "run", "--sweep", "x=0..4999")
    said = login.jobkit("submit", *options, "--", "python", "train.py", "{x}", code=2)
    assert "MaxArraySize" in said
    assert len(said.strip().splitlines()) == 1, said
    assert [path.name for path in login.home.iterdir()] == ["train.py"]
    with pytest.raises(SlurmError):
        login.cluster.run("squeue", "--job", "1")

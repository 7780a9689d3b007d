"""The tests' own SLURM cluster is real: jobs over nodes, preemption, node failures, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobkit.supervise import processes
from tests.harness import slurm_packages
from tests.harness.jobs import ROOT, until
from tests.harness.slurm import Cluster

SAYS_TERM = "trap 'echo TERM; {then}' TERM; echo start; while :; do sleep 0.1; done"
"""A task that tells of each SIGTERM."""


@pytest.fixture
def free(cluster: Cluster) -> Cluster:
    """Return the cluster as nobody uses it."""
    cluster.tidy()
    return cluster


def submit(cluster: Cluster, output: Path, *options: str, then: str = "") -> int:
    """Submit such a task and wait until it has started."""
    job = cluster.submit(f'srun sh -c "{SAYS_TERM.format(then=then)}"', *options, output=output)
    cluster.wait(lambda: "start" in read(output), "the task starts", 20)
    return job


def read(output: Path) -> str:
    """Return what a job has printed so far."""
    return output.read_text() if output.exists() else ""


def test_job_over_two_nodes(free: Cluster, tmp_path: Path) -> None:
    """A batch job starts one task on each of its nodes, whose names are addresses."""
    job = free.submit("srun sh -c 'echo $SLURMD_NODENAME'", "--nodes=2", output=tmp_path / "out")
    told = free.wait_state(job, "COMPLETED")
    assert sorted((tmp_path / "out").read_text().split()) == ["127.0.0.1", "127.0.0.2"]
    assert (told["NodeList"], told["Partition"], told["WorkDir"]) == ("127.0.0.[1-2]", "requeue0", "/")


@pytest.mark.slow
def test_preempted_job_runs_again(free: Cluster, tmp_path: Path) -> None:
    """A job without grace gets SIGTERM, is requeued, and runs again under its number with a restart counted."""
    job = submit(free, tmp_path / "out", then="exit 0")
    high = free.preempt([free.job(job)["NodeList"]], seconds=0.1)
    told = free.wait_state(job, "PENDING")
    assert (told["Reason"], told["Restarts"]) == ("BeginTime", "1")
    free.wait_state(high, "COMPLETED")
    free.start_now(job)
    free.wait_state(job, "RUNNING", timeout_s=10)
    free.wait(lambda: read(tmp_path / "out").count("start") == 2, "the second task starts", 10)
    assert read(tmp_path / "out").split().index("TERM") > 0


@pytest.mark.timing
@pytest.mark.slow
def test_notice_then_preempted(free: Cluster, tmp_path: Path) -> None:
    """A job with grace works on after the notice; where preemption cancels, the end of the grace is its end."""
    job = submit(free, tmp_path / "out", "--partition=cancel5")
    free.preempt(seconds=0.1)
    free.wait(lambda: "TERM" in read(tmp_path / "out"), "the notice comes", 10)
    told = free.job(job)
    assert told["JobState"] == "RUNNING"
    assert told["PreemptTime"] != "None"
    started = time.monotonic()
    assert free.wait_state(job, "PREEMPTED")["Restarts"] == "0"
    assert 5 < time.monotonic() - started < 25


@pytest.mark.slow
def test_node_down(free: Cluster, tmp_path: Path) -> None:
    """A job of a node that is declared down is requeued, and the node serves again after `resume`."""
    job = submit(free, tmp_path / "out", then="exit 0")
    node = free.job(job)["NodeList"]
    free.set_down(node)
    assert free.wait_state(job, "PENDING")["Restarts"] == "1"
    free.start_now(job)
    assert free.wait_state(job, "RUNNING", timeout_s=10)["NodeList"] != node
    free.resume(node)
    free.run("srun", f"--nodelist={node}", "true")


@pytest.mark.slow
def test_node_lost(free: Cluster, tmp_path: Path) -> None:
    """Nothing of a killed node lives on, SLURM finds out by itself and requeues, and the node can come back."""
    job = submit(free, tmp_path / "out")
    node = free.job(job)["NodeList"]
    free.kill_slurmd(node, and_tasks=True)
    assert free.processes(node) == []
    assert free.wait_state(job, "PENDING")["Restarts"] == "1"
    assert "TERM" not in read(tmp_path / "out")
    free.start_slurmd(node)
    free.run("scancel", job)
    free.wait_nodes()


def test_close_leaves_nothing(free: Cluster) -> None:
    """Closing a cluster ends jobs in all states, also what escaped from SLURM, and touches no other cluster."""
    with Cluster(nodes=2) as own:
        own.submit("srun sleep 60 & (setsid sleep 60 &) ; wait")
        own.submit("srun sleep 60", "--nodes=2", "--exclusive")
        own.wait_state(own.submit("trap '' TERM; (setsid sleep 61 &) ; srun sleep 60"), "RUNNING")
        assert own.run("squeue", "--noheader").count("\n") == 3
    assert not own.prefix.exists()
    assert processes.with_environment("SLURM_CONF", own.environment["SLURM_CONF"]) == {}
    assert free.run("squeue", "--noheader") == ""


def test_killed_test_leaves_nothing() -> None:
    """A cluster whose maker was killed ends itself."""
    script = "from tests.harness.slurm import Cluster; c = Cluster(nodes=1); c.submit('sleep 60')"
    command = [sys.executable, "-c", f"{script}; print(c.prefix, flush=True); import time; time.sleep(60)"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        prefix = Path(maker.stdout.readline().strip())
        assert prefix.is_dir()
        os.kill(maker.pid, signal.SIGKILL)
    until(lambda: not prefix.exists(), "the cluster is gone")
    assert processes.with_environment("SLURM_CONF", str(prefix / "slurm.conf")) == {}


@pytest.mark.parametrize("ci", ["", "true"])
def test_slurm_that_cannot_be_had(
    ci: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where SLURM cannot be had, its tests are left out with one sentence that says how to get it; CI fails."""
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("JOBKIT_SLURM", str(tmp_path / "slurm"))
    monkeypatch.setattr(slurm_packages, "USUAL", [])
    assert slurm_packages.main(str(tmp_path / "stamp")) == int(bool(ci))
    said = capsys.readouterr().err
    assert said.startswith("the SLURM tests are left out: ")
    assert slurm_packages.HOW in said
    assert said.count("\n") == 1
    assert not (tmp_path / "stamp").exists()

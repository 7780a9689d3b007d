"""What SLURM's versions do differently about a job that ends inside its grace; run on each version by `.ci/run`.

From 23.11 on SLURM requeues such a job by itself, whatever its exit code, and some versions do so again at the end of
a later life. On each of them nothing may wait for that, and nothing may start again what has ended.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import jobs
from tests.harness.login import ROOT, Login
from tests.harness.slurm import Cluster
from tests.slurm.test_slurm import WAYS

HOLD_S = 120
"""SLURM's own default between a requeue and its start."""

PROGRAM = """\
import os, signal, sys, time
from pathlib import Path
from tests.harness import training

how, marker = sys.argv[1], Path("marker")
if how == "late" and not marker.exists():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    marker.touch()
    time.sleep(3600)

def hook(point, run):
    last = point == "step" and run.step == (training.STEPS - 1 if how == "finish" else 12)
    if how != "late" and last and run.attempt == 0:
        marker.touch()
        while run.notice is None:
            time.sleep(0.01)
        if how == "fail":
            raise ValueError("a fault of its own, in the grace")
        if how == "requeued":
            time.sleep(2.0)

training.train(os.environ["JOBKIT_RUN"], hook=hook)
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Login]:
    """Yield a user of a cluster that holds requeued jobs back as SLURM does by default."""
    with Cluster(nodes=2, cred_expire_s=HOLD_S) as cluster:
        yield Login(cluster, tmp_path)


def begin(login: Login, how: str, *options: str) -> str:
    """Submit the program and wait until it stands where the notice is to find it; return the job."""
    (login.home / "program.py").write_text(PROGRAM)
    (login.home / "marker").unlink(missing_ok=True)
    flags = ("--no-snapshot", "-p", "requeue5", *options)
    job = login.submit_command("python", "program.py", how, options=flags)
    jobs.until((login.home / "marker").exists, "the program is where the notice is to find it", seconds=120)
    return job


def preempt(login: Login, job: str) -> None:
    """Take the job's node for a job of higher priority, for a second."""
    login.cluster.preempt([login.cluster.job(job)["BatchHost"]], seconds=1)


def lives(login: Login, job: str) -> int:
    """Return how often SLURM has started a job; a life with nothing to do leaves no other trace."""
    return 1 + int(login.cluster.job(job)["Restarts"])


def check_quiet(login: Login, job: str, expected: int) -> None:
    """See the queue empty ten seconds after the run's end, and a job started as often as it had to be."""
    time.sleep(10)
    assert not login.cluster.run("squeue", "--noheader", "--me").strip()
    assert lives(login, job) == expected


@pytest.mark.slow
def test_a_run_that_finishes_in_its_grace_has_ended(held: Login, undisturbed: str) -> None:
    """The last step is completed inside the grace: the run is done, and SLURM starts nothing again."""
    job = begin(held, "finish")
    preempt(held, job)
    held.check_end(undisturbed)
    check_quiet(held, job, 1)


@pytest.mark.slow
def test_a_run_that_fails_in_its_grace_can_be_resumed_at_once(held: Login, undisturbed: str) -> None:
    """The program raises inside the grace: the run has failed, and nothing is alive that a resume waits for."""
    job = begin(held, "fail", "--max-failures", "0")
    preempt(held, job)
    held.until(lambda told: told["state"] == "failed", 60)
    held.jobkit("resume", "run")
    held.check_end(undisturbed)
    check_quiet(held, job, 1)
    assert held.status()["job"] != job


@pytest.mark.slow
@pytest.mark.parametrize("how", ["late", "requeued"])
def test_a_later_end_is_no_preemption(how: str, login: Login, undisturbed: str) -> None:
    """Preempted in a way that leaves SLURM's mark on the job, and done in a later life: it is not started once more."""
    job = begin(login, how)
    preempt(login, job)
    if how == "requeued":
        time.sleep(1.0)
        login.cluster.run("scontrol", "requeue", job)
    login.check_end(undisturbed)
    check_quiet(login, job, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "nodes"),
    [
        ("preempt requeue 0", 1),
        ("preempt cancel 5", 2),
        ("time limit", 1),
        ("scontrol requeue", 2),
        ("node down", 1),
    ],
)
def test_nothing_is_started_after_the_end(
    way: str, nodes: int, held: Login, undisturbed: str, undisturbed_many: str
) -> None:
    """Stopped in one way or another, the run goes on long before SLURM's hold is over; of its end nothing is left."""
    deed, options, pause_s, _ = WAYS[way]
    job = held.submit(*options, pause_s=pause_s, nodes=nodes)
    held.until_step(12)
    deed(held, job)
    on = ("stepping", None)  # at work, or through with it by the time of the look
    held.until(lambda told: told["attempt"] == 1 and told["phase"] in on and (told["step"] or 0) > 12, HOLD_S * 3 / 4)
    held.check_end(undisturbed if nodes == 1 else undisturbed_many)
    assert [outcome["outcome"] for outcome in held.outcomes()] == ["preempted", "done"]
    last = str(held.status()["job"])
    check_quiet(held, last, 2 if last == job else 1)


CAUGHT = """\
[ -z "$SLURM_RESTART_COUNT" ] || exit 0
trap "" TERM
while :; do sleep 1; done
"""


@pytest.mark.slow
def test_a_grace_that_is_over_just_before(held: Login) -> None:
    """SLURM requeues a job while its successor is being submitted: its next life makes way at once, not in minutes."""
    (held.home / "job.py").write_text(jobs.JOB)
    held.submit_command("python", "job.py", "exit:0", options=("--sbatch", "begin=now+1hour"))
    job = str(held.cluster.submit(CAUGHT))
    held.cluster.wait_state(job, "RUNNING")
    time.sleep(1.0)
    held.cluster.run("scontrol", "requeue", job)
    held.cluster.wait_state(job, "COMPLETING")
    submit = (
        "import sys, msgspec\n"
        "from launch.backends.slurm import requeue\nfrom launch.spec import jobspec\n"
        "from launch.lifecycle.submission import open_run\n"
        "store = open_run('run')\n"
        "now = msgspec.structs.replace(jobspec.read(store), sbatch={})\n"
        "print(requeue.again(store, now, sys.argv[1], running=False))\n"
    )
    environ = os.environ | held.cluster.environment | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", submit, job], cwd=held.home, env=environ, check=True)
    held.until(lambda told: told["state"] == "done", HOLD_S / 2)
    assert lives(held, job) == 2


@pytest.mark.slow
def test_six_preemptions_in_a_row(held: Login, undisturbed: str) -> None:
    """Each of six preemptions is followed by a successor within seconds; SLURM's limit of five requeues counts none."""
    held.submit("-p", "requeue5", pause_s=0.3)
    for attempt in range(6):
        told = held.until(
            lambda told, attempt=attempt: told["attempt"] == attempt and told["phase"] == "stepping", HOLD_S / 2
        )
        preempt(held, str(told["job"]))
    held.check_end(undisturbed)
    assert [outcome["outcome"] for outcome in held.outcomes()] == ["preempted"] * 6 + ["done"]
    check_quiet(held, str(held.status()["job"]), 1)


def test_the_version_is_the_one_asked_for(cluster: Cluster) -> None:
    """Where CI names a version, the daemons are of it, unless its Debian has moved on, which the set-up has said."""
    said = cluster.run("scontrol", "--version").split()[-1]
    asked = Path(os.environ.get("JOBKIT_SLURM", "")).name.removeprefix("slurm-")
    assert said >= asked if asked[:1].isdecimal() else said

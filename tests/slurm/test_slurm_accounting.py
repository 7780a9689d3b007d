"""What a run's status is long after its job's end, on a real cluster with slurmdbd and a database."""

import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.backends.slurm import scontrol
from tests.harness import slurm_packages
from tests.harness.jobs import JOB
from tests.harness.login import Login
from tests.harness.slurm_accounting import AccountedCluster


@pytest.fixture
def login(tmp_path: Path) -> Iterator[Login]:
    """Yield a user on a cluster with accounting; without slurmdbd skip, on CI fail."""
    if slurm_packages.accounting() is None:
        how = "slurmdbd or MariaDB is missing: remove .venv/slurm and run make test"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(how)
    with AccountedCluster(nodes=2) as cluster:
        yield Login(cluster, tmp_path)  # type: ignore[arg-type]


@pytest.mark.slow
def test_jobs_that_slurm_has_forgotten(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that ended long ago, tasks of an array that never started among them: the accounting tells how, at once."""
    cluster = login.cluster
    assert isinstance(cluster, AccountedCluster)
    (login.home / "job.py").write_text(JOB)
    options = ["--sbatch", "begin=now+1hour", "--sweep", "x=1..3"]
    waiting = login.submit_command("python", "job.py", "sleep:{x}", options=options)
    assert login.status()["state"] == "queued"
    assert {point["state"] for point in login.status()["points"]} == {"queued"}
    cluster.run("scancel", waiting)
    cluster.wait_forgotten(f"{waiting}_1")
    told = login.status()
    assert told["state"] == "cancelled", told
    assert f"was cancelled by {os.geteuid()}" in told["points"][2]["reason"]
    done = str(cluster.submit("exit 3"))
    cancelled = str(cluster.submit("sleep 100"))
    cluster.wait_state(cancelled, "RUNNING")
    cluster.run("scancel", cancelled)
    for job in (done, cancelled):
        cluster.wait_forgotten(job)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    found = scontrol.accounted([done, cancelled, f"{waiting}_0", "99999999"])
    assert (found[done].state, found[cancelled].state, found[f"{waiting}_0"].state) == (
        "FAILED",
        "CANCELLED",
        "CANCELLED",
    )
    assert "99999999" not in found


@pytest.fixture(scope="module")
def qos_cluster() -> Iterator[AccountedCluster]:
    """Run a cluster where the QOS of a job decides how it is preempted."""
    if slurm_packages.accounting() is None:
        how = "slurmdbd or MariaDB is missing: remove .venv/slurm and run make test"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(how)
    with AccountedCluster(nodes=2, extra_conf="PreemptType=preempt/qos") as cluster:
        user = pwd.getpwuid(os.geteuid()).pw_name
        for words in (
            "add account lab cluster=tests",
            f"add user {user} account=lab cluster=tests",
            "add qos cut PreemptMode=cancel GraceTime=0 PreemptExemptTime=00:00:01",
            "add qos low PreemptMode=requeue GraceTime=7",
            "add qos urgent Preempt=cut,low",
            f"modify user {user} set qos+=cut,low,urgent",
        ):
            cluster.run("sacctmgr", "-i", *words.split())
        yield cluster


@pytest.fixture
def by_qos(qos_cluster: AccountedCluster, tmp_path: Path) -> Login:
    """Return a user on it."""
    qos_cluster.tidy()
    return Login(qos_cluster, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("qos", "partition", "told"),
    [
        ("cut", "requeue5", "by QOS cut, whatever the partition says: PreemptMode=CANCEL, GraceTime=0 s"),
        ("low", "cancel5", "by QOS low, whatever the partition says: PreemptMode=REQUEUE, GraceTime=7 s"),
    ],
)
def test_preempted_by_qos(qos: str, partition: str, told: str, by_qos: Login) -> None:
    """A QOS's mode and grace rule over the partition's: doctor says which, and a preempted run goes on."""
    cluster = by_qos.cluster
    assert told in by_qos.jobkit("doctor", "--on", "slurm", "-p", partition, "--sbatch", f"qos={qos}")
    (by_qos.home / "job.py").write_text(JOB)
    options = ("-p", partition, "--sbatch", f"qos={qos}")
    job = by_qos.submit_command("python", "job.py", "hold", "exit:0", options=options)
    by_qos.until(lambda status: status["phase"] == "listening" and (status["step"] or 0) > 100)
    taken = ("--nodes=2", "--exclusive", "--qos=urgent", f"--partition={partition}")
    cluster.submit("sleep 1", *taken)
    status = by_qos.until(lambda status: status["state"] in ("done", "failed", "cancelled"), 120)
    assert status["state"] == "done", status
    assert [outcome["outcome"] for outcome in by_qos.outcomes()] == ["preempted", "done"]
    assert (status["job"] == job) == (qos == "low")


@pytest.mark.slow
def test_a_qos_that_is_not_there(by_qos: Login) -> None:
    """A QOS that the cluster does not have is one sentence with those that it has."""
    said = by_qos.jobkit("doctor", "--on", "slurm", "--sbatch", "qos=nope", code=2)
    assert "the cluster has no QOS 'nope'; it has normal, cut, low, urgent" in said

"""What a run's status is long after its job's end, on a real cluster with slurmdbd and a database."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import scontrol
from tests import slurm_packages
from tests.jobs import JOB
from tests.login import Login
from tests.slurm_accounting import AccountedCluster


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

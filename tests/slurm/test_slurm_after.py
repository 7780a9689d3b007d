"""A run on SLURM that starts after another one, whose jobs follow each other."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness import jobs
from tests.harness.login import Login
from tests.harness.slurm import Cluster

FIRST = "while ! test -e {home}/room; do sleep 0.1; done; touch {home}/finished"
SECOND = "test -e {home}/finished"


@pytest.mark.slow
def test_it_waits_behind_the_successor_too(tmp_path: Path) -> None:
    """The first is preempted and goes on in another job: the second waits behind that, and begins when it is done."""
    with Cluster(nodes=2, cred_expire_s=120) as cluster:
        login = Login(cluster, tmp_path)

        def status(run: str) -> dict[str, Any]:
            told: dict[str, Any] = json.loads(login.jobkit("status", run, "--json"))
            return told

        def submit(*options: str, code: int = 0) -> str:
            words = ("--on", "slurm", "--run", "second", "--after", "run", *options)
            return login.jobkit("submit", *words, "--", "sh", "-c", SECOND.format(home=tmp_path), code=code)

        job = login.submit_command("sh", "-c", FIRST.format(home=tmp_path), options=("-p", "cancel5"))
        told = login.until(lambda told: told["state"] == "running" and told["attempts"] == 1)
        assert f"#SBATCH --dependency=afterany:{job}\n" in submit("--dry-run")
        assert "would replace it: give one of them" in submit("--sbatch", "dependency=singleton", code=2)
        submit()
        waiting = status("second")
        assert (waiting["state"], waiting["attempts"]) == ("queued", 0)
        assert waiting["reason"] == (
            f"job {waiting['job']} is pending (Dependency), starts once {login.store.url} has finished well"
        )
        cluster.preempt([cluster.job(job)["BatchHost"]], seconds=1)
        told = login.until(lambda told: told["state"] == "running" and told["attempts"] == 2)
        assert told["job"] != job
        behind = jobs.until(
            lambda: (now := status("second"))["job"] != waiting["job"] and now, "another job waits", seconds=60
        )
        assert (behind["state"], behind["attempts"]) == ("queued", 0)
        assert f"afterany:{told['job']}" in cluster.job(behind["job"])["Dependency"]
        (tmp_path / "room").touch()
        over = jobs.until(lambda: (now := status("second"))["runner"] == "ended" and now, "it is over", seconds=60)
        assert (over["state"], over["attempts"]) == ("done", 1), over
        assert login.status()["state"] == "done"
        login.until_no_job()

"""Runs in a bucket on several SLURM nodes, which share no home."""

import sys
from pathlib import Path

import pytest

from jobkit.rundir.ledger import read_json
from launch.lifecycle.submission import open_run
from tests.harness import machines
from tests.harness.jobs import until
from tests.harness.login import Login

PROGRAM = """\
import os, pathlib
print(os.environ["JOBKIT_PROCESS"], "of", os.environ["JOBKIT_PROCESSES"], "runs in", pathlib.Path.cwd(), flush=True)
"""


@pytest.mark.slow
def test_each_node_makes_itself_ready(login: Login, tmp_path: Path) -> None:
    """Of two nodes the second brings the code into a home of its own, and both processes meet through the bucket."""
    with machines.bucket(tmp_path / "disk"):
        (login.home / "where.py").write_text(PROGRAM)
        url = f"gs://bucket/{tmp_path.name}"
        login.jobkit("submit", "--on", "slurm", "-N", "2", "--run", url, "--", sys.executable, "where.py")
        store = open_run(url)
        until(lambda: "attempts/0/outcome.json" in store.bucket.find("attempts"), "it has ended", seconds=240)
        store = open_run(url)
        outcome = read_json(store, "attempts/0/outcome.json") or {}
        assert (outcome["outcome"], outcome["processes"]) == ("done", 2), outcome
        first, second = (
            b"".join(
                store.bucket.read(name) for name in store.bucket.find("attempts/0") if f"/log-{index}.txt.d/" in name
            ).decode()
            for index in (0, 1)
        )
        assert "0 of 2 runs in" in first, first
        assert ".process-" not in first
        assert f"1 of 2 runs in {store.path}.process-1/code/" in second, second

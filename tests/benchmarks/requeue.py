"""From a preemption until the program runs again, where SLURM holds requeued jobs back for its default of 120 s.

The jobs run on one private cluster and are preempted for a second by a job of higher priority: jobkit's, with a grace
period and without, beside submitit's own, whose checkpointing SLURM's default signal never reaches.

Run: python -m tests.benchmarks.requeue
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests import slurm_packages
from tests.slurm import Cluster

ROOT = Path(__file__).parent.parent.parent
_PROGRAM = """\
import sys, time, jobkit
print(time.time(), "start", file=open(sys.argv[1], "a"), flush=True)
with jobkit.Run(save_every=None) as run:
    state = run.resume(n=0)
    for step in run.steps(100_000):
        state.n += 1
        if step % 20 == 0:
            print(time.time(), step, file=open(sys.argv[1], "a"), flush=True)
        time.sleep(0.01)
"""
_SUBMITIT = """\
import submitit, sys, time
def work(path):
    print(time.time(), "start", file=open(path, "a"), flush=True)
    for step in range(100_000):
        if step % 20 == 0:
            print(time.time(), step, file=open(path, "a"), flush=True)
        time.sleep(0.01)
executor = submitit.SlurmExecutor(folder="submitit")
executor.update_parameters(partition="requeue5", time=60)
print(executor.submit(work, sys.argv[1]).job_id)
"""


def _dead_time(cluster: Cluster, beats: Path, job: str) -> float:
    """Preempt a job; return the longest silence of its program in seconds."""

    def lines() -> list[list[str]]:
        return [line.split() for line in beats.read_text().splitlines()] if beats.exists() else []

    def starts() -> int:
        return sum(line[1] == "start" for line in lines())

    cluster.wait(lambda: len(lines()) > 10, "the program runs", 60)
    cluster.preempt([cluster.job(job)["BatchHost"]], seconds=1)
    cluster.wait(lambda: starts() == 2 and lines()[-3][1] != "start", "it runs again", 300)
    times = [float(line[0]) for line in lines()]
    return max(later - earlier for earlier, later in pairwise(times))


def _jobkit(cluster: Cluster, work: Path, run: Callable[..., str], partition: str) -> float:
    (work / "train.py").write_text(_PROGRAM)
    told = run("-m", "launch", "submit", "--on", "slurm", "-p", partition, "--run", partition, "--json", "--",
               "python", "train.py", str(work / f"{partition}.txt"))  # fmt: skip
    try:
        return _dead_time(cluster, work / f"{partition}.txt", json.loads(told)["job"])
    finally:
        run("-m", "launch", "cancel", partition)


def _submitit(cluster: Cluster, work: Path, run: Callable[..., str]) -> float:
    (work / "submit.py").write_text(_SUBMITIT)
    job = run("submit.py", str(work / "submitit.txt")).strip()
    return _dead_time(cluster, work / "submitit.txt", job)


def main() -> int:
    """Measure them and print a table; return 1 if jobkit is not the faster."""
    console = Console()
    if slurm_packages.find() is None:
        console.print(f"left out: {slurm_packages.HOW}")
        return 0
    with Cluster(cred_expire_s=120) as cluster, tempfile.TemporaryDirectory() as made:
        environ = os.environ | cluster.environment | {"PYTHONPATH": str(ROOT)}

        def run(*words: str) -> str:
            return subprocess.run(
                [sys.executable, *words], cwd=made, env=environ, check=True, capture_output=True, text=True
            ).stdout

        ours, at_once = (_jobkit(cluster, Path(made), run, partition) for partition in ("requeue5", "requeue0"))
        theirs = _submitit(cluster, Path(made), run)
    table = Table("preempted, requeue held back 120 s", "dead time s", title="requeue")
    table.add_row("jobkit, 5 s of grace (a successor job)", f"{ours:.1f}")
    table.add_row("jobkit, no grace (SLURM's requeue, its hold lifted)", f"{at_once:.1f}")
    table.add_row("submitit (SLURM's requeue)", f"{theirs:.1f}")
    console.print(table)
    console.print(f"ratio {max(ours, at_once) / theirs:.2f}")
    return 0 if max(ours, at_once) < theirs else 1


if __name__ == "__main__":
    sys.exit(main())

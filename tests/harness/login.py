"""A user on the login node of the tests' cluster, who submits one run and watches it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobkit import contract
from jobkit.rundir.store import Store
from launch.lifecycle import orphans
from tests.harness import training
from tests.harness.slurm import Cluster

ROOT = Path(__file__).parent.parent.parent

SCRIPT = """\
import os, sys
from tests.harness import training
train = training.train_many if len(sys.argv) > 2 else training.train
train(os.environ["JOBKIT_RUN"], pause_s=float(sys.argv[1]))
"""


@dataclass
class Login:
    """A user on the cluster's login node.

    Args:
        cluster: The cluster.
        home: The user's directory.
    """

    cluster: Cluster
    home: Path

    @property
    def store(self) -> Store:
        """The run that the tests submit."""
        return Store(self.home / "run")

    def jobkit(self, *arguments: str, code: int = 0) -> str:
        """Run the command line; return what it printed on standard output, or its errors where it is to fail."""
        environ = os.environ | self.cluster.environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        ended = subprocess.run(
            [sys.executable, "-m", "launch", *arguments],
            cwd=self.home,
            env=environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stderr if code else ended.stdout

    def submit(self, *options: str, pause_s: float = 0.1, nodes: int = 1) -> str:
        """Submit the training, one process on each node; return the job's number."""
        (self.home / "train.py").write_text(SCRIPT)
        command = ("python", "train.py", str(pause_s))
        if nodes > 1:
            options, command = (*options, "-N", str(nodes)), (*command, "many")
        return self.submit_command(*command, options=options)

    def submit_command(self, *command: str, options: Sequence[str] = ()) -> str:
        """Submit any command; return the job's number."""
        told = json.loads(self.jobkit("submit", "--on", "slurm", "--run", "run", *options, "--json", "--", *command))
        assert told["state"] == "queued" or told["job"]
        return str(told["job"])

    def status(self) -> dict[str, Any]:
        """Return the run's status."""
        told: dict[str, Any] = json.loads(self.jobkit("status", "run", "--json"))
        return told

    def until(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 90.0) -> dict[str, Any]:
        """Wait for a status."""
        deadline = time.monotonic() + timeout_s
        while not condition(told := self.status()):
            log = "\n".join(path.read_text() for path in self.store.file("slurm").glob("*.out"))
            assert time.monotonic() < deadline, f"{told}\n{log}\n{self.cluster.logs()}"
            time.sleep(0.2)
        return told

    def until_step(self, step: int) -> dict[str, Any]:
        """Wait until the newest attempt trains and has completed so many steps."""
        return self.until(lambda told: told["phase"] == "stepping" and (told["step"] or 0) >= step)

    def outcomes(self) -> list[dict[str, Any]]:
        """Return how each attempt ended."""
        numbers = self.store.numbers(contract.ATTEMPTS)
        return [orphans.read_outcome(self.store, number) or {} for number in numbers]

    def check_end(self, digest: str) -> None:
        """Wait for the end, which must be the undisturbed run's to the last bit; no job is left."""
        told = self.until(lambda told: told["state"] in ("done", "failed", "cancelled"), 150)
        assert told["state"] == "done", told
        assert training.digest(self.store.path) == digest
        self.until_no_job()

    def until_no_job(self) -> None:
        """Wait until SLURM has none of our jobs any more."""
        self.cluster.wait(
            lambda: not self.cluster.run("squeue", "--noheader", "--me").strip(), "the queue is empty", 60
        )

"""Loaders of the libraries that people use, as `run.epochs` takes them: after interruptions they give the same rows."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobkit.compare import compare
from jobkit.contract import ENV_DRILL, ENV_FAULT, Exit
from jobkit.rundir.ledger import read_events
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from tests.harness import loaders
from tests.harness.loader_training import KINDS


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_twice(tmp_path: Path, kind: str) -> None:
    """Stopped by a SIGTERM and by a SIGKILL in the middle of epochs, it goes on to the same end, to the bit."""
    needed = loaders.needed({"torchdata": "torch", "stream": "datasets"}.get(kind, kind))
    command = [sys.executable, "-W", "ignore", "-m", "tests.harness.loader_training", kind, str(tmp_path)]
    environment = {**os.environ, **needed, "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, cwd=loaders.ROOT, capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1:] == [json.dumps([0, Exit.PREEMPTED, -signal.SIGKILL, 0])], done.stderr
    assert compare(tmp_path / "whole/run", tmp_path / "run/run").equal
    restored = [event["step"] for event in read_events(Store(tmp_path / "run/run")) if event["event"] == "restored"]
    assert restored[0] == 12
    assert restored[1] in range(12, 18)


GRAIN = """
import sys

import grain
import jax.numpy as jnp
import numpy as np
from absl import app

import jobkit


class Noise(grain.transforms.RandomMap):
    def random_map(self, element, rng):
        return element + rng.integers(0, 1000)


def main(argv):
    order = grain.samplers.IndexSampler(64, grain.sharding.NoSharding(), shuffle=True, num_epochs=None, seed=5)
    rows = [Noise(), grain.transforms.Batch(4)]
    loader = grain.DataLoader(data_source=np.arange(64.0), sampler=order, operations=rows, worker_count=2)
    with jobkit.Run(argv[1], save_every=5, trackers=()) as run:
        data = iter(loader)
        state = run.resume(w=jnp.zeros(()), data=data, optimizer=None)
        for _ in run.steps(32):
            state.w = 0.9 * state.w + next(data) @ np.arange(1, 5)


if __name__ == "__main__":
    app.run(main)
"""


@pytest.mark.slow
def test_grain_with_workers(tmp_path: Path) -> None:
    """Grain's own worker processes: ended twice, the run has the same end to the bit, and none of them is left over."""
    (tmp_path / "train.py").write_text(GRAIN)
    codes = {"whole": [0], "run": [Exit.PREEMPTED, 128 + signal.SIGKILL, 0]}
    faults = {"whole": [""], "run": ["step:12=TERM", "step:6=KILL", ""]}
    for name, wanted in codes.items():
        for fault, code in zip(faults[name], wanted, strict=True):
            place = str(tmp_path / name)
            command = [
                sys.executable,
                "-m",
                "jobkit.supervise",
                "--run",
                place,
                "--",
                sys.executable,
                "train.py",
                place,
            ]
            more = {
                ENV_DRILL: '{"save_every": 5}',
                ENV_FAULT: fault,
                "JAX_PLATFORMS": "cpu",
                "GRAIN_TEST": str(tmp_path),
            }
            environment = {**os.environ, "PYTHONPATH": str(loaders.ROOT), **more}
            done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
            assert done.returncode == code, done.stdout + done.stderr
            assert not processes.with_environment("GRAIN_TEST", str(tmp_path))
    assert compare(tmp_path / "whole", tmp_path / "run").equal

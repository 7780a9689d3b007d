"""Loaders of the libraries that people use, as `run.epochs` takes them: after interruptions they give the same rows."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobkit.compare import compare
from jobkit.contract import Exit
from jobkit.rundir.ledger import read_events
from jobkit.rundir.store import Store
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

"""A user at a desk, with a bucket and a batch service: the command line in this process, everything else real."""

import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from google.auth.compute_engine import _metadata

from jobkit import contract
from launch.backends import registry
from launch.backends.cloud import googleapi
from tests.fakes.gcs_server import GcsServer
from tests.harness.jobs import command_line

TRAIN = """\
import os, sys
from tests.harness import training
training.train(os.environ["JOBKIT_RUN"], pause_s=float(sys.argv[1]))
"""
NAME = f"one-{secrets.token_hex(4)}"
"""Another one in each test process: the processes of a run are found on the whole machine, by its URL."""
URL = f"gs://bucket/runs/{NAME}"


class Desk:
    """A user.

    Args:
        home: Where the code is, and the local disk.
        gcs: The bucket's server.
    """

    def __init__(self, home: Path, gcs: GcsServer) -> None:
        self.home, self.gcs = home, gcs
        (home / "code").mkdir()

    def use(self, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
        """Sit down."""
        for name, value in {**environment, contract.ENV_HOME: str(self.home / "disk")}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("GCLOUD_PROJECT", raising=False)
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # gcsfs reads it when it is imported
        monkeypatch.chdir(self.home / "code")
        monkeypatch.setattr(registry.named("gcp"), "_session", googleapi.Session())
        # google-auth reads these once, when it is imported.
        monkeypatch.setattr(_metadata, "_GCE_METADATA_HOST", os.environ.get("GCE_METADATA_HOST"))
        monkeypatch.setattr(_metadata, "_NO_GCE_CHECK", os.environ.get("NO_GCE_CHECK") == "true")
        fsspec.config.conf.clear()
        fsspec.config.set_conf_env(fsspec.config.conf)
        fsspec.get_filesystem_class("gs").clear_instance_cache()  # to make one would ask for credentials

    def write(self, script: str, name: str = "train.py") -> None:
        """Write a program."""
        (self.home / "code" / name).write_text(script)

    def jobkit(self, *words: str, code: int = 0, errors: bool = True) -> str:
        """Run the command line; return what it printed, or its errors where it is to fail.

        Args:
            words: The command line.
            code: Its exit code.
            errors: Whether to catch what goes to standard error; else what was printed is returned.
        """
        done = command_line(*words, errors=errors)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code and errors else done.stdout

    def status(self, url: str = URL) -> dict[str, Any]:
        """Return a run's status."""
        told: dict[str, Any] = json.loads(self.jobkit("status", url, "--json"))
        return told

    def until(
        self, condition: Callable[[dict[str, Any]], Any], *, seconds: float = 120.0, url: str = URL
    ) -> dict[str, Any]:
        """Wait for a status."""
        deadline = time.monotonic() + seconds
        while not condition(told := self.status(url)):
            assert time.monotonic() < deadline, told
            time.sleep(0.3)
        return told

    def until_over(self, *, seconds: float = 180.0) -> dict[str, Any]:
        """Wait until the run is over."""
        return self.until(lambda told: told["state"] in ("done", "failed", "cancelled"), seconds=seconds)

    def committed(self) -> list[int]:
        """Return the steps that are committed in the bucket."""
        names = [name.split("/") for name in self.gcs.names() if name.endswith(contract.COMMIT)]
        return sorted(int(parts[-2]) for parts in names if parts[-2].isdecimal())

    def until_committed(self, step: int, *, seconds: float = 120.0) -> None:
        """Wait for a step in the bucket."""
        deadline = time.monotonic() + seconds
        while max(self.committed(), default=-1) < step:
            assert time.monotonic() < deadline, self.gcs.names()
            time.sleep(0.1)

    def fetched(self) -> Path:
        """Download the newest step; return a run directory that holds it."""
        target = self.home / f"fetched-{time.monotonic_ns()}"
        step = self.committed()[-1]
        prefix = f"{URL.removeprefix('gs://bucket/')}/"
        for name in self.gcs.names(prefix=f"{prefix}{contract.step_dir(step)}/"):
            path = target / name.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.gcs.read(name))
        return target

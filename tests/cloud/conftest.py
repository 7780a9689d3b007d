"""A user at Google Batch: a bucket, a service that executes what it is asked to run, and two programs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobkit.supervise import processes
from tests.fakes.gcp_batch_server import BatchServer
from tests.fakes.gcs_server import GcsServer
from tests.harness.desk import TRAIN, URL, Desk
from tests.launch.test_conformance import PROGRAM

GCP = ("submit", "--on", "gcp", "--region", "us-central1", "--image", "registry/train:1", "--run", URL)
"""A submit, but for the command."""


@pytest.fixture
def gcs() -> Iterator[GcsServer]:
    """Run an emulated bucket."""
    with GcsServer() as server:
        yield server


@pytest.fixture
def batch(gcs: GcsServer) -> Iterator[BatchServer]:
    """Run a batch service; nothing of its jobs is left at the end of a test."""
    with BatchServer(gcs.environment()) as server:
        yield server
        ids = [job.id for job in server.jobs.values() if job.over]
    assert not [pid for job in ids for pid in processes.with_environment("JOBKIT_JOB", job) if processes.alive(pid)]


@pytest.fixture
def desk(tmp_path: Path, gcs: GcsServer, batch: BatchServer, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Seat a user at the two."""
    user = Desk(tmp_path, gcs)
    user.use(monkeypatch, gcs.environment() | batch.environment)
    user.write(TRAIN)
    user.write(PROGRAM, "job.py")
    return user

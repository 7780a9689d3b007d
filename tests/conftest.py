"""What every test starts from: a process that no launcher started, on the CPU, and the same examples every time.

Property tests try the same examples in every run, so that who has changed nothing sees what was seen before. To search
further: `pytest --hypothesis-profile search`, with `--hypothesis-seed N` to see again what seed N has found.
"""

import multiprocessing.util
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import submitit  # noqa: F401  (its logging configuration closes all handlers there are, absl's with pytest's capture)
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.harness.engine import Engine
    from tests.harness.login import Login
    from tests.harness.slurm import Cluster

for name in [name for name in os.environ if name.startswith(("JOBKIT_", "SLURM_", "SBATCH_", "SRUN_"))]:
    if name != "JOBKIT_SLURM":  # where SLURM lies unpacked (tests/harness/slurm_packages.py)
        del os.environ[name]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JOBKIT_METADATA"] = "off"  # the tests may run on a spot VM themselves
# Nor does a busy machine fail an example that took long.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=False)
settings.register_profile("same", settings.get_profile("search"), derandomize=True)
settings.load_profile("same")
# A shell's background job has SIGINT ignored, and what it starts inherits that; the tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


TEMPORARY = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Have the tests, and all that they start, write their temporary files into one directory of this run."""
    if not hasattr(config, "workerinput"):  # pytest's workers inherit it
        config.stash[TEMPORARY] = os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="jobkit-tests-")
        os.chmod(tempfile.tempdir, 0o1777)  # as /tmp is: some of what they start has another user


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Name the versions that the tests ran on, and where it lies what they wrote, if any has failed."""
    from tests.harness import browser, libraries

    terminalreporter.write_line(f"on {libraries.in_use()}")
    if pictures := sorted(picture.name for picture in browser.SHOTS.glob("*.png")):
        terminalreporter.write_line(f"pictures of {len(pictures)} pages and screens lie in {browser.SHOTS}")
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        terminalreporter.write_line(f"what the tests wrote is kept in {config.stash[TEMPORARY]}")
        del config.stash[TEMPORARY]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave nothing behind, once multiprocessing has removed what it has there itself (at priority -100)."""
    if directory := config.stash.get(TEMPORARY, None):
        given = {"args": (directory,), "kwargs": {"ignore_errors": True}}
        multiprocessing.util.Finalize(None, shutil.rmtree, **given, exitpriority=-200)


@pytest.fixture(scope="session")
def cluster() -> "Iterator[Cluster]":
    """Run a SLURM cluster of four nodes for each worker of pytest; without SLURM skip, on CI fail."""
    from tests.harness import slurm, slurm_packages

    if slurm_packages.find() is None:
        if os.environ.get("CI"):
            pytest.fail(f"SLURM is missing: {slurm_packages.HOW}")
        pytest.skip(f"SLURM is missing: {slurm_packages.HOW}")
    with slurm.Cluster() as running:
        yield running


@pytest.fixture
def login(cluster: "Cluster", tmp_path: Path) -> "Iterator[Login]":
    """Yield a user on a cluster whose nodes are all idle."""
    from tests.harness.login import Login

    cluster.tidy()
    yield Login(cluster, tmp_path)
    cluster.tidy()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train once without interruption; return the digest of the end."""
    from tests.harness import training

    url = tmp_path_factory.mktemp("undisturbed") / "run"
    code, printed = training.attempt(url)
    assert code == 0, printed
    return training.digest(url)


@pytest.fixture(scope="session")
def undisturbed_many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train in two processes without interruption; return the digest of the end."""
    from tests.harness import training

    url = tmp_path_factory.mktemp("undisturbed") / "run"
    assert training.join_many(training.start_many(url, 2)) == [0, 0]
    return training.digest(url)


@pytest.fixture(scope="session")
def docker() -> "Engine":
    """Return a container engine that answers; without one skip, on CI fail."""
    from tests.harness import engine

    found = engine.find()
    if found is None:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing(f"no docker daemon answers: {engine.HOW}")
    return found


@pytest.fixture(scope="session")
def moto() -> Iterator[dict[str, str]]:
    """Run moto's server; yield the environment that leads S3 clients to it."""
    import socket
    import subprocess
    import sys
    import time

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server.terminate()
    server.wait()

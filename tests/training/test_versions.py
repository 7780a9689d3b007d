"""Which versions are here, and what is said of one that is too old."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobkit import contract, versions
from jobkit.errors import ConfigError
from jobkit.rundir.ledger import read_events
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store
from tests.harness import training


def fake(directory: Path, package: str, version: str) -> None:
    """Make an installed distribution of some version, without its code."""
    info = directory / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def test_the_installed_versions_do() -> None:
    """What the tests run on is at least what pyproject declares, and each package of a training is known."""
    versions.check()
    assert set(versions.found()) == {"python", "jobkit", *versions.TRAINING}
    assert versions.floors().keys() >= {*versions.TRAINING, "gcsfs", "fsspec", "s3fs", "botocore"}


@pytest.mark.parametrize("old", ["0.11.24", "0.11.27.post1", "0.9rc1"])
def test_a_package_that_is_too_old_is_named(old: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An Orbax that would fail every save is refused when the run opens, with the version that is needed."""
    fake(tmp_path, "orbax-checkpoint", old)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=f"orbax-checkpoint {old} is too old .*pip install 'orbax-checkpoint>="):
        versions.check()


@pytest.mark.parametrize("new", ["0.11.28", "0.11.28.post1", "0.11.100", "0.12", "1.0rc1"])
def test_a_newer_package_is_taken(new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor itself and all above it are taken."""
    fake(tmp_path, "orbax-checkpoint", new)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(versions, "floors", lambda: {"orbax-checkpoint": "0.11.28"})
    versions.check()


def test_an_s3_client_that_creates_what_is_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A botocore that leaves the condition of a creation out would give a run two owners: it is refused by name."""
    fake(tmp_path, "botocore", "1.34.162")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"botocore 1\.34\.162 is too old .*pip install 'botocore>=1\.35\.2'"):
        Remote("s3://bucket/run").find()


@pytest.mark.slow
def test_an_installed_package_that_is_too_old(tmp_path: Path) -> None:
    """With an Orbax really installed that fails every save, a program ends with 78 before it trains a step."""
    old = ["--no-deps", "--target", tmp_path / "old", "orbax-checkpoint==0.11.25"]
    subprocess.run(
        [Path(sys.executable).with_name("uv"), "pip", "install", "-q", "-p", sys.executable, *old], check=True
    )
    (tmp_path / "train.py").write_text("import jobkit\nwith jobkit.Run('run'):\n    print('it trains')")
    path = os.pathsep.join([str(tmp_path / "old"), str(Path(__file__).parent.parent.parent)])
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == contract.Exit.CONFIG, done.stdout + done.stderr
    assert "orbax-checkpoint 0.11.25 is too old for jobkit" in done.stderr
    assert "pip install 'orbax-checkpoint>=0.11.28'" in done.stderr
    assert "it trains" not in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_attempt_s_ledger_names_them(tmp_path: Path) -> None:
    """What trained an attempt is in its ledger, and in what it has committed."""
    code, printed = training.attempt(tmp_path / "run", steps=2)
    assert code == 0, printed
    (opened,) = [event for event in read_events(Store(tmp_path / "run")) if event["event"] == "opened"]
    assert opened["versions"] == versions.found()

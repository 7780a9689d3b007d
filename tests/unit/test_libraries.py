"""The sets of libraries: which Python is taken for one, and that each has a list of tests and a file of its own."""

import os
import sys
from pathlib import Path

import pytest

from tests.harness import libraries

ROOT = Path(__file__).parent.parent.parent


def test_a_shim_is_no_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A python3.13 on PATH that only says which versions could be chosen is passed over for one that runs."""
    for name, text in [("shim", "echo 'python3.13: command not found' >&2; exit 127"), ("good", "exit 0")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "python3.13").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name / "python3.13").chmod(0o755)
    monkeypatch.setattr(libraries, "VENV", tmp_path / "venv")
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / name) for name in ("none", "shim", "good")))
    assert libraries.python("3.13") == tmp_path / "good/python3.13"


def test_what_cannot_be_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a Python, and with no Debian to take one from, a set ends in one sentence and fails."""
    monkeypatch.setattr(libraries, "VENV", tmp_path / "venv")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert libraries.main("newest", str(tmp_path / "stamp")) == 1
    assert capsys.readouterr().err.startswith(
        "the newest set of libraries cannot be installed: no python3.13 runs here"
    )
    assert not (tmp_path / "stamp").exists()


def test_each_test_of_the_list_is_there() -> None:
    """Every line of the list names a test, or a file of tests, that there is."""
    for line in (ROOT / "tests/libraries.txt").read_text().splitlines():
        path, _, name = line.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text() if name else (ROOT / path).exists(), line


def test_the_versions_in_use_are_named() -> None:
    """The line that every run of the tests ends with has Python's version and that of each library."""
    said = libraries.in_use()
    assert said.startswith(f"Python {'.'.join(map(str, sys.version_info[:3]))}, jax ")
    assert all(f", {name} " in said for name in ("flax", "optax", "orbax-checkpoint", "numpy", "fsspec", "gcsfs"))

"""Completion in the shells that people use: commands, options, backends and the names of runs."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from launch.cli.main import cli
from launch.cli.names import RUN
from tests.harness import jobs, shells
from tests.harness.jobs import Project
from tests.launch.test_runs_cli import call, fabricate


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Make a project with two runs."""
    for made in jobs.project(tmp_path):
        made.runs = made.path / "runs"
        fabricate(made, "mnist/first")
        fabricate(made, "other")
        yield made


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Make a home, and see to the shells; without Debian's packages skip, on CI fail."""
    try:
        shells.provide()
    except OSError as error:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing(f"no zsh and fish: {error}")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def complete(project: Project, words: str) -> list[str]:
    """Have a real bash complete the last of some words, with what `jobkit completion bash` prints."""
    script = f"""eval "$(jobkit completion bash)"
COMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _jobkit_completion jobkit
printf '%s\\n' "${{COMPREPLY[@]}}" """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=project.path, env=os.environ | {"PATH": path}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.slow
def test_bash_completes(project: Project) -> None:
    """Commands, options, the names of runs and backends are completed in a real bash."""
    assert {"checkpoints", "completion"} <= set(complete(project, "jobkit c"))
    assert complete(project, "jobkit submit --spo") == ["--spot"]
    assert complete(project, "jobkit status mn") == ["mnist/first"]
    assert complete(project, "jobkit submit --on sl") == ["slurm"]


@pytest.mark.slow
def test_fish_completes(project: Project, home: Path) -> None:
    """The same in a real fish, with what each is for."""

    def complete(words: str) -> dict[str, str]:
        return shells.fish(words, cwd=project.path, home=home)

    assert {"checkpoints", "completion"} <= complete("jobkit c").keys()
    assert complete("jobkit check")["checkpoints"].startswith("List, ")
    assert complete("jobkit submit --spo") == {"--spot": "gcp: spot or standard VMs. [default: spot]"}
    assert list(complete("jobkit status mn")) == ["mnist/first"]
    assert list(complete("jobkit submit --on sl")) == ["slurm"]


@pytest.mark.slow
def test_zsh_completes(project: Project, home: Path) -> None:
    """The same in a real zsh, at a terminal, with a tab."""

    def complete(words: str) -> str:
        return shells.zsh(words, cwd=project.path, home=home)

    assert complete("jobkit checkp") == "jobkit checkpoints"
    assert complete("jobkit submit --spo") == "jobkit submit --spot"
    assert complete("jobkit status mn") == "jobkit status mnist/first"
    assert complete("jobkit submit --on sl") == "jobkit submit --on slurm"


def test_a_name_that_is_more_than_a_word_is_not_completed(project: Project) -> None:
    """What a shell would act on when it inserts it is left out."""
    for name in ("plain", "x;touch y", "$(touch z)"):
        fabricate(project, name)
    with contextlib.chdir(project.path):
        items = RUN.shell_complete(click.Context(cli), click.Argument(["run"]), "")
    assert {item.value for item in items} == {"plain", "other", "mnist/first"}


def test_completion_for_every_shell(project: Project) -> None:
    """Each shell gets a script of its own, and the help says where to put it."""
    told = call(project, "completion", "--help").stdout
    for shell in ("bash", "zsh", "fish"):
        script = call(project, "completion", shell).stdout
        assert f"_JOBKIT_COMPLETE={shell}_complete" in script
        assert f"jobkit completion {shell}" in told

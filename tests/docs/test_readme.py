"""Every command and snippet of README.md, and every example in a docstring, is run."""

import doctest
import importlib
import pkgutil
import re
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import click
import pytest

import jobkit
import launch
from jobkit.rundir.ledger import read_metrics
from jobkit.rundir.store import Store
from tests.docs.snippets import ROOT, shell, train_py
from tests.unit.test_packaging import tracked

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
MODULES = [
    importlib.import_module(found.name)
    for package in (jobkit, launch)
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    if not found.name.endswith("__main__")
]


def as_this_checkout(command: str) -> str:
    """Run `jobkit` from the checkout, installed or not."""
    return re.sub(r"^jobkit ", f"{shlex.quote(sys.executable)} -m launch ", command)


def test_blocks_are_of_a_kind_that_is_run() -> None:
    """No block of another language hides from these tests."""
    assert {language for language, _ in BLOCKS} == {"python", "bash"}


def at(tmp_path: Path, *words: str) -> list[str]:
    """Return the README's commands for this machine that are one of some words, beside the README's own train.py."""
    (tmp_path / "train.py").write_text(train_py())
    here = [line for line in COMMANDS if line.startswith("jobkit ") and "--on " not in line]
    return [line for line in here if line.split()[1] in words]


@pytest.mark.slow
def test_jobkit_commands(tmp_path: Path) -> None:
    """The jobkit commands work in the order they are told, on the README's own train.py."""
    verbs = ["submit", "submit", "status", "cancel", "resume", "logs", "ls", "report", "explain", "submit"]
    commands = at(tmp_path, *verbs, "checkpoints")
    assert [line.split()[1] for line in commands] == [*verbs, "checkpoints", "checkpoints", "checkpoints"]
    printed = [shell(as_this_checkout(command), tmp_path) for command in commands]
    assert "cancelled" in printed[3]
    listed = printed[6].splitlines()
    assert [line.split()[:2] for line in listed[1:]] == [["first", "done"], ["second", "done"]]
    assert all("400/400  400" in line for line in listed[1:])
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert "ended as done at step 400" in printed[8]
    assert "whole" in printed[-2]
    assert (tmp_path / "exported").is_dir()
    points = [Store(tmp_path / "runs/sweep/points" / str(number)) for number in range(2)]
    first, second = ([*read_metrics(point).values["loss"].values()][-1] for point in points)
    assert abs(first - second) > 1e-3, "a sweep shows what its values do"
    best = shell(as_this_checkout("jobkit report runs/sweep"), tmp_path).splitlines()[-1]
    assert best.startswith(f"best: rate={'1e-2' if first < second else '1e-3'}, loss ")


@pytest.mark.slow
def test_drill_command(tmp_path: Path) -> None:
    """The drill certifies the README's own train.py."""
    (command,) = at(tmp_path, "drill")
    shell(as_this_checkout(command), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON[1:], ids=lambda code: code.split('Run("')[1].split('"')[0])
def test_snippets(code: str, tmp_path: Path) -> None:
    """Each Python snippet runs as it stands."""
    (tmp_path / "snippet.py").write_text(code)
    shell("python snippet.py", tmp_path)
    assert list(tmp_path.glob("runs/*/checkpoints/*/commit.json"))


def test_bound_of_a_kill_is_said_whole() -> None:
    """A kill costs the interval and the save in flight: nothing that a user reads promises less."""
    told = [*(ROOT / "jobkit").rglob("*.py"), *(ROOT / "launch").rglob("*.py"), *ROOT.rglob("README.md")]
    told = [path for path in told if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
    words = {path: " ".join(path.read_text().split()) for path in told}
    assert "at most the save interval and the save in flight" in words[ROOT / "README.md"]
    less = re.compile(r"(at most )?(one|a) (single )?save interval( is lost| on a kill)")
    assert [path.name for path, text in words.items() if less.search(text)] == []


def test_make_targets_exist() -> None:
    """The make targets that the README names are in the Makefile; CI runs them."""
    targets = [line.split()[1] for line in COMMANDS if line.startswith("make ")]
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    ci = (ROOT / ".ci/run").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
        assert f"make {target}" in ci


def test_install_commands() -> None:
    """The install commands name what exists; the Makefile's own set-up runs the same."""
    rest = [line for line in COMMANDS if not line.startswith(("jobkit ", "make ", "uv "))]
    assert rest[:2] == ["python3 -m venv .venv", ". .venv/bin/activate"]
    words = shlex.split(rest[2])
    assert words[:4] == ["pip", "install", "-e", ".[train,report]"]
    assert (ROOT / words[5]).is_file()
    assert len(rest) == 3


@pytest.mark.slow
def test_uv_commands(tmp_path: Path) -> None:
    """`uv sync` installs all that the demo needs, with pyproject.toml as it is."""
    for path in tracked():
        if path.relative_to(ROOT).parts[0] in ("jobkit", "launch", "pyproject.toml", "README.md"):
            (there := tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, there)
    sync, demo = [line for line in COMMANDS if line.startswith("uv ")]
    outside = {"VIRTUAL_ENV": "", "PYTHONPATH": "", "UV_PYTHON": sys.executable}
    shell(sync, tmp_path, outside)
    assert "--steps" in shell(f"{demo} --help", tmp_path, outside)  # `make demo` is the demo itself
    shell("uv run python -c 'import jobkit.examples.text, matplotlib'", tmp_path, outside)


def test_readme_names_real_options() -> None:
    """Every jobkit command line in backticks parses."""
    for command in re.findall(r"`jobkit ([a-z]+)`", README):
        assert command in launch_commands()


def launch_commands() -> dict[str, click.Command]:
    from launch.cli.main import cli

    return dict(cli.commands)


HELP = [
    (name, line.strip())
    for name, command in launch_commands().items()
    for line in (command.help or "").splitlines()
    if line.strip().startswith("jobkit ")
]


@pytest.mark.parametrize(("name", "line"), HELP, ids=[line for _, line in HELP])
def test_help_examples_parse(name: str, line: str) -> None:
    """Each example in a command's help parses as that command."""
    words = shlex.split(re.split(r"\||&&", line)[0])[1:]
    assert words[0] == name
    launch_commands()[name].make_context(name, words[1:])


@pytest.mark.parametrize("module", [jobkit, launch, *MODULES], ids=lambda module: module.__name__)
def test_docstring_examples(module: object) -> None:
    """Examples written with >>> give what they say."""
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


@pytest.mark.slow
def test_package_snippet(tmp_path: Path) -> None:
    """The loop in jobkit's own docstring runs."""
    assert jobkit.__doc__ is not None
    lines = [line for line in jobkit.__doc__.splitlines() if line.startswith("    ")]
    code = textwrap.dedent("\n".join(lines)).replace("10_000", "200")
    before = "from jobkit.examples.strategies import make, train_step\nmodel, optimizer, batches, _ = make()\n"
    (tmp_path / "snippet.py").write_text("import jobkit\n" + before + code)
    shell("python snippet.py", tmp_path)
    assert (tmp_path / "runs/mnist/checkpoints/200/commit.json").is_file()

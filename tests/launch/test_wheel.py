"""The wheel and the sdist: built, installed where nothing of this checkout is, tried, and replaced below a live run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from jobkit.rundir.ledger import Event, read_events
from jobkit.rundir.store import Store
from tests.harness import jobs
from tests.unit.test_packaging import tracked

ROOT = Path(__file__).parent.parent.parent
UV = Path(sys.executable).with_name("uv")
SHIPPED = {".py", ".html", ".typed"}
PATIENCE_S = 120.0


def build(directory: Path, *options: str, source: Path = ROOT) -> Path:
    """Build what is shipped of a source; return the wheel."""
    command = [UV, "build", "-q", *options, "--out-dir", directory, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = directory.glob("*.whl")
    return wheel


def content(wheel: Path) -> dict[str, bytes]:
    """Return what is in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


class Installed:
    """A login node with nothing of this checkout: an environment of its own, and a home.

    Args:
        environment: The directory to make the virtual environment in.
        home: The directory to make for the user.
    """

    def __init__(self, environment: Path, home: Path) -> None:
        self._bin, self.home = environment / "bin", home
        home.mkdir()
        subprocess.run([UV, "venv", "-q", "-p", sys.executable, environment], check=True)

    def install(self, wheel: Path, *options: str) -> None:
        """Install a wheel, in place of another one."""
        subprocess.run([UV, "pip", "install", "-q", "-p", self._bin / "python", *options, wheel], check=True)

    def run(self, program: str, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run a program of the environment in the user's home."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        command = [self._bin / program, *words]
        return subprocess.run(command, cwd=self.home, env=kept, capture_output=True, text=True, check=False)

    def jobkit(self, *words: str) -> str:
        """Run a command that is to succeed; return what it prints."""
        done = self.run("jobkit", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.mark.slow
def test_the_wheel_on_an_empty_login_node(tmp_path: Path) -> None:
    """The wheel, made from the sdist, is the tree's own; with its base alone it submits, lists and says its version."""
    shipped = build(tmp_path / "dist")  # an sdist, and the wheel from it
    assert len(list((tmp_path / "dist").glob("jobkit_jax-*.tar.gz"))) == 1
    assert content(shipped) == content(build(tmp_path / "direct", "--wheel"))
    ours = [path.relative_to(ROOT) for path in tracked() if path.suffix in SHIPPED]
    expected = {path.as_posix() for path in ours if path.parts[0] in ("jobkit", "launch")}
    assert {name for name in content(shipped) if not name.startswith("jobkit_jax-")} == expected

    login = Installed(tmp_path / "env", tmp_path / "home")
    login.install(shipped, "-c", str(ROOT / "constraints.txt"))
    (login.home / "plain.py").write_text("print('hello from a plain script')")
    assert login.jobkit("--version").split()[-1] == version("jobkit-jax")
    assert "submit" in login.jobkit("--help")
    login.jobkit("submit", "--run", "runs/one", "--wait", "--", "python", "plain.py")
    assert "hello from a plain script" in login.jobkit("logs", "runs/one")
    (told,) = json.loads(login.jobkit("ls", "--json", "runs"))
    assert (told["state"], told["attempt"]) == ("done", 0)


LONG = """\
import sys
import time

import jobkit
from jobkit.examples.strategies import make, train_step

model, optimizer, batches, _ = make()
with jobkit.Run(save_every="5 steps") as run:
    run.resume(model=model, optimizer=optimizer, data=batches)
    for step in run.steps(60):
        run.log(loss=train_step(model, optimizer, next(batches)))
        time.sleep(float(sys.argv[1]) if run.attempt == 0 else 0)
"""


@pytest.mark.slow
def test_a_live_run_survives_an_upgrade_of_the_login_node(tmp_path: Path) -> None:
    """Replaced below a running training, jobkit still reaches it, and the next attempt goes on bit for bit.

    Runner, supervisor and program of the attempt that is alive stay what they were when they started; each later
    attempt is of the jobkit that is installed then.
    """
    shipped = [path.relative_to(ROOT) for path in tracked() if path.suffix in SHIPPED | {".toml", ".md"}]
    wheels = {}
    for number in ("0.0.9", "0.2.0"):
        source = tmp_path / number
        for name in [*shipped, Path("LICENSE")]:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
        package = source / "jobkit/__init__.py"
        package.write_text(package.read_text().replace(f'"{version("jobkit-jax")}"', f'"{number}"'))
        wheels[number] = build(tmp_path / f"dist-{number}", "--wheel", source=source)
    login = Installed(tmp_path / "env", tmp_path / "home")
    (tmp_path / "env/lib").joinpath(*Path(sysconfig.get_path("purelib")).parts[-2:], "more.pth").write_text(
        sysconfig.get_path("purelib")  # jax and the others, but not this checkout
    )
    login.install(wheels["0.0.9"], "--no-deps")
    (login.home / "train.py").write_text(LONG)

    login.jobkit("submit", "--run", "runs/undisturbed", "--wait", "--", "python", "train.py", "0")
    login.jobkit("submit", "--run", "runs/live", "--", "python", "train.py", "1")
    store = Store(login.home / "runs/live")

    def told() -> dict[str, Any]:
        return json.loads(login.jobkit("status", "--json", "runs/live"))

    jobs.until(lambda: told()["step"], "it trains", seconds=PATIENCE_S)
    login.install(wheels["0.2.0"], "--no-deps")
    assert login.jobkit("--version").split()[-1] == "0.2.0"
    login.jobkit("save", "runs/live")
    (first,) = opened(store)
    os.kill(first["pid"], signal.SIGKILL)
    jobs.until(lambda: told()["state"] == "done", "it ends", seconds=PATIENCE_S)
    assert [event["versions"]["jobkit"] for event in opened(store)] == ["0.0.9", "0.2.0"]
    assert jobs.outcomes(store) == ["killed", "done"]
    done = login.run("python", "-m", "jobkit.compare", "runs/undisturbed", "runs/live")
    assert done.returncode == 0, done.stdout + done.stderr


def opened(store: Store) -> list[Event]:
    """Return how each attempt of a run began."""
    return sorted((event for event in read_events(store) if event["event"] == "opened"), key=lambda event: event["t"])


WAYS = {
    "pip install .": ["-m", "pip", "--python", "{python}", "install", "-q", "--no-deps", "{tree}"],
    "pip install -e .": ["-m", "pip", "--python", "{python}", "install", "-q", "--no-deps", "-e", "{tree}"],
    "uv sync": ["-m", "uv", "sync", "-q", "--no-default-groups", "--project", "{tree}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_checker_sees_the_types(way: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """However it is installed, in an empty environment: the README's train.py is clean, and a slip in it is found."""
    tree, python = tmp_path / "tree", tmp_path / "tree" / ".venv" / "bin" / "python"
    for path in tracked():
        (tree / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tree / path.relative_to(ROOT))
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "MYPYPATH")}
    subprocess.run([UV, "venv", "-q", "-p", sys.executable, tree / ".venv"], check=True)
    words = [word.format(python=python, tree=tree) for word in WAYS[way]]
    subprocess.run([sys.executable, *words], cwd=tmp_path, env=kept, check=True)
    code = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    (tmp_path / "train.py").write_text(code)
    (tmp_path / "slip.py").write_text(code.replace("run.resume(", "run.resumed("))
    cache = tmp_path_factory.getbasetemp() / "mypy"  # Python's own types are the same each time
    check = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", cache, "--python-executable", python]
    done = subprocess.run(
        [*check, "train.py", "slip.py"], cwd=tmp_path, env=kept, capture_output=True, text=True, check=False
    )
    found = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(found) == 1, done.stdout
    line = code[: code.index("run.resume(")].count("\n") + 1
    assert f'slip.py:{line}: error: "Run" has no attribute "resumed"' in found[0]

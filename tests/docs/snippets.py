"""Blocks of code in the pages that people read, and how they are run."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
FENCE = re.compile(r'^```(\w*)(?: not-run="([^"]+)")?\n(.*?)^```$', flags=re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# ([\w.-]+\.(?:py|toml))\n")


class Block(NamedTuple):
    """A block of a page.

    Args:
        language: The first word behind the fence.
        not_run: Why it cannot be run here; empty where it is run.
        code: What is in it.
    """

    language: str
    not_run: str
    code: str

    @property
    def name(self) -> str:
        """The file that it is, by its first line, `# train.py`; empty if it is none."""
        found = NAMED.match(self.code)
        return found[1] if found else ""

    @property
    def commands(self) -> list[str]:
        """The command lines of a block of bash."""
        return self.code.replace("\\\n", " ").splitlines() if self.language == "bash" else []


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page; every fence belongs to one."""
    text = page.read_text()
    found = [Block(*groups) for groups in FENCE.findall(text)]
    assert 2 * len(found) == len(re.findall(r"^ *```", text, flags=re.MULTILINE)), page.name
    return found


def train_py() -> str:
    """Return the front page's program with a fifth of its steps: long enough to be cancelled."""
    code = next(block.code for block in blocks(ROOT / "README.md") if block.name == "train.py")
    assert "run.steps(2_000)" in code
    return code.replace("2_000", "400")


_OURS = ("PYTHONPATH", "COLUMNS")
"""What pytest and its workers set, and no shell of a reader's has."""


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return one in which `jobkit` and `python` are this environment's."""
    environ = {name: value for name, value in os.environ.items() if name not in _OURS} | dict(more)
    path = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    return {"PYTHONPATH": str(ROOT)} | environ | {"PATH": path, "JAX_PLATFORMS": "cpu"}


def shell(command: str, cwd: Path, more: Mapping[str, str] | None = None) -> str:
    """Run a command line to its end and return what it printed."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env=environment(more or {}),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def play(page: Path, cwd: Path, more: Mapping[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """Do what a page says, from its first block to its last; yield each command with what it printed.

    A block that begins with a file's name is that file. Every other one of Python is a program.
    """
    for block in blocks(page):
        if block.not_run:
            continue
        if block.name:
            (cwd / block.name).write_text(block.code)
        elif block.language == "python":
            (cwd / "snippet.py").write_text(block.code)
            yield "python snippet.py", shell("python snippet.py", cwd, more)
        for command in block.commands:
            yield command, shell(command, cwd, more)

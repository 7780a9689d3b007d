"""What a run's words may do to the terminal of who looks at it: nothing; real programs, pipes and pseudo-terminals."""

import ast
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit.printable import printable
from tests.harness.jobs import ROOT, Project
from tests.harness.jobs import project as make_project

EVIL = "\x1b]0;title\x07\x1b[2J\x1b[8m\x9b31m\u202etxt.exe\u2066\u2028\x1b[31mred"
"""Sets the title, clears the screen, conceals, colours by C1, turns letters round, begins a line; and a mere colour."""
SEEN = r"\u001b]0;title\u0007\u001b[2J\u009b31m\u202etxt.exe\u2066\u2028red"
"""How it is printed."""
IN_A_LINE = SEEN.replace(r"\u2028", " ")
"""How it is printed where it is part of a sentence, which has no lines."""
OURS = re.compile("\x1b\\[[0-9;?]*[A-Za-z]|\r")
"""What rich writes on a terminal: CSI sequences, and returns of the terminal itself."""
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

PROGRAM = """\
import json, os, sys, time
evil = json.loads(sys.argv[1])
with open(os.environ["JOBKIT_RUN"] + "/attempts/0/events-0.jsonl", "a") as ledger:
    for event in ({"event": "opened"}, {"event": "metrics", "step": 1, "values": {"loss": 1.0, "name " + evil: 2.0}}):
        print(json.dumps({"t": time.time()} | event), file=ledger)
print("10%\\r20%", flush=True)
print("why", evil, flush=True)
sys.exit(1)
"""


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(EVIL)))
def test_printable(text: str) -> None:
    """Nothing acts any more; a JSON document stays the same; what is printable already is left alone."""
    assert not ACTING.search(printable(text))
    assert printable(printable(text)) == printable(text)
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text
    assert not text.isprintable() or printable(text) == text


def test_half_a_pair() -> None:
    """Bytes of a name that are no text are printed rather than ending the program that prints them."""
    printable(os.fsdecode(b"run-\xff")).encode()
    assert printable("a\r\nb\tc\rd") == "a\nb\tc\\u000dd"
    assert printable("a\r\nb\rc", bars=True) == "a\nb\rc"


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Make a project whose program prints evil, logs a metric of that name, and fails."""
    for made in make_project(tmp_path):
        (made.path / "evil.py").write_text(PROGRAM)
        yield made


def on_a_terminal(project: Project, *arguments: str) -> str:
    """Run `jobkit` on a pseudo-terminal; return what it showed."""
    ours, theirs = pty.openpty()
    environ = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "200"}
    words = [sys.executable, "-m", "launch", *arguments]
    with subprocess.Popen(words, cwd=project.path, env=environ, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                read = os.read(ours, 1 << 16)
            except OSError:  # it has ended
                break
            shown += read
        process.wait()
    os.close(ours)
    return shown.decode()


@pytest.mark.slow
def test_nothing_of_a_run_acts_on_a_terminal(project: Project) -> None:
    """Last lines, metric names and the name of the run reach no terminal raw, by no command; JSON says the same."""
    run, words = f"{project.runs}/r", ("--max-failures", "0", "--", sys.executable, "evil.py", json.dumps(EVIL))
    project.runs.mkdir()
    waited = project.cli("submit", "--wait", "--run", run, *words)
    assert f"why {IN_A_LINE}" in waited.stdout
    assert not ACTING.search(waited.stdout + waited.stderr)
    os.rename(run, evil := f"{run}{EVIL}")
    page = project.path / "page.html"
    for command, told in [
        (("status", evil), f"name {SEEN} 2"),
        (("explain", evil), f"why {IN_A_LINE}"),
        (("report", evil, "--html", str(page)), str(page)),
        (("ls", str(project.runs)), f"r{SEEN}"),
        (("logs", evil), f"why {SEEN}"),
        (("status", f"{evil}/nothing"), f"r{SEEN}/nothing"),
    ]:
        done = project.cli(*command)
        assert told in " ".join((done.stdout + done.stderr).split()), command
        assert not ACTING.search((done.stdout + done.stderr).replace("10%\r20%", "")), command
    assert not ACTING.search(page.read_text())
    listed = project.cli("ls", str(project.runs), "--json").stdout
    assert not ACTING.search(listed)
    assert json.loads(listed)[0]["run"] == evil
    shown = on_a_terminal(project, "report", evil)
    assert r"why \u001b]0;title" in shown
    assert "\x1b[2J" not in shown
    assert not ACTING.search(OURS.sub("", shown))


def test_nothing_acts_on_the_terminal_of_who_waits(project: Project) -> None:
    """The live view of a run has rich's own sequences, and nothing of the program's."""
    words = ("--max-failures", "0", "--", sys.executable, "evil.py", json.dumps(EVIL))
    project.runs.mkdir()
    shown = on_a_terminal(project, "submit", "--wait", "--run", f"{project.runs}/r", *words)
    assert "\x1b[" in shown
    assert "title" in shown
    assert "\x1b[2J" not in shown
    assert not ACTING.search(OURS.sub("", shown))


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_stays_closed(tmp_path: Path, closed: str) -> None:
    """Where standard output or standard error is closed, a command goes on as it would have."""
    words = shlex.join([sys.executable, "-m", "launch", "ls", str(tmp_path)])
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", f"{words} {closed}"], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_there_is_one_console() -> None:
    """Nobody in launch prints by a console that is not guarded."""
    for path in (ROOT / "launch").glob("*.py"):
        imported = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{name.name}" for node in imported for name in node.names}
        assert path.name == "console.py" or "rich.console.Console" not in names, path

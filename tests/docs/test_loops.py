"""Every program of docs/loops.md ends with the same bits, whatever hits it."""

import os
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest

from jobkit import faults
from jobkit.compare import compare
from jobkit.contract import ENV_DRILL, Exit
from jobkit.drill.settings import Drill
from jobkit.run.run import Run
from jobkit.rundir.ledger import read_events
from jobkit.rundir.store import Store
from tests.docs.snippets import ROOT, blocks
from tests.harness import loaders, training

PROGRAMS = {
    re.findall(r'Run\("runs/(\w+)"', block.code)[0]: block.code
    for block in blocks(ROOT / "docs/loops.md")
    if block.language == "python"
}
HAIKU = "import haiku"
"""What a program has that needs more than this environment."""
HITS = ("step:8=TERM", "step:6=KILL")
"""In the eighth step of the first attempt, in the sixth of the second one."""


def program(place: str, code: str) -> None:
    """Run a program in a directory; the rounds of a loop of its own are steps to a fault too."""
    os.chdir(place)
    if HAIKU in code:
        sys.path.append(loaders.environment("haiku")["PYTHONPATH"])
    Path("snippet.py").write_text(code)
    should_save = Run.should_save

    def round_ends(run: Run, step: int) -> bool:
        faults.reach("step")
        return should_save(run, step)

    Run.should_save = round_ends  # type: ignore[method-assign]
    runpy.run_path("snippet.py", run_name="__main__")


def attempt(place: Path, code: str, fault: str = "") -> int:
    """Run one attempt of it, to its end or until a fault ends it; return the exit code."""
    place.mkdir(exist_ok=True)
    drill = Drill(save_every=5).to_json()
    ended, printed = training.attempt(place, function=program, code=code, fault=fault, environment={ENV_DRILL: drill})
    assert ended in (0, Exit.PREEMPTED, -signal.SIGKILL), printed
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, tmp_path: Path) -> None:
    """Stopped by a SIGTERM and by a SIGKILL, it goes on to the same end as undisturbed, to the bit."""
    if HAIKU in PROGRAMS[name]:
        loaders.needed("haiku")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert attempt(whole, PROGRAMS[name]) == 0
    assert [attempt(run, PROGRAMS[name], fault) for fault in HITS] == [Exit.PREEMPTED, -signal.SIGKILL]
    assert attempt(run, PROGRAMS[name]) == 0
    assert compare(whole / f"runs/{name}", run / f"runs/{name}").equal
    restored = [event["step"] for event in read_events(Store(run / f"runs/{name}")) if event["event"] == "restored"]
    assert len(restored) == 2
    assert all(restored)


def test_each_shape_is_there() -> None:
    """The page has the programs that it promises, each in a run directory of its own."""
    assert len(PROGRAMS) == (ROOT / "docs/loops.md").read_text().count("```python") >= 9

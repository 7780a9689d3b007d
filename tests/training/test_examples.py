"""The examples: how few lines jobkit takes, and that what they print is the same bits whatever hits them."""

import difflib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobkit.compare import compare
from jobkit.rundir.ledger import read_events, read_json
from jobkit.rundir.store import Store
from jobkit.supervise.heartbeat import Phase, read_beat

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "jobkit/examples"


def start(*command: str, **environ: str) -> "subprocess.Popen[str]":
    """Start Python with arguments."""
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*command: str, **environ: str) -> tuple[int, str]:
    """Run Python with arguments to its end; return the exit code and what it printed."""
    with start(*command, **environ) as process:
        out, err = process.communicate(timeout=200)
    assert process.returncode in (0, -signal.SIGKILL), err
    return process.returncode, out


def changed_lines(before: str, after: str) -> int:
    """Count the lines one has to write: added or modified, re-indented ones included, blank ones left out.

    Where lines are replaced by fewer, the removed ones count.
    """
    old, new = ([line for line in text.splitlines() if line.strip()] for text in (before, after))
    opcodes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in opcodes if tag != "equal")


@pytest.mark.parametrize(("kind", "most"), [("nnx", 6), ("linen", 7)])
def test_few_lines(kind: str, most: int) -> None:
    """A plain loop becomes a run by at most 6 changed lines in NNX, 7 in Linen."""
    before, after = ((EXAMPLES / f"{kind}_{which}.py").read_text() for which in ("plain", "jobkit"))
    assert 0 < changed_lines(before, after) <= most


def test_changed_lines_counts() -> None:
    """Added, modified and re-indented lines count; blank lines and unchanged ones do not."""
    assert changed_lines("a\nb\n", "a\nb\n") == 0
    assert changed_lines("a\nb\n", "a\n\nb\n") == 0
    assert changed_lines("a\nb\n", "new\na\n  b\n") == 2
    assert changed_lines("a\nb\nc\n", "a\n") == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_killed_ends_like_plain(kind: str, tmp_path: Path) -> None:
    """SIGKILLed in its second commit and run again, it ends with the plain loop's final loss to the last bit."""
    _, plain = run("-m", f"jobkit.examples.{kind}_plain")
    assert re.fullmatch(r"final loss 0\.\d+\n", plain)
    here = {"JOBKIT_RUN": str(tmp_path / "run")}
    code, out = run("-m", f"jobkit.examples.{kind}_jobkit", JOBKIT_FAULT="after_rename:2", **here)
    assert (code, out) == (-signal.SIGKILL, "")
    code, out = run("-m", f"jobkit.examples.{kind}_jobkit", **here)
    assert (code, out) == (0, plain)
    events = read_events(Store(tmp_path / "run"))
    assert next(event["step"] for event in events if event["event"] == "restored") > 0
    # Once done it stays done: nothing is trained again, and the same is printed.
    assert run("-m", f"jobkit.examples.{kind}_jobkit", **here) == (0, plain)


@pytest.mark.slow
def test_strategies(tmp_path: Path) -> None:
    """Every strategy trains, keeps what it says, and what is loaded elsewhere is what was best."""
    _, out = run("-m", "jobkit.examples.strategies", str(tmp_path))
    found = dict(re.findall(r"^(\w+) +val_loss ([\d.]+)", out, flags=re.MULTILINE))
    kept = {name: eval(steps) for name, steps in re.findall(r"^(\w+) .*checkpoints (\[.*\])$", out, flags=re.MULTILINE)}
    assert set(kept) == {"periodic", "best_only", "combined", "own_loop"}
    assert all(steps[-1] == 160 for steps in kept.values())
    assert len(kept["periodic"]) == 3
    assert len(kept["best_only"]) <= 2
    assert len(kept["combined"]) in (3, 4)
    assert kept["own_loop"] == [128, 144, 160]
    assert found["loaded"] == found["combined"]
    assert float(found["combined"]) <= float(found["periodic"])
    assert "exported   ['model']" in out


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["best_only", "combined", "own_loop"])
def test_strategies_survive(strategy: str, tmp_path: Path) -> None:
    """A strategy killed in a commit ends like one that was left alone."""
    code = f"import sys; from jobkit.examples import strategies as s; print(s.{strategy}(sys.argv[1]).evaluate())"
    _, alone = run("-c", code, str(tmp_path / "alone"))
    ended, _ = run("-c", code, str(tmp_path / "killed"), JOBKIT_FAULT="before_rename:3")
    assert ended == -signal.SIGKILL
    assert run("-c", code, str(tmp_path / "killed")) == (0, alone)


STEPS = 150


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the run directory of a text training that was left alone, and its last line."""
    place = tmp_path_factory.mktemp("text") / "undisturbed"
    _, out = run("-m", "jobkit.examples.text", "--run", str(place), "--steps", str(STEPS))
    return place, out.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["trainer", "supervisor"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_text_survives(target: str, signum: int, tmp_path: Path, undisturbed: tuple[Path, str]) -> None:
    """`jobkit submit --wait` of the text training, its trainer or supervisor signalled, ends with the same bits."""
    place = tmp_path / "run"
    store = Store(place)
    trainer = [sys.executable, "-m", "jobkit.examples.text", "--steps", str(STEPS)]
    submit = ["-m", "launch", "submit", "--on", "local", "--run", str(place), "--no-snapshot", "--wait", "--"]
    with start(*submit, *trainer) as process:
        while True:
            assert process.poll() is None, process.communicate()
            link = read_json(store, "attempts/0/supervisor.json")
            beat = read_beat(Path(link["heartbeat"])) if link else None
            if link and beat and beat.phase == Phase.STEPPING and beat.step >= STEPS // 2:
                os.kill(beat.pid if target == "trainer" else link["pid"], signum)
                break
            time.sleep(0.005)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    assert len(store.numbers("attempts")) == 2
    log = store.file("attempts/1/log-0.txt").read_text()
    assert log.splitlines()[-1] == undisturbed[1]
    result = compare(str(undisturbed[0]), str(place))
    assert result.equal, result

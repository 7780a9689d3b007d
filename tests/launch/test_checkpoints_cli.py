"""`jobkit checkpoints`: list, verify, export and remove, as a person uses them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobkit import contract
from jobkit.rundir.store import Store
from tests.harness import training


def _best(point: str, run: Any) -> None:
    if point == "step" and run.step % 20 == 19:
        run.save(val_loss=abs(run.step - 25.0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run that keeps several steps with metrics."""
    url = tmp_path_factory.mktemp("checkpoints") / "run"
    code, printed = training.attempt(url, hook=_best, save_every=None, keep=5)
    assert code == 0, printed
    return url


def jobkit(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command line; return exit code, output and errors."""
    ended = subprocess.run(
        [sys.executable, "-m", "launch", "checkpoints", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.slow
def test_list(run: Path) -> None:
    """Every committed step is listed with size, attempt, reason and metrics; the first one was read back."""
    code, printed, _ = jobkit(run, "--json")
    rows = json.loads(printed)
    assert code == 0
    assert [row["step"] for row in rows] == [0, 20, 40, 60]
    assert [row["metrics"] for row in rows[1:]] == [{"val_loss": 6.0}, {"val_loss": 14.0}, {"val_loss": 34.0}]
    assert all(row["bytes"] > 1000 and row["attempt"] == 0 for row in rows)
    assert rows[0]["verified_at"] is not None
    code, printed, _ = jobkit(run)
    assert code == 0
    assert printed.startswith("STEP")
    assert "val_loss 14" in printed


def test_the_best_is_marked(run: Path) -> None:
    """The best step by the metric that the program keeps the best of is marked, and no other."""
    store = Store(run)
    strategy = store.read(contract.STRATEGY)
    store.write(contract.STRATEGY, json.dumps(json.loads(strategy) | {"keep_best": ["val_loss", "min"]}))
    try:
        assert [row["step"] for row in json.loads(jobkit(run, "--json")[1]) if row["best"]] == [20]
        assert [line.split()[0] for line in jobkit(run)[1].splitlines() if " best " in line] == ["20"]
    finally:
        store.write(contract.STRATEGY, strategy)
    assert not any(row["best"] for row in json.loads(jobkit(run, "--json")[1]))


def test_verify_finds_one_flipped_bit(run: Path) -> None:
    """`verify --all` says every step is whole; with one bit flipped it names the file and exits 1."""
    assert jobkit(run, "verify", "--all")[:2] == (0, "step 0: whole\nstep 20: whole\nstep 40: whole\nstep 60: whole\n")
    victim = max(Store(run).file(contract.step_dir(40)).rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    code, printed, _ = jobkit(run, "verify", "--all")
    assert code == 1
    assert victim.name in printed
    assert "step 20: whole" in printed
    told = {row["step"]: row for row in json.loads(jobkit(run, "--json")[1])}
    assert victim.name in told[40]["problem"], "what was found is remembered"
    assert told[20]["problem"] == ""
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    assert jobkit(run, "verify", "40")[0] == 0
    assert not any(row["problem"] for row in json.loads(jobkit(run, "--json")[1]))


@pytest.mark.slow
def test_export(run: Path, tmp_path: Path) -> None:
    """`export` writes parameters that plain Orbax reads, and never overwrites."""
    import orbax.checkpoint as ocp

    code, printed, _ = jobkit(run, "export", "20", "--params", tmp_path / "out")
    assert code == 0
    assert "model/hidden/kernel" in printed
    assert "optimizer" not in printed
    code, document, _ = jobkit(run, "export", "20", "--params", tmp_path / "again", "--json")
    told = json.loads(document)
    assert (code, told["exported"], told["leaves"]) == (0, str(tmp_path / "again"), printed.split())
    tree = ocp.StandardCheckpointer().restore(tmp_path / "out")
    assert tree["model"]["hidden"]["kernel"].shape == (4, 8)
    code, _, errors = jobkit(run, "export", "20", "--params", tmp_path / "out")
    assert code == 2
    assert "never overwrites" in errors
    (tmp_path / "file").write_text("")
    code, _, errors = jobkit(run, "export", "20", "--params", tmp_path / "file" / "out")
    assert (code, errors.count("\n")) == (2, 1), errors
    assert "is not a directory that can be written" in errors


def test_export_for_a_reader_that_has_gone(run: Path, tmp_path: Path) -> None:
    """`export ... | head -0` writes the parameters, and no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "launch", "checkpoints", str(run), "export", "20", "--params", tmp_path / "out"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "out" / "_METADATA").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("'nowhere'", "nowhere does not exist; give the directory of a run ('jobkit ls' lists those here)"),
        ("'.'", "has no committed checkpoint: it is no run, or has not saved yet"),
        ("{run!r}, step='20'", "step '20' is neither a whole number nor 'latest' nor 'best'; write step=20"),
        ("{run!r}, step=7", "is not committed; committed are"),
    ],
)
def test_a_script_that_loads_what_is_not_there(arguments: str, told: str, run: Path, tmp_path: Path) -> None:
    """An uncaught error of `jobkit.load` ends a script that has no `Run` with one sentence too; caught, it is ours."""
    code = f"import jobkit\njobkit.load({arguments.format(run=str(run))})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == contract.Exit.CONFIG
    assert ended.stderr.startswith("jobkit: ")
    assert told in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr


def test_remove(run: Path) -> None:
    """`rm` removes an older step and refuses the newest."""
    code, printed, _ = jobkit(run, "rm", "0", "--json")
    assert (code, json.loads(printed)) == (0, {"run": str(run), "removed": [0]})
    code, _, told = jobkit(run, "rm", "60")
    assert code == 2
    assert "it stays" in told
    assert [row["step"] for row in json.loads(jobkit(run, "--json")[1])] == [20, 40, 60]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["verify", "7"], "'7' is not a committed step"),
        (["export", "20"], "give --params OUT"),
        (["rm"], "rm needs the step to remove"),
        (["polish"], "'polish' is not one of"),
    ],
)
def test_mistakes(arguments: list[str], told: str, run: Path) -> None:
    """A mistake is one sentence and exit code 2."""
    code, printed, errors = jobkit(run, *arguments)
    assert (code, printed) == (2, "")
    assert told in errors
    assert len(errors.splitlines()) == 1

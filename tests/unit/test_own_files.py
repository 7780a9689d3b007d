"""What a program leaves below its run directory: which files are its own, and how two runs' differ."""

from pathlib import Path

import pytest

from jobkit.rundir.store import Store
from launch.drill import own_files, verdict
from launch.drill.own_files import Difference
from launch.drill.verdict import Trial


def left(place: Path, **files: str) -> Store:
    """Write a run that leaves files; '__' in a name is a slash, and the ending is .txt."""
    for name, text in files.items():
        path = place / f"{name.replace('__', '/')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Store(place)


def test_what_is_the_programs_own(tmp_path: Path) -> None:
    """Files below the run directory and below the copied code; nothing of jobkit's, no cache, nothing behind a link."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/big.txt").write_text("")
    own = {"ema": "1", "out__a": "1", "code__abc__results": "1"}
    other = {"checkpoints__1__x": "", "attempts__0__log": "", "tensorboard__x": ""}
    store = left(tmp_path / "run", **own, **other)
    (tmp_path / "run/code/abc/__pycache__").mkdir()
    (tmp_path / "run/code/abc/__pycache__/x.pyc").write_text("")
    (tmp_path / "run/strategy.json").write_text("{}")
    (tmp_path / "run/code/abc.tar.gz").write_text("")
    (tmp_path / "run/code/abc/data").symlink_to(tmp_path / "data")
    assert sorted(own_files.read(store)) == ["ema.txt", "out/a.txt", "results.txt"]


@pytest.mark.parametrize(
    ("mine", "difference"),
    [
        ({"a": "1\n2\n", "log": "1\n2\n", "time": "x"}, Difference()),
        ({"a": "1\n3\n", "log": "1\n2\n", "time": "x"}, Difference(other=frozenset({"a.txt"}))),
        ({"a": "1\n2\n", "log": "1\n2\n1\n2\n", "time": "x"}, Difference(again=frozenset({"log.txt"}))),
        ({"a": "1\n2\n", "time": "x"}, Difference(missing=frozenset({"log.txt"}))),
        ({"a": "1\n2\n", "log": "1\n2\n", "time": "x", "b": ""}, Difference(extra={"b.txt": "."})),
        ({"a": "1\n2\n", "log": "1\n2\n", "time": "x", "w__run7__f": "", "w__run7__g": ""}, Difference()),
        ({"a": "1\n2\n", "log": "1\n2\n"}, Difference()),
    ],
)
def test_differences(tmp_path: Path, mine: dict[str, str], difference: Difference) -> None:
    """What differs between undisturbed runs too is left out, by name and by the directory of names that are new."""
    usual = own_files.read(left(tmp_path / "a", a="1\n2\n", log="1\n2\n", time="1", w__run1__f=""))
    again = own_files.read(left(tmp_path / "b", a="1\n2\n", log="1\n2\n", w__run2__f=""))
    found = own_files.differ(usual, own_files.read(left(tmp_path / "c", **mine)))
    assert found.without(own_files.differ(usual, again)) == difference


def test_what_files_cost() -> None:
    """Another content and a missing file break the promise; lines that stand there twice, and rests, are warnings."""
    trial = Trial("kill", "SIGKILL in mid-run")
    names = (frozenset({"ema.txt"}), frozenset({"log.txt"}), frozenset({"out.txt"}), {"tmp.npy": "."})
    verdict.judge_files(trial, Difference(*names))
    assert trial.files == ("ema.txt", "out.txt")
    assert trial.broken == [
        "it left another ema.txt than an undisturbed run",
        "it left no out.txt, and an undisturbed run does",
    ]
    assert [line.partition(":")[0] for line in trial.warnings] == ["log.txt", "tmp.npy"]

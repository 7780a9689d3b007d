"""What fails is run once more, alone: what it is then decides whether the build fails."""

from pathlib import Path

import pytest

from tests.harness import classify

TESTS = """
import os, pathlib, pytest

def first(name):
    seen = pathlib.Path(name.replace("/", "_") + ".seen")
    known = seen.exists()
    seen.touch()
    return not known

@pytest.mark.parametrize("how", ["a::b[c]", *HOWS])
def test_it(how, request):
    assert how != "broken"
    assert not (how == "race" and first(request.node.name))

@pytest.mark.timing
def test_time():
    with open("order", "a") as order:
        order.write(f"timing in {os.environ.get('PYTEST_XDIST_WORKER', 'the only process')}\\n")
    assert "late" not in HOWS or not first("late")

def test_other():
    with open("order", "a") as order:
        order.write(f"other in {os.environ.get('PYTEST_XDIST_WORKER', 'the only process')}\\n")
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty project whose tests these are to be."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/flaky.txt").write_text("# none\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = timing: about time\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # of the run that this is a test of
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p xdist -p no:cacheprovider")
    return tmp_path / "tests"


RACE = "tests/test_it.py::test_it[race]"


@pytest.mark.parametrize(
    ("hows", "known", "code", "said"),
    [
        ([], RACE, 0, []),
        (["race"], "tests/test_it.py::test_other", 0, [f"FLAKY: {RACE} failed, and passed alone: add it to"]),
        (["race"], RACE, 1, [f"FLAKY: {RACE} failed, and passed alone: is known to be flaky"]),
        (["late"], "", 0, ["FLAKY: tests/test_it.py::test_time failed, and passed alone: add it to"]),
        (["race"] * 6, "", 0, [f"FLAKY: tests/test_it.py::test_it[race{n}]" for n in range(6)]),
        (["race"] * 6 + ["late"], "", 1, []),
        (["broken"], "", 1, []),
        (["race", "broken"], "", 1, [f"FLAKY: {RACE}"]),
    ],
    ids=["sound", "race", "listed", "late", "six", "seven", "broken", "race and broken"],
)
def test_codes(
    planted: Path, capfd: pytest.CaptureFixture[str], hows: list[str], known: str, code: int, said: list[str]
) -> None:
    """A few races pass and are named; one that is known, one failure that comes again, and many of them do not."""
    (planted / "test_it.py").write_text(f"HOWS = {hows}\n{TESTS}")
    (planted / "flaky.txt").write_text(f"# known\n{known}\n")
    assert classify.main([]) == code
    named = [line for line in capfd.readouterr().out.splitlines() if line.startswith("FLAKY: ")]
    assert len(named) == len(said)
    assert all(line.startswith(start) for line, start in zip(named, said, strict=True))


def test_time_comes_first_and_alone(planted: Path) -> None:
    """Tests about time have run, in one process, before workers start; a choice of tests holds for both."""
    (planted / "test_it.py").write_text(f"HOWS = []\n{TESTS}")
    order = planted.parent / "order"
    assert classify.main(["-n", "2", "--dist", "worksteal", "-m", "not slow"]) == 0
    first, then = order.read_text().splitlines()
    assert first == "timing in the only process"
    assert then.startswith("other in gw")
    order.unlink()
    assert classify.main(["-m", "slow"]) == classify.NONE_CHOSEN
    assert not order.exists()


def test_what_cannot_be_run_fails(planted: Path) -> None:
    """Tests that cannot even be read are not taken for a race."""
    (planted / "test_it.py").write_text("import nothing_of_that_name\n")
    assert classify.main([]) == 2

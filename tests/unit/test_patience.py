"""A storage that does not answer for a while: said in our words, asked again, and never taken for damage."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobkit import contract
from jobkit.errors import ConfigError, DamagedError, StorageError
from jobkit.patience import Patience
from jobkit.rundir import commits
from jobkit.rundir.commits import Commit
from jobkit.rundir.store import Store
from tests.harness.outage import Outage


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A run directory with one committed step of two files."""
    store = Store(tmp_path / "run")
    stage = commits.new_stage(store, 3, 0)
    (stage / "default" / "d").mkdir(parents=True)
    (stage / "default" / "d" / "data").write_bytes(b"x" * 1000)
    (stage / "default" / "meta").write_bytes(b"y")
    commits.publish(store, stage, state={}, commit=Commit(step=3, attempt=0, at=0.0, reason="asked", files={}))
    return store


def python(script: str, store: Store, outage: Outage, *, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a script in which `store` is the run directory, with a disk that may not answer."""
    before = f"from jobkit.rundir import commits\nfrom jobkit.rundir.store import Store\nstore = Store({store.url!r})\n"
    return subprocess.run(
        [sys.executable, "-c", before + script],
        env=os.environ | outage.environ,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


_EVERY = """
calls = {
    "exists": lambda: store.exists("x"), "stat": lambda: store.stat("x"), "names": lambda: store.names("checkpoints"),
    "numbers": lambda: store.numbers("checkpoints"), "read": lambda: store.read("x"),
    "tail": lambda: store.read("x", last_bytes=3), "write": lambda: store.write("x", "1"),
    "create": lambda: store.create("new", "1"), "claim": lambda: store.claim("attempts"),
    "tidy": lambda: store.tidy("x"), "remove": lambda: store.remove("x"), "steps": lambda: commits.steps(store),
    "read commit": lambda: commits.read(store, 3), "problems": lambda: commits.problems(store, 3),
    "check_newest": lambda: commits.check_newest(store, 0, "go on"),
}
for name, call in calls.items():
    try:
        print(name, "->", call())
    except BaseException as error:
        print(name, type(error).__name__)
"""


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE])
def test_all_of_a_store_speaks_in_storage_errors(number: int, store: Store, tmp_path: Path) -> None:
    """Whatever is asked of a disk that does not answer raises `StorageError`, and neither the system's own nor None."""
    outage = Outage(tmp_path, store.path)
    with outage.during(number):
        told = python(_EVERY, store, outage)
    lines = told.stdout.splitlines()
    assert len(lines) == 15, told.stderr
    assert [line for line in lines if not line.endswith(" StorageError")] == []


def test_what_nobody_may_read_is_for_a_person(store: Store, tmp_path: Path) -> None:
    """A refused permission is a `ConfigError` that no patience asks about again."""
    outage = Outage(tmp_path, store.path)
    with outage.during(errno.EACCES):
        told = python("from jobkit.patience import Patience\nstore.patient(Patience()).names('')", store, outage)
    assert "ConfigError: cannot list" in told.stderr
    assert "permission denied" in told.stderr


def test_a_patient_store_waits_for_the_answer(store: Store, tmp_path: Path) -> None:
    """Looks and writes go on when the disk answers again; a person is told once that it does not, and that it does."""
    outage = Outage(tmp_path, store.path)
    outage.begin()
    outage.end_after(2.0)
    script = """
from jobkit.patience import Patience
store = store.patient(Patience())
print(store.numbers("checkpoints"), store.claim("attempts"), store.claim("attempts"))
print(store.create("x", "1"), store.create("x", "2"), store.read("x"))
"""
    told = python(script, store, outage)
    assert told.stdout.splitlines() == ["[3] 0 1", "True False b'1'"], told.stderr
    first, second = told.stderr.splitlines()
    assert "cannot list" in first
    assert "asking again until the storage answers" in first
    assert "the storage answers again" in second


def test_patience_ends(tmp_path: Path) -> None:
    """Past its deadline, or when there is no time left to wait, the storage's error stands; damage is told at once."""

    def fails() -> None:
        raise StorageError("no answer")

    for asking in (Patience(deadline_s=0.3), Patience(over=lambda: True)):
        with pytest.raises(StorageError, match="no answer"):
            asking(fails)
    asked = []

    def damaged() -> None:
        asked.append(1)
        raise DamagedError("damaged")

    with pytest.raises(DamagedError):
        Patience()(damaged)
    assert len(asked) == 1


def test_an_outage_is_no_damage(store: Store, tmp_path: Path) -> None:
    """A step that cannot be looked at is neither whole nor damaged: asking raises, so that nobody sets it aside."""
    script = """
commits._BAD_SECTOR_S = 0.5
for step in (3,):
    try:
        print(commits.problems(store, step))
    except Exception as error:
        print(type(error).__name__)
"""
    step = store.file(contract.step_dir(3))
    for below in (step / contract.COMMIT, step / "default", step / "default" / "d" / "data"):
        outage = Outage(tmp_path, below)
        with outage.during(errno.ESTALE):
            told = python(script, store, outage)
        assert told.stdout.splitlines() == ["StorageError"], (below, told.stderr)


@pytest.mark.slow
def test_a_bad_sector_is_damage(store: Store, tmp_path: Path) -> None:
    """A file that answers EIO for good is damaged; for a moment, it is not."""
    script = "commits._BAD_SECTOR_S = 4.0\nprint(commits.problems(store, 3))"
    outage = Outage(tmp_path, store.file(contract.step_dir(3)) / "default" / "meta")
    with outage.during(errno.EIO):
        assert "default/meta cannot be read: Input/output error" in python(script, store, outage).stdout
    outage.begin(errno.EIO)
    outage.end_after(1.5)
    assert python(script, store, outage).stdout.splitlines() == ["[]"]


def test_no_commit_leaves_a_directory_out(store: Store, tmp_path: Path) -> None:
    """A directory of a stage that cannot be listed is no empty one: the step is not committed without it."""
    stage = commits.new_stage(store, 4, 0)
    (stage / "default" / "d").mkdir(parents=True)
    (stage / "default" / "d" / "data").write_bytes(b"x")
    outage = Outage(tmp_path, stage / "default" / "d")
    script = f"""
from pathlib import Path
commit = commits.Commit(step=4, attempt=0, at=0.0, reason="asked", files={{}})
commits.publish(store, Path({str(stage)!r}), state={{}}, commit=commit)
"""
    with outage.during(errno.ESTALE):
        assert "StorageError: cannot commit step 4" in python(script, store, outage).stderr
    assert commits.steps(store) == [3]


def test_a_refused_commit_json_is_damage(store: Store) -> None:
    """A commit.json that is a directory is no commit, and no reason to give the run up."""
    path = store.file(f"{contract.step_dir(3)}/{contract.COMMIT}")
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedError):
        commits.read(store, 3)
    with pytest.raises(ConfigError):
        store.read(f"{contract.step_dir(3)}/{contract.COMMIT}")

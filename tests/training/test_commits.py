"""Committed steps: what makes a directory a checkpoint, every kind of damage, retention, debris."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jobkit import contract
from jobkit.errors import ConfigError, StorageError, SupersededError
from jobkit.rundir import commits
from jobkit.rundir.commits import Commit
from jobkit.rundir.retention import Keep
from jobkit.rundir.store import Store

DATA = {"default/manifest": b"\0\1" * 20, "default/d/part0": b"abc" * 50, "default/d/part1": b"xyz" * 50, "empty": b""}


def staged(store: Store, step: int, *, attempt: int = 0, data: Mapping[str, bytes] = DATA) -> Path:
    """Write the files of one save to a stage."""
    stage = commits.new_stage(store, step, attempt)
    for name, content in data.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_bytes(content)
    return stage


def publish(store: Store, step: int, *, attempt: int = 0, data: Mapping[str, bytes] = DATA, **values: float) -> bool:
    """Commit one step."""
    stage = staged(store, step, attempt=attempt, data=data)
    commit = Commit(
        step=step,
        attempt=attempt,
        at=1.5e9,
        reason="asked",
        files={},
        metrics=values,
        topology={"device_count": 8, "platform": "cpu"},
        versions={"jax": "0.0"},
    )
    return commits.publish(store, stage, state={"version": 1, "parts": {}}, commit=commit)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A run with steps 3 and 7."""
    store = Store(tmp_path / "run")
    assert publish(store, 3)
    assert publish(store, 7, loss=0.5, accuracy=float("inf"))
    return store


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A committed step 7 that hypothesis damages and mends again."""
    store = Store(tmp_path_factory.mktemp("shared"))
    assert publish(store, 7, loss=0.5)
    yield store
    assert commits.problems(store, 7) == []


def files(store: Store, step: int = 7) -> list[Path]:
    """List the files of a step."""
    return [path for path in sorted(store.file(contract.step_dir(step)).rglob("*")) if path.is_file()]


# What is published is whole.


@given(
    st.dictionaries(
        st.lists(
            st.text("ab.-_%é ", min_size=1, max_size=6).filter(lambda s: s.strip(".")), min_size=1, max_size=3
        ).map(lambda parts: "default/" + "/".join([f"d{part}" for part in parts[:-1]] + [f"f{parts[-1]}"])),
        st.binary(max_size=100),
        max_size=5,
    ),
    st.integers(0, 10**12),
    st.dictionaries(st.text("seal\"': {}ab", max_size=20), st.floats(), max_size=4),
)
@settings(max_examples=40, deadline=None)
@example({}, 0, {})
@example({}, 2, {"": float("nan"), "i": float("inf"), "j": -float("inf")})
@example(DATA, 1, {'"seal": "00000000"': 1.0, "seal": 0.0})
def test_what_is_published_is_whole(data: dict[str, bytes], step: int, metrics: dict[str, float]) -> None:
    """Any files under any names: the commit lists them, checks out, and reads back as it was given."""
    with tempfile.TemporaryDirectory() as directory:
        store = Store(directory)
        assert publish(store, step, data=data, **{f"m{name}": value for name, value in metrics.items()})
        assert commits.steps(store) == [step]
        assert commits.problems(store, step) == []
        commit = commits.read(store, step)
        assert commit.files.keys() == data.keys() | {contract.STATE}
        assert commit.nbytes == sum(len(content) for content in data.values()) + len('{"version":1,"parts":{}}')
        assert repr(commit.metrics) == repr({f"m{name}": value for name, value in metrics.items()})
        assert store.names(contract.STAGE) == []


def test_what_a_commit_tells(store: Store) -> None:
    """commit.json is JSON for anybody: step, attempt, metrics, topology, and a crc32c of every file."""
    told = json.loads(store.read("checkpoints/7/commit.json"))
    assert (told["step"], told["attempt"], told["version"]) == (7, 0, contract.RUN_VERSION)
    assert told["topology"] == {"device_count": 8, "platform": "cpu"}
    expected = {name: f"{google_crc32c.value(content):08x}" for name, content in DATA.items()}
    assert {name: record["crc32c"] for name, record in told["files"].items() if name != "state.json"} == expected


# Damage.


@pytest.mark.slow
def test_every_single_bit_counts(store: Store) -> None:
    """Flip any one bit of any byte of any file of a step, commit.json included: reported each time, never raised."""
    flipped = 0
    for path in files(store):
        content = path.read_bytes()
        for index in range(len(content)):
            for bit in range(8):
                path.write_bytes(content[:index] + bytes([content[index] ^ 1 << bit]) + content[index + 1 :])
                assert commits.problems(store, 7), f"bit {bit} of byte {index} of {path.name}: {path.read_bytes()!r}"
                flipped += 1
        path.write_bytes(content)
    assert flipped > 7000
    assert commits.problems(store, 7) == []


def test_every_truncation_counts(store: Store) -> None:
    """Cut any file at any length, or lengthen it by one byte of any value: reported each time."""
    for path in files(store):
        content = path.read_bytes()
        for length in range(len(content)):
            path.write_bytes(content[:length])
            assert commits.problems(store, 7), f"{path.name} cut to {length} bytes"
        for byte in (0, 10, 32, 0x7D):
            path.write_bytes(content + bytes([byte]))
            assert commits.problems(store, 7), f"{path.name} with byte {byte} behind it"
        path.write_bytes(content)


def test_what_is_wrong_is_said(store: Store) -> None:
    """Missing, foreign, shortened and changed files are each named, all at once."""
    root = store.file("checkpoints/7")
    (root / "default/manifest").unlink()
    (root / "default/d/part0").write_bytes(b"abc" * 49)
    (root / "default/d/part1").write_bytes(b"xyz" * 49 + b"xyy")
    (root / "default/d/part2").write_bytes(b"")
    (root / "commit.json.bak").write_bytes(b"")
    wrong = commits.problems(store, 7)
    assert len(wrong) == 5
    for told in (
        "default/manifest is missing",
        "default/d/part2 does not belong there",
        "commit.json.bak does not belong there",
        "default/d/part0 has 147 bytes instead of 150",
        "default/d/part1 has crc32c ",
    ):
        assert any(line.startswith(told) for line in wrong), (told, wrong)


def test_each_file_deleted_and_swapped(store: Store) -> None:
    """Delete each file, make it a directory or a dangling link, swap each two that differ: reported each time."""
    paths = files(store)
    for path in paths:
        content = path.read_bytes()
        path.unlink()
        assert commits.problems(store, 7), f"{path.name} deleted"
        path.mkdir()
        assert commits.problems(store, 7), f"{path.name} is a directory"
        path.rmdir()
        path.symlink_to("nowhere")
        assert commits.problems(store, 7), f"{path.name} is a dangling link"
        path.unlink()
        path.write_bytes(content)
    for one in paths:
        for other in paths:
            a, b = one.read_bytes(), other.read_bytes()
            if a != b:
                one.write_bytes(b)
                other.write_bytes(a)
                assert commits.problems(store, 7), f"{one.name} and {other.name} swapped"
                one.write_bytes(a)
                other.write_bytes(b)
    assert commits.problems(store, 7) == []


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_content_counts(shared: Store, data: Any) -> None:
    """Replace any stretch of any file by any other bytes: reported each time."""
    path = data.draw(st.sampled_from(files(shared)))
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)))
    changed = content[:start] + data.draw(st.binary(max_size=40)) + content[end:]
    path.write_bytes(changed)
    try:
        assert bool(commits.problems(shared, 7)) == (changed != content)
    finally:
        path.write_bytes(content)


def test_a_step_under_another_number(store: Store) -> None:
    """A committed directory that was renamed is no checkpoint of that other step."""
    os.rename(store.file("checkpoints/7"), store.file("checkpoints/8"))
    assert "renamed" in commits.problems(store, 8)[0]
    assert "not committed" in commits.problems(store, 7)[0]


def test_a_commit_of_a_newer_format(store: Store) -> None:
    """A step that a newer jobkit wrote is named as such, not taken for damage."""
    path = store.file("checkpoints/7/commit.json")
    told = json.loads(path.read_bytes()) | {
        "version": contract.RUN_VERSION + 1,
        "seal": "00000000",
        "files": "elsewhere",
    }
    content = json.dumps(told, indent=1).encode()
    path.write_bytes(content.replace(b'"seal": "00000000"', b'"seal": "%08x"' % google_crc32c.value(content)))
    with pytest.raises(ConfigError, match=r"has format 2, written by a newer jobkit; .* upgrade jobkit here"):
        commits.problems(store, 7)


def test_metrics_pass_over_what_is_damaged(store: Store) -> None:
    """A damaged commit.json neither fails those who look for metrics nor hides the other steps'."""
    assert commits.metrics(store).keys() == {3, 7}
    store.file("checkpoints/7/commit.json").write_bytes(b"{")
    assert commits.metrics(store) == {3: {}}
    assert commits.steps(store) == [3, 7]


# Setting aside, removal, debris.


def test_setting_aside_keeps_everything(store: Store) -> None:
    """A step that is set aside keeps every byte, beside the reasons; a second one of the same step too."""
    before = {path.name: path.read_bytes() for path in files(store)}
    moved = commits.set_aside(store, 7, ["part0 is gone", "part1 too"])
    assert {path.name: path.read_bytes() for path in moved.rglob("*") if path.is_file()} == before
    assert moved.with_name(moved.name + ".reason.txt").read_text() == "part0 is gone\npart1 too\n"
    assert commits.steps(store) == [3]
    assert publish(store, 7)
    assert commits.set_aside(store, 7, ["again"]) != moved
    assert len(store.names(contract.SET_ASIDE)) == 4
    commits.sweep(store, attempt=10**6)
    assert len(store.names(contract.SET_ASIDE)) == 4


def test_removal_is_complete_and_repeatable(store: Store) -> None:
    """A removed step is gone with its trash; removing it again is no error; others stay."""
    commits.remove(store, 7)
    commits.remove(store, 7)
    assert commits.steps(store) == [3]
    assert commits.problems(store, 3) == []
    assert store.names(contract.TRASH) == []


@pytest.mark.parametrize("point", ["before_rename", "after_rename", "during_retention"])
def test_killed_at_a_named_point(store: Store, point: str) -> None:
    """SIGKILL around the rename and inside removal: a step is there as a whole or not at all; a sweep tidies up."""
    code = (
        "import sys\nfrom tests.training.test_commits import *\n"
        "store = Store(sys.argv[1])\npublish(store, 9, attempt=1)\ncommits.remove(store, 3)"
    )
    environ = os.environ | {contract.ENV_FAULT: point, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code, store.url], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr
    expected = {"before_rename": [3, 7], "after_rename": [3, 7, 9], "during_retention": [7, 9]}[point]
    assert commits.steps(store) == expected
    assert all(commits.problems(store, step) == [] for step in expected)
    assert bool(store.names(contract.STAGE)) == (point == "before_rename")
    assert bool(store.names(contract.TRASH)) == (point == "during_retention")
    commits.sweep(store, attempt=2)
    assert store.names(contract.STAGE) == store.names(contract.TRASH) == []
    assert commits.steps(store) == expected


def test_a_sweep_goes_by_attempt(store: Store) -> None:
    """An attempt sweeps what earlier attempts staged, all there may be of it; never its own or a later one's."""
    mine = [staged(store, 9, attempt=attempt) for attempt in (4, 5, 6, 10)]
    temporary = mine[0].with_name(mine[0].name + ".orbax-checkpoint-tmp")
    temporary.mkdir()
    mine[0].with_name("4-8-abcd").touch()  # what stood in the way of a save that was abandoned
    store.write(f"{contract.STAGE}/foreign", "not ours")
    commits.sweep(store, attempt=5)
    assert store.names(contract.TRASH) == []
    assert store.names(contract.STAGE) == sorted([*(path.name for path in mine[1:]), "foreign"])


# Who may publish, and onto what.


def test_a_superseded_attempt_cannot_publish(store: Store) -> None:
    """Once a newer attempt has begun, an older one's save is refused and nothing becomes visible."""
    for _ in range(3):
        store.claim(contract.ATTEMPTS)
    assert publish(store, 8, attempt=2)
    with pytest.raises(SupersededError, match=r"attempt 1 may not commit step 9: attempt 2 has taken over"):
        publish(store, 9, attempt=1)
    assert commits.steps(store) == [3, 7, 8]


def test_the_first_commit_of_a_step_stays(store: Store) -> None:
    """A step committed before stays to the byte; the second save is told so and leaves no stage."""
    before = {path: path.read_bytes() for path in files(store)}
    assert not publish(store, 7, data={"default/other": b"1"}, loss=0.1)
    assert {path: path.read_bytes() for path in files(store)} == before
    assert store.names(contract.STAGE) == []


def test_a_foreign_directory_is_not_overwritten(store: Store) -> None:
    """A directory that jobkit did not commit is left alone, and named."""
    store.write("checkpoints/9/mine", "x")
    with pytest.raises(ConfigError, match=r"checkpoints/9 exists but jobkit did not commit it: move it away"):
        publish(store, 9)
    assert store.read("checkpoints/9/mine") == b"x"
    assert commits.steps(store) == [3, 7]
    assert "not committed" in commits.problems(store, 9)[0]


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """No stage, no commit, no removal below a file; each says so in words."""
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="choose another run directory"):
        commits.new_stage(store, 1, 0)
    with pytest.raises(ConfigError, match="choose another run directory"):
        commits.remove(store, 1)
    with pytest.raises(StorageError, match="is not committed"):
        commits.read(store, 1)
    assert commits.steps(store) == []


def test_a_stage_that_vanished(store: Store) -> None:
    """A stage removed under the writer's feet commits no files that are not there."""
    stage = staged(store, 9)
    shutil.rmtree(store.file(contract.STAGE))
    commit = Commit(step=9, attempt=0, at=0.0, reason="asked", files={})
    with pytest.raises(StorageError, match="cannot commit step 9"):
        commits.publish(store, stage, state={}, commit=commit)
    assert commits.steps(store) == [3, 7]


# Retention.

histories = st.dictionaries(
    st.integers(0, 10**6), st.dictionaries(st.sampled_from(["loss", "x"]), st.floats(), max_size=2), max_size=12
)
keeps = st.builds(
    Keep, st.integers(-1, 5), st.none() | st.tuples(st.sampled_from(["loss", "x"]), st.sampled_from(["min", "max"]))
)


@given(histories, keeps)
def test_retention(known: dict[int, dict[str, float]], keep: Keep) -> None:
    """Never the newest, never the best; at most newest + 1 stay; only known steps go, oldest first; once is enough."""
    going = keep.superfluous(known)
    staying = known.keys() - set(going)
    assert going == sorted(set(going))
    assert set(going) <= known.keys()
    count = max(1, keep.newest)
    assert set(sorted(known)[-count:]) <= staying
    best = keep.best_of(known)
    assert best is None or best in staying
    assert len(staying) <= count + (keep.best is not None)
    assert keep.superfluous({step: known[step] for step in staying}) == []


@given(histories, keeps)
def test_the_best_step(known: dict[int, dict[str, float]], keep: Keep) -> None:
    """No step has a better value than the best, no earlier one an equal one; NaN and absent values are never best."""
    best = keep.best_of(known)
    name, mode = keep.best or ("", "")
    values = {
        step: metrics[name] for step, metrics in known.items() if metrics.get(name, float("nan")) == metrics.get(name)
    }
    if not values:
        assert best is None
        return
    assert best is not None
    extreme = min(values.values()) if mode == "min" else max(values.values())
    assert values[best] == extreme
    assert best == min(step for step, value in values.items() if value == extreme)


def test_retention_of_a_growing_run() -> None:
    """Saved one after another with retention after each, the best ever seen stays until a better one comes."""
    drawn = random.Random(0)
    keep = Keep(2, ("loss", "min"))
    known: dict[int, dict[str, float]] = {}
    lowest = float("inf")
    for step in range(200):
        known[step] = {"loss": drawn.random()}
        lowest = min(lowest, known[step]["loss"])
        for gone in keep.superfluous(known):
            del known[gone]
        assert lowest in [metrics["loss"] for metrics in known.values()]
        assert {step, step - 1} & known.keys() == {step, max(0, step - 1)}

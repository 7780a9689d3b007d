"""What several processes write together: read by stock Orbax, mixed with what that writes, and killed in the middle."""

import multiprocessing.process
import signal
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from jobkit import contract
from jobkit.checkpoint import orbax_io, state
from jobkit.checkpoint.layout import probe, reading
from jobkit.checkpoint.layout.handler import DirectCheckpointHandler, DirectSave
from jobkit.errors import ConfigError
from jobkit.rundir import commits
from jobkit.rundir.store import Store
from tests.harness import jobs, training

STEPS = 30


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train without interruption in two processes; return the run directory."""
    url = tmp_path_factory.mktemp("undisturbed") / "run"
    assert training.join_many(training.start_many(url, 2, steps=STEPS)) == [0, 0], logs(url)
    return url


def logs(url: Path) -> str:
    """Return what every process printed."""
    return "\n".join(path.read_text() for path in sorted(url.parent.glob(f"{url.name}-*.log")))


def item_of(url: Path, step: int) -> Path:
    """Return where the arrays of a step lie."""
    return Store(url).file(contract.step_dir(step)) / contract.ORBAX_ITEM


@pytest.mark.slow
def test_every_reader_of_orbax_reads_what_several_wrote(undisturbed: Path) -> None:
    """A manager, a StandardCheckpointer and a PyTreeCheckpointer, knowing nothing of jobkit, read the very values."""
    store = Store(undisturbed)
    ours = orbax_io.read(store, STEPS, dict.fromkeys(state.stored_paths(state.table_of(store, STEPS))))
    with ocp.CheckpointManager(store.file(contract.CHECKPOINTS)) as manager:
        trees: list[Any] = [manager.restore(STEPS, args=ocp.args.StandardRestore())]
    with ocp.PyTreeCheckpointer() as one, ocp.StandardCheckpointer() as other:
        trees += [one.restore(item_of(undisturbed, STEPS)), other.restore(item_of(undisturbed, STEPS))]
    assert {path[0] for path in ours} == {"params", "opt"}
    for tree in trees:
        for path, array in ours.items():
            theirs = reduce(getitem, path, tree)
            assert (theirs.dtype, theirs.shape, np.asarray(theirs).tobytes()) == (
                array.dtype, array.shape, array.tobytes()
            )  # fmt: skip


@pytest.mark.slow
def test_both_writers_in_one_run(tmp_path: Path, undisturbed: Path) -> None:
    """A run whose first attempt wrote through stock Orbax goes on with what that wrote, to the same end."""
    url = tmp_path / "run"
    assert training.join_many(training.start_many(url, 2, steps=20, writer="orbax")) == [0, 0], logs(url)
    assert reading.table_of(item_of(url, 20)) is None
    assert training.join_many(training.start_many(url, 2, steps=STEPS)) == [0, 0], logs(url)
    assert reading.table_of(item_of(url, STEPS)) is not None
    assert training.digest(url) == training.digest(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "points"),
    [
        (0, ["after_data:2", "before_rename", "after_rename"]),
        (1, ["before_write:2", "during_write", "after_data"]),
    ],
)
def test_killed_while_they_save(victim: int, points: list[str], tmp_path: Path, undisturbed: Path) -> None:
    """SIGKILL of one process at each point of a save: no committed step is lost, and the run ends as undisturbed."""
    url = tmp_path / "run"
    newest = 0
    for point in points:
        codes = _attempt(url, victim, point)
        assert codes[victim] == -signal.SIGKILL, logs(url)
        committed = commits.steps(Store(url))
        assert committed[-1] >= newest
        assert [commits.problems(Store(url), step) for step in committed] == [[]] * len(committed)
        newest = committed[-1]
    assert training.join_many(training.start_many(url, 2, steps=STEPS)) == [0, 0], logs(url)
    assert training.digest(url) == training.digest(undisturbed)
    assert Store(url).names(contract.STAGE) == []


def _start(url: Path, victim: int, fault: str, **named: Any) -> list[multiprocessing.process.BaseProcess]:
    """Start one attempt in which one process takes a fault."""
    return [
        training.start(
            training.train_many,
            str(url),
            log=Path(f"{url}-{index}.log"),
            environment=own | ({contract.ENV_FAULT: fault} if index == victim else {}),
            steps=STEPS,
            **named,
        )
        for index, own in enumerate(training.processes(2))
    ]


def _attempt(url: Path, victim: int, fault: str) -> list[int | None]:
    """Run an attempt in which one process is killed; as a launcher does, end the other one then."""
    started = _start(url, victim, fault)
    started[victim].join(180)
    started[1 - victim].kill()
    return training.join_many(started)


@pytest.mark.slow
def test_who_is_missing_is_named(tmp_path: Path) -> None:
    """A process that stands still while it writes is waited for a bounded time, and named."""
    url = tmp_path / "run"
    started = _start(url, 1, "during_write:2=STOP", hook=_impatient)
    try:
        jobs.until(lambda: jobs.events(Store(url), "save_failed") != [], "the save is given up", seconds=180)
    finally:
        for process in started:
            process.kill()
        training.join_many(started)
    (failed,) = jobs.events(Store(url), "save_failed")
    assert "process 1 of 2 has not put written/2 within 2 s" in failed["reason"]
    assert commits.steps(Store(url)) == [0]


def _impatient(point: str, run: Any) -> None:
    from jobkit.checkpoint import saving

    if point == "opened":
        saving._SAVE_S = 2.0


@pytest.mark.slow
def test_one_of_several_writes_nothing_alone(tmp_path: Path) -> None:
    """The handler refuses half a tree, also where it does not write in the background; its tryout is process 0's."""
    url = tmp_path / "run"
    assert training.join_many(training.start_many(url, 2, steps=1, hook=_alone)) == [0, 0], logs(url)


def _alone(point: str, run: Any) -> None:
    import jax

    if point == "ended":
        with pytest.raises(ConfigError, match="is for programs of one process"):
            DirectCheckpointHandler().save("nowhere", DirectSave({"a": np.ones(1)}))
        if jax.process_index() == 0:
            assert probe._wrong() is None

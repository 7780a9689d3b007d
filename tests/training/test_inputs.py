"""A mistake inside the job: one sentence with the remedy, exit code 78, nothing half-written."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobkit import contract
from jobkit.rundir import commits
from jobkit.rundir.store import Store
from launch.lifecycle import run_status
from tests.harness import jobs, training


def _resume(url: str, make: Any, **options: Any) -> None:
    import jobkit

    with jobkit.Run(url, **options) as run:
        run.resume(**make())
        for _ in run.steps(3):
            pass


def _generator() -> dict[str, Any]:
    return {"data": (i for i in range(3)), "optimizer": None}


def _no_optimizer() -> dict[str, Any]:
    import jax.numpy as jnp
    import optax  # noqa: F401  what makes an optimizer's absence suspicious

    return {"params": {"w": jnp.ones(3)}}


def _three_wide() -> dict[str, Any]:
    import jax.numpy as jnp

    return {"net": {"w": jnp.ones((3, 2))}, "optimizer": None}


def _four_wide() -> dict[str, Any]:
    import jax.numpy as jnp

    return {"net": {"w": jnp.ones((4, 2))}, "optimizer": None}


def _half() -> dict[str, Any]:
    import jax.numpy as jnp

    return {"net": {"w": jnp.ones((3, 2), jnp.bfloat16)}, "optimizer": None}


def _other_leaf() -> dict[str, Any]:
    import jax.numpy as jnp

    return {"net": {"v": jnp.ones((3, 2))}, "optimizer": None}


def _other_part() -> dict[str, Any]:
    return {**_three_wide(), "more": 1}


def refused(url: Path, make: Any, **options: Any) -> str:
    """Run an attempt that must be refused; return its one sentence."""
    code, printed = training.attempt(url, function=_resume, make=make, **options)
    assert code == contract.Exit.CONFIG, printed
    lines = [line for line in printed.splitlines() if "resumes at" not in line]
    assert len(lines) == 1, printed
    assert lines[0].startswith("jobkit: ")
    return lines[0]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_generator, ["'data' is a generator", "cannot be rewound", "Grain", "state_dict()"]),
        (_no_optimizer, ["no optimizer state", "optimizer=None if this run has none"]),
    ],
)
def test_a_part_that_cannot_be_resumed_is_refused(make: Any, told: list[str], tmp_path: Path) -> None:
    """A generator, or a training without its optimizer, is refused before anything is written."""
    sentence = refused(tmp_path / "run", make)
    assert all(word in sentence for word in told), sentence
    assert commits.steps(Store(tmp_path / "run")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_four_wide, ["net/w", "(3, 2) float32 there", "(4, 2) float32 here"]),
        (_half, ["net/w", "(3, 2) float32 there", "(3, 2) bfloat16 here"]),
        (_other_leaf, ["net/w", "absent here", "net/v", "absent there"]),
        (_other_part, ["more only here"]),
    ],
)
def test_a_state_that_changed_since_the_checkpoint_is_refused(make: Any, told: list[str], tmp_path: Path) -> None:
    """Another shape, dtype, leaf or part than the checkpoint's: named with both sides and the remedy."""
    url = tmp_path / "run"
    assert training.attempt(url, function=_resume, make=_three_wide)[0] == 0
    before = training.digest(url)
    sentence = refused(url, make)
    assert all(word in sentence for word in [*told, "new run directory"]), sentence
    assert training.digest(url) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"save_every": "often"}, "'500 steps'"),
        ({"save_every": 0}, "'500 steps'"),
        ({"save_every": "best"}, "keep_best=('val_loss', 'min')"),
        ({"keep": 0}, "at least 1"),
        ({"keep_best": ("val_loss", "lowest")}, "'min' or 'max'"),
        ({"where": "nosuch://bucket/run"}, "not a URL that fsspec knows"),
        ({"where": " "}, "empty"),
    ],
)
def test_arguments_of_run_that_make_no_sense(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    """A wrong argument of Run is refused with the forms that are right."""
    code, printed = training.attempt(tmp_path / "run", function=_construct, **options)
    assert code == contract.Exit.CONFIG
    assert told in printed
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def _construct(default: str, where: str | None = None, **options: Any) -> None:
    import jobkit

    with jobkit.Run(where or default, **options):
        pass


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """A run directory below a file is refused, naming it."""
    (tmp_path / "file").write_text("")
    url = tmp_path / "file" / "run"
    log = tmp_path / "x"
    code, printed = training.attempt(log, function=_construct, where=str(url))
    assert code == contract.Exit.CONFIG
    assert str(tmp_path / "file") in printed
    assert "choose another run directory" in printed


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    where = tmp_path / "tiny"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(where)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        if os.environ.get("CI"):
            pytest.fail(f"cannot mount a small file system: {mounted.stderr}")
        pytest.skip(f"left out, needs root to mount a small file system: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def _mega() -> dict[str, Any]:
    import jax.numpy as jnp

    return {"net": jnp.zeros((1_000_000,)), "optimizer": None}


def test_a_disk_too_small_for_one_checkpoint(tmp_path: Path, tiny: Path) -> None:
    """A disk without room for a checkpoint is refused before the first step, with both sizes."""
    code, printed = training.attempt(tmp_path / "x", function=_resume_at, where=str(tiny / "run"), make=_mega)
    assert code == contract.Exit.CONFIG
    assert "free and one checkpoint takes 5" in printed
    assert "free space there" in printed


def _resume_at(_: str, where: str, make: Any) -> None:
    _resume(where, make)


def _fill_up(_: str, where: str, *, notice: bool) -> None:
    import jax.numpy as jnp

    import jobkit

    with jobkit.Run(where, save_every="1 steps") as run:
        state = run.resume(net=jnp.zeros((100_000,)), optimizer=None)
        for step in run.steps(20):
            state.net = state.net + 1
            if step == 5:
                run._session.checkpoints.wait()
                with open(Path(where).parent / "ballast", "wb") as file:
                    try:
                        while True:
                            file.write(bytes(1 << 16))
                            file.flush()
                    except OSError:
                        pass
                if notice:
                    os.kill(os.getpid(), signal.SIGTERM)
            run._session.checkpoints.wait()


@pytest.mark.slow
@pytest.mark.parametrize("notice", [False, True])
def test_a_disk_that_fills_up_while_training(notice: bool, tmp_path: Path, tiny: Path) -> None:
    """A disk that fills up: training goes on loudly, ends with 74, keeps what it has whole; then it resumes."""
    url = tiny / "run"
    code, printed = training.attempt(tmp_path / "x", function=_fill_up, where=str(url), notice=notice)
    assert code == contract.Exit.STORAGE, printed
    assert "the disk is full: free space there" in printed
    assert notice or "training goes on" in printed
    store = Store(url)
    assert store.names(contract.STAGE) == []
    steps = commits.steps(store)
    assert steps
    assert all(commits.problems(store, step) == [] for step in steps)
    code, printed = training.attempt(tmp_path / "z", function=_resume_at, where=str(url), make=_tenth)
    assert (code, "free space there" in printed) == (contract.Exit.STORAGE, True), printed
    (tiny / "ballast").unlink()
    shutil.copytree(url, tmp_path / "copy")
    code, printed = training.attempt(tmp_path / "y", function=_resume_at, where=str(tmp_path / "copy"), make=_tenth)
    assert code == 0, printed


@pytest.mark.slow
def test_a_run_waits_for_room_on_its_disk(tmp_path: Path, tiny: Path) -> None:
    """A run whose disk is full waits, longer each time, and begins no attempt; it goes on once there is room."""
    ballast = tiny / "ballast"
    project = jobs.Project(tmp_path)
    project.runs = tiny / "runs"
    store = project.submit(f"commit:1,fill:{ballast},exit:74", "commit:2")
    jobs.until(ballast.exists, "the disk is full")
    jobs.until(lambda: jobs.events(store, "exited"), "the first attempt has ended")
    time.sleep(4)  # restarts after 1, 2, 4 seconds
    assert not run_status.status(store).state.over
    assert store.numbers(contract.ATTEMPTS) == [0]
    ballast.unlink()
    told = jobs.until_over(store, seconds=60)
    assert (told.state, told.committed_step, jobs.outcomes(store)) == ("done", 2, ["storage", "done"])
    assert told.endings[0].reason.startswith("exit code 74")
    project.close()


def _tenth() -> dict[str, Any]:
    import jax.numpy as jnp

    return {"net": jnp.zeros((100_000,)), "optimizer": None}

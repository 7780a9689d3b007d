"""Saving, committing, falling back, retaining, reading back: real Orbax, real files, real damage."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jobkit
from jobkit import contract, faults
from jobkit.checkpoint import state
from jobkit.checkpoint.checkpointer import Checkpoints
from jobkit.checkpoint.restore import find_step, restore
from jobkit.checkpoint.schedule import SaveEvery
from jobkit.errors import ConfigError, StorageError, SupersededError
from jobkit.rundir import commits
from jobkit.rundir.ledger import Ledger, attempt_events
from jobkit.rundir.retention import Keep
from jobkit.rundir.store import Store
from tests.training.test_state import parts_of, same, saved

ROOT = Path(__file__).parent.parent.parent


class Life:
    """One attempt's checkpoints and the parts it trains."""

    def __init__(self, url: Path, *, keep: Keep | None = None, attempt: int = 0, busy: Any = lambda: False) -> None:
        self.store = Store(url)
        self.ledger = Ledger(self.store.file(contract.events_file(attempt, 0)))
        self.attempt = attempt
        self.flushed: list[int] = []
        self.checkpoints = Checkpoints(
            self.store,
            attempt=attempt,
            keep=keep or Keep(3),
            ledger=self.ledger,
            busy=busy,
            before_commit=lambda step: self.flushed.append(len(commits.steps(self.store))),
        )
        self.parts = parts_of(x={"w": jnp.zeros(8), "n": np.zeros(4), "step": 0})

    def set(self, step: int) -> None:
        """Make the state of a step."""
        self.parts["x"].value = {"w": jnp.full(8, step, jnp.float32), "n": np.full(4, float(step)), "step": step}  # type: ignore[attr-defined]

    def save(self, step: int, *, reason: str = "interval", **metrics: float) -> None:
        """Save the state of a step and wait for it."""
        self.set(step)
        self.checkpoints.save(state.take(self.parts), step, reason=reason, metrics=metrics)
        self.checkpoints.wait()

    def restored(self) -> int | None:
        """Restore, check that the values are those of the step, and return it."""
        step = self.checkpoints.restore_newest(self.parts)
        if step is not None:
            value = self.parts["x"].value  # type: ignore[attr-defined]
            assert value["step"] == step
            assert (value["w"] == step).all()
            assert (value["n"] == step).all()
        return step

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return this attempt's events of one kind."""
        return [event for event in attempt_events(self.store, self.attempt) if event["event"] == name]

    def raise_error(self) -> None:
        """Raise what went wrong on the saving thread."""
        error = self.checkpoints.take_error()
        if error is not None:
            raise error


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    """A run's first attempt."""
    made = Life(tmp_path / "run")
    yield made
    made.checkpoints.close()


def damage(store: Store, step: int, name: str = contract.STATE) -> None:
    """Flip the last bit of a file of a committed step."""
    path = store.file(f"{contract.step_dir(step)}/{name}")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def largest(store: Store, step: int) -> str:
    """Name the file that holds the arrays."""
    return max(commits.read(store, step).files.items(), key=lambda item: item[1].size)[0]


# Saving.


def test_a_save_is_whole_and_told(life: Life) -> None:
    """A committed step checks out, comes after what was logged up to it, and stands in the ledger with its cost."""
    assert life.checkpoints.committed_step == -1
    life.save(5, reason="asked", loss=0.5)
    life.raise_error()
    assert commits.steps(life.store) == [5]
    assert commits.problems(life.store, 5) == []
    assert life.flushed == [0]
    assert life.checkpoints.committed_step == 5
    assert not life.checkpoints.saving
    assert life.checkpoints.saving_step is None
    (event,) = life.events("saved")
    assert (event["step"], event["reason"], event["metrics"]) == (5, "asked", {"loss": 0.5})
    assert event["bytes"] == 8 * 4 + 4 * 8
    assert life.checkpoints.last is not None
    assert 0 < life.checkpoints.last.blocking_s <= life.checkpoints.last.durable_s
    commit = commits.read(life.store, 5)
    assert commit.metrics == {"loss": 0.5}
    assert commit.topology["platform"] == "cpu"
    assert commit.versions["jax"] == jax.__version__
    assert life.events("rehearsed")[0]["step"] == 5
    life.save(6)
    assert len(life.events("rehearsed")) == 1


def test_a_step_is_committed_once(life: Life) -> None:
    """Saving the committed step again does nothing; of metrics that come with it the commit knows nothing."""
    life.save(5)
    before = life.store.read("checkpoints/5/commit.json")
    life.save(5)
    life.save(5, loss=1.0)
    assert life.store.read("checkpoints/5/commit.json") == before
    assert [len(life.events(name)) for name in ("saved", "scored", "skipped")] == [1, 1, 0]


def test_a_diverged_metric_spoils_no_checkpoint(life: Life) -> None:
    """A metric of nan or infinity is kept with the step, which restores."""
    life.save(1, loss=float("nan"), other=float("-inf"))
    assert commits.problems(life.store, 1) == []
    assert repr(commits.read(life.store, 1).metrics) == "{'loss': nan, 'other': -inf}"
    assert life.restored() == 1


def test_a_state_without_arrays(tmp_path: Path) -> None:
    """Numbers alone, and a program without any leaf, are checkpoints too."""
    for name, given_ in {"numbers": {"x": {"a": 1, "b": "t"}}, "empty": {"x": ()}, "none": {}}.items():
        store = saved(tmp_path / name, parts_of(**given_))
        parts = parts_of(**given_)
        restore(store, 1, parts)
        assert {name: part.value for name, part in parts.items()} == given_  # type: ignore[attr-defined]


def test_writing_in_place_after_a_save_does_not_reach_it(life: Life) -> None:
    """Numpy arrays written into, generators drawn from, right after save() returns: the old values are saved."""
    big = np.zeros(1 << 20)
    noise, twin = np.random.Generator(np.random.MT19937(1)), np.random.Generator(np.random.MT19937(1))
    held = nnx.Variable(np.zeros(1 << 18))
    life.parts = parts_of(big=big, noise=noise, nnx=nnx.Dict(held=held))
    snapshot = state.take(life.parts)
    assert not any(np.shares_memory(array, big) for array in jax.tree.leaves(snapshot.arrays))  # Orbax copies once more
    life.checkpoints.save(snapshot, 1, reason="asked", metrics={})
    big += 7
    held.get_value()[:] = 7
    noise.normal(size=1000)
    life.checkpoints.wait()
    life.raise_error()
    other = np.random.Generator(np.random.MT19937(2))
    back = nnx.Dict(held=nnx.Variable(np.ones(1 << 18)))
    parts = parts_of(big=np.ones(1 << 20), noise=other, nnx=back)
    restore(life.store, 1, parts)
    assert not parts["big"].value.any()  # type: ignore[attr-defined]
    assert not back["held"].get_value().any()
    assert other.normal(size=9).tobytes() == twin.normal(size=9).tobytes()


def test_donating_right_after_a_save_does_not_reach_it(life: Life) -> None:
    """Jit with donated arguments right after save() returns, many times: the checkpoint has the old values."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    tree = {str(index): jnp.asarray(np.full(1 << 16, index, np.float32)) for index in range(16)}
    jax.block_until_ready(step(jax.tree.map(jnp.copy, tree)))
    life.parts = parts_of(x=tree)
    life.checkpoints.save(state.take(life.parts), 1, reason="asked", metrics={})
    for _ in range(5):
        before, tree = tree, step(tree)
    jax.block_until_ready(tree)
    assert before["0"].is_deleted(), "this JAX does not donate here: the test shows nothing"
    life.checkpoints.wait()
    life.raise_error()
    parts = parts_of(x=jax.tree.map(jnp.ones_like, tree))
    restore(life.store, 1, parts)
    for index in range(16):
        assert (parts["x"].value[str(index)] == index).all()  # type: ignore[attr-defined]


_OUT_OF_SPACE = """
import resource, sys, logging
logging.disable(logging.CRITICAL)
from pathlib import Path
import numpy as np
from jobkit.rundir import commits
from jobkit.errors import JobkitError
from jobkit.checkpoint.kinds import part_of
from tests.training.test_checkpoint import Life, state
life = Life(Path(sys.argv[1]))
life.save(1)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
big = {"big": part_of("big", np.random.default_rng(0).normal(size=1 << 17))}
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
life.checkpoints.save(state.take(big), 2, reason="asked", metrics={})
life.checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print(type(life.checkpoints.take_error()).__name__, life.checkpoints.committed_step)
print(life.store.names("checkpoints/.stage"), commits.steps(life.store), life.events("save_failed")[0]["step"])
life.save(3)
life.raise_error()
life.checkpoints.close()
print(commits.steps(life.store), commits.problems(life.store, 1), commits.problems(life.store, 3))
"""


def test_a_save_that_breaks_off(tmp_path: Path) -> None:
    """A write that fails inside tensorstore leaves no stage and no step, damages none, and the next save succeeds."""
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _OUT_OF_SPACE, str(tmp_path / "run")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["StorageError 1", "[] [1] 2", "[1, 3] [] []"], done.stderr[-2000:]


def test_a_superseded_attempt_stops(life: Life) -> None:
    """Once a newer attempt has begun, a save of the older one fails for good; nothing was committed or removed."""
    life.save(1)
    life.store.claim(contract.ATTEMPTS)
    life.checkpoints._keep = Keep(1)
    life.save(2)
    assert life.checkpoints.failed
    with pytest.raises(SupersededError, match="attempt 1 has taken over"):
        life.raise_error()
    assert commits.steps(life.store) == [1]
    assert [event["step"] for event in life.events("superseded")] == [2]
    assert life.events("save_failed") == []
    life.checkpoints.close()
    assert life.store.names(contract.STAGE) == []


@pytest.mark.parametrize(
    "instant", ["during_write", "after_data", "before_rename", "rename", "before_retention", "read"]
)
def test_superseded_at_any_instant_of_a_save(life: Life, monkeypatch: pytest.MonkeyPatch, instant: str) -> None:
    """A newer attempt tidies up in the middle of a save: that is said, not what the disk says; nothing is touched."""
    if instant != "read":
        life.save(1)
        life.raise_error()
    life.checkpoints._keep = Keep(1)
    reach, check = faults.reach, commits.check_newest

    def take_over(point: str) -> None:
        if point == instant and not life.store.exists(f"{contract.ATTEMPTS}/1"):
            life.store.claim(contract.ATTEMPTS)
            commits.sweep(life.store, attempt=1)
            if instant == "read":  # its retention was as quick
                commits.remove(life.store, 2)

    def check_and_take_over(*what: Any) -> None:
        check(*what)
        take_over("rename")

    monkeypatch.setattr(faults, "reach", lambda point: (reach(point), take_over(point)))
    monkeypatch.setattr(commits, "check_newest", check_and_take_over)
    monkeypatch.setattr(life.checkpoints, "_busy", lambda: take_over("read"))
    life.save(2)
    monkeypatch.undo()
    with pytest.raises(SupersededError, match="attempt 1 has taken over"):
        life.raise_error()
    committed = {"before_retention": [1, 2], "read": []}.get(instant, [1])
    assert commits.steps(life.store) == committed
    assert not any(commits.problems(life.store, step) for step in committed)
    assert [event["step"] for event in life.events("superseded")] == [2]
    assert life.events("save_failed") == life.events("removed") == []
    life.checkpoints.close()
    assert life.store.names(contract.STAGE) == life.store.names(contract.TRASH) == []
    assert life.store.names(contract.SET_ASIDE) == []


def test_a_run_directory_without_room(tmp_path: Path, life: Life) -> None:
    """A state larger than the disk is refused with both sizes, in a later attempt as what may pass."""
    later = Life(tmp_path / "later", attempt=1)
    for one, kind in ((life, ConfigError), (later, StorageError)):
        one.checkpoints.check_space(1 << 20)
        with pytest.raises(kind, match=r"has .* free and one checkpoint takes .* TB: free space there"):
            one.checkpoints.check_space(1 << 60)
    later.checkpoints.close()


# Falling back.


def test_a_damaged_step_is_set_aside_and_the_older_restored(life: Life, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest two damaged: both set aside and said, on stderr and in the ledger; the third newest restores."""
    for step in (1, 2, 3):
        life.save(step)
    damage(life.store, 3, largest(life.store, 3))
    damage(life.store, 2, contract.COMMIT)
    assert life.restored() == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "checkpoint of step 3 is damaged" in told[0]
    assert "crc32c" in told[0]
    assert contract.SET_ASIDE in told[0]
    assert "checkpoint of step 2 is damaged" in told[1]
    assert [event["step"] for event in life.events("set_aside")] == [3, 2]
    assert all(Path(event["moved_to"]).is_dir() and event["reason"] for event in life.events("set_aside"))
    assert commits.steps(life.store) == [1]
    life.save(2)
    life.save(3)
    assert life.restored() == 3


def test_a_step_that_lost_its_commit_is_set_aside(life: Life, capsys: pytest.CaptureFixture[str]) -> None:
    """A step whose commit.json was deleted is damage like any other: said, set aside, the older one restored."""
    life.save(1)
    life.save(2)
    life.store.file("checkpoints/2/commit.json").unlink()
    assert life.restored() == 1
    assert "step 2 is damaged" in capsys.readouterr().err
    life.save(2)
    life.raise_error()


def test_never_from_scratch_when_all_is_damaged(life: Life) -> None:
    """Every checkpoint damaged: refused, now and at the next attempt, with every byte kept; never a fresh start."""
    life.save(1)
    life.save(2)
    damage(life.store, 1)
    life.store.file("checkpoints/2/commit.json").unlink()
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"every checkpoint of .* is damaged and lies in checkpoints/\.set-aside"):
            life.restored()
    assert len(life.store.names(contract.SET_ASIDE)) == 4


def test_a_fresh_run_restores_nothing(life: Life) -> None:
    """Without a checkpoint there is nothing to restore, and that is no error."""
    assert life.restored() is None


def test_a_flipped_bit_never_reaches_the_model(life: Life) -> None:
    """One bit of the array data flipped, which Orbax alone restores silently: no such value is ever restored."""
    weights = np.arange(4096, dtype=np.float32)
    life.parts = parts_of(x=weights)
    for step in (1, 2):
        life.checkpoints.save(state.take(life.parts), step, reason="asked", metrics={})
    life.checkpoints.wait()
    path = life.store.file(f"checkpoints/2/{largest(life.store, 2)}")
    content = path.read_bytes()
    where = content.index(weights.tobytes()) + 8000
    path.write_bytes(content[:where] + bytes([content[where] ^ 4]) + content[where + 1 :])
    plain = ocp.StandardCheckpointer().restore(life.store.file("checkpoints/2/default"))
    assert (np.asarray(plain["x"]) != weights).sum() == 1, "Orbax alone noticed: this test shows nothing"
    assert life.checkpoints.restore_newest(life.parts) == 1
    assert (life.parts["x"].value == weights).all()  # type: ignore[attr-defined]


def test_a_changed_state_is_refused_before_anything_moves(life: Life) -> None:
    """A program that does not fit the newest checkpoint is refused; no step is set aside for it."""
    life.save(1)
    life.parts = parts_of(x={"w": jnp.zeros(9), "n": np.zeros(4), "step": 0})
    with pytest.raises(ConfigError, match=r"x/w: \(8,\) float32 there, \(9,\) float32 here"):
        life.checkpoints.restore_newest(life.parts)
    assert commits.steps(life.store) == [1]
    assert life.store.names(contract.SET_ASIDE) == []


@pytest.mark.parametrize(("damaged", "said"), [(largest, "crc32c"), (lambda *_: contract.COMMIT, "damaged")])
def test_a_save_that_does_not_read_back(damaged: Any, said: str, tmp_path: Path) -> None:
    """Storage that corrupts what was written is found by the first save's rehearsal: set aside and said."""
    life = Life(tmp_path / "run")

    class Rotten(Ledger):
        def append(self, event: str, **fields: Any) -> None:  # type: ignore[override]
            if event == "saved":  # between the commit and the rehearsal
                damage(life.store, fields["step"], damaged(life.store, fields["step"]))
            super().append(event, **fields)

    life.checkpoints._ledger = Rotten(life.store.file(contract.events_file(0, 0)))
    life.save(1)
    life.checkpoints.close()
    with pytest.raises(StorageError, match=rf"step 1 of .* was written but does not read back: .* {said}"):
        life.raise_error()
    assert commits.steps(life.store) == []
    assert life.checkpoints.committed_step == -1
    assert len(life.store.names(contract.SET_ASIDE)) == 2


# Retention.


@given(
    st.lists(st.none() | st.floats(0, 9), min_size=1, max_size=5),
    st.integers(1, 3),
    st.sampled_from([None, ("loss", "min"), ("loss", "max")]),
)
@settings(max_examples=10, deadline=None)
def test_retention_leaves_what_keep_says(losses: list[float | None], newest: int, best: tuple[str, str] | None) -> None:
    """After each save exactly the steps stay that `Keep` names; each removal is in the ledger; nothing else remains."""
    with tempfile.TemporaryDirectory() as directory:
        keep = Keep(newest, best)
        life = Life(Path(directory), keep=keep)
        expected: dict[int, dict[str, float]] = {}
        for step, loss in enumerate(losses, start=1):
            metrics = {} if loss is None else {"loss": loss}
            life.save(step, **metrics)
            life.raise_error()
            expected[step] = metrics
            for gone in keep.superfluous(expected):
                del expected[gone]
            assert commits.metrics(life.store) == expected
            assert life.store.names(contract.TRASH) == life.store.names(contract.STAGE) == []
        removed = sorted(event["step"] for event in life.events("removed"))
        assert removed == [step for step in range(1, len(losses) + 1) if step not in expected]
        assert life.checkpoints.best_step() == keep.best_of(expected)
        life.checkpoints.close()
        assert life.restored() == len(losses)


def test_no_retention_while_a_notice_is_served(tmp_path: Path) -> None:
    """Under a notice nothing is removed or rehearsed: the grace period belongs to the save."""
    life = Life(tmp_path / "run", keep=Keep(1), busy=lambda: True)
    for step in (1, 2, 3):
        life.save(step)
    life.checkpoints.close()
    assert commits.steps(life.store) == [1, 2, 3]
    assert life.events("removed") == life.events("rehearsed") == []


def test_what_improves(tmp_path: Path) -> None:
    """A value improves if it is better than every committed one; an equal one, NaN, or another metric does not."""
    life = Life(tmp_path / "run", keep=Keep(3, ("loss", "min")))
    assert life.checkpoints.improves({"loss": 5.0})
    life.save(1, loss=1.0)
    life.save(2, loss=2.0)
    assert life.checkpoints.best_step() == 1
    assert [life.checkpoints.improves({"loss": loss}) for loss in (0.9, 1.0, 1.1, float("nan"))] == [
        True,
        False,
        False,
        False,
    ]
    assert not life.checkpoints.improves({"accuracy": 0.0})
    life.checkpoints.close()


def test_metrics_that_come_after_the_commit(tmp_path: Path) -> None:
    """They are kept beside the commit, which stays as it is, make a step the best, and go with that very commit."""
    life = Life(tmp_path / "run", keep=Keep(1, ("loss", "min")))
    life.save(1, loss=2.0)
    life.save(2, loss=3.0)
    commit = life.store.file(f"{contract.step_dir(2)}/{contract.COMMIT}")
    before = commit.read_bytes()
    life.save(2, loss=1.0)
    life.save(2, accuracy=float("nan"))
    assert commit.read_bytes() == before
    assert commits.problems(life.store, 2) == []
    assert life.checkpoints.best_step() == 2
    assert commits.steps(life.store) == [2], "1 was the best until then"
    told = commits.read(life.store, 2).metrics
    assert told["loss"] == 1.0
    assert told["accuracy"] != told["accuracy"]
    assert [event["metrics"]["loss"] for event in life.events("scored")[:1]] == [1.0]
    for name in life.store.names(contract.SCORES):
        life.store.file(f"{contract.SCORES}/{name}").write_text('{"loss": [')
    assert commits.read(life.store, 2).metrics == {"loss": 3.0}, "a torn file adds none"
    life.store.claim(contract.ATTEMPTS)
    life.store.claim(contract.ATTEMPTS)
    with pytest.raises(SupersededError):
        life.save(2, loss=0.0)
    life.checkpoints.close()


# Plain Orbax, load, export.


def model_of(seed: int) -> tuple[nnx.Module, Any]:
    """Make a small model and its optimizer."""
    rngs = nnx.Rngs(seed)
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run with steps 1, 2 and 3, of which 2 is the best."""
    url = tmp_path_factory.mktemp("run")
    keep = Keep(9, ("val_loss", "min"))
    Store(url).write(contract.STRATEGY, SaveEvery.parse("10m", keep_best=keep.best).to_json(keep))
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        model, optimizer = model_of(step)
        values = {
            "params": {"dense.0": {"kernel": jnp.full((2, 2), step)}},
            "opt_state": {"mu": {"params": jnp.ones(2)}},
        }
        saved(
            url, parts_of(model=model, optimizer=optimizer, train=values, rng=jax.random.key(step)), step, val_loss=loss
        )
    return Store(url)


def test_plain_orbax_reads_a_committed_step(run: Store) -> None:
    """A CheckpointManager and a StandardCheckpointer, knowing nothing of jobkit, read the very values."""
    root = run.file(contract.CHECKPOINTS)
    with ocp.CheckpointManager(root) as manager:
        assert sorted(manager.all_steps()) == [1, 2, 3]
        assert manager.latest_step() == 3
        one = manager.restore(2)
    other = ocp.StandardCheckpointer().restore(root / "2" / "default")
    kernel = model_of(2)[0].layers[0].kernel.get_value()  # type: ignore[attr-defined]
    for tree in (one, other):
        assert (np.asarray(tree["model"]["layers"]["0"]["kernel"]) == kernel).all()
        assert (np.asarray(tree["train"]["params"]["dense%2E0"]["kernel"]) == 2).all()
    assert commits.problems(run, 2) == []


@pytest.mark.parametrize(("step", "number"), [("latest", 3), ("best", 2), (1, 1)])
def test_load(run: Store, step: int | str, number: int) -> None:
    """Some parts of a chosen step: objects in place, values in the answer; the others stay unread."""
    model, _ = model_of(9)
    got = jobkit.load(run.url, step=step, model=model, rng=jax.random.key(0))
    same(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(model_of(number)[0])))
    assert (jax.random.key_data(got.rng) == jax.random.key_data(jax.random.key(number))).all()
    assert not hasattr(got, "model")


def test_load_refuses(run: Store, tmp_path: Path) -> None:
    """No such step, part, run or metric, another shape, and damage: each refused with what there is."""
    for step, told in [
        (7, "committed are 1, 2, 3"),
        ("newest", "neither a whole number nor"),
        (True, "neither a whole number nor"),
    ]:
        with pytest.raises(ConfigError, match=told):
            jobkit.load(run.url, step=step)
    with pytest.raises(ConfigError, match="has no part 'net'; it has model, optimizer, rng, train"):
        jobkit.load(run.url, net=1)
    with pytest.raises(ConfigError, match=r"rng: \(\) key of threefry2x32 there, \(2,\) key"):
        jobkit.load(run.url, rng=jax.random.split(jax.random.key(0)))
    with pytest.raises(ConfigError, match="nowhere does not exist; give the directory of a run"):
        jobkit.load(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    store = saved(tmp_path / "run", parts_of(x=1))
    with pytest.raises(ConfigError, match="has no best step: its Run was given no keep_best"):
        jobkit.load(store.url, step="best", x=1)
    store.write(contract.STRATEGY, json.dumps({"keep": 3, "keep_best": ["val_loss", "min"]}))
    with pytest.raises(ConfigError, match=r"no committed step of .* has the metric 'val_loss' yet"):
        find_step(store, "best")
    damage(store, 1)
    with pytest.raises(StorageError, match=r"step 1 of .* is damaged: state\.json .*; choose another step"):
        jobkit.load(store.url, x=1)


def test_export(run: Store, tmp_path: Path) -> None:
    """Parameters and batch statistics alone, which plain Orbax reads; an existing directory stays as it is."""
    names = jobkit.export_params(run.url, tmp_path / "out", step="best")
    expected = [f"model/layers/{name}" for name in ("0/kernel", "0/bias", "1/scale", "1/bias", "1/mean", "1/var")]
    assert sorted(names) == sorted([*expected, "train/params/dense%2E0/kernel"])
    tree = ocp.StandardCheckpointer().restore(tmp_path / "out")
    leaves = {"/".join(str(key.key) for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    assert leaves.keys() == set(names)
    assert (leaves["model/layers/0/kernel"] == model_of(2)[0].layers[0].kernel.get_value()).all()  # type: ignore[attr-defined]
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(ConfigError, match="exists: export never overwrites"):
        jobkit.export_params(run.url, tmp_path / "out")
    assert sorted((tmp_path / "out").rglob("*")) == before
    store = saved(tmp_path / "run", parts_of(x=jnp.ones(2)))
    with pytest.raises(ConfigError, match="holds no parameters"):
        jobkit.export_params(store.url, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_export_needs_no_training_code(run: Store, tmp_path: Path) -> None:
    """The export runs in a process that never imports flax or optax."""
    code = (
        "import sys, jobkit\n"
        f"names = jobkit.export_params({run.url!r}, {str(tmp_path / 'out')!r})\n"
        "print(len(names), 'optax' in sys.modules)"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["7", "False"], done.stderr[-2000:]


# Placement on devices.

_PLACED = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jobkit.checkpoint.restore import restore
from tests.training.test_state import parts_of, saved

def placed(shape, names, spec, value):
    mesh = Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), names)
    return jax.device_put(value, NamedSharding(mesh, P(*spec)))

def tree(shape, names, spec, fill):
    w = jnp.arange(64.0).reshape(8, 8) * fill
    return {
        "w": placed(shape, names, spec, w),
        "half": placed(shape, names, spec, w.astype(jnp.bfloat16)),
        "all": placed(shape, names, (), jnp.full(3, fill)),
        "keys": placed(shape, names, spec[:1], jax.random.split(jax.random.key(int(fill)), 8)),
        "zero": placed(shape, names, (), jnp.zeros((0, 2))),
        "third": jax.device_put(jnp.full(5, fill), jax.devices()[3]),
        "first": jax.device_put(jnp.full((), fill), jax.devices()[0]),
        "firstkey": jax.device_put(jax.random.key(int(fill)), jax.devices()[0]),
        "free": jnp.full(8, fill),
        "step": jnp.array(int(fill)) + 0,
        "key": jax.random.key(int(fill)),
    }

ab = ("a", "b")
meshes = [((8,), ("d",), ("d",)), ((2, 4), ab, ("b", "a")), ((4, 2), ab, (None, ab)), ((2,), ("d",), ("d",))]
for index, there in enumerate(meshes):
    before = tree(*there, 3.0)
    store = saved(f"{sys.argv[1]}/{index}", parts_of(x=before))
    for here in (meshes[index], meshes[index - 1]):
        live = tree(*here, 1.0)
        parts = parts_of(x=live)
        restore(store, 1, parts)
        after = parts["x"].value
        for name, leaf in after.items():
            assert leaf.committed == live[name].committed, name
            assert leaf.sharding == live[name].sharding, (name, leaf.sharding)
            kinds = [(x.dtype, x.shape, getattr(x, "weak_type", None)) for x in (leaf, before[name])]
            assert kinds[0] == kinds[1], name
            raw = (jax.random.key_data(x) if "key" in name else x for x in (leaf, before[name]))
            assert len({np.asarray(x).tobytes() for x in raw}) == 1, name
        out = jax.jit(lambda t: t["w"] * t["free"] + t["step"] + jax.random.normal(t["key"], (8, 8)))(after)
        assert out.shape == (8, 8)
print("placed on", jax.device_count())
"""


def test_restoring_onto_other_meshes(tmp_path: Path) -> None:
    """On 8 devices: each mesh restores onto itself and another, placed as the program is; free leaves stay free."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    environ["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-c", _PLACED, str(tmp_path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.stdout == "placed on 8\n", done.stderr[-3000:]


_MEMORY = """
import sys
from pathlib import Path
import jax.numpy as jnp, numpy as np
import jobkit

def figure(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

leaves, nbytes = int(sys.argv[2]), int(sys.argv[3])
def leaf(i):
    return jnp.asarray(np.random.default_rng(i).random(nbytes // 4 // leaves, np.float32))

state = {f"l{i}": leaf(i) for i in range(leaves)}
with jobkit.Run(Path(sys.argv[1]), save_every=None, keep=1) as run:
    run.resume(net=state, optimizer=None)
    run.save(1, wait=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    state["l0"] = run.state.net["l0"] = leaf(leaves)
    before = figure("VmRSS")
    run.save(2, wait=True)
    print(figure("VmHWM") - before)
back = jobkit.load(Path(sys.argv[1]), net={name: jnp.zeros_like(leaf) for name, leaf in state.items()}).net
print(all((back[name] == leaf).all() for name, leaf in state.items()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("leaves", "megabytes"), [(64, 300), (4000, 16)])
def test_what_a_save_takes_of_memory(leaves: int, megabytes: int, tmp_path: Path) -> None:
    """A save copies no state on the host (Orbax keeps 25 kB of books per leaf); thousands of leaves come back."""
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _MEMORY, str(tmp_path / "run"), str(leaves), str(megabytes * 1_000_000)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    extra, same_back = done.stdout.split() or (done.stderr[-2000:], "")
    assert same_back == "True"
    assert int(extra) < 0.2 * megabytes * 1e6 + 40_000 * leaves


def test_a_save_that_failed_does_not_fail_the_next(life: Life) -> None:
    """What Orbax has left over from a save whose directory vanished is not raised at the next one."""
    life.parts = parts_of(x={"w": jnp.zeros(8), "n": np.zeros(4), "step": 0}, big=jnp.zeros(1 << 20))
    for step in range(1, 11, 2):
        life.set(step)
        life.checkpoints.save(state.take(life.parts), step, reason="interval", metrics={})
        stage = life.store.file(contract.STAGE)
        while not stage.is_file():  # tensorstore may make the directory again between the two
            stage.rename(life.store.file(f"gone-{step}-{time.monotonic_ns()}"))
            with contextlib.suppress(FileExistsError):
                stage.touch(exist_ok=False)
        life.checkpoints.wait()
        assert life.checkpoints.take_error() is not None
        stage.unlink()
        life.save(step + 1)
        life.raise_error()
        assert commits.steps(life.store)[-1] == step + 1

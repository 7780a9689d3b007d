"""Beginning a run from what plain Orbax wrote."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jobkit
from jobkit.errors import ConfigError
from tests.fakes.gcs_server import GcsServer


class Net(nnx.Module):
    """A linear layer and a dropout, which has a key and a counter."""

    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.linear = nnx.Linear(4, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def _pair(seed: int) -> tuple[Net, nnx.Optimizer[Any]]:
    """Make a model and its optimizer after one update."""
    model = Net(seed)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    gradients = nnx.grad(lambda net: net.dropout(net.linear(jnp.ones((2, 4)))).sum())(model)
    optimizer.update(model, gradients)
    return model, optimizer


def _save(path: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def _bits(*objects: Any) -> list[bytes]:
    def raw(leaf: Any) -> bytes:
        key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes()

    return [raw(leaf) for value in objects for leaf in jax.tree.leaves(nnx.state(value))]


def test_nnx_model_and_optimizer(tmp_path: Path) -> None:
    """A tree of nnx.state by part: every variable comes back, keys included, and is committed as step 0."""
    model, optimizer = _pair(0)
    _save(tmp_path / "orbax", {"model": nnx.state(model), "optimizer": nnx.state(optimizer)})
    other, its_optimizer = _pair(1)
    with jobkit.Run(tmp_path / "run", start_from=tmp_path / "orbax") as run:
        run.resume(model=other, optimizer=its_optimizer)
        assert run.step == 0
        assert _bits(other, its_optimizer) == _bits(model, optimizer)
    third, its_optimizer = _pair(2)
    jobkit.load(tmp_path / "run", step=0, model=third, optimizer=its_optimizer)
    assert _bits(third, its_optimizer) == _bits(model, optimizer)


def test_manager_of_a_train_state_counts_on(tmp_path: Path) -> None:
    """The newest step of a CheckpointManager is taken, the whole state comes from it, and the run counts on."""
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(3, jnp.bfloat16)}, tx=optax.adam(1e-2))
    with ocp.CheckpointManager(tmp_path / "orbax") as manager:
        for step in (1, 2):
            state = state.apply_gradients(grads={"w": jnp.full(3, float(step), jnp.bfloat16)})
            manager.save(step, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    fresh = TrainState.create(apply_fn=None, params={"w": jnp.zeros(3, jnp.bfloat16)}, tx=optax.adam(1e-2))
    with jobkit.Run(tmp_path / "run", start_from=tmp_path / "orbax") as run:
        values = run.resume(train=fresh, seen=0)
        assert run.step == 0  # `seen` is not in it: what it counts is not known
    with jobkit.Run(tmp_path / "second", start_from=tmp_path / "orbax") as run:
        values = run.resume(train=fresh)
        assert run.step == 2
        assert values.train.step == 2
        assert jax.tree.structure(values.train) == jax.tree.structure(fresh)
        for one, other in zip(jax.tree.leaves(values.train), jax.tree.leaves(state), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes() or one == other == 2
        for _ in run.steps(3):
            run.state.train = run.state.train.apply_gradients(grads={"w": jnp.ones(3, jnp.bfloat16)})
    with jobkit.Run(tmp_path / "second", start_from=tmp_path / "gone") as run:
        assert run.resume(train=fresh).train.step == 3, "the run's own checkpoint comes first"
    assert run.step == 3


def test_items_of_a_composite_are_parts(tmp_path: Path) -> None:
    """Items of a composite checkpoint are matched with parts by name; JSON items are nobody's business."""
    model, optimizer = _pair(0)
    with ocp.CheckpointManager(tmp_path / "orbax") as manager:
        items = {
            "model": ocp.args.PyTreeSave(nnx.state(model)),
            "optimizer": ocp.args.StandardSave(nnx.state(optimizer)),
        }
        manager.save(7, args=ocp.args.Composite(**items, notes=ocp.args.JsonSave({"a": 1})))
        manager.wait_until_finished()
    other, its_optimizer = _pair(1)
    with jobkit.Run(tmp_path / "run", start_from=tmp_path / "orbax") as run:
        run.resume(model=other, optimizer=its_optimizer)
        assert run.step == 7
        assert _bits(other, its_optimizer) == _bits(model, optimizer)


def test_parameters_alone_start_a_fine_tuning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree of parameters without a part's name, in a bucket: they are taken, keys stay fresh, and a line says so."""
    model, _ = _pair(0)
    _save(tmp_path / "orbax", nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    other, its_optimizer = _pair(1)
    before = _bits(other.dropout)
    with GcsServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        import fsspec

        gs = fsspec.filesystem("gs", skip_instance_cache=True)
        gs.put(str(tmp_path / "orbax") + "/", "gs://bucket/pretrained/", recursive=True)
        with jobkit.Run(tmp_path / "run", start_from="gs://bucket/pretrained") as run:
            run.resume(model=other, optimizer=its_optimizer)
    assert _bits(other.linear) == _bits(model.linear)
    assert _bits(other.dropout) == before
    told = capfd.readouterr().err
    assert "begins at step 0 with model of gs://bucket/pretrained; as the program made it: optimizer, model/" in told


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """Another shape, dtype, name or a missing directory: one sentence, nothing changed."""
    _save(tmp_path / "shape", {"w": jnp.zeros((2, 2))})
    _save(tmp_path / "dtype", {"w": jnp.zeros((3,), jnp.bfloat16)})
    _save(tmp_path / "names", {"w": jnp.zeros(3), "v": jnp.zeros(3)})
    _save(tmp_path / "other", {"else": jnp.zeros(3)})
    (tmp_path / "empty").mkdir()
    said = {
        "shape": r"net/w: \(2, 2\) float32 there, \(3,\) float32 here",
        "dtype": r"net/w: \(3,\) bfloat16 there, \(3,\) float32 here",
        "names": "v is only there",
        "other": "none of the parts net is in the checkpoint to start from, which has else",
        "empty": "no Orbax checkpoint to start from",
        "gone": "no such directory",
    }
    for name, text in said.items():
        with jobkit.Run(tmp_path / "run", start_from=tmp_path / name) as run, pytest.raises(ConfigError, match=text):
            run.resume(net={"w": jnp.zeros(3)}, optimizer=None)
        assert not (tmp_path / "run" / "checkpoints" / "0").exists()

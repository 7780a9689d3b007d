"""Beginning a run with each layout that plain Orbax writes, with a run of jobkit's, with weights that lack state."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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
from tests.training.test_plain import _bits as bits
from tests.training.test_plain import _pair as pair


def v1() -> ModuleType:
    """Return Orbax's v1 API, wherever this version has it."""
    try:
        return importlib.import_module("orbax.checkpoint.v1")
    except ImportError:
        return importlib.import_module("orbax.checkpoint.experimental.v1")


def _checkpointer(path: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def _managed(path: Path, **args: Any) -> None:
    with ocp.CheckpointManager(path) as manager:
        for step in (1, 7):
            manager.save(step, **args)
        manager.wait_until_finished()


def _legacy(path: Path, checkpointers: Any, items: Any) -> None:
    manager = ocp.CheckpointManager(path, checkpointers)
    manager.save(7, items)
    manager.close()


def _prefixed(path: Path, tree: Any) -> None:
    options = ocp.CheckpointManagerOptions(step_prefix="ckpt", step_format_fixed_length=8)
    with ocp.CheckpointManager(path, options=options) as manager:
        manager.save(7, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()


def _v1_steps(path: Path, tree: Any) -> None:
    with v1().training.Checkpointer(path) as checkpointer:
        checkpointer.save_pytree(7, tree)


def _v1_items(path: Path, items: Any) -> None:
    with v1().training.Checkpointer(path) as checkpointer:
        checkpointer.save_checkpointables(7, items)


def _composite(path: Path, items: dict[str, Any]) -> None:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        checkpointer.save(path, args=ocp.args.Composite(**saves))


LAYOUTS: dict[str, tuple[int, Callable[[Path, Any, Any], None]]] = {
    "StandardCheckpointer": (0, lambda path, m, o: _checkpointer(path, {"model": m, "optimizer": o})),
    "a tuple": (0, lambda path, m, o: _checkpointer(path, (m, o))),
    "PyTreeCheckpointer": (0, lambda path, m, o: ocp.PyTreeCheckpointer().save(path, {"model": m, "optimizer": o})),
    "PyTreeCheckpointer, a tuple": (0, lambda path, m, o: ocp.PyTreeCheckpointer().save(path, (m, o))),
    "other names": (0, lambda path, m, o: _checkpointer(path, {"network": m, "moments": o})),
    "below one name": (0, lambda path, m, o: _checkpointer(path, {"state": {"model": m, "optimizer": o}})),
    "Composite": (0, lambda path, m, o: _composite(path, {"model": m, "optimizer": o})),
    "manager": (7, lambda path, m, o: _managed(path, args=ocp.args.StandardSave({"model": m, "optimizer": o}))),
    "manager, a tuple": (7, lambda path, m, o: _managed(path, args=ocp.args.PyTreeSave((m, o)))),
    "manager, named items": (
        7,
        lambda path, m, o: _managed(
            path, args=ocp.args.Composite(model=ocp.args.StandardSave(m), optimizer=ocp.args.PyTreeSave(o))
        ),
    ),
    "manager, one item of any name": (
        7,
        lambda path, m, o: _managed(
            path,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave({"model": m, "optimizer": o}), notes=ocp.args.JsonSave({"a": 1})
            ),
        ),
    ),
    "manager, prefix": (7, lambda path, m, o: _prefixed(path, {"model": m, "optimizer": o})),
    "manager, legacy": (7, lambda path, m, o: _legacy(path, ocp.PyTreeCheckpointer(), {"model": m, "optimizer": o})),
    "manager, legacy items": (
        7,
        lambda path, m, o: _legacy(
            path,
            {"model": ocp.PyTreeCheckpointer(), "optimizer": ocp.PyTreeCheckpointer()},
            {"model": m, "optimizer": o},
        ),
    ),
    "v1": (0, lambda path, m, o: v1().save_pytree(path, {"model": m, "optimizer": o})),
    "v1, a tuple": (0, lambda path, m, o: v1().save_pytree(path, (m, o))),
    "v1, named": (0, lambda path, m, o: v1().save_checkpointables(path, {"model": m, "optimizer": o})),
    "v1, steps": (7, lambda path, m, o: _v1_steps(path, {"model": m, "optimizer": o})),
    "v1, steps, named": (7, lambda path, m, o: _v1_items(path, {"model": m, "optimizer": o})),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_orbax(layout: str, tmp_path: Path) -> None:
    """A model and its optimizer come back to the bit from what plain Orbax wrote, and a step is counted on from."""
    (model, optimizer), (other, its_optimizer) = pair(0), pair(1)
    step, write = LAYOUTS[layout]
    write(tmp_path / "orbax", nnx.state(model), nnx.state(optimizer))
    with jobkit.Run(tmp_path / "run", start_from=tmp_path / "orbax") as run:
        run.resume(model=other, optimizer=its_optimizer)
        assert run.step == step
    assert bits(other, its_optimizer) == bits(model, optimizer)


@pytest.mark.parametrize("layout", ["bare", "joint", "params", "item"])
def test_a_model_as_the_root(layout: str, tmp_path: Path) -> None:
    """A model that is the whole tree, one tree of model and optimizer, or parameters below a name of their own."""
    (model, optimizer), (other, its_optimizer) = pair(0), pair(1)
    tree: dict[str, Any] = {
        "bare": nnx.state(model),
        "joint": nnx.state((model, optimizer)),
        "params": {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))},
        "item": nnx.state(model),
    }
    write = _composite if layout == "item" else _checkpointer
    write(tmp_path / "orbax", {"weights": tree[layout]} if layout == "item" else tree[layout])
    with jobkit.Run(tmp_path / "run", start_from=tmp_path / "orbax") as run:
        run.resume(model=other, optimizer=its_optimizer)
    assert bits(other.linear) == bits(model.linear)
    assert (bits(its_optimizer) == bits(optimizer)) == (layout == "joint")


class Normed(nnx.Module):
    """A linear layer, batch statistics and a dropout."""

    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.linear = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def test_weights_lack_statistics_and_keys(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Parameters alone begin a model with BatchNorm and dropout: what they lack is named; a missing layer refused."""
    model, other = Normed(0), Normed(1)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    _checkpointer(tmp_path / "params", {"model": params})
    del params["norm"]
    _checkpointer(tmp_path / "half", {"model": params})
    refused = pytest.raises(ConfigError, match="model/norm/bias is not there")
    with jobkit.Run(tmp_path / "run", start_from=tmp_path / "half") as run, refused:
        run.resume(model=other, optimizer=None)
    with jobkit.Run(tmp_path / "run", start_from=tmp_path / "params") as run:
        run.resume(model=other, optimizer=None)
    assert bits(other.linear) == bits(model.linear)
    told = capfd.readouterr().err
    assert (
        "as the program made it: model/dropout/rngs/count, model/dropout/rngs/key, model/norm/mean, model/norm/var"
        in told
    )


@pytest.mark.parametrize("layout", ["bare", "params", "variables"])
def test_parameters_of_linen_begin_a_train_state(
    layout: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Parameters alone, in whatever collection, begin a TrainState; its optimizer and step are fresh, and named."""
    params = {"dense": {"kernel": jnp.full((2, 2), 3.0)}}
    trees = {"bare": params, "params": {"params": params}, "variables": {"weights": {"params": params}}}
    _checkpointer(tmp_path / "orbax", trees[layout])
    fresh = TrainState.create(apply_fn=None, params=jax.tree.map(jnp.zeros_like, params), tx=optax.adam(1e-2))
    with jobkit.Run(tmp_path / "run", start_from=tmp_path / "orbax") as run:
        values = run.resume(train=fresh)
        assert run.step == 0
    assert float(values.train.params["dense"]["kernel"].sum()) == 12.0
    assert values.train.step == 0
    assert jax.tree.structure(values.train) == jax.tree.structure(fresh)
    assert "as the program made it: train/step, train/opt_state\n" in capfd.readouterr().err


def test_what_may_be_two_things_is_refused(tmp_path: Path) -> None:
    """Two trees that fit a part alike: the part's own name says which one is meant."""
    _checkpointer(tmp_path / "orbax", {"online": {"w": jnp.ones(3)}, "target": {"w": jnp.zeros(3)}})
    refused = pytest.raises(ConfigError, match=r"part 'net' may be online and target of .* resume\(online=...\)")
    with jobkit.Run(tmp_path / "run", start_from=tmp_path / "orbax") as run, refused:
        run.resume(net={"w": jnp.full(3, 5.0)}, optimizer=None)
    with jobkit.Run(tmp_path / "run", start_from=tmp_path / "orbax") as run:
        assert np.asarray(run.resume(online={"w": jnp.full(3, 5.0)}, optimizer=None).online["w"]).sum() == 3


@pytest.mark.parametrize("place", ["", "/checkpoints/2"])
def test_a_run_of_our_own(place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Another run of jobkit's begins a run: its newest step or a given one, all parts, the count of steps."""
    model, optimizer = pair(0)
    random = np.random.default_rng(5)
    with jobkit.Run(tmp_path / "old") as run:
        run.resume(model=model, optimizer=optimizer, random=random, extra={"rate": 0.5})
        for step in run.steps(3):
            random.random()
            model.linear.kernel[...] += 1.0
            optimizer.step[...] += 1
            if step == 1:
                run.save()
    (other, its_optimizer), its_random = pair(1), np.random.default_rng(6)
    with jobkit.Run(tmp_path / "new", start_from=f"{tmp_path}/old{place}") as run:
        values = run.resume(model=other, optimizer=its_optimizer, random=its_random, extra={"rate": 0.1})
        assert run.step == (2 if place else 3)
        assert values.extra == {"rate": 0.5}
    if not place:
        assert bits(other, its_optimizer) == bits(model, optimizer)
        assert its_random.random() == random.random()
    head = Normed(2)
    with jobkit.Run(tmp_path / "alone", start_from=f"{tmp_path}/old{place}") as run:
        run.resume(optimizer=its_optimizer, head=nnx.state(head))
        assert run.step == 0
    assert "as the program made it: head; not taken: extra, model\n" in capfd.readouterr().err

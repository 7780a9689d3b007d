"""Kinds of state that foreign programs have: each works as a part, or is refused with a remedy that works."""

import collections
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jobkit
from jobkit.checkpoint import state
from jobkit.checkpoint.kinds import ValuePart, part_of
from jobkit.checkpoint.restore import export_params, restore
from jobkit.errors import ConfigError
from jobkit.run.optimizer_check import has_optimizer
from tests.training.test_state import parts_of, same, saved, through


@jax.tree_util.register_pytree_with_keys_class
class DotDict(dict):  # type: ignore[type-arg]
    """The JAX cookbook's dict, which raises KeyError where one asks for an attribute it has not."""

    __setattr__ = dict.__setitem__
    __getattr__ = dict.__getitem__

    def tree_flatten_with_keys(self) -> Any:
        """Flatten."""
        keys = tuple(sorted(self))
        return tuple((jax.tree_util.DictKey(key), self[key]) for key in keys), keys

    @classmethod
    def tree_unflatten(cls, keys: Any, values: Any) -> "DotDict":
        """Unflatten."""
        return cls(zip(keys, values, strict=True))


def test_a_dict_whose_items_are_attributes(tmp_path: Path) -> None:
    """A dict with `__getattr__ = dict.__getitem__` is a value like any other, and its items are no methods."""
    with jobkit.Run(tmp_path / "run", save_every=None) as run:
        run.resume(train=DotDict(w=jnp.zeros(3), best=None, state_dict=1, load_state_dict=2), opt=DotDict())
        for step in run.steps(3):
            run.state.train = DotDict(run.state.train, w=run.state.train.w + 1, best=None)
            with pytest.raises(ConfigError, match=r"log\(all=...\) takes a number"):
                run.log(all=run.state.train)
            run.log(step=step)
    with jobkit.Run(tmp_path / "run") as run:
        run.resume(train=DotDict(w=jnp.ones(3), best=None, state_dict=0, load_state_dict=0), opt=DotDict())
        assert type(run.state.train) is DotDict
        assert (run.state.train.w.sum(), run.state.train.state_dict) == (9, 1)


class Raising:
    """An object that answers every question with an error of its own."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class Around:
    """A wrapper that has its methods from what it wraps."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Counter:
    """An object with a position."""

    def __init__(self) -> None:
        self.held: Any = 0

    def state_dict(self) -> Any:
        """Give it."""
        return self.held

    def load_state_dict(self, held: Any) -> None:
        """Take it."""
        self.held = held


def test_objects_are_asked_with_care() -> None:
    """An object whose __getattr__ raises is refused in our words; one that wraps another has that one's position."""
    with pytest.raises(ConfigError, match=r"'x' is .*Raising, which jobkit cannot save"):
        parts_of(x=Raising())
    before, after = Counter(), Counter()
    before.held = {"at": 7}
    through({"x": Around(before)}, {"x": Around(after)})
    assert after.held == {"at": 7}


# Optimizers.


class Model(nnx.Module):
    """A model with dropout and batch statistics."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Apply."""
        return self.drop(self.norm(self.layer(x)))


def _functional(seed: int) -> tuple[Any, Any]:
    model = Model(nnx.Rngs(seed))
    return nnx.split((model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)))


def test_an_optimizer_is_believed() -> None:
    """A part named optimizer, or anything so named inside a dict or a State, is the optimizer's state."""
    params = {"w": jnp.ones(2)}
    _, both = _functional(0)
    for given_ in (
        {"params": params, "optimizer": {"mu": jnp.zeros(3), "count": 0}},
        {"params": params, "opt_state": [jnp.zeros(3)]},
        {"params": params, "Optim": 1},
        {"train": {"params": params, "opt": {"mu": params}}},
        {"train": both},
        {"train": {"state": both}},
        {"train": nnx.to_pure_dict(both)},
        {"params": params, "moments": optax.adam(0.1).init(nnx.state(nnx.Linear(1, 1, rngs=nnx.Rngs(0))))},
    ):
        assert has_optimizer(given_), given_.keys()
    for lacking in (
        {"params": params},
        {"model": nnx.state(Model(nnx.Rngs(0)))},
        {"options": params, "optical": 1, "adopt": 2},
        {"train": {"params": params, "options": {"lr": 0.1}}},
    ):
        assert not has_optimizer(lacking), lacking.keys()


@given(st.sampled_from(["opt", "optim", "optimizer", "optimiser"]), st.sampled_from(["", "_state", "state", "s"]))
def test_an_optimizer_by_any_usual_name(word: str, suffix: str) -> None:
    """What programs call an optimizer's state is recognised as a part's name and as a key."""
    assert has_optimizer({word + suffix: 0})
    assert has_optimizer({"train": [{(word + suffix).upper(): 0}]})


def test_keys_that_cannot_be_sorted_are_refused_before_the_optimizer_is_looked_for(tmp_path: Path) -> None:
    """A dict that is no pytree is refused in one sentence where optax is imported too."""
    with jobkit.Run(tmp_path / "run") as run, pytest.raises(ConfigError, match="is no pytree that JAX can flatten"):
        run.resume(x={1: 1, "1": 2})


# Functional NNX loops.


@jax.jit
def _grow(pure: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf + 1 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, pure)


@pytest.mark.parametrize("how", ["split", "state", "pure dict", "optax"])
def test_a_functional_loop_lives_in_run_state(how: str, tmp_path: Path) -> None:
    """An nnx.State, alone, in a pair, as a dict, or inside an optax state, is a value, without optimizer=None."""

    def make(seed: int) -> Any:
        graph, both = _functional(seed)
        if how == "state":
            return nnx.state(nnx.merge(graph, both))
        if how == "pure dict":
            return nnx.to_pure_dict(both)
        if how == "optax":
            params = nnx.state(Model(nnx.Rngs(seed)), nnx.Param)
            return {"params": params, "opt": optax.adam(0.1).init(params)}
        return both

    with jobkit.Run(tmp_path / "run", save_every=None) as run:
        run.resume(train=make(0))
        for _ in run.steps(2):
            run.state.train = _grow(run.state.train)
        trained = run.state.train
    with jobkit.Run(tmp_path / "run") as run:
        run.resume(train=make(1))
        same(run.state.train, trained)
    if how != "pure dict":  # which does not tell what is a parameter
        exported = export_params(tmp_path / "run", tmp_path / "params")
        assert {name.split("/", 2)[-1] for name in exported} >= {"layer/kernel", "norm/scale"}
        assert {name.split("/")[1] for name in exported} == {"params" if how == "optax" else "0"}
        assert not any("rngs" in name for name in exported)


def test_a_state_is_named_as_its_module_is(tmp_path: Path) -> None:
    """What a module wrote, as releases before wrote a State, is read into a State of it, roles and all."""
    store = saved(tmp_path, parts_of(model=Model(nnx.Rngs(3))))
    parts = parts_of(model=nnx.state(Model(nnx.Rngs(4))))
    restore(store, 1, parts)
    assert isinstance(parts["model"], ValuePart)
    same(parts["model"].value, nnx.state(Model(nnx.Rngs(3))))
    roles = {"/".join(slot.path): slot.role for slot in parts["model"].slots()[0]}
    assert (roles["layer/kernel"], roles["norm/mean"], roles["drop/rngs/key"]) == ("Param", "BatchStat", "RngKey")


# Refs.


def _refs(value: float) -> Any:
    return DotDict(
        params={"w": jax.new_ref(jnp.full((2, 3), value)), "n": jax.new_ref(jnp.int32(value))},
        opt=[jax.new_ref(jnp.full(3, value, jnp.bfloat16))],
    )


def test_refs_are_changed_in_place(tmp_path: Path) -> None:
    """A tree of jax.Ref, as the JAX cookbook trains it, goes on in place and to the bit."""

    @jax.jit
    def update(train: Any) -> None:
        train["params"]["w"][...] += 0.1
        train["params"]["n"][...] += 1

    with jobkit.Run(tmp_path / "run", save_every="1 steps") as run:
        train = _refs(0.0)
        run.resume(train=train)
        for _ in run.steps(3):
            update(train)
    again = _refs(7.0)
    with jobkit.Run(tmp_path / "run") as run:
        run.resume(train=again)
        same(jax.tree.map(lambda ref: ref[...], again), jax.tree.map(lambda ref: ref[...], train))
        with pytest.raises(ConfigError, match="no value part 'train'"):
            _ = run.state.train


def test_what_refs_hold_is_held() -> None:
    """What is held of a boundary stays, whatever the step in progress writes into the refs."""
    ref = jax.new_ref(jnp.zeros(3))
    part = part_of("x", ref)
    held = part.hold()
    ref[...] = jnp.ones(3)
    np.testing.assert_array_equal(held.slots()[0][0].value, np.zeros(3))
    np.testing.assert_array_equal(part.slots()[0][0].value, np.ones(3))


def test_refs_are_not_mixed_and_not_replaced() -> None:
    """A Ref beside plain values, and a Ref in place of another of another dtype, are refused with the remedy."""
    with pytest.raises(ConfigError, match=r"mixes jax.Ref with plain values \(x/n is a int\): .* two parts"):
        parts_of(x={"r": jax.new_ref(jnp.zeros(1)), "n": 1})
    tree = {"r": jax.new_ref(jnp.zeros(1))}
    parts = parts_of(x=tree, n={"n": 1})
    tree["r"] = jax.new_ref(jnp.zeros(1, jnp.bfloat16))
    with pytest.raises(
        ConfigError, match=r"x/r: \(1,\) float32 when resume.. was given it, \(1,\) bfloat16 here: a Ref"
    ):
        state.take(parts)


# Equinox.


class Net(eqx.Module):
    """A network with functions, numbers, buffers and an index of its own."""

    mlp: eqx.nn.MLP
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    scale: float

    def __init__(self, key: Any) -> None:
        self.mlp = eqx.nn.MLP(2, 3, 4, 2, activation=jax.nn.gelu, key=key)
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")
        self.drop = eqx.nn.Dropout(0.5)
        self.scale = 0.5


def test_a_state_of_a_model_is_a_copy(tmp_path: Path) -> None:
    """nnx.state(model) holds the model's own variables: an average that begins so is not trained with it."""
    for attempt in range(2):
        model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        begun = np.asarray(model.kernel.get_value())
        with jobkit.Run(tmp_path / "run", save_every="1 steps") as run:
            run.resume(model=model, average=nnx.state(model, nnx.Param), optimizer=None)
            for _ in run.steps(attempt + 1):
                model.kernel.set_value(model.kernel.get_value() + 1)
            assert (np.asarray(model.kernel.get_value()) == begun + attempt + 1).all()
            assert (np.asarray(run.state.average["kernel"].get_value()) == begun).all()


def test_equinox_modules_are_values(tmp_path: Path) -> None:
    """A whole Equinox module, its state and optax's state are parts: functions in it are code, and stay."""

    def make(seed: int) -> tuple[Any, Any, Any]:
        net, kept = eqx.nn.make_with_state(Net)(jax.random.key(seed))
        return net, kept, optax.adam(0.1).init(eqx.filter(net, eqx.is_inexact_array))

    @eqx.filter_jit
    def update(net: Any, kept: Any, moments: Any) -> Any:
        def loss(net: Any, kept: Any) -> Any:
            out, kept = jax.vmap(
                lambda x, kept: net.norm(net.mlp(x), kept), axis_name="batch", in_axes=(0, None), out_axes=(0, None)
            )(jnp.ones((4, 2)), kept)
            return (out**2).sum(), kept

        (_, kept), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(net, kept)
        changes, moments = optax.adam(0.1).update(gradient, moments)
        return eqx.apply_updates(net, changes), kept, moments

    net, kept, moments = make(0)
    with jobkit.Run(tmp_path / "run", save_every="1 steps") as run:
        run.resume(net=net, kept=kept, optimizer=moments)
        for _ in run.steps(3):
            run.state.net, run.state.kept, run.state.optimizer = update(
                run.state.net, run.state.kept, run.state.optimizer
            )
        trained = (run.state.net, run.state.kept, run.state.optimizer)
    net, kept, moments = make(1)
    with jobkit.Run(tmp_path / "run") as run:
        run.resume(net=net, kept=kept, optimizer=moments)
        for there, here in zip(trained, (run.state.net, run.state.kept, run.state.optimizer), strict=True):
            same(*(eqx.filter(value, eqx.is_array_like) for value in (there, here)))
        assert run.state.net.mlp.activation(jnp.ones(3)).shape == (3,)
    other = eqx.tree_at(lambda net: net.mlp.activation, net, jax.nn.relu)
    with (
        jobkit.Run(tmp_path / "run") as run,
        pytest.raises(ConfigError, match=r"net/mlp/activation: the function .*gelu there, the function .*relu here"),
    ):
        run.resume(net=other, kept=kept, optimizer=moments)


def test_a_function_that_becomes_another_is_refused() -> None:
    """Code is not saved: an activation that training replaces would be the first one again after a restart."""
    net = eqx.nn.MLP(1, 1, 1, 1, activation=jax.nn.relu, key=jax.random.key(0))
    parts = parts_of(net=net)
    state.take(parts)
    parts["net"].value = eqx.tree_at(lambda net: net.activation, net, jax.nn.gelu)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"'net/activation' is .*, which jobkit cannot save"):
        state.take(parts)


# Deques, sets, torch.


def test_a_deque_goes_on_in_place(tmp_path: Path) -> None:
    """A deque, a replay buffer for instance, is refilled in place, as long and as bounded as it was."""
    before: Any = collections.deque([{"obs": np.arange(3.0), "done": False}, (1, jnp.ones(2))], maxlen=5)
    after: Any = collections.deque(["other"], maxlen=5)
    store = saved(tmp_path, parts_of(replay=before))
    restore(store, 1, parts_of(replay=after))
    assert (len(after), after.maxlen, after[0]["done"]) == (2, 5, False)
    same([after[0]["obs"], after[1]], [before[0]["obs"], before[1]])
    with pytest.raises(ConfigError, match=r"'x/d' is a collections.deque inside a container: give it to resume"):
        parts_of(x={"d": before})


def test_the_remedy_for_a_set_works(tmp_path: Path) -> None:
    """A set is refused with the dict to use in its place, which grows and comes back."""
    seen = {"b", "a"}
    with pytest.raises(
        ConfigError, match=r"'x' is a set, which has no order .*: pass dict.fromkeys\(sorted\(...\), True"
    ):
        parts_of(x=seen)
    with jobkit.Run(tmp_path / "run") as run:
        run.resume(seen=dict.fromkeys(sorted(seen), True), opt=0)
        for step in run.steps(2):
            run.state.seen[f"step {step}"] = True
    with jobkit.Run(tmp_path / "run") as run:
        run.resume(seen=dict.fromkeys(sorted(seen), True), opt=0)
        assert set(run.state.seen) == {"a", "b", "step 0", "step 1"}


class FakeTensor:
    """What jobkit uses of a torch.Tensor on the CPU, where torch is not installed."""

    def __init__(self, array: Any, *, dtype: str = "") -> None:
        self._array, self.dtype, self.device = array, dtype or array.dtype, "cpu"

    def detach(self) -> "FakeTensor":
        """Leave the graph."""
        return self

    def numpy(self) -> Any:
        """Share the memory, which torch refuses for what numpy has not."""
        if self.dtype == "torch.bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self._array


FakeTensor.__module__, FakeTensor.__qualname__ = "torch", "Tensor"


@pytest.fixture
def tensor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a torch tensor: torch's own where it is installed, else one that answers as it does."""
    try:
        import torch
    except ImportError:
        fake: Any = types.ModuleType("torch")
        fake.Tensor, fake.from_numpy = FakeTensor, FakeTensor
        monkeypatch.setitem(sys.modules, "torch", fake)
        return FakeTensor
    return lambda array, dtype="": torch.from_numpy(array).to(
        torch.bfloat16 if dtype else torch.from_numpy(array).dtype
    )


def test_torch_tensors_in_an_objects_state(tensor: Callable[..., Any]) -> None:
    """A loader whose state holds torch tensors (torchdata's StatefulDataLoader: its generator) gets tensors back."""
    before, after = Counter(), Counter()
    before.held = {"rng": tensor(np.arange(5, dtype=np.uint8)), "n": [tensor(np.array(3.5))], "at": 7}
    through({"data": before}, {"data": after})
    assert type(after.held["rng"]) is type(before.held["rng"])
    for there, here in ((before.held["rng"], after.held["rng"]), (before.held["n"][0], after.held["n"][0])):
        np.testing.assert_array_equal(there.numpy(), here.numpy())
        assert there.dtype == here.dtype
    before.held = {"rng": tensor(np.ones(2, np.float32), dtype="torch.bfloat16")}
    with pytest.raises(ConfigError, match=r"holds a torch.Tensor of torch.bfloat16 on cpu, .* tensors of usual dtypes"):
        state.take(parts_of(data=before))


def test_the_remedy_for_a_tensor_works(tensor: Callable[..., Any]) -> None:
    """A bare tensor is refused with the two calls that turn it into numbers and back."""
    given_ = tensor(np.arange(3.0))
    with pytest.raises(ConfigError, match=r"'x/t' is a torch.Tensor: pass its numbers, tensor.numpy\(\), and make it"):
        parts_of(x={"t": given_})
    got = through({"x": {"t": given_.numpy()}}, {"x": {"t": np.zeros(3)}})["x"]["t"]
    np.testing.assert_array_equal(sys.modules["torch"].from_numpy(got).numpy(), np.arange(3.0))


def test_a_torch_loader_is_told_of_the_stateful_one() -> None:
    """Torch's own DataLoader is refused with the name of the one that has a position."""
    loader = type("DataLoader", (), {"__iter__": lambda self: iter(()), "__module__": "torch.utils.data.dataloader"})
    with pytest.raises(ConfigError, match=r"'x' is a torch.*DataLoader, which has no position: make a torchdata\."):
        parts_of(x=loader())

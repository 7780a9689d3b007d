"""What is saved comes back to the bit, for every kind of part: a real save, and a restore into another program."""

import collections
import dataclasses
import enum
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import grain
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jobkit import contract
from jobkit.checkpoint import state
from jobkit.checkpoint.checkpointer import Checkpoints
from jobkit.checkpoint.kinds import Part, ValuePart, part_of
from jobkit.checkpoint.leaves import DTYPES as DTYPES_HELD
from jobkit.checkpoint.leaves import is_leaf
from jobkit.checkpoint.restore import restore
from jobkit.errors import ConfigError
from jobkit.run.optimizer_check import has_optimizer
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.retention import Keep
from jobkit.rundir.store import Store


def parts_of(**given: Any) -> dict[str, Part]:
    """Make parts as `Run.resume` does."""
    return {name: part_of(name, value) for name, value in given.items()}


def saved(url: Path | str, parts: dict[str, Part], step: int = 1, **options: Any) -> Store:
    """Commit one step of a program's parts, through Orbax and the saving thread."""
    store = Store(url)
    ledger = Ledger(store.file(contract.events_file(0, 0)))
    checkpoints = Checkpoints(store, attempt=0, keep=Keep(100), ledger=ledger)
    try:
        checkpoints.save(state.take(parts), step, reason="asked", metrics=options)
        checkpoints.wait()
        error = checkpoints.take_error()
        if error is not None:
            raise error
    finally:
        checkpoints.close()
        ledger.close()
    return store


def through(there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """Save one program's parts, restore them into another's, and return the value parts of that one."""
    with tempfile.TemporaryDirectory(prefix="jobkit-state-") as directory:
        store = saved(directory, parts_of(**there))
        parts = parts_of(**here)
        restore(store, 1, parts)
        return {name: part.value for name, part in parts.items() if isinstance(part, ValuePart)}


def bits(leaf: Any) -> tuple[Any, ...]:
    """Say everything about a leaf that a program can see."""
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data(leaf)
            return ("key", str(jax.random.key_impl(leaf)), leaf.shape, np.asarray(data).tobytes())
        return ("jax", leaf.dtype, leaf.weak_type, leaf.shape, leaf.committed, np.asarray(leaf).tobytes())
    if isinstance(leaf, np.ndarray | np.generic):
        return (type(leaf), leaf.dtype.str, leaf.dtype, leaf.shape, leaf.tobytes())
    if isinstance(leaf, float):
        return (float, struct.pack("d", leaf) if leaf == leaf else "nan")
    if isinstance(leaf, complex):
        return (complex, bits(leaf.real), bits(leaf.imag))
    return (type(leaf), leaf)


def same(one: Any, other: Any) -> None:
    """Assert that two pytrees agree in structure and in every bit of every leaf."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), (_, b) in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree_util.tree_leaves_with_path(other), strict=True
    ):
        assert bits(a) == bits(b), jax.tree_util.keystr(path)


def blank(value: Any) -> Any:
    """Make another program's initial value of the same structure: no leaf keeps its content."""

    def other(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                made = jax.random.split(jax.random.key(99, impl=str(jax.random.key_impl(leaf))), max(leaf.size, 1))
                return made[: leaf.size].reshape(leaf.shape)
            return jnp.asarray(np.ones(leaf.shape, leaf.dtype))
        if isinstance(leaf, np.ndarray | np.generic):
            return np.ones_like(leaf)[()] if isinstance(leaf, np.generic) else np.ones_like(leaf)
        return type(leaf)()

    return jax.tree.map(other, value)


def round_trip(value: Any) -> None:
    """Save a value, restore it into a blank one, and compare."""
    before = jax.tree.map(lambda leaf: leaf, value)
    same(through({"x": value}, {"x": blank(value)})["x"], before)


# Values.

NUMPY_DTYPES = [
    [
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
        "complex64",
        "complex128",
    ],
    [
        "bfloat16",
        "int2",
        "int4",
        "float4_e2m1fn",
        "float8_e3m4",
        "float8_e4m3b11fnuz",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
    ],
    ["float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"],
]
DTYPES = [np.dtype(getattr(ml_dtypes, name, name)) for names in NUMPY_DTYPES for name in names]
WIDE = {np.dtype(name) for name in ("int64", "uint64", "float64", "complex128")}  # JAX narrows these


def _filled(dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    if dtype.kind in "bc" or dtype.name in ("int2", "int4", "float4_e2m1fn"):
        return (np.arange(int(np.prod(shape))) % 2).reshape(shape).astype(dtype)
    content = np.random.default_rng(1).integers(0, 256, size=int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return content.view(dtype).reshape(shape)  # any bits, those of NaNs included


def test_every_dtype() -> None:
    """Arrays of every dtype that a checkpoint can hold, in numpy and in JAX: 0-d, empty, with any bits."""
    value = {}
    held = [dtype for dtype in DTYPES if is_leaf(np.zeros((), dtype))]
    assert {str(dtype) for dtype in DTYPES if dtype not in held} <= {"float4_e2m1fn", "float8_e8m0fnu"}  # of 2026
    for dtype in held:
        for shape in [(), (3, 2), (0,), (2, 0, 3)]:
            value[f"numpy-{dtype}-{shape}"] = _filled(dtype, shape)
            if dtype not in WIDE:
                value[f"jax-{dtype}-{shape}"] = jnp.asarray(_filled(dtype, shape))
        value[f"scalar-{dtype}"] = _filled(dtype, ())[()]
    assert {str(dtype) for dtype in DTYPES} == DTYPES_HELD
    round_trip(value)


def test_arrays_of_another_byte_order_or_layout() -> None:
    """A big-endian array stays one; a Fortran-ordered or strided one keeps its values."""
    base = np.arange(24.0).reshape(4, 6)
    round_trip({"big": base.astype(">f4"), "int": np.arange(3, dtype=">i2"), "fortran": np.asfortranarray(base)})
    round_trip({"strided": base[::2, ::-3], "broadcast": np.broadcast_to(np.float32(2), (3,))})


def test_restored_numpy_arrays_can_be_written() -> None:
    """A restored numpy array is the program's own: writable."""
    got = through(
        {"x": [np.arange(3), np.zeros((0,)), np.array(1.5)]}, {"x": [np.zeros(3, int), np.ones((0,)), np.array(0.0)]}
    )
    assert all(leaf.flags.writeable for leaf in got["x"])


def test_weak_types_stay() -> None:
    """A weakly typed array comes back weak, a strong one strong: it decides the dtype of what is computed from it."""
    value = {
        "weak": jnp.asarray(2.0) * 1,
        "int": jnp.array(7) + 0,
        "strong": jnp.float32(2.0),
        "cast": jax.jit(lambda: 3)(),
    }
    assert value["cast"].weak_type
    assert not value["strong"].weak_type
    round_trip(value)
    restored = through({"x": value}, {"x": blank(value)})["x"]
    half = jnp.ones((), jnp.bfloat16)
    assert (half * restored["cast"]).dtype == jnp.bfloat16


def test_typed_keys() -> None:
    """PRNG keys of every implementation, single and in batches, empty ones too, draw the same numbers."""
    keys = {impl: jax.random.key(5, impl=impl) for impl in ("threefry2x32", "rbg", "unsafe_rbg")}
    value: dict[str, Any] = {
        impl: [key, jax.random.split(key, (2, 3)), jax.random.split(key, 2)[:0]] for impl, key in keys.items()
    }
    value["raw"] = jax.random.PRNGKey(3)
    round_trip(value)
    got = through({"x": keys}, {"x": blank(keys)})["x"]
    for impl, key in keys.items():
        assert (jax.random.normal(got[impl], 3) == jax.random.normal(key, 3)).all()


def test_python_leaves() -> None:
    """Numbers of any size, nan, inf, -0.0, text, bytes and None keep their type and value."""
    value = [0, -1, 2**64, -(2**200), True, False, 0.0, -0.0, 1e-310, float("inf"), -float("inf"), float("nan"), 0.1]
    value += [1 + 2j, complex(float("nan"), -0.0), "", "ä\n\0\udc80😀", b"", b"\x00\xff", None]
    round_trip(value)


class Point(NamedTuple):
    """A named tuple."""

    x: Any
    y: Any


@flax.struct.dataclass
class Holder:
    """A dataclass that JAX knows as a pytree."""

    weights: Any
    inner: Any
    name: str = flax.struct.field(pytree_node=False, default="static")


def test_keys_that_collide_without_escapes() -> None:
    """Names with separators, escapes, numbers and nothing at all are all different leaves."""
    names = [
        "a.b",
        "a/b",
        "a%2Eb",
        "a%2Fb",
        "a%",
        "%",
        "",
        ".",
        "..",
        "/",
        " ",
        "0",
        "é\n\0",
        "\udc80",
        "%DC80",
        "a" * 300,
    ]
    value: dict[Any, Any] = {name: jnp.full(2, index, jnp.float32) for index, name in enumerate(names)}
    value["a"] = {"b": np.float32(1), "": {"": np.ones(1)}}
    round_trip(value)
    round_trip({"": jnp.ones(3)})
    round_trip({"": {"": 1}})
    round_trip({0: np.ones(1), 1: [np.zeros(1), {-1: 2, 10**30: 3}]})
    round_trip({(1, "a"): 1, (1, "a/b"): np.ones(2)})


def test_one_leaf_is_a_part() -> None:
    """A part may be one array or one number; an empty container too."""
    for value in (jnp.arange(3), np.float64(2.5), 7, "text", {}, [], (), None):
        round_trip(value)


leaves = st.one_of(
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: st.tuples(st.sampled_from([(), (1,), (2, 3), (0,)]), st.booleans()).map(
            lambda drawn: (
                jnp.asarray(_filled(dtype, drawn[0])) if drawn[1] and dtype not in WIDE else _filled(dtype, drawn[0])
            )
        )
    ),
    st.floats(),
    st.integers(),
    st.booleans(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.complex_numbers(),
    st.none(),
    st.integers(0, 9).map(jax.random.key),
    st.sampled_from(["float32", "int16", "bool"]).map(lambda name: np.dtype(name).type(1)),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text("ab./%é0", max_size=3), inner, max_size=3),
        st.dictionaries(st.integers(), inner, max_size=2),
        st.builds(Point, inner, inner),
        st.builds(Holder, inner, inner),
        st.builds(lambda value: collections.OrderedDict(b=value, a=1), inner),
    ),
    max_leaves=8,
)


@given(trees)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@example(Holder(Point({"": jnp.ones(2)}, None), collections.OrderedDict(z=1, a=(2,))))
def test_any_tree(value: Any) -> None:
    """Any nesting of containers and leaves comes back to the bit."""
    round_trip(value)


# NNX.


class Block(nnx.Module):
    """Everything an NNX module may hold: batch statistics, dropout, lists, dicts, shared and odd variables."""

    def __init__(self, rngs: nnx.Rngs, *, width: int = 3) -> None:
        self.layers = nnx.List([nnx.Linear(2 if i == 0 else width, width, rngs=rngs) for i in range(2)])
        self.heads = nnx.Dict(a=nnx.Linear(width, 1, rngs=rngs), b=nnx.Linear(width, 2, rngs=rngs))
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.tied = self.layers[1]
        self.count = nnx.Variable(jnp.array(0))
        self.half = nnx.Param(jnp.ones(2, jnp.bfloat16))
        self.tree = nnx.Variable({"x": jnp.zeros(2), "y": [jnp.int8(1)]})

    def __call__(self, x: Any) -> Any:
        """Run the module and count."""
        self.count.set_value(self.count.get_value() + 1)
        for layer in self.layers:
            x = layer(x)
        x = self.dropout(self.norm(x))
        return self.heads["a"](x) + self.tied(x).sum() + self.half.get_value().sum()


def _trained(seed: int, tx: optax.GradientTransformation, updates: int) -> tuple[Block, Any, nnx.Rngs, nnx.MultiMetric]:
    rngs = nnx.Rngs(seed, dropout=seed + 1)
    model = Block(rngs)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    metrics = nnx.MultiMetric(
        loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy(), spread=nnx.metrics.Welford("loss")
    )
    for number in range(updates):
        _update(model, optimizer, metrics, number)
        rngs.dropout()
    return model, optimizer, rngs, metrics


@nnx.jit
def _update(model: Block, optimizer: Any, metrics: Any, number: Any) -> Any:
    x = jnp.arange(8.0).reshape(4, 2) + number

    def loss_of(model: Block) -> Any:
        return (model(x) ** 2).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    metrics.update(loss=loss, logits=x, labels=jnp.zeros(4, jnp.int32))
    return loss


TRANSFORMS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw, schedule": lambda: optax.adamw(optax.cosine_decay_schedule(1e-2, 100)),
    "multi steps": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2).gradient_transformation(),
    "sgd, no state": lambda: optax.sgd(1e-3),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_nnx_training_continues_to_the_bit(name: str) -> None:
    """Module, optimizer, Rngs and metrics restored into a program of another seed: same bits now and two updates on."""
    before = _trained(0, TRANSFORMS[name](), 3)
    after = _trained(7, TRANSFORMS[name](), 1)
    names = ("model", "optimizer", "rngs", "metrics")
    through(dict(zip(names, before, strict=True)), dict(zip(names, after, strict=True)))
    for one, other in zip(before, after, strict=True):
        same(nnx.to_pure_dict(nnx.state(one)), nnx.to_pure_dict(nnx.state(other)))
    assert after[0].tied is after[0].layers[1]
    for number in (3, 4):
        losses = [_update(model, optimizer, metrics, number) for model, optimizer, _, metrics in (before, after)]
        same(*losses)
        same(before[2].dropout(), after[2].dropout())
    same(before[3].compute(), after[3].compute())
    same(nnx.to_pure_dict(nnx.state(before[:2])), nnx.to_pure_dict(nnx.state(after[:2])))


def test_containers_of_nnx_objects() -> None:
    """Lists, tuples and dicts of NNX objects are parts, objects that appear twice in them included."""

    def made(seed: int) -> dict[str, Any]:
        rngs = nnx.Rngs(seed)
        one, two = nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)
        return {
            "pair": (one, two),
            "nested": {"a": [one, {"b": two}], "rngs": rngs},
            "rngs": rngs,
            "one": nnx.Param(jnp.ones(seed + 1)[:1] * seed),
        }

    before, after = made(1), made(2)
    through(before, after)
    for name in before:
        same(nnx.to_pure_dict(nnx.state([before[name]])), nnx.to_pure_dict(nnx.state([after[name]])))


def test_model_and_optimizer_as_one_object() -> None:
    """An optimizer that holds its model is one part and restores both."""
    made = [nnx.ModelAndOptimizer(nnx.Linear(2, 1, rngs=nnx.Rngs(seed)), optax.adam(0.1)) for seed in (0, 1)]
    made[0].update(jax.tree.map(jnp.ones_like, nnx.state(made[0].model, nnx.Param)))
    through({"optimizer": made[0]}, {"optimizer": made[1]})
    same(*(nnx.to_pure_dict(nnx.state(one)) for one in made))
    assert int(made[1].step.get_value()) == 1


# Linen.


class Net(nn.Module):
    """A Linen module with batch statistics."""

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        """Run the module."""
        return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))


class Train(TrainState):
    """A TrainState with batch statistics and a key."""

    batch_stats: Any
    key: Any


def _linen(seed: int) -> Train:
    variables = Net().init(jax.random.key(seed), jnp.ones((2, 3)))
    return Train.create(
        apply_fn=Net().apply,
        params=variables["params"],
        tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
        batch_stats=variables["batch_stats"],
        key=jax.random.key(seed),
    )


@jax.jit
def _linen_step(train: Train, x: Any) -> Train:
    key, drawn = jax.random.split(train.key)
    x = x + jax.random.normal(drawn, x.shape)

    def loss_of(params: Any) -> Any:
        out, updates = train.apply_fn({"params": params, "batch_stats": train.batch_stats}, x, mutable=["batch_stats"])
        return (out**2).mean(), updates

    gradients, updates = jax.grad(loss_of, has_aux=True)(train.params)
    return train.apply_gradients(grads=gradients, batch_stats=updates["batch_stats"], key=key)


def test_linen_training_continues_to_the_bit() -> None:
    """A TrainState whose step is an array by now restores into a fresh one, whose step is an int, and goes on."""
    x = jnp.arange(6.0).reshape(2, 3)
    before = _linen(0)
    for _ in range(3):
        before = _linen_step(before, x)
    fresh = _linen(1)
    assert isinstance(fresh.step, int)
    after = through({"train": before}, {"train": fresh})["train"]
    assert (after.tx, after.apply_fn) == (fresh.tx, fresh.apply_fn)
    same(jax.tree.leaves(after), jax.tree.leaves(before))
    same(jax.tree.leaves(_linen_step(after, x)), jax.tree.leaves(_linen_step(before, x)))


# Objects with a position.


@pytest.mark.parametrize(
    "bit_generator", [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64, np.random.PCG64DXSM]
)
def test_numpy_generators(bit_generator: Any) -> None:
    """A generator goes on with the very same numbers, whatever its bit generator, given as either object."""
    before, after = (np.random.Generator(bit_generator(seed)) for seed in (1, 2))
    before.integers(0, 100, 7, dtype=np.int32)  # leaves half of a 64-bit draw in hand
    before.normal(size=3)
    through({"noise": before}, {"noise": after})
    through({"noise": before.bit_generator}, {"noise": bit_generator(3)})
    for draw in (
        lambda g: g.integers(0, 100, 5, dtype=np.int32),
        lambda g: g.normal(size=5),
        lambda g: g.permutation(5),
    ):
        assert draw(before).tobytes() == draw(after).tobytes()


def test_older_random_states() -> None:
    """Numpy's RandomState, the global one included, and Python's random.Random go on with the very same numbers."""
    before, after = np.random.RandomState(1), np.random.RandomState(2)
    before.normal(size=3)  # leaves one normal in hand
    one, other = random.Random(1), random.Random(2)
    one.gauss(0, 1)
    through({"old": before, "python": one}, {"old": after, "python": other})
    assert before.normal(size=5).tobytes() == after.normal(size=5).tobytes()
    assert [one.gauss(0, 1), one.getrandbits(99)] == [other.gauss(0, 1), other.getrandbits(99)]


def _map_dataset() -> Any:
    return grain.MapDataset.source(np.arange(20)).seed(3).shuffle().map(lambda x: x * 2).repeat().batch(4)


class _Add(grain.transforms.RandomMap):
    def random_map(self, element: Any, rng: np.random.Generator) -> Any:
        return element + rng.integers(0, 1000)


def _loader() -> Any:
    return grain.DataLoader(
        data_source=np.arange(20),
        sampler=grain.samplers.IndexSampler(20, grain.sharding.NoSharding(), shuffle=True, num_epochs=3, seed=5),
        operations=[_Add(), grain.transforms.Batch(4)],
        worker_count=0,
    )


ITERATORS: dict[str, Callable[[], Iterator[Any]]] = {
    "map dataset": lambda: iter(_map_dataset()),
    "iter dataset": lambda: iter(_map_dataset().to_iter_dataset()),
    "random map": lambda: iter(
        grain.MapDataset.range(30).seed(1).shuffle().random_map(_Add()).to_iter_dataset().batch(3)
    ),
    "mixed": lambda: iter(
        grain.IterDataset.mix(
            [_map_dataset().to_iter_dataset(), grain.MapDataset.range(8).repeat().batch(4).to_iter_dataset()],
            [0.5, 0.5],
        )
    ),
    "loader": lambda: iter(_loader()),
}


@pytest.mark.parametrize("name", ITERATORS)
@pytest.mark.parametrize("drawn", [0, 3])
def test_grain_iterators(name: str, drawn: int) -> None:
    """A Grain iterator goes on with the very same batches, from its start too, wherever the other one stood."""
    before, after = ITERATORS[name](), ITERATORS[name]()
    for _ in range(drawn):
        next(before)
    next(after)
    through({"data": before}, {"data": after})
    for _ in range(5):
        same(next(before), next(after))


class Stateful:
    """An object of the user's own."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def state_dict(self) -> Any:
        """Return the state."""
        return self.held

    def load_state_dict(self, held: Any) -> None:
        """Take a state."""
        self.held = held


def _plain(held: Any) -> Any:
    """Spell nested plain data out, types and order included."""
    if isinstance(held, dict):
        return ("dict", [(_plain(key), _plain(value)) for key, value in held.items()])
    if isinstance(held, list | tuple):
        return (type(held).__name__, [_plain(value) for value in held])
    return bits(held)


def test_objects_with_a_state_dict() -> None:
    """Any nesting of plain data that an object gives comes back as it was, whatever shape it had before."""
    held = {
        "epoch": 3,
        "big": 2**127,
        "floats": [0.1, -0.0, float("nan"), np.float32(2)],
        "tuple": (1, (2, []), ()),
        "array": np.arange(3, dtype=np.uint64),
        "jax": [jnp.ones(2, jnp.bfloat16), jax.random.key(3)],
        ("a", 1): {2: {}, None: b"x", 1.5: "y", True: {"leaf": 0}},
        "text": {"tuple": "dict", "dict": [], "leaf": None},
        "c": 1j,
    }
    after = Stateful({"epoch": 0})
    through({"x": Stateful(held)}, {"x": after})
    assert list(after.held) == list(held)
    assert _plain(after.held) == _plain(held)
    empty = Stateful(7)
    through({"x": Stateful(None)}, {"x": empty})
    assert empty.held is None


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            st.text(max_size=3) | st.integers() | st.tuples(st.integers(), st.text(max_size=2)), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(plain)
@settings(max_examples=30, deadline=None)
def test_any_plain_state_of_an_object(held: Any) -> None:
    """Whatever plain data an object gives, it is handed the same back, in types and order."""
    after = Stateful(0)
    through({"x": Stateful(held)}, {"x": after})
    assert _plain(after.held) == _plain(held)


# Refusals.


class Colour(enum.IntEnum):
    """A number with a type of its own."""

    RED = 1


@dataclasses.dataclass
class Unregistered:
    """A dataclass that JAX does not know."""

    x: int = 1


GRAIN = r"iterate a Grain dataset .*, or give it state_dict\(\) and load_state_dict\(\)"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "generator": (lambda: (i for i in range(3)), rf"'x' is a generator, which cannot be rewound: {GRAIN}"),
    "in a dict": (
        lambda: {"a": [jnp.ones(1), iter([1])]},
        rf"'x/a/1' is a list_iterator, which cannot be rewound: {GRAIN}",
    ),
    "zip": (lambda: zip([1], [2], strict=True), "'x' is a zip, which cannot be rewound"),
    "dataset": (
        _map_dataset,
        r"'x' is a grain\..*, which has no position: make its iterator first and pass that, iter",
    ),
    "loader": (_loader, "which has no position: make its iterator first"),
    "range": (lambda: {"r": range(3)}, r"'x/r' is a range, which has no position: make jobkit\.Batches of what"),
    "set": (lambda: {1, 2}, "'x' is a set, which has no order that a restart"),
    "function": (lambda: lambda: 1, r"'x' is a function, which jobkit cannot save: pass NNX objects, pytrees"),
    "dataclass": (Unregistered, "which jobkit cannot save: pass NNX objects"),
    "optimizer": (lambda: {"tx": optax.sgd(1.0)}, "'x/tx/init' is a function"),
    "objects": (
        lambda: np.array([{}, 1], object),
        "numpy array of dtype object, which a checkpoint cannot hold: encode it",
    ),
    "strings": (lambda: {"names": np.array(["a", "b"])}, "'x/names' is a numpy array of dtype <U1"),
    "dates": (lambda: np.array(["2020-01-01"], "datetime64[D]"), "dtype datetime64"),
    "records": (lambda: np.zeros(2, "i4,f4"), "which a checkpoint cannot hold: encode it as numbers"),
    "wide": (lambda: np.ones(2, np.longdouble), "numpy array of dtype (float128|longdouble)"),
    "uint4": (lambda: jnp.ones(2, jnp.uint4), "'x' is a JAX array of dtype uint4"),
    "masked": (
        lambda: np.ma.array([1.0], mask=[1]),
        "masked array, whose mask would be lost: pass its data and its mask",
    ),
    "enum": (lambda: {"c": Colour.RED}, r"'x/c' is .*Colour, of which only the plain value could be saved: pass int\("),
    "rng inside": (
        lambda: {"r": np.random.default_rng(0)},
        "'x/r' is .* inside a container: give it to resume.. as a part",
    ),
    "data inside": (lambda: [iter(_map_dataset())], "'x/0' is .* inside a container: give it to resume.. as a part"),
    "mixture": (
        lambda: [nnx.Param(jnp.ones(1)), {"n": 3}],
        r"part 'x' mixes NNX objects with plain values \(x/1/n is a int\): ",
    ),
    "keys": (lambda: {1: 1, "1": 2}, "part 'x' is no pytree that JAX can flatten"),
    "variable": (lambda: nnx.Variable(np.array(["text"])), "'x/0' is a numpy array of dtype <U4"),
    "in a module": (
        lambda: nnx.Dict(v=nnx.Variable(Unregistered())),
        "'x/v' is .*Unregistered, which jobkit cannot save",
    ),
    "odd state": (
        lambda: Stateful({"a": {1, 2}}),
        r"an object's state holds a set, which jobkit cannot save: its state_dict",
    ),
    "odd leaf": (lambda: Stateful([Colour.RED]), "an object's state holds .*Colour"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_is_refused(name: str) -> None:
    """Each kind of value that cannot be saved or rewound is named with its place and the remedy, before any save."""
    make, told = REFUSED[name]
    with pytest.raises(ConfigError, match=told):
        state.take(parts_of(x=make()))


@jax.tree_util.register_pytree_with_keys_class
class Twins:
    """A container whose two children have one name."""

    def __init__(self, *children: Any) -> None:
        self.children = children

    def tree_flatten_with_keys(self) -> Any:
        """Flatten."""
        return [(jax.tree_util.DictKey("twin"), child) for child in self.children], None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> "Twins":
        """Unflatten."""
        return cls(*children)


def test_two_leaves_of_one_name_are_refused() -> None:
    """Two leaves that would overwrite each other are refused, with the name."""
    with pytest.raises(ConfigError, match=r"part 'x' has two leaves named 'twin': rename one"):
        state.take(parts_of(x=Twins(1, 2)))
    with pytest.raises(ConfigError, match="two leaves named"):
        state.take(parts_of(x=Twins(jnp.ones(1), jnp.ones(1))))


def test_a_value_that_went_bad_later_is_refused() -> None:
    """What the program assigns to run.state after resume() is looked at as well."""
    parts = parts_of(x={"a": 1})
    assert isinstance(parts["x"], ValuePart)
    parts["x"].value = {"a": iter([1])}
    with pytest.raises(ConfigError, match="'x/a' is a list_iterator, which cannot be rewound"):
        state.take(parts)


F32, BF16 = jnp.float32, jnp.bfloat16
REMEDY = ": run the code that wrote it, or start the changed program in a new run directory$"
CHANGED: dict[str, tuple[Any, Any, str]] = {
    "shape": ({"w": jnp.ones((3, 2))}, {"w": jnp.ones((4, 2))}, r"x/w: \(3, 2\) float32 there, \(4, 2\) float32 here"),
    "dtype": ({"w": jnp.ones(2, F32)}, {"w": jnp.ones(2, BF16)}, r"x/w: \(2,\) float32 there, \(2,\) bfloat16 here"),
    "0-d dtype": ({"w": jnp.ones((), F32)}, {"w": jnp.ones((), BF16)}, r"x/w: \(\) float32 there, \(\) bfloat16 here"),
    "numpy dtype": (np.ones(1), np.ones(1, int), r"x: \(1,\) float64 there, \(1,\) int64 here"),
    "more": ({"w": 1}, {"w": 1, "v": 2}, "x/v: absent there, a Python int here"),
    "less": ({"w": 1, "v": "t"}, {"w": 1}, "x/v: a Python str there, absent here"),
    "renamed": ({"a": {"b": 1}}, {"a.b": 1}, "x/a/b: a Python int there, absent here; x/a%2Eb: absent there"),
    "key": (
        jax.random.key(0),
        jax.random.key(0, impl="rbg"),
        r"x: \(\) key of threefry2x32 there, \(\) key of rbg here",
    ),
    "key or bits": (jax.random.key(0), jax.random.PRNGKey(0), r"key of threefry2x32 there, \(2,\) uint32 here"),
    "text": ("a", 1, "x: a Python str there, a Python int here"),
    "number or array": (1, jnp.ones(2), r"x: a Python int there, \(2,\) float32 here"),
    "kind": (np.random.default_rng(0), 7, "x: object there, value here"),
    "many": ({str(i): 0 for i in range(9)}, {}, "and 5 more"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_state_that_changed_is_refused(name: str) -> None:
    """Another shape, dtype, leaf or kind: the leaf, both sides and the remedy; nothing is cast, nothing assigned."""
    there, here, told = CHANGED[name]
    parts = parts_of(x=here)
    with tempfile.TemporaryDirectory() as directory:
        store = saved(directory, parts_of(x=there))
        with pytest.raises(ConfigError, match=f"differs from the checkpoint of step 1: .*{told}.*{REMEDY}"):
            restore(store, 1, parts)
    if isinstance(parts["x"], ValuePart):
        same(parts["x"].value, here)


def test_other_parts_are_refused(tmp_path: Path) -> None:
    """A part more, a part less, or both, are named."""
    store = saved(tmp_path, parts_of(a=1, b=2))
    for given_, told in [
        ({"a": 1}, "b only there"),
        ({"a": 1, "b": 2, "c": 3}, "c only here"),
        ({"a": 1, "c": 3}, "c only here; b only there"),
    ]:
        with pytest.raises(
            ConfigError, match=rf"the parts given to resume\(\) differ .*\({told}\): give the same parts"
        ):
            restore(store, 1, parts_of(**given_))


def test_a_changed_module_is_refused_whole(tmp_path: Path) -> None:
    """A module with one layer changed is refused by that layer's name, and no variable of it has changed."""
    store = saved(tmp_path, parts_of(model=Block(nnx.Rngs(0))))
    other = Block(nnx.Rngs(1), width=4)
    before = nnx.to_pure_dict(nnx.state(other))
    with pytest.raises(ConfigError, match=r"model/heads/a/kernel: \(3, 1\) float32 there, \(4, 1\) float32 here"):
        restore(store, 1, parts_of(model=other))
    same(nnx.to_pure_dict(nnx.state(other)), before)


def test_nothing_is_half_restored() -> None:
    """If one part's values cannot be made, no part has changed, those before it included."""
    parts = parts_of(a=1, model=nnx.Param(jnp.ones(1)), z=3)
    table = state.take(parts_of(a=7, model=nnx.Param(jnp.zeros(1)), z=9)).table
    table["z"]["leaves"][""]["type"] = "no such type"
    with pytest.raises(KeyError):
        state.give_back(parts, table, {("model", "0"): np.zeros(1, np.float32)})
    same([slot.value for part in parts.values() for slot in part.slots()[0]], [1, jnp.ones(1), 3])


def test_numbers_and_arrays_without_dimensions_agree() -> None:
    """A Python number and a 0-d array stand for each other (TrainState.step); what was saved is what comes back."""
    got = through({"x": [jnp.int32(5), 7, np.int64(3)]}, {"x": [0, jnp.int32(0), 0]})["x"]
    same(got, [jnp.int32(5), 7, np.int64(3)])


def test_optimizers_are_recognised() -> None:
    """Optax states, NNX optimizers, a TrainState count as optimizers wherever they lie; parameters alone do not."""
    params = {"w": jnp.ones(2)}
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    for value in (
        optax.adam(1.0).init(params),
        {"a": [optax.sgd(1.0, 0.9).init(params)]},
        _linen(0),
        nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param),
    ):
        assert has_optimizer({"x": params, "y": value})
    assert not has_optimizer({"x": params, "model": model})


def test_what_is_held_stays_where_a_variable_holds_a_container() -> None:
    """A dict in an NNX variable that the step in progress changes in place is held as it was."""
    model = nnx.Dict(cache=nnx.Variable({"a": jnp.zeros(2), "n": np.zeros(())}))
    part = part_of("model", model)
    part.slots()
    held = part.hold()
    raw = model["cache"].get_raw_value()
    raw["a"] = raw["a"] + 1
    raw["n"] += 1
    assert [np.asarray(slot.value).sum() for slot in held.slots()[0]] == [0, 0]

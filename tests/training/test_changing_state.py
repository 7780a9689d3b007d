"""A part may become something else as training goes on: another dtype, shape, structure. It is saved and comes back to
the bit, into a program that gives resume() its first value again; what could not come back is refused at once.
"""

import collections
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jobkit
from jobkit.checkpoint import state
from jobkit.checkpoint.restore import restore
from jobkit.checkpoint.state import table_of
from jobkit.checkpoint.weights.parts_alone import load
from jobkit.errors import ConfigError
from jobkit.rundir.store import Store
from tests.harness import training
from tests.training.test_state import Stateful, parts_of, same, saved


class Pair(NamedTuple):
    """A container that is written in no checkpoint."""

    a: Any
    b: Any


@flax.struct.dataclass
class Struct:
    """Another, with static data."""

    w: Any
    epoch: Any = flax.struct.field(pytree_node=False, default=0)


def step_to(before: Any, after: Any) -> Any:
    """Give a value to resume(), change it in a step, save, and restore into what the program gives at first."""
    parts = parts_of(x=before)
    with tempfile.TemporaryDirectory(prefix="jobkit-state-") as directory:
        parts["x"].value = after  # type: ignore[attr-defined]
        store = saved(directory, parts)
        fresh = parts_of(x=before)
        restore(store, 1, fresh)
        return fresh["x"].value  # type: ignore[attr-defined]


CHANGES: dict[str, tuple[Any, Any]] = {
    "numpy float64 to JAX float32": ({"w": np.ones(3)}, {"w": jnp.full(3, 0.1, jnp.float32)}),
    "a counter to float": ({"n": jnp.int32(0), "m": np.int32(0)}, {"n": jnp.float32(0.3), "m": np.float64(0.1)}),
    "to bfloat16": (jnp.zeros((2, 3)), jnp.full((2, 3), 0.3, jnp.bfloat16)),
    "a number to an array": ({"n": 0, "weak": 1.0}, {"n": jnp.arange(4), "weak": jnp.asarray(2.0) * 1}),
    "shape": ({"w": jnp.zeros((2, 3))}, {"w": jnp.arange(20.0).reshape(4, 5)}),
    "to no elements and back": ([np.ones(0), np.ones(3)], [np.ones(3), np.ones((0, 2), np.float16)]),
    "None to an array": ({"best": None, "n": 1}, {"best": {"w": jnp.ones(2)}, "n": 2}),
    "an array to None": ({"best": jnp.ones(2)}, {"best": None}),
    "a list that grows": ({"losses": [], "w": jnp.ones(1)}, {"losses": [0.5, jnp.float32(0.25)], "w": jnp.zeros(1)}),
    "a list that shrinks": ([1, 2, 3], [3]),
    "a dict that grows": ({"seen": {}}, {"seen": {"b": True, "a": {"deep": [np.arange(3)]}}}),
    "keys of other types": ({}, {(1, ("a", 2)): 1, (2, ()): 2.5}),
    "numbers as keys": ({"n": {0: jnp.ones(1)}}, {"n": {0: jnp.ones(1), 7: jnp.zeros(2)}}),
    "a key by number grows beside": ({"k": {0.5: 1}, "l": []}, {"k": {0.5: 2}, "l": [1]}),
    "a list to a tuple": ([1, 2], (3, 4)),
    "empty to empty": ({"a": [], "b": ()}, {"a": {}, "b": None}),
    "a key of another kind": (jax.random.key(0), jax.random.split(jax.random.key(7, impl="rbg"), 3)),
    "old bits to a key": (jax.random.PRNGKey(0), jax.random.key(3)),
    "text": ({"phase": "warm-up"}, {"phase": None}),
    "a leaf to a dict": ({"x": 1}, {"x": {"y": {"z": b"bytes"}}}),
    "in a NamedTuple": (Pair(None, 1), Pair([jnp.ones(2)], {"c": 2})),
    "in a struct": (Struct(None, epoch=3), Struct({"w": [jnp.ones(2)]}, epoch=3)),
    "beside an optimizer": (
        {"opt": optax.adam(0.1).init({"w": jnp.ones(2)}), "best": None},
        {"opt": optax.adam(0.1).update({"w": jnp.ones(2)}, optax.adam(0.1).init({"w": jnp.ones(2)}))[1], "best": 1.5},
    ),
    "an optimizer in another dtype": (
        optax.adam(0.1).init({"w": np.ones(2)}),
        optax.adam(0.1).init({"w": jnp.ones(2, jnp.bfloat16)}),
    ),
    "an ordered dict": (collections.OrderedDict(a=1), collections.OrderedDict(b=2, a=jnp.ones(2))),
    "a defaultdict": (collections.defaultdict(list), collections.defaultdict(list, {"a": [1], "b": [2, 3]})),
    "a numpy array to a Python number": (np.zeros(3), 7),
    "odd names": ({"a/b": None}, {"a/b": {"": 1, "c.d": 2, "%": [3]}}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_value_becomes_comes_back(name: str) -> None:
    """A value whose dtype, shape or containers changed comes back to the bit, as the program gives the first."""
    before, after = CHANGES[name]
    same(step_to(before, after), after)


def test_only_what_changed_is_written_twice(tmp_path: Path) -> None:
    """The table holds what the program gave only for parts that became something else: others are as they were."""
    parts = parts_of(still={"w": jnp.ones(2), "n": 0}, grows=[])
    parts["still"].value = {"w": jnp.zeros(2), "n": jnp.int32(3)}  # type: ignore[attr-defined]
    parts["grows"].value = [1]  # type: ignore[attr-defined]
    table = table_of(saved(tmp_path, parts), 1)
    assert table["still"].keys() == {"kind", "leaves"}
    assert table["grows"] == {
        "kind": "value",
        "leaves": {"0": {"is": "scalar", "type": "int", "value": 1}},
        "skeleton": {"root": {"list": ["*"]}},
        "given": {},
    }


def test_a_program_that_begins_with_what_was_saved_may_go_on(tmp_path: Path) -> None:
    """A changed program fits if it gives what was saved, cast before resume() for instance; nothing between the two."""
    parts = parts_of(x={"w": np.ones(3), "l": []})
    after = {"w": jnp.full(3, 0.1, jnp.float32), "l": [1, {"a": 2}]}
    parts["x"].value = after  # type: ignore[attr-defined]
    store = saved(tmp_path, parts)
    other = parts_of(x={"w": jnp.zeros(3, jnp.float32), "l": [0, {"a": 0}]})
    restore(store, 1, other)
    same(other["x"].value, after)  # type: ignore[attr-defined]
    for neither in ({"w": np.ones(4), "l": []}, {"w": np.ones(3), "l": [1]}, {"w": np.ones(3, np.float16), "l": []}):
        with pytest.raises(ConfigError, match="differs from the checkpoint of step 1: x/"):
            restore(store, 1, parts_of(x=neither))


def test_a_container_that_the_program_no_longer_has_is_refused(tmp_path: Path) -> None:
    """A checkpoint that needs a NamedTuple of the program's, which another program has not, names it."""
    parts = parts_of(x={"p": Pair(1, None), "l": []})
    parts["x"].value = {"p": Pair(1, [2]), "l": [3]}  # type: ignore[attr-defined]
    store = saved(tmp_path, parts)
    with pytest.raises(ConfigError, match=r"x: a tests\.[\w.]+\.Pair there, and nothing to make it from"):
        restore(store, 1, parts_of(x={"p": {"a": 1, "b": None}, "l": []}))


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "an optimizer state out of nothing": (
        {"w": jnp.ones(2), "opt": None},
        {"w": jnp.ones(2), "opt": optax.sgd(0.1, 0.9).init({"w": jnp.ones(2)})[0]},
        r"x/opt was None when resume\(\) was given it and is a TraceState of 1 now, which could not be made again "
        r"after a restart: give resume\(\) a value that has it from the start, or keep it in dicts and lists",
    ),
    "a NamedTuple in a list that grows": ({"l": []}, {"l": [Pair(1, 2)]}, "x/l/0 was a leaf or absent when"),
    "another NamedTuple": (Struct(1), Pair(1, 2), "x was a Struct of 1 when .* is a Pair of 2 now"),
    "static data": (
        Struct(jnp.ones(1), epoch=3),
        Struct(jnp.zeros(1), epoch=4),
        r"x, a Struct, has static data that has changed \(3 became 4\), which is not saved: .* make it a leaf",
    ),
    "a dict with keys that JSON has not": ({"k": {0.5: 1}}, {"k": {0.5: 1, 1.5: 2}}, "x/k was a dict of 1 when"),
    "an iterator": ({"n": 0}, {"n": iter([1])}, "'x/n' is a list_iterator, which cannot be rewound"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_made_again_is_refused_when_it_is_seen(name: str) -> None:
    """What a restart could not put back is named at the first boundary, and in each save, with what to write."""
    before, after, told = REFUSED[name]
    parts = parts_of(x=before)
    state.check_savable(parts)
    parts["x"].value = after  # type: ignore[attr-defined]
    for refuse in (state.check_savable, state.take, lambda parts: state.take({"x": parts["x"].hold()})):
        with pytest.raises(ConfigError, match=told):
            refuse(parts)


def test_static_functions_may_be_made_anew() -> None:
    """A train state whose static functions are other objects each step means the same, and is saved."""
    before = Struct(jnp.ones(1), epoch=(lambda x: x, np.ones(2)))
    after = Struct(jnp.zeros(1), epoch=(lambda x: x, np.ones(2)))
    assert float(step_to(before, after).w[0]) == 0


def test_variables_change_in_place(tmp_path: Path) -> None:
    """The dtype and shape of an NNX variable that a step changed come back into the module as the program makes it."""

    def make() -> Any:
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        model.seen = nnx.Variable({"n": 0})
        return model

    model = make()
    parts = parts_of(model=model, loss=nnx.Variable(jnp.zeros(())))
    model.kernel.set_value(jnp.full((4, 3), 0.1, jnp.bfloat16))
    model.seen.set_value({"n": jnp.arange(3)})
    store = saved(tmp_path, parts)
    again = make()
    restore(store, 1, parts_of(model=again, loss=nnx.Variable(jnp.ones(()))))
    same(nnx.to_pure_dict(nnx.state(again)), nnx.to_pure_dict(nnx.state(model)))


def test_variables_that_come_and_go_are_refused() -> None:
    """A variable that a step adds, such as a sown intermediate, is named with the remedy, which works."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    parts = parts_of(model=model)
    model.sow(nnx.Intermediate, "y", jnp.ones(1))
    with pytest.raises(ConfigError, match=r"model/y/0 is new since resume\(\), which cannot be restored .*nnx\.pop\("):
        state.check_savable(parts)
    nnx.pop(model, nnx.Intermediate)
    state.take(parts)
    del model.bias
    with pytest.raises(ConfigError, match=r"model/bias is gone since resume\(\)"):
        state.take(parts)


PLACED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import jobkit

assert len(jax.devices()) == 4
placed = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
becomes = {"odd": jnp.arange(6.0).reshape(2, 3), "none": jnp.float32(7), "fits": jnp.arange(8, dtype=jnp.int16)}
with jobkit.Run(sys.argv[1], save_every=None) as run:
    run.resume(x={name: jax.device_put(jnp.zeros(4), placed) for name in becomes})
    if run.step:
        for name, value in becomes.items():
            assert run.state.x[name].dtype == value.dtype, name
            np.testing.assert_array_equal(run.state.x[name], value)
        assert run.state.x["fits"].sharding == placed
        print("the same")
    for _ in run.steps(1):
        run.state.x = becomes
"""


@pytest.mark.slow
def test_placed_arrays_that_change_their_shape_come_back(tmp_path: Path) -> None:
    """Where the program spreads an array over devices, one of another shape that was saved comes back all the same."""
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    for told in ("", "the same\n"):
        command = [sys.executable, "-c", PLACED, str(tmp_path / "run")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, told), done.stderr


def test_a_deep_state_comes_back(tmp_path: Path) -> None:
    """What is nested deeply, in a value that grows and in an object's state, is read as it was written."""

    def deep(leaf: Any) -> Any:
        for _ in range(40):
            leaf = [{"a": leaf}]
        return leaf

    parts = parts_of(x=[], y=Stateful(deep(1.5)))
    parts["x"].value = deep("half of a pair: \udc80")  # type: ignore[attr-defined]
    store = saved(tmp_path, parts)
    held = Stateful(0)
    again = parts_of(x=[], y=held)
    restore(store, 1, again)
    assert again["x"].value == deep("half of a pair: \udc80")  # type: ignore[attr-defined]
    assert held.held == deep(1.5)


def test_a_table_that_is_none_is_told(tmp_path: Path) -> None:
    """A leaf table that holds anything else, in a run from a stranger: a sentence, and no step is set aside for it."""
    store = saved(tmp_path, parts_of(x=1))
    for content in ("7", "{}", '{"parts": 7}', '{"parts": {"x": {"leaves": {"a": 7}}}}', "[" * 9999, "{"):
        store.file("checkpoints/1/state.json").write_text(content)
        with pytest.raises(ConfigError, match=r"state\.json is no table .* or choose another step"):
            table_of(store, 1)


def test_load_takes_either_value(tmp_path: Path) -> None:
    """Whoever loads a run gives the program's first value or one like the saved one."""
    parts = parts_of(x={"best": None, "n": np.ones(1)})
    after = {"best": [jnp.ones(2)], "n": jnp.ones(3)}
    parts["x"].value = after  # type: ignore[attr-defined]
    saved(tmp_path, parts)
    for template in ({"best": None, "n": np.ones(1)}, {"best": [jnp.zeros(2)], "n": jnp.zeros(3)}):
        same(load(tmp_path, x=template).x, after)


LEAVES = st.sampled_from(
    [
        lambda: 0,
        lambda: 0.5,
        lambda: "text",
        lambda: np.arange(3.0),
        lambda: np.float16(3),
        lambda: jnp.arange(4, dtype=jnp.int8),
        lambda: jnp.ones((2, 2), jnp.bfloat16),
        lambda: jnp.zeros(0),
        lambda: jax.random.key(5),
    ]
).map(lambda make: make())
KEYS = st.sampled_from(["a", "b", "a/b", "", "0"])
TREES = st.recursive(
    LEAVES | st.none(),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(Struct, inner, st.integers(0, 1)),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(first=TREES, second=TREES, third=TREES)
def test_any_tree_that_becomes_any_other(first: Any, second: Any, third: Any) -> None:
    """Whatever a value becomes, step by step, is the same after a restart, or refused before it is saved."""
    with tempfile.TemporaryDirectory(prefix="jobkit-state-") as directory:
        parts = parts_of(x=first)
        for step, value in enumerate((second, third), start=1):
            parts["x"].value = value  # type: ignore[attr-defined]
            try:
                state.check_savable(parts)
            except ConfigError as error:
                assert "when resume() was given it" in str(error) or "static data" in str(error)  # noqa: PT017
                with pytest.raises(ConfigError):
                    state.take(parts)
                return
            store = saved(directory, parts, step)
            parts = parts_of(x=first)  # the next attempt's program
            restore(store, step, parts)
            same(parts["x"].value, value)  # type: ignore[attr-defined]


PROGRAM = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
import jobkit

with jobkit.Run(sys.argv[1], save_every="5 steps") as run:
    run.resume(params={"w": np.random.RandomState(0).randn(3)}, best=None, losses=[], n=jnp.int32(0), seen={})
    print("begins at", run.step, flush=True)
    for step in run.steps(int(sys.argv[2])):
        run.state.params = jax.tree.map(lambda w: jnp.float32(w) * 0.99, run.state.params)
        run.state.n = run.state.n + 0.5
        run.state.losses.append(float(run.state.params["w"].sum()))
        if step % 3 == 0:
            run.state.best = {"w": run.state.params["w"], "step": step}
            run.state.seen[f"step {step}"] = True
        print("step", step, flush=True)
        time.sleep(float(sys.argv[3]))
"""


def _trained(run: Path, steps: int, pace_s: float, *, until: str = "", kill: int = 0) -> int:
    """Train; once a line begins with `until`, send a signal."""
    command = [sys.executable, "-c", PROGRAM, str(run), str(steps), str(pace_s)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JOBKIT_")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as program:
        assert program.stdout is not None
        for line in program.stdout:
            if until and line.strip() == until:
                program.send_signal(kill)
        return program.wait()


@pytest.mark.slow
def test_a_training_whose_parts_change_survives(tmp_path: Path) -> None:
    """float64 that becomes float32, None that becomes a dict, a list that grows: a notice and a SIGKILL lose no bit."""
    assert _trained(tmp_path / "a", 12, 0) == 0
    assert _trained(tmp_path / "b", 12, 0.2, until="step 3", kill=signal.SIGTERM) == 75
    assert _trained(tmp_path / "b", 12, 0.2, until="step 8", kill=signal.SIGKILL) == -9
    assert _trained(tmp_path / "b", 12, 0) == 0
    from jobkit.compare import compare

    told = compare(str(tmp_path / "a"), str(tmp_path / "b"))
    assert told.equal, told.difference
    assert told.leaves > 20


def test_a_state_that_cannot_come_back_ends_the_run_at_the_first_boundary(tmp_path: Path) -> None:
    """The first step's end says what to write, with nothing trained that is not saved."""
    run = jobkit.Run(tmp_path / "run", save_every=None)

    def train() -> None:
        with run:
            run.resume(x={"w": jnp.zeros(1), "opt": None}, optimizer=None)
            for _ in run.steps(10):
                run.state.x = {"w": run.state.x["w"] + 1, "opt": optax.sgd(0.1, 0.9).init(run.state.x["w"])[0]}

    with pytest.raises(ConfigError, match="x/opt was None when") as told:
        train()
    assert told.value.exit_code == 78
    assert run.step == 1


def test_the_best_step_comes_back_into_a_state_that_has_changed_since(tmp_path: Path) -> None:
    """restore() puts an earlier, shorter list back, whatever it has become since."""
    with jobkit.Run(tmp_path / "run", save_every=None, keep_best=("loss", "min")) as run:
        run.resume(x=[], n=0, optimizer=None)
        for step in run.steps(4):
            run.state.x.append(jnp.float32(step))
            run.state.n += 1
            if step == 1:
                run.save(loss=0.5)
        assert len(run.state.x) == 4
        assert run.restore("best") == 2
        same(run.state.x, [jnp.float32(0), jnp.float32(1)])


@pytest.mark.slow
def test_parts_that_change_in_several_processes(tmp_path: Path) -> None:
    """Weights that become arrays of all processes come back in as many, in one, and on more devices, to the bit."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert training.join_many(training.start_many(whole, 2, function=training.train_changing, steps=10)) == [0, 0]
    assert training.join_many(training.start_many(again, 2, function=training.train_changing, steps=5)) == [0, 0]
    shutil.copytree(again, tmp_path / "one")
    assert training.join_many(training.start_many(again, 2, devices=2, function=training.train_changing, steps=10)) == [
        0,
        0,
    ]
    code, log = training.attempt(tmp_path / "one", function=training.train_changing, steps=10)
    assert code == 0, log
    for url in (again, tmp_path / "one"):
        assert training.digest(url, 10, arrays_only=True) == training.digest(whole, 10, arrays_only=True)
        assert table_of(Store(url), 10)["steps"]["leaves"].keys() == set(map(str, range(10)))

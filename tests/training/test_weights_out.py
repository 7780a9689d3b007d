"""Parts saved without a run, and read again: jobkit.save and jobkit.load, from exports and from plain Orbax too."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jobkit
from jobkit import contract
from jobkit.errors import ConfigError, StorageError
from jobkit.rundir import commits
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store
from tests.fakes.gcs_server import GcsServer
from tests.training.test_plain import _bits as bits
from tests.training.test_plain import _pair as pair


class Deep(nnx.Module):
    """Layers in an nnx.List."""

    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(11)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def test_saved_and_loaded(tmp_path: Path) -> None:
    """Any parts come back to the bit; a second save replaces the first, and leaves nothing of it."""
    (model, optimizer), random = pair(0), np.random.default_rng(1)
    path = tmp_path / "weights"
    for scale in (1.0, 2.0):
        jobkit.save(path, model=model, optimizer=optimizer, random=random, scale=jnp.float32(scale), names=["a", 1])
    (other, its_optimizer), its_random = pair(1), np.random.default_rng(2)
    values = jobkit.load(path, model=other, random=its_random, scale=jnp.float32(0), names=["b", 0])
    assert bits(other) == bits(model)
    assert (float(values.scale), values.names, its_random.random()) == (2.0, ["a", 1], random.random())
    with jobkit.Run(tmp_path / "run", start_from=path) as run:
        run.resume(model=other, optimizer=its_optimizer)
        assert run.step == 0, "it counts saves, not steps"
    assert bits(its_optimizer) == bits(optimizer)
    assert [name for name in Store(path).names(contract.CHECKPOINTS) if name.isdecimal()] == ["1"]
    assert oct(path.stat().st_mode & 0o777) == "0o700"
    raw = ocp.PyTreeCheckpointer().restore(path / "checkpoints" / "1" / contract.ORBAX_ITEM)
    assert (np.asarray(raw["model"]["linear"]["kernel"]) == np.asarray(model.linear.kernel.get_value())).all()


def test_what_is_refused(tmp_path: Path) -> None:
    """Nothing to save, a run, somebody's files, another saver, a flipped bit: one sentence, and nothing is touched."""
    weights = {"w": jnp.ones(3)}
    with jobkit.Run(tmp_path / "run") as run:
        run.resume(model=weights, optimizer=None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    said = {
        "run": "is a run: run.save",
        "mine": "is not empty and holds no saved parts .*thesis.tex",
        "file": "a part of that path is a file",
    }
    for name, text in said.items():
        with pytest.raises((ConfigError, StorageError), match=text):
            jobkit.save(tmp_path / name, model=weights)
    with pytest.raises(ConfigError, match="was given nothing to save"):
        jobkit.save(tmp_path / "new")
    with pytest.raises(ConfigError, match="cannot be rewound"):
        jobkit.save(tmp_path / "new", data=iter([1]))
    assert not (tmp_path / "new").exists()
    jobkit.save(tmp_path / "new", model=weights)
    from jobkit.checkpoint.weights import parts_alone

    with parts_alone._alone(Store(tmp_path / "new")), pytest.raises(ConfigError, match="another process is saving"):
        jobkit.save(tmp_path / "new", model=weights)
    state = tmp_path / "new" / "checkpoints" / "0" / contract.STATE
    state.write_bytes(state.read_bytes()[:-1] + b" ")
    with pytest.raises(StorageError, match="is damaged"):
        jobkit.load(tmp_path / "new", model=weights)


SAVES = "import sys, jax.numpy as jnp, jobkit; jobkit.save(sys.argv[1], model={'w': jnp.full(5000, 2.0)})"


@pytest.mark.slow
def test_killed_while_it_saves(tmp_path: Path) -> None:
    """SIGKILL at any point leaves the old or the new parts, whole; the next save takes what was left away."""
    points = {"after_data": 1.0, "before_rename": 1.0, "after_rename": 2.0, "during_retention": 2.0}
    running = {}
    for point in points:
        jobkit.save(tmp_path / point, model={"w": jnp.ones(5000)})
        environ = os.environ | {contract.ENV_FAULT: point, "JAX_PLATFORMS": "cpu"}
        running[point] = subprocess.Popen([sys.executable, "-c", SAVES, str(tmp_path / point)], env=environ)
    for point, child in running.items():
        assert child.wait() == -9
        store = Store(tmp_path / point)
        assert all(not commits.problems(store, step) for step in commits.steps(store))
        assert jobkit.load(tmp_path / point, model={"w": jnp.zeros(5000)}).model["w"].mean() == points[point]
        jobkit.save(tmp_path / point, model={"w": jnp.full(5000, 3.0)})
        assert jobkit.load(tmp_path / point, model={"w": jnp.zeros(5000)}).model["w"].mean() == 3.0
        assert len(commits.steps(store)) == 1
        assert not store.names(contract.STAGE) + store.names(contract.TRASH)


@pytest.mark.parametrize("url", ["gs://bucket/weights", "memory://weights"])
def test_on_a_url(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On any URL of fsspec: half an upload is not seen, the next save takes it away, a home of before is none."""
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / "home"))
    zero = {"w": jnp.zeros(3)}
    with GcsServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        jobkit.save(url, model={"w": jnp.ones(3)})
        remote = Remote(url)
        remote.create("checkpoints/1/default/half", b"an upload that was killed")
        assert jobkit.load(url, model=zero).model["w"].sum() == 3
        jobkit.save(url, model={"w": jnp.full(3, 2.0)})
        assert jobkit.load(url, model=zero).model["w"].sum() == 6
        assert {name.split("/")[1] for name in remote.find(contract.CHECKPOINTS)} == {"2"}
        with jobkit.Run(tmp_path / "run", start_from=url) as run:
            assert run.resume(model=zero, optimizer=None).model["w"].sum() == 6
        remote.remove(remote.find())  # and somebody begins there anew, whose numbers are the same
        for value in (7.0, 8.0, 9.0):
            jobkit.save(url, model={"w": jnp.full(3, value)})
        assert jobkit.load(url, model=zero).model["w"].sum() == 27


def test_an_export_with_a_list(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The layers of an nnx.List, more than ten, find their places again: with load, start_from and Flax's own call."""
    model, other, third, fourth = Deep(0), Deep(1), Deep(2), Deep(3)
    with jobkit.Run(tmp_path / "run") as run:
        run.resume(model=model, optimizer=None)
    jobkit.export_params(tmp_path / "run", tmp_path / "out")
    jobkit.load(tmp_path / "out", model=other)
    assert "lacks it: model/dropout/rngs/count, model/dropout/rngs/key" in capfd.readouterr().err
    with jobkit.Run(tmp_path / "next", start_from=tmp_path / "out") as run:
        run.resume(model=third, optimizer=None)
    read: Any = ocp.StandardCheckpointer().restore(tmp_path / "out")["model"]
    nnx.update(fourth, nnx.restore_int_paths(read))
    for one in (other, third, fourth):
        assert bits(one.layers) == bits(model.layers)
    with pytest.raises(ConfigError, match="has no part 'head'; it has model"):
        jobkit.load(tmp_path / "out", model=other, head={"w": jnp.ones(2)})

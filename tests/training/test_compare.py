"""The comparison finds every kind of difference, down to one bit, and nothing else."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jobkit
from jobkit.compare import compare
from jobkit.errors import ConfigError, StorageError


def make(
    path: Path, *, steps: int = 3, draws: int = 5, losses: tuple[float, ...] = (3.0, 2.0, 1.0), **parts: Any
) -> str:
    """Write a run whose state is `parts`, a counter, a key and a generator that has drawn `draws` numbers."""
    generator = np.random.default_rng(0)
    generator.random(draws)
    with jobkit.Run(path, save_every=None) as run:
        run.resume(optimizer=None, count=0, key=jax.random.key(1), generator=generator, **parts)
        for step in run.steps(steps):
            run.state.count += 1
            run.log(loss=losses[step])
    return str(path)


def flipped(value: float) -> float:
    """Return the float32 that differs in its last bit."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return float(struct.unpack("<f", struct.pack("<I", bits ^ 1))[0])


def test_equal_runs(tmp_path: Path) -> None:
    """Two runs of the same program are equal, NaN and all; a run equals itself."""
    weights = jnp.array([1.0, jnp.nan, -0.0])
    a = make(tmp_path / "a", weights=weights, losses=(3.0, float("nan"), 1.0))
    b = make(tmp_path / "b", weights=weights, losses=(3.0, float("nan"), 1.0))
    result = compare(a, b)
    assert result.equal
    assert result.difference is None
    assert (result.step, result.values, result.repeated) == (3, 3, 0)
    assert result.leaves >= 4


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"weights": jnp.array([1.0, 2.0, flipped(3.0)])}, "weights"),
        ({"weights": jnp.array([1.0, 2.0, 3.0], jnp.bfloat16)}, "weights"),
        ({"weights": jnp.array([[1.0, 2.0, 3.0]])}, "weights"),
        ({"zero": -0.0}, "zero"),
        ({"draws": 6}, "generator (its state)"),
        ({"losses": (3.0, np.nextafter(2.0, 3.0), 1.0)}, "loss"),
        ({"other": 1}, "other"),
        ({"steps": 2}, "loss"),
    ],
    ids=["bit", "dtype", "shape", "sign", "generator", "loss", "part", "length"],
)
def test_difference_is_named(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    """One bit anywhere makes the runs different, and the first place is named."""
    a = make(tmp_path / "a", weights=jnp.array([1.0, 2.0, 3.0]), zero=0.0)
    b = make(tmp_path / "b", **({"weights": jnp.array([1.0, 2.0, 3.0]), "zero": 0.0} | change))
    result = compare(a, b)
    assert not result.equal
    assert result.difference is not None
    assert result.difference.name == name
    assert result.difference.a != result.difference.b


def test_first_difference_comes_first(tmp_path: Path) -> None:
    """Of several differences the earliest step is named."""
    a = make(tmp_path / "a", weights=jnp.zeros(3))
    b = make(tmp_path / "b", weights=jnp.ones(3), losses=(3.0, 2.5, 1.5))
    difference = compare(a, b).difference
    assert difference is not None
    assert (difference.name, difference.step) == ("loss", 1)


def test_step_that_ran_twice(tmp_path: Path) -> None:
    """A step run twice must log the same value twice, even where the last one agrees with the other run."""
    a = make(tmp_path / "a")
    b = make(tmp_path / "b")
    later = Path(b) / "attempts/1/events-0.jsonl"
    later.parent.mkdir()
    event = {"t": 2e9, "event": "metrics", "step": 2, "values": {"loss": 1.0}}
    later.write_text(json.dumps(event) + "\n")
    assert compare(a, b).equal
    assert compare(a, b).repeated == 1
    earlier = Path(b) / "attempts/0/events-0.jsonl"
    earlier.write_text(earlier.read_text().replace('"loss":1.0', '"loss":1.5'))
    difference = compare(a, b).difference
    assert difference is not None
    assert (difference.name, difference.step) == ("loss, logged twice by one run", 2)


def test_nothing_to_compare(tmp_path: Path) -> None:
    """A directory without checkpoints, and a damaged checkpoint, are errors and not differences."""
    a = make(tmp_path / "a", weights=jnp.zeros(100))
    with pytest.raises(ConfigError, match="no committed checkpoint"):
        compare(a, str(tmp_path / "nothing"))
    b = str(shutil.copytree(a, tmp_path / "b"))
    state = Path(b) / "checkpoints/3/state.json"
    state.write_text(state.read_text().replace("100", "101"))
    with pytest.raises(StorageError, match="damaged"):
        compare(a, b)


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    """Exit 0 equal, 1 different, 2 nothing to compare; --json is one object."""
    a, b, c = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", losses=(3.0, 2.0, 1.5))

    def run(*arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "jobkit.compare", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    code, out, _ = run(a, b)
    assert code == 0
    assert out.startswith("equal to the last bit: ")
    code, out, _ = run(a, c, "--json")
    assert code == 1
    assert json.loads(out)["difference"] == {"name": "loss", "step": 2, "a": "1.0", "b": "1.5"}
    code, out, err = run(a, str(tmp_path / "nothing"))
    assert (code, out) == (2, "")
    assert err.startswith("jobkit: ")
    assert len(err.splitlines()) == 1

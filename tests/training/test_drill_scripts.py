"""What a drill says of small scripts of many kinds: the right ones are certified, and what is wrong has its name."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness import loaders
from tests.training.test_drill import SCRIPTS
from tests.training.test_drill import drill as run


@dataclass(frozen=True)
class Right:
    """A script that is certified.

    Args:
        warned: What the warnings begin with.
        aside: Files that are not compared.
    """

    warned: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()


RIGHT = {
    "nnx_sound": Right(),
    "linen_sound": Right(),
    "equinox_sound": Right(),
    "grain_sound": Right(),
    "own_loop_sound": Right(),
    "phases_sound": Right(),
    "rl_sound": Right(),
    "gan_sound": Right(),
    "early_stop": Right(),
    "epochs_sound": Right(),
    "files_sound": Right(("losses.csv: ",), ("times.log",)),
    "thread_sound": Right(),
    "best_model": Right(),
    "epoch_mean": Right(),
    "ema_part": Right(),
    "step_globals": Right(),
    "sorted_names": Right(),
    "python_generators": Right(),
    "same_environment": Right(),
    "after_the_loop": Right(),
    "printed_rates": Right(("rate in printed_rates.py:main, line 15: changes from step to step",)),
    "forgotten": Right(("schedule in forgotten.py:main", "plateau in forgotten.py", "stopping in forgotten.py")),
    "torch_sound": Right(),
    "tf_sound": Right(),
}

WRONG = {
    "nnx_noise_lost": "unsaved RNG: noise in nnx_noise_lost.py",
    "linen_average": "unsaved part: average in linen_average.py:main",
    "equinox_best": "unsaved part: best_bias in equinox_best.py:main",
    "grain_lost": "unsaved data position: data in grain_lost.py:main",
    "own_loop_order": "unsaved part: rows in own_loop_order.py:main",
    "phases_mean": "step-dependent state outside the parts: total in phases_mean.py:main",
    "rl_buffer_lost": "step-dependent state outside the parts: buffer in rl_sound.py:train",
    "gan_pool_lost": "unsaved part: self._pool in gan_pool_lost.py:train",
    "file_counter": "state in a file: counter.txt",
    "thread_race": "nondeterministic operation: thread count in thread_race.py",
    "environment": "a value that is another one in each attempt: scale in environment.py:main",
    "elapsed_time": "nondeterministic operation: began in elapsed_time.py:main",
    "hash_order": "hash order",
    "globals_elsewhere": "step-dependent state outside the parts: calls in counting.py",
    "closure": "step-dependent state outside the parts: rate.asked in closure.py:main",
    "unseeded_shuffle": "unseeded RNG: rows in unseeded_shuffle.py:main",
    "unseeded": "unseeded RNG: generator",
    "dies_with_a_still_clock": "nondeterministic operation: noise in dies_with_a_still_clock.py:main",
    "cycle": "unsaved data position: rates in cycle.py",
    "default_argument": "step-dependent state outside the parts: clipped.default 0 in default_argument.py",
    "class_attribute": "step-dependent state outside the parts: Schedule.calls in class_attribute.py",
    "torch_generator": "unsaved RNG: order in torch_generator.py:main",
    "torch_global": "unsaved RNG: PyTorch's global generator (torch)",
    "torch_position": "unsaved data position: data in torch_position.py:main",
    "tf_position": "unsaved data position: data in tf_position.py:main",
    "tf_unseeded": "nondeterministic operation: batch in tf_unseeded.py:main",
    "changed_after": "a part that is changed after it was restored: params/b",
}


LOADERS = {"tf_": "tensorflow", "torch_": "torch"}
"""What scripts need whose names begin so."""


def needed(script: str) -> dict[str, str]:
    """Return the variables with which a script finds its libraries."""
    return loaders.needed(next((LOADERS[prefix] for prefix in LOADERS if script.startswith(prefix)), ""))


def drill(script: str, place: Path) -> dict[str, Any]:
    """Drill a script with the scenario that costs steps, and return the document and the exit code."""
    only = ("--only", "kill", "--json", "--run", str(place / "d"))
    done = run(*only, "--", sys.executable, f"{script}.py", cwd=SCRIPTS, **needed(script))
    assert done.stdout, done.stderr
    return {**json.loads(done.stdout), "code": done.returncode}


@pytest.mark.slow
@pytest.mark.parametrize("script", RIGHT)
def test_right_script_is_certified(tmp_path: Path, script: str) -> None:
    """It goes on with the same bits and leaves the same files, and nothing is said against it."""
    told = drill(script, tmp_path)
    assert told["code"] == 0, told
    assert told["diagnosis"] is None
    assert len(told["warnings"]) == len(RIGHT[script].warned), told["warnings"]
    assert all(map(str.startswith, told["warnings"], RIGHT[script].warned))
    assert told["files_aside"] == list(RIGHT[script].aside)


@pytest.mark.slow
@pytest.mark.parametrize("script", WRONG)
def test_culprit_of_a_wrong_script_is_named(tmp_path: Path, script: str) -> None:
    """It is not certified, and what is wrong is named."""
    told = drill(script, tmp_path)
    assert told["code"] == 1, told
    assert told["diagnosis"]["name"] == WRONG[script], told

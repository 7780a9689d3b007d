"""A training over a loader of another library, run in four attempts by one process that imports the library once.

`python -m tests.harness.loader_training KIND PLACE`: undisturbed in PLACE/whole; in PLACE/run ended by a SIGTERM in its
twelfth step, by a SIGKILL six steps later, and then to the end. It prints the exit codes as JSON.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jobkit
from jobkit.checkpoint.kinds import part_of
from jobkit.contract import ENV_DRILL, ENV_FAULT
from jobkit.drill.settings import Drill
from jobkit.errors import ConfigError

ROWS, SIZE, EPOCHS = 32, 4, 4
FAULTS = ("step:12=TERM", "step:6=KILL", "")


class Rows:
    """A source of rows, as PyTorch takes it."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> float:
        return float(row)


def _tensorflow() -> Any:
    import tensorflow as tf

    rows = tf.data.Dataset.range(ROWS, output_type=tf.float32)
    return jobkit.Batches(lambda seed, epoch: rows.shuffle(ROWS, seed=seed).batch(SIZE).prefetch(2).as_numpy_iterator())


def _torch() -> Any:
    import torch
    from torch.utils.data import DataLoader

    def make_epoch(seed: int, epoch: int) -> Any:
        order = torch.Generator().manual_seed(seed)
        return DataLoader(Rows(), SIZE, shuffle=True, generator=order, collate_fn=list, num_workers=2)

    return jobkit.Batches(make_epoch)


def _torchdata() -> Any:
    import torch
    from torch.utils.data import RandomSampler
    from torchdata.stateful_dataloader import StatefulDataLoader

    order = torch.Generator()
    wrong = [{"shuffle": True, "generator": order}, {"sampler": RandomSampler(Rows(), generator=order)}]
    for options in wrong:
        with pytest.raises(ConfigError, match="next epochs come in another order after a restart"):
            part_of("data", StatefulDataLoader(Rows(), SIZE, collate_fn=list, **options))
    torch.manual_seed(0)
    return StatefulDataLoader(Rows(), SIZE, shuffle=True, collate_fn=list)


def _datasets() -> Any:
    import datasets

    rows = datasets.Dataset.from_dict({"x": [float(row) for row in range(ROWS)]})
    return jobkit.Batches(lambda seed, epoch: rows.shuffle(seed=seed).with_format("numpy").iter(SIZE))


def _stream() -> Any:
    import datasets

    rows = datasets.Dataset.from_dict({"x": [float(row) for row in range(ROWS)]}).to_iterable_dataset(num_shards=2)
    with pytest.raises(ConfigError, match="whose state lacks its shuffle buffer and is used again by the next epoch"):
        part_of("data", rows)
    shuffled = rows.with_format("numpy")
    return jobkit.Batches(lambda seed, epoch: shuffled.shuffle(seed=seed, buffer_size=9).iter(SIZE))


KINDS: dict[str, Callable[[], Any]] = {
    "tensorflow": _tensorflow,
    "torch": _torch,
    "torchdata": _torchdata,
    "datasets": _datasets,
    "stream": _stream,
}


def train(kind: str) -> None:
    """Train in a few epochs, in the working directory; the order of rows and batches decides the result."""
    import jax.numpy as jnp

    data = KINDS[kind]()
    with jobkit.Run("run", save_every=5, trackers=()) as run:
        state = run.resume(w=jnp.zeros(()), data=data, optimizer=None)
        for epoch in run.epochs(EPOCHS, data):
            for batch in epoch:
                rows = np.asarray(batch["x"] if kind in ("datasets", "stream") else batch, np.float32)
                state.w = 0.9 * state.w + rows @ np.arange(1, SIZE + 1, dtype=np.float32)
            run.log(epoch=epoch, w=state.w)


def attempt(kind: str, place: Path, fault: str) -> int:
    """Run one attempt in a process of its own; return its exit code, negative for a signal."""
    child = os.fork()
    if child:
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(ProcessLookupError):  # the workers of a loader outlive a SIGKILL
            os.killpg(child, signal.SIGKILL)
        return ended
    code: Any = 1
    try:
        os.setsid()
        place.mkdir(exist_ok=True)
        os.chdir(place)
        os.environ |= {ENV_FAULT: fault, ENV_DRILL: Drill(save_every=5).to_json()}
        train(kind)
        code = 0
    except SystemExit as leave:
        code = leave.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code or 0)


def main(kind: str, place: str) -> None:
    """Run all attempts."""
    at = Path(place)
    faults = [("whole", ""), *(("run", fault) for fault in FAULTS)]
    print(json.dumps([attempt(kind, at / name, fault) for name, fault in faults]))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""jobkit: training runs in JAX and Flax that survive preemption.

    with jobkit.Run("runs/mnist") as run:
        run.resume(model=model, optimizer=optimizer, data=batches)
        for step in run.steps(10_000):
            loss = train_step(model, optimizer, next(batches))
            run.log(loss=loss)

Importing jobkit loads neither jax nor numpy; they come in with the first `Run`.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

from jobkit.errors import ConfigError, JobkitError, Preempted, StorageError

if TYPE_CHECKING:
    from jobkit.checkpoint.layout.handler import DirectCheckpointHandler, DirectRestore, DirectSave
    from jobkit.checkpoint.restore import export_params
    from jobkit.checkpoint.weights.parts_alone import load, save
    from jobkit.data.batches import Batches
    from jobkit.group import initialize
    from jobkit.preemption.notice import Notice
    from jobkit.run.early_stopping import EarlyStopping
    from jobkit.run.run import Run

__version__ = "0.1.0"
__all__ = [
    "Batches", "ConfigError", "DirectCheckpointHandler", "DirectRestore", "DirectSave", "EarlyStopping", "JobkitError",
    "Notice", "Preempted", "Run", "StorageError", "export_params", "initialize", "load", "save",
]  # fmt: skip

_HOMES = {
    "Run": "jobkit.run.run",
    "Batches": "jobkit.data.batches",
    "EarlyStopping": "jobkit.run.early_stopping",
    "Notice": "jobkit.preemption.notice",
    "initialize": "jobkit.group",
    "load": "jobkit.checkpoint.weights.parts_alone",
    "save": "jobkit.checkpoint.weights.parts_alone",
    "export_params": "jobkit.checkpoint.restore",
    **dict.fromkeys(("DirectCheckpointHandler", "DirectSave", "DirectRestore"), "jobkit.checkpoint.layout.handler"),
}


if "jax" in sys.modules and "JOBKIT_SUPERVISOR" in os.environ:
    # What a program compiles before it opens a Run is counted too, where jax is there already.
    from jobkit import compilecache

    compilecache.counter.start()


def __getattr__(name: str) -> Any:
    """Load the heavy names on first use; a package that is too old is named before its import fails."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jobkit' has no attribute {name!r}")
    import importlib

    from jobkit import errors, versions

    if _HOMES[name] not in sys.modules:
        try:
            versions.check()
        except ConfigError:
            errors.end_in_words()
            raise
    return getattr(importlib.import_module(_HOMES[name]), name)

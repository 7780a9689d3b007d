"""launch: submits, watches and reports runs; needs neither jax nor numpy.

>>> import launch
>>> launch.JobSpec(command=("python", "train.py"), run="runs/mnist").max_failures
10
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.api import cancel, resume, save, status, stop, submit
    from launch.backends.cloud.aws import Aws
    from launch.backends.cloud.gcp import Gcp
    from launch.backends.local import Local
    from launch.backends.slurm.backend import Slurm
    from launch.lifecycle.run_status import Status
    from launch.spec.cloud_options import Cloud
    from launch.spec.jobspec import JobSpec

__all__ = [
    "Aws", "Cloud", "Gcp", "JobSpec", "Local", "Slurm", "Status", "cancel", "resume", "save", "status", "stop",
    "submit",
]  # fmt: skip

_HOMES = {
    "Aws": "launch.backends.cloud.aws",
    "Cloud": "launch.spec.cloud_options",
    "Gcp": "launch.backends.cloud.gcp",
    "JobSpec": "launch.spec.jobspec",
    "Local": "launch.backends.local",
    "Slurm": "launch.backends.slurm.backend",
    "Status": "launch.lifecycle.run_status",
}


def __getattr__(name: str) -> Any:
    """Load the names on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'launch' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES.get(name, "launch.api")), name)

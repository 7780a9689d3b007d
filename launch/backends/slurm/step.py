"""What each task of a step runs for a run in a bucket: `python -m launch.backends.slurm.step RUN`.

The nodes of a job need not share a disk. So each task brings what says what the run is into a home of its own, unpacks
the code there, and becomes the supervisor of its process.
"""

import json
import os
import signal
from typing import NoReturn

import msgspec

from jobkit import contract
from jobkit.errors import ConfigError
from jobkit.rundir import mirror
from jobkit.rundir.store import Store
from launch.backends.slurm.job import SlurmRunner
from launch.lifecycle.submission import run_as_program
from launch.spec import jobspec as specs


class Step(SlurmRunner):
    """What makes one task ready; it inherits the limits, for which the runner on the first node has asked SLURM."""

    def _apart(self) -> bool:
        return False

    def _grace(self) -> dict[str, str]:
        return {}


def main(arguments: list[str]) -> NoReturn:
    """Become the supervisor of this task's process.

    Args:
        arguments: The run.
    """
    # The supervisor takes them up: they are held back until it listens.
    held = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    if len(arguments) != 1 or contract.attempt_from() is None:
        raise ConfigError("this runs inside a step of a SLURM job: use jobkit submit --on slurm")
    store = Store(arguments[0])
    if contract.process_from()[0]:  # the first one's home is the runner's
        mirror.fetch_described(store)
    lines = tuple(map(str, json.loads(os.environ.get(contract.ENV_SETUP) or "[]")))
    spec = msgspec.structs.replace(specs.read(store), setup=lines)
    command, environ = Step(store, spec, os.environ.get("SLURM_JOB_ID", ""), 0).prepare(dict(os.environ))
    os.execvpe(command[0], command, environ)


if __name__ == "__main__":
    run_as_program(main)

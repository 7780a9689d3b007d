"""`python -m jobkit.supervise -- CMD`: run one attempt of CMD."""

import os
import signal
import threading
import time
from pathlib import Path

import click

from jobkit import contract
from jobkit.errors import ConfigError, JobkitError, leave, say
from jobkit.rundir.store import Store, explain
from jobkit.supervise import processes
from jobkit.supervise.supervisor import Supervisor

_TICK_S = 0.25


def _outlive(runner: int) -> None:
    """Take the end of a runner that is not this process's parent for a SIGTERM."""
    while processes.alive(runner):
        time.sleep(_TICK_S)
    os.kill(os.getpid(), signal.SIGTERM)


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--run", "url", envvar=contract.ENV_RUN, help="The run directory; JOBKIT_RUN by default.")
@click.option("--cwd", type=click.Path(path_type=Path), help="Directory in which CMD runs.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def main(url: str | None, cwd: Path | None, command: tuple[str, ...]) -> None:
    """Run one attempt of CMD and exit as it does.

    Example: JOBKIT_RUN=runs/mnist python -m jobkit.supervise -- python train.py
    """
    runner = os.environ.get(contract.ENV_RUNNER, "")
    if runner.isdigit():  # told to stop when the local runner dies; the lock it handed down stays held until we end
        processes.signal_on_parent_death(signal.SIGTERM)
        if os.getppid() != int(runner):  # gone already; or the parent is the engine's, in a container
            threading.Thread(target=_outlive, args=(int(runner),), daemon=True).start()
    try:
        if not url:
            raise ConfigError(f"no run directory: set {contract.ENV_RUN} or give --run")
        code = Supervisor(Store(url), command, cwd=cwd).run()
    except JobkitError as error:
        say(str(error))
        code = error.exit_code
    except OSError as error:
        failure = explain(error, f"cannot supervise an attempt in {url}")
        say(str(failure))
        code = failure.exit_code
    leave(int(code))


if __name__ == "__main__":
    main()

"""What the command line does, for Python: the same words, the same errors."""

import os
from collections.abc import Sequence

from jobkit.contract import State
from jobkit.errors import ConfigError
from launch.backends import move_run, registry, save_and_stop
from launch.backends.local import Local
from launch.backends.save_and_stop import PATIENCE_S, Answer
from launch.lifecycle import submission, verbs
from launch.lifecycle.run_status import Status
from launch.lifecycle.verbs import Backend
from launch.spec.jobspec import JobSpec


def submit(spec: JobSpec, *, on: Backend | None = None, wait: bool = False) -> Status:
    """Start a run.

    Args:
        spec: What to run.
        on: The backend: `Local()`, the default, `Slurm(options)`, `Gcp(cloud)`, `Aws(cloud)`.
        wait: Whether to follow the run, printing a line per change, until it is over.

    Returns:
        The run's status on return.

    Raises:
        ConfigError: If it cannot work; nothing is left behind then.
        JobkitError: If a service does not answer.

    Durability: the run is on storage on return, and goes on without this process.
    """
    store = verbs.submit(on or Local(), spec)
    if wait:
        from launch.report import follow

        follow.follow(store)
    return registry.status(store)


def status(run: str | os.PathLike[str]) -> Status:
    """Read what a run is doing.

    Args:
        run: URL of the run directory, or of a sweep.

    Returns:
        Its status; of a sweep with one for each point.

    Raises:
        JobkitError: If it is not a run, or its run.json is damaged.
    """
    return registry.status(submission.open_run(run))


def resume(
    run: str | os.PathLike[str],
    *,
    wait: bool = False,
    take_over: bool = False,
    new_code: bool = False,
    command: Sequence[str] = (),
    setup: Sequence[str] | None = None,
) -> Status:
    """Continue a run that is not done and not alive, from its newest committed step; takes back a cancel.

    Args:
        run: URL of the run directory.
        wait: Whether to follow the run until it is over.
        take_over: Whether to take it from the local runner of another machine without waiting until that counts as
            dead; should it live, it stops.
        new_code: Whether it goes on with the code as it is now, in the directory that it was submitted from; it does so
            too if it is done.
        command: With `new_code`, its command from now on; empty for the one that it has.
        setup: Lines of `--setup`, which no run directory has; empty to go on without; None for those it had.

    Returns:
        The run's status on return; of one that is done, and stays so, with that state.

    Raises:
        ConfigError: If the run is alive, its backend refuses it, it has lines of `--setup` that are not known here, or
            with `new_code` nothing has changed.
        JobkitError: If it is not a run, or its storage or a service does not answer.
    """
    if command and not new_code:
        raise ConfigError("a run goes on with the command that it has; with another one: new_code=True")
    state = move_run.resume(run, command=command if new_code else None, setup=setup, take_over=take_over)
    if wait and state is not State.DONE:
        from launch.report import follow

        follow.follow(submission.open_run(run))
    return status(run)


def save(run: str | os.PathLike[str], *, wait: bool = True, timeout_s: float = PATIENCE_S) -> Answer:
    """Have a run commit the step in progress now, and go on.

    Args:
        run: URL of the run directory.
        wait: Whether to wait until it is committed.
        timeout_s: How long to wait.

    Returns:
        Which attempt was asked, whether it is done, and the newest committed step.

    Raises:
        ConfigError: If nothing of the run trains.
        JobkitError: If it could not save, ended before, or does not answer in time.
    """
    return save_and_stop.save(run, wait=wait, timeout_s=timeout_s)


def stop(run: str | os.PathLike[str], *, wait: bool = True, timeout_s: float = PATIENCE_S) -> Answer:
    """Have a run commit and stop until somebody resumes it.

    Args:
        run: URL of the run directory.
        wait: Whether to wait until nothing of it runs any more.
        timeout_s: How long to wait for a run that was not submitted; one that was gets its grace, and is then killed.

    Returns:
        Which attempt was asked, whether it is done, and the newest committed step.

    Raises:
        ConfigError: If the run is done, or was not submitted and does not run.
        JobkitError: If a run that was not submitted does not stop in time.
    """
    return save_and_stop.stop(run, wait=wait, timeout_s=timeout_s)


def cancel(run: str | os.PathLike[str], *, wait: bool = True) -> Status:
    """End a run for good; it saves what it has and never comes back by itself.

    Args:
        run: URL of the run directory.
        wait: Whether to wait until nothing of it runs any more.

    Returns:
        The run's status on return.

    Raises:
        ConfigError: If the run is already done.
        JobkitError: If it is not a run, or its storage or a service does not answer.
    """
    registry.cancel(run, wait=wait)
    return status(run)

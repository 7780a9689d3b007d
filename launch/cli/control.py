# ruff: noqa: D301  (click wants the character \\b itself)
"""`jobkit save`, `stop` and `rm`: what a person does to a run, wherever it is."""

import sys

import click

from jobkit.errors import ConfigError
from launch.cli.names import RUN


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _seconds(given: str) -> float:
    from jobkit.units import duration_s

    if (seconds := duration_s(given)) <= 0:
        raise ConfigError(f"--timeout {given}: give a duration above zero, or --no-wait")
    return seconds


@click.command()
@click.argument("run", type=RUN)
@click.option("--no-wait", is_flag=True, help="Do not wait until it is committed.")
@click.option("--timeout", metavar="DURATION", default="5m", help="How long to wait. [default: 5m]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def save(run: str, no_wait: bool, timeout: str, as_json: bool) -> None:
    """Have RUN commit the step in progress now, and go on.

    RUN may have been submitted to any backend, or be a program that was started by hand.

    \b
    Examples:
      jobkit save runs/mnist
      jobkit save gs://bucket/mnist --timeout 20m
    """
    from launch.backends import save_and_stop
    from launch.lifecycle import run_status

    answer = save_and_stop.save(run, wait=not no_wait, timeout_s=_seconds(timeout), progress=_progress)
    if as_json:
        print(run_status.to_json(answer))
    elif answer.done:
        print(f"{run}: step {answer.committed_step} is committed")
    else:
        print(f"{run} is asked to save")


@click.command()
@click.argument("run", type=RUN)
@click.option("--no-wait", is_flag=True, help="Do not wait until it has saved and stopped.")
@click.option("--timeout", metavar="DURATION", default="5m", help="How long to wait for a run started by hand.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def stop(run: str, no_wait: bool, timeout: str, as_json: bool) -> None:
    """Have RUN commit and stop until `jobkit resume`.

    A run that was submitted is in the state cancelled from then on, with the reason that it was stopped, and by whom. A
    program that was started by hand goes on when it is started again.

    \b
    Examples:
      jobkit stop runs/mnist
    """
    from launch.backends import save_and_stop
    from launch.lifecycle import run_status, submission
    from launch.spec import jobspec as specs

    answer = save_and_stop.stop(run, wait=not no_wait, timeout_s=_seconds(timeout), progress=_progress)
    if as_json:
        print(run_status.to_json(answer))
        return
    store = submission.open_run(run)
    if specs.exists(store) and specs.read(store).sweep:
        print(f"{run} is stopped" if answer.done else f"{run} is stopping")
        return
    newest = "nothing is committed" if answer.committed_step is None else f"committed step {answer.committed_step}"
    print(f"{run} is stopped, {newest}" if answer.done else f"{run} is stopping")


@click.command(short_help="Remove RUN, with its checkpoints; asks first.")
@click.argument("run", type=RUN)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document; with --yes.")
def rm(run: str, yes: bool, as_json: bool) -> None:
    """Remove RUN with all its checkpoints, logs and code, from its directory or its URL.

    One that is alive is refused. What lies in its directory and is not jobkit's stays. A removal that was interrupted
    can be repeated; what it left is no run any more.

    \b
    Examples:
      jobkit rm runs/mnist
      jobkit rm --yes gs://bucket/mnist
    """
    from jobkit.errors import ConfigError
    from launch.backends import remove_run
    from launch.lifecycle import run_status, submission

    store = submission.open_run(run)
    if not yes:
        removal = remove_run.check(store)
        if as_json or not sys.stdin.isatty():
            raise ConfigError(f"removing {run} ({removal.what}) asks first: give --yes")
        click.confirm(f"remove {store.url} ({removal.what})?", abort=True)
    removal = remove_run.remove(store)
    if as_json:
        print(run_status.to_json(removal))
        return
    kept = f"; not jobkit's, and kept: {', '.join(removal.kept)}" if removal.kept else ""
    print(f"removed {run} ({removal.what}){kept}")


@click.command(short_help="Open a shell beside the live attempt of RUN.")
@click.argument("run", type=RUN)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def attach(run: str, command: tuple[str, ...]) -> None:
    """Open a shell beside the live attempt of RUN, or run COMMAND there.

    On this machine it has the environment of the attempt and its directory, with Docker it is in its container, on
    SLURM it is a step of the job. Leaving it ends nothing of the run; with the job or the container it ends itself.

    \b
    Examples:
      jobkit attach runs/mnist
      jobkit attach runs/mnist -- nvidia-smi
    """
    import os

    from launch.backends import registry
    from launch.lifecycle import submission
    from launch.spec import jobspec as specs

    store = submission.open_run(run)
    spec, backend = specs.read(store), registry.of(store)
    if spec.sweep:
        raise ConfigError(f"{run} is a sweep: name one of its points, {run}/points/0")
    inside = spec.container is not None and backend.processes_here  # an image has shells of its own
    shell = "/bin/sh" if inside else os.environ.get("SHELL") or "/bin/sh"
    words, more = backend.beside(store, command or (shell,))
    try:
        os.execvpe(words[0], words, os.environ | more)
    except OSError as error:
        raise ConfigError(f"cannot run {words[0]}: {error.strerror}") from None

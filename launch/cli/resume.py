# ruff: noqa: D301  (click wants the character \\b itself)
"""`jobkit resume`: go on, where the run was or on another backend."""

import sys
from pathlib import Path
from typing import Any

import click

from jobkit.contract import State
from launch.cli.options import placement, placement_options
from launch.cli.output import follow, print_status


@click.command(short_help="Continue RUN from its newest committed step.")
@click.argument("run")
@click.option("--on", help="Go on there: local, slurm, gcp, aws. [default: where it was]")
@click.option("--profile", metavar="NAME", help="Options from [profile.NAME] in jobkit.toml or ~/.config/jobkit/.")
@placement_options
@click.option("--take-over", is_flag=True, help="Though another machine's runner gave a sign less than 10 min ago.")
@click.option("--wait", is_flag=True, help="Follow the run; exit 0 done, 1 failed, 3 cancelled. Ctrl-C only detaches.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def resume(run: str, profile: str | None, take_over: bool, wait: bool, as_json: bool, **given: Any) -> None:
    """Continue RUN from its newest committed step; takes back a cancel.

    It goes on with the code as it was at the submit; changed code is another run.

    A run of another machine's local runner is refused while that gives signs of life; with --take-over it is not, and
    should that runner live, it stops.

    With --on it moves to another backend, once its job is over where it was. Options of a backend replace what the run
    had.

    \b
    Examples:
      jobkit resume runs/mnist
      jobkit resume --wait runs/mnist
      jobkit resume gs://bucket/r1 --on gcp --region us-central1 --gpus L4:1 --image IMAGE
    """
    from launch.backends import move_run, registry
    from launch.lifecycle import submission
    from launch.spec import jobspec as specs
    from launch.spec.profiles import read_profile

    if profile or any(value not in (None, ()) for value in given.values()):
        old = specs.read_file(submission.open_run(run)).backend
        options = read_profile(profile, cwd=Path.cwd(), home=Path.home()) if profile else {}
        state = move_run.resume(run, placement({"on": old} | options, given), take_over=take_over)
    else:
        state = registry.resume(run, take_over=take_over)
    if state is State.DONE:
        print(f"{run} is already done; nothing to resume", file=sys.stderr if as_json else sys.stdout)
    elif not as_json:
        print(f"resumed {run}", flush=True)
    if state is not State.DONE and (top := submission.changed_code(run)) is not None:
        print(
            f"jobkit: the code below {top} has changed since the submit; {run} goes on with the code as it was then: "
            "submit changed code as another run",
            file=sys.stderr,
            flush=True,
        )
    if wait and state is not State.DONE:
        sys.exit(follow(run, as_json))
    if as_json:
        print_status(run)

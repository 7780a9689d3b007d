# ruff: noqa: D301  (click wants the character \\b itself)
"""`jobkit resume`: go on, where the run was or on another backend."""

import sys
from pathlib import Path
from typing import Any

import click

from jobkit.contract import State
from jobkit.errors import ConfigError, say
from launch.cli.names import BACKEND, RUN
from launch.cli.options import Launching, placement, placement_options, setup_lines
from launch.cli.output import follow, print_status


@click.command(cls=Launching, short_help="Continue RUN from its newest committed step.")
@click.argument("run", type=RUN)
@click.option("--on", type=BACKEND, help="Go on there: local, slurm, gcp, aws. [default: where it was]")
@click.option("--profile", metavar="NAME", help="Options from [profile.NAME] in jobkit.toml or ~/.config/jobkit/.")
@click.option("--setup", multiple=True, metavar="LINE", help="SLURM, gcp, aws: as of submit; no run directory has it.")
@click.option("--no-setup", is_flag=True, help="SLURM, gcp, aws: go on without the lines of --setup that it had.")
@placement_options
@click.option("--new-code", is_flag=True, help="With the code as it is now, and COMMAND; of a finished run too.")
@click.option("--take-over", is_flag=True, help="Though another machine's runner gave a sign less than 10 min ago.")
@click.option("--wait", is_flag=True, help="Follow the run; exit 0 done, 1 failed, 3 cancelled. Ctrl-C only detaches.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def resume(
    run: str,
    profile: str | None,
    new_code: bool,
    setup: tuple[str, ...],
    no_setup: bool,
    take_over: bool,
    wait: bool,
    as_json: bool,
    command: tuple[str, ...],
    **given: Any,
) -> None:
    """Continue RUN from its newest committed step; takes back a cancel.

    It goes on with the code and the command as they were at the submit. With --new-code it takes the code of the
    directory that it was submitted from as it is now, and COMMAND if one is given: a bug that is mended, another
    learning rate, more steps. From which step which code ran, and what differs, is in `jobkit explain` and the report.

    A run of another machine's local runner is refused while that gives signs of life; with --take-over it is not, and
    should that runner live, it stops.

    With --on it moves to another backend, once its job is over where it was. Options of a backend replace what the run
    had.

    \b
    Examples:
      jobkit resume runs/mnist
      jobkit resume --wait runs/mnist
      jobkit resume runs/mnist --new-code -- python train.py --steps 20000
      jobkit resume gs://bucket/r1 --on gcp --region us-central1 --gpus L4:1 --image IMAGE
    """
    from launch.backends import move_run
    from launch.lifecycle import submission
    from launch.spec import jobspec as specs
    from launch.spec.profiles import options_of, read_profile

    if command and not new_code:
        raise ConfigError("a run goes on with the command that it has; with another one: give --new-code too")
    place, options = None, read_profile(profile, cwd=Path.cwd(), home=Path.home()) if profile else {}
    if profile or any(value not in (None, ()) for value in given.values()):
        old = specs.read_file(submission.open_run(run)).backend
        place = placement({"on": old} | options, given)
    lines: tuple[str, ...] | None = setup or (() if no_setup else None)
    file = specs.read_file(submission.open_run(run))
    on = place.backend if place is not None else file.backend
    if lines is None:
        lines = tuple(map(str, options.get("setup", ()))) or None
    if lines is None and file.spec.setup_digest:  # the person's own [profile.default] may have them
        default = options_of(None, on=on, cwd=Path.cwd(), home=Path.home())
        mine = tuple(map(str, default.get("setup", ())))
        lines = mine if specs.setup_digest(mine) == file.spec.setup_digest else None
    setup_lines({}, lines or (), on)
    state = move_run.resume(run, place, command=command if new_code else None, setup=lines, take_over=take_over)
    if state is State.DONE:
        again = f"; with more steps: jobkit resume {run} --new-code -- COMMAND"
        print(f"{run} is already done; nothing to resume{again}", file=sys.stderr if as_json else sys.stdout)
    elif not as_json:
        print(f"resumed {run}", flush=True)
    if state is not State.DONE:
        say_code(run, new=new_code)
    if wait and state is not State.DONE:
        sys.exit(follow(run, as_json))
    if as_json:
        print_status(run)


def say_code(run: str, *, new: bool) -> None:
    """Say which code a run that was resumed goes on with, where that is not what a person may think."""
    from launch.backends import new_code
    from launch.lifecycle import run_status, submission
    from launch.spec import changes

    if new:
        events = [event for event in run_status.events(submission.open_run(run)) if event["event"] == "new_code"]
        if events:
            step = max(0, int(events[-1].get("committed") or 0))
            say(f"from step {step} on with other code or options: {changes.told(events[-1])}")
    elif (found := new_code.since_snapshot(run)) is not None:
        top, which = found
        say(
            f"the code below {top} has changed since its snapshot was taken ({which}); {run} goes on with "
            f"that snapshot: to use the code as it is now, stop it and give 'jobkit resume {run} --new-code'"
        )

# ruff: noqa: D301  (click wants the character \\b itself)
"""`jobkit submit`: from options and a profile to a run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobkit.errors import ConfigError, say
from launch.cli.names import BACKEND, BEGINNING, RUN
from launch.cli.options import Launching, placement, placement_options, setup_lines
from launch.cli.output import follow, print_status, unanswered

if TYPE_CHECKING:
    from launch.backends.begin_from import Beginning
    from launch.lifecycle.submission import Plan
    from launch.lifecycle.verbs import Backend
    from launch.spec.jobspec import JobSpec


@click.command(cls=Launching, context_settings={"allow_interspersed_args": False})
@click.option("--on", type=BACKEND, help="Backend: local, slurm, gcp, aws. [default: local]")
@click.option("--run", metavar="URL", help="Run directory. [default: runs/<name>-<time>]")
@click.option("--name", help="Name of the run. [default: that of the run directory]")
@click.option("--profile", metavar="NAME", help="Options from [profile.NAME] of jobkit.toml, above [profile.default].")
@click.option("--no-snapshot", is_flag=True, help="Run in this directory itself, not in a copy of the code as it is.")
@click.option("--shared", is_flag=True, help="Let others read the new run directory, as your umask has it.")
@click.option("--grace", metavar="DURATION", help="From asking an attempt to stop to killing it. [default: 30s]")
@click.option("--max-failures", type=int, metavar="N", help="The program's own failures to survive. [default: 10]")
@click.option("--stall", metavar="DURATION|off", help="Restart it when a step takes longer. [default: learned, 1h+]")
@click.option("--notify", multiple=True, metavar="TARGET", help="Tell the URL or command in env:NAME or file:PATH.")
@click.option("--sweep", multiple=True, metavar="NAME=VALUES", help="One run for each value; {NAME} in COMMAND has it.")
@click.option(
    "--array-parallelism", type=int, metavar="N", help="Points of a sweep at once. [default: SLURM all, local 1]"
)
@click.option(
    "--from",
    "begin",
    type=BEGINNING,
    metavar="RUN[@STEP|best]",
    help="Begin with that step, by default the newest, of RUN.",
)
@click.option("--reset-step", is_flag=True, help="Of --from: count the steps from 0 again.")
@click.option("--after", type=RUN, metavar="RUN", help="Start once RUN has finished well (local, SLURM); else fail.")
@click.option("--setup", multiple=True, metavar="LINE", help="SLURM, gcp, aws: bash before each job, verbatim.")
@placement_options
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, do nothing.")
@click.option("--wait", is_flag=True, help="Follow the run; exit 0 done, 1 failed, 3 cancelled. Ctrl-C only detaches.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def submit(
    profile: str | None,
    begin: str | None,
    reset_step: bool,
    dry_run: bool,
    wait: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Start a run of COMMAND, detached, through every interruption.

    COMMAND runs in a copy of the code as it is now, inside the run directory: what it writes to a relative path stays
    in the copy. Data and run directories below here are linked into it.

    \b
    Examples:
      jobkit submit -- python train.py
      jobkit submit --run runs/mnist --wait -- python train.py --lr 1e-3
      jobkit submit --profile long --dry-run -- python -m mypackage.train
      jobkit submit --image train:1 -- python train.py
      jobkit submit --on slurm -p low --gpus-per-node 8 --time 12:00:00 --run /shared/r1 -- python train.py
      jobkit submit --sweep lr=1e-3,3e-4 --sweep seed=0..9 -- python train.py --lr {lr} --seed {seed}
      jobkit submit --after runs/mnist -- python train.py --weights runs/mnist
      jobkit submit --from runs/mnist@best --reset-step --run runs/tuned -- python train.py --lr 1e-4
      jobkit submit --on gcp --region us-central1 --gpus L4:1 --image IMAGE --run gs://bucket/r1 -- python train.py
    """
    from launch.backends import registry
    from launch.lifecycle import verbs

    spec, name = _spec(profile, given)
    backend = registry.named(name)
    beginning = _beginning(begin, spec, reset_step=reset_step)
    if dry_run:
        silent = unanswered(spec.run)
        _show_plan(backend, backend.check(spec, look=not silent), as_json, silent)
        return
    store = verbs.submit(backend, spec, begin=None if beginning is None else beginning.copy)
    if not as_json:
        print(f"submitted {store.url}", flush=True)
    if wait:
        sys.exit(follow(store.url, as_json))
    if as_json:
        print_status(store.url)
    else:
        print(f"  follow:  jobkit logs -f {store.url}\n  cancel:  jobkit cancel {store.url}")


def _beginning(begin: str | None, spec: "JobSpec", *, reset_step: bool) -> "Beginning | None":
    """Find what a run is to begin with."""
    from launch.backends import begin_from
    from launch.lifecycle.submission import open_run

    if begin is None:
        if reset_step:
            raise ConfigError("--reset-step is of --from RUN: give that too")
        return None
    if spec.sweep:
        raise ConfigError("--from is for one run: submit the points of a sweep one by one")
    beginning = begin_from.choose(begin, reset_step=reset_step)
    if spec.run:
        begin_from.refuse_own(open_run(spec.run))
    return beginning


def _spec(profile: str | None, given: dict[str, Any]) -> "tuple[JobSpec, str]":
    """Merge a profile's options and the command line's, which win; return what to run, and the backend."""
    from jobkit.units import duration_s
    from launch.spec import sweep
    from launch.spec.cloud_options import Cloud
    from launch.spec.jobspec import JobSpec
    from launch.spec.profiles import options_of

    options = options_of(profile, on=given["on"], cwd=Path.cwd(), home=Path.home())
    if given["run"] == "":
        raise ConfigError("--run is empty (of a variable that is not set?): name the run directory, or leave --run out")
    if given["after"] == "":
        raise ConfigError("--after is empty (of a variable that is not set?): name a run, or leave it out")
    flags = given | {"snapshot": False if given["no_snapshot"] else None, "shared": given["shared"] or None}
    for name in ("run", "name", "grace", "max-failures", "stall", "array-parallelism", "snapshot", "shared"):
        if (value := flags[name.replace("-", "_")]) is not None:
            options[name] = value
    axes = sweep.parse(given["sweep"])
    place = placement(options, given)
    spec = JobSpec(
        sweep=axes,
        parallel=options.get("array-parallelism") if axes else given["array_parallelism"],
        command=tuple(given["command"]),
        grace_s=duration_s(options.get("grace", 30.0)),
        stall_s=_stall_s(options.get("stall")),
        notify=(*given["notify"], *map(str, options.get("notify", []))),
        sbatch=place.sbatch,
        cloud=None if place.cloud is None else Cloud(**place.cloud),
        container=place.container,
        price_per_hour=place.price_per_hour,
        max_time_s=place.max_time_s,
        max_cost=place.max_cost,
        setup=setup_lines(options, given["setup"], place.backend),
        after=given["after"] or "",
        **{field: options[name] for name, field in _SAME.items() if name in options},
    )
    return spec, place.backend


_SAME = {"run": "run", "name": "name", "snapshot": "snapshot", "shared": "shared", "max-failures": "max_failures"}
"""Options that are fields of a specification as they stand."""


def _stall_s(given: str | float | None) -> float | None:
    """Read `--stall`: None by default, 0 for off."""
    from jobkit.units import duration_s

    if given is None or given == "off":
        return None if given is None else 0.0
    stall_s = duration_s(given)
    if stall_s < 1:
        raise ConfigError(f"--stall {given}: give at least 1s, or off")
    return stall_s


def _show_plan(backend: "Backend", plan: "Plan", as_json: bool, silent: str) -> None:
    import shlex

    from launch.lifecycle import run_status, submission
    from launch.spec import changes, sweep
    from launch.spec.command import shown_in_container

    for line in submission.remarks(plan):
        say(line)
    if silent:
        say(f"not checked: whether {plan.spec.run} may be written to and holds no run yet: {silent}")
    else:
        backend.refuse_taken(plan)
    if plan.spec.cloud is not None:  # the request says all there is, and is one document
        print(backend.preview(plan))
        return
    spec = plan.coded
    if as_json:
        print(run_status.to_json(spec))
        return
    files = f"{len(plan.tree.files)} files below {plan.tree.root}, digest {spec.code}" if plan.tree else "none"
    if spec.sweep:
        shown = "  ".join(f"{name}={','.join(values)}" for name, values in spec.sweep.items())
        print(f"sweep        {sweep.count(spec.sweep)} points: {shown[:200]}")
    print(f"would run    {shlex.join(spec.command)}\nin           {spec.cwd}")
    print(f"run          {spec.run}\nsnapshot     {files}")
    if spec.after:
        print(f"after        {spec.after} has finished well")
    if plan.tree and plan.tree.links:
        print(f"linked       {changes.shown(plan.tree.links)}")
    sent = backend.preview(plan)
    if sent:
        print(f"\n{sent}", end="")
    if spec.container is not None:
        of_which = "of which each" if sent else "each"
        print(f"\n# {of_which} attempt is\n{shlex.join(shown_in_container(plan.store, spec))}")

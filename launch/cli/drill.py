# ruff: noqa: D301  (click wants the character \\b itself)
"""`jobkit drill`: the command line of a drill, and how it shows what it found."""

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobkit.errors import ConfigError, JobkitError
from launch.cli.options import Launching

if TYPE_CHECKING:
    from launch.drill.drill import Options
    from launch.lifecycle.verbs import Backend


@click.command(
    cls=Launching,
    short_help="Interrupt COMMAND in every awkward way, and compare.",
    context_settings={"allow_interspersed_args": False},
)
@click.option("--only", multiple=True, metavar="NAME", help="Only this scenario; may be given several times.")
@click.option("--quick", is_flag=True, help="The five scenarios that find most.")
@click.option("--list", "listing", is_flag=True, help="List the scenarios and do nothing.")
@click.option(
    "--steps",
    type=click.IntRange(6),
    metavar="N",
    help="Drill the first N steps. [default: as many as 3 seconds hold; all, if its end is near]",
)
@click.option("--full", is_flag=True, help="Drill all of the program's steps.")
@click.option(
    "--at", type=click.IntRange(1), metavar="STEP", help="Interrupt it at this step. [default: in the middle]"
)
@click.option(
    "-j", "--jobs", type=click.IntRange(1, 64), help="Scenarios at a time. [default: by the CPUs, 1 on a GPU]"
)
@click.option("--timeout", metavar="DURATION", default="30m", help="How long the reference may take. [default: 30m]")
@click.option("--run", metavar="DIR", help="Where the runs lie. [default: a new directory below runs/]")
@click.option("--no-snapshot", is_flag=True, help="Run in this directory itself, not in a copy of the code as it is.")
@click.option("--keep", is_flag=True, help="Keep the runs; after a failure they are always kept.")
@click.option("--on", type=click.Choice(["local", "slurm"]), default="local", help="Where to drill. [default: local]")
@click.option("-p", "--partition", help="SLURM: partition.")
@click.option("--sbatch", multiple=True, metavar="NAME[=VALUE]", help="SLURM: any other option of sbatch.")
@click.option("--image", help="Drill in containers of this image, which has jobkit in it. local: Docker.")
@click.option("--mount", multiple=True, metavar="SOURCE[:TARGET]", help="What to see in the container too.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the card as a page too.")
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Write it as a picture (with matplotlib).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def drill(
    listing: bool, html: Path | None, png: Path | None, as_json: bool, command: tuple[str, ...], **given: Any
) -> None:
    """Interrupt COMMAND in every awkward way and compare each run with an undisturbed one.

    Exit 0 if every promise held: it went on by itself, lost no step on a notice, and on a kill at most the save
    interval and what was trained while a save was in flight, and ended with the same bits. Exit 1 if one did not: if
    the bits differ it says why. Exit 2 if it could not judge. Only what the drilled steps do is seen: choose them with
    --steps, --at and --full.

    \b
    Examples:
      jobkit drill -- python train.py
      jobkit drill --quick --steps 200 -- python train.py --lr 1e-3
      jobkit drill --quick --at 5000 -- python train.py
      jobkit drill --only kill-commit --keep --html drill.html --png drill.png -- python -m mypackage.train
      jobkit drill --image jobkit -- python train.py
      jobkit drill --on slurm -p low --steps 200 --run /shared/drill -- python train.py
    """
    from launch.backends import registry
    from launch.drill import card, progress
    from launch.drill import drill as drill_
    from launch.lifecycle import run_status

    backend = registry.named(given["on"])
    wanted = drill_.chosen(given["only"], given["quick"], backend)
    if listing:
        print(run_status.to_json(card.listed(wanted)) if as_json else card.listing(wanted))
        return
    if not command:
        raise ConfigError("no command to drill; write it after '--': jobkit drill -- python train.py")
    written = {what: path for what, path in (("html", html), ("png", png)) if path is not None}
    for what, path in written.items():
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"--{what} {path}: there is no directory {path.absolute().parent}")
    if png is not None and find_spec("matplotlib") is None:
        raise ConfigError("--png draws with matplotlib: pip install matplotlib")
    options = _options(backend, command, given)
    try:
        with progress.telling(as_json) as telling:
            result = drill_.drill(options, wanted, telling)
    except JobkitError as error:
        if as_json:
            print(run_status.to_json(card.not_judged(command, str(error))))
        raise
    if html is not None:
        html.write_text(card.page(result), encoding="utf-8")
    if png is not None:
        card.write_picture(png, result)
    if as_json:
        print(run_status.to_json(card.document(result)))
    else:
        card.show(result, written, kept=os.path.exists(result.place))
    sys.exit(result.verdict.exit_code)


def _options(backend: "Backend", command: tuple[str, ...], given: Mapping[str, Any]) -> "Options":
    """Read how a program is to be drilled."""
    from jobkit.units import duration_s
    from launch.cli.options import container_of, refuse_foreign
    from launch.drill.drill import Options, default_jobs
    from launch.spec.jobspec import JobSpec, fresh_place

    full, steps, at, partition = given["full"], given["steps"], given["at"], given["partition"]
    sbatch = {name: value for name, _, value in (text.lstrip("-").partition("=") for text in given["sbatch"])}
    sbatch |= {"partition": partition} if partition else {}
    refuse_foreign(backend, {}, given)
    if full and steps is not None:
        raise ConfigError(f"--full and --steps {steps}: give one of them")
    if at is not None and steps is not None and at >= steps - 1:
        raise ConfigError(f"--at {at} with --steps {steps}: interrupt it before step {steps - 1}")
    if not (backend.processes_here or full or steps or at):
        raise ConfigError("on a cluster say how much to drill, since a job cannot be watched from here: --steps 200")
    place = os.path.abspath(given["run"] or fresh_place("drill"))
    container = container_of(backend, given["image"], {"mount": given["mount"], "container_runtime": None}, {})
    return Options(
        spec=JobSpec(command=command, run=place, snapshot=not given["no_snapshot"], sbatch=sbatch, container=container),
        backend=backend,
        steps=0 if full else steps,
        at=at,
        jobs=given["jobs"] or default_jobs(),
        timeout_s=duration_s(given["timeout"]),
        keep=given["keep"],
    )

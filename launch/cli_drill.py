# ruff: noqa: D301  (click wants the character \\b itself)
"""`jobkit drill`: the command line of a drill, and how it shows what it found."""

import sys
import time
from pathlib import Path

import click

from jobkit.errors import ConfigError


@click.command(
    short_help="Interrupt COMMAND in every awkward way, and compare.",
    context_settings={"allow_interspersed_args": False},
)
@click.option("--only", multiple=True, metavar="NAME", help="Only this scenario; may be given several times.")
@click.option("--quick", is_flag=True, help="The four scenarios that find most.")
@click.option("--list", "listing", is_flag=True, help="List the scenarios and do nothing.")
@click.option("--steps", metavar="N", help="Drill the first N steps, or 'all'. [default: as many as 3 seconds hold]")
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
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the card to this file too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def drill(
    only: tuple[str, ...],
    quick: bool,
    listing: bool,
    steps: str | None,
    jobs: int | None,
    timeout: str,
    run: str | None,
    no_snapshot: bool,
    keep: bool,
    on: str,
    partition: str | None,
    sbatch: tuple[str, ...],
    image: str | None,
    mount: tuple[str, ...],
    html: Path | None,
    as_json: bool,
    command: tuple[str, ...],
) -> None:
    """Interrupt COMMAND in every awkward way and compare each run with an undisturbed one.

    Exit 0 only if every promise held: it went on by itself, lost no step on a notice and at most a save interval on a
    kill, and ended with the same bits. If the bits differ it says why.

    \b
    Examples:
      jobkit drill -- python train.py
      jobkit drill --quick --steps 200 -- python train.py --lr 1e-3
      jobkit drill --only kill-commit --keep --html drill.html -- python -m mypackage.train
      jobkit drill --image jobkit -- python train.py
      jobkit drill --on slurm -p low --steps 200 --run /shared/drill -- python train.py
    """
    from jobkit.units import duration_s
    from launch import drill as drill_
    from launch import drill_card, report
    from launch.cli_where import container_of

    wanted = drill_.chosen(only, quick, on)
    if listing:
        print(report.to_json(drill_card.listed(wanted)) if as_json else drill_card.listing(wanted))
        return
    if not command:
        raise ConfigError("no command to drill; write it after '--': jobkit drill -- python train.py")
    if html is not None and not html.absolute().parent.is_dir():
        raise ConfigError(f"--html {html}: there is no directory {html.absolute().parent}")
    if on == "local" and (partition or sbatch):
        raise ConfigError("--partition and --sbatch are for --on slurm")
    if on == "slurm" and steps is None:
        raise ConfigError("on a cluster say how much to drill, since a job cannot be watched from here: --steps 200")
    options = drill_.Options(
        command=command,
        place=Path(run).absolute() if run else _fresh_place(),
        steps=_steps(steps),
        jobs=jobs or drill_.default_jobs(),
        timeout_s=duration_s(timeout),
        snapshot=not no_snapshot,
        keep=keep,
        on=on,
        sbatch=_sbatch(partition, sbatch),
        container=container_of(on, image, {"mount": mount, "container_runtime": None}, {}),
    )
    with drill_card.telling(as_json, wanted) as telling:
        result = drill_.drill(options, wanted, telling)
    if html is not None:
        html.write_text(drill_card.page(result), encoding="utf-8")
    if as_json:
        print(report.to_json(drill_card.document(result)))
    else:
        drill_card.show(result, kept=options.place.exists(), html=html)
    sys.exit(0 if result.passed else 1)


def _sbatch(partition: str | None, given: tuple[str, ...]) -> dict[str, str]:
    pairs = (text.lstrip("-").partition("=") for text in given)
    return {name: value for name, _, value in pairs} | ({"partition": partition} if partition else {})


def _steps(text: str | None) -> int | None:
    if text is None:
        return None
    if text == "all":
        return 0
    if not text.isdecimal() or int(text) < 6:
        raise ConfigError(f"--steps {text!r}: give a number of steps, 6 or more, or 'all'")
    return int(text)


def _fresh_place() -> Path:
    stem = Path("runs") / f"drill-{time.strftime('%Y%m%d-%H%M%S')}"
    place, count = stem, 2
    while place.exists():
        place, count = stem.with_name(f"{stem.name}-{count}"), count + 1
    return place.absolute()

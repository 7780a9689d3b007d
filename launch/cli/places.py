# ruff: noqa: D301  (click wants the character \\b itself)
"""`jobkit doctor`: what the places are like where runs may go."""

import sys
from pathlib import Path
from typing import Any

import click

from jobkit.errors import ConfigError
from launch.cli.options import Grouped, placement, placement_options
from launch.printing import aligned


@click.command(cls=Grouped, short_help="Say what a cluster or a cloud will do to a run.")
@click.option("--on", help="What to examine: slurm, gcp, aws. [default: slurm]")
@click.option("--run", metavar="URL", help="Where runs are to lie: the bucket of gcp and aws; needed by --probe.")
@click.option("--profile", metavar="NAME", help="Options from [profile.NAME] in jobkit.toml or ~/.config/jobkit/.")
@click.option("--grace", metavar="DURATION", help="How long a save may take. [default: 30s]")
@click.option("--probe", is_flag=True, help="SLURM: a one-minute job writes to the URL and must answer a signal.")
@placement_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(profile: str | None, probe: bool, as_json: bool, **given: Any) -> None:
    """Say what a cluster or a cloud will do to a run; exit 1 if a promise cannot be kept there.

    It takes the options of `jobkit submit`, and changes nothing. On gcp and aws it looks at credentials, APIs, the
    roles of yours and of the job's account, the bucket and where it is, the image, machines and quota; it says by which
    command each thing is mended, and what it could not check.

    \b
    Examples:
      jobkit doctor --on slurm -p low
      jobkit doctor --on slurm -p low --run /shared/runs/probe --probe
      jobkit doctor --on gcp --region us-central1 --gpus L4:1 --image IMAGE --run gs://bucket/r1
      jobkit doctor --on aws --queue spot --image IMAGE --run s3://bucket/r1
    """
    from jobkit.units import duration_s
    from launch.backends import registry
    from launch.backends.slurm import doctor as of_slurm
    from launch.lifecycle import run_status
    from launch.spec.cloud_options import Cloud
    from launch.spec.jobspec import JobSpec
    from launch.spec.profiles import read_profile

    options = read_profile(profile, cwd=Path.cwd(), home=Path.home()) if profile else {}
    place = placement({"on": "slurm"} | options, given)
    backend = registry.named(place.backend)
    run = str(given["run"] or options.get("run", ""))
    if probe and "sbatch" not in backend.reads:
        raise ConfigError(f"--probe is for --on {' or '.join(registry.reading('sbatch'))}")
    if probe and not run:
        raise ConfigError("--probe writes to the place where runs will lie: give --run URL")
    spec = JobSpec(
        command=("doctor",),
        run=run,
        grace_s=duration_s(given["grace"] or options.get("grace", 30.0)),
        sbatch=place.sbatch,
        cloud=None if place.cloud is None else Cloud(**place.cloud),
    )
    findings = backend.examine(spec)
    if probe:
        more = {name: value for name, value in place.sbatch.items() if name not in ("partition", "time")}
        findings += of_slurm.probe(run, place.sbatch.get("partition"), more)
    if as_json:
        print(run_status.to_json(findings))
    else:
        marks = {"fail": "FAIL"}
        lines: list[tuple[str, ...]] = [(marks.get(one.verdict, one.verdict), one.topic, one.text) for one in findings]
        for line, one in zip(aligned(lines).splitlines(), findings, strict=True):
            print(line + (f"\n    {one.mend}" if one.mend else ""))
    sys.exit(1 if any(one.verdict == "fail" for one in findings) else 0)

# ruff: noqa: D301  (click wants the character \\b itself)
"""`jobkit doctor` and `jobkit emulate`: what places are like where runs may go, and a place to try things."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
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
    if probe and "sbatch" not in backend.options:
        raise ConfigError(f"--probe is for --on {' or '.join(registry.knowing('sbatch'))}")
    if probe and not run:
        raise ConfigError("--probe writes to the place where runs will lie: give --run URL")
    spec = JobSpec(
        command=("doctor",),
        run=run,
        grace_s=duration_s(given["grace"] or options.get("grace", 30.0)),
        sbatch=place.sbatch,
        cloud=None if place.cloud is None else Cloud(**place.cloud),
        parallel=options.get("array-parallelism"),
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


@click.command(
    context_settings={"allow_interspersed_args": False}, short_help="Start a bucket on this machine, to try it offline."
)
@click.option("--bucket", "buckets", multiple=True, metavar="NAME", help="Name of a bucket. [default: bucket]")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Where it listens. [default: a free one]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, on one line.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def emulate(buckets: tuple[str, ...], port: int, as_json: bool, command: tuple[str, ...]) -> None:
    """Start a bucket on this machine, to try gs:// URLs without an account and without a network.

    It is there until Ctrl-C, or with COMMAND until that ends, which finds the bucket by its environment; then what it
    holds is gone. It listens on 127.0.0.1 alone, where every user of this machine reaches it.

    \b
    Examples:
      jobkit emulate
      jobkit emulate -- jobkit submit --wait --run gs://bucket/r1 -- python train.py
      jobkit emulate -- bash
    """
    from launch.emulate.objects import RefusedError
    from launch.emulate.server import Server

    try:
        server = Server(port=port, buckets=())
        for name in dict.fromkeys(buckets or ("bucket",)):
            server.storage.make(name)
    except OSError as error:
        raise ConfigError(f"--port {port}: {error.strerror or error}; leave it out for a free one") from None
    except RefusedError as error:
        raise ConfigError(f"{error}: 3 to 63 lower-case letters, digits, '-', '_' and '.'") from None
    if as_json:
        told = {"url": server.url, "buckets": sorted(server.storage.buckets), "environment": server.environment()}
        print(json.dumps(told), flush=True)
    if command:
        sys.exit(_with(server.environment(), command))
    if not as_json:
        urls = ", ".join(f"gs://{name}" for name in sorted(server.storage.buckets))
        exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in server.environment().items())
        print(f"# {urls} until Ctrl-C; in another terminal:\n{exports}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.close()


def _with(environment: dict[str, str], command: tuple[str, ...]) -> int:
    """Run a command that Ctrl-C reaches by itself; return its exit code, as a shell has it."""
    try:
        process = subprocess.Popen(command, env=os.environ | environment)
    except OSError as error:
        raise ConfigError(f"cannot start {command[0]}: {error.strerror}") from None
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code

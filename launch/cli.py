# ruff: noqa: D301  (click wants the character \\b itself)
"""The command line: `jobkit`. A user's mistake is one sentence on stderr and exit code 2."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import jobkit
from jobkit.contract import Exit, State
from jobkit.errors import ConfigError, JobkitError

if TYPE_CHECKING:
    from launch.checkpoints import Row
    from launch.report import Status
    from launch.spec import JobSpec
    from launch.submission import Plan

_PLANNED = ("gcp", "aws")
_EPILOG = "A run survives preemption, kills and restarts; it ends when it is done, fails for good, or is cancelled."


class _Plain(click.Group):
    """Commands in the order of a run's life, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_Plain, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(jobkit.__version__, prog_name="jobkit")
def cli() -> None:
    """Run trainings in JAX and Flax that survive preemption.

    \b
    Examples:
      jobkit demo
      jobkit submit --wait -- python train.py --epochs 10
      jobkit ls
    """


@cli.command(context_settings={"allow_interspersed_args": False})
@click.option("--on", help="Backend: local, slurm. [default: local]")
@click.option("--run", metavar="URL", help="Run directory. [default: runs/<name>-<time>]")
@click.option("--name", help="Name of the run. [default: that of the run directory]")
@click.option("--profile", metavar="NAME", help="Options from [profile.NAME] in jobkit.toml or ~/.config/jobkit/.")
@click.option("--no-snapshot", is_flag=True, help="Run in this directory itself, not in a copy of the code as it is.")
@click.option("--grace", metavar="DURATION", help="From asking an attempt to stop to killing it. [default: 30s]")
@click.option("--max-failures", type=int, metavar="N", help="The program's own failures to survive. [default: 10]")
@click.option("-p", "--partition", help="SLURM: partition.")
@click.option("--account", help="SLURM: account.")
@click.option("--qos", help="SLURM: quality of service.")
@click.option("-N", "--nodes", type=int, help="SLURM: number of nodes. [default: 1]")
@click.option("--ntasks-per-node", type=int, help="Processes per node. [default: 1]")
@click.option("--gpus-per-node", help="SLURM: GPUs per node, such as 8 or a100:8.")
@click.option("--cpus-per-task", type=int, help="SLURM: CPU cores per process.")
@click.option("--mem", help="SLURM: memory per node, such as 64G.")
@click.option("--time", help="SLURM: time limit of one job; a run goes on in the next. [default: the partition's]")
@click.option("--constraint", help="SLURM: features that nodes must have.")
@click.option("--sbatch", multiple=True, metavar="NAME[=VALUE]", help="SLURM: any other option of sbatch.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, do nothing.")
@click.option("--wait", is_flag=True, help="Follow the run; exit 0 done, 1 failed, 3 cancelled. Ctrl-C only detaches.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def submit(profile: str | None, dry_run: bool, wait: bool, as_json: bool, **given: Any) -> None:
    """Start a run of COMMAND, detached, through every interruption.

    COMMAND runs in a copy of the code as it is now, inside the run directory: what it writes to a relative path stays
    in the copy. Data and run directories below here are linked into it.

    \b
    Examples:
      jobkit submit -- python train.py
      jobkit submit --run runs/mnist --wait -- python train.py --lr 1e-3
      jobkit submit --profile long --dry-run -- python -m mypackage.train
      jobkit submit --on slurm -p low --gpus-per-node 8 --time 12:00:00 --run /shared/r1 -- python train.py
    """
    from launch import backends, submission

    spec, name = _spec(profile, given)
    backend = backends.named(name)
    if dry_run:
        _show_plan(submission.prepare(spec), name, as_json)
        return
    store = backend.submit(spec)
    if not as_json:
        print(f"submitted {store.url}", flush=True)
    if wait:
        sys.exit(_follow(store.url, as_json))
    if as_json:
        _print_status(store.url)
    else:
        print(f"  follow:  jobkit logs -f {store.url}\n  cancel:  jobkit cancel {store.url}")


def _spec(profile: str | None, given: dict[str, Any]) -> "tuple[JobSpec, str]":
    """Merge a profile's options and the command line's, which win; return what to run, and the backend."""
    from jobkit.units import duration_s
    from launch.spec import SBATCH, JobSpec, read_profile

    options = read_profile(profile, cwd=Path.cwd(), home=Path.home()) if profile else {}
    flags = {"on": given["on"], "run": given["run"], "name": given["name"], "grace": given["grace"]}
    flags["max-failures"] = given["max_failures"]
    flags["snapshot"] = False if given["no_snapshot"] else None
    options |= {name: value for name, value in flags.items() if value is not None}
    sbatch = {str(key): str(value) for key, value in options.get("sbatch", {}).items()}
    for text in given["sbatch"]:
        key, _, value = text.lstrip("-").partition("=")
        sbatch[key] = value
    for key in SBATCH:
        value = given[key.replace("-", "_")]
        value = options.get(key) if value is None else value
        if value is not None:
            sbatch[key] = str(value)
    backend = options.get("on", "local")
    if backend in _PLANNED:
        raise ConfigError(f"--on {backend} is not available in jobkit {jobkit.__version__}; available: local, slurm")
    foreign = [name for name in sbatch if name != "ntasks-per-node"]
    if foreign and backend != "slurm":
        raise ConfigError(f"--{foreign[0]} is for --on slurm; this is --on {backend}")
    spec = JobSpec(
        command=tuple(given["command"]),
        run=options.get("run", ""),
        name=options.get("name", ""),
        snapshot=options.get("snapshot", True),
        grace_s=duration_s(options.get("grace", 30.0)),
        max_failures=options.get("max-failures", 10),
        sbatch=sbatch,
    )
    return spec, backend


def _show_plan(plan: "Plan", backend: str, as_json: bool) -> None:
    import shlex

    import msgspec

    from launch import report, slurm, snapshot

    if backend == slurm.BACKEND:
        slurm.check(plan.spec.sbatch, grace_s=plan.spec.grace_s)
    code = snapshot.digest(plan.tree) if plan.tree is not None else None
    spec = msgspec.structs.replace(plan.spec, code=code)
    if as_json:
        print(report.to_json(spec))
        return
    files = f"{len(plan.tree.files)} files below {plan.tree.root}, digest {code}" if plan.tree else "none"
    print(f"would run    {shlex.join(spec.command)}\nin           {spec.cwd}")
    print(f"run          {spec.run}\nsnapshot     {files}")
    if plan.tree and plan.tree.links:
        print(f"linked       {', '.join(plan.tree.links)}")
    if backend == slurm.BACKEND:
        print(f"\n{slurm.script(plan.spec, plan.store)}", end="")


def _follow(url: str, as_json: bool) -> int:
    from launch import submission, watch

    try:
        code = watch.follow(submission.open_run(url), quiet=as_json)
    except KeyboardInterrupt:
        print(f"\ndetached; the run goes on. To stop it: jobkit cancel {url}", file=sys.stderr)
        return 130
    if as_json:
        _print_status(url)
    return code


def _print_status(url: str) -> None:
    import launch
    from launch import report

    print(report.to_json(launch.status(url)))


@cli.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def status(run: str, as_json: bool) -> None:
    """Say what RUN is doing.

    \b
    Examples:
      jobkit status runs/mnist
      jobkit status runs/mnist --json | python -m json.tool
    """
    if as_json:
        _print_status(run)
        return
    import launch
    from launch.watch import rows

    for name, value in rows(launch.status(run)):
        print(f"{name:<15} {value}")


@cli.command()
@click.argument("run")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on, across attempts, until the run is over.")
@click.option("--attempt", type=int, metavar="N", help="Only the log of attempt N.")
def logs(run: str, following: bool, attempt: int | None) -> None:
    """Print what RUN printed, attempt by attempt.

    \b
    Examples:
      jobkit logs -f runs/mnist
      jobkit logs --attempt 2 runs/mnist
    """
    from jobkit import contract
    from launch import spec, submission, watch

    store = submission.open_run(run)
    spec.read(store)
    numbers = store.numbers(contract.ATTEMPTS)
    if attempt is not None and attempt not in numbers and not following:
        have = f"it has {', '.join(map(str, numbers))}" if numbers else "it has none yet"
        raise ConfigError(f"run {store.url} has no attempt {attempt}; {have}")
    try:
        watch.copy_logs(store, sys.stdout, attempt=attempt, following=following)
    except KeyboardInterrupt:
        sys.exit(130)


@cli.command()
@click.argument("run")
@click.option("--no-wait", is_flag=True, help="Do not wait until it has saved and stopped.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def cancel(run: str, no_wait: bool, as_json: bool) -> None:
    """End RUN for good: it saves, stops, and never comes back by itself.

    \b
    Examples:
      jobkit cancel runs/mnist
    """
    from launch import backends

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    state = backends.cancel(run, wait=not no_wait, progress=progress)
    if as_json:
        _print_status(run)
    elif state is State.DONE:
        print(f"{run} was done before the cancel reached it")
    else:
        print(f"{run} is cancelled" if state.over else f"{run} is stopping")


@cli.command()
@click.argument("run")
@click.option("--wait", is_flag=True, help="Follow the run; exit 0 done, 1 failed, 3 cancelled. Ctrl-C only detaches.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def resume(run: str, wait: bool, as_json: bool) -> None:
    """Continue RUN from its newest committed step; takes back a cancel.

    \b
    Examples:
      jobkit resume runs/mnist
      jobkit resume --wait runs/mnist
    """
    from launch import backends

    state = backends.resume(run)
    if state is State.DONE:
        print(f"{run} is already done; nothing to resume", file=sys.stderr if as_json else sys.stdout)
    elif not as_json:
        print(f"resumed {run}", flush=True)
    if wait and state is not State.DONE:
        sys.exit(_follow(run, as_json))
    if as_json:
        _print_status(run)


@cli.command()
@click.argument("directory", default="runs")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def ls(directory: str, as_json: bool) -> None:
    """List the runs below DIRECTORY (runs/ by default).

    \b
    Examples:
      jobkit ls
      jobkit ls /scratch/me --json
    """
    from launch import backends, report, submission

    path = submission.open_run(directory).path
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory; name one that holds runs: jobkit ls DIRECTORY")
    stores = [submission.open_run(run) for run in report.find_runs(path)]
    listed = backends.listed(stores, lambda text: print(f"jobkit: {text}", file=sys.stderr))
    if as_json:
        print(report.to_json(listed))
        return
    print(_table(path, listed) if listed else f"no runs below {path}")


def _table(path: Path, listed: "list[Status]") -> str:
    def number(value: int | None) -> str:
        return "-" if value is None else str(value)

    head = ("RUN", "STATE", "ATTEMPTS", "STEP", "COMMITTED", "REASON")
    lines: list[tuple[str, ...]] = [head]
    for status in listed:
        run = Path(status.run)
        shown = str(run.relative_to(path)) if run != path else run.name
        counts = (str(status.attempts), number(status.step), number(status.committed_step))
        lines.append((shown, str(status.state), *counts, status.reason))
    return _aligned(lines)


def _aligned(lines: list[tuple[str, ...]]) -> str:
    """Lay rows of words out in columns; the last one runs free."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(word.ljust(width) for word, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )


@cli.command()
@click.argument("run")
@click.argument("action", default="list", type=click.Choice(["list", "verify", "export", "rm"]))
@click.argument("step", required=False)
@click.option("--all", "every", is_flag=True, help="verify: every step, not only the newest.")
@click.option("--params", metavar="OUT", help="export: write the parameters alone to the directory OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def checkpoints(run: str, action: str, step: str | None, every: bool, params: str | None, as_json: bool) -> None:
    """List the committed steps of RUN; verify, export or remove them.

    \b
    Examples:
      jobkit checkpoints runs/mnist
      jobkit checkpoints runs/mnist verify --all
      jobkit checkpoints runs/mnist export best --params exported
      jobkit checkpoints runs/mnist rm 400
    """
    from jobkit import contract
    from launch import checkpoints, report, submission

    store = submission.open_run(run)
    if store.remote is None and not store.exists(contract.CHECKPOINTS):
        raise ConfigError(f"{store.url} holds no checkpoints: it is no run, or it has not started")
    if action == "list":
        rows = checkpoints.listed(store)
        print(report.to_json(rows) if as_json else _checkpoint_table(rows))
    elif action == "verify":
        steps = checkpoints.chosen(store, step, every=every)
        found = checkpoints.verify(store, steps, lambda step, wrong: None if as_json else _print_verdict(step, wrong))
        if as_json:
            print(report.to_json({str(step): wrong for step, wrong in found.items()}))
        sys.exit(1 if any(found.values()) else 0)
    elif action == "export":
        if not params:
            raise ConfigError("export what where? give --params OUT, a directory that does not exist")
        sys.exit(checkpoints.export(store, params, step))
    else:
        if step is None:
            raise ConfigError("rm which step? jobkit checkpoints RUN lists them")
        number = checkpoints.chosen(store, step, every=False)[0]
        checkpoints.remove(store, number)
        print(f"removed step {number}")


def _print_verdict(step: int, wrong: list[str]) -> None:
    print(f"step {step}: {'; '.join(wrong) if wrong else 'whole'}", flush=True)


def _checkpoint_table(rows: "list[Row]") -> str:
    from jobkit.units import show_duration, show_size

    if not rows:
        return "no committed checkpoint"
    lines: list[tuple[str, ...]] = [("STEP", "AGE", "SIZE", "ATTEMPT", "SAVED", "VERIFIED", "UPLOADED", "METRICS")]
    for row in rows:
        if row.problem:
            lines.append((str(row.step), "-", "-", "-", "-", "damaged", "-", row.problem))
            continue
        lines.append(
            (
                str(row.step),
                show_duration(row.age_s or 0.0),
                show_size(row.bytes or 0),
                str(row.attempt),
                row.reason,
                "yes" if row.verified_at else "not yet",
                {None: "-", True: "yes", False: "waiting"}[row.uploaded],
                "  ".join(f"{name} {value:.6g}" for name, value in row.metrics.items()),
            )
        )
    return _aligned(lines)


@cli.command()
@click.option("--on", default="slurm", help="Backend: slurm. [default: slurm]")
@click.option("-p", "--partition", help="Where runs are to be submitted. [default: the cluster's default]")
@click.option("--run", metavar="URL", help="Where runs are to lie; needed by --probe.")
@click.option("--grace", metavar="DURATION", default="30s", help="How long a save may take. [default: 30s]")
@click.option("--probe", is_flag=True, help="Submit a one-minute job that writes to the URL and must answer a signal.")
@click.option("--sbatch", multiple=True, metavar="NAME[=VALUE]", help="--probe: an option of sbatch.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(
    on: str, partition: str | None, run: str | None, grace: str, probe: bool, sbatch: tuple[str, ...], as_json: bool
) -> None:
    """Say what a cluster will do to a run; exit 1 if a promise cannot be kept there.

    \b
    Examples:
      jobkit doctor --on slurm -p low
      jobkit doctor --on slurm -p low --run /shared/runs/probe --probe
    """
    from jobkit.units import duration_s
    from launch import doctor as doctor_
    from launch import report

    if on != "slurm":
        raise ConfigError(f"--on {on!r}: doctor examines slurm")
    if probe and not run:
        raise ConfigError("--probe writes to the place where runs will lie: give --run URL")
    found = doctor_.examine(partition, grace_s=duration_s(grace))
    if probe and run:
        pairs = (text.lstrip("-").partition("=") for text in sbatch)
        found += doctor_.probe(run, partition, {name: value for name, _, value in pairs})
    if as_json:
        print(report.to_json(found))
    else:
        marks = {"ok": "ok", "warning": "warning", "fail": "FAIL"}
        print(_aligned([(marks[one.verdict], one.topic, one.text) for one in found]))
    sys.exit(1 if any(one.verdict == "fail" for one in found) else 0)


@cli.command()
@click.option("--run", metavar="URL", help="Where it goes. [default: a new directory below runs/]")
@click.option("--seed", type=int, help="Of the moments at which it is interrupted; drawn and printed by default.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def demo(run: str | None, seed: int | None, as_json: bool) -> None:
    """Train a small model undisturbed and interrupted, and compare every bit.

    \b
    Examples:
      jobkit demo
      jobkit demo --seed 7
    """
    from launch.demo import main as run_demo

    sys.exit(run_demo(run=run, seed=seed, json=as_json))


def main() -> None:
    """Run the command line and exit."""
    try:
        result = cli.main(prog_name="jobkit", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.ClickException as error:
        hint = f"; see '{error.ctx.command_path} --help'" if isinstance(error, click.UsageError) and error.ctx else ""
        _fail(error.format_message().rstrip(".") + hint)
    except JobkitError as error:
        _fail(str(error))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:  # `jobkit logs | head`
        sys.stderr.close()
        sys.exit(1)


def _fail(message: str) -> None:
    print(f"jobkit: {message}", file=sys.stderr)
    sys.exit(Exit.USAGE)

# ruff: noqa: D301  (click wants the character \\b itself)
"""The command line: `jobkit`. A user's mistake is one sentence on stderr and exit code 2."""

import sys

import click

import jobkit
from jobkit.contract import Exit, State
from jobkit.errors import ConfigError, JobkitError, say
from launch.cli import checkpoints, control, drill, ls, places, report, resume, submit
from launch.cli.names import RUN
from launch.cli.output import follow, print_metrics, print_status
from launch.printing import aligned, guard

_EPILOG = (
    "A run survives preemption, kills and restarts; it ends when it is done, fails for good, or is cancelled. In the "
    'program, Run() saves every 10 minutes (save_every="10m") and keeps the newest 3 checkpoints (keep=3).'
)


class _Plain(click.Group):
    """Commands in the order of a run's life, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_Plain,
    epilog=_EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(jobkit.__version__, prog_name="jobkit")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run trainings in JAX and Flax that survive preemption.

    \b
    Examples:
      jobkit demo
      jobkit submit --wait -- python train.py --epochs 10
      jobkit ls

    RUN is a path, a URL, or the name that `jobkit ls` prints.
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


cli.add_command(submit.submit)


@cli.command()
@click.argument("run", type=RUN)
@click.option("--prometheus", is_flag=True, help="Print steps and attempts in Prometheus' text format.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def status(run: str, prometheus: bool, as_json: bool) -> None:
    """Say what RUN is doing.

    \b
    Examples:
      jobkit status runs/mnist
      jobkit status runs/mnist --json | python -m json.tool
      jobkit status runs/sweep/points/3
      jobkit status runs/mnist --prometheus | sponge /var/lib/node_exporter/mnist.prom
    """
    if prometheus and as_json:
        raise ConfigError("--prometheus and --json: give one of them")
    if prometheus:
        print_metrics(run)
        return
    if as_json:
        print_status(run)
        return
    import launch
    from launch.report.follow import point_table, rows

    summary = launch.status(run)
    for name, value in rows(summary):
        print(f"{name:<15} " + value.replace("\n", "\n" + 16 * " "))
    if summary.points:
        print(f"\n{aligned(point_table(summary))}")


@cli.command()
@click.argument("run", type=RUN)
@click.option("-f", "--follow", "following", is_flag=True, help="Go on, across attempts, until the run is over.")
@click.option("--attempt", type=int, metavar="N", help="Only the log of attempt N.")
@click.option("--tail", type=click.IntRange(0), metavar="N", help="Only the last N lines; of each point of a sweep.")
def logs(run: str, following: bool, attempt: int | None, tail: int | None) -> None:
    """Print what RUN printed, attempt by attempt.

    \b
    Examples:
      jobkit logs -f runs/mnist
      jobkit logs --tail 20 -f runs/mnist
      jobkit logs --attempt 2 runs/mnist
    """
    from jobkit import contract
    from launch.lifecycle import submission
    from launch.report import follow
    from launch.spec import jobspec

    store = submission.open_run(run)
    jobspec.read(store)
    numbers = store.numbers(contract.ATTEMPTS)
    if attempt is not None and attempt not in numbers and not following and not jobspec.read(store).sweep:
        have = f"it has {', '.join(map(str, numbers))}" if numbers else "it has none yet"
        raise ConfigError(f"run {store.url} has no attempt {attempt}; {have}")
    try:
        follow.copy_logs(store, sys.stdout, attempt=attempt, tail=tail, following=following)
        if not store.numbers(contract.ATTEMPTS):  # it never came up: the service may know why
            follow.print_service_log(store, sys.stdout)
    except KeyboardInterrupt:
        sys.exit(130)


@cli.command(short_help="Wait until RUN is over; exit 0 done, 1 failed, 3 cancelled.")
@click.argument("run", type=RUN)
@click.option("--json", "as_json", is_flag=True, help="Print nothing but one JSON document, at the end.")
def wait(run: str, as_json: bool) -> None:
    """Follow RUN until it is over, as `jobkit submit --wait` does; exit 0 done, 1 failed, 3 cancelled.

    Ctrl-C ends the waiting alone, and exits 130.

    \b
    Examples:
      jobkit wait runs/mnist && jobkit report runs/mnist
    """
    sys.exit(follow(run, as_json))


cli.add_command(control.save)
cli.add_command(control.stop)
cli.add_command(control.attach)


@cli.command(short_help="End RUN for good: it saves, and never comes back by itself.")
@click.argument("run", type=RUN)
@click.option("--no-wait", is_flag=True, help="Do not wait until it has saved and stopped.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def cancel(run: str, no_wait: bool, as_json: bool) -> None:
    """End RUN for good: it saves, stops, and never comes back by itself.

    \b
    Examples:
      jobkit cancel runs/mnist
    """
    from launch.backends import registry

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    state = registry.cancel(run, wait=not no_wait, progress=progress)
    if as_json:
        print_status(run)
    elif state is State.DONE:
        print(f"{run} was done before the cancel reached it")
    else:
        print(f"{run} is cancelled" if state.over else f"{run} is stopping")


cli.add_command(resume.resume)


cli.add_command(ls.ls)


cli.add_command(checkpoints.checkpoints)
cli.add_command(control.rm)


cli.add_command(places.doctor)
cli.add_command(places.emulate)


cli.add_command(report.report)
cli.add_command(report.explain)


@cli.command(short_help="Train a small model undisturbed and interrupted; compare.")
@click.option("--run", metavar="URL", help="Where it goes. [default: a new directory below runs/]")
@click.option("--seed", type=int, help="Of the moments at which it is interrupted; drawn and printed by default.")
@click.option("--steps", type=int, default=500, show_default=True, help="How long each of the two trainings is.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def demo(run: str | None, seed: int | None, steps: int, as_json: bool) -> None:
    """Train a small model undisturbed and interrupted, and compare every bit.

    \b
    Examples:
      jobkit demo
      jobkit demo --seed 7 --steps 100
    """
    from launch.drill.demo import main as run_demo

    sys.exit(run_demo(run=run, seed=seed, steps=steps, as_json=as_json))


cli.add_command(drill.drill)


@cli.command(short_help="Print what has a shell complete commands and runs.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what has SHELL complete commands, options, backends and the names of runs.

    \b
    In its own file it is read at every start:
      bash, ~/.bashrc:                   eval "$(jobkit completion bash)"
      zsh, ~/.zshrc:                     eval "$(jobkit completion zsh)"
      fish, ~/.config/fish/config.fish:  jobkit completion fish | source

    \b
    Examples:
      jobkit completion bash
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(cli, {}, "jobkit", "_JOBKIT_COMPLETE").source()
    print(script.replace('string split ","', 'string split --max 1 ","'))  # for fish a help ended at its first comma


def main() -> None:
    """Run the command line and exit."""
    guard()
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
    say(message)
    sys.exit(Exit.USAGE)

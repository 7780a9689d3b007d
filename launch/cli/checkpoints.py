# ruff: noqa: D301  (click wants the character \\b itself)
"""`jobkit checkpoints`: the committed steps of a run, or of the points of a sweep."""

import sys
from typing import TYPE_CHECKING, Any

import click

from jobkit.errors import ConfigError
from launch.cli.names import RUN
from launch.printing import aligned

if TYPE_CHECKING:
    from jobkit.rundir.store import Store
    from launch.checkpoints import Row


@click.command(short_help="List, verify, export or remove committed steps.")
@click.argument("run", type=RUN)
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
    from launch import checkpoints
    from launch.lifecycle import run_status, submission
    from launch.spec import jobspec as specs

    store = submission.open_run(run)
    if specs.exists(store) and specs.read(store).sweep:
        if action != "list":
            raise ConfigError(f"{store.url} is a sweep: name one of its points, such as {store.url}/points/0")
        _list_sweep(store, as_json)
        return
    if store.remote is None and not store.exists(contract.CHECKPOINTS):
        raise ConfigError(f"{store.url} holds no checkpoints: it is no run, or it has not started")
    if action == "list":
        rows = checkpoints.listed(store)
        print(run_status.to_json(rows) if as_json else _table(rows))
    elif action == "verify":
        steps = checkpoints.chosen(store, step, every=every)
        verdicts = checkpoints.verify(
            store, steps, lambda step, wrong: None if as_json else _print_verdict(step, wrong)
        )
        if as_json:
            print(run_status.to_json({str(step): wrong for step, wrong in verdicts.items()}))
        sys.exit(1 if any(verdicts.values()) else 0)
    elif action == "export":
        if not params:
            raise ConfigError(
                "export needs a place for the parameters: give --params OUT, a directory that does not exist"
            )
        sys.exit(checkpoints.export(store, params, step, as_json=as_json))
    else:
        if step is None:
            raise ConfigError("rm needs the step to remove; jobkit checkpoints RUN lists them")
        number = checkpoints.chosen(store, step, every=False)[0]
        checkpoints.remove(store, number)
        print(run_status.to_json({"run": store.url, "removed": [number]}) if as_json else f"removed step {number}")


def _list_sweep(store: "Store", as_json: bool) -> None:
    """List what each point of a sweep has committed."""
    from launch import checkpoints
    from launch.lifecycle import run_status
    from launch.spec import jobspec as specs

    points: list[dict[str, Any]] = []
    for number, point in enumerate(specs.points(store, specs.read(store))):
        values, rows = specs.read(point).values, checkpoints.listed(point)
        points.append({"point": number, "run": point.url, "values": values, "checkpoints": rows})
        if not as_json:
            named = "  ".join(f"{name}={value}" for name, value in values.items())
            print(f"point {number}: {named}\n{_table(rows)}\n", flush=True)
    if as_json:
        print(run_status.to_json(points))


def _print_verdict(step: int, wrong: list[str]) -> None:
    print(f"step {step}: {'; '.join(wrong) if wrong else 'whole'}", flush=True)


def _table(rows: "list[Row]") -> str:
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
                f"{row.step} best" if row.best else str(row.step),
                show_duration(row.age_s or 0.0),
                show_size(row.bytes or 0),
                str(row.attempt),
                row.reason,
                "yes" if row.verified_at else "not yet",
                {None: "-", True: "yes", False: "waiting"}[row.uploaded],
                "  ".join(f"{name} {value:.6g}" for name, value in row.metrics.items()),
            )
        )
    return aligned(lines)

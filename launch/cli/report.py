# ruff: noqa: D301  (click wants the character \\b itself)
"""`jobkit report` and `jobkit explain`: what a run's time was spent on, and why."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobkit import contract
from jobkit.errors import ConfigError, JobkitError, say
from launch.cli.names import RUN

if TYPE_CHECKING:
    from rich.console import RenderableType

    from jobkit.rundir.store import Store
    from launch.console import Console
    from launch.lifecycle.history import History


@click.command(short_help="Say what the time of RUNS was spent on.")
@click.argument("runs", type=RUN, nargs=-1, required=True)
@click.option("--html", metavar="PATH", type=click.Path(path_type=Path), help="Write one self-contained page.")
@click.option("--png", metavar="PATH", type=click.Path(path_type=Path), help="Write a picture (with matplotlib).")
@click.option("--live", is_flag=True, help="Refresh while the run is alive; Ctrl-C ends the view alone.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document: an object for one run, else a list.")
def report(runs: tuple[str, ...], html: Path | None, png: Path | None, live: bool, as_json: bool) -> None:
    """Say what the time of RUNS was spent on: goodput, badput by cause, interruptions and their cost.

    RUNS are runs, or directories that hold runs (a sweep). Goodput is the share of the time, from the submit to the
    end, that went into steps which the run still has. The rest went, by cause, into training that an interruption took
    back (lost), stalls, saves, emergency saves (from the last step to the commit), stopping, starting, restoring,
    compiling (to the end of the first step), a queue, and the time between two attempts; all shares sum to 1.

    \b
    Examples:
      jobkit report runs/mnist
      jobkit report runs/mnist --html report.html --png report.png
      jobkit report --live runs/mnist
      jobkit report runs/sweep --json
    """
    from launch.lifecycle import submission
    from launch.lifecycle.run_status import to_json
    from launch.report.goodput import measure
    from launch.spec import jobspec as specs

    if live and (as_json or html or png):
        raise ConfigError("--live is a view in the terminal: leave out --json, --html and --png")
    stores = _stores(runs)
    if live:
        _watch(stores)
        return
    judged = not as_json and any(specs.exists(store) and specs.read(store).sweep for store in stores)
    histories = read_histories(stores, curves=judged or html is not None or png is not None)
    beside = sys.stderr if as_json else sys.stdout
    if html is not None:
        from launch.report.html import write_html

        print(f"report: {write_html(html, histories)}", file=beside)
    if png is not None:
        from launch.report.png import write_png

        print(f"picture: {write_png(png, histories)}", file=beside)
    if as_json:
        figures = [measure(history).for_json() for history in histories]
        lone = len(runs) == len(stores) == len(figures) == 1 and histories[0].run == submission.open_run(runs[0]).url
        print(to_json(figures[0] if lone else figures))
    elif html is None and png is None:
        console, view = _terminal()
        console.print(view(histories))


@click.command(short_help="Tell what happened to RUN, and what would avoid it.")
@click.argument("run", type=RUN)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def explain(run: str, as_json: bool) -> None:
    """Tell what happened to RUN: when, why, what it cost, and what would avoid it the next time.

    \b
    Examples:
      jobkit explain runs/mnist
      jobkit explain runs/mnist --json
    """
    from launch.lifecycle.run_status import to_json
    from launch.report.explain import explain
    from launch.report.goodput import measure
    from launch.report.terminal import clock

    histories = read_histories(_stores([run]), curves=False)
    if len(histories) > 1:
        raise ConfigError(f"{run} holds {len(histories)} runs; explain one of them, such as {histories[0].run}")
    explanation = explain(measure(histories[0]), histories[0])
    if as_json:
        print(to_json(explanation))
        return
    for one in explanation.story:
        print(f"{clock(one.t)}  {one.text}")
    for number, advice in enumerate(explanation.advice):
        print(("" if number else "\nNext time:\n") + f"- {advice.text}")


def _terminal() -> "tuple[Console, Callable[[Sequence[History]], RenderableType]]":
    """Return a console, and what lays histories out for it."""
    from launch.console import Console
    from launch.report.goodput import measure
    from launch.report.sweep_page import sweep_of
    from launch.report.terminal import laid_out

    def view(histories: "Sequence[History]") -> "RenderableType":
        goodputs = [measure(one) for one in histories]
        sweep = sweep_of(histories, goodputs)
        return laid_out(goodputs, sweep["verdict"] if sweep is not None else "")

    return Console(highlight=False, markup=False), view


def _watch(stores: "Sequence[Store]") -> None:
    """Show the report anew every two seconds until every run is over."""
    import time

    from rich.live import Live

    from launch.lifecycle import submission

    console, view = _terminal()
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            histories = read_histories(stores, curves=False)
            live.update(view(histories), refresh=True)
            if all(history.now is None for history in histories):
                return
            try:
                time.sleep(2)
                for store in stores:
                    submission.refresh(store)
            except JobkitError:
                pass  # a bucket that does not answer just now
            except KeyboardInterrupt:
                return


def _stores(runs: Sequence[str]) -> "list[Store]":
    """Return the runs and sweeps that are meant, each once; of those below a directory the ones this jobkit reads."""
    from launch.spec import jobspec as specs

    stores = list({store.url: store for run in runs for store in _below(run)}.values())
    readable = []
    for store in stores:
        try:
            specs.check_format(store)
            readable.append(store)
        except ConfigError as error:
            if len(stores) == 1:
                raise
            say(str(error))
    if not readable:
        raise ConfigError(f"none of these {len(stores)} runs can be read here")
    return readable


def _below(run: str) -> "Iterator[Store]":
    from jobkit.rundir.store import is_remote
    from launch.backends import registry
    from launch.lifecycle import submission

    if is_remote(run):
        top, urls = registry.runs_below(run)
    else:
        store = submission.open_run(run)
        top = store.url  # one that was started by hand is a run without run.json
        urls = [] if store.exists(contract.ATTEMPTS) else [str(path) for path in registry.find_runs(store.path)]
    for url in [top] if top in urls else urls or [top]:  # the points of a sweep are no runs beside it
        store = submission.open_run(url)
        if not urls and not store.exists(contract.ATTEMPTS):
            raise ConfigError(f"{run} is not a run and holds none; jobkit ls DIRECTORY lists runs")
        yield store


def read_histories(stores: "Sequence[Store]", *, curves: bool) -> "list[History]":
    """Read the history of each run, and of each point of a sweep; whether they are alive their backends say.

    Each scheduler is asked once. Where one cannot be asked, as on a machine that it does not know, the ledgers tell.
    """
    from launch.backends import registry
    from launch.lifecycle import run_status, submission
    from launch.lifecycle.history import best_score, read_history

    try:
        statuses = registry.listed(stores, say)
    except JobkitError as error:
        say(str(error))
        statuses = []
    by_url = {status.run: status for status in statuses}
    histories = []
    for store in stores:
        if (status := by_url.get(store.url)) is None:
            last = run_status.last_life_event(store)
            state = str(last.get("state", "")) if last.get("event") == "ended" else ""
            histories.append(read_history(store, state=state, reason=str(last.get("reason", "")), curves=curves))
            continue
        for one in status.points or [status]:
            place = submission.open_run(one.run) if status.points else store
            over = one.state.over
            history = read_history(place, state=str(one.state), reason=one.reason, over=over, curves=curves)
            if status.points:
                history.name = " ".join(f"{name}={value}" for name, value in one.values.items()) or history.name
                history.values, history.best = dict(one.values), best_score(place) if curves else None
            histories.append(history)
    return histories

# ruff: noqa: D301  (click wants the character \\b itself)
"""`jobkit ls`: the runs below a directory, in a bucket, or of a batch service."""

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from jobkit.contract import State
from jobkit.errors import JobkitError, say
from launch.cli.names import RUNS
from launch.printing import aligned, dash

if TYPE_CHECKING:
    from launch.lifecycle.run_status import Status


@click.command(short_help="List the runs below DIRECTORY, which may be in a bucket.")
@click.argument("directory", default=RUNS, type=click.Path())
@click.option("--on", metavar="gcp", help="All runs that have jobs in --project and --region.")
@click.option("--project", default="", help="gcp: project. [default: the credentials' own]")
@click.option("--region", default="", help="gcp: region.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def ls(directory: str, on: str | None, project: str, region: str, as_json: bool) -> None:
    """List the runs below DIRECTORY (runs/ by default), which may be in a bucket.

    Every other command takes the names that it prints. AGE is since the submit. The runs of a drill that was kept are
    one line; `jobkit ls` of their directory lists them.

    \b
    Examples:
      jobkit ls
      jobkit ls /scratch/me --json
      jobkit ls gs://bucket/runs
      jobkit ls --on gcp --region us-central1
    """
    from launch.backends import registry
    from launch.lifecycle import run_status, submission

    if on is None:
        top, urls = registry.runs_below(directory)
    else:
        urls = registry.named(on).runs(project, region)
        top = f"{region} of project {project or 'that is signed in to'}"
    drills = {} if as_json else _kept_drills(top, urls)

    stores = []
    for url in urls:
        if os.path.dirname(url) in drills:
            continue
        try:
            stores.append(submission.open_run(url))
        except JobkitError as error:  # one run that cannot be read hides no other
            say(str(error))
    listed = registry.listed(stores, say)
    if as_json:
        print(run_status.to_json(listed))
        return
    if listed or not drills:
        print(_table([(_name(top, directory, one.run), one) for one in listed]) if listed else f"no runs below {top}")
    for place, count in drills.items():
        print(f"{_name(top, directory, place)}: {count} runs of a kept drill; jobkit ls {os.path.relpath(place)}")


def _kept_drills(top: str, urls: Sequence[str]) -> dict[str, int]:
    """Return the directories of drills that were kept, and how many runs each holds; but for `top` itself."""
    from launch.drill.reference import NAME

    parents = [os.path.dirname(url) for url in urls]
    drills = {os.path.dirname(url) for url in urls if os.path.basename(url) == NAME} - {top}
    return {place: parents.count(place) for place in dict.fromkeys(parents) if place in drills}


def _name(top: str, directory: str, url: str) -> str:
    """Write a run as any command takes it: below runs/ by the rest of its path."""
    if not url.startswith(f"{top}/"):
        return directory if url == top else url
    below = url.removeprefix(f"{top}/")
    return below if directory.rstrip("/") == RUNS else f"{directory.rstrip('/')}/{below}"


_HEAD = ("RUN", "STATE", "AGE", "BACKEND", "STEP", "COMMITTED")


def _table(listed: "Sequence[tuple[str, Status]]") -> str:
    """Lay runs out in rows: on a terminal in its width, what there is to say of a run below it; else beside it."""
    from launch.report.follow import step_of

    rows, notes = [], []
    for name, status in listed:
        counts = (step_of(status), dash(status.committed_step))
        rows.append((name, str(status.state), _age(status), status.backend, *counts))
        notes.append(_note(status))
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return aligned([(*_HEAD, "REASON"), *((*row, note) for row, note in zip(rows, notes, strict=True))])
    width = shutil.get_terminal_size().columns
    rest = aligned([row[1:] for row in (_HEAD, *rows)]).split("\n")
    names = [row[0] for row in (_HEAD, *rows)]
    room = width - max(map(len, rest)) - 2
    column = max((len(name) for name in names if len(name) <= room), default=0)
    lines = []
    for name, words, note in zip(names, rest, ["", *notes], strict=True):
        lines.append(f"{name.ljust(column)}  {words}" if len(name) <= column else f"{name}\n{' ' * column}  {words}")
        lines += textwrap.indent("\n".join(_folded(note, max(20, width - 2))), "  ").splitlines()
    return "\n".join(lines)


def _folded(text: str, width: int) -> list[str]:
    """Fold a text between its words, which may be paths."""
    return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


def _note(status: "Status") -> str:
    """Say what the other columns do not."""
    tries = f"{status.attempts} attempts" if status.attempts > 1 and not status.points else ""
    reason = "" if status.state is State.DONE and not status.points else status.reason
    return "; ".join(filter(None, [status.place.strip(), reason, tries, *(one.text for one in status.troubles)]))


def _age(status: "Status") -> str:
    from launch.lifecycle.run_status import age

    if (seconds := age(status.submitted)) is None:
        return "-"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"

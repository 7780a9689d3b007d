# ruff: noqa: D301  (click wants the character \\b itself)
"""`jobkit ls`: the runs below a directory, in a bucket, or of a batch service."""

from typing import TYPE_CHECKING

import click

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

    stores = []
    for url in urls:
        try:
            stores.append(submission.open_run(url))
        except JobkitError as error:  # one run that cannot be read hides no other
            say(str(error))
    listed = registry.listed(stores, say)
    if as_json:
        print(run_status.to_json(listed))
        return
    print(_table(top, listed) if listed else f"no runs below {top}")


def _table(top: str, listed: "list[Status]") -> str:
    lines: list[tuple[str, ...]] = [("RUN", "STATE", "ATTEMPTS", "STEP", "COMMITTED", "REASON")]
    for status in listed:
        name = status.run.rpartition("/")[2] if status.run == top else status.run.removeprefix(f"{top}/")
        counts = (str(status.attempts), dash(status.step), dash(status.committed_step))
        words = [status.place.strip(), status.reason, *(trouble.text for trouble in status.troubles)]
        lines.append((name, str(status.state), *counts, "; ".join(filter(None, words))))
    return aligned(lines)

"""What several commands print."""

import sys


def follow(url: str, as_json: bool) -> int:
    """Follow a run until it is over; return the exit code that tells how."""
    from launch.lifecycle import submission
    from launch.report import follow as watch

    try:
        code = watch.follow(submission.open_run(url), quiet=as_json)
    except KeyboardInterrupt:
        print(f"\ndetached; the run goes on. To stop it: jobkit cancel {url}", file=sys.stderr)
        return 130
    if as_json:
        print_status(url)
    return code


def print_status(url: str) -> None:
    """Print a run's status as one JSON document."""
    import launch
    from launch.lifecycle import run_status

    print(run_status.to_json(launch.status(url)))

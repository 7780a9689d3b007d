"""What several commands print."""

import sys


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Lay rows of words out in columns; the last one runs free."""
    lines = [tuple(word.replace("\n", " ") for word in line) for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(word.ljust(width) for word, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )


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

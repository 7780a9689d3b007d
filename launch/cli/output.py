"""What several commands print."""

import queue
import sys
import threading

_ANSWER_S = 3.0
"""How long a dry run waits for a bucket's answer."""


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


def unanswered(url: str) -> str:
    """Ask the bucket of a run for anything, and say why it does not answer; empty where it does, or there is none."""
    from jobkit import contract
    from jobkit.errors import JobkitError, StorageError
    from jobkit.rundir.remote import Remote
    from jobkit.rundir.store import is_remote

    answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            Remote(url, deadline_s=_ANSWER_S).read(contract.RUN_JSON)
            answers.put("")
        except StorageError as error:
            answers.put(str(error))
        except (FileNotFoundError, JobkitError):  # an answer, whatever it is: the check says it
            answers.put("")

    if not is_remote(url):
        return ""
    # A client may look for credentials and names for much longer, in a way that nobody can end.
    threading.Thread(target=ask, name="jobkit-unanswered", daemon=True).start()
    try:
        return answers.get(timeout=_ANSWER_S + 1)
    except queue.Empty:
        return f"no answer within {_ANSWER_S + 1:g} s"

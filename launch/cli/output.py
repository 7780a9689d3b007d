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


_METRICS = {
    "step": "Completed steps.",
    "committed_step": "Newest committed step, -1 if there is none.",
    "total_steps": "Steps at which the loop ends.",
    "last_step_age_seconds": "Seconds since the newest completed step.",
    "attempts": "Attempts so far.",
    "lost_steps": "Steps that interruptions took back, to be trained again.",
    "running": "Whether an attempt runs.",
    "over": "Whether nothing happens to the run any more by itself.",
}


def print_metrics(url: str) -> None:
    """Print a run's status, or that of each point of a sweep, in Prometheus' text format."""
    import launch
    from jobkit.contract import State
    from launch.cli.report import read_histories
    from launch.lifecycle import run_status, submission
    from launch.report.goodput import measure

    status = launch.status(url)
    lost = {
        one.run: measure(one).progress.lost_steps for one in read_histories([submission.open_run(url)], curves=False)
    }
    samples: dict[str, list[str]] = {name: [] for name in _METRICS}
    for one in status.points or [status]:
        values = {
            "step": one.step,
            "committed_step": -1 if one.committed_step is None else one.committed_step,
            "total_steps": one.total_steps,
            "last_step_age_seconds": run_status.age(one.stepped),
            "attempts": one.attempts,
            "lost_steps": lost.get(one.run),
            "running": int(one.state is State.RUNNING),
            "over": int(one.state.over),
        }
        labels = ",".join(f'{name}="{_escaped(text)}"' for name, text in {"run": one.run, "name": one.name}.items())
        for name, value in values.items():
            if value is not None:
                samples[name].append(f"jobkit_run_{name}{{{labels}}} {value}")
    for name, lines in samples.items():
        if lines:
            head = (f"# HELP jobkit_run_{name} {_METRICS[name]}", f"# TYPE jobkit_run_{name} gauge")
            print("\n".join((*head, *lines)))


def _escaped(text: str) -> str:
    """Write a text as the value of a label."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


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

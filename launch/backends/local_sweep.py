"""The points of a sweep on this machine, one after another or several at once; one detached process looks after them.

Each point is a run with a runner of its own. When this process is killed, the points that run go on, and `jobkit
resume` starts another that takes up the rest. `python -m launch.backends.local_sweep` is what `submit` starts.
"""

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable

from jobkit import contract
from jobkit.contract import State
from jobkit.errors import JobkitError, say
from jobkit.patience import Patience
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from launch.backends import local
from launch.lifecycle import lease, run_status, verbs
from launch.lifecycle.lock import Claim, acquire, held, holder
from launch.lifecycle.submission import begin_point, cancel_content, open_run, run_as_program
from launch.spec import jobspec as specs
from launch.spec.jobspec import JobSpec

_LOCAL = local.Local()
_POLL_S = 0.2
_MAX_RESUMES = 3
"""How often a point whose runner was killed is taken up again."""


def run(store: Store, spec: JobSpec, stops: Callable[[], bool]) -> None:
    """Run the points of a sweep that are not done, until all are over, or it is cancelled or stopped.

    Args:
        store: The sweep.
        spec: What was submitted.
        stops: Whether this process has to stop; the points that run are asked to, then. It is looked at between two
            starts alone: a point that is being started is one that runs when it is asked next.
    """
    running: list[Store] = []
    try:
        _run_points(store, spec, running, stops)
    except JobkitError:  # the storage is away, and there is no time to wait for it
        if not stops():
            raise
    for point in running if stops() else ():
        if pid := holder(point).get("pid") if held(point) else None:
            processes.send(int(pid), signal.SIGTERM)


def _run_points(store: Store, spec: JobSpec, running: list[Store], stops: Callable[[], bool]) -> None:
    """Start the points and see to them; `running` has those that are not over."""
    left = [point for point in specs.points(store, spec) if run_status.status(point).state is not State.DONE]
    resumes: Counter[str] = Counter()
    while (left or running) and not stops():
        while left and len(running) < (spec.parallel or 1) and not stops():
            point = left.pop(0)
            if _start(store, point):
                running.append(point)
        time.sleep(_POLL_S)
        for point in list(running):
            # That we would take it up again is no sign of life.
            status = run_status.status(point, assume_held=held(point) or lease.elsewhere(point) is not None)
            if status.runner == "gone" and status.state is State.FAILED and resumes[point.url] < _MAX_RESUMES:
                if stops():
                    break
                resumes[point.url] += 1
                _start(store, point)
            elif status.state.over:
                running.remove(point)
                if status.runner == "gone" and status.state is State.FAILED:
                    _give_up(point, spec)


def _start(store: Store, point: Store) -> bool:
    """Start a point's runner, unless it has one; tell whether there is something to wait for."""
    try:
        if not begin_point(store, point) or cancel_content(point) is not None:
            return False
        if run_status.events(point)[-1:] and run_status.events(point)[-1]["event"] != "submitted":
            verbs.resume(_LOCAL, open_run(point.url), clear_cancel=False)
        elif (lock := acquire(point)) is not None:
            _LOCAL.hand_over(point, Claim(lock))
        begin_point(store, point)  # who cancelled the sweep meanwhile has not seen that there is a runner to be asked
    except JobkitError as error:
        say(f"point {point.url}: {error}")
        return specs.exists(point)  # then it counts as one whose runner was killed, and is taken up again
    return True


def _give_up(point: Store, spec: JobSpec) -> None:
    """Write down the end of a point whose runner was killed too often; nobody else will take it up."""
    reason = f"its runner was killed {_MAX_RESUMES + 1} times; continue with: jobkit resume {point.url}"
    if (lock := acquire(point)) is not None:
        with contextlib.closing(lock):
            local.bury(point, spec, State.FAILED, reason)


def main(arguments: list[str]) -> int:
    """Run a sweep in a detached process.

    Args:
        arguments: The sweep, and what `local.detached` takes.

    Signals: main thread only; SIGTERM, SIGINT, SIGHUP are passed on to the points that run.
    """
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    store = open_run(arguments[0]).patient(Patience(over=lambda: bool(signals)))
    with local.detached(store, arguments[1:]) as (_, held_lease, ready):
        ready()
        run(store, specs.read(store), lambda: bool(signals or held_lease.lost))
    return 0


if __name__ == "__main__":
    run_as_program(main, refused=contract.Exit.USAGE)

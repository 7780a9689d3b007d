"""The local backend: submit, resume and cancel a run on this machine, and the runner's own entry point.

`python -m launch.backends.local RUN` is what `submit` starts, detached; what it does is in local_runner.py.
"""

import contextlib
import dataclasses
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from jobkit import contract, names
from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError, leave, say
from jobkit.rundir import mirror
from jobkit.rundir.store import Store, explain
from jobkit.units import show_duration
from launch.lifecycle import lease, orphans, run_status
from launch.lifecycle.lease import Lease
from launch.lifecycle.lock import RunLock, acquire, held, runner_alive
from launch.lifecycle.submission import (
    LEAVING_S,
    Plan,
    ask_to_cancel,
    cancel_content,
    make_point,
    new_run,
    open_run,
    prepare,
    record,
    record_resumed,
    refresh,
    runner_environment,
    says_alive,
    take_back_cancel,
)  # fmt: skip
from launch.spec import container
from launch.spec import jobspec as specs
from launch.spec.command import in_container
from launch.spec.jobspec import JobSpec

BACKEND = "local"
_ELSEWHERE_S = 2.0
"""How often a run that another machine runs is looked at."""
_READY_S = 30.0
"""How long a runner may take to come up: imports on a slow shared disk."""


@dataclasses.dataclass(frozen=True)
class Local:
    """The local backend: attempts are processes of this machine."""

    name = BACKEND

    def submit(self, spec: JobSpec) -> Store:
        """See `submit`."""
        return submit(spec)


def submit(spec: JobSpec, *, environ: Mapping[str, str] | None = None) -> Store:
    """Start a run: snapshot, run.json, a detached runner.

    Args:
        spec: What to run.
        environ: Variables that the runner and all it starts have on top of this process's own.

    Durability: on return run.json is on storage and a runner holds the run's lock.

    Raises:
        ConfigError: If the specification cannot work or the directory is taken; nothing is left behind then.
    """
    with new_run(plan(spec), BACKEND) as (store, _, lock):
        pass
    start(store, lock, environ)
    return store


def plan(spec: JobSpec) -> Plan:
    """Check a specification and fill in what it leaves open; writes nothing. In an image nothing here is looked for.

    Raises:
        ConfigError: If it cannot work.
    """
    found = prepare(spec, elsewhere=spec.container is not None)
    if spec.container is not None:
        container.refuse_foreign(spec.container, BACKEND)
        in_container(found.store, found.spec, cwd=Path(found.spec.cwd), environ={})
        container.check_docker()
        container.check_image(spec.container)
    return found


def start(store: Store, lock: RunLock, environ: Mapping[str, str] | None = None, *, number: int | None = None) -> None:
    """Start a detached runner, of a run or a sweep, that inherits the lock; wait until it is up.

    Args:
        store: The run or sweep.
        lock: Its lock, which is closed here.
        environ: As for `submit`.
        number: The lease that the runner is to hold; by default it is taken here.

    Raises:
        ConfigError: If it has a runner on another machine.
        JobkitError: If the runner does not come up.
    """
    module = "launch.backends.local_sweep" if specs.read(store).sweep else "launch.backends.local"
    ready, write = os.pipe()
    fds = [lock.descriptor, write]
    try:
        number = lease.claim(store) if number is None else number
        command = [sys.executable, "-P", "-m", module, store.url, *map(str, (*fds, number))]
        with open(store.file(contract.RUNNER_LOG), "ab", opener=names.opener) as log:
            process = subprocess.Popen(
                command, cwd=store.path, env=runner_environment() | dict(environ or {}), stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, pass_fds=fds, start_new_session=True,
            )  # fmt: skip
        os.close(write)
        write = -1
        process.wait()  # it forks, and the child is the runner
        answered = select.select([ready], [], [], _READY_S)[0] and os.read(ready, 16)
    except OSError as error:
        raise explain(error, f"cannot start the local runner of {store.url}") from None
    finally:
        lock.close()
        os.close(ready)
        if write >= 0:
            os.close(write)
    if not answered:
        log_path = store.file(contract.RUNNER_LOG)
        raise JobkitError(f"the local runner of {store.url} did not come up; see {log_path}, then 'jobkit resume'")


def resume(
    url: str | os.PathLike[str],
    *,
    wait_s: float | None = None,
    clear_cancel: bool = True,
    take_over: bool = False,
    environ: Mapping[str, str] | None = None,
) -> State:
    """Start a runner for a run that has none; what it committed is where it goes on.

    Args:
        url: The run.
        wait_s: How long to wait for an attempt that is still stopping after its runner was killed; by default as
            long as it may take.
        clear_cancel: Whether an earlier cancel is taken back; a cancel that comes meanwhile never is.
        take_over: Whether not to wait until a runner on another machine counts as dead.
        environ: As for `submit`.

    Returns:
        RUNNING once a runner is up; DONE, and nothing started, if the run is done.

    Raises:
        ConfigError: If the run is alive.
    """
    store = open_run(url)
    spec = specs.read(store)
    make_point(store)
    cancel_seen = cancel_content(store)
    if run_status.status(store).state is State.DONE:
        return State.DONE
    if _has_runner(store):
        raise ConfigError(says_alive(store))
    if not take_over and not run_status.has_ended(store):
        lease.refuse_elsewhere(store)
    lock = acquire(store, wait_s=spec.grace_s + 10 if wait_s is None else wait_s)
    if lock is None:
        raise ConfigError(says_alive(store))
    try:
        if run_status.status(store).state is State.DONE:
            lock.close()
            return State.DONE
        number = lease.claim(store, take_over=take_over, leaving=run_status.has_ended(store))
        lock.sign(os.getpid())
        if clear_cancel:
            take_back_cancel(store, cancel_seen)
    except JobkitError:
        lock.close()
        raise
    record_resumed(store)
    with contextlib.suppress(JobkitError):  # the runner carries it again
        mirror.carry_described(store)
    start(store, lock, environ, number=number)
    return State.RUNNING


def refuse_alive(store: Store, *, take_over: bool = False) -> None:
    """Raise ConfigError if a run has a runner here, or, unless that is taken over, on another machine."""
    if _has_runner(store) or held(store) or orphans.processes_of(store):
        raise ConfigError(says_alive(store))
    if not take_over:
        lease.refuse_elsewhere(store)


def _has_runner(store: Store) -> bool:
    """Tell whether a run has a runner; one that was killed this very moment, or is leaving, gets time to be gone."""
    begun = time.monotonic()
    while held(store) and runner_alive(store):
        if time.monotonic() - begun > (LEAVING_S if run_status.has_ended(store) else 1.0):
            return True
        time.sleep(0.05)
    return False


def cancel(
    url: str | os.PathLike[str],
    *,
    wait: bool = True,
    word: str = "cancelled",
    progress: Callable[[str], None] = lambda text: None,
) -> State:
    """End a run for good: no attempt is ever started again, unless a person resumes it.

    Args:
        url: The run.
        wait: Whether to wait until nothing of it runs any more.
        word: 'cancelled', or 'stopped' by who means to go on later.
        progress: Called with a line for a person when the waiting starts.

    Durability: on return cancel.json is on storage; nothing overrules it but `resume`.

    Raises:
        ConfigError: If the run is already done.
    """
    store = open_run(url)
    spec = specs.read(store)
    if run_status.status(store).state is State.DONE:
        raise ConfigError(f"run {store.url} is already done; there is nothing to cancel")
    make_point(store)
    content = ask_to_cancel(store, word)
    where = lease.elsewhere(store)
    if wait and (held(store) or where is not None):
        on = f" on {where.place}" if where is not None else ""
        progress(f"waiting for {store.url}{on} to save and stop (killed after {show_duration(spec.grace_s)})")
    if where is None or _until_it_ends_there(store, content, wait=wait):
        _finish_cancel(store, spec, content, wait=wait)
    return run_status.status(store).state


def _until_it_ends_there(store: Store, content: bytes, *, wait: bool) -> bool:
    """Wait for the runner of another machine, which finds the cancel; tell whether it died without an answer."""
    while cancel_content(store) == content and not run_status.has_ended(store):
        if lease.elsewhere(store) is None:
            return True
        if not wait:
            return False
        time.sleep(_ELSEWHERE_S)
        with contextlib.suppress(JobkitError):
            refresh(store)
    return False


def _finish_cancel(store: Store, spec: JobSpec, content: bytes, *, wait: bool) -> None:
    """Wait for the runner, or do its part where it is dead."""
    clearing: orphans.Clearing | None = None
    while cancel_content(store) == content:  # else somebody resumed the run or cancelled it again
        lock = acquire(store, wait_s=0.0 if wait else 0.3)
        if lock is not None:
            with contextlib.closing(lock):
                bury(store, spec, State.CANCELLED, run_status.cancel_reason(store))
            return
        if not runner_alive(store):
            clearing = clearing or orphans.Clearing(grace_s=spec.grace_s, notice_s=0.0)
            clearing.step(orphans.processes_of(store))
        if not wait:
            return
        time.sleep(0.05)


def bury(store: Store, spec: JobSpec, state: State, reason: str) -> None:
    """Write down the end of a run that has no runner; the lock is ours."""
    status = run_status.status(store, assume_held=False)
    if status.ended:
        return
    orphans.clear(store, grace_s=spec.grace_s)
    if spec.container is not None:
        container.remove(store.url)
    orphans.close_attempts(store, "the supervisor was killed")
    record(store, "ended", state=state, reason=reason)


def main(arguments: list[str]) -> int:
    """Run a run's attempts in a detached process.

    Args:
        arguments: The run, the descriptor of its lock, the descriptor to answer on; the run alone takes the lock
            itself and stays in the foreground.
    """
    from launch.backends.local_runner import runner_of

    store = open_run(arguments[0])
    with detached(store, arguments[1:]) as (lock, held_lease, ready):
        runner = runner_of(store, specs.read(store), lock.descriptor, held_lease)
        runner.run(ready)
    runner.empty_home()  # still under the lock, which nobody elsewhere waits for
    return 0


@contextlib.contextmanager
def detached(store: Store, given: list[str]) -> Iterator[tuple[RunLock, Lease, Callable[[], None]]]:
    """Let the process that started this one go on; yield the run's lock and lease, and what tells it that we are up.

    Args:
        store: The run.
        given: Descriptors of the lock and of the pipe to answer on, and the number of the lease; without them lock and
            lease are taken here, in the foreground.
    """
    answer: int | None = None
    if given:
        lock, number = RunLock(store, int(given[0])), int(given[2])
        os.set_inheritable(lock.descriptor, False)
        if os.fork():
            os._exit(0)
        answer = int(given[1])
        os.set_inheritable(answer, False)
    else:
        taken = acquire(store)
        if taken is None:
            raise ConfigError(says_alive(store))
        lock, number = taken, lease.claim(store)
        record_resumed(store)
    lock.sign(os.getpid())
    held_lease = Lease(store, number)
    held_lease.start()

    def ready() -> None:
        if answer is not None:
            with contextlib.suppress(OSError):
                os.write(answer, b"up")
            os.close(answer)

    yield lock, held_lease, ready
    held_lease.close()  # not on an error: an attempt may still be saving


if __name__ == "__main__":
    try:
        leave(main(sys.argv[1:]))
    except JobkitError as problem:
        say(str(problem))
        leave(contract.Exit.USAGE)

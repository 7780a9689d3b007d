"""The local backend: submit, resume and cancel a run on this machine, and the runner's own entry point.

`python -m launch.local RUN` is what `submit` starts, detached; what it does is in runner.py.
"""

import contextlib
import dataclasses
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from jobkit import contract
from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError
from jobkit.storage import Store, explain
from jobkit.units import show_duration
from launch import container, leftovers, report
from launch import spec as specs
from launch.command import in_container
from launch.lock import RunLock, acquire, held, runner_alive
from launch.spec import JobSpec
from launch.submission import (
    Plan,
    ask_to_cancel,
    cancel_content,
    make_point,
    new_run,
    open_run,
    prepare,
    record,
    runner_environment,
    says_alive,
    take_back_cancel,
    who,
)  # fmt: skip

BACKEND = "local"
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
    return found


def start(store: Store, lock: RunLock, environ: Mapping[str, str] | None = None) -> None:
    """Start a detached runner, of a run or a sweep, that inherits the lock; wait until it is up."""
    module = "launch.local_sweep" if specs.read(store).sweep else "launch.local"
    ready, write = os.pipe()
    fds = [lock.descriptor, write]
    command = [sys.executable, "-P", "-m", module, store.url, *map(str, fds)]
    try:
        with store.file("runner.log").open("ab") as log:
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
        log_path = store.file("runner.log")
        raise JobkitError(f"the local runner of {store.url} did not come up; see {log_path}, then 'jobkit resume'")


def resume(
    url: str | os.PathLike[str],
    *,
    wait_s: float | None = None,
    clear_cancel: bool = True,
    environ: Mapping[str, str] | None = None,
) -> State:
    """Start a runner for a run that has none; what it committed is where it goes on.

    Args:
        url: The run.
        wait_s: How long to wait for an attempt that is still stopping after its runner was killed; by default as
            long as it may take.
        clear_cancel: Whether an earlier cancel is taken back; a cancel that comes meanwhile never is.
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
    if report.status(store).state is State.DONE:
        return State.DONE
    if _has_runner(store):
        raise ConfigError(says_alive(store))
    lock = acquire(store, wait_s=spec.grace_s + 10 if wait_s is None else wait_s)
    if lock is None:
        raise ConfigError(says_alive(store))
    if report.status(store).state is State.DONE:
        lock.close()
        return State.DONE
    lock.sign(os.getpid())
    if clear_cancel:
        try:
            take_back_cancel(store, cancel_seen)
        except JobkitError:
            lock.close()
            raise
    record(store, "resumed", by=who())
    start(store, lock, environ)
    return State.RUNNING


def refuse_alive(store: Store) -> None:
    """Raise ConfigError if a run has a runner, or may have one on another machine, whose lock nobody sees here."""
    if _has_runner(store) or held(store) or leftovers.processes_of(store):
        raise ConfigError(says_alive(store))
    begun = [event for event in report.events(store) if event["event"] in ("submitted", "resumed")]
    host = str(begun[-1].get("by", "")).rpartition("@")[2] if begun else ""
    if host not in ("", socket.gethostname()) and report.last_life_event(store).get("event") != "ended":
        raise ConfigError(f"run {store.url} may be alive on {host}, where it was started: 'jobkit cancel {store.url}'")


def _has_runner(store: Store) -> bool:
    """Tell whether a run has a runner; one that was killed this very moment gets a second to be gone."""
    deadline = time.monotonic() + 1.0
    while held(store) and runner_alive(store):
        if time.monotonic() > deadline:
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
    if report.status(store).state is State.DONE:
        raise ConfigError(f"run {store.url} is already done; there is nothing to cancel")
    make_point(store)
    content = ask_to_cancel(store, word)
    if wait and held(store):
        progress(f"waiting for {store.url} to save and stop (killed after {show_duration(spec.grace_s)})")
    _finish_cancel(store, spec, content, wait=wait)
    return report.status(store).state


def _finish_cancel(store: Store, spec: JobSpec, content: bytes, *, wait: bool) -> None:
    """Wait for the runner, or do its part where it is dead."""
    clearing: leftovers.Clearing | None = None
    while cancel_content(store) == content:  # else somebody resumed the run or cancelled it again
        lock = acquire(store, wait_s=0.0 if wait else 0.3)
        if lock is not None:
            with contextlib.closing(lock):
                bury(store, spec, State.CANCELLED, report.cancel_reason(store))
            return
        if not runner_alive(store):
            clearing = clearing or leftovers.Clearing(grace_s=spec.grace_s, notice_s=0.0)
            clearing.step(leftovers.processes_of(store))
        if not wait:
            return
        time.sleep(0.05)


def bury(store: Store, spec: JobSpec, state: State, reason: str) -> None:
    """Write down the end of a run that has no runner; the lock is ours."""
    status = report.status(store, assume_held=False)
    if status.ended:
        return
    leftovers.clear(store, grace_s=spec.grace_s)
    if spec.container is not None:
        container.remove(store.url)
    leftovers.close_attempts(store, "the supervisor was killed")
    record(store, "ended", state=state, reason=reason)


def main(arguments: list[str]) -> int:
    """Run a run's attempts in a detached process.

    Args:
        arguments: The run, the descriptor of its lock, the descriptor to answer on; the run alone takes the lock
            itself and stays in the foreground.
    """
    from launch.runner import Runner

    store = open_run(arguments[0])
    with detached(store, arguments[1:]) as (lock, ready):
        Runner(store, specs.read(store), lock.descriptor).run(ready)
    return 0


@contextlib.contextmanager
def detached(store: Store, descriptors: list[str]) -> Iterator[tuple[RunLock, Callable[[], None]]]:
    """Let the process that started this one go on; yield the run's lock and what tells that process that we are up.

    Args:
        store: The run.
        descriptors: Of the lock and of the pipe to answer on; without them the lock is taken here, in the foreground.
    """
    answer: int | None = None
    if descriptors:
        lock = RunLock(store, int(descriptors[0]))
        os.set_inheritable(lock.descriptor, False)
        if os.fork():
            os._exit(0)
        answer = int(descriptors[1])
        os.set_inheritable(answer, False)
    else:
        taken = acquire(store)
        if taken is None:
            raise ConfigError(says_alive(store))
        lock = taken
        record(store, "resumed", by=who())
    lock.sign(os.getpid())

    def ready() -> None:
        if answer is not None:
            with contextlib.suppress(OSError):
                os.write(answer, b"up")
            os.close(answer)

    yield lock, ready


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except JobkitError as problem:
        print(f"jobkit: {problem}", file=sys.stderr)
        sys.exit(contract.Exit.USAGE)

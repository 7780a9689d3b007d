"""The local backend: runs on this machine, each with a detached runner, and the runner's own entry point.

`python -m launch.backends.local` is what a submit starts; what it does is in local_runner.py.
"""

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from jobkit import contract, names
from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir import mirror
from jobkit.rundir.store import Store, explain
from jobkit.units import show_duration
from launch.backends import after
from launch.lifecycle import lease, orphans, run_status, submission
from launch.lifecycle.lease import Lease
from launch.lifecycle.lock import Claim, RunLock, acquire, held, runner_alive
from launch.lifecycle.submission import Plan
from launch.lifecycle.verbs import Backend, Cancelled, Progress, not_done
from launch.spec import container
from launch.spec import jobspec as specs
from launch.spec.command import check_code, in_container
from launch.spec.jobspec import JobSpec
from launch.spec.profiles import refuse_foreign

_ELSEWHERE_S = 2.0
"""How often a run that another machine runs is looked at."""
_POLL_S = 0.05
_READY_S = 30.0
"""How long a runner may take to come up: imports on a slow shared disk."""


class Local(Backend):
    """The local backend: attempts are processes of this machine.

    Args:
        environ: Variables that the runner and all it starts have on top of this process's own.
    """

    name = "local"
    options = frozenset({"ntasks-per-node", "container-runtime", "mount"})
    waits = True
    runtimes = (container.DOCKER,)
    processes_here = True

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._environ = dict(environ or {})

    def check(self, spec: JobSpec, *, look: bool = True) -> Plan:
        """See `Backend`. In an image nothing here is looked for."""
        if spec.setup:
            raise ConfigError("--setup is for jobs; on this machine set up the shell that you submit from")
        refuse_foreign(spec, self.name, self.options)
        plan = submission.prepare(spec, elsewhere=spec.container is not None, look=look)
        if spec.container is not None:
            container.refuse_foreign(spec.container, self.name, self.runtimes)
            in_container(plan.store, plan.spec, cwd=Path(plan.spec.cwd), environ={})
            container.check_docker()
            container.check_image(spec.container)
        return after.check(self, plan)

    def fit(self, store: Store, spec: JobSpec, *, moved: bool) -> JobSpec:
        """See `Backend`. What it had the runner sees to itself: it waits for a daemon that does not answer."""
        if moved:
            if spec.container is not None:
                container.refuse_foreign(spec.container, self.name, self.runtimes)
                container.check_docker()
                container.check_image(spec.container)
            check_code(store.url, spec)
        after.check_resumed(self, store, spec)
        return spec

    def enqueue(self, store: Store, spec: JobSpec, points: Sequence[int]) -> None:
        """Nobody but the runner has to hear of it."""

    def hand_over(self, store: Store, claim: Claim) -> State:
        """Start a detached runner, of a run or a sweep, that inherits the lock; wait until it is up.

        Raises:
            ConfigError: If it has a runner on another machine.
            JobkitError: If the runner does not come up.
        """
        assert claim.lock is not None
        ready, write = map(os.fdopen, os.pipe(), "rw")
        fds, number, process = [claim.lock.descriptor, write.fileno()], claim.lease, None
        log_path = store.file(contract.RUNNER_LOG)
        try:
            module = "launch.backends.local_sweep" if specs.read(store).sweep else "launch.backends.local"
            number = lease.claim(store) if number is None else number
            command = [sys.executable, "-P", "-m", module, store.url, *map(str, (*fds, number))]
            environ = submission.runner_environment() | self._environ
            with open(log_path, "ab", opener=names.opener) as log:
                process = subprocess.Popen(
                    command, cwd=store.path, env=environ, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, pass_fds=fds, start_new_session=True,
                )  # fmt: skip
            write.close()
            process.wait()  # it forks, and the child is the runner
            answered = select.select([ready], [], [], _READY_S)[0] and os.read(ready.fileno(), 16)
        except OSError as error:
            raise explain(error, f"cannot start the local runner of {store.url}") from None
        finally:
            if process is None and number is not None:
                with contextlib.suppress(JobkitError):
                    lease.release(store, number)
            for end in (claim.lock, ready, write):
                end.close()
        if not answered:
            raise JobkitError(f"the local runner of {store.url} did not come up; see {log_path}, then 'jobkit resume'")
        return State.RUNNING

    @contextlib.contextmanager
    def claim(self, store: Store, spec: JobSpec, *, take_over: bool) -> Iterator[Claim]:
        """See `Backend`: lock and lease. An attempt that still stops after its runner was killed gets its time."""
        if not spec.sweep:
            submission.make_point(store)
        if _has_runner(store):
            raise ConfigError(submission.says_alive(store))
        if not take_over and not run_status.has_ended(store):
            lease.refuse_elsewhere(store)
        lock = acquire(store, wait_s=spec.grace_s + 10)
        if lock is None:
            raise ConfigError(submission.says_alive(store))
        claim = Claim(lock)
        try:
            if not_done(self, specs.points(store, spec)):
                number = lease.claim(store, take_over=take_over, leaving=run_status.has_ended(store))
                claim = Claim(lock, number)
                lock.sign(os.getpid())
            yield claim
        except BaseException:
            with contextlib.suppress(JobkitError):
                claim.free(store)
            raise

    def refuse_alive(self, store: Store, *, take_over: bool = False) -> None:
        """Raise ConfigError if a run has a runner here, or, unless that is taken over, on another machine."""
        if _has_runner(store) or held(store) or orphans.processes_of(store):
            raise ConfigError(submission.says_alive(store))
        if not take_over:
            lease.refuse_elsewhere(store)

    def record_resumed(self, store: Store, left: Iterable[Store]) -> None:
        """See `Backend`. What is left of a budget stays, unless the run had ended; points have runners of their own."""
        submission.record_taken_up(store)
        with contextlib.suppress(JobkitError):  # the runner carries it again
            mirror.upload_described(store)

    def stop(self, cancelled: Cancelled) -> None:
        """See `Backend`. Runners find the cancel by themselves; what a dead one would do is done here."""
        store, wait = cancelled.store, cancelled.wait
        spec, problems = specs.read(store), []
        for one in filter(specs.exists, cancelled.left):
            # A point may be made this very moment.
            content = cancelled.cancels[one] if one in cancelled.cancels else submission.cancel_content(one)
            try:
                if content is not None:
                    _stop(one, content, wait=wait, progress=cancelled.progress)
            except JobkitError as error:  # the others are ended all the same
                problems.append(error)
        deadline = time.monotonic() + spec.grace_s
        while spec.sweep and wait and held(store) and time.monotonic() < deadline:  # it cancels what it was starting
            time.sleep(_POLL_S)
        if problems:
            raise problems[0]

    def beside(self, store: Store, command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """See `Backend`: in the attempt's container; else with its environment, in the copy of the code."""
        if (away := lease.elsewhere(store)) is not None:
            raise ConfigError(f"{store.url} runs on {away.place}: attach there")
        if specs.read(store).container is not None:
            return container.beside(store.url, command), {}
        attempt = max(store.numbers(contract.ATTEMPTS), default=-1)
        pid = max(orphans.program_pids(store, attempt)[-1:], default=0)
        environ = orphans.environments_of(store).get(pid)
        if environ is None:
            raise ConfigError(f"nothing of {store.url} runs just now: 'jobkit status {store.url}'")
        # Whoever looks for what is left of an attempt must not take a person's shell for a part of it.
        return ["env", f"--chdir=/proc/{pid}/cwd", "--", *command], contract.handed_on(environ)

    def leave(self, store: Store, *, take_over: bool) -> None:
        """See `Backend`: a runner that lives all the same stops."""
        lease.release(store, lease.claim(store, take_over=take_over))


def _has_runner(store: Store) -> bool:
    """Tell whether a run has a runner; one that was killed this very moment, or is leaving, gets time to be gone."""
    begun = time.monotonic()
    while held(store) and runner_alive(store):
        if time.monotonic() - begun > (submission.LEAVING_S if run_status.has_ended(store) else 1.0):
            return True
        time.sleep(_POLL_S)
    return False


def _stop(store: Store, content: bytes, *, wait: bool, progress: Progress) -> None:
    """End one run that was cancelled."""
    spec, where = specs.read(store), lease.elsewhere(store)
    if wait and (held(store) or where is not None):
        on = f" on {where.place}" if where is not None else ""
        progress(f"waiting for {store.url}{on} to save and stop (killed after {show_duration(spec.grace_s)})")
    if where is None or _until_it_ends_there(store, content, wait=wait):
        _finish_cancel(store, spec, content, wait=wait)


def _until_it_ends_there(store: Store, content: bytes, *, wait: bool) -> bool:
    """Wait for the runner of another machine, which finds the cancel; tell whether it died without an answer."""
    while submission.cancel_content(store) == content and not run_status.has_ended(store):
        if lease.elsewhere(store) is None:
            return True
        if not wait:
            return False
        time.sleep(_ELSEWHERE_S)
        with contextlib.suppress(JobkitError):
            submission.refresh(store)
    return False


def _finish_cancel(store: Store, spec: JobSpec, content: bytes, *, wait: bool) -> None:
    """Wait for the runner, or do its part where it is dead."""
    clearing: orphans.Clearing | None = None
    while submission.cancel_content(store) == content:  # else somebody resumed the run or cancelled it again
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
        time.sleep(_POLL_S)


def bury(store: Store, spec: JobSpec, state: State, reason: str) -> None:
    """Write down the end of a run that has no runner; the lock is ours."""
    status = run_status.status(store, assume_held=False)
    if status.ended:
        return
    orphans.clear(store, grace_s=spec.grace_s)
    if spec.container is not None:
        container.remove(store.url)
    orphans.close_attempts(store, "the supervisor was killed")
    submission.record(store, "ended", state=state, reason=reason)


def main(arguments: list[str]) -> int:
    """Run a run's attempts in a detached process.

    Args:
        arguments: The run, and what `detached` takes.
    """
    from launch.backends.local_runner import runner_of

    store = submission.open_run(arguments[0])
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
        given: Descriptors of the lock and of the pipe to answer on, and the number of the lease.
    """
    if len(given) != 3:
        raise ConfigError("a submit or a resume starts this: use 'jobkit resume RUN'")
    descriptor, answer, number = map(int, given)
    lock = RunLock(store, descriptor)
    os.set_inheritable(descriptor, False)
    if os.fork():
        os._exit(0)
    os.set_inheritable(answer, False)
    lock.sign(os.getpid())
    held_lease = Lease(store, number)
    held_lease.start()

    def ready() -> None:
        with contextlib.suppress(OSError):
            os.write(answer, b"up")
        os.close(answer)

    yield lock, held_lease, ready
    held_lease.close()  # not on an error: an attempt may still be saving


if __name__ == "__main__":
    submission.run_as_program(main, refused=contract.Exit.USAGE)

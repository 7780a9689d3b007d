"""The local runner: what a cluster's scheduler is elsewhere. One process per run, detached; and attempts in Docker.

`jobkit resume` starts another one where it was killed.
"""

import contextlib
import signal
import time

from jobkit import contract
from jobkit.contract import Exit, Outcome, State
from jobkit.errors import JobkitError, say
from jobkit.rundir import mirror
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from launch.backends import after
from launch.lifecycle import orphans, restart
from launch.lifecycle.lease import Lease
from launch.lifecycle.runner import Runner
from launch.spec import container
from launch.spec.jobspec import JobSpec

_DAEMON_S = 300.0
"""How long Docker may be down between two attempts, for an upgrade."""
_NOT_STARTED = (125, 126, 127)
"""Of `docker run`: no container could be made of the image, or its python3 could not be started."""


def runner_of(store: Store, spec: JobSpec, lock_fd: int | None = None, lease: Lease | None = None) -> "LocalRunner":
    """Return the runner of a run on this machine.

    Args:
        store: The run.
        spec: What was submitted.
        lock_fd: Descriptor of the run's lock.
        lease: The run's lease, where there is a lock.
    """
    in_docker = spec.container is not None and spec.container.runtime == container.DOCKER
    return (DockerRunner if in_docker else LocalRunner)(store, spec, lock_fd, lease)


class LocalRunner(Runner):
    """Run attempts on this machine, under the run's lock and lease; arguments as `runner_of` has them."""

    def __init__(self, store: Store, spec: JobSpec, lock_fd: int | None, lease: Lease | None) -> None:
        super().__init__(store, spec)
        self.lock_fd, self._lease = lock_fd, lease

    def _begin(self) -> int | None:
        self._clear()
        orphans.close_attempts(self._store, "the runner and the supervisor were killed")
        return self._wait_for_other() if after.due(self._store, self._spec) else None

    def _wait_for_other(self) -> int | None:
        """Wait until the run that this one starts after has finished well; return an exit code if it has not."""
        watch = after.Watch(self._store, self._spec, lambda stores: {})
        while (over := self._over_anywhere()) is None:
            other = watch.look()
            if other.state is State.DONE:
                return None
            if other.state.over:
                return self._end(State.FAILED, other.reason)
            self._wait(watch.pause_s)
        return self._end(*over)

    def _remember(self) -> restart.Policy:
        """Take up the failures alone: who resumes a run that stood still for want of a machine wants it to go on."""
        policy = super()._remember()
        self._history = [ended for ended in self._history if ended.outcome in (Outcome.FAILED, Outcome.STALLED)]
        return policy

    def _over(self) -> tuple[State, str] | None:
        if self._lease is not None and self._lease.lost:
            return State.FAILED, self._lease.lost
        if (cancelled := super()._over()) is not None or self._signals.first is None:
            return cancelled
        name = signal.Signals(self._signals.first).name
        return State.FAILED, f"the local runner was stopped ({name}); continue with: jobkit resume {self._store.url}"

    def _over_anywhere(self) -> tuple[State, str] | None:
        if self._lease is not None:
            self._lease.look()
        return super()._over_anywhere()

    def _end(self, state: State, reason: str) -> int:
        # Whoever has the run now writes its ledger on the URL: where that cannot be asked, ours stays in the home.
        sure = self._lease is None or self._lease.look()
        if self._lease is not None and self._lease.lost:
            say(self._lease.lost)
            return int(Exit.FAILED)
        with contextlib.suppress(JobkitError):
            self._write_down("ended", state=state, reason=reason)
            if sure:
                mirror.upload_described(self._store)
        return self._code(state)

    def empty_home(self) -> None:
        """Give back the room on this node, unless another machine has the run now."""
        if self._lease is None or not self._lease.lost:
            super().empty_home()


class DockerRunner(LocalRunner):
    """Run attempts that are children of Docker's daemon; what is started here is its client, which holds the lock."""

    @staticmethod
    def in_child() -> None:
        """Have the kernel tell the client when this process dies."""
        processes.signal_on_parent_death(signal.SIGTERM)

    def _begin(self) -> int | None:
        self._clear()
        container.remove(self._store.url)  # made for an attempt whose runner was killed, and never started
        return super()._begin()

    def _attempt(self) -> restart.Ended:
        self._until_docker()
        return super()._attempt()

    def _until_docker(self) -> None:
        """Wait for a daemon that is just being started again, a few minutes at most."""
        deadline, reported = time.monotonic() + _DAEMON_S, False
        while self._over() is None and time.monotonic() < deadline:
            try:
                container.check_docker()
                break
            except JobkitError as error:
                if not reported:
                    say(f"{error}; waiting for it")
                reported = True
            self._nap(1.0)

    def _in_container(self) -> dict[str, str]:
        return {} if self._store.remote is None else {contract.ENV_HOME: str(self._store.path.parent)}

    def _inside(self) -> tuple[set[int], set[int]]:
        pids = set(orphans.processes_of(self._store))
        below = {child for pid in pids for child in processes.descendants(pid)}
        return pids | below, pids - below

    def _close(self, attempt: int, code: int) -> None:
        if code != 0:  # its client may have been killed while it was making one
            container.remove(self._store.url)
        super()._close(attempt, code)

    def _not_started(self, code: int, reason: str, program_code: int | None) -> tuple[str, int | None]:
        if code not in _NOT_STARTED:
            return reason, program_code
        where = self._store.file(contract.RUNNER_LOG)
        try:
            container.check_docker()
        except JobkitError:  # it was interrupted too: nobody's failure
            program_code = None
        return f"docker could not start the container ({contract.describe_exit(code)}): see {where}", program_code

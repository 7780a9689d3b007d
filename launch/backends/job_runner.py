"""The runner inside a job of a scheduler: what SLURM's jobs and those of managed batch services have in common.

A scheduler starts it, ends it and starts it again, on other machines; what it knows is in the run directory. It runs
attempts until the job has to end, and its exit code tells the scheduler what to do next.
"""

from collections.abc import Callable
from typing import Any

from jobkit import contract
from jobkit.contract import Exit, State
from jobkit.errors import JobkitError, say
from jobkit.rundir.store import Store
from launch.lifecycle import notify, restart, run_status, submission
from launch.lifecycle.restart import Cause
from launch.lifecycle.runner import Runner
from launch.spec.jobspec import JobSpec


class JobRunner(Runner):
    """Run attempts inside one job.

    Args:
        store: The run.
        spec: What was submitted.
        job: The scheduler's name of this job.
        backend: The scheduler.
    """

    def __init__(self, store: Store, spec: JobSpec, job: str, backend: str) -> None:
        super().__init__(store, spec)
        self._job, self._backend = job, backend

    def run(self, ready: Callable[[], None] = lambda: None) -> int:
        """Run until the job has to end; return its exit code.

        Args:
            ready: Called once signals are heard.

        Signals: main thread only.
        """
        try:
            return super().run(ready)
        finally:
            notify.finish(self._notifier)  # nothing that a job started outlives it

    def _begin(self) -> int | None:
        """Go on with the run, unless that is another's business by now."""
        known = run_status.jobs(self._store, self._backend)
        if self._job not in known:  # its submit was killed before it wrote that down
            self._write_down("job", id=self._job, backend=self._backend)
        self._newest_attempt = max(self._store.numbers(contract.ATTEMPTS), default=-1)
        if (other := self._superseded()) is not None:
            return self._leave(f"{other} has taken over", Exit.DONE)
        last = run_status.last_life_event(self._store)
        if last.get("event") == "ended":
            return self._leave("the run has ended; this job has nothing to do", self._code(last.get("state")))
        return None

    def _superseded(self) -> str | None:
        """Name what has taken over from this job: an attempt that it did not start."""
        attempt = max(self._store.numbers(contract.ATTEMPTS), default=-1)
        return f"attempt {attempt}" if attempt > self._newest_attempt else None

    def _facts(self, decision: restart.Decision, why: Cause) -> dict[str, Any]:
        return super()._facts(decision, why) | {"job": self._job}

    def _end(self, state: State, reason: str) -> int:
        """Write down the end of the run."""
        try:
            submission.end(self._store, state, reason)
        except JobkitError as error:  # there is no time left to wait for the storage
            say(str(error))
        return self._leave(reason, self._code(state))

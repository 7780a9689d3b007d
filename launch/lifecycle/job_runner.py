"""The runner inside a job of a scheduler: what SLURM's jobs and those of managed batch services have in common.

A scheduler starts it, ends it and starts it again, on other machines; what it knows is in the run directory. It runs
attempts until the job has to end, and its exit code tells the scheduler what to do next.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from jobkit import contract
from jobkit.contract import Exit, State
from jobkit.errors import JobkitError, say
from jobkit.rundir import mirror
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from launch.lifecycle import notify, restart, run_status, submission
from launch.lifecycle.runner import Runner
from launch.spec.jobspec import JobSpec


class JobRunner(Runner, ABC):
    """Run attempts inside one job.

    Args:
        store: The run.
        spec: What was submitted.
        job: The scheduler's name of this job.
        backend: The scheduler.
    """

    codes: Mapping[State, int] = {State.DONE: Exit.DONE, State.CANCELLED: Exit.DONE}
    """Exit code of the job by how the run ended; any other end is a failure."""

    def __init__(self, store: Store, spec: JobSpec, job: str, backend: str) -> None:
        super().__init__(store, spec, None)
        self._job, self._backend = job, backend

    def run_job(self) -> int:
        """Run until the job has to end; return its exit code.

        Signals: main thread only.
        """
        self._listen()
        telling = notify.start(self._store, self._spec.notify, self._spec.cwd)
        try:
            return self._run_job()
        finally:
            notify.finish(telling)

    def _run_job(self) -> int:
        processes.become_subreaper()
        try:
            return self._take_up()
        except JobkitError as error:
            return self._end(*(self._over() or (State.FAILED, str(error))))

    def _take_up(self) -> int:
        """Go on with the run, unless that is another's business by now."""
        if self._job not in run_status.jobs(
            self._store, self._backend
        ):  # its submit was killed before it wrote that down
            self._write_down("job", id=self._job, backend=self._backend)
        self._newest_attempt = max(self._store.numbers(contract.ATTEMPTS), default=-1)
        if (other := self._superseded()) is not None:
            return self._leave(f"{other} has taken over", Exit.DONE)
        last = run_status.last_life_event(self._store)
        if last.get("event") == "ended":
            return self._leave("the run has ended; this job has nothing to do", self._code(last.get("state")))
        return self._attempts_in_job()

    @abstractmethod
    def _attempts_in_job(self) -> int:
        """Run attempts until the job has to end; return its exit code."""

    def _superseded(self) -> str | None:
        """Name what has taken over from this job: an attempt that it did not start."""
        attempt = max(self._store.numbers(contract.ATTEMPTS), default=-1)
        return f"attempt {attempt}" if attempt > self._newest_attempt else None

    def _remember(self) -> restart.Policy:
        """Take up the history of the run since it was submitted or resumed: earlier incarnations and jobs."""
        begun = [event for event in run_status.events(self._store) if event["event"] in ("submitted", "resumed")]
        skip, committed = (begun[-1].get("attempts", 0), begun[-1].get("committed", -1)) if begun else (0, -1)
        attempts = [number for number in self._store.numbers(contract.ATTEMPTS) if number >= skip]
        self._history = [self._ended(attempt, 0.0) for attempt in attempts]
        return restart.Policy(max_failures=self._spec.max_failures, committed_at_start=committed)

    def _end(self, state: State, reason: str) -> int:
        """Write down the end of the run."""
        try:
            submission.end(self._store, state, reason)
        except JobkitError as error:  # there is no time left to wait for the storage
            say(str(error))
        return self._leave(reason, self._code(state))

    def _code(self, state: object) -> int:
        return int(next((code for ended, code in self.codes.items() if ended == state), Exit.FAILED))

    def _leave(self, reason: str, code: int) -> int:
        say(reason)
        try:
            mirror.carry_described(self._store)
        except JobkitError as error:
            say(str(error))
        return int(code)

    def _hand_down(self, environ: dict[str, str]) -> dict[str, str]:
        return environ

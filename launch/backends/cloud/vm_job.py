"""What the container of a managed batch service runs: attempts, until the VM has to go.

It is `python -m launch.backends.cloud.vm_job RUN`.

It is PID 1 of the container. The VM knows nothing but the run's URL: code and history come from there. The exit code
tells the service what to do: 75 start the task again (elsewhere, after a preemption), 0 done, anything else stop. A
program that dies by itself, out of memory say, is restarted in this very VM while it makes progress, and its code never
becomes the container's: the service would take a 137 for a lost VM and start the run again for ever.
"""

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType

import msgspec

from jobkit import contract
from jobkit.contract import Exit, Outcome, State
from jobkit.errors import ConfigError, StorageError, say
from jobkit.rundir.store import Store
from jobkit.units import show_duration
from launch.backends.job_runner import JobRunner
from launch.lifecycle import orphans, restart, run_status
from launch.lifecycle.restart import Cause
from launch.lifecycle.submission import open_run, run_as_program
from launch.spec import cloud_options
from launch.spec import jobspec as specs
from launch.spec.jobspec import JobSpec

_STOPPING = (signal.SIGTERM, signal.SIGINT)
COMMAND = ("env", "--block-signal=TERM,INT", "python3", "-P", "-m", "launch.backends.cloud.vm_job")
"""What the container runs, with the run's URL. To PID 1 a signal without a handler is lost: `env` holds them back."""


def command(store: Store, spec: JobSpec) -> list[str]:
    """Return what the container runs: behind the lines of `--setup`, which are bash, where there are any."""
    if not spec.setup:
        return [*COMMAND, store.url]
    script = "\n".join([*spec.setup, 'exec "$@"'])
    return [*COMMAND[:2], "bash", "-c", script, "setup", *COMMAND[2:], store.url]


_PATIENCE_S = 300.0
"""How long a bucket may take to answer when the VM comes up."""
CANCELLED = 3
"""Exit code of the job of a cancelled run, as `jobkit submit --wait` has it."""


class VmRunner(JobRunner):
    """Run attempts inside one VM.

    Args:
        store: The run.
        spec: What was submitted.
        job: The job's id.
        backend: The service.
        retries: How often the service has started this job again.
    """

    codes: Mapping[State, int] = {State.DONE: Exit.DONE, State.CANCELLED: CANCELLED, State.REQUEUED: Exit.PREEMPTED}
    superseded_code = Exit.FAILED
    output = None  # the service's own log gets what the program prints, too

    def __init__(self, store: Store, spec: JobSpec, *, job: str, backend: str, retries: int) -> None:
        if spec.code is None:  # the code is in the image, where its WORKDIR is
            spec = msgspec.structs.replace(spec, root=os.getcwd(), cwd=os.getcwd())
        super().__init__(store, spec, job, backend)
        self._retries = retries
        self._limit_at = float("inf")
        """When the run's time is used up, on the clock of `time.monotonic`."""

    def _begin(self) -> int | None:
        if (code := super()._begin()) is not None:
            return code
        self._write_down("job_started", job=self._job, backend=self._backend, restarts=self._retries)
        # What the service starts again it has lost by no fault of the program's.
        orphans.close_attempts(self._store, "the VM was lost", preempted=self._retries > 0)
        return None

    def _remember(self) -> restart.Policy:
        policy = super()._remember()
        if self._spec.cloud is not None and self._spec.cloud.time_s is not None:
            used_s = sum(ended.duration_s for ended in self._history)
            self._limit_at = time.monotonic() + self._spec.cloud.time_s - used_s - self._spec.grace_s
        return policy

    def _go_on(self, decision: restart.Decision, why: Cause) -> int | None:
        if (over := self._over()) is not None and over[0] is not State.REQUEUED:
            return self._end(*over)
        if over is not None or self._history[-1].outcome is Outcome.PREEMPTED:
            return self._leave(f"{decision.reason}; {self._backend} starts the job again", Exit.PREEMPTED)
        return super()._go_on(decision, why)

    def _over(self) -> tuple[State, str] | None:
        if (cancelled := super()._over()) is not None:
            return cancelled
        if time.monotonic() >= self._limit_at:
            assert self._spec.cloud is not None
            limit = show_duration(self._spec.cloud.time_s or 0.0)
            return State.FAILED, f"its {limit} (--time) are used up; continue with: jobkit resume {self._store.url}"
        if self._signals.first is not None:
            return State.REQUEUED, f"{self._backend} stops the VM ({signal.Signals(self._signals.first).name})"
        return None

    def _end(self, state: State, reason: str) -> int:
        return self._leave(reason, Exit.PREEMPTED) if state is State.REQUEUED else super()._end(state, reason)

    def _superseded(self) -> str | None:
        newest = (run_status.jobs(self._store, self._backend) or [self._job])[-1]
        return super()._superseded() or (f"job {newest}" if newest != self._job else None)

    def _grace(self) -> dict[str, str]:
        return {contract.ENV_GRACE: f"{min(self._spec.grace_s, cloud_options.STOP_S):g}"}


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    """Serve a stop that comes before there is anything to save."""
    os._exit(Exit.PREEMPTED)


def main(arguments: list[str]) -> int:
    """Run a run's attempts in this VM.

    Args:
        arguments: The run.
    """
    for number in _STOPPING:
        signal.signal(number, _leave_at_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    job, backend = os.environ.get(contract.ENV_JOB), os.environ.get(contract.ENV_BACKEND, "")
    if len(arguments) != 1 or not job:
        raise ConfigError("this runs inside a job of a batch service: use jobkit submit --on gcp")
    for name in set(os.environ) - contract.handed_on(os.environ).keys():
        del os.environ[name]
    # AWS counts attempts from 1, Google retries from 0.
    retries = int(os.environ.get("BATCH_TASK_RETRY_ATTEMPT") or int(os.environ.get("AWS_BATCH_JOB_ATTEMPT") or 1) - 1)
    try:
        store = open_run(arguments[0], patience_s=_PATIENCE_S)
    except StorageError as error:
        say(str(error))
        return int(Exit.PREEMPTED)  # perhaps another VM gets there
    return VmRunner(store, specs.read(store), job=job, backend=backend, retries=retries).run()


if __name__ == "__main__":
    run_as_program(main)

"""What the container of a managed batch service runs: attempts, until the VM has to go.

It is `python -m launch.backends.cloud.vm_job RUN`.

It is PID 1 of the container. The VM knows nothing but the run's URL: code and history come from there. The exit code
tells the service what to do: 75 start the task again (elsewhere, after a preemption), 0 done, anything else stop. A
program that dies by itself, out of memory say, is restarted in this very VM while it makes progress, and its code never
becomes the container's: the service would take a 137 for a lost VM and start the run again for ever.

A service starts one job again about ten times. A notice in the last life but one makes the job submit its successor
instead, which begins with as many restarts again; where that life was lost without a notice, the last one does so as
soon as it comes up. Of a job with several VMs, each of which is started again so often, the one lost most often counts.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import cast

import msgspec

from jobkit import contract
from jobkit.contract import Exit, Outcome, State
from jobkit.errors import ConfigError, JobkitError, StorageError, say
from jobkit.rundir import mirror
from jobkit.rundir.ledger import read_json
from jobkit.rundir.store import Store
from jobkit.supervise.together import gathering
from jobkit.units import show_duration
from launch.backends import registry
from launch.backends.cloud import points, vm_member
from launch.backends.cloud.managed import Managed, restarts_before
from launch.backends.cloud.vm_member import Member
from launch.backends.job_runner import JobRunner
from launch.lifecycle import orphans, restart, run_status
from launch.lifecycle.restart import Cause
from launch.lifecycle.runner import KILLED
from launch.lifecycle.submission import open_run, run_as_program
from launch.spec import cloud_options
from launch.spec import jobspec as specs
from launch.spec.jobspec import JobSpec

_STOPPING = (signal.SIGTERM, signal.SIGINT)
_PATIENCE_S = 300.0
"""How long a bucket may take to answer when the VM comes up."""
_UPLOAD_S = 20.0
"""How long it may take with what is written down of this VM before it begins an attempt."""
_FRUITLESS = 20
"""After so many VMs in a row that began no attempt none is submitted any more: something kills them all."""
CANCELLED = 3
"""Exit code of the job of a cancelled run, as `jobkit submit --wait` has it."""


class VmRunner(JobRunner):
    """Run attempts inside one VM.

    Args:
        store: The run.
        spec: What was submitted.
        job: The job's id.
        service: The service.
        retries: How often the service has started this job again.
    """

    codes: Mapping[State, int] = {State.DONE: Exit.DONE, State.CANCELLED: CANCELLED, State.REQUEUED: Exit.PREEMPTED}
    superseded_code = Exit.FAILED
    output = None  # the service's own log gets what the program prints, too

    def __init__(self, store: Store, spec: JobSpec, *, job: str, service: Managed, retries: int) -> None:
        if spec.code is None:  # the code is in the image, where its WORKDIR is
            spec = msgspec.structs.replace(spec, root=os.getcwd(), cwd=os.getcwd())
        super().__init__(store, spec, job, service.name)
        self._service, self._retries = service, retries
        self._before = restarts_before(store, job)
        """How often VMs of the run were replaced before this job."""
        self._limit_at = float("inf")
        """When the run's time is used up, on the clock of `time.monotonic`."""
        self._others: dict[int, int] = {}
        """Of each other VM of the job, how often it was started again, as far as that is known here."""

    def run(self, ready: Callable[[], None] = lambda: None) -> int:
        """See `JobRunner`; a point of a sweep that is over has the next one begin."""
        code = super().run(ready)
        try:
            if self._spec.sweep_url and run_status.has_ended(self._store):
                points.start_next(self._store, self._submit)
        except JobkitError as error:
            say(f"the next point of the sweep was not submitted: {error}")
            if self._lives_here() > 0:
                return int(Exit.PREEMPTED)  # the next life has nothing to do but to ask again
            with contextlib.suppress(JobkitError):
                points.record_refused(self._store, error)
        return code

    def _submit(self, store: Store, spec: JobSpec) -> None:
        self._service.submit_once(store, msgspec.structs.replace(spec, setup=self._spec.setup))

    def _begin(self) -> int | None:
        declared = self._service.declared(self._store, self._job)
        if declared and (code := self._hand_on("the VM was lost")) is not None:  # perhaps before it was submitted
            return code
        if (code := super()._begin()) is not None:
            return code
        begun = len(self._store.numbers(contract.ATTEMPTS))
        here = {"job": self._job, "backend": self._backend, "restarts": self._retries}
        self._write_down("job_started", **here, attempts=begun)
        self._upload_ledger()
        # What the service starts again it has lost by no fault of the program's.
        lost = self._retries > 0 or self._before > 0
        orphans.close_attempts(self._store, "the VM was lost", preempted=lost)
        return self._hand_on("the VM was lost") if self._lives_left() < 1 else None

    def _lives_here(self) -> int:
        """Return how often the service starts this very job again."""
        limit = None if self._spec.cloud is None else self._spec.cloud.max_restarts
        most = self._service.restarts if limit is None else min(self._service.restarts, limit - self._before)
        return most - self._restarted()

    def _restarted(self) -> int:
        """Return how often that VM of this job was started again which was so most often."""
        if contract.process_from()[1] > 1:
            with contextlib.suppress(JobkitError):
                self._others = vm_member.restarts(self._store.bucket, self._job)
        return max([self._retries, *self._others.values()])

    def _lives_left(self) -> float:
        """Return how often the service starts this job again; as often as it wants where that is all the run may."""
        limit = None if self._spec.cloud is None else self._spec.cloud.max_restarts
        if limit is not None and limit - self._before <= self._service.restarts:
            return float("inf")
        return self._lives_here()

    def _hand_on(self, why: str) -> int | None:
        """Have a successor go on; return the exit code that ends this job, None if the run has to go on in it."""
        if run_status.has_ended(self._store) or (self._over_anywhere() or (State.REQUEUED,))[0] is not State.REQUEUED:
            return None
        restarts = self._before + self._restarted() + 1
        try:
            if not self._service.declared(self._store, self._job) and (lost := self._fruitless()) >= _FRUITLESS:
                raise ConfigError(f"{lost} VMs in a row were lost before they began an attempt")
            job = self._service.succeed(self._store, self._spec, self._job, restarts, self._write_down)
        except ConfigError as error:
            say(f"no successor: {error}")
            here = {"id": self._job, "backend": self._backend, "restarts": self._before}
            self._write_down("job", **here, refused=str(error))
            self._upload_ledger()
            return None
        except JobkitError as error:
            say(f"whether a successor was submitted is not known: {error}")
            return int(Exit.PREEMPTED)  # who comes up next asks again
        say(f"{why}; job {job} goes on: {self._backend} starts one job {self._service.restarts} times again at most")
        return int(Exit.DONE)

    def _fruitless(self) -> int:
        """Return how many VMs in a row, this one included, came up and have begun no attempt."""
        begun, count = len(self._store.numbers(contract.ATTEMPTS)), 0
        for event in reversed(run_status.events(self._store)):
            if event["event"] in ("submitted", "resumed"):
                break
            count += event["event"] == "job_started" and event.get("attempts") == begun
        return count

    def _upload_ledger(self) -> None:
        with contextlib.suppress(JobkitError):
            mirror.upload_ledger(self._quick.with_deadline(_UPLOAD_S))

    def _hand_back(self, why: str) -> int:
        """Have the service start the run again, in this job or in another one."""
        if self._lives_left() <= 1 and (code := self._hand_on(why)) is not None:
            return code
        return self._leave(f"{why}; {self._backend} starts the job again", Exit.PREEMPTED)

    def _leave(self, reason: str, code: int) -> int:
        if self._superseded() is None:
            return super()._leave(reason, code)
        say(reason)  # the ledger on the URL is another job's by now
        return int(code)

    def _remember(self) -> restart.Policy:
        policy = super()._remember()
        if self._spec.cloud is not None and self._spec.cloud.time_s is not None:
            used_s = sum(ended.duration_s for ended in self._history)
            self._limit_at = time.monotonic() + self._spec.cloud.time_s - used_s - self._spec.grace_s
        return policy

    def _follow(self, started: list[int]) -> int:
        # Of several processes only their supervisors' own word, on the URL, says that a run is done.
        return super()._follow(started) or (KILLED if contract.process_from()[1] > 1 else 0)

    def _go_on(self, decision: restart.Decision, why: Cause) -> int | None:
        if (over := self._over()) is not None and over[0] is not State.REQUEUED:
            return self._end(*over)
        if over is not None or (self._history[-1].outcome is Outcome.PREEMPTED and self._is_taken()):
            return self._hand_back(decision.reason)
        if contract.process_from()[1] > 1:  # another VM may be in its last life
            before = self._others
            if self._lives_left() <= 1 and (code := self._hand_on("another VM was lost")) is not None:
                return code
            if (gone := self._gone(before)) is not None:
                more = f"its restarts are used up; continue with: jobkit resume {self._store.url}"
                return self._end(State.FAILED, f"process {gone} did not come: {more}")
        return super()._go_on(decision, why)

    def _gone(self, before: Mapping[int, int]) -> int | None:
        """Return a process that the last attempt has waited for in vain, and whose VM the service does not start again.

        Args:
            before: As `_others` was when the attempt began: who came up since may not have known that there was one.
        """
        most = self._lives_here() + self._restarted()
        with contextlib.suppress(JobkitError):
            absent = gathering.absent(self._store.bucket, self._newest_attempt)
            return next((index for index in absent if before.get(index, 0) >= most), None)
        return None

    def _is_taken(self) -> bool:
        """Tell whether it was this VM that had to go, and not another one of several."""
        if contract.process_from()[1] == 1:
            return True
        own = read_json(self._store, contract.process_outcome(self._newest_attempt, 0)) or {}
        notice = own.get("notice") or {}
        return bool(notice.get("source", "peer") != "peer")

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
        return self._hand_back(reason) if state is State.REQUEUED else super()._end(state, reason)

    def over_here(self) -> int | None:
        """Return the exit code of a VM that takes part in attempts, if there are none to come in this job."""
        last = run_status.last_life_event(self._store)
        if last.get("event") == "ended":
            return self._code(last.get("state"))
        return None if self._later_job() is None else int(Exit.DONE)

    def _later_job(self) -> str | None:
        newest = (run_status.jobs(self._store, self._backend) or [self._job])[-1]
        return f"job {newest}" if newest != self._job else None

    def _superseded(self) -> str | None:
        return super()._superseded() or self._later_job()

    def _grace(self) -> dict[str, str]:
        return {contract.ENV_GRACE: f"{min(self._spec.grace_s, cloud_options.STOP_S):g}"}


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    """Serve a stop that comes before there is anything to save."""
    os._exit(Exit.PREEMPTED)


def task_of(environ: Mapping[str, str]) -> tuple[int, int]:
    """Read from the service's environment which VM of its job this is, and how many there are."""
    for index, count in (
        ("BATCH_TASK_INDEX", "BATCH_TASK_COUNT"),
        ("AWS_BATCH_JOB_NODE_INDEX", "AWS_BATCH_JOB_NUM_NODES"),
    ):
        if environ.get(index, "").isdecimal() and environ.get(count, "").isdecimal():
            return int(environ[index]), int(environ[count])
    return 0, 1


def main(arguments: list[str]) -> int:
    """Run a run's attempts in this VM.

    Args:
        arguments: The run.
    """
    for number in _STOPPING:
        signal.signal(number, _leave_at_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    job, backend = os.environ.get(contract.ENV_JOB), os.environ.get(contract.ENV_BACKEND, "")
    # Of what the job itself was given, not of the run directory: others may write there.
    lines = tuple(map(str, json.loads(os.environ.get(contract.ENV_SETUP) or "[]")))
    if len(arguments) != 1 or not job:
        raise ConfigError("this runs inside a job of a batch service: use jobkit submit --on gcp")
    for name in set(os.environ) - contract.handed_on(os.environ).keys():
        del os.environ[name]
    index, count = task_of(os.environ)
    if count > 1:  # each VM has a process of every attempt; the first one's runner claims and decides
        os.environ |= {contract.ENV_PROCESS: str(index), contract.ENV_PROCESSES: str(count)}
    # AWS counts attempts from 1, Google retries from 0.
    retries = int(os.environ.get("BATCH_TASK_RETRY_ATTEMPT") or int(os.environ.get("AWS_BATCH_JOB_ATTEMPT") or 1) - 1)
    try:
        if index == 0:
            store = open_run(arguments[0], patience_s=_PATIENCE_S)
        else:
            store = Store(arguments[0], deadline_s=_PATIENCE_S).of_process(index)
            mirror.fetch_described(store)
            vm_member.count_restart(store.bucket, job, index, retries)
    except StorageError as error:
        say(str(error))
        return int(Exit.PREEMPTED)  # perhaps another VM gets there
    spec = msgspec.structs.replace(specs.read(store), setup=lines)
    service = cast(Managed, registry.named(backend))
    runner = VmRunner(store, spec, job=job, service=service, retries=retries)
    return runner.run() if index == 0 else Member(store, runner, index).run()


if __name__ == "__main__":
    run_as_program(main)

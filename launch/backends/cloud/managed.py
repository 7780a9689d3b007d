"""Runs as jobs of a managed batch service: the verbs, the same for every service; what differs is abstract here.

A job's id is made of the run and of the number of the submit, and is in the ledger before the service hears of it. So a
submit that is killed anywhere and repeated never makes two jobs, and the launching side writes to the run's ledger only
while no VM does.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import msgspec

from jobkit import contract, faults
from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir import mirror
from jobkit.rundir.store import Store, is_remote
from jobkit.units import show_duration
from launch.lifecycle import run_status, submission
from launch.lifecycle.submission import (
    Plan,
    ask_to_cancel,
    cancel_content,
    new_run,
    open_run,
    prepare,
    record,
    record_resumed,
    who,
)
from launch.spec import cloud_options as cloud
from launch.spec import jobspec as specs
from launch.spec import snapshot
from launch.spec.cloud_options import Cloud
from launch.spec.jobspec import JobSpec

_POLL_S = 1.0
_HEARD_S = 15.0
"""How long a VM may take to hear of a cancel in the bucket, on top of the grace, before the service is told."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job as its service shows it.

    Args:
        id: As we chose it.
        state: The service's word.
        reason: Why it waits, or why it failed.
        active: Whether it may still do something.
        pending: Whether it waits for a VM.
    """

    id: str
    state: str
    reason: str = ""
    active: bool = False
    pending: bool = False


class Managed(ABC):
    """A batch service as a backend of ours."""

    name: str

    @abstractmethod
    def complete(self, spec: JobSpec) -> JobSpec:
        """Check what was asked and fill in what is left open; raises ConfigError; sends nothing that lasts."""

    @abstractmethod
    def request(self, store: Store, spec: JobSpec, job: str) -> dict[str, Any]:
        """Return what `create` sends."""

    @abstractmethod
    def create(self, store: Store, spec: JobSpec, job: str) -> None:
        """Create a job; one of that id that is there already is no error. Raises ConfigError if it is refused."""

    @abstractmethod
    def find(self, spec: JobSpec, job: str) -> Job | None:
        """Return a job, None if there is none; raises JobkitError if the service does not say."""

    @abstractmethod
    def stop(self, spec: JobSpec, job: str) -> None:
        """End a job; one that has ended is no error."""

    def shown(self, plan: Plan) -> str:
        """Return what a submit would send."""
        return json.dumps(self.request(plan.store, plan.spec, f"{name_of(plan.spec)}-0"), indent=2)

    def output(self, spec: JobSpec, job: str) -> list[str]:
        """Return what the service's own log has of a job, oldest first."""
        return []

    def printed(self, store: Store) -> list[str]:
        """Return what the service's own log has of a run's newest job."""
        jobs = run_status.jobs(store, self.name)
        return self.output(specs.read(store), jobs[-1]) if jobs else []

    def check(self, spec: JobSpec) -> Plan:
        """Check a specification and find the code; writes nothing.

        Raises:
            ConfigError: If it cannot work.
        """
        if not is_remote(spec.run):
            raise _unseen(spec.run or "a directory on this machine")
        return prepare(self._completed(spec), elsewhere=True)

    def completed(self, store: Store, spec: JobSpec) -> JobSpec:
        """Check what a run that exists is to have here, and fill in what is left open; raises ConfigError."""
        if store.remote is None:
            raise _unseen(store.url)
        return self._completed(spec)

    def _completed(self, spec: JobSpec) -> JobSpec:
        if spec.cloud is None:
            spec = msgspec.structs.replace(spec, cloud=Cloud())
        assert spec.cloud is not None
        cloud.check(spec.cloud, grace_s=spec.grace_s)
        return self.complete(spec)

    def submit(self, spec: JobSpec) -> Store:
        """Start a run as a job, or finish a submit of the same that was killed half-way.

        Durability: on return run.json is on the run's URL and the service has the job.

        Raises:
            ConfigError: If the specification cannot work, or the service refuses it; nothing is left behind then.
        """
        plan = self.check(spec)
        if (half := self._half_way(plan)) is not None:
            if self._newest(plan.store).state == "GONE":
                self._start(plan.store, half)
            return plan.store
        with new_run(plan, self.name) as (store, spec, lock):
            self._start(store, spec)
        lock.close()
        return store

    def _half_way(self, plan: Plan) -> JobSpec | None:
        """Return what the same submit, killed before it was through, has written; None if there is nothing of it."""
        store, old = plan.store, self._same(plan)
        if old is None or store.remote is None:
            return None
        if not store.remote.create(contract.RUN_JSON, store.read(contract.RUN_JSON)):
            return None
        if not run_status.last_life_event(store):
            record(store, "submitted", command=list(old.command), code=old.code, by=who())
        return old

    def refuse_taken(self, plan: Plan) -> None:
        """Raise ConfigError if a submit would find the run directory taken; writes nothing."""
        if self._same(plan) is None:
            submission.refuse_taken(plan)

    def _same(self, plan: Plan) -> JobSpec | None:
        """Return what is there of the same submit; None if that is nothing, or has come further than a submit comes."""
        store = plan.store
        if not specs.exists(store) or store.numbers(contract.ATTEMPTS) or store.exists(contract.CANCEL):
            return None
        old = specs.read(store)
        code = snapshot.digest(plan.tree) if plan.tree is not None else None
        same = old.same_job(msgspec.structs.replace(plan.spec, code=code)) and old.cloud == plan.spec.cloud
        last = run_status.last_life_event(store).get("event")
        if not same or last not in (None, "submitted") or specs.read_backend(store)[0] != self.name:
            return None
        job = self._newest(store)
        return old if job.active or job.state == "GONE" else None

    def _start(self, store: Store, spec: JobSpec) -> str:
        """Have the service start the run; return the job's id."""
        known = run_status.jobs(store, self.name)
        if known and self.find(spec, known[-1]) is None:
            job = known[-1]  # written down by a submit that got no further
        else:
            job = job_id(store, spec, len(known))
            record(store, "job", id=job, backend=self.name, by=who())
        mirror.carry_described(store)
        faults.reach("before_create")
        self.create(store, spec, job)
        faults.reach("after_create")
        return job

    def jobs_of(self, stores: Sequence[Store]) -> dict[str, Job]:
        """Return the newest job of each run, by the run's URL; UNKNOWN where the service does not answer."""
        return {store.url: self._newest(store) for store in stores}

    def _newest(self, store: Store) -> Job:
        job = (run_status.jobs(store, self.name) or [""])[-1]
        if not job or run_status.last_life_event(store).get("event") == "ended":
            return Job(id=job, state="GONE")
        try:
            return self.find(specs.read(store), job) or Job(id=job, state="GONE")
        except JobkitError as error:
            return Job(id=job, state="UNKNOWN", reason=str(error))

    def status(self, store: Store) -> run_status.Status:
        """Read what a run is doing."""
        return run_status.status(store, job=self._newest(store))

    def resume(self, url: str | os.PathLike[str], *, clear_cancel: bool = True) -> State:
        """Submit a job for a run that has none; what it committed is where it goes on.

        Raises:
            ConfigError: If the run is alive, or the service refuses.
        """
        store = open_run(url)
        spec = specs.read(store)
        cancel_seen = cancel_content(store)
        if self.status(store).state is State.DONE:
            return State.DONE
        self.refuse_alive(store)
        spec = self._completed(spec)
        if clear_cancel:
            submission.take_back_cancel(store, cancel_seen)
        record_resumed(store, afresh=True)
        self._start(store, spec)
        return State.QUEUED

    def refuse_alive(self, store: Store) -> None:
        """Raise ConfigError if a run has a job that is not over, or nobody can tell."""
        job = (run_status.jobs(store, self.name) or [""])[-1]
        try:
            found = self.find(specs.read(store), job) if job else None
        except JobkitError as error:
            raise ConfigError(f"cannot tell whether run {store.url} is alive: {error}") from None
        if found is not None and found.active:
            raise ConfigError(
                f"run {store.url} is alive: job {job} is {found.state.lower()}: 'jobkit logs -f {store.url}' or "
                f"'jobkit cancel {store.url}'"
            )

    def cancel(
        self,
        url: str | os.PathLike[str],
        *,
        wait: bool = True,
        word: str = "cancelled",
        progress: Callable[[str], None] = lambda text: None,
    ) -> State:
        """End a run for good: the VM finds the cancel in the bucket, saves and stops; else the service insists.

        Durability: on return cancel.json is on the run's URL; nothing overrules it but `resume`.

        Raises:
            ConfigError: If the run is already done.
            JobkitError: If the service does not answer; the cancel stands all the same.
        """
        store = open_run(url)
        spec = specs.read(store)
        if self.status(store).state is State.DONE:
            raise ConfigError(f"run {store.url} is already done; there is nothing to cancel")
        content = ask_to_cancel(store, word)
        asked, told = time.monotonic(), ""
        while (job := self._newest_of(spec, store)) is not None and job.active:
            late = time.monotonic() - asked > spec.grace_s + _HEARD_S
            if (job.pending or late) and told != job.id:
                told = job.id
                self.stop(spec, job.id)
            elif wait and not told:
                told = "waiting"
                progress(f"waiting for job {job.id} to save and stop (killed after {show_duration(spec.grace_s)})")
            if not wait:
                return self.status(store).state
            time.sleep(_POLL_S)
        with contextlib.suppress(JobkitError):
            submission.refresh(store)
        submission.end_cancelled(store, content)
        return self.status(store).state

    def _newest_of(self, spec: JobSpec, store: Store) -> Job | None:
        job = (run_status.jobs(store, self.name) or [""])[-1]
        return self.find(spec, job) if job else None


@dataclasses.dataclass(frozen=True)
class Service:
    """A batch service, and what jobs ask of it, for `launch.submit(..., on=...)`.

    Args:
        cloud: What the job asks for.
    """

    cloud: Cloud = dataclasses.field(default_factory=Cloud)
    batch: ClassVar[Managed]

    def submit(self, spec: JobSpec) -> Store:
        """See `Managed.submit`."""
        return self.batch.submit(msgspec.structs.replace(spec, cloud=self.cloud))


def _unseen(url: str) -> ConfigError:
    return ConfigError(f"a VM does not see {url}: give a run directory in a bucket, such as --run gs://BUCKET/run")


def job_id(store: Store, spec: JobSpec, number: int) -> str:
    """Return the id of a run's job: `name-hash-number`, as every service takes it."""
    made = hashlib.sha256(f"{store.url} {specs.read_backend(store)[1]!r}".encode()).hexdigest()
    return f"{name_of(spec)}-{made[:10]}-{number}"


def name_of(spec: JobSpec) -> str:
    """Return a run's name as services take it."""
    name = re.sub("[^a-z0-9]+", "-", spec.name.lower()).strip("-")[:40].strip("-")
    return name if name and name[0].isalpha() else f"run-{name}".strip("-")

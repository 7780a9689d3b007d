"""Runs as jobs of a managed batch service: what is the same for every service; what differs is abstract here.

A job's id is made of the run and of the number of the submit, and is in the ledger before the service hears of it. So a
submit that is killed anywhere and repeated never makes two jobs, and the launching side writes to the run's ledger only
while no VM does.
"""

import contextlib
import hashlib
import itertools
import json
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from jobkit import contract, faults
from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError, say
from jobkit.rundir import mirror
from jobkit.rundir.ledger import Event
from jobkit.rundir.store import Store, is_remote
from jobkit.units import show_duration
from launch.backends import after
from launch.backends.cloud import points
from launch.lifecycle import run_status, submission
from launch.lifecycle.history import count_of
from launch.lifecycle.run_status import Job
from launch.lifecycle.submission import Plan, cancel_content, prepare, record, who
from launch.lifecycle.verbs import Backend, Cancelled, UnknownError, alive
from launch.spec import cloud_options
from launch.spec import jobspec as specs
from launch.spec.cloud_options import Cloud
from launch.spec.finding import Finding
from launch.spec.jobspec import JobSpec
from launch.spec.profiles import refuse_foreign

_POLL_S = 1.0
_HEARD_S = 15.0
"""How long a VM may take to hear of a cancel in the bucket, on top of the grace, before the service is told."""


OPTIONS = frozenset({
    "ntasks-per-node", "time", "region", "gpus", "max-restarts", "env", "secret", "label", "service-account", "setup",
})  # fmt: skip
"""Of `Backend.options` what every service has."""
_SCHEMES = ("gs", "gcs", "s3", "s3a")
COMMAND = ("env", "--block-signal=TERM,INT", "python3", "-P", "-m", "launch.backends.cloud.vm_job")
"""What the container runs, with the run's URL. To PID 1 a signal without a handler is lost: `env` holds them back."""


class Managed(Backend):
    """A batch service as a backend; what differs between services is abstract here.

    Args:
        cloud: What its jobs ask for; by default what the specification has.
    """

    scheme: ClassVar[str]
    """Of the URLs of the buckets that its jobs are signed in to."""
    restarts: ClassVar[int]
    """How often the service starts one job again at most; then a successor goes on."""

    def __init__(self, cloud: Cloud | None = None) -> None:
        self._cloud = cloud

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
    def terminate(self, spec: JobSpec, job: str) -> None:
        """End a job; one that has ended is no error."""

    @abstractmethod
    def diagnose(self, spec: JobSpec) -> list[Finding]:
        """Say what a submit of a completed specification would come upon; image and run may be empty."""

    def remarks(self, spec: JobSpec) -> list[str]:
        """Return what a person should know of a run that has just been submitted."""
        return []

    def examine(self, spec: JobSpec) -> list[Finding]:
        """See `Backend`."""
        cloud = spec.cloud or Cloud()
        if cloud.image:
            cloud_options.check(cloud, grace_s=spec.grace_s)
        return self.diagnose(self.complete(msgspec.structs.replace(spec, cloud=cloud)))

    def output(self, spec: JobSpec, job: str) -> list[str]:
        """Return what the service's own log has of a job, oldest first."""
        return []

    def service_log(self, store: Store) -> list[str]:
        """See `Backend`."""
        jobs = run_status.jobs(store, self.name)
        return self.output(specs.read(store), jobs[-1]) if jobs else []

    def preview(self, plan: Plan) -> str:
        """Return the request that a submit would send; of a sweep that of its first point."""
        store, spec = plan.store, plan.spec
        if spec.sweep:
            store, spec = specs.points(store, spec)[0], spec.point(0)
        return json.dumps(self.request(store, spec, f"{name_of(spec)}-0"), indent=2)

    def check(self, spec: JobSpec, *, look: bool = True) -> Plan:
        """See `Backend`."""
        after.check_backend(self, spec)
        if self._cloud is not None:
            spec = msgspec.structs.replace(spec, cloud=self._cloud)
        if not is_remote(spec.run):
            raise self._unseen(spec.run or "a directory on this machine")
        if (scheme := spec.run.partition("://")[0]) != self.scheme and scheme in _SCHEMES:
            say(
                f"jobs on {self.name} are not signed in where {spec.run} is: give --run {self.scheme}://BUCKET/run, or "
                "have --secret sign them in"
            )
        return prepare(self._completed(spec), elsewhere=True, look=look)

    def _unseen(self, url: str) -> ConfigError:
        return ConfigError(
            f"a VM does not see {url}: give a run directory in a bucket, such as --run {self.scheme}://BUCKET/run"
        )

    def fit(self, store: Store, spec: JobSpec, *, moved: bool) -> JobSpec:
        """See `Backend`."""
        if store.remote is None:
            raise self._unseen(store.url)
        after.check_resumed(self, store, spec)
        return self._completed(spec)

    def _completed(self, spec: JobSpec) -> JobSpec:
        refuse_foreign(spec, self.name, self.options)
        cloud = spec.cloud or Cloud()
        cloud_options.check(cloud, grace_s=spec.grace_s)
        return self.complete(msgspec.structs.replace(spec, cloud=cloud))

    def finish(self, plan: Plan) -> bool:
        """See `Backend`: a submit of the same that was killed before it was through."""
        store, old = plan.store, self._same(plan)
        if old is None or store.remote is None:
            return False
        if not store.remote.create(contract.RUN_JSON, store.read(contract.RUN_JSON)):
            return False
        if not run_status.last_life_event(store):
            record(store, "submitted", command=list(old.command), code=old.code, by=who())
        if self._newest(store).state == "GONE":
            again = msgspec.structs.replace(old, setup=plan.spec.setup)  # run.json never has its lines
            self.enqueue(store, again, range(len(specs.points(store, old))))
        return True

    def refuse_taken(self, plan: Plan) -> None:
        """See `Backend`."""
        if self._same(plan) is None:
            submission.refuse_taken(plan)

    def _same(self, plan: Plan) -> JobSpec | None:
        """Return what is there of the same submit; None if that is nothing, or has come further than a submit comes."""
        store = plan.store
        if not specs.exists(store) or store.numbers(contract.ATTEMPTS) or store.exists(contract.CANCEL):
            return None
        file = specs.read_file(store)
        old = file.spec
        same = old.same_job(plan.coded) and old.cloud == plan.spec.cloud
        digest = specs.setup_digest(plan.spec.setup) if plan.spec.setup else ""
        same = same and old.setup_digest == digest
        last = run_status.last_life_event(store).get("event")
        if not same or last not in (None, "submitted") or file.backend != self.name:
            return None
        if old.sweep:
            members = specs.points(store, old)
            jobs = self.jobs(members) if all(map(specs.exists, members)) else {}
            whole = [one for one in members if one.url in jobs and jobs[one.url].state != "GONE"]
            through = (one in whole or run_status.has_ended(one) or points.behind(one) is not None for one in members)
            return None if all(through) else old  # a lane that was left where it is goes on by a resume
        job = self._newest(store)
        return old if job.active or job.state == "GONE" else None

    def enqueue(self, store: Store, spec: JobSpec, numbers: Sequence[int]) -> None:
        """See `Backend`: a job, of a sweep one for each point, each in the ledger before the service hears of it."""
        if spec.sweep:
            points.enqueue(store, spec, numbers, self.submit_once, self._end)
        else:
            self.submit(store, spec)
        for line in self.remarks(spec):
            say(line)

    def submit_once(self, store: Store, spec: JobSpec) -> None:
        """Submit a job of a run, unless it has one since a person has submitted or resumed it."""
        known = next(_jobs_back(store), {})
        if not known or self.find(spec, str(known["id"])) is None:
            self.submit(store, spec)

    def _end(self, stores: Sequence[Store], spec: JobSpec) -> None:
        """End jobs that were submitted a moment ago, and wait a while until none of their VMs writes any more."""
        jobs = [str(event["id"]) for store in stores for event in _jobs_back(store)]
        for job in jobs:
            with contextlib.suppress(JobkitError):
                self.terminate(spec, job)
        deadline = time.monotonic() + spec.grace_s + _HEARD_S
        while (jobs := [job for job in jobs if self._may_run(spec, job)]) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _may_run(self, spec: JobSpec, job: str) -> bool:
        try:
            found = self.find(spec, job)
        except JobkitError:
            return True
        return found is not None and found.active

    def submit(self, store: Store, spec: JobSpec) -> None:
        """Submit a job of a run."""
        known = run_status.jobs(store, self.name)
        meant = bool(known) and self.find(spec, known[-1]) is None  # by a submit that got no further
        job = known[-1] if meant else job_id(store, spec, len(known))
        if next(_jobs_back(store), {}).get("id") != job:  # since a person has submitted or resumed the run
            record(store, "job", id=job, backend=self.name, by=who())
        mirror.upload_described(store)
        faults.reach("before_create")
        try:
            self.create(store, spec, job)
            faults.reach("after_create")
        except KeyboardInterrupt:  # whoever asked for it sees to the run, and the service may have the job
            with contextlib.suppress(JobkitError):
                self.terminate(spec, job)
            raise

    def declared(self, store: Store, job: str) -> str:
        """Return the successor that a job of a run has written down; '' for none."""
        last = next(_jobs_back(store), {})
        return str(last["id"]) if job and last.get("after") == job else ""

    def succeed(self, store: Store, spec: JobSpec, job: str, restarts: int, write_down: Callable[..., None]) -> str:
        """Have another job go on with a run, from inside the job that it has; return the new one's id.

        Its id is in the run's ledger, on the URL too, before the service hears of it: whoever is killed and calls this
        again makes no second one.

        Args:
            store: The run.
            spec: What was submitted, with the lines of `--setup`.
            job: The job that it has.
            restarts: How often VMs of the run have been replaced, this time included.
            write_down: Appends to the run's ledger.

        Raises:
            ConfigError: If the service refuses.
            JobkitError: If it does not answer; whether it has made the job is not known then.
        """
        if not (successor := self.declared(store, job)):
            successor = job_id(store, spec, len(run_status.jobs(store, self.name)))
            write_down("job", id=successor, backend=self.name, after=job, restarts=restarts)
        mirror.upload_ledger(store)
        cloud = spec.cloud or Cloud()
        if cloud.max_restarts is not None:
            left = max(0, cloud.max_restarts - restarts_before(store, successor))
            cloud = msgspec.structs.replace(cloud, max_restarts=left)
        faults.reach("before_create")
        self.create(store, msgspec.structs.replace(spec, cloud=cloud), successor)
        faults.reach("after_create")
        return successor

    def jobs(self, stores: Sequence[Store]) -> Mapping[str, Job]:
        """See `Backend`."""
        jobs = {store.url: self._newest(store) for store in stores}
        for store in stores:
            if jobs[store.url].state == "GONE" and points.behind(store) is not None:
                jobs[store.url] = self._in_lane(store, jobs)
        return jobs

    def _in_lane(self, store: Store, known: Mapping[str, Job]) -> Job:
        """Return what stands for the job of a point that is submitted once another one is over."""
        before = points.behind(store)
        while before is not None:
            job = known.get(before.url)
            if job is None or job.state == "GONE":  # one that has ended may be about to submit this one
                try:
                    job = self._asked(before)
                except JobkitError as error:
                    return Job("", "UNKNOWN", str(error))
            if job is not None and job.active:
                number = before.url.rpartition("/")[2]
                return Job("", "WAITING", f"waits until point {number} is over", active=True, pending=True)
            before = points.behind(before, passed=True)
        with contextlib.suppress(JobkitError):
            submission.refresh(store)  # the one before has just submitted it, or nobody will
        return self._newest(store)

    def _newest(self, store: Store) -> Job:
        job = (run_status.jobs(store, self.name) or [""])[-1]
        try:
            asked = None if run_status.has_ended(store) else self._asked(store)
            return asked or Job(id=job, state="GONE")
        except JobkitError as error:
            return Job(id=job, state="UNKNOWN", reason=str(error))

    def refuse_alive(self, store: Store, *, take_over: bool = False) -> None:
        """See `Backend`."""
        spec = specs.read(store)
        for one in filter(specs.exists, specs.points(store, spec)):
            if spec.sweep and run_status.has_ended(one, State.DONE):  # it is not resumed, and its job is leaving
                continue
            try:
                job = self._asked(one) or (self._in_lane(one, {}) if points.behind(one) else None)
            except JobkitError as error:
                raise UnknownError(f"cannot tell whether run {one.url} is alive: {error}") from None
            if job is not None and job.active:
                raise alive(one, job)

    def _asked(self, store: Store) -> Job | None:
        """Ask the service for a run's newest job; raises JobkitError if it does not say."""
        jobs, file = run_status.jobs(store, self.name), specs.read_file(store)
        # Where the run is on another backend what it had here was over when it moved, and nobody knows where it was.
        if not jobs or file.backend != self.name:
            return None
        job = self._known(store, file.spec, jobs)
        if job is None or not job.active:  # its successor may have been written down since the ledger was read
            with contextlib.suppress(JobkitError):
                submission.refresh(store)
            if run_status.jobs(store, self.name) != jobs:
                return self._asked(store)
        return job

    def _known(self, store: Store, spec: JobSpec, jobs: Sequence[str]) -> Job | None:
        """Return the newest job that the service knows: a successor is written down a moment before that does."""
        newest = self.find(spec, jobs[-1])
        if newest is not None or jobs[-1] != self.declared(store, before := (*jobs[-2:-1], "")[0]):
            return newest
        earlier = self.find(spec, before)
        return earlier if earlier is not None and earlier.active else self.find(spec, jobs[-1]) or earlier

    def stop(self, cancelled: Cancelled) -> None:
        """See `Backend`: the VM finds the cancel in the bucket, saves and stops; else the service insists."""
        for store in filter(specs.exists, cancelled.left):
            self._stop(store, cancelled)

    def _stop(self, store: Store, cancelled: Cancelled) -> None:
        wait, spec = cancelled.wait, specs.read(store)
        asked, last_action = time.monotonic(), ""
        alone = bool(spec.sweep_url) and store is cancelled.store
        # Until nothing runs, or somebody takes the cancel back: the job of a resume is not ended.
        while cancel_content(store) is not None and (job := self._asked(store)) is not None and job.active:
            late = time.monotonic() - asked > spec.grace_s + _HEARD_S
            if (job.pending or late) and last_action != job.id:
                last_action = job.id
                self.terminate(spec, job.id)
            elif wait and not last_action:
                last_action = "waiting"
                grace = show_duration(spec.grace_s)
                cancelled.progress(f"waiting for job {job.id} to save and stop (killed after {grace})")
            if not wait and not (alone and last_action == job.id):
                return
            if not wait and late:  # of a job without a VM nobody else has the next one of its lane begin
                say(f"job {job.id} has not ended yet; the next point begins with: jobkit cancel {store.url}")
                return
            time.sleep(_POLL_S)
        with contextlib.suppress(JobkitError):
            submission.refresh(store)
        alone = alone and points.has_job(store)
        submission.end_cancelled(store, cancelled.cancels[store])
        if alone and run_status.has_ended(store):  # there was no VM that could have the next one begin
            points.start_next(store, self._submit_from_here)

    def _submit_from_here(self, store: Store, spec: JobSpec) -> None:
        if spec.setup_digest:
            raise ConfigError(f"its lines of --setup are not known here; continue with: jobkit resume {store.url}")
        self.submit_once(store, spec)


def command(store: Store, spec: JobSpec) -> list[str]:
    """Return what the container runs: behind the lines of `--setup`, which are bash, where there are any."""
    if not spec.setup:
        return [*COMMAND, store.url]
    script = "\n".join([*spec.setup, 'exec "$@"'])
    return [*COMMAND[:2], "bash", "-c", script, "setup", *COMMAND[2:], store.url]


def variables(spec: JobSpec, job: str, backend: str) -> dict[str, str]:
    """Return the environment of a job's container: the user's, who it is, and what its successor is to begin with."""
    assert spec.cloud is not None
    setup = {contract.ENV_SETUP: json.dumps(spec.setup)} if spec.setup else {}
    return spec.cloud.env | {contract.ENV_JOB: job, contract.ENV_BACKEND: backend} | setup


def restarts_before(store: Store, job: str) -> int:
    """Return how often VMs of a run were replaced before a job began, since a person has submitted or resumed it."""
    return next((count_of(event.get("restarts")) or 0 for event in _jobs_back(store) if event["id"] == job), 0)


def _jobs_back(store: Store) -> Iterator[Event]:
    """Yield what was written down of jobs, newest first, back to when a person has submitted or resumed the run."""
    life = [event for event in run_status.events(store) if event["event"] in ("submitted", "resumed", "job")]
    return itertools.takewhile(lambda event: event["event"] == "job", reversed(life))


def job_id(store: Store, spec: JobSpec, number: int) -> str:
    """Return the id of a run's job: `name-hash-number`, as every service takes it."""
    made = hashlib.sha256(f"{store.url} {specs.read_file(store).created!r}".encode()).hexdigest()
    return f"{name_of(spec)}-{made[:10]}-{number}"


def name_of(spec: JobSpec) -> str:
    """Return a run's name as services take it."""
    name = re.sub("[^a-z0-9]+", "-", spec.name.lower()).strip("-")[:40].strip("-")
    return name if name and name[0].isalpha() else f"run-{name}".strip("-")

"""A small Google Batch on this machine, which executes what it is asked to run.

It speaks the API of jobs (create, get, list, cancel, delete, tasks) and of their log; what it is sent is checked by the
types of the real client, whose `Job.from_json` knows every field. Each task of a job runs as processes with a disk and
the metadata server of a VM of its own; a preemption comes as on a real one: `instance/preempted` becomes TRUE, the
container gets SIGTERM, and what is left after the grace is killed with the VM, exit code 50001. A task is started again
by `lifecyclePolicies` and `maxRetryCount`, whatever the others do. A VM may submit jobs itself, with the token of its
account, if that has a role for it.

    with GcsServer() as gcs, BatchServer(gcs.environment()) as batch:
        batch.environment  # for jobkit, and for google-auth
        batch.preempt(batch.only_job(), grace_s=30)
"""

import contextlib
import json
import re
import secrets
import shutil
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from google.cloud import batch_v1

from tests.fakes.batch_vm import Executor, Machine, Processes, Vm
from tests.fakes.gcp_project import DEFAULT, Project, RefusedError
from tests.fakes.metadata_server import Gce

PREEMPTED, TIMED_OUT = 50001, 50005
"""Exit codes that Batch itself reports: its documentation, "Troubleshooting"."""
MACHINE_TYPES = ("e2-standard-4", "g2-standard-8", "n1-standard-8", "a2-highgpu-1g")
_APIS = ("BATCH", "LOGGING", "SERVICEUSAGE", "CLOUDRESOURCEMANAGER", "IAM", "ARTIFACTREGISTRY", "COMPUTE")
_ACT_AS = "iam.serviceAccountUser"
REGIONS = ("us-central1", "europe-west4")


class Task(Machine):
    """A task of a job, each on a VM of its own, and the thread that executes it."""

    def __init__(self, job: "Job", index: int) -> None:
        self.job, self.index = job, index
        self.lives = job.server.lives.get(index, 0) if isinstance(job.server.lives, dict) else job.server.lives
        self.codes = [PREEMPTED] * self.lives
        self.state = "PENDING"
        self.thread = threading.Thread(target=self._run, name=f"{job.id}/{index}", daemon=True)

    def resource(self) -> dict[str, Any]:
        """Return it as the API does; an event of a success carries no exit code."""
        events: list[dict[str, Any]] = [
            {"type": "STATUS_CHANGED", "taskState": "FAILED", "description": f"Task state is updated: {code}",
             "taskExecution": {"exitCode": code}} if code else {"type": "STATUS_CHANGED", "taskState": "SUCCEEDED"}
            for code in self.codes
        ]  # fmt: skip
        name = f"{self.job.name}/taskGroups/group0/tasks/{self.index}"
        return {"name": name, "status": {"state": self.state, "statusEvents": events}}

    def _run(self) -> None:
        spec = self.job.asked["taskGroups"][0]["taskSpec"]
        for attempt in range(self.lives, int(spec.get("maxRetryCount", 0)) + 1):
            if self.job.cancelled.wait(self.job.server.boot_s):
                return
            code = self._execute(spec, attempt)
            self.codes.append(code)
            self.state = "FAILED" if code else "SUCCEEDED"
            if self.job.cancelled.is_set() or not self._retries(spec, code):
                return
            if attempt < int(spec.get("maxRetryCount", 0)):
                self.state = "PENDING"

    @staticmethod
    def _retries(spec: dict[str, Any], code: int) -> bool:
        """Tell whether a task is started again: any failure is, unless policies name codes."""
        policies = spec.get("lifecyclePolicies", [])
        named = [policy for policy in policies if code in policy["actionCondition"].get("exitCodes", [])]
        return code != 0 and (named[0]["action"] == "RETRY_TASK" if named else not policies)

    def _execute(self, spec: dict[str, Any], attempt: int) -> int:
        given, server, count = spec.get("environment", {}), self.job.server, len(self.job.members)
        environment = server.given | given.get("variables", {}) | {"BATCH_TASK_RETRY_ATTEMPT": str(attempt)}
        environment |= {"BATCH_TASK_INDEX": str(self.index), "BATCH_TASK_COUNT": str(count)}
        for name, secret in given.get("secretVariables", {}).items():
            environment[name] = server.secrets[secret]
        container = spec["runnables"][0]["container"]
        vm = Vm(self.job.id, container, environment)
        vm.metadata.token = f"ya29.{self.job.uid}.{self.index}.{attempt}"
        limit = spec.get("maxRunDuration", "")
        until = time.monotonic() + (float(limit.rstrip("s")) if limit else float("inf"))
        try:
            self.vm = vm
            running = server.executor.start(vm, self.job.log)
            self.container, self.state = running, "RUNNING"
            while (code := running.wait(0.02)) is None:
                if time.monotonic() > until:
                    vm.lost = TIMED_OUT
                    running.kill()
            running.kill()  # what it left; a container has nothing when its PID 1 is gone
            return vm.lost or code
        finally:
            self.vm, self.container = None, None
            vm.close()


class Job:
    """A job of one task or several, and the thread that sees to them."""

    def __init__(self, server: "BatchServer", name: str, asked: dict[str, Any]) -> None:
        self.server, self.name, self.asked = server, name, asked
        self.id = name.rpartition("/")[2]
        self.uid = f"{self.id[:20]}-{secrets.token_hex(8)}"
        self.created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.state = "QUEUED"
        self.events: list[dict[str, Any]] = []
        self.log = server.folder / f"{self.id}.log"
        self.log.touch()
        self.cancelled = threading.Event()
        self.members = [Task(self, index) for index in range(int(asked["taskGroups"][0].get("taskCount", 1)))]
        server.lives = 0
        self.thread = threading.Thread(target=self._run, name=self.id, daemon=True)

    @property
    def codes(self) -> list[int]:
        """How the lives of its first task have ended."""
        return self.members[0].codes

    @property
    def over(self) -> bool:
        """Whether nothing happens to it any more."""
        return self.state in ("SUCCEEDED", "FAILED", "CANCELLED")

    def resource(self) -> dict[str, Any]:
        """Return it as the API does."""
        tasks = [] if self.state in ("QUEUED", "SCHEDULED") else [task.state for task in self.members]
        counts = {state: str(tasks.count(state)) for state in tasks}
        status = {"state": self.state, "statusEvents": self.events, "taskGroups": {"group0": {"counts": counts}}}
        return self.asked | {"name": self.name, "uid": self.uid, "createTime": self.created, "status": status}

    def tasks(self) -> dict[str, Any]:
        """Return its tasks."""
        return {"tasks": [task.resource() for task in self.members]}

    def _to(self, state: str, why: str = "") -> None:
        said = f"Job state is set from {self.state} to {state} for job {self.name}. {why}".strip()
        self.events.append({"type": "STATUS_CHANGED", "description": said})
        self.state = state

    def _run(self) -> None:
        if self.cancelled.wait(self.server.queue_s):
            return self._to("CANCELLED")
        self._to("SCHEDULED")
        self._to("RUNNING")
        for task in self.members:
            task.thread.start()
        for task in self.members:  # whether Batch lets the others run on where one has failed for good is not written
            task.thread.join()
        time.sleep(self.server.settle_s)
        if self.cancelled.is_set():
            return self._to("CANCELLED")
        failed = [task.codes[-1] for task in self.members if task.state != "SUCCEEDED"]
        if failed:
            return self._to("FAILED", f"due to task failure with exit code {failed[0]}")
        return self._to("SUCCEEDED")

    def stop(self, grace_s: float) -> None:
        """Ask what runs to stop; pull the plug after a while."""
        for task in self.members:
            threading.Thread(target=task.stop, args=(grace_s,), daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Listener"

    def handle(self) -> None:
        """Serve a connection; one that was killed is no error."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def _serve(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(parts.query)
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length)
        batch = self.server.batch
        try:
            batch.requests.append(f"{self.command} {parts.path}")
            vm = batch.authorized(self.headers.get("Authorization", ""))
            submits = vm is not None and self.command == "POST" and parts.path.endswith("/jobs")
            if submits:
                batch.may_submit()
            when = batch.lose_at_submit.pop(0) if submits and batch.lose_at_submit else ""
            if vm is not None and when == "before":
                return self._hang_up(vm)
            told = batch.cloud.answer(self.command, parts.path, query, content)
            last = {key: values[-1] for key, values in query.items()}
            answer, code = batch.answer(self.command, parts.path, last, content) if told is None else told, 200
        except RefusedError as refusal:
            answer, code, when = refusal.body(), refusal.code, ""
        if vm is not None and when == "after":
            return self._hang_up(vm)
        if batch.lose_answers > 0 and self.command == "POST":
            batch.lose_answers -= 1
            return self._hang_up()
        written = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(written)))
        self.end_headers()
        self.wfile.write(written)
        return None

    def _hang_up(self, vm: Task | None = None) -> None:
        """Answer nothing, and take a VM away."""
        self.close_connection = True
        if vm is not None:
            self.server.batch.power_off(vm.job, vm.index)

    do_GET = do_POST = do_DELETE = _serve  # noqa: N815 - the names are http.server's

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, batch: "BatchServer") -> None:
        self.batch = batch
        super().__init__(("127.0.0.1", 0), _Handler)


class BatchServer:
    """Google Batch and Cloud Logging on a port of this machine, for one project.

    Args:
        given: Environment of every container, beside what the job says: what leads it to the emulated bucket.
        executor: What runs containers.
        queue_s, boot_s: How long a job waits, and a VM takes to boot.
        settle_s: How long a job is RUNNING after its task has ended.
        project: The one project that may be used.
    """

    def __init__(
        self,
        given: Mapping[str, str],
        *,
        executor: Executor | None = None,
        queue_s: float = 0.0,
        boot_s: float = 0.0,
        settle_s: float = 0.0,
        project: str = "test-project",
    ) -> None:
        self.given = dict(given) | {"NO_GCE_CHECK": "false"}
        self.executor = executor or Processes()
        self.queue_s, self.boot_s, self.settle_s, self.project = queue_s, boot_s, settle_s, project
        self.folder = Path(tempfile.mkdtemp(prefix="jobkit-test-batch-"))
        self.jobs: dict[str, Job] = {}
        self.secrets: dict[str, str] = {}
        self.requests: list[str] = []
        self.refusals: list[RefusedError] = []
        """What the next requests are answered with, each once."""
        self.lose_answers = 0
        """How many of the next POSTs are served but never answered."""
        self.lives: int | dict[int, int] = 0
        """How many VMs the next job that is created has lost already; of each of its tasks, or of those by number."""
        self.lose_at_submit: list[str] = []
        """When VMs that submit jobs go, one each: 'before' the service hears of it, or 'after', before the answer."""
        self._asked: dict[str, Job] = {}
        self._lock = threading.Lock()
        self.cloud = Project(project, REGIONS)
        """What its other APIs tell of the project."""
        self.account = Gce(project=project)
        """Where the user's own credentials come from."""
        self._listener = _Listener(self)
        self.url = f"http://127.0.0.1:{self._listener.server_address[1]}"
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.given["CLOUDSDK_API_ENDPOINT_OVERRIDES_BATCH"] = self.url

    @property
    def environment(self) -> dict[str, str]:
        """What leads jobkit and google-auth here."""
        where = {f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{name}": self.url for name in _APIS}
        return where | self.account.environment | {"NO_GCE_CHECK": "false", "CLOUDSDK_CONFIG": "/nonexistent"}

    def __enter__(self) -> "BatchServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every job and stop listening."""
        for job in self.jobs.values():
            job.cancelled.set()
            for task in job.members:
                container = task.container
                if container is not None:
                    container.kill()
            job.thread.join(20)
        self._listener.shutdown()
        self._listener.server_close()
        self.account.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def only_job(self) -> Job:
        """Return the one job there is."""
        (job,) = self.jobs.values()
        return job

    def preempt(self, job: Job, index: int = 0, *, grace_s: float = 30.0, notice_s: float = 0.0) -> None:
        """Take a job's VM away.

        Args:
            job: The job, which must run.
            index: Of the task whose VM it is.
            grace_s: Seconds from SIGTERM until the VM is off.
            notice_s: Seconds from the notice in the metadata until SIGTERM.
        """
        task = job.members[index]
        vm = task.vm
        assert vm is not None, f"task {index} of {job.id} has no VM: {job.state}, {task.state}"
        vm.metadata.preempt()
        until = time.monotonic() + notice_s
        while task.vm is vm and time.monotonic() < until:
            time.sleep(0.02)
        if task.vm is vm:
            task.stop(grace_s, lost=PREEMPTED)

    def power_off(self, job: Job, index: int = 0) -> None:
        """Take the VM of a job's task away without a word."""
        task = job.members[index]
        assert task.vm is not None
        assert task.container is not None
        task.vm.lost = PREEMPTED
        task.container.kill()

    # The API.

    def authorized(self, header: str) -> Task | None:
        """Return the task whose VM asks, None for the user; the real client comes without a token in tests.

        Raises:
            RefusedError: If the token is nobody's.
        """
        if not header or header == f"Bearer {self.account.token}":
            return None
        for task in (task for job in self.jobs.values() for task in job.members):
            vm = task.vm
            if vm is not None and header == f"Bearer {vm.metadata.token}":
                return task
        raise RefusedError(401, "UNAUTHENTICATED", "Request had invalid authentication credentials.")

    def may_submit(self) -> None:
        """Refuse a VM whose account has no role that lets it submit jobs which act as itself."""
        for permission, role in (("batch.jobs.create", "batch.jobsEditor"), ("iam.serviceAccounts.actAs", _ACT_AS)):
            if not self.cloud.roles_of(DEFAULT) & {f"roles/{role}", "roles/editor"}:
                raise RefusedError(403, "PERMISSION_DENIED", f"Permission '{permission}' denied on resource.")

    def answer(self, method: str, path: str, query: dict[str, str], content: bytes) -> dict[str, Any]:
        """Answer one request."""
        if self.refusals:
            raise self.refusals.pop(0)
        if path == "/v2/entries:list":
            return self._entries(json.loads(content))
        found = re.fullmatch(
            r"/v1/projects/([^/]+)/locations/([^/]+)/jobs(?:/([^/:]+))?(:cancel|/taskGroups/group0/tasks)?", path
        )
        if found is None:
            raise RefusedError(404, "NOT_FOUND", f"{path} was not found")
        project, region, job, more = found.groups()
        if project != self.project:
            raise RefusedError(403, "PERMISSION_DENIED", f"Permission denied on resource project {project}.")
        if region not in REGIONS:
            raise RefusedError(404, "NOT_FOUND", f"Location {region} is not found or access is unauthorized.")
        parent = f"projects/{project}/locations/{region}/jobs"
        if job is None:
            return self._create(parent, query, content) if method == "POST" else self._list(query)
        known = self.jobs.get(f"{parent}/{job}")
        if known is None:
            raise RefusedError(404, "NOT_FOUND", f"Resource '{parent}/{job}' was not found")
        if more == ":cancel":
            return self._cancel(known)
        if method == "DELETE":
            self._cancel(known)
            del self.jobs[known.name]
            return {"done": True}
        return known.tasks() if more else known.resource()

    def _create(self, parent: str, query: dict[str, str], content: bytes) -> dict[str, Any]:
        asked = checked(content)
        job = query.get("jobId", "")
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", job):
            raise RefusedError(400, "INVALID_ARGUMENT", f"Invalid job id {job!r}.")
        _check(asked, parent.split("/")[3])
        with self._lock:
            if query.get("requestId", "") in self._asked:
                return self._asked[query["requestId"]].resource()
            name = f"{parent}/{job}"
            if name in self.jobs:
                raise RefusedError(409, "ALREADY_EXISTS", f"Resource '{name}' already exists")
            made = self.jobs[name] = Job(self, name, asked)
            if "requestId" in query:
                self._asked[query["requestId"]] = made
        made.thread.start()
        return made.resource()

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        wanted = re.fullmatch(r'labels\.(\w+)="?(\w+)"?', query.get("filter", ""))
        jobs = [job.resource() for job in self.jobs.values()]
        return {"jobs": [job for job in jobs if not wanted or job.get("labels", {}).get(wanted[1]) == wanted[2]]}

    def _cancel(self, job: Job) -> dict[str, Any]:
        if job.over:
            raise RefusedError(400, "INVALID_ARGUMENT", "Job has already ended")
        job.state = "CANCELLATION_IN_PROGRESS"
        job.cancelled.set()
        job.stop(25.0)
        return {"done": False}

    def _entries(self, body: dict[str, Any]) -> dict[str, Any]:
        wanted = re.search(r'labels.job_uid="([^"]*)"', body["filter"])
        assert wanted is not None
        jobs = [job for job in self.jobs.values() if job.uid == wanted[1]]
        return {"entries": [{"textPayload": line} for job in jobs for line in job.log.read_text().splitlines()]}


def checked(content: bytes | str) -> dict[str, Any]:
    """Return a job as the real types read it; a field or word that they do not know is refused."""
    try:
        job = batch_v1.Job.from_json(content)
    except Exception as error:
        raise RefusedError(400, "INVALID_ARGUMENT", f"Invalid JSON payload received. {error}") from None
    read: dict[str, Any] = json.loads(
        batch_v1.Job.to_json(job, use_integers_for_enums=False, always_print_fields_with_no_presence=False)
    )
    return read


def _check(asked: dict[str, Any], region: str) -> None:
    """Refuse what Batch refuses at creation; an image that is not there shows itself when the VM pulls it."""
    group = asked["taskGroups"][0]
    spec, count = group["taskSpec"], int(group.get("taskCount", 1))
    if not 1 <= int(group.get("parallelism", 1)) <= count:
        raise RefusedError(400, "INVALID_ARGUMENT", "parallelism should be in range [1, task_count]")
    if not 0 <= int(spec.get("maxRetryCount", 0)) <= 10:
        raise RefusedError(400, "INVALID_ARGUMENT", "max_retry_count should be in range [0, 10]")
    policy = asked["allocationPolicy"]["instances"][0]["policy"]
    kind = policy.get("machineType", "")
    if kind not in MACHINE_TYPES:
        raise RefusedError(400, "INVALID_ARGUMENT", f"machine type {kind} for job is invalid in the location.")
    for place in asked["allocationPolicy"]["location"]["allowedLocations"]:
        name = place.partition("/")[2]
        if name != region and name not in (f"{region}-a", f"{region}-b", f"{region}-c"):
            raise RefusedError(400, "INVALID_ARGUMENT", f"zone {name} is invalid in the allowed locations.")

"""A small AWS Batch on this machine, which executes what it is asked to run, as processes.

It speaks the REST API of the calls that we make: RegisterJobDefinition, DeregisterJobDefinition, SubmitJob, ListJobs,
DescribeJobs, TerminateJob. A job goes through the states of the user guide ("Job states"), and is started again as the
rules of its `retryStrategy` say; when its instance is reclaimed, its container gets SIGTERM, and the status reason is
what AWS writes of a host that is gone.

    with AwsBatchServer(environment of S3) as service:
        service.environment  # for boto3
        service.reclaim(service.newest(), grace_s=20)
"""

import fnmatch
import json
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.fakes.batch_vm import Machine, Processes, Vm

QUEUE = "spot"
LOST = "Host EC2 (instance i-0123456789abcdef0) terminated."


class Job(Machine):
    """A job, and the thread that executes it."""

    def __init__(self, service: "AwsBatchServer", asked: dict[str, Any], definition: dict[str, Any]) -> None:
        self.service, self.asked, self.definition = service, asked, definition
        self.id, self.name = secrets.token_hex(8), str(asked["jobName"])
        self.status, self.reason, self.code = "SUBMITTED", "", None
        self.created = int(time.time() * 1000)
        self.lives, service.lives = service.lives, 0
        self.codes = [137] * self.lives
        self.log = service.folder / f"{self.id}.log"
        self.terminated = threading.Event()
        self.thread = threading.Thread(target=self._run, name=self.name, daemon=True)

    @property
    def over(self) -> bool:
        """Whether nothing happens to it any more."""
        return self.status in ("SUCCEEDED", "FAILED")

    def summary(self) -> dict[str, Any]:
        """Return it as `list_jobs` does."""
        told = {"jobId": self.id, "jobName": self.name, "createdAt": self.created, "status": self.status}
        ended = {"container": {"exitCode": self.codes[-1]}} if self.codes else {}
        return told | ended | ({"statusReason": self.reason} if self.reason else {})

    def _run(self) -> None:
        self.status = "RUNNABLE"
        if self.terminated.wait(self.service.queue_s):
            return self._end("FAILED", "Terminated by user")
        strategy = self.definition.get("retryStrategy", {"attempts": 1, "evaluateOnExit": []})
        for attempt in range(1 + self.lives, int(strategy["attempts"]) + 1):
            self.status = "STARTING"
            code, self.reason = self._execute(attempt)
            self.codes.append(code)
            if self.terminated.is_set():
                return self._end("FAILED", "Terminated by user")
            if code == 0:
                return self._end("SUCCEEDED", "Essential container in task exited")
            if not self._retries(strategy["evaluateOnExit"], code):
                break
            self.status = "RUNNABLE"
        return self._end("FAILED", self.reason)

    def _end(self, status: str, reason: str) -> None:
        self.reason, self.status = reason, status

    def _retries(self, rules: list[dict[str, str]], code: int) -> bool:
        """Tell whether it is started again: the first rule that matches says so; where none does, it is."""
        for rule in rules:
            looked_at = {"onStatusReason": self.reason, "onReason": "", "onExitCode": str(code)}
            if all(fnmatch.fnmatch(value, rule[name]) for name, value in looked_at.items() if name in rule):
                return rule["action"].upper() == "RETRY"
        return True

    def _execute(self, attempt: int) -> tuple[int, str]:
        given = self.definition["containerProperties"]
        environment = self.service.given | {pair["name"]: pair["value"] for pair in given.get("environment", [])}
        entrypoint, *words = given["command"]
        number = {"AWS_BATCH_JOB_ATTEMPT": str(attempt)}
        vm = Vm(self.name, {"entrypoint": entrypoint, "commands": words}, environment | number)
        try:
            running = Processes().start(vm, self.log)
            self.vm, self.container, self.status = vm, running, "RUNNING"
            while (code := running.wait(0.02)) is None:
                pass
            running.kill()  # what it left; a container has nothing when its PID 1 is gone
            return (vm.lost, LOST) if vm.lost else (code, "Essential container in task exited")
        finally:
            self.vm, self.container = None, None
            vm.close()


class AwsBatchServer:
    """AWS Batch on a port of this machine, with one job queue.

    Args:
        given: Environment of every container, beside what the job says: what leads it to the bucket.
        queue_s: How long a job waits for an instance.
    """

    def __init__(self, given: Mapping[str, str], *, queue_s: float = 0.0) -> None:
        self.given, self.queue_s = dict(given), queue_s
        self.folder = Path(tempfile.mkdtemp(prefix="jobkit-test-aws-batch-"))
        self.jobs: dict[str, Job] = {}
        self.lives = 0
        """How many instances the next job that is submitted has lost already."""
        self._definitions: dict[str, dict[str, Any]] = {}
        self._listener = _Listener(self)
        self.environment = {"AWS_ENDPOINT_URL_BATCH": f"http://127.0.0.1:{self._listener.server_address[1]}"}
        """What leads boto3 here, beside what leads it to the bucket."""
        self.given |= self.environment
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "AwsBatchServer":
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.jobs.values():
            job.terminated.set()
            if (container := job.container) is not None:
                container.kill()
            job.thread.join(20)
        self._listener.shutdown()
        self._listener.server_close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def newest(self) -> Job:
        """Return the job that was submitted last."""
        return list(self.jobs.values())[-1]

    def reclaim(self, job: Job, *, grace_s: float = 20.0) -> None:
        """Take a job's instance away; without a container there is nobody to be told."""
        job.stop(grace_s, lost=137)

    def answer(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        match path.rpartition("/")[2]:
            case "registerjobdefinition":
                name = f"{asked['jobDefinitionName']}:{len(self._definitions) + 1}"
                self._definitions[name] = asked
                return {"jobDefinitionName": asked["jobDefinitionName"], "jobDefinitionArn": name, "revision": 1}
            case "deregisterjobdefinition":
                del self._definitions[asked["jobDefinition"]]
                return {}
            case "submitjob":
                if asked["jobQueue"] != QUEUE:
                    raise LookupError(f"Job Queue {asked['jobQueue']} does not exist")
                job = Job(self, asked, self._definitions[asked["jobDefinition"]])
                self.jobs[job.id] = job
                job.thread.start()
                return {"jobId": job.id, "jobName": job.name}
            case "listjobs":
                (wanted,) = (each["values"] for each in asked["filters"] if each["name"] == "JOB_NAME")
                return {"jobSummaryList": [job.summary() for job in self.jobs.values() if job.name in wanted]}
            case "describejobs":
                extra = {"jobQueue": QUEUE, "startedAt": 0, "jobDefinition": ""}
                return {"jobs": [self.jobs[one].summary() | extra for one in asked["jobs"]]}
            case "terminatejob":
                job = self.jobs[asked["jobId"]]
                job.terminated.set()
                threading.Thread(target=job.stop, args=(25.0,), daemon=True).start()
                return {}
        raise LookupError(f"{path} is not served")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Listener"

    def do_POST(self) -> None:
        """Serve one call."""
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            answer, code = self.server.service.answer(self.path, json.loads(content or b"{}")), 200
        except LookupError as error:
            answer, code = {"message": str(error)}, 400
        told = json.dumps(answer).encode()
        self.send_response(code)
        if code != 200:
            self.send_header("x-amzn-ErrorType", "ClientException")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, service: AwsBatchServer) -> None:
        self.service = service
        super().__init__(("127.0.0.1", 0), _Handler)

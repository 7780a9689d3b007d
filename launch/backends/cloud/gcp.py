"""The Google Batch backend: one job per submit, one container on one VM for each of its tasks, spot by default.

Batch pulls the image, installs drivers, tries the zones, starts a task again after its VM was preempted, and deletes
VMs itself. What the container does is in vm_job.py; the verbs are in managed.py. The job's state is what
`job.status.state` says: events of a task that succeeded carry no exit code.
"""

import os
import re
import uuid
from typing import Any

import msgspec

from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.remote import identity
from jobkit.rundir.store import Store
from launch.backends.cloud import gcp_doctor, gcp_request
from launch.backends.cloud.googleapi import GoogleError, Session
from launch.backends.cloud.managed import OPTIONS, Managed
from launch.lifecycle import run_status
from launch.lifecycle.run_status import Job
from launch.spec.cloud_options import RETRIED, Cloud
from launch.spec.finding import Finding
from launch.spec.jobspec import JobSpec

_PENDING = ("STATE_UNSPECIFIED", "QUEUED", "SCHEDULED")
_WAITING = {"STATE_UNSPECIFIED", "PENDING", "ASSIGNED"}
"""States of a task without a VM at work."""
_ACTIVE = (*_PENDING, "RUNNING", "CANCELLATION_IN_PROGRESS", "DELETION_IN_PROGRESS")


class Gcp(Managed):
    """The Google Batch backend.

    Args:
        cloud: What its jobs ask for; by default what the specification has.
    """

    name = "gcp"
    options = OPTIONS | {
        "nodes", "project", "zones", "machine-type", "spot", "network", "subnetwork", "boot-disk-size",
    }  # fmt: skip
    scheme = "gs"
    restarts = gcp_request.RESTARTS

    def __init__(self, cloud: Cloud | None = None) -> None:
        super().__init__(cloud)
        self._session = Session()

    def complete(self, spec: JobSpec) -> JobSpec:
        """See `Managed`; asks no one but for the credentials' project."""
        cloud = spec.cloud
        assert cloud is not None
        project = cloud.project or os.environ.get("GOOGLE_CLOUD_PROJECT", "")
        if not project:
            self._session.open()
            project = self._session.project
        if not project:
            raise ConfigError("no Google Cloud project: give --project, or 'gcloud config set project NAME'")
        if not re.fullmatch("[1-9][0-9]{0,2}", nodes := spec.sbatch.get("nodes", "1")):
            raise ConfigError(f"--nodes {nodes!r} is no number of VMs, 1 to 999")
        if gcp_request.nodes(spec) > 1 and spec.tasks_per_node > 1:
            raise ConfigError(
                f"--nodes {nodes} and --ntasks-per-node {spec.tasks_per_node}: of several VMs each has one process; "
                "give --ntasks-per-node 1"
            )
        zones = tuple(zone.removeprefix("zones/") for zone in cloud.zones)
        region = cloud.region or (zones[0].rpartition("-")[0] if zones else "")
        if not re.fullmatch(r"[a-z]+-[a-z]+\d+", region):
            raise ConfigError(
                f"--region {region!r} is not a region: give one such as us-central1 (gcloud compute regions list)"
            )
        for zone in zones:
            if not re.fullmatch(f"{region}-[a-z]", zone):
                raise ConfigError(
                    f"--zones {zone!r} is no zone of {region}: a job has one region; zones are {region}-a, ..."
                )
        cloud = msgspec.structs.replace(cloud, project=project, region=region, zones=zones)
        cloud = msgspec.structs.replace(cloud, machine_type=gcp_request.machine_type(cloud))
        for name, secret in cloud.secrets.items():
            if not re.fullmatch(r"(projects/[^/]+/secrets/)?[\w-]+(/versions/[\w-]+)?", secret):
                raise ConfigError(f"--secret {name}: {secret!r} is not projects/PROJECT/secrets/NAME/versions/VERSION")
        for key, value in cloud.labels.items():
            if not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", key) or not re.fullmatch(r"[a-z0-9_-]{0,63}", value):
                raise ConfigError(f"--label {key}={value}: lower-case letters, digits, '-' and '_' only, at most 63")
        return msgspec.structs.replace(spec, cloud=cloud)

    def diagnose(self, spec: JobSpec) -> list[Finding]:
        """See `Managed`."""
        return gcp_doctor.examine(spec, Session(patience_s=gcp_doctor.PATIENCE_S))

    def remarks(self, spec: JobSpec) -> list[str]:
        """See `Managed`."""
        try:
            findings = gcp_doctor.lacking(spec, Session(patience_s=gcp_doctor.PATIENCE_S))
        except JobkitError:  # who submits may not read it, which is no fault
            return []
        return [f"{finding.text}: {finding.mend}" for finding in findings]

    def request(self, store: Store, spec: JobSpec, job: str) -> dict[str, Any]:
        """See `Managed`."""
        return gcp_request.request(store, spec, job)

    def create(self, store: Store, spec: JobSpec, job: str) -> None:
        """See `Managed`."""
        number = len(run_status.jobs(store, self.name))
        query = {"jobId": job, "requestId": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{store.url} {job} {number}"))}
        try:
            self._call("POST", _jobs(spec), body=self.request(store, spec, job), query=query)
        except GoogleError as error:
            if error.code == 409 and self._is_ours(spec, job):
                return
            raise _explain(error, spec, job) from None

    def _call(self, method: str, path: str, **what: Any) -> dict[str, Any]:
        return self._session.call("batch", method, path, **what)

    def _is_ours(self, spec: JobSpec, job: str) -> bool:
        try:
            reply = self._call("GET", _jobs(spec, job))
        except JobkitError:
            return False
        return bool(reply.get("labels", {}).get(gcp_request.LABEL) == gcp_request.run_label(job))

    def find(self, spec: JobSpec, job: str) -> Job | None:
        """See `Managed`."""
        try:
            reply = self._call("GET", _jobs(spec, job))
        except GoogleError as error:
            if error.code == 404:
                return None
            raise _explain(error, spec, job) from None
        status = reply.get("status", {})
        state = str(status.get("state", "STATE_UNSPECIFIED"))
        counts = status.get("taskGroups", {}).get("group0", {}).get("counts", {})
        # A job is RUNNING for a moment after its task has ended: that one waits for nothing.
        tasks = {task for task, count in counts.items() if int(count)}
        waits = state in _PENDING or (state == "RUNNING" and bool(tasks) and tasks <= _WAITING)
        reason = _last_words(status)
        if state == "FAILED":
            allowed = int(reply["taskGroups"][0]["taskSpec"].get("maxRetryCount", 0))
            reason = self._why(spec, job, allowed) or reason
        return Job(id=job, state=state, reason=reason, active=state in _ACTIVE, pending=waits)

    def _why(self, spec: JobSpec, job: str, allowed: int) -> str:
        """Say how the tasks of a failed job ended, which were started again at most so often."""
        try:
            tasks = self._call("GET", f"{_jobs(spec, job)}/taskGroups/group0/tasks")
        except JobkitError:
            return ""
        states = [task.get("status", {}) for task in tasks.get("tasks", [])]
        failed = [status for status in states if status.get("state") == "FAILED"] or states
        events = failed[0].get("statusEvents", []) if failed else []
        codes = [code for event in events if (code := event.get("taskExecution", {}).get("exitCode"))]
        if not codes:
            return _last_words({"statusEvents": events})
        known = _EXIT_CODES.get(codes[-1], f"exit code {codes[-1]}")
        used = f"; its {allowed} restarts are used up" if codes[-1] in RETRIED and len(codes) > allowed else ""
        return known + used

    def terminate(self, spec: JobSpec, job: str) -> None:
        """See `Managed`."""
        path = _jobs(spec, job)
        for method, where, body in (("POST", f"{path}:cancel", {}), ("DELETE", path, None)):
            try:
                self._call(method, where, body=body)
                return
            except GoogleError as error:
                if error.code == 404 or (error.code == 400 and "ended" in error.said):
                    return
                refused = error
        raise _explain(refused, spec, job)

    def output(self, spec: JobSpec, job: str) -> list[str]:
        """Return what Cloud Logging has of a job: what the agent and the container printed, oldest first."""
        reply = self._call("GET", _jobs(spec, job))
        assert spec.cloud is not None
        project = spec.cloud.project
        logs = " OR ".join(f'logName="projects/{project}/logs/batch_{kind}_logs"' for kind in ("agent", "task"))
        wanted = f'({logs}) AND labels.job_uid="{reply.get("uid", "")}" AND timestamp>="{reply.get("createTime", "")}"'
        body = {
            "resourceNames": [f"projects/{project}"],
            "filter": wanted,
            "orderBy": "timestamp asc",
            "pageSize": 1000,
        }
        entries = self._session.call("logging", "POST", "v2/entries:list", body=body).get("entries", [])
        return [str(entry.get("textPayload", "")).rstrip("\n") for entry in entries]

    def runs(self, project: str, region: str) -> list[str]:
        """Return the URLs of the runs that have jobs in a project and region, oldest first."""
        spec = self.complete(JobSpec(command=("ls",), cloud=Cloud(project=project, region=region)))
        jobs: list[Any] = []
        query: dict[str, str] | None = {"filter": f"labels.{gcp_request.OURS}=run", "pageSize": "500"}
        while query:
            try:
                reply = self._call("GET", _jobs(spec), query=query)
            except GoogleError as error:
                raise _explain(error, spec, "") from None
            jobs += [job for job in reply.get("jobs", []) if gcp_request.LABEL in job.get("labels", {})]
            page = str(reply.get("nextPageToken", ""))
            query = query | {"pageToken": page} if page else None
        jobs.sort(key=lambda job: str(job.get("createTime", "")))
        return list(dict.fromkeys(filter(None, map(_url_of, jobs))))


_EXIT_CODES = {
    50001: "the VM was preempted (exit code 50001)",
    50002: "the VM was lost (exit code 50002)",
    50005: "the job's time limit (exit code 50005)",
    50006: "the VM was recreated (exit code 50006)",
    125: "docker could not start the container: is --image right, and may the service account read it? (exit code 125)",
    127: "the image has no such program: does it have python and jobkit? (exit code 127)",
}


def _last_words(status: Any) -> str:
    events = status.get("statusEvents", [])
    return " ".join(str(events[-1].get("description", "")).split())[:300] if events else ""


def _url_of(job: Any) -> str:
    try:
        return str(job["taskGroups"][0]["taskSpec"]["runnables"][0]["container"]["commands"][-1])
    except (KeyError, IndexError):
        return ""


def _jobs(spec: JobSpec, job: str = "") -> str:
    """Return the path of a job, or of all that are where the specification says."""
    if spec.cloud is None:
        raise ConfigError("this run was never submitted to Google Batch: jobkit resume RUN --on gcp")
    return f"v1/projects/{spec.cloud.project}/locations/{spec.cloud.region}/jobs{job and f'/{job}'}"


def _explain(error: GoogleError, spec: JobSpec, job: str) -> JobkitError:
    """Say what the service refused in one sentence with the remedy."""
    cloud = spec.cloud or Cloud()
    said = error.said
    if error.code == 0:
        return JobkitError(f"{said}; nothing is known to have been done: try again")
    if error.disabled:
        remedy = f"enable the API: gcloud services enable batch.googleapis.com --project {cloud.project}"
    elif error.code == 401:
        remedy = f"the credentials of {identity()} were refused: gcloud auth application-default login"
    elif error.code == 403:
        remedy = (
            f"give {identity()} roles/batch.jobsEditor on project {cloud.project}, and roles/iam.serviceAccountUser on "
            "the job's service account"
        )
    elif error.code == 404:
        remedy = f"check --project {cloud.project} and --region {cloud.region}"
    elif error.code == 409:
        remedy = f"another job has the id {job}: give another --run"
    elif error.code == 429:
        remedy = f"ask for more quota in {cloud.region} (IAM & Admin > Quotas), or use another --region or fewer GPUs"
    elif error.code == 400:
        remedy = _remedy(said.lower(), cloud)
    else:
        return JobkitError(f"Google Batch answered {error.code} {error.status}: {said}; try again a little later")
    return ConfigError(f"Google Batch refused: {said} ({error.code}): {remedy}")


def _remedy(said: str, cloud: Cloud) -> str:
    where = f"--zones {','.join(cloud.zones)}" if cloud.zones else f"--region {cloud.region}"
    of_words = {
        ("quota",): f"ask for more quota in {cloud.region}, or use another --region or fewer GPUs",
        ("machine type", "machinetype"): f"check --machine-type {cloud.machine_type} and {where}: "
        "gcloud compute machine-types list",
        ("image",): f"check --image {cloud.image}",
        ("zone", "location", "region"): f"check {where}: gcloud compute zones list",
        ("accelerator", "gpu"): f"check --gpus {cloud.gpus} and {where}: gcloud compute accelerator-types list",
        ("service account", "serviceaccount"): f"check --service-account {cloud.service_account}",
        ("secret",): "check --secret: projects/PROJECT/secrets/NAME/versions/VERSION",
        ("network",): "check --network and --subnetwork",
    }
    known = (remedy for words, remedy in of_words.items() if any(word in said for word in words))
    return next(known, "jobkit submit --dry-run shows the request")

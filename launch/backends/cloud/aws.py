"""The AWS Batch backend: one job per submit on the user's own job queue, spot where the queue is.

The queue's compute environment decides the machines; the job says what its container needs. AWS overrides an image's
CMD but not its ENTRYPOINT, so the image must have none. A job has no name that only one can have: the id that we
choose is looked for before it is used, and if two submits in the same second miss each other, the later attempt's claim
ends the earlier one.
"""

import os
from typing import Any

import msgspec

from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.remote import identity
from jobkit.rundir.store import Store
from launch.backends.cloud import aws_doctor
from launch.backends.cloud.managed import OPTIONS, Managed, command, variables
from launch.lifecycle.run_status import Job
from launch.spec.cloud_options import Cloud
from launch.spec.finding import Finding
from launch.spec.jobspec import JobSpec

_PENDING = ("SUBMITTED", "PENDING", "RUNNABLE", "STARTING")
_ACTIVE = (*_PENDING, "RUNNING")
_RETRY = (
    {"onStatusReason": "Host EC2*", "action": "RETRY"},  # the instance is gone
    {"onExitCode": "75", "action": "RETRY"},  # ours: preempted, committed
    {"onExitCode": "143", "action": "RETRY"},
    {"onReason": "*", "action": "EXIT"},  # without this what no rule matches is started again
)
"""At most five rules (AWS Batch user guide, "Automated job retries")."""


_SIGN_IN = (
    "UnrecognizedClientException", "ExpiredTokenException", "ExpiredToken", "InvalidClientTokenId",
    "InvalidSignatureException", "SignatureDoesNotMatch", "AuthFailure",
)  # fmt: skip
"""Of credentials that are wrong or too old."""


class Aws(Managed):
    """The AWS Batch backend.

    Args:
        cloud: What its jobs ask for; by default what the specification has.
    """

    name = "aws"
    options = OPTIONS | {"queue", "execution-role", "cpus", "memory"}
    scheme = "s3"
    restarts = 9
    """retryStrategy.attempts is 1..10, the first one included."""

    def complete(self, spec: JobSpec) -> JobSpec:
        """See `Managed`."""
        cloud = spec.cloud
        assert cloud is not None
        if not cloud.queue:
            raise ConfigError("no job queue: give --queue, one of those of 'aws batch describe-job-queues'")
        if cloud.gpus and not cloud.gpus.rpartition(":")[2].isdecimal():
            raise ConfigError(f"--gpus {cloud.gpus!r}: on AWS give their number; the queue's environment has the type")
        if cloud.secrets and not cloud.execution_role:
            raise ConfigError(
                f"--secret {', '.join(cloud.secrets)}: AWS Batch reads secrets as a role of its own: give "
                "--execution-role ROLE_ARN, one that may read them (docs/aws.md)"
            )
        region = cloud.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        region = region or _configured_region()
        return msgspec.structs.replace(spec, cloud=msgspec.structs.replace(cloud, region=region))

    def diagnose(self, spec: JobSpec) -> list[Finding]:
        """See `Managed`."""
        return aws_doctor.examine(spec, lambda service: _client(spec, service, timeout_s=aws_doctor.TIMEOUT_S))

    def request(self, store: Store, spec: JobSpec, job: str) -> dict[str, Any]:
        """Return what `register_job_definition` and `submit_job` get."""
        cloud = _cloud(spec)
        needs = {"VCPU": str(cloud.cpus or 4), "MEMORY": str(cloud.memory_mib or 14 * 1024)}
        if cloud.gpus:
            needs["GPU"] = cloud.gpus.rpartition(":")[2]
        container: dict[str, Any] = {
            "image": cloud.image,
            "command": command(store, spec),
            "environment": [{"name": name, "value": value} for name, value in variables(spec, job, self.name).items()],
            "resourceRequirements": [{"type": kind, "value": value} for kind, value in needs.items()],
            "linuxParameters": {"sharedMemorySize": 8192},
        }
        if cloud.secrets:
            container["secrets"] = [{"name": name, "valueFrom": secret} for name, secret in cloud.secrets.items()]
        if cloud.execution_role:
            container["executionRoleArn"] = cloud.execution_role
        if cloud.service_account:
            container["jobRoleArn"] = cloud.service_account
        attempts = cloud.restarts(self.restarts) + 1
        definition: dict[str, Any] = {
            "jobDefinitionName": job,
            "type": "container",
            "containerProperties": container,
            "retryStrategy": {"attempts": attempts, "evaluateOnExit": list(_RETRY)},
            "tags": cloud.labels | {"jobkit": "run"},
        }
        if cloud.time_s is not None:
            definition["timeout"] = {"attemptDurationSeconds": max(60, int(cloud.time_s))}
        return {"definition": definition, "job": {"jobName": job, "jobQueue": cloud.queue, "jobDefinition": job}}

    def create(self, store: Store, spec: JobSpec, job: str) -> None:
        """See `Managed`."""
        if self.find(spec, job) is not None:
            return
        asked = self.request(store, spec, job)
        made = _call(spec, "batch", "register_job_definition", **asked["definition"])["jobDefinitionArn"]
        try:
            _call(spec, "batch", "submit_job", **asked["job"] | {"jobDefinition": made})
        except JobkitError:
            _call(spec, "batch", "deregister_job_definition", jobDefinition=made)
            raise

    def find(self, spec: JobSpec, job: str) -> Job | None:
        """See `Managed`."""
        summary = self._summary(spec, job)
        if summary is None:
            return None
        state, reason = str(summary["status"]), str(summary.get("statusReason", ""))
        code = summary.get("container", {}).get("exitCode")
        if state == "FAILED" and code is not None:
            reason = f"{reason} (exit code {code})".strip()
        return Job(id=job, state=state, reason=reason, active=state in _ACTIVE, pending=state in _PENDING)

    def _summary(self, spec: JobSpec, job: str) -> dict[str, Any] | None:
        # With a filter by name jobs of every state are listed.
        wanted = [{"name": "JOB_NAME", "values": [job]}]
        reply = _call(spec, "batch", "list_jobs", jobQueue=_cloud(spec).queue, filters=wanted)
        jobs: list[dict[str, Any]] = [summary for summary in reply["jobSummaryList"] if summary["jobName"] == job]
        return max(jobs, key=lambda one: int(one.get("createdAt", 0)), default=None)

    def terminate(self, spec: JobSpec, job: str) -> None:
        """See `Managed`."""
        summary = self._summary(spec, job)
        if summary is not None:
            _call(spec, "batch", "terminate_job", jobId=summary["jobId"], reason="jobkit cancel")

    def output(self, spec: JobSpec, job: str) -> list[str]:
        """Return what CloudWatch has of a job's last attempt, oldest first."""
        summary = self._summary(spec, job)
        if summary is None:
            return []
        (detail,) = _call(spec, "batch", "describe_jobs", jobs=[summary["jobId"]])["jobs"]
        stream = detail.get("container", {}).get("logStreamName")
        if not stream:
            return []
        group = {"logGroupName": "/aws/batch/job", "logStreamName": stream, "startFromHead": True}
        return [str(event["message"]) for event in _call(spec, "logs", "get_log_events", **group)["events"]]


def _configured_region() -> str:
    """Return the region of the user's own configuration, which no VM has; '' for none, as the first request says."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
    except ImportError:
        return ""
    try:
        return str(boto3.Session().region_name or "")
    except BotoCoreError:
        return ""


def _cloud(spec: JobSpec) -> Cloud:
    if spec.cloud is None:
        raise ConfigError("this run was never submitted to AWS Batch: jobkit resume RUN --on aws")
    return spec.cloud


def _client(spec: JobSpec, service: str, *, timeout_s: float | None = None) -> Any:
    """Make a client of a service; with a timeout each request is sent but once."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise ConfigError("--on aws needs a package that is not installed: pip install boto3") from None
    once = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"total_max_attempts": 1}}
    config = None if timeout_s is None else Config(**once)
    return boto3.client(service, region_name=_cloud(spec).region or None, config=config)


def _call(spec: JobSpec, service: str, method: str, **arguments: Any) -> Any:
    """Send one request; boto3 retries what is worth it."""
    try:
        import botocore.exceptions
    except ImportError:
        raise ConfigError("--on aws needs a package that is not installed: pip install boto3") from None
    try:
        return getattr(_client(spec, service), method)(**arguments)
    except botocore.exceptions.ClientError as error:
        raise _explain(error.response.get("Error", {}), spec) from None
    except botocore.exceptions.NoRegionError:
        raise ConfigError("no AWS region: give --region, such as us-east-1, or set AWS_DEFAULT_REGION") from None
    except botocore.exceptions.NoCredentialsError:
        raise ConfigError(f"no credentials for AWS ({identity()}): aws configure, or set AWS_PROFILE") from None
    except botocore.exceptions.BotoCoreError as error:
        said = " ".join(str(error).split())
        raise JobkitError(f"AWS does not answer: {said}; try again") from None


def _explain(error: Any, spec: JobSpec) -> JobkitError:
    """Say what the service refused in one sentence with the remedy."""
    code, said = str(error.get("Code", "")), " ".join(str(error.get("Message", "")).split()).rstrip(".")
    cloud = _cloud(spec)
    if code in _SIGN_IN:
        return ConfigError(f"AWS refuses the credentials of {identity()} ({code}): aws sso login, or aws configure")
    if code in ("AccessDeniedException", "AccessDenied", "UnauthorizedOperation"):
        remedy = f"give {identity()} batch:SubmitJob, RegisterJobDefinition, ListJobs, DescribeJobs and TerminateJob"
    elif "queue" in said.lower():
        remedy = f"check --queue {cloud.queue} and --region {cloud.region}: aws batch describe-job-queues"
    elif code in ("ServerException", "TooManyRequestsException", "ThrottlingException"):
        return JobkitError(f"AWS Batch answered {code}: {said}; try again a little later")
    else:
        remedy = "jobkit submit --dry-run shows the request"
    return ConfigError(f"AWS Batch refused: {said} ({code}): {remedy}")

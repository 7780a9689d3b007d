"""`jobkit doctor --on aws`: what a first job on AWS Batch needs, each thing asked of the service that knows it.

Nothing is created or changed. What the account may not read, or does not answer, is said as not checked, with the
command by which somebody else can look.
"""

import json
import re
import shlex
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobkit.rundir.store import is_remote
from launch.spec.cloud_options import Cloud
from launch.spec.finding import UNCHECKED, Finding
from launch.spec.jobspec import JobSpec

TIMEOUT_S = 5.0
"""How long a service may take to answer: without a network all of it is over in seconds."""
_ACTIONS = (
    "batch:RegisterJobDefinition", "batch:DeregisterJobDefinition", "batch:SubmitJob", "batch:ListJobs",
    "batch:DescribeJobs", "batch:TerminateJob", "logs:GetLogEvents",
)  # fmt: skip
"""What submit, status, cancel and logs ask for."""
_SUCCESSOR = ("batch:RegisterJobDefinition", "batch:DeregisterJobDefinition", "batch:SubmitJob", "batch:ListJobs")
"""What a job asks for to submit its successor, once its own attempts are used up."""
_OBJECTS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject")
_TASKS = "ecs-tasks.amazonaws.com"
"""Who assumes a job's role (AWS Batch user guide, "IAM roles for tasks")."""
_QUOTAS = {
    ("standard", True): "L-34B43A08",
    ("standard", False): "L-1216C47A",
    ("g", True): "L-3819A6DF",
    ("g", False): "L-DB2E81BA",
    ("p", True): "L-7212CCBC",
    ("p", False): "L-417A185B",
    ("p5", True): "L-C4BD4855",
}
"""Quotas of EC2 in vCPUs, by group of families and whether they are spot ("Amazon EC2 service quotas")."""
_GROUPS = dict.fromkeys(("g", "gr", "vt"), "g") | {"p": "p"}
_GROUPS |= dict.fromkeys(("a", "c", "d", "h", "i", "im", "is", "m", "r", "t", "z", "optimal"), "standard")
"""Those groups, by the letters with which a family begins; others (trn, inf, x) have quotas of their own."""


@dataclass(frozen=True)
class _Place:
    """What is examined.

    Args:
        client: Makes a client of a service.
        cloud: What jobs ask for, with the region filled in.
        bucket: Of the run's URL; '' for none.
        arn: Who asks.
        lanes: Whether points of a sweep wait for one another.
        environments: The queue's compute environments, once they are known.
    """

    client: Callable[[str], Any]
    cloud: Cloud
    bucket: str
    arn: str
    lanes: bool = False
    environments: list[dict[str, Any]] = field(default_factory=list)

    @property
    def at(self) -> str:
        """The region, as an option of the command line."""
        return f" --region {self.cloud.region}" if self.cloud.region else ""


def examine(spec: JobSpec, client: Callable[[str], Any]) -> list[Finding]:
    """Ask AWS what a submit with this specification would come upon.

    Args:
        spec: With a cloud that has a queue; image and run may be empty.
        client: Makes a client of a service, whose requests are over soon.
    """
    try:
        import botocore.exceptions
    except ImportError:
        client("sts")  # says which package is missing
        raise
    assert spec.cloud is not None
    try:
        who = client("sts").get_caller_identity()
    except botocore.exceptions.NoRegionError:
        return _nothing("region", "no AWS region: give --region, or set AWS_DEFAULT_REGION", "fail", "aws configure")
    except (botocore.exceptions.EndpointConnectionError, botocore.exceptions.HTTPClientError) as error:
        return _nothing(
            "credentials", f"AWS does not answer: {_words(error)}", UNCHECKED, "aws sts get-caller-identity"
        )
    except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError) as error:
        return _nothing("credentials", f"AWS does not know you: {_words(error)}", "fail", "aws configure")
    bucket = spec.run.partition("://")[2].partition("/")[0] if is_remote(spec.run) else ""
    place = _Place(client, spec.cloud, bucket, str(who["Arn"]), lanes=spec.parallel is not None)
    findings = [Finding("credentials", f"signed in as {place.arn}")]
    for topic, check in _CHECKS:
        try:
            findings += check(place)
        except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError) as error:
            findings.append(Finding(topic, _words(error), UNCHECKED))
    return findings


def _nothing(topic: str, text: str, verdict: str, mend: str) -> list[Finding]:
    """Say why nothing could be asked."""
    rest = [Finding(other, f"see {topic}", UNCHECKED) for other, _ in _CHECKS]
    return [Finding(topic, text, verdict, mend), *rest]


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _queue(place: _Place) -> Iterator[Finding]:
    """Examine the queue and what it has machines of."""
    name, batch = place.cloud.queue, place.client("batch")
    queues = batch.describe_job_queues(jobQueues=[name])["jobQueues"]
    if not queues:
        look = f"aws batch describe-job-queues{place.at} --query 'jobQueues[].jobQueueName'"
        yield Finding("queue", f"there is no job queue {name} in {place.cloud.region or 'the region'}", "fail", look)
        return
    queue = queues[0]
    if queue["state"] != "ENABLED" or queue["status"] != "VALID":
        mend = f"aws batch update-job-queue{place.at} --job-queue {shlex.quote(name)} --state ENABLED"
        yield Finding("queue", f"{name} is {queue['state']} and {queue['status']}", "fail", mend)
    else:
        yield Finding("queue", f"{name} takes jobs")
    wanted = [one["computeEnvironment"] for one in queue["computeEnvironmentOrder"]]
    place.environments.extend(
        batch.describe_compute_environments(computeEnvironments=wanted)["computeEnvironments"] if wanted else []
    )
    for one in place.environments:
        named, resources = one["computeEnvironmentName"], one.get("computeResources", {})
        if one.get("state") != "ENABLED" or one.get("status", "VALID") != "VALID":
            mend = f"aws batch update-compute-environment{place.at} --compute-environment {named} --state ENABLED"
            state = f"{one.get('state')} and {one.get('status')} {one.get('statusReason', '')}".strip()
            yield Finding("queue", f"its environment {named} is {state}", "fail", mend)
        elif resources.get("maxvCpus", 1 << 30) < (place.cloud.cpus or 4):
            mend = (
                f"aws batch update-compute-environment{place.at} --compute-environment {named} "
                f"--compute-resources maxvCpus={place.cloud.cpus or 4}"
            )
            text = f"its environment {named} has at most {resources['maxvCpus']} vCPUs, a job takes "
            yield Finding("queue", text + str(place.cloud.cpus or 4), "fail", mend)
        elif resources.get("type") not in (None, "SPOT"):
            yield Finding("queue", f"its environment {named} is {resources['type']}: on demand, not spot")


def _principal(arn: str) -> str:
    """Return whose policies count: those of the role where somebody has assumed one."""
    assumed = re.fullmatch(r"arn:([\w-]+):sts::(\d+):assumed-role/([^/]+)/.*", arn)
    return f"arn:{assumed[1]}:iam::{assumed[2]}:role/{assumed[3]}" if assumed else arn


def _simulated(
    place: _Place, topic: str, arn: str, wanted: Mapping[str, list[str]], *, without: str = ""
) -> Iterator[Finding]:
    """Ask IAM whether somebody may do something.

    Args:
        place: What is examined.
        topic: Of the findings.
        arn: The user or role.
        wanted: Actions, by what they are done to.
        without: What follows where it may not, if that is bearable.
    """
    import botocore.exceptions

    arn = _principal(arn)
    name = arn.rpartition("/")[2]
    if arn.endswith(":root"):
        yield Finding(topic, "the account's root user may do everything; a user of its own is safer", "warning")
        return
    denied = []
    for resource, actions in wanted.items():
        try:
            asked = {"PolicySourceArn": arn, "ActionNames": actions, "ResourceArns": [resource]}
            results = place.client("iam").simulate_principal_policy(**asked)["EvaluationResults"]
        except botocore.exceptions.ClientError as error:
            look = f"aws iam simulate-principal-policy --policy-source-arn {arn} --action-names {' '.join(actions)}"
            yield Finding(topic, f"what {name} may do: {_words(error)}", UNCHECKED, look)
            return
        denied += [str(one["EvalActionName"]) for one in results if one["EvalDecision"] != "allowed"]
    if denied:
        kind = "role" if ":role/" in arn else "user"
        statements = [{"Effect": "Allow", "Action": actions, "Resource": what} for what, actions in wanted.items()]
        document = json.dumps({"Version": "2012-10-17", "Statement": statements}, separators=(",", ":"))
        mend = f"aws iam put-{kind}-policy --{kind}-name {name} --policy-name jobkit --policy-document "
        mend += shlex.quote(document)
        verdict = "warning" if without else "fail"
        yield Finding(topic, f"{name} may not {', '.join(denied)}{without and f'; {without}'}", verdict, mend)
    else:
        yield Finding(topic, f"{name} may do what is needed")


def _user(place: _Place) -> Iterator[Finding]:
    wanted = {"*": list(_ACTIONS)}
    wanted |= {role: ["iam:PassRole"] for role in _roles(place)}
    if place.bucket:
        wanted |= _objects(place.bucket)
    yield from _simulated(place, "your rights", place.arn, wanted)


def _roles(place: _Place) -> list[str]:
    """Return the roles that a job definition names."""
    return [role for role in (place.cloud.service_account, place.cloud.execution_role) if role]


def _objects(bucket: str) -> dict[str, list[str]]:
    return {f"arn:aws:s3:::{bucket}/*": list(_OBJECTS), f"arn:aws:s3:::{bucket}": ["s3:ListBucket"]}


def _role(place: _Place) -> Iterator[Finding]:
    """Examine the role that the container has."""
    topic, arn = "job's role", place.cloud.service_account
    if not arn:
        text = "no role was named (--service-account ROLE_ARN): the container has what the instances' own role has"
        yield Finding(topic, text, UNCHECKED, "aws batch describe-compute-environments" + place.at)
        return
    there = yield from _assumed(place, topic, arn, _objects(place.bucket) if place.bucket else {})
    ends = place.cloud.restarts(10) > 9
    if there and (ends or place.lanes):
        wanted = {"*": list(_SUCCESSOR)} | {role: ["iam:PassRole"] for role in _roles(place)}
        what = ["a run ends after 9 restarts"] * ends + ["no point of a sweep has the next one begin"] * place.lanes
        without = f"without that {' and '.join(what)}, and 'jobkit resume' goes on"
        yield from _simulated(place, topic, arn, wanted, without=without)


def _execution_role(place: _Place) -> Iterator[Finding]:
    """Examine the role with which the service reads secrets; nothing where there are none."""
    if place.cloud.execution_role:
        secrets = {_of_policy(secret): [_reads(secret)] for secret in place.cloud.secrets.values()}
        yield from _assumed(place, "execution role", place.cloud.execution_role, secrets)


def _reads(secret: str) -> str:
    return (
        "secretsmanager:GetSecretValue" if secret.startswith("arn:") and ":secret:" in secret else "ssm:GetParameters"
    )


def _of_policy(secret: str) -> str:
    """Return what a policy calls a secret: its ARN without key and version, or that of a parameter."""
    if not secret.startswith("arn:"):
        return f"arn:aws:ssm:*:*:parameter/{secret.removeprefix('/')}"
    return ":".join(secret.split(":")[:7])


def _assumed(place: _Place, topic: str, arn: str, wanted: Mapping[str, list[str]]) -> Generator[Finding, None, bool]:
    """Examine a role that jobs assume: whether it is there, trusts them, and may do what is wanted.

    Args:
        place, topic, wanted: As for `_simulated`.
        arn: Of the role.

    Returns:
        Whether it is there.
    """
    import botocore.exceptions

    name = arn.rpartition("/")[2]
    try:
        role = place.client("iam").get_role(RoleName=name)["Role"]
    except botocore.exceptions.ClientError as error:
        if _code(error) != "NoSuchEntity":
            raise
        mend = f"aws iam create-role --role-name {name} --assume-role-policy-document {shlex.quote(_TRUST)}"
        yield Finding(topic, f"there is no role {name}", "fail", mend)
        return False
    if _TASKS not in json.dumps(role.get("AssumeRolePolicyDocument", {})):
        mend = f"aws iam update-assume-role-policy --role-name {name} --policy-document {shlex.quote(_TRUST)}"
        yield Finding(topic, f"no job may assume {name}: its trust policy has no {_TASKS}", "fail", mend)
    if wanted:
        yield from _simulated(place, topic, arn, wanted)
    return True


_TRUST = json.dumps(
    {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Principal": {"Service": _TASKS}, "Action": "sts:AssumeRole"}],
    },
    separators=(",", ":"),
)


def _bucket(place: _Place) -> Iterator[Finding]:
    """Examine the bucket: whether there is one, where it is, whether you may list it."""
    import botocore.exceptions

    topic, bucket, region, s3 = "bucket", place.bucket, place.cloud.region, place.client("s3")
    if not bucket:
        yield Finding(topic, "no bucket was named: give --run s3://BUCKET/run", UNCHECKED)
        return
    make = f"aws s3 mb s3://{bucket}{{}}{place.at}"
    try:
        reply = s3.head_bucket(Bucket=bucket)
    except botocore.exceptions.ClientError as error:
        reply = error.response
        if _code(error) in ("404", "NoSuchBucket"):
            yield Finding(topic, f"there is no bucket s3://{bucket}", "fail", make.format(""))
            return
        if _code(error) in ("403", "AccessDenied"):
            look = f"aws s3api get-bucket-policy --bucket {bucket}"
            yield Finding(topic, f"s3://{bucket} is there, and you may not list it", "fail", look)
    where = reply.get("BucketRegion") or reply["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region", "")
    here = region or s3.meta.region_name
    if not where:
        look = f"aws s3api get-bucket-location --bucket {bucket}"
        yield Finding(topic, f"s3://{bucket} does not say where it is", UNCHECKED, look)
    elif where != here:
        text = f"s3://{bucket} is in {where}, the jobs in {here}: every save and restore crosses regions, and is billed"
        yield Finding(topic, text, "warning", make.format(f"-{here}"))
    else:
        yield Finding(topic, f"s3://{bucket} is in {where}, as the jobs are")


def _image(place: _Place) -> Iterator[Finding]:
    """Look an image up in ECR; other registries are not asked."""
    import botocore.exceptions

    topic, image = "image", place.cloud.image
    if not image:
        yield Finding(topic, "no image was named: give --image", UNCHECKED)
        return
    known = re.fullmatch(r"(\d{12})\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com/([^:@]+)(?::([\w.-]+))?(?:@(.+))?", image)
    if known is None:
        yield Finding(topic, f"{image} is not in ECR", UNCHECKED, f"docker manifest inspect {shlex.quote(image)}")
        return
    account, region, name, tag, digest = known.groups()
    which = {"imageDigest": digest} if digest else {"imageTag": tag or "latest"}
    try:
        place.client("ecr").describe_images(registryId=account, repositoryName=name, imageIds=[which])
    except botocore.exceptions.ClientError as error:
        if _code(error) == "RepositoryNotFoundException":
            mend = f"aws ecr create-repository --repository-name {name} --region {region}"
            yield Finding(topic, f"there is no repository {name} in ECR", "fail", mend)
        elif _code(error) == "ImageNotFoundException":
            yield Finding(topic, f"there is no {image}", "fail", f"docker push {shlex.quote(image)}")
        else:
            raise
        return
    here = place.cloud.region
    other = here and region != here
    text = f"{image} is there" + (
        f", in {region}, while jobs are in {here}: each start pulls it from there" * bool(other)
    )
    yield Finding(topic, text, "warning" if other else "ok")


def _quota(place: _Place) -> Iterator[Finding]:
    """Tell whether the account may have as many vCPUs as a job takes, of each kind that the queue has."""
    codes = dict.fromkeys(_codes(place.environments))
    for code in codes:
        quota = place.client("service-quotas").get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]
        limit, needed = float(quota["Value"]), place.cloud.cpus or 4
        mend = (
            f"aws service-quotas request-service-quota-increase --service-code ec2 --quota-code {code} "
            f"--desired-value {needed}{place.at}"
        )
        text = f"{quota['QuotaName']}: {limit:g} vCPUs, a job takes {needed}"
        yield Finding("quota", text) if limit >= needed else Finding("quota", text, "fail", mend)
    if not codes:
        look = f"aws service-quotas list-service-quotas --service-code ec2{place.at}"
        yield Finding(
            "quota", "no quota is known for the instances that the queue's environments start", UNCHECKED, look
        )


def _codes(environments: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the codes of the quotas that instances of compute environments count towards."""
    for one in environments:
        resources = one.get("computeResources", {})
        spot = resources.get("type") == "SPOT"
        for kind in resources.get("instanceTypes", []):
            family = str(kind).split(".")[0]
            letters = re.match("[a-z]*", family)
            assert letters
            group = _GROUPS.get(letters[0])
            if group == "p" and spot and family.startswith("p5"):
                group = "p5"
            if group is not None:
                yield _QUOTAS[group, spot]


_CHECKS: tuple[tuple[str, Callable[[_Place], Iterable[Finding]]], ...] = (
    ("queue", _queue),
    ("your rights", _user),
    ("job's role", _role),
    ("execution role", _execution_role),
    ("bucket", _bucket),
    ("image", _image),
    ("quota", _quota),
)
"""What is checked; the queue first, whose environments the quota is asked for."""

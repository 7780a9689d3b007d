"""`jobkit doctor --on aws`, against moto's queues, buckets and images, and an account that says who may what."""

import json
import random
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import boto3
import pytest

from launch.backends.cloud import aws_doctor
from launch.backends.cloud.aws import Aws
from launch.spec.cloud_options import Cloud
from launch.spec.jobspec import JobSpec
from tests.fakes.aws_account_server import AwsAccountServer
from tests.fakes.gcs_server import GcsServer
from tests.harness.desk import Desk

pytestmark = pytest.mark.slow  # moto takes seconds to start
ROLE = "arn:aws:iam::123456789012:role/trainer"
REGISTRY = "123456789012.dkr.ecr.us-east-1.amazonaws.com"


@pytest.fixture(scope="module")
def queue(moto: dict[str, str]) -> str:
    """Make a job queue with an environment of spot instances; it is there for all tests."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in moto.items():
            patched.setenv(name, value)
        name = f"spot-{random.randrange(10**9)}"
        iam, ec2, batch = (boto3.client(service) for service in ("iam", "ec2", "batch"))
        role = iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")["Role"]["Arn"]
        profile = iam.create_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Arn"]
        subnet = ec2.describe_subnets()["Subnets"][0]
        vpc = [{"Name": "vpc-id", "Values": [subnet["VpcId"]]}]
        groups = ec2.describe_security_groups(Filters=vpc)["SecurityGroups"]
        resources = {
            "type": "SPOT", "minvCpus": 0, "maxvCpus": 64, "desiredvCpus": 0, "instanceTypes": ["m5.xlarge"],
            "subnets": [subnet["SubnetId"]], "securityGroupIds": [groups[0]["GroupId"]], "instanceRole": profile,
            "spotIamFleetRole": role,
        }  # fmt: skip
        made = batch.create_compute_environment(
            computeEnvironmentName=name, type="MANAGED", state="ENABLED", serviceRole=role, computeResources=resources
        )
        order = [{"order": 1, "computeEnvironment": made["computeEnvironmentArn"]}]
        batch.create_job_queue(jobQueueName=name, state="ENABLED", priority=1, computeEnvironmentOrder=order)
        boto3.client("s3").create_bucket(Bucket=name)
        ecr = boto3.client("ecr")
        ecr.create_repository(repositoryName=name)
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        manifest = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": {"digest": "sha256:0"}, "layers": []})
        ecr.put_image(repositoryName=name, imageManifest=manifest, imageManifestMediaType=kind, imageTag="1")
        return name


@pytest.fixture
def account() -> Iterator[AwsAccountServer]:
    """Run what moto lacks."""
    with AwsAccountServer() as server:
        yield server


@pytest.fixture
def desk(
    moto: dict[str, str], account: AwsAccountServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Desk]:
    """Seat a user at them."""
    with GcsServer() as unused:
        user = Desk(tmp_path, unused)
        user.use(monkeypatch, moto | account.environment)
        yield user


def ask(desk: Desk, queue: str, *options: str, code: int = 0) -> list[dict[str, Any]]:
    """Return the findings; an option that is given again is the later one's."""
    words = ("--queue", queue, "--region", "us-east-1", "--image", f"{REGISTRY}/{queue}:1", "--service-account", ROLE)
    where = ("--run", f"s3://{queue}/run", *options)
    told = desk.jobkit("doctor", "--on", "aws", *words, *where, "--json", code=code, errors=False)
    found: list[dict[str, Any]] = json.loads(told)
    return found


def test_the_role_that_reads_secrets(desk: Desk, queue: str, account: AwsAccountServer) -> None:
    """Where there are secrets the role that reads them is looked at: there, trusted, allowed to read just these."""
    arn = "arn:aws:secretsmanager:us-east-1:123456789012:secret:wandb-AbCdEf"
    secrets = ("--secret", f"KEY={arn}:key::", "--secret", "TOKEN=/hub/token")
    given = (*secrets, "--execution-role", ROLE.replace("trainer", "reader"))
    ((topic, verdict, mend),) = bad(ask(desk, queue, *given, code=1))
    assert (topic, verdict) == ("execution role", "fail")
    assert mend.startswith("aws iam create-role --role-name reader ")
    account.roles["reader"] = account.roles["trainer"]
    assert bad(ask(desk, queue, *given)) == []
    account.denied.add("secretsmanager:GetSecretValue")
    ((topic, verdict, mend),) = bad(ask(desk, queue, *given, code=1))
    assert (topic, verdict) == ("execution role", "fail")
    assert f'"Resource":"{arn}"' in mend
    assert '"Action":["ssm:GetParameters"],"Resource":"arn:aws:ssm:*:*:parameter/hub/token"' in mend


@pytest.mark.parametrize(
    ("kinds", "spot", "codes"),
    [
        (["optimal", "m7i.large", "c6g"], True, ["L-34B43A08"]),
        (["g5.xlarge", "gr6.4xlarge"], True, ["L-3819A6DF"]),
        (["p5.48xlarge", "p4d.24xlarge"], True, ["L-C4BD4855", "L-7212CCBC"]),
        (["p5.48xlarge"], False, ["L-417A185B"]),
        (["trn1.2xlarge", "x2gd.large"], True, []),
    ],
)
def test_quotas_by_family(kinds: list[str], spot: bool, codes: list[str]) -> None:
    """Instances count towards the quota of their family; of families that jobkit does not know none is named."""
    resources = {"type": "SPOT" if spot else "EC2", "instanceTypes": kinds}
    assert list(dict.fromkeys(aws_doctor._codes([{"computeResources": resources}]))) == codes


def bad(findings: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return topic, verdict and remedy of what is not well."""
    return [(one["topic"], one["verdict"], one["mend"]) for one in findings if one["verdict"] != "ok"]


def test_an_account_in_which_a_job_can_run(desk: Desk, queue: str) -> None:
    """Everything is looked at and found well; exit code 0."""
    found = ask(desk, queue)
    assert bad(found) == []
    assert {one["topic"] for one in found} == {
        "credentials", "queue", "your rights", "job's role", "bucket", "image", "quota",
    }  # fmt: skip


def test_what_is_wrong_and_the_command_that_mends_it(desk: Desk, queue: str, account: AwsAccountServer) -> None:
    """Each thing that is missing is found by itself, with its command; a failed one is exit code 1."""
    cases: list[tuple[tuple[str, ...], dict[str, Any], str, str, str]] = [
        (("--queue", "nowhere"), {}, "queue", "fail", "aws batch describe-job-queues --region us-east-1 *"),
        (("--cpus", "96"), {}, "queue", "fail", "aws batch update-compute-environment * maxvCpus=96"),
        ((), {"denied": {"batch:SubmitJob"}}, "your rights", "fail", "aws iam put-*-policy *batch:SubmitJob*"),
        ((), {"denied": {"s3:PutObject"}}, "job's role", "fail", "aws iam put-role-policy --role-name trainer *"),
        ((), {"denied": {"batch:SubmitJob"}}, "job's role", "warning", "aws iam put-role-policy *batch:SubmitJob*"),
        ((), {"roles": {}}, "job's role", "fail", "aws iam create-role --role-name trainer *ecs-tasks*"),
        ((), {"roles": {"trainer": {}}}, "job's role", "fail", "aws iam update-assume-role-policy *"),
        (("--service-account", ""), {}, "job's role", "not checked", "aws batch describe-compute-environments *"),
        (("--run", "s3://not-there-1/run"), {}, "bucket", "fail", "aws s3 mb s3://not-there-1 --region us-east-1"),
        (("--region", "us-west-2", "--queue", "x"), {}, "bucket", "warning", "aws s3 mb s3://*-us-west-2 *"),
        (("--image", f"{REGISTRY}/{queue}:2"), {}, "image", "fail", "docker push *:2"),
        (("--image", f"{REGISTRY}/nothing:1"), {}, "image", "fail", "aws ecr create-repository * nothing *"),
        (("--image", "lab/train:1"), {}, "image", "not checked", "docker manifest inspect lab/train:1"),
        ((), {"quotas": {"L-34B43A08": ("Spot", 0.0)}}, "quota", "fail", "aws service-quotas request-* L-34B43A08 *"),
        ((), {"quotas": {}}, "quota", "not checked", ""),
        ((), {"blind": True}, "your rights", "not checked", "aws iam simulate-principal-policy *"),
    ]
    for options, change, topic, verdict, mend in cases:
        before = {name: getattr(account, name) for name in change}
        for name, value in change.items():
            setattr(account, name, value)
        code = 1 if verdict == "fail" or "us-west-2" in options or "denied" in change else 0
        found = bad(ask(desk, queue, *options, code=code))
        assert any(one[:2] == (topic, verdict) and fnmatch(one[2], mend) for one in found), (mend, found)
        for name, value in before.items():
            setattr(account, name, value)


def test_credentials_and_network(desk: Desk, queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network nothing is checked, soon; without credentials or a region the first thing to do is said."""
    with monkeypatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        found = ask(desk, queue)
        assert {one["verdict"] for one in found} == {"not checked"}
        assert "AWS does not answer" in found[0]["text"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # which has read them
    first, *rest = ask(desk, queue, code=1)
    assert (first["topic"], first["verdict"], first["mend"]) == ("credentials", "fail", "aws configure")
    assert {one["verdict"] for one in rest} == {"not checked"}


def test_a_profile_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """An AWS_PROFILE that no file has is a finding, as any other credentials that are none."""
    monkeypatch.setenv("AWS_PROFILE", "nowhere")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    cloud = Cloud(queue="q", region="us-east-1")
    first, *rest = Aws().diagnose(JobSpec(command=("true",), run="s3://bucket/run", cloud=cloud))
    assert (first.topic, first.verdict, first.mend) == ("credentials", "fail", "aws configure")
    assert "nowhere" in first.text
    assert {one.verdict for one in rest} == {"not checked"}

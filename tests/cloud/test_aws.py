"""Runs on AWS Batch, against moto: what is asked for, refusals, and what the container does when it is run."""

import json
import random
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import msgspec
import pytest

from jobkit import contract
from jobkit.errors import ConfigError
from launch.backends.cloud import aws
from launch.spec.cloud_options import Cloud
from launch.spec.jobspec import JobSpec
from tests.fakes.batch_vm import Processes, Vm
from tests.fakes.gcs_server import GcsServer
from tests.harness.desk import Desk


@pytest.fixture
def desk(moto: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """Seat a user at a bucket and a job queue; jobs that are submitted succeed without being run."""
    setting = json.dumps({"batch": {"use_docker": False}}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{moto['AWS_ENDPOINT_URL']}/moto-api/config", setting)).close()
    with GcsServer() as unused:
        user = Desk(tmp_path, unused)
        user.use(monkeypatch, moto)
        fsspec.filesystem("s3").clear_instance_cache()
        user.write("import os; print('attempt', os.environ['JOBKIT_ATTEMPT'])")
        yield user


@pytest.fixture
def queue(moto: dict[str, str], desk: Desk) -> str:
    """Make a job queue."""
    name = f"spot-{random.randrange(10**9)}"
    trust = json.dumps({"Version": "2012-10-17", "Statement": []})
    role = boto3.client("iam").create_role(RoleName=name, AssumeRolePolicyDocument=trust)["Role"]["Arn"]
    batch = boto3.client("batch")
    made = batch.create_compute_environment(
        computeEnvironmentName=name, type="UNMANAGED", state="ENABLED", serviceRole=role
    )
    order = [{"order": 1, "computeEnvironment": made["computeEnvironmentArn"]}]
    batch.create_job_queue(jobQueueName=name, state="ENABLED", priority=1, computeEnvironmentOrder=order)
    return name


@pytest.fixture
def url(desk: Desk) -> str:
    """Make a bucket; return the URL of a run in it."""
    bucket = f"bucket-{random.randrange(10**9)}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}/run"


def submit(desk: Desk, queue: str, url: str, *options: str, code: int = 0) -> str:
    """Submit the program."""
    words = ("--on", "aws", "--queue", queue, "--image", "registry/train:1", "--run", url)
    return desk.jobkit("submit", *words, *options, "--", "python", "train.py", code=code)


def jobs(queue: str) -> list[dict[str, Any]]:
    """Return the jobs of a queue as the service describes them."""
    client = boto3.client("batch")
    listed = client.list_jobs(jobQueue=queue, filters=[{"name": "JOB_NAME", "values": ["*"]}])["jobSummaryList"]
    return list(client.describe_jobs(jobs=[job["jobId"] for job in listed])["jobs"]) if listed else []


def definition_of(job: dict[str, Any]) -> dict[str, Any]:
    """Return what a job was defined as."""
    told = boto3.client("batch").describe_job_definitions(jobDefinitions=[job["jobDefinition"]])
    (found,) = told["jobDefinitions"]
    return dict(found)


def test_a_region_of_the_users_own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job, which may submit its successor, is told the region that only a file here names; or none at all."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    spec = JobSpec(command=("ls",), cloud=Cloud(image="train:1", queue="spot"))
    for text, region in (("[default]\nregion = eu-west-1\n", "eu-west-1"), ("", "")):
        (tmp_path / "config").write_text(text)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        completed = aws.Aws().complete(spec).cloud
        assert completed is not None
        assert completed.region == region


@pytest.mark.slow
def test_submit_run_resume(desk: Desk, queue: str, url: str, moto: dict[str, str]) -> None:
    """The container that was asked for trains the run to its end; a job that ends without it is told of and resumed."""
    submit(desk, queue, url, "--max-restarts", "4", "--env", "MODE=fast", "--gpus", "1", "--label", "team=vision")
    (job,) = jobs(queue)
    defined = definition_of(job)
    rules = defined["retryStrategy"]["evaluateOnExit"]
    assert defined["retryStrategy"]["attempts"] == 5
    assert [(rule["action"].upper(), rule.get("onExitCode")) for rule in rules] == [
        ("RETRY", None), ("RETRY", "75"), ("RETRY", "143"), ("EXIT", None),
    ]  # fmt: skip
    container = defined["containerProperties"]
    needs = {need["type"]: need["value"] for need in container["resourceRequirements"]}
    assert needs == {"VCPU": "4", "MEMORY": str(14 * 1024), "GPU": "1"}
    told = desk.until(lambda told: told["state"] == "failed", url=url)
    assert "has ended (succeeded)" in told["reason"], "the service's word alone makes no run done"
    desk.jobkit("resume", url)
    assert sorted(job["jobName"][-2:] for job in jobs(queue)) == ["-0", "-1"]

    newest = max(jobs(queue), key=lambda job: job["jobName"])
    container = definition_of(newest)["containerProperties"]
    environment = {pair["name"]: pair["value"] for pair in container["environment"]}
    assert environment["MODE"] == "fast"
    entrypoint, *words = container["command"]
    vm = Vm(newest["jobName"], {"entrypoint": entrypoint, "commands": words}, moto | environment)
    try:
        running = Processes().start(vm, desk.home / "log")
        assert running.wait(60) == 0, (desk.home / "log").read_text()
    finally:
        vm.close()
    assert desk.status(url)["state"] == "done"
    assert "attempt 0" in desk.jobkit("logs", url)
    assert "already done" in desk.jobkit("resume", url)
    assert json.loads(desk.jobkit("ls", url.rpartition("/")[0], "--json"))[0]["backend"] == "aws"


@pytest.mark.slow
def test_dry_run_and_cancel(desk: Desk, queue: str, url: str) -> None:
    """A dry run prints the request and sends nothing; a cancel is written and the run never comes back."""
    secret = ("--secret", "TOKEN=arn:aws:ssm:x", "--execution-role", "arn:aws:iam::123456789012:role/reader")
    asked = json.loads(submit(desk, queue, url, "--dry-run", "--time", "2h", *secret))
    assert asked["definition"]["timeout"] == {"attemptDurationSeconds": 7200}
    assert asked["definition"]["containerProperties"]["secrets"] == [{"name": "TOKEN", "valueFrom": "arn:aws:ssm:x"}]
    assert asked["definition"]["containerProperties"]["executionRoleArn"].endswith("role/reader")
    assert not jobs(queue)
    submit(desk, queue, url)
    desk.jobkit("cancel", url)
    assert desk.status(url)["state"] == "cancelled"
    assert fsspec.filesystem("s3").exists(f"{url}/{contract.CANCEL}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--queue", "nowhere"], "check --queue nowhere"),
        (["--queue", ""], "no job queue: give --queue"),
        (["--gpus", "many"], "on AWS give their number"),
        (["--machine-type", "g2-standard-8"], "--machine-type is for --on gcp"),
        (["--max-restarts", "-1"], "give 0 or more, or leave it out"),
        (["--secret", "TOKEN=arn:aws:ssm:x"], "give --execution-role ROLE_ARN"),
    ],
)
def test_what_is_refused_leaves_nothing(options: list[str], message: str, desk: Desk, queue: str, url: str) -> None:
    """One sentence with the remedy, exit code 2; no object, no job."""
    said = submit(desk, queue, url, *options, code=2)
    assert message in said
    assert len(said.strip().splitlines()) == 1, said
    assert fsspec.filesystem("s3").find(url.rpartition("/")[0]) == []
    assert not jobs(queue)


def test_the_bucket_that_a_job_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """A directory of this machine is refused, Google's bucket is remarked upon; both with s3:// as the remedy."""
    monkeypatch.setenv("JOBKIT_HOME", str(tmp_path / "homes"))
    (tmp_path / "train.py").touch()
    spec = JobSpec(command=("python", "train.py"), cwd=str(tmp_path), cloud=Cloud(image="train:1", queue="spot"))
    with pytest.raises(ConfigError, match=r"a VM does not see runs/one: .* such as --run s3://BUCKET/run"):
        aws.Aws().check(msgspec.structs.replace(spec, run="runs/one"))
    aws.Aws().check(msgspec.structs.replace(spec, run="gs://bucket/one"), look=False)
    assert "jobs on aws are not signed in where gs://bucket/one is: give --run s3://BUCKET" in capfd.readouterr().err
    aws.Aws().check(msgspec.structs.replace(spec, run="s3://bucket/one"), look=False)
    assert not capfd.readouterr().err


def test_credentials_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong or old credentials: one sentence that says whose, and what to do."""
    monkeypatch.setenv("AWS_PROFILE", "lab")
    spec = JobSpec(command=("true",), cloud=Cloud(queue="q"))
    said = str(aws._explain({"Code": "ExpiredTokenException", "Message": "The token is expired."}, spec))
    assert said.startswith("AWS refuses the credentials of ")
    assert said.endswith("(ExpiredTokenException): aws sso login, or aws configure")
    assert said.count("refuse") == 1


@pytest.mark.slow
def test_without_credentials(desk: Desk, queue: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is not signed in is told how to; without a program boto3 could ask, too."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    said = submit(desk, queue, url, code=2)
    assert "sign in" in said or "aws configure" in said
    assert len(said.strip().splitlines()) == 1, said

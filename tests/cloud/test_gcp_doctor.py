"""`jobkit doctor --on gcp`, against a project whose APIs say what a test took away."""

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.gcp_batch_server import BatchServer
from tests.fakes.gcp_project import DEFAULT
from tests.fakes.gcs_server import GcsServer
from tests.harness.desk import Desk

IMAGE = "us-central1-docker.pkg.dev/test-project/images/team/train:1"
TAG = "projects/test-project/locations/us-central1/repositories/images/packages/team%2Ftrain/tags/1"
ASK = ("doctor", "--on", "gcp", "--region", "us-central1", "--image", IMAGE, "--run", "gs://bucket/r1")


@pytest.fixture
def gcs() -> Iterator[GcsServer]:
    """Run an emulated bucket, where jobs are."""
    with GcsServer() as server:
        server.storage.locations["bucket"] = "US-CENTRAL1"
        yield server


@pytest.fixture
def batch(gcs: GcsServer) -> Iterator[BatchServer]:
    """Run a project's APIs."""
    with BatchServer(gcs.environment()) as server:
        server.cloud.images.add(TAG)
        yield server


@pytest.fixture
def desk(tmp_path: Path, gcs: GcsServer, batch: BatchServer, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Seat a user at the two."""
    user = Desk(tmp_path, gcs)
    user.use(monkeypatch, gcs.environment() | batch.environment)
    return user


def ask(desk: Desk, *options: str, code: int = 0) -> list[dict[str, Any]]:
    """Return the findings; those that go to a person too are the same."""
    told: list[dict[str, Any]] = json.loads(desk.jobkit(*ASK, *options, "--json", code=code, errors=False))
    return told


def bad(findings: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return topic, verdict and remedy of what is not well."""
    return [(one["topic"], one["verdict"], one["mend"]) for one in findings if one["verdict"] != "ok"]


def test_a_project_in_which_a_job_can_run(desk: Desk) -> None:
    """Everything is looked at and found well, in JSON and in words; exit code 0."""
    found = ask(desk, "--gpus", "L4:1")
    assert bad(found) == []
    assert {one["topic"] for one in found} == {
        "credentials", "APIs", "your roles", "job's account", "bucket", "image", "machine", "quota",
    }  # fmt: skip
    assert "g2-standard-8 is in us-central1-a, us-central1-b" in desk.jobkit(*ASK, "--gpus", "L4:1")


@pytest.mark.parametrize(
    ("take", "topic", "verdict", "mend"),
    [
        (lambda cloud, gcs: cloud.disabled.add("batch"), "APIs", "fail",
         "gcloud services enable batch.googleapis.com --project test-project"),
        (lambda cloud, gcs: cloud.withheld.add("batch.jobs.create"), "your roles", "fail",
         "gcloud projects add-iam-policy-binding test-project --member=* --role=roles/batch.jobsEditor"),
        (lambda cloud, gcs: cloud.withheld.add("iam.serviceAccounts.actAs"), "job's account", "fail",
         f"gcloud iam service-accounts add-iam-policy-binding {DEFAULT} *--role=roles/iam.serviceAccountUser"),
        (lambda cloud, gcs: cloud.accounts.clear(), "job's account", "fail",
         "gcloud services enable compute.googleapis.com *"),
        (lambda cloud, gcs: cloud.bindings.clear(), "job's account", "warning",
         f"*--member=serviceAccount:{DEFAULT} --role=roles/batch.agentReporter"),
        (lambda cloud, gcs: cloud.bindings.clear(), "job's account", "warning",
         f"gcloud projects * --member=serviceAccount:{DEFAULT} --role=roles/batch.jobsEditor"),
        (lambda cloud, gcs: cloud.bindings.clear(), "job's account", "warning",
         f"gcloud iam * {DEFAULT} * --member=serviceAccount:{DEFAULT} --role=roles/iam.serviceAccountUser"),
        (lambda cloud, gcs: gcs.storage.buckets.clear(), "bucket", "fail",
         "gcloud storage buckets create gs://bucket --project test-project --location us-central1"),
        (lambda cloud, gcs: gcs.storage.locations.update(bucket="EUROPE-WEST4"), "bucket", "warning",
         "gcloud storage buckets create gs://bucket-us-central1 *"),
        (lambda cloud, gcs: gcs.storage.withheld.add("storage.objects.create"), "bucket", "fail",
         "gcloud storage buckets add-iam-policy-binding gs://bucket --role=roles/storage.objectUser --member=*"),
        (lambda cloud, gcs: cloud.images.clear(), "image", "fail", f"docker push {IMAGE}"),
        (lambda cloud, gcs: cloud.machines.clear(), "machine", "fail", "gcloud compute machine-types list *"),
        (lambda cloud, gcs: cloud.quotas.update(CPUS=(2.0, 0.0)), "quota", "fail",
         "gcloud beta quotas preferences create *--quota-id=CPUS-per-project-region *--preferred-value=4"),
        (lambda cloud, gcs: cloud.quotas.update(CPUS=(8.0, 7.0)), "quota", "warning", "*--preferred-value=11"),
    ],
)  # fmt: skip
def test_what_is_wrong_and_the_command_that_mends_it(
    take: Any, topic: str, verdict: str, mend: str, desk: Desk, batch: BatchServer, gcs: GcsServer
) -> None:
    """Each thing that is missing is found by itself, with its command; a failed one is exit code 1."""
    take(batch.cloud, gcs)
    found = bad(ask(desk, code=1 if verdict == "fail" else 0))
    assert any(one[:2] == (topic, verdict) and fnmatch(one[2], mend) for one in found), found
    assert not [one for one in found if one[0] not in (topic, "bucket")], found


@pytest.mark.parametrize(
    ("take", "topic", "said"),
    [
        (lambda cloud, gcs: cloud.disabled.add("iam"), "job's account", "gcloud services enable iam.googleapis.com"),
        (lambda cloud, gcs: cloud.withheld.add("resourcemanager.projects.getIamPolicy"), "job's account",
         "gcloud projects get-iam-policy test-project"),
        (lambda cloud, gcs: cloud.withheld.add("serviceusage.services.get"), "APIs", "gcloud services list --enabled"),
        (lambda cloud, gcs: gcs.faults.forbid("bucket.policy"), "bucket", "gcloud storage buckets get-iam-policy"),
        (lambda cloud, gcs: gcs.faults.forbid("bucket.get "), "bucket", "gcloud storage buckets describe gs://bucket"),
    ],
)  # fmt: skip
def test_what_may_not_be_read_is_not_checked(
    take: Any, topic: str, said: str, desk: Desk, batch: BatchServer, gcs: GcsServer
) -> None:
    """It is no failure, and says how somebody else can look; everything else is checked all the same."""
    take(batch.cloud, gcs)
    found = ask(desk)
    assert any(one[:2] == (topic, "not checked") and said in one[2] for one in bad(found)), bad(found)
    assert {one["topic"] for one in found if one["verdict"] == "ok"} >= {"credentials", "your roles", "image", "quota"}


def test_several_vms_take_as_much_as_all_of_them(desk: Desk, batch: BatchServer) -> None:
    """There is quota for two of four CPUs, and not for three."""
    batch.cloud.quotas.update(CPUS=(8.0, 0.0))
    assert bad(ask(desk, "--nodes", "2")) == []
    ((topic, verdict, mend),) = bad(ask(desk, "--nodes", "3", code=1))
    assert (topic, verdict, mend.rpartition("=")[2]) == ("quota", "fail", "12")


def test_other_registries_and_no_bucket(desk: Desk) -> None:
    """What was not named, or lies where nobody is asked, is said to be unchecked, with what to give or do."""
    found = json.loads(desk.jobkit(*ASK[:5], "--image", "ghcr.io/lab/train:1", "--json"))
    said = {one["topic"]: one for one in found if one["verdict"] == "not checked"}
    assert said["image"]["mend"] == "docker manifest inspect ghcr.io/lab/train:1"
    assert "give --run gs://BUCKET/run" in said["bucket"]["text"]


@pytest.mark.slow
def test_without_a_network_it_is_over_soon(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first API that does not answer is asked for a few seconds, the others not at all."""
    monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_SERVICEUSAGE", "http://127.0.0.1:9")
    found = ask(desk)
    assert [one["verdict"] for one in found] == ["not checked"] * 7
    assert all("127.0.0.1:9 does not answer" in one["text"] for one in found), found


def test_who_is_not_signed_in(desk: Desk, batch: BatchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project that is named can not be looked at: the one thing to do comes first."""
    monkeypatch.setattr("google.auth.compute_engine._metadata._NO_GCE_CHECK", True)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setattr("google.auth._default._get_gce_credentials", lambda *_, **__: (None, None))
    first, *rest = ask(desk, "--project", "test-project", code=1)
    assert (first["verdict"], first["mend"]) == ("fail", "gcloud auth application-default login")
    assert {one["verdict"] for one in rest} == {"not checked"}


def test_points_that_wait_for_one_another(desk: Desk, batch: BatchServer) -> None:
    """Their jobs need the roles of a successor, however few restarts there may be."""
    desk.write("[profile.few]\narray-parallelism = 2\n", "jobkit.toml")
    batch.cloud.bindings.clear()
    for options, said in ((("--profile", "few"), 2), ((), 0)):
        found = ask(desk, "--max-restarts", "3", *options)
        assert sum("without it no point of a sweep has the next one begin" in one["text"] for one in found) == said


def test_places_without_a_doctor(desk: Desk) -> None:
    """On this machine there is nothing to examine, and a probe is SLURM's."""
    assert "there is nothing to examine" in desk.jobkit("doctor", "--on", "local", code=2)
    assert "--probe is for --on slurm" in desk.jobkit(*ASK, "--probe", code=2)

"""The clouds' metadata servers: those of the tests, held against the clouds' clients; and what jobkit makes of them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobkit.errors import ConfigError
from jobkit.rundir.ledger import attempt_events
from jobkit.supervise import cloud_metadata
from jobkit.supervise.cloud_metadata import CloudEvent, Kind, Watch, cloud_of
from jobkit.supervise.heartbeat import Phase
from tests.fakes.metadata_server import Aws, Azure, Cloud, Gce
from tests.harness.jobs import until
from tests.training.test_supervise import PROGRAM, Supervised


def test_google_auth_takes_the_server_for_a_vm() -> None:
    """google-auth finds project, account and token on it, as on a VM."""
    code = (
        "import google.auth, google.auth.transport.requests as transport\n"
        "credentials, project = google.auth.default(scopes=['https://www.googleapis.com/auth/cloud-platform'])\n"
        "credentials.refresh(transport.Request())\n"
        "print(type(credentials).__module__, project, credentials.token, credentials.service_account_email)"
    )
    with Gce(project="mine", token="secret") as cloud:
        printed = subprocess.check_output([sys.executable, "-c", code], env=os.environ | cloud.environment, text=True)
    assert printed.split() == [
        "google.auth.compute_engine.credentials",
        "mine",
        "secret",
        "job@test-project.iam.gserviceaccount.com",
    ]


def test_botocore_takes_the_server_for_an_instance() -> None:
    """Botocore fetches a token from it, and is then told that the instance has no role."""
    code = (
        "import os; from botocore.utils import InstanceMetadataFetcher\n"
        "config = {'ec2_metadata_service_endpoint': os.environ['AWS_EC2_METADATA_SERVICE_ENDPOINT']}\n"
        "assert InstanceMetadataFetcher(timeout=5, config=config).retrieve_iam_role_credentials() == {}"
    )
    with Aws() as cloud:
        subprocess.check_call([sys.executable, "-c", code], env=os.environ | cloud.environment)
        assert cloud.requests == ["PUT /latest/api/token", "GET /latest/meta-data/iam/security-credentials/"]


# The watchers themselves.


def heard(watch: Watch, count: int = 1, seconds: float = 15.0) -> list[CloudEvent]:
    """Wait for as many words and return them."""
    found: list[CloudEvent] = []

    def enough() -> bool:
        found.extend(watch.events())
        return len(found) >= count

    until(enough, f"{count} words are heard", seconds=seconds)
    return found


@pytest.fixture
def watch_of() -> Iterator[Callable[[Cloud, str], Watch]]:
    """Start watchers of a cloud, and stop them at the end."""
    started = []

    def start(cloud: Cloud, name: str) -> Watch:
        watch = Watch(name, cloud.environment)
        watch.start()
        started.append(watch)
        return watch

    yield start
    for watch in started:
        watch.close()


Start = Callable[[Cloud, str], Watch]


@pytest.mark.timing
def test_gce_tells_the_instant_it_changes(watch_of: Start) -> None:
    """A preemption comes through the request that waits for it, with 30 s left; the server is not asked meanwhile."""
    with Gce() as cloud:
        watch = watch_of(cloud, "gce")
        until(lambda: any("wait_for_change" in request for request in cloud.requests), "it waits for a change")
        time.sleep(1.5)
        assert len(cloud.requests) == 3  # both values, and the request that waits
        cloud.preempt()
        (said,) = heard(watch)
    assert (said.kind, said.source, said.reason) == (Kind.NOTICE, "gce", "Google Compute Engine preempts this VM")
    assert said.deadline_at is not None
    assert 25 < said.deadline_at - time.monotonic() <= 30


def test_gce_maintenance_is_information(watch_of: Start) -> None:
    """A host that will be serviced is told of without ending anything."""
    with Gce() as cloud:
        cloud.set("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        (said,) = heard(watch_of(cloud, "gce"))
    assert (said.kind, said.deadline_at) == (Kind.INFORMATION, None)
    assert "TERMINATE_ON_HOST_MAINTENANCE" in said.reason


@pytest.mark.timing
def test_aws_tells_the_time_and_renews_its_token(watch_of: Start) -> None:
    """A rebalance recommendation is information; the action has its time, asked for with a token of now."""
    with Aws(token_s=1) as cloud:
        cloud.rebalance()
        watch = watch_of(cloud, "aws")
        (said,) = heard(watch)
        assert said.kind is Kind.INFORMATION
        cloud.preempt(in_s=100)
        (said,) = heard(watch)
        assert cloud.requests.count("PUT /latest/api/token") >= 2
    assert (said.kind, said.source) == (Kind.NOTICE, "aws")
    assert said.deadline_at is not None
    assert 85 < said.deadline_at - time.monotonic() <= 101


@pytest.mark.timing
def test_azure_heeds_its_own_events_and_hears_them_withdrawn(watch_of: Start) -> None:
    """Other machines of a scale set are not ours; an event that begins is still the same; one may be taken back."""
    with Azure() as cloud:
        cloud.preempt(vm="trainers_1")
        watch = watch_of(cloud, "azure")
        cloud.preempt(kind="Freeze")
        assert [said.kind for said in heard(watch)] == [Kind.INFORMATION]
        event = cloud.preempt(in_s=40)
        (said,) = heard(watch)
        assert (said.kind, said.source) == (Kind.NOTICE, "azure")
        assert said.deadline_at is not None
        assert 30 < said.deadline_at - time.monotonic() <= 41
        cloud.begin(event)
        time.sleep(2.5)
        assert list(watch.events()) == []
        cloud.withdraw(event)
        (said,) = heard(watch)
    assert said.kind is Kind.WITHDRAWN


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(Gce, "gce"), (Aws, "aws"), (Azure, "azure")])
def test_a_server_that_fails_is_asked_again(kind: Any, name: str, watch_of: Start) -> None:
    """A burst of refusals delays a notice and loses none; no proxy is asked in its place."""
    with kind() as cloud:
        cloud.failures += [503, 500, 429]
        cloud.preempt()
        os.environ["http_proxy"] = "http://127.0.0.1:1"
        try:
            said = heard(watch_of(cloud, name))
        finally:
            del os.environ["http_proxy"]
    assert [one.kind for one in said] == [Kind.NOTICE]


def test_a_server_that_never_answers_is_told_of_once(watch_of: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no warning can come, the ledger says so and why it may be."""
    monkeypatch.setattr(cloud_metadata, "_PATIENCE_S", 0.5)
    cloud = Aws()
    cloud.close()
    watch = watch_of(cloud, "aws")
    (said,) = heard(watch)
    assert said.kind is Kind.INFORMATION
    assert "hop limit of 2" in said.reason
    time.sleep(1.0)
    assert list(watch.events()) == []


@pytest.mark.parametrize(
    ("environ", "firmware", "cloud"),
    [
        ({}, {}, None),
        ({}, {"product_name": "Google Compute Engine", "sys_vendor": "Google"}, "gce"),
        ({}, {"product_name": "Eve", "sys_vendor": "Google"}, None),  # a laptop
        ({}, {"sys_vendor": "Amazon EC2", "product_name": "g5.xlarge"}, "aws"),
        ({}, {"bios_vendor": "Xen", "bios_version": "4.11.amazon"}, "aws"),
        ({"AWS_EC2_METADATA_DISABLED": "true"}, {"sys_vendor": "Amazon EC2"}, None),
        ({}, {"sys_vendor": "Microsoft Corporation", "product_name": "Virtual Machine"}, None),  # Hyper-V at home
        ({}, {"chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77"}, "azure"),
        ({"JOBKIT_METADATA": "off"}, {"product_name": "Google Compute Engine"}, None),
        ({"JOBKIT_METADATA": "aws"}, {"product_name": "Google Compute Engine"}, "aws"),
        ({"GCE_METADATA_HOST": "127.0.0.1:1"}, {"sys_vendor": "Amazon EC2"}, "gce"),
        ({"JOBKIT_AZURE_METADATA": "http://127.0.0.1:1"}, {}, "azure"),
    ],
)
def test_which_cloud_it_is(
    environ: dict[str, str], firmware: dict[str, str], cloud: str | None, tmp_path: Path
) -> None:
    """The environment is asked first, then the firmware; where neither names a cloud, nobody is asked anything."""
    for name, value in firmware.items():
        (tmp_path / name).write_text(f"{value}\n")
    assert cloud_of(environ, tmp_path) == cloud


def test_a_cloud_that_nobody_knows() -> None:
    """A misspelt cloud is refused, rather than never watched."""
    with pytest.raises(ConfigError, match=r"JOBKIT_METADATA is 'gcp'; give auto, off, gce, aws, azure"):
        cloud_of({"JOBKIT_METADATA": "gcp"})


# Through the supervisor, to the program.

TELLS = PROGRAM.replace(
    'print("saved"',
    'print("told", (pathlib.Path(os.environ["JOBKIT_SUPERVISOR"]) / "notice.json").read_text())\n    print("saved"',
)


def supervised(cloud: Cloud, path: Path) -> Supervised:
    """Start a program under a supervisor on a machine of a cloud; return once it trains."""
    (path / "program.py").write_text(TELLS)
    environment = {"JOBKIT_METADATA": "auto", **cloud.environment}
    program = [sys.executable, str(path / "program.py"), "10000", "0.3"]
    under_test = Supervised(path / "run", *program, environment=environment)
    under_test.wait_for(lambda: "listening" in under_test.log())
    return under_test


def told(under_test: Supervised) -> dict[str, Any]:
    """Return the attempt's outcome, once it is written."""
    under_test.wait_for(lambda: under_test.store.exists("attempts/0/outcome.json"))
    return dict(json.loads(under_test.store.read("attempts/0/outcome.json")))


@pytest.mark.timing
def test_a_preempted_vm_is_left_in_good_order(tmp_path: Path) -> None:
    """The program saves with the cloud's deadline in hand; the supervisor stays until the shutdown, then exits 75.

    Without that the service that starts the run again would do so on the dying machine, and lose one of its tries.
    """
    with Gce() as cloud:
        under_test = supervised(cloud, tmp_path)
        cloud.preempt()
        outcome = told(under_test)
        assert outcome["outcome"] == "preempted"
        assert outcome["notice"] == {"source": "gce", "reason": "Google Compute Engine preempts this VM"}
        time.sleep(1.0)
        assert under_test.process.poll() is None
        under_test.process.terminate()
        code, printed, _ = under_test.end(5)
    assert code == 75
    assert "saved SIGTERM 1" in printed
    notice = json.loads(printed.partition("told ")[2].splitlines()[0])
    assert notice["source"] == "gce"
    assert 0 < notice["deadline_at"] - time.monotonic() < 30


@pytest.mark.slow
def test_a_withdrawn_event_gives_the_machine_back(tmp_path: Path) -> None:
    """What was told cannot be taken back, so the program has left; the supervisor does not wait for the deadline."""
    with Azure() as cloud:
        under_test = supervised(cloud, tmp_path)
        event = cloud.preempt(in_s=300)
        assert told(under_test)["notice"]["source"] == "azure"
        cloud.withdraw(event)
        code, _, _ = under_test.end(10)
    assert code == 75


@pytest.mark.slow
def test_a_shutdown_while_it_saves_ends_it_after_the_save(tmp_path: Path) -> None:
    """The SIGTERM of the machine's shutdown during the save changes nothing but that nobody stays afterwards."""
    with Aws() as cloud:
        under_test = supervised(cloud, tmp_path)
        cloud.preempt(in_s=120)
        under_test.wait_for(lambda: under_test.beat().phase == Phase.STOPPING)
        under_test.process.terminate()
        code, printed, outcome = under_test.end(10)
    assert code == 75
    assert "saved SIGTERM" in printed
    assert outcome["notice"]["source"] == "aws"


def test_information_ends_nothing(tmp_path: Path) -> None:
    """A rebalance recommendation is in the ledger, and training goes on."""
    with Aws() as cloud:
        cloud.rebalance()
        under_test = supervised(cloud, tmp_path)
        (event,) = under_test.wait_for(
            lambda: [event for event in attempt_events(under_test.store, 0) if event["event"] == "metadata"]
        )
        assert event["kind"] == "information"
        assert "likelier" in event["reason"]
        time.sleep(0.5)
        assert under_test.process.poll() is None
        under_test.process.terminate()
        assert under_test.end()[0] == 75

"""Runs on Google Batch: our backend and Google's own client against a service that executes, with VMs that vanish."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from google.api_core.client_options import ClientOptions
from google.api_core.exceptions import Conflict
from google.auth.credentials import AnonymousCredentials
from google.cloud import batch_v1

from jobkit import contract
from jobkit.contract import State
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from launch.backends import registry
from launch.backends.cloud import gcp_request, managed
from launch.backends.cloud.gcp import Gcp
from launch.lifecycle import run_status, submission
from launch.report import follow
from launch.spec.cloud_options import RETRIED, Cloud
from launch.spec.jobspec import JobSpec
from tests.cloud.conftest import GCP
from tests.fakes.batch_vm import Containers
from tests.fakes.gcp_batch_server import BatchServer, Job, RefusedError, checked
from tests.harness import training
from tests.harness.desk import NAME, URL, Desk
from tests.harness.engine import Engine
from tests.harness.jobs import ROOT


def submit(desk: Desk, *options: str, command: tuple[str, ...] = ("python", "train.py", "0.1")) -> str:
    """Submit the training."""
    return desk.jobkit(*GCP, *options, "--", *command)


def end_of(job: Job) -> None:
    """Wait until the service has ended a job."""
    job.thread.join(60)
    assert job.over, job.state


@pytest.fixture
def containers(docker: Engine, desk: Desk, batch: BatchServer) -> Engine:
    """Have the service run its jobs in containers of the repository's own image; the training comes in the snapshot."""
    batch.executor = Containers(docker, docker.image("train,gcs,report"))
    (desk.home / "code" / "tests/harness").mkdir(parents=True)
    for name in ("__init__", "harness/__init__", "harness/training", "harness/training_imports"):
        desk.write((ROOT / f"tests/{name}.py").read_text(), f"tests/{name}.py")
    return docker


@pytest.mark.slow
@pytest.mark.timeout(900)  # the image may have to be made
def test_preempted_twice_in_containers(desk: Desk, batch: BatchServer, containers: Engine, undisturbed: str) -> None:
    """The same with real containers, whose PID 1 gets the signal; none of them is left."""
    test_preempted_twice(desk, batch, undisturbed)
    left = containers.docker("ps", "--all", "--quiet", "--filter", "name=jobkit-test-").stdout
    assert not left.strip()


@pytest.mark.slow
def test_preempted_twice(desk: Desk, batch: BatchServer, undisturbed: str) -> None:
    """Two preemptions with 30 s of notice: 75, 75, 0, bit-equal, every committed step in the bucket, nothing left."""
    submit(desk, "--price-per-hour", "0.5")
    job = batch.only_job()
    seen: set[int] = set()
    for step in (12, 30):
        desk.until_committed(step - step % 10)
        batch.preempt(job, grace_s=30)
        seen |= set(desk.committed())
    told = desk.until_over()
    assert told["state"] == "done", job.log.read_text()
    end_of(job)
    assert (job.codes, job.state) == ([75, 75, 0], "SUCCEEDED")
    assert [ending["outcome"] for ending in told["endings"]] == ["preempted", "preempted", "done"]
    stopped = [ending["step"] for ending in told["endings"]]
    assert [ending["committed_step"] for ending in told["endings"]] == stopped
    assert set(stopped[:2]) <= seen, "what an attempt committed was not in the bucket when its VM was gone"
    assert desk.committed()[-1] == training.STEPS
    assert training.digest(desk.fetched()) == undisturbed
    assert json.loads(desk.gcs.read(f"runs/{NAME}/run.json"))["spec"]["price_per_hour"] == 0.5


@pytest.mark.slow
def test_ways_of_a_vm_to_go(desk: Desk, batch: BatchServer, undisturbed: str) -> None:
    """Told by its metadata long before the signal; switched off without a word; out of memory: bit-equal."""
    submit(desk)
    job = batch.only_job()
    desk.until_committed(10)
    batch.preempt(job, grace_s=30, notice_s=20)
    assert desk.status()["notices"][0]["source"] == "gce"
    before = desk.committed()[-1]
    desk.until_committed(before + 5)
    batch.power_off(job)
    desk.until_committed(desk.committed()[-1] + 5)
    (trainer,) = [
        pid
        for pid in processes.with_environment("JOBKIT_JOB", job.id)
        if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") and not _supervises(pid)
    ]
    os.kill(trainer, 9)
    told = desk.until_over()
    end_of(job)
    assert job.codes == [75, 50001, 0], "a program that was killed is started again in its VM"
    assert [ending["outcome"] for ending in told["endings"]] == ["preempted", "preempted", "killed", "done"]
    assert training.digest(desk.fetched()) == undisturbed


def _supervises(pid: int) -> bool:
    return b"jobkit.supervise" in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.slow
def test_a_program_that_fails_is_not_started_for_ever(desk: Desk, batch: BatchServer) -> None:
    """Killed for want of memory again and again without progress: the run fails, and no code makes Batch go on."""
    desk.write("import os; os.kill(os.getpid(), 9)")
    submit(desk, "--max-restarts", "3", command=("python", "train.py"))
    told = desk.until_over()
    job = batch.only_job()
    end_of(job)
    assert (told["state"], job.state, job.codes) == ("failed", "FAILED", [1])
    assert "no progress: killed" in told["reason"]


@pytest.mark.slow
def test_restarts_that_are_used_up(desk: Desk, batch: BatchServer) -> None:
    """The status says so; a resume is another job of the same run, whose attempts count on."""
    desk.write("import os, time\nif os.environ['JOBKIT_ATTEMPT'] == '0': time.sleep(60)\n")
    submit(desk, "--max-restarts", "0", command=("python", "train.py"))
    job = batch.only_job()
    desk.until(lambda told: told["attempt"] == 0)
    batch.power_off(job)
    told = desk.until_over()
    assert told["state"] == "failed"
    assert "its 0 restarts are used up; continue with: jobkit resume" in told["reason"], told
    assert "resumed" in desk.jobkit("resume", URL)
    told = desk.until_over()
    assert (told["state"], told["attempts"]) == ("done", 2)
    assert [name.rpartition("/")[2] for name in batch.jobs] == [job.id, f"{job.id[:-1]}1"]
    assert "already done" in desk.jobkit("resume", URL)


@pytest.mark.slow
def test_cancel(desk: Desk, batch: BatchServer) -> None:
    """A cancel is heard in the VM, which saves and stops; the job ends by itself and nothing comes back."""
    batch.settle_s = 2.5  # longer than the pause between two looks
    desk.write("import time\ntime.sleep(60)\n")
    submit(desk, command=("python", "train.py"))
    desk.until(lambda told: told["attempt"] == 0)
    assert "is alive: job" in desk.jobkit("resume", URL, code=2)
    assert "is cancelled" in desk.jobkit("cancel", URL)
    job = batch.only_job()
    end_of(job)
    assert job.codes == [3]
    assert desk.status()["state"] == "cancelled"
    assert not [request for request in batch.requests if request.endswith(":cancel")]


def test_cancel_of_what_waits(desk: Desk, batch: BatchServer) -> None:
    """A job that waits for a VM is cancelled with the service; a VM that came all the same would find the cancel."""
    batch.queue_s = 60
    submit(desk, command=("python", "train.py"))
    told = desk.status()
    assert (told["state"], told["job"]) == ("queued", batch.only_job().id)
    desk.jobkit("cancel", URL)
    assert batch.only_job().state == "CANCELLED"
    assert desk.status()["state"] == "cancelled"
    assert desk.gcs.read(f"runs/{NAME}/cancel.json")


@pytest.mark.slow
@pytest.mark.parametrize("point", ["before_create", "after_create"])
def test_a_submit_that_is_killed_and_repeated(point: str, desk: Desk, batch: BatchServer) -> None:
    """SIGKILL before or after the service hears of the job: the same submit again ends with one job, which runs."""
    desk.write("pass")
    words = [sys.executable, "-m", "launch", *GCP, "--", "python", "train.py"]
    batch.queue_s = 3
    killed = subprocess.run(words, env=os.environ | {contract.ENV_FAULT: point}, check=False, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert len(batch.jobs) == (point == "after_create")
    desk.jobkit(*GCP, "--dry-run", "--", "python", "train.py")  # as the submit, which finishes the first
    submit(desk, command=("python", "train.py"))
    assert len(batch.jobs) == 1
    assert desk.until_over()["state"] == "done"
    for dry in ((), ("--dry-run",)):
        assert "already holds this very job" in desk.jobkit(*GCP, *dry, "--", "python", "train.py", code=2)
    assert len(batch.jobs) == 1


def test_an_answer_that_is_lost(desk: Desk, batch: BatchServer) -> None:
    """The request goes out again, with the same id; there is one job."""
    desk.write("pass")
    batch.queue_s, batch.lose_answers = 60, 2
    submit(desk, command=("python", "train.py"))
    assert len(batch.jobs) == 1
    assert batch.requests.count("POST /v1/projects/test-project/locations/us-central1/jobs") == 3


@pytest.mark.slow
def test_time_limit(desk: Desk, batch: BatchServer) -> None:
    """A run whose time is used up has saved and says how to go on."""
    submit(desk, "--time", "40s", "--grace", "15s", command=("python", "train.py", "1.5"))
    told = desk.until_over()
    end_of(batch.only_job())
    assert batch.only_job().codes == [1]
    assert told["state"] == "failed"
    assert "its 40 s (--time) are used up; continue with: jobkit resume" in told["reason"]
    assert told["endings"][0]["outcome"] == "preempted"


@pytest.mark.slow
def test_logs_of_a_job_that_never_came_up(desk: Desk, batch: BatchServer) -> None:
    """Where the container does not start, the service's own log and reason are shown; else the run's own log."""

    class NoImage:
        def start(self, vm: Any, log: Path) -> Any:
            log.write_text("docker: manifest for registry/train:1 not found.\n")
            return subprocess_like(125)

    desk.write("print('hello from the VM')")
    works, batch.executor = batch.executor, NoImage()
    submit(desk, "--max-restarts", "1", command=("python", "train.py"))
    told = desk.until_over()
    assert "docker could not start the container: is --image right" in told["reason"], told
    assert "its 1 restarts are used up" in told["reason"]
    assert "manifest for registry/train:1 not found" in desk.jobkit("logs", URL)
    batch.executor = works
    desk.jobkit("resume", URL)
    assert "hello from the VM" in desk.jobkit("logs", "-f", URL)
    assert desk.until_over()["state"] == "done"


@pytest.mark.slow
def test_a_job_that_ends_while_somebody_looks(
    desk: Desk, batch: BatchServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the bucket knew before the job ended is no verdict on it: it is done, and `logs -f` shows its last line."""
    desk.write("print('hello from the VM')")
    batch.queue_s = 2
    submit(desk, command=("python", "train.py"))
    homes = []
    for name in ("status", "logs"):
        monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / name))
        homes.append(submission.open_run(URL))
        assert registry.status(homes[-1]).state is State.QUEUED
    end_of(batch.only_job())
    told = registry.status(homes[0])
    assert (told.state, told.runner) == (State.DONE, "ended"), told.reason
    out = io.StringIO()
    follow.copy_logs(homes[1], out, following=True)
    assert "hello from the VM" in out.getvalue()


@pytest.mark.slow
def test_a_job_that_ends_between_two_looks(desk: Desk, batch: BatchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`logs -f` fetches once more when the run turns out to be over: the last lines came after the look before."""
    desk.write("print('hello from the VM')")
    batch.queue_s = 2
    submit(desk, command=("python", "train.py"))
    home, ask = submission.open_run(URL), registry.status

    def when_over(store: Store) -> run_status.Status:
        end_of(batch.only_job())
        return ask(store)

    monkeypatch.setattr(registry, "status", when_over)
    out = io.StringIO()
    follow.copy_logs(home, out, following=True)
    assert "hello from the VM" in out.getvalue()


def subprocess_like(code: int) -> Any:
    """Return a container that has ended."""

    class Ended:
        def terminate(self) -> None:
            """It has ended."""

        kill = terminate

        def wait(self, timeout_s: float) -> int:
            """Return its code."""
            return code

    return Ended()


def test_secrets_and_environment(desk: Desk, batch: BatchServer) -> None:
    """A secret reaches the program by name; its value is in no object of the bucket and in no request."""
    name = "projects/test-project/secrets/wandb/versions/latest"
    batch.secrets[name] = "s3cr3t-value"
    desk.write("import os; print(len(os.environ['WANDB_API_KEY']), os.environ['MODE'])")
    submit(desk, "--secret", "WANDB_API_KEY=wandb", "--env", "MODE=fast", command=("python", "train.py"))
    assert desk.until_over()["state"] == "done"
    assert "12 fast" in desk.jobkit("logs", URL)
    assert not [object_ for object_ in desk.gcs.names() if b"s3cr3t" in desk.gcs.read(object_)]
    spec = batch.only_job().asked["taskGroups"][0]["taskSpec"]
    assert spec["environment"]["secretVariables"] == {"WANDB_API_KEY": name}
    assert "readable in the job" in desk.jobkit(*GCP, "--env", "API_KEY=x", "--", "python", "train.py", code=2)


def test_ls(desk: Desk, batch: BatchServer) -> None:
    """Runs are listed by bucket and by service, under their URLs."""
    desk.write("pass")
    submit(desk, command=("python", "train.py"))
    desk.until_over()
    for words in (("ls", "gs://bucket/runs"), ("ls", "--on", "gcp", "--region", "us-central1")):
        (told,) = json.loads(desk.jobkit(*words, "--json"))
        assert (told["run"], told["state"], told["backend"]) == (URL, "done", "gcp")
        assert "done" in desk.jobkit(*words)
    assert json.loads(desk.jobkit("ls", "gs://bucket/nothing", "--json")) == []


@pytest.mark.slow
def test_dry_run_without_a_network(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be sent is printed all the same, and what the bucket was not asked is said, within seconds."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    errors = io.StringIO()
    begun = time.monotonic()
    with contextlib.redirect_stderr(errors):
        told = desk.jobkit(*GCP, "--project", "test-project", "--dry-run", "--", "python", "train.py", errors=False)
    assert "not checked: whether gs://bucket/runs/" in errors.getvalue()
    assert json.loads(told)["taskGroups"]
    assert time.monotonic() - begun < 20


def test_dry_run(desk: Desk, batch: BatchServer) -> None:
    """What is printed is a job as Google's own types read it, says all that was asked, and leaves nothing behind."""
    (desk.home / "code" / "jobkit.toml").write_text(
        '[profile.l4]\non = "gcp"\nimage = "registry/train:1"\nregion = "us-central1"\n'
        'zones = ["us-central1-a", "us-central1-b"]\ngpus = "L4:1"\nlabel = {team = "vision"}\n'
    )
    printed = desk.jobkit(
        "submit", "--profile", "l4", "--run", URL, "--dry-run", "--time", "4h", "--max-restarts", "7",
        "--service-account", "job@test-project.iam.gserviceaccount.com", "--network", "net", "--subnetwork", "sub",
        "--boot-disk-size", "200GB", "--secret", "TOKEN=hf", "--env", "A=b", "--", "python", "train.py", "a b",
    )  # fmt: skip
    job = batch_v1.Job.from_json(printed)
    task, allocation = job.task_groups[0].task_spec, job.allocation_policy
    policy = allocation.instances[0].policy
    container = task.runnables[0].container
    assert [container.entrypoint, *container.commands] == [*managed.COMMAND, URL]
    assert "--stop-timeout 25" in container.options
    assert "--gpus all" in container.options
    (retry,) = task.lifecycle_policies
    assert retry.action == batch_v1.LifecyclePolicy.Action.RETRY_TASK
    assert tuple(retry.action_condition.exit_codes) == RETRIED == (50001, 50002, 50006, 125, 137, 143, 75)
    assert (task.max_retry_count, task.max_run_duration.total_seconds()) == (7, 4 * 3600)
    assert (task.compute_resource.cpu_milli, task.compute_resource.memory_mib) == (8000, 28000)
    assert (policy.machine_type, policy.boot_disk.image, policy.boot_disk.size_gb) == (
        "g2-standard-8",
        "batch-debian",
        200,
    )
    assert policy.provisioning_model == batch_v1.AllocationPolicy.ProvisioningModel.SPOT
    assert allocation.instances[0].install_gpu_drivers
    assert list(allocation.location.allowed_locations) == [
        "regions/us-central1", "zones/us-central1-a", "zones/us-central1-b",
    ]  # fmt: skip
    assert allocation.service_account.email.startswith("job@")
    assert allocation.network.network_interfaces[0].network == "projects/test-project/global/networks/net"
    assert job.labels["team"] == "vision"
    assert dict(task.environment.secret_variables) == {"TOKEN": "projects/test-project/secrets/hf/versions/latest"}
    assert job.logs_policy.destination == batch_v1.LogsPolicy.Destination.CLOUD_LOGGING
    assert desk.gcs.names() == []
    assert not batch.jobs


def test_every_machine_is_a_valid_request() -> None:
    """For every kind of GPU the job parses; GPUs that machines come with are not asked for twice."""
    gpus = ["", "T4:2", *(f"{kind}:{count}" for kind, table in gcp_request._BUILT_IN.items() for count in table)]
    for asked in gpus:
        spec = JobSpec(
            command=("a",), cloud=Cloud(image="i", project="p", region="us-central1", gpus=asked, spot=False)
        )
        job = Gcp().request(Store("memory://run"), Gcp().complete(spec), "job-0")
        policy = checked(json.dumps(job))["allocationPolicy"]["instances"][0]["policy"]
        assert policy["provisioningModel"] == "STANDARD"
        attached = [{"type": "nvidia-tesla-t4", "count": "2"}] if asked == "T4:2" else None
        assert policy.get("accelerators") == attached


REFUSED: list[tuple[list[str], str]] = [
    (
        ["--machine-type", "g9-huge-1"],
        "check --machine-type g9-huge-1 and --region us-central1: gcloud",
    ),
    (["--machine-type", "big"], "no machine type: see gcloud compute machine-types list"),
    (["--zones", "us-central1-z"], "check --zones us-central1-z: gcloud compute zones list"),
    (["--zones", "europe-west4-a"], "no zone of us-central1"),
    (["--region", "mars"], "is not a region: give one such as us-central1"),
    (["--region", "asia-east1"], "check --project test-project and --region asia-east1"),
    (["--image", "not an image"], "is not the name of an image"),
    (["--image", ""], "give --image"),
    (["--project", "others"], "give this machine's default account roles/batch.jobsEditor on project others"),
    (["--max-restarts", "-1"], "give 0 or more, or leave it out"),
    (["--gpus", "L4:3"], "no machine has L4:3: L4 comes in 1, 2, 4, 8"),
    (["--gpus", "RTX4090:1"], "known are L4"),
    (["--gpus", "L4:1", "--machine-type", "n1-standard-8"], "leave one out"),
    (["--secret", "TOKEN=a/b"], "is not projects/PROJECT/secrets/NAME/versions/VERSION"),
    (["--label", "Team=Vision"], "lower-case letters"),
    (["--time", "20s"], "leaves hardly time to train"),
    (["--run", "runs/here"], "give a run directory in a bucket"),
    (["-p", "low"], "--partition is for --on slurm"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_is_refused_leaves_nothing(options: list[str], message: str, desk: Desk, batch: BatchServer) -> None:
    """One sentence with the remedy, exit code 2; no object, no job, no file."""
    said = desk.jobkit(*GCP, *options, "--", "python", "train.py", code=2)
    assert message in said
    assert len(said.strip().splitlines()) == 1, said
    assert (desk.gcs.names(), batch.jobs) == ([], {})
    left = [path for path in (desk.home / "disk").rglob("*") if path.is_file()]
    assert not left


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (
            RefusedError(429, "RESOURCE_EXHAUSTED", "Quota exceeded for quota metric 'L4 GPUs'."),
            "ask for more quota in",
        ),
        (RefusedError(403, "PERMISSION_DENIED", "Permission 'batch.jobs.create' denied."), "roles/batch.jobsEditor"),
        (
            RefusedError(403, "PERMISSION_DENIED", "API is disabled.", "SERVICE_DISABLED"),
            "gcloud services enable",
        ),
        (RefusedError(401, "UNAUTHENTICATED", "Invalid credentials."), "gcloud auth application-default login"),
        (RefusedError(409, "ALREADY_EXISTS", "Resource already exists."), f"another job has the id {NAME}-"),
        (RefusedError(400, "INVALID_ARGUMENT", "image is invalid."), "check --image registry/train:1"),
    ],
    ids=["quota", "not allowed", "not enabled", "no login", "id taken", "image"],
)
def test_what_the_service_refuses(refusal: RefusedError, message: str, desk: Desk, batch: BatchServer) -> None:
    """A quota, a permission, an id that is taken: one sentence with the remedy, and nothing is left."""
    batch.refusals = [refusal] * 3
    said = desk.jobkit(*GCP, "--", "python", "train.py", code=2)
    assert message in said
    assert str(refusal).rstrip(".") in said
    assert len(said.strip().splitlines()) == 1, said
    assert (desk.gcs.names(), batch.jobs) == ([], {})


def test_without_credentials(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is not signed in is told how to."""
    desk.use(monkeypatch, {"NO_GCE_CHECK": "true"})
    said = desk.jobkit(*GCP, "--", "python", "train.py", code=2)
    assert "gcloud auth application-default login" in said
    assert len(said.strip().splitlines()) == 1, said


def test_a_service_that_is_down_is_no_end(desk: Desk, batch: BatchServer) -> None:
    """While the service does not answer the run counts as alive, and a resume is refused."""
    batch.queue_s = 60
    submit(desk, command=("python", "train.py"))
    batch.refusals = [RefusedError(403, "PERMISSION_DENIED", "Not today.")] * 3
    told = desk.status()
    assert told["state"] == "queued"
    assert "cannot tell whether run" in desk.jobkit("resume", URL, code=2)


def test_googles_own_client(batch: BatchServer, desk: Desk) -> None:
    """The service is the one that Google's client knows: create, get, list, delete, and what it refuses."""
    client = batch_v1.BatchServiceClient(
        transport="rest", credentials=AnonymousCredentials(), client_options=ClientOptions(api_endpoint=batch.url)
    )
    parent = "projects/test-project/locations/us-central1"
    printed = desk.jobkit(*GCP, "--dry-run", "--machine-type", "e2-standard-4", "--", "python", "train.py")
    wanted = batch_v1.Job.from_json(printed)
    wanted.task_groups[0].task_spec.runnables[0].container.commands = ["python3", "-c", "import sys; sys.exit(75)"]
    wanted.task_groups[0].task_spec.max_retry_count = 1
    request = batch_v1.CreateJobRequest(parent=parent, job=wanted, job_id="a-job", request_id="one")
    made = client.create_job(request)
    assert client.create_job(request).uid == made.uid
    request.request_id = "two"
    with pytest.raises(Conflict):
        client.create_job(request)
    while client.get_job(name=made.name).status.state != batch_v1.JobStatus.State.FAILED:
        time.sleep(0.1)
    tasks = list(client.list_tasks(parent=f"{made.name}/taskGroups/group0"))
    assert [event.task_execution.exit_code for event in tasks[0].status.status_events] == [75, 75]
    assert [job.name for job in client.list_jobs(parent=parent)] == [made.name]
    assert run_status.jobs(submission.open_run(URL), "gcp") == []


@pytest.mark.slow
def test_readme(desk: Desk, batch: BatchServer) -> None:
    """The README's command for spot VMs, on the README's own train.py."""
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
    (line,) = [line for line in readme.splitlines() if line.startswith("jobkit submit --on gcp")]
    desk.write(readme.partition("```python\n")[2].partition("```")[0])
    desk.jobkit(*shlex.split(line.replace("IMAGE", "registry/train:1"))[1:])
    end_of(batch.only_job())
    told = json.loads(desk.jobkit("status", "gs://bucket/big", "--json"))
    assert (told["state"], told["committed_step"]) == ("done", 2000)

"""One run on three backends, one after another: this machine, spot VMs, a SLURM cluster."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobkit import contract
from jobkit.contract import State
from jobkit.rundir.ledger import read_events
from jobkit.rundir.store import Store
from launch.backends import move_run, registry
from launch.lifecycle import submission
from launch.spec import jobspec as specs
from launch.spec.profiles import Placement
from tests.fakes.gcp_batch_server import BatchServer
from tests.fakes.gcs_server import GcsServer
from tests.harness import jobs, training
from tests.harness.desk import NAME, TRAIN, URL, Desk
from tests.harness.jobs import Project
from tests.harness.slurm import Cluster

GCP = ("--on", "gcp", "--region", "us-central1", "--image", "registry/train:1")


@pytest.mark.slow
def test_local_then_gcp_then_slurm(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes over what the one before committed, is refused while that one lives, and the end is bit-equal."""
    code, printed = training.attempt(tmp_path / "undisturbed")
    assert code == 0, printed
    cluster.tidy()
    with GcsServer() as gcs, BatchServer(gcs.environment()) as batch:
        desk = Desk(tmp_path, gcs)
        desk.use(monkeypatch, cluster.environment | gcs.environment() | batch.environment)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
        desk.write(TRAIN)
        slurm = ("--on", "slurm", "--sbatch", f"export=ALL,{contract.ENV_HOME}={tmp_path / 'node'}")

        desk.jobkit("submit", "--run", URL, "--", "python", "train.py", "0.3")
        desk.until_committed(10)
        assert "is alive" in desk.jobkit("resume", URL, *GCP, code=2)
        desk.jobkit("cancel", URL)
        first = desk.committed()[-1]
        identity = gcs.read(f"runs/{NAME}/run.id")

        desk.jobkit("resume", URL, *GCP, "--price-per-hour", "0.7")
        assert desk.status()["backend"] == "gcp"
        desk.until_committed(first + 10)
        assert "is alive: job" in desk.jobkit("resume", URL, *slurm, code=2)
        desk.jobkit("cancel", URL)
        second = desk.committed()[-1]
        assert batch.only_job().over

        desk.jobkit("resume", URL, *slurm)
        told = desk.until_over()
        assert (told["state"], told["backend"]) == ("done", "slurm"), told
        outcomes = [ending["outcome"] for ending in told["endings"]]
        assert (outcomes[0], outcomes[1], outcomes[-1]) == ("preempted", "preempted", "done")
        assert training.digest(desk.fetched()) == training.digest(tmp_path / "undisturbed")
        assert gcs.read(f"runs/{NAME}/run.id") == identity

        events = read_events(submission.open_run(URL))
        moved = [(event["source"], event["target"]) for event in events if event["event"] == "moved"]
        assert moved == [("local", "gcp"), ("gcp", "slurm")]
        assert [event["step"] for event in events if event["event"] == "restored"][:2] == [first, second]
        run = json.loads(gcs.read(f"runs/{NAME}/run.json"))
        assert (run["backend"], run["spec"]["price_per_hour"]) == ("slurm", 0.7)
        assert "already done" in desk.jobkit("resume", URL, "--on", "local")
        cluster.wait(lambda: not cluster.run("squeue", "--noheader", "--me").strip(), "the queue is empty", 60)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Make a directory with a program."""
    yield from jobs.project(tmp_path)


def test_a_cancel_during_a_move_is_not_lost(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """`resume --on` takes back the cancel that it found, none that has come since."""
    store = project.submit("hold")
    jobs.until_stepping(store)
    registry.cancel(store.url)
    rewrite = specs.rewrite

    def rewrite_late(*arguments: Any) -> None:
        registry.cancel(store.url, wait=False)  # for the lock that the move holds it would wait for ever
        rewrite(*arguments)

    monkeypatch.setattr(specs, "rewrite", rewrite_late)
    move_run.resume(store.url, Placement("local", {}, None, None, 1.0))
    assert jobs.until_over(store).state is State.CANCELLED
    assert store.numbers(contract.ATTEMPTS) == [0]
    monkeypatch.undo()
    move_run.resume(store.url, Placement("local", {}, None, None, None))
    jobs.until_stepping(store, attempt=1)
    registry.cancel(store.url)


@pytest.mark.parametrize("target", ["gcp", "aws"])
def test_back_to_where_it_has_been(project: Project, target: str) -> None:
    """What a run had on a service, before it moved away, was over then: nobody is asked where it was."""
    store = Store(project.runs / "r")
    store.make(shared=False)
    assert specs.create(store, project.spec("exit:0"), "local")
    submission.record(store, "job", id="r-0123456789-0", backend=target, by="me")
    registry.named(target).refuse_alive(store)


@pytest.mark.slow
def test_a_move_that_cannot_work_changes_nothing(project: Project) -> None:
    """A run on this machine's disk stays there: said in one sentence, and it can go on here."""
    store = project.submit("commit:1,exit:3", "exit:3", "exit:0")
    jobs.until_over(store)
    before = store.read(contract.RUN_JSON)
    said = project.cli("resume", store.url, *GCP)
    assert (said.returncode, said.stderr.count("\n")) == (2, 1)
    assert "a VM does not see" in said.stderr
    assert store.read(contract.RUN_JSON) == before


def test_a_move_that_is_refused_late_changes_nothing(project: Project, tmp_path: Path) -> None:
    """Where the new scheduler does not answer the run stays where it was, and its cancel stands."""
    store = project.submit("hold")
    jobs.until_stepping(store)
    registry.cancel(store.url)
    before = store.read(contract.RUN_JSON)
    for name in ("sbatch", "srun", "squeue"):
        (tmp_path / name).write_text("#!/bin/sh\necho it is down >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    for verdict in ("cannot tell whether", "SLURM refused the job"):
        path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
        said = project.cli("resume", store.url, "--on", "slurm", PATH=path)
        assert (said.returncode, said.stderr.count("\n")) == (2, 1), said.stderr
        assert verdict in said.stderr
        assert store.read(contract.RUN_JSON) == before
        assert store.exists(contract.CANCEL) == (verdict == "cannot tell whether")  # the resume had begun
        (tmp_path / "squeue").write_text("#!/bin/sh\nexit 0\n")
    assert registry.resume(store.url) is State.RUNNING
    registry.cancel(store.url)

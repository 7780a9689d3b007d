"""`jobkit save` and `jobkit stop` on real runs: submitted, by hand, of several processes, on another machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import jobkit
import launch
from jobkit import contract
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir import commits, mirror
from jobkit.rundir.control import Control
from jobkit.rundir.ledger import attempt_events, read_events
from jobkit.rundir.store import Store
from launch.backends import registry, save_and_stop
from launch.backends.local import Local
from launch.backends.slurm import queue, scontrol
from launch.backends.slurm.backend import Slurm
from launch.lifecycle import run_status, submission, verbs
from launch.spec.jobspec import JobSpec
from tests.fakes.gcs_server import GcsServer
from tests.harness import jobs, training
from tests.harness.jobs import Project, until, until_over

TRAIN = '''\
"""train.py STEPS SECONDS [RUN]: counts; saves only when asked to."""
import sys, time
import jobkit

with jobkit.Run(sys.argv[3] if len(sys.argv) > 3 else None, save_every=None) as run:
    state = run.resume(total=0)
    for step in run.steps(int(sys.argv[1])):
        state.total += 1
        time.sleep(float(sys.argv[2]))
'''


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    for made in jobs.project(tmp_path):
        (made.path / "train.py").write_text(TRAIN)
        yield made


def by_hand(project: Project, steps: int = 100_000, step_s: float = 0.02, **environ: str) -> "subprocess.Popen[bytes]":
    """Start train.py as a person does, without a launcher."""
    command = [sys.executable, "train.py", str(steps), str(step_s), environ.pop("RUN", str(project.runs / "r"))]
    return subprocess.Popen(command, cwd=project.path, env=os.environ | environ, stderr=subprocess.DEVNULL)


def submit(project: Project, step_s: float = 0.02) -> Store:
    """Submit train.py to this machine."""
    command = ("python", "train.py", "100000", str(step_s))
    spec = JobSpec(command=command, run=str(project.runs / "r"), cwd=str(project.path), grace_s=10.0)
    return verbs.submit(Local(), spec)


def until_training(store: Store, attempt: int = 0) -> None:
    """Wait until an attempt has done its first step."""

    def first() -> bool:
        return any(event["event"] == "first_step" for event in attempt_events(store, attempt))

    until(first, f"attempt {attempt} trains", seconds=90)


def asked(store: Store) -> list[int]:
    """Return the steps that were saved because somebody asked."""
    return [event["step"] for event in read_events(store) if event["event"] == "saved" and event["reason"] == "asked"]


@pytest.mark.slow
def test_save_and_stop_of_a_program_started_by_hand(project: Project) -> None:
    """What nobody submitted commits when asked, once, and goes on; stops when asked; and started again it goes on."""
    store = Store(project.runs / "r")
    with by_hand(project) as program:
        until_training(store)
        told = json.loads(project.cli("save", store.url, "--json").stdout)
        assert (told["run"], told["attempt"], told["done"]) == (store.url, 0, True)
        assert told["committed_step"] >= 1
        assert store.exists(f"checkpoints/{told['committed_step']}/commit.json")
        time.sleep(5.0)  # two more looks
        assert program.poll() is None
        assert asked(store) == [told["committed_step"]]
        done = project.cli("stop", store.url)
        assert done.returncode == 0, done.stderr
        assert program.wait(60) == contract.Exit.PREEMPTED
    newest = commits.steps(store)[-1]
    assert done.stdout == f"{store.url} is stopped, committed step {newest}\n"
    notice = next(event for event in attempt_events(store, 0) if event["event"] == "notice")
    assert (notice["source"], notice["reason"].split(" by ")[0]) == ("stop", "stopped")
    with by_hand(project, steps=newest + 200) as again:
        assert again.wait(60) == 0
    assert commits.steps(store)[-1] == newest + 200


def _several_loops(url: str) -> None:
    """Train in two stages, of which the first comes to its end."""
    with jobkit.Run(url, save_every=None, trackers=()) as run:
        state = run.resume(total=0, optimizer=None)
        for total in (20, 100_000):
            for _ in run.steps(total):
                state.total += 1
                time.sleep(0.02)


def _own_loop(url: str) -> None:
    """Train in a loop of one's own."""
    with jobkit.Run(url, save_every=None, trackers=()) as run:
        state = run.resume(total=0, optimizer=None)
        for epoch in run.through(range(state.total, 10_000)):
            state.total += 1
            time.sleep(0.1)
            run.save(epoch + 1)


@pytest.mark.slow
@pytest.mark.parametrize("function", [_several_loops, _own_loop])
def test_every_loop_of_a_program_started_by_hand_is_heard(function: Any, tmp_path: Path) -> None:
    """A program hears `save` and `stop` in its second loop as in its first, and in a loop of its own."""
    program = training.start(function, str(tmp_path / "run"), log=tmp_path / "log")
    store = Store(tmp_path / "run")
    second = ("goes_on", "own_loop")
    until(lambda: any(event["event"] in second for event in attempt_events(store, 0)), "that loop begins", seconds=30)
    assert save_and_stop.save(store.url, timeout_s=20).done
    assert save_and_stop.stop(store.url, timeout_s=20).done
    program.join(30)
    assert program.exitcode == contract.Exit.PREEMPTED


def _stopped_at_once(url: str) -> None:
    """Train, and be asked to stop as soon as there is an attempt that can be asked."""
    claim = mirror.claim

    def claim_and_stop(store: Store) -> int:
        number = claim(store)
        assert not save_and_stop.stop(url, wait=False).done
        return number

    mirror.claim = claim_and_stop
    with jobkit.Run(url, save_every=None, trackers=()) as run:
        state = run.resume(total=0, optimizer=None)
        for _ in run.steps(1000):
            state.total += 1
            time.sleep(0.01)


@pytest.mark.slow
def test_a_stop_as_soon_as_there_is_an_attempt(tmp_path: Path) -> None:
    """What is asked of a program by hand between its claim and its first look is no earlier attempt's."""
    code, printed = training.attempt(tmp_path / "run", function=_stopped_at_once)
    assert code == contract.Exit.PREEMPTED, printed


@pytest.mark.slow
def test_stop_of_a_submitted_run(project: Project) -> None:
    """A submitted run that is stopped commits, says who stopped it, and comes back only by `resume`."""
    store = submit(project)
    until_training(store)
    saved = launch.save(store.url)
    assert saved.done
    answer = launch.stop(store.url)
    status = run_status.status(store)
    assert (answer.done, status.state, jobs.outcomes(store)) == (True, "cancelled", ["preempted"])
    assert status.reason.startswith("stopped by ")
    assert answer.committed_step == status.committed_step
    assert (answer.committed_step or 0) > (saved.committed_step or 0)
    time.sleep(1.5)
    assert run_status.status(store).attempts == 1
    registry.resume(store.url)
    until_training(store, attempt=1)
    registry.cancel(store.url)


@pytest.mark.slow
def test_nothing_is_asked_where_nothing_trains(project: Project) -> None:
    """A run that is over, waits, or does not exist says so, and nothing is written."""
    store = project.submit("commit:3,exit:0")
    until_over(store)
    with pytest.raises(ConfigError, match=r"trains just now \(done: finished; .*its newest committed step is 3"):
        save_and_stop.save(store.url)
    with pytest.raises(ConfigError, match="already done"):
        save_and_stop.stop(store.url)
    waiting = project.submit("kill:9", run="waiting")
    until(
        lambda: [one for one in jobs.events(waiting, "decision") if one["delay_s"] >= 4], "a long backoff", seconds=60
    )
    with pytest.raises(ConfigError, match=r"\(requeued: killed\); it has committed nothing yet"):
        save_and_stop.save(waiting.url)
    assert save_and_stop.stop(waiting.url).done
    nowhere = project.cli("save", "nothing")
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (2, 1)
    assert "is not a run: it has no attempt yet" in nowhere.stderr
    assert not (project.path / "nothing").exists()
    for run in (store, waiting):
        assert not run.exists(contract.SAVE)


@pytest.mark.slow
def test_a_kill_between_request_and_answer(project: Project) -> None:
    """A request whose attempt is killed is dropped, and said to be; no later attempt serves it."""
    store = submit(project, step_s=4.0)
    until_training(store)
    with project.start("save", store.url) as asking:
        until(lambda: store.exists(contract.SAVE), "it is asked")
        os.kill(jobs.program_pid(store), signal.SIGKILL)
        _, err = asking.communicate(timeout=60)
    assert asking.returncode == 2
    assert "attempt 0 of" in err
    assert "ended before it could save; its newest committed step is 0" in err
    until_training(store, attempt=1)
    time.sleep(3.0)
    assert [event for event in read_events(store) if event["event"] == "save_asked"] == []
    registry.cancel(store.url)
    assert asked(store) == []


@pytest.mark.timing
def test_patience_ends(project: Project) -> None:
    """Who waits for a program in a long step hears, in time, that it has not answered, and what is committed."""
    store = Store(project.runs / "r")
    with by_hand(project, step_s=15.0) as program:
        until(lambda: any(event["event"] == "saved" for event in attempt_events(store, 0)), "it trains", seconds=60)
        with pytest.raises(JobkitError, match=r"has not saved within 1.0 s: .*newest committed step is 0"):
            save_and_stop.save(store.url, timeout_s=1.0)
        assert not save_and_stop.save(store.url, wait=False).done
        program.kill()
    with pytest.raises(ConfigError, match="attempt 0 has ended"):
        save_and_stop.save(store.url)


@pytest.mark.slow
def test_several_processes_save_one_step(tmp_path: Path) -> None:
    """A save that is asked of two processes, which drift apart, is one step of both; a stop too."""
    url = tmp_path / "run"
    started = training.start_many(url, 2, steps=100_000, save_every=None, pause_s=0.05)
    store = Store(url)
    until_training(store)
    answer = save_and_stop.save(url, timeout_s=60)
    assert asked(store) == [answer.committed_step]
    steps = [event["step"] for event in attempt_events(store, 0) if event["event"] == "saved" and event["step"] > 0]
    assert steps == [answer.committed_step] * 2
    assert save_and_stop.stop(url, timeout_s=60).done
    assert training.join_many(started) == [75, 75]
    stopped = {event["step"] for event in attempt_events(store, 0) if event["event"] == "stopped"}
    assert stopped == {commits.steps(store)[-1]}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["by hand", "submitted"])
def test_from_another_machine(how: str, project: Project, tmp_path: Path) -> None:
    """A run in a bucket is saved and stopped from a machine that knows nothing but its URL."""
    with GcsServer() as server:
        url, environ = "gs://bucket/runs/r", server.environment()

        def node(name: str) -> dict[str, Any]:
            return environ | {contract.ENV_HOME: str(tmp_path / name)}

        def ask(*words: str) -> dict[str, Any]:
            done = project.cli(*words, url, "--json", **node("login"))
            assert done.returncode == 0, done.stderr
            told: dict[str, Any] = json.loads(done.stdout)
            return told

        program = None
        if how == "by hand":
            program = by_hand(project, RUN=url, **node("trainer"))
        else:
            arguments = ("submit", "--run", url, "--", "python", "train.py", "100000", "0.02")
            assert project.cli(*arguments, **node("trainer")).returncode == 0
        home = until(lambda: next(iter((tmp_path / "trainer").glob("r-*")), None), "it has a home", seconds=60)
        until_training(Store(home))
        saved = ask("save")
        assert saved["done"]
        stopped = ask("stop")
        assert stopped["committed_step"] > saved["committed_step"] > 0
        assert asked(Store(home)) == [saved["committed_step"]]
        if program is not None:
            assert program.wait(30) == contract.Exit.PREEMPTED
        else:
            until(lambda: run_status.last_life_event(Store(home)).get("event") == "ended", "the runner has ended")
            last = run_status.last_life_event(Store(home))
            assert (last["state"], last["reason"].split(" by ")[0]) == ("cancelled", "stopped")


def test_a_request_is_heard_once(tmp_path: Path) -> None:
    """What was there at the start is not heard; a new one is, once; one made by hand, taken back and made again too."""
    store = Store(tmp_path)
    store.write(contract.SAVE, '{"id": "old"}')
    heard = Control(store)
    assert heard.new(contract.SAVE) is None
    store.write(contract.SAVE, '{"id": "new"}')
    assert heard.new(contract.SAVE) == {"id": "new"}
    assert heard.new(contract.SAVE) is None
    for _ in range(2):
        store.write(contract.SAVE, "")
        assert heard.new(contract.SAVE) == {}
        assert heard.new(contract.SAVE) is None
        store.remove(contract.SAVE)
        assert heard.new(contract.SAVE) is None


def test_a_home_knows_the_newest_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel on the URL replaces an older one in the home, though it is no longer: else none could take it back."""
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path))
    store = Store(f"memory://{tmp_path.name}/run")
    assert store.remote is not None
    for name in (contract.CANCEL, contract.SAVE):
        store.write(name, '{"id": "old"}')
        store.remote.write(name, b'{"id": "new"}')
    mirror.refresh(store)
    assert [store.read(name) for name in (contract.CANCEL, contract.SAVE)] == [b'{"id": "new"}'] * 2


def test_a_cancel_that_is_taken_back_while_a_home_is_refreshed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is listed and then gone, since somebody elsewhere resumes the run, is left out and no error."""
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path))
    store = Store(f"memory://{tmp_path.name}/run")
    assert store.remote is not None
    for kept in (contract.STRATEGY, contract.SAVE):
        store.remote.write(kept, b"{}")
    listed = store.remote.find() | {contract.CANCEL: 2}
    monkeypatch.setattr(store.remote, "find", lambda name="": listed)
    mirror.refresh(store)
    assert store.names("") == [contract.SAVE, contract.STRATEGY]
    store.write(contract.CANCEL, "of an earlier life")
    mirror.refresh(store)


@pytest.mark.slow
def test_a_cancel_ends_no_job_of_a_resume(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody resumes a run while a `cancel` still waits for its job, the new job is left alone."""
    store = project.submit("commit:1,exit:3", "exit:3")
    until_over(store)
    submission.record(store, "resumed")  # as far as the ledger knows it is alive
    table, ended = [scontrol.job_of("7", "RUNNING", comment=store.url)], []

    def scancel(jobs: Sequence[str], *options: str) -> None:
        ended.extend(jobs)
        if jobs:  # it ends, and somebody resumes the run before the next look
            submission.take_back_cancel(store, submission.cancel_content(store))
            table[:] = [scontrol.job_of("8", "PENDING", comment=store.url)]

    monkeypatch.setattr(scontrol, "queue", lambda: list(table))
    monkeypatch.setattr(queue, "_scancel", scancel)
    verbs.cancel(Slurm(), store)
    assert ended == ["7"]
    assert run_status.last_life_event(store)["event"] == "resumed"


def test_who_waited_for_a_cancel_ends_no_run_that_goes_on(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody resumes a run as soon as its job is over, the `cancel` that waited for that writes no end."""
    store = project.submit("commit:1,exit:3", "exit:3")
    until_over(store)
    monkeypatch.setattr(queue, "jobs_of", lambda stores: {one.url: scontrol.job_of("7", "RUNNING") for one in stores})

    def taken_back(stores: list[Store], **how: Any) -> None:
        submission.take_back_cancel(store, submission.cancel_content(store))
        submission.record(store, "resumed")

    for stop, last in (taken_back, "resumed"), (lambda stores, **how: None, "ended"):
        monkeypatch.setattr(queue, "end", stop)
        verbs.cancel(Slurm(), store)
        assert run_status.last_life_event(store)["event"] == last


def test_a_launched_attempt_hears_the_cancel_it_finds(tmp_path: Path) -> None:
    """No launcher starts anything while there is a cancel: one that a launched attempt finds has come since."""
    store = Store(tmp_path)
    store.write(contract.CANCEL, '{"id": "new"}')
    store.write(contract.SAVE, '{"id": "old"}')
    assert Control.of_attempt(store, None).new(contract.CANCEL) is None
    heard = Control.of_attempt(store, 0)
    assert heard.new(contract.CANCEL) == {"id": "new"}
    assert heard.new(contract.CANCEL) is None
    assert heard.new(contract.SAVE) is None

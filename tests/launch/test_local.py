"""The local backend with real processes and signals: attempts, kills at every level, cancel in every state."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobkit import contract
from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from launch.backends import registry
from launch.backends.cloud.gcp import Gcp
from launch.backends.cloud.vm_job import VmRunner
from launch.backends.local import Local
from launch.lifecycle import lock, orphans, restart, run_status, submission, verbs
from launch.report import follow
from launch.spec.jobspec import JobSpec
from tests.harness import jobs
from tests.harness.jobs import Project, until, until_over, until_stepping


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    yield from jobs.project(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "state", "attempts", "reason"),
    [
        (["commit:3,exit:0"], State.DONE, ["done"], "finished; step 3 is committed"),
        (["commit:3,exit:75", "exit:0"], State.DONE, ["preempted", "done"], "finished; step 3 is committed"),
        (["commit:3,kill:9", "exit:0"], State.DONE, ["killed", "done"], "finished; step 3 is committed"),
        (
            ["commit:3,exit:1", "exit:5"],
            State.FAILED,
            ["failed"] * 2,
            "failed twice (exit code 5)",
        ),
        (["exit:1"], State.FAILED, ["failed"], "failed (exit code 1) before committing anything"),
        (["exit:78"], State.FAILED, ["config"], "no restart can help (exit code 78)"),
    ],
)
def test_attempts_until_the_end(
    project: Project, plan: list[str], state: State, attempts: list[str], reason: str
) -> None:
    """A run goes on or ends as the restart rules say, and its status tells why."""
    store = project.submit(*plan)
    status = until_over(store)
    assert (status.state, jobs.outcomes(store)) == (state, attempts)
    assert status.reason.startswith(reason)
    assert store.read("runner.log") == b""


def test_running_status(project: Project) -> None:
    """A running attempt shows phase and step live, from the heartbeat."""
    store = project.submit("commit:4,hold")
    until_stepping(store)
    status = run_status.status(store)
    assert (status.state, status.attempt, status.phase, status.committed_step) == (State.RUNNING, 0, "listening", 4)
    assert (status.step or 0) >= 4
    registry.cancel(store.url)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["program", "supervisor"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_kill_and_go_on(project: Project, victim: str, number: signal.Signals) -> None:
    """A preempted or killed program or supervisor costs an attempt, never the run, and never doubles the program."""
    store = project.submit("hold", "exit:0")
    until_stepping(store)
    find = jobs.program_pid if victim == "program" else jobs.supervisor_pid
    link = orphans.heartbeat_directory(store, 0)
    assert link is not None
    os.kill(find(store), number)
    status = until_over(store)
    first = "killed" if (victim, number) == ("program", signal.SIGKILL) else "preempted"
    assert (status.state, jobs.outcomes(store)) == (State.DONE, [first, "done"])
    if first == "preempted":
        assert (status.committed_step or 0) > 0
    if (victim, number) == ("supervisor", signal.SIGKILL):
        assert status.endings[0].step == status.endings[0].committed_step
        assert not link.exists()
        assert status.endings[0].reason == "the supervisor was killed (SIGKILL); the program ended with exit code 75"


def test_what_follows_an_end_is_said_once_it_is_known(project: Project) -> None:
    """Neither the decision after an earlier attempt nor the end before a resume is taken for what follows the newest
    one.
    """
    store = project.submit("commit:3,exit:75", "exit:0")
    until_over(store)
    events = store.read(contract.EVENTS).decode().splitlines(keepends=True)
    first = next(number for number, line in enumerate(events, 1) if '"decision"' in line)
    store.write(contract.EVENTS, "".join(events[:first]).encode())  # as it is until the runner has decided again
    status = run_status.status(store, assume_held=True)
    assert (status.state, status.reason[:20]) == (State.RUNNING, "an attempt has ended")
    store.write(contract.EVENTS, "".join(events).encode())
    submission.record_begun_afresh(store)
    status = run_status.status(store, assume_held=True)
    assert (status.state, status.reason) == (State.REQUEUED, "resumed")


LIKE_A_RUN = """
import os, signal, sys
from pathlib import Path
from jobkit.supervise.heartbeat import Heartbeat, Phase
from jobkit.rundir.ledger import Ledger
from jobkit.preemption.notice import Listener

attempt, link = os.environ["JOBKIT_ATTEMPT"], Path(os.environ["JOBKIT_SUPERVISOR"])
process = os.environ["JOBKIT_PROCESS"]
ledger = Ledger(Path(os.environ["JOBKIT_RUN"]) / "attempts" / attempt / f"events-{process}.jsonl")
listener, beat = Listener(link), Heartbeat(link)
listener.open()
ledger.append("opened")
beat.enter(Phase.STEPPING)
while attempt == "0" and not listener.noticed:
    signal.sigtimedwait([], 0.02)
ledger.append("stopped" if listener.noticed else "finished")
beat.enter(Phase.STOPPED if listener.noticed else Phase.FINISHED)
sys.exit(75 if listener.noticed else 0)
"""
"""Trains until it is told to stop, in its first attempt; in the second it comes to its end."""


def submit_like_a_run(project: Project, *command: str, tasks: int = 1) -> Store:
    """Submit it, in so many processes; return once all of them train."""
    (project.path / "train.py").write_text(LIKE_A_RUN)
    spec = project.spec(sbatch={"ntasks-per-node": str(tasks)})
    store = verbs.submit(Local(), msgspec.structs.replace(spec, command=command))
    until(lambda: len(jobs.events(store, "opened")) == tasks, "it trains")
    return store


def test_supervisor_killed_and_a_shell_that_exits_0(project: Project) -> None:
    """With its supervisor killed a program stops in good order: the exit code of the shell around it says nothing."""
    store = submit_like_a_run(project, "sh", "-c", "trap : TERM; python train.py; echo after")
    os.kill(jobs.supervisor_pid(store), signal.SIGKILL)
    status = until_over(store)
    assert (status.state, jobs.outcomes(store)) == (State.DONE, ["preempted", "done"])


@pytest.mark.slow
def test_one_of_two_cannot_tell_how_it_ended(project: Project) -> None:
    """Processes that stop on notice exit 0 beside each other; without the word of each of them nothing is done."""
    store = submit_like_a_run(project, "python", "train.py", tasks=2)
    store.file(contract.process_outcome(0, 1)).mkdir()
    for name in ("supervisor.json", "supervisor-1.json"):
        os.kill(json.loads(store.read(f"{contract.attempt_dir(0)}/{name}"))["pid"], signal.SIGTERM)
    status = until_over(store)
    assert (status.state, jobs.outcomes(store)) == (State.DONE, ["killed", "done"])


@pytest.mark.slow
def test_supervisor_killed_and_program_does_not_listen(project: Project) -> None:
    """An orphan that ignores the notice and SIGTERM is killed after the grace period, before anything restarts."""
    store = project.submit("stubborn", "exit:0", grace_s=1.5)
    program = until(lambda: jobs.program_pid(store), "the program starts")
    until(lambda: b"stubborn" in store.read("attempts/0/log-0.txt"), "it ignores SIGTERM")
    os.kill(jobs.supervisor_pid(store), signal.SIGKILL)
    status = until_over(store)
    assert (status.state, jobs.outcomes(store)) == (State.DONE, ["killed", "done"])
    assert not Path(f"/proc/{program}").exists()


def test_runner_killed_then_resumed(project: Project) -> None:
    """With its runner killed the program commits and stops; resume goes on in a new attempt."""
    store = project.submit("hold", "exit:0")
    until_stepping(store)
    os.kill(jobs.runner_pid(store), signal.SIGKILL)
    until(lambda: not lock.held(store), "the supervisor ends")
    status = run_status.status(store)
    assert (status.state, status.runner) == (State.FAILED, "gone")
    assert status.reason == f"the local runner is gone; continue with: jobkit resume {store.url}"
    assert jobs.outcomes(store) == ["preempted"]
    assert registry.resume(store.url) is State.RUNNING
    assert until_over(store).state is State.DONE
    assert jobs.outcomes(store) == ["preempted", "done"]


@pytest.mark.slow
def test_a_killed_runner_keeps_the_failure_budget(project: Project) -> None:
    """A runner that is killed between attempts, three times over, grants no failure beyond --max-failures."""
    store = project.submit(*(f"commit:{step},exit:1" for step in range(1, 9)), max_failures=3)
    for failures in range(1, 4):
        until(lambda count=failures: len(decisions(store)) >= count, "the next attempt is put off")
        os.kill(jobs.runner_pid(store), signal.SIGKILL)
        until(lambda: not lock.held(store), "the runner is gone")
        assert len(jobs.outcomes(store)) == failures
        registry.resume(store.url)
    status = until_over(store)
    assert (status.state, len(jobs.outcomes(store))) == (State.FAILED, 4)
    assert status.reason == "4 failures, and 3 are allowed (--max-failures)"
    registry.resume(store.url)  # after its end a resume is a new start
    until(lambda: len(jobs.outcomes(store)) > 4, "another attempt")
    registry.cancel(store.url)


def decisions(store: Store) -> list[dict[str, Any]]:
    """Return what the runners decided so far."""
    return [event for event in run_status.events(store) if event["event"] == "decision"]


def test_a_long_history_with_progress_is_no_standstill(tmp_path: Path) -> None:
    """What each attempt had committed is remembered as it was: thirty preemptions with progress end no run."""
    store = Store(tmp_path / "run")
    spec = JobSpec(command=("python", "train.py"), run=store.url)
    store.make()
    for attempt in range(30):
        told = {"exit_code": 75, "outcome": "preempted", "step": attempt, "committed_step": attempt}
        store.file(f"attempts/{attempt}").mkdir(parents=True)
        store.write(f"attempts/{attempt}/outcome.json", json.dumps(told))
    runner = VmRunner(store, spec, job="one", service=Gcp(), retries=30)
    policy = runner._remember()
    decision = restart.decide(runner._history, policy)
    assert (decision.restart, decision.delay_s) == (True, 0.0)


def test_resume_waits_for_the_attempt_of_a_killed_runner(project: Project) -> None:
    """A resume right after the kill waits until the old program is gone; two never live at once."""
    store = project.submit("hold", "exit:0")
    until_stepping(store)
    os.kill(jobs.runner_pid(store), signal.SIGKILL)
    assert registry.resume(store.url) is State.RUNNING
    assert until_over(store).state is State.DONE


def test_runner_and_supervisor_killed(project: Project) -> None:
    """With both killed the orphan commits and goes; the next runner waits for it and closes its attempt."""
    store = project.submit("hold", "exit:0")
    until_stepping(store)
    os.kill(jobs.runner_pid(store), signal.SIGKILL)
    os.kill(jobs.supervisor_pid(store), signal.SIGKILL)
    registry.resume(store.url)
    status = until_over(store)
    assert status.state is State.DONE
    assert status.committed_step is not None
    assert len(status.endings) == status.attempts


@pytest.mark.slow
def test_both_killed_and_program_does_not_listen(project: Project) -> None:
    """An orphan that belongs to nobody's family any more is found by its environment and ended before a restart."""
    store = project.submit("stubborn", "exit:0", grace_s=1.5)
    until(lambda: jobs.program_pid(store), "the program starts")
    until(lambda: b"stubborn" in store.read("attempts/0/log-0.txt"), "it ignores SIGTERM")
    os.kill(jobs.runner_pid(store), signal.SIGKILL)
    os.kill(jobs.supervisor_pid(store), signal.SIGKILL)
    assert orphans.processes_of(store)
    registry.resume(store.url)
    assert until_over(store).state is State.DONE
    assert jobs.outcomes(store)[0] == "killed"


def test_runner_is_stopped_in_good_order(project: Project) -> None:
    """SIGTERM to the runner stops the attempt, which commits, and says how to continue."""
    store = project.submit("hold", "exit:0")
    until_stepping(store)
    os.kill(jobs.runner_pid(store), signal.SIGTERM)
    status = until_over(store)
    assert (status.state, jobs.outcomes(store)) == (State.FAILED, ["preempted"])
    assert status.reason == f"the local runner was stopped (SIGTERM); continue with: jobkit resume {store.url}"
    registry.resume(store.url)
    assert until_over(store).state is State.DONE


def test_cancel_before_the_first_attempt(project: Project) -> None:
    """A cancel that is there before the runner looks means no attempt at all."""
    spec = project.spec("hold")
    store = Store(spec.run)
    starting = threading.Thread(target=verbs.submit, args=(Local(), spec))
    starting.start()
    until(lambda: store.exists(contract.RUN_JSON), "run.json is written")
    store.write(contract.CANCEL, "{}")
    starting.join()
    status = until_over(store)
    assert status.state is State.CANCELLED
    assert status.attempts <= 1  # 0 unless this machine was very slow to write cancel.json


def test_cancel_of_a_run_whose_runner_never_came_up(project: Project) -> None:
    """A submit killed before it started a runner leaves a run that can be cancelled, or resumed."""
    store = project.submit("exit:0")
    until_over(store)
    half = Store(project.runs / "half")
    half.write(contract.RUN_JSON, store.read(contract.RUN_JSON))
    assert run_status.status(half).runner == "gone"
    assert registry.cancel(half.url) is State.CANCELLED
    assert run_status.status(half).attempts == 0
    assert not (project.runs / "half" / "attempts").exists()


def test_follower_leaves_a_cancelled_run_alone(project: Project) -> None:
    """A run that was cancelled when nothing of it lived is over for who waits for it, too."""
    store = project.submit("exit:0")
    until_over(store)
    half = Store(project.runs / "half")
    half.write(contract.RUN_JSON, store.read(contract.RUN_JSON))
    half.write(contract.CANCEL, "{}")
    assert follow.follow(half, quiet=True) == 3
    assert jobs.events(half, "resumed") == []


def test_cancel_while_running(project: Project) -> None:
    """A cancelled run commits what it has and is over; it has one attempt, for ever."""
    store = project.submit("hold")
    until_stepping(store)
    assert registry.cancel(store.url) is State.CANCELLED
    status = run_status.status(store)
    assert (status.state, status.attempts, jobs.outcomes(store)) == (State.CANCELLED, 1, ["preempted"])
    assert status.committed_step is not None
    assert status.reason.startswith("cancelled by ")
    assert orphans.processes_of(store) == []
    assert not lock.held(store)
    assert registry.cancel(store.url) is State.CANCELLED


@pytest.mark.timing
def test_cancel_of_a_program_that_does_not_listen(project: Project) -> None:
    """A program that ignores SIGTERM is killed after the grace period."""
    store = project.submit("stubborn", grace_s=1.0)
    until(lambda: jobs.program_pid(store), "the program starts")
    until(lambda: b"stubborn" in store.read("attempts/0/log-0.txt"), "it ignores SIGTERM")
    start = time.monotonic()
    assert registry.cancel(store.url) is State.CANCELLED
    assert 0.9 < time.monotonic() - start < 6
    assert jobs.outcomes(store) == ["killed"]


@pytest.mark.timing
def test_cancel_in_backoff(project: Project) -> None:
    """A cancel between attempts ends the wait at once."""
    store = project.submit("kill:9")
    until(lambda: [one for one in jobs.events(store, "decision") if one["delay_s"] >= 4], "a long backoff")
    assert run_status.status(store).state is State.REQUEUED
    start = time.monotonic()
    assert registry.cancel(store.url) is State.CANCELLED
    assert time.monotonic() - start < 2
    assert "done" not in jobs.outcomes(store)


def test_cancel_after_the_runner_was_killed(project: Project) -> None:
    """With only a supervisor alive cancel ends it, and the run is cancelled, not failed."""
    store = project.submit("stubborn", grace_s=1.0)
    until(lambda: jobs.program_pid(store), "the program starts")
    until(lambda: b"stubborn" in store.read("attempts/0/log-0.txt"), "it ignores SIGTERM")
    os.kill(jobs.runner_pid(store), signal.SIGKILL)
    assert lock.held(store)
    assert registry.cancel(store.url) is State.CANCELLED
    assert orphans.processes_of(store) == []
    assert run_status.status(store).attempts == 1


def test_cancel_after_runner_and_supervisor_were_killed(project: Project) -> None:
    """With only the program alive cancel ends it too, and writes how its attempt ended."""
    store = project.submit("stubborn", grace_s=1.0)
    until(lambda: jobs.program_pid(store), "the program starts")
    until(lambda: b"stubborn" in store.read("attempts/0/log-0.txt"), "it ignores SIGTERM")
    os.kill(jobs.runner_pid(store), signal.SIGKILL)
    os.kill(jobs.supervisor_pid(store), signal.SIGKILL)
    assert registry.cancel(store.url) is State.CANCELLED
    assert orphans.processes_of(store) == []
    assert jobs.outcomes(store) == ["killed"]


def test_cancelled_run_is_resumed_only_by_a_person(project: Project) -> None:
    """Watching does not bring a cancelled run back; resume does, and takes the cancel back."""
    store = project.submit("hold", "exit:0")
    until_stepping(store)
    registry.cancel(store.url)
    assert follow.follow(store, quiet=True) == 3
    assert run_status.status(store).attempts == 1
    registry.resume(store.url)
    assert until_over(store).state is State.DONE
    assert not store.exists(contract.CANCEL)


def test_cancel_during_resume_is_not_lost(project: Project) -> None:
    """A cancel that comes while a resume takes back the old one wins."""
    store = project.submit("hold", "exit:0")
    until_stepping(store)
    registry.cancel(store.url)
    mine = lock.acquire(store)
    assert mine is not None
    resuming = threading.Thread(target=registry.resume, args=(store.url,))
    resuming.start()
    time.sleep(0.5)  # it has seen the old cancel.json and waits for the lock, whose signer is dead
    store.write(contract.CANCEL, json.dumps({"by": "somebody", "id": "new"}))
    mine.close()
    resuming.join()
    status = until_over(store)
    assert (status.state, status.attempts, status.reason) == (State.CANCELLED, 1, "cancelled by somebody")


def test_done_run(project: Project) -> None:
    """A done run is neither cancelled nor resumed."""
    store = project.submit("exit:0")
    until_over(store)
    with pytest.raises(ConfigError, match="is already done; there is nothing to cancel"):
        registry.cancel(store.url)
    assert registry.resume(store.url) is State.DONE
    assert run_status.status(store).attempts == 1


def test_live_run_is_not_submitted_or_resumed_again(project: Project) -> None:
    """While a run lives its directory is refused, with what to do instead."""
    store = project.submit("hold")
    until_stepping(store)
    pid = jobs.runner_pid(store)
    for again in (lambda: project.submit("hold"), lambda: registry.resume(store.url)):
        with pytest.raises(ConfigError, match=rf"is alive \(pid {pid}\): 'jobkit logs -f .*' or 'jobkit cancel"):
            again()
    registry.cancel(store.url)


@pytest.mark.parametrize(("plan", "what"), [("exit:1", "this very job"), ("exit:2", "another job")])
def test_directory_of_an_ended_run_is_refused(project: Project, plan: str, what: str) -> None:
    """A second training never goes into the directory of a first."""
    store = project.submit("exit:1")
    until_over(store)
    with pytest.raises(ConfigError, match=rf"already holds {what} .*jobkit resume .*or give a new --run"):
        project.submit(plan)
    assert run_status.status(store).attempts == 1


def test_concurrent_submits(project: Project) -> None:
    """Of many submits to one new directory exactly one wins; the others are refused and break nothing."""
    arguments = ("submit", "--run", str(project.runs / "r"), "--grace", "5s", "--", "python", "job.py", "hold")
    submits = [project.start(*arguments) for _ in range(4)]
    answers = [process.communicate(timeout=60) for process in submits]
    codes = sorted(process.returncode for process in submits)
    store = Store(project.runs / "r")
    assert codes == [0, 2, 2, 2], answers
    assert all("is alive" in err or "already holds" in err for _, err in answers if err)
    until_stepping(store)
    assert len(jobs.events(store, "submitted")) == 1
    registry.cancel(store.url)
    assert run_status.status(store).attempts == 1


@pytest.mark.slow
def test_submit_killed_anywhere(project: Project) -> None:
    """Whatever instant a submit is killed at: afterwards the run is alive, or resume or submit works."""
    for number in range(12):
        url = str(project.runs / str(number))
        process = project.start("submit", "--run", url, "--", "python", "job.py", "exit:0")
        with process:
            time.sleep(0.05 + 0.015 * number)
            process.kill()
        store = Store(url)
        if not store.exists(contract.RUN_JSON):
            verbs.submit(Local(), project.spec("exit:0", run=str(number)))
        else:
            time.sleep(0.2)
            if not lock.held(store):
                registry.resume(url)
        assert until_over(store).state is State.DONE


def test_old_code_runs_after_an_edit(project: Project) -> None:
    """A later attempt runs what was submitted, whatever happened to the working tree; data is read where it lies."""
    (project.path / "part.py").write_text("WORD = 'old'")
    (project.path / ".gitignore").write_text("data/")
    (project.path / "data").mkdir()
    (project.path / "data" / "x").write_text("data one")
    subprocess.run(["git", "init", "-q", str(project.path)], check=True)
    store = project.submit("commit:1,hold", "import:part,read:data/x,exit:0")
    until_stepping(store)
    (project.path / "part.py").write_text("WORD = 'new'")
    (project.path / "data" / "x").write_text("data two")
    (project.path / "job.py").write_text("raise SystemExit(78)")
    os.kill(jobs.program_pid(store), signal.SIGTERM)
    assert until_over(store).state is State.DONE
    log = store.read("attempts/1/log-0.txt").decode()
    assert "old" in log
    assert "data two" in log


def test_snapshot_wins_over_an_import_path(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the working tree on PYTHONPATH, as an editable install has it, the snapshot is still what is imported."""
    (project.path / "lib").mkdir()
    (project.path / "lib" / "part.py").write_text("WORD = 'old'")
    monkeypatch.setenv("PYTHONPATH", str(project.path / "lib"))
    store = project.submit("commit:1,hold", "import:part,exit:0")
    until_stepping(store)
    (project.path / "lib" / "part.py").write_text("WORD = 'new'")
    os.kill(jobs.program_pid(store), signal.SIGTERM)
    assert until_over(store).state is State.DONE
    assert "old" in store.read("attempts/1/log-0.txt").decode()


def test_damaged_snapshot_ends_the_run(project: Project) -> None:
    """A run whose snapshot is damaged stops with the reason, and starts nothing."""
    store = project.submit("hold", "exit:0")
    until_stepping(store)
    registry.cancel(store.url)
    (archive,) = store.file("code").glob("*.tar.gz")
    archive.write_bytes(b"x")
    subprocess.run(["rm", "-r", str(archive).removesuffix(".tar.gz")], check=True)
    registry.resume(store.url)
    status = until_over(store)
    assert (status.state, status.attempts) == (State.FAILED, 1)
    assert "is damaged" in status.reason


def test_secrets_stay_out_of_the_run_directory(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """No value of the environment is written anywhere in the run directory, though the program gets it."""
    monkeypatch.setenv("MY_TOKEN", "s3cr3t-value")
    store = project.submit("exit:0")
    until_over(store)
    found = subprocess.run(["grep", "-r", "s3cr3t-value", store.url], capture_output=True, check=False)
    assert found.returncode == 1


def test_follower_replaces_a_killed_runner(project: Project) -> None:
    """Who waits for a run brings back a runner that was killed."""
    process = project.start(
        "submit", "--run", str(project.runs / "r"), "--wait", "--", "python", "job.py", "hold", "exit:0"
    )
    store = Store(project.runs / "r")
    with process:
        until(lambda: store.exists(contract.RUN_JSON), "run.json is written")
        until_stepping(store)
        os.kill(jobs.runner_pid(store), signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "the local runner is gone; starting another (1 of 5)" in out
    assert out.splitlines()[-1].startswith("done after 2 attempts")


def test_unreadable_run_json(project: Project) -> None:
    """A damaged run.json stops every command with one sentence, and starts nothing."""
    store = project.submit("exit:0")
    until_over(store)
    store.write(contract.RUN_JSON, "{")
    for command in (registry.resume, registry.cancel, lambda url: run_status.status(Store(url))):
        with pytest.raises(JobkitError, match="is damaged"):
            command(store.url)


def test_processes_of_this_machine() -> None:
    """A child is found by family and by environment while it lives; as a zombie it is a child, but not alive."""
    mark = f"mark-{os.getpid()}"
    with subprocess.Popen(["sh", "-c", "sleep 60 & wait"], env=os.environ | {"JOBKIT_TEST": mark}) as shell:
        until(lambda: len(processes.with_environment("JOBKIT_TEST", mark)) == 2, "both run")
        (sleeper,) = processes.descendants(shell.pid)
        assert {shell.pid, sleeper} <= set(processes.descendants())
        assert processes.with_environment("JOBKIT_TEST", mark)[sleeper]["JOBKIT_TEST"] == mark
        os.kill(sleeper, signal.SIGKILL)
        os.kill(shell.pid, signal.SIGKILL)
        until(lambda: not processes.alive(shell.pid), "it is a zombie")
        assert shell.pid in processes.descendants()
    assert shell.pid not in processes.descendants()
    assert not processes.alive(0)

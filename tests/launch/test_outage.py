"""A disk that does not answer for seconds, under everything that keeps a run going: it goes on by itself."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobkit import contract
from jobkit.contract import State
from jobkit.rundir.ledger import read_events
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from launch.backends.local import Local
from launch.lifecycle import lock, run_status, verbs
from tests.harness import jobs
from tests.harness.jobs import Project, until, until_over, until_stepping
from tests.harness.outage import Outage


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    yield from jobs.project(tmp_path)


@pytest.fixture
def outage(project: Project, tmp_path: Path) -> Iterator[Outage]:
    """The disk that all runs of the project lie on."""
    project.runs.mkdir()
    made = Outage(tmp_path, project.runs)
    yield made
    made.end()


def told_by_runner(store: Store) -> list[str]:
    return store.read("runner.log").decode().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "writes"),
    [
        ("program", True),
        pytest.param("program", False, marks=pytest.mark.slow),
        pytest.param("supervisor", True, marks=pytest.mark.slow),
        pytest.param("supervisor", False, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_after_an_outage(victim: str, writes: bool, project: Project, outage: Outage) -> None:
    """Somebody is killed while the disk does not answer: nobody gives up, and the outcome is not lost."""
    store = verbs.submit(Local(outage.environ), project.spec("commit:1,sleep:6,exit:75", "exit:0"))
    until(lambda: run_status.status(store).committed_step == 1, "it has committed")
    find = jobs.program_pid if victim == "program" else jobs.supervisor_pid
    pid = find(store)
    outage.begin(writes=writes)
    os.kill(pid, signal.SIGKILL)
    time.sleep(2)
    assert lock.held(store), "the runner is gone"
    assert store.numbers(contract.ATTEMPTS) == [0]
    outage.end()
    status = until_over(store)
    assert (status.state, status.attempts) == (State.DONE, 2), status
    assert status.endings[0].outcome == "killed"
    assert [event["event"] for event in run_status.events(store)] == ["submitted", "decision", "decision", "ended"]


@pytest.mark.parametrize(
    "number",
    [
        errno.EIO,
        pytest.param(errno.ENOSPC, marks=pytest.mark.slow),
        pytest.param(errno.EMFILE, marks=pytest.mark.slow),
    ],
)
def test_an_end_during_an_outage_is_not_lost(number: int, project: Project, outage: Outage) -> None:
    """A program that ends well while the disk does not answer is done, in one attempt; a person is told once."""
    store = verbs.submit(Local(outage.environ), project.spec("commit:3,sleep:1,exit:0"))
    until(lambda: run_status.status(store).committed_step == 3, "it has committed")
    supervisor = jobs.supervisor_pid(store)
    with outage.during(number):
        until(lambda: not any(map(processes.alive, processes.descendants(supervisor))), "the program has ended")
        time.sleep(1)
    status = until_over(store)
    assert (status.state, jobs.outcomes(store), status.committed_step) == (State.DONE, ["done"], 3)


@pytest.mark.slow
def test_an_attempt_begins_after_the_outage(project: Project, outage: Outage) -> None:
    """Between two attempts the runner waits for the disk, says so once, and says when it answers again."""
    store = verbs.submit(Local(outage.environ), project.spec("commit:1,kill:9", "exit:0"))
    until(lambda: jobs.events(store, "decision"), "the first attempt has ended")
    with outage.during():
        time.sleep(3)
        assert lock.held(store)
    assert until_over(store).state is State.DONE
    asked, answered = told_by_runner(store)
    assert "Stale file handle; asking again until the storage answers" in asked
    assert "the storage answers again" in answered


@pytest.mark.slow
def test_a_stop_during_an_outage(project: Project, outage: Outage) -> None:
    """A runner that is told to stop does so although the disk does not answer, and `resume` goes on later."""
    store = verbs.submit(Local(outage.environ), project.spec("hold", "exit:0"))
    until_stepping(store)
    with outage.during():
        os.kill(jobs.program_pid(store), signal.SIGKILL)
        time.sleep(1)
        os.kill(jobs.runner_pid(store), signal.SIGTERM)
        until(lambda: not lock.held(store), "the runner is gone", seconds=60)
    assert verbs.resume(Local(outage.environ), store) is State.RUNNING
    assert until_over(store).state is State.DONE


def test_a_runner_without_descriptors(project: Project) -> None:
    """A runner that may open no file any more waits until it may."""
    store = project.submit("hold", "exit:0")
    until_stepping(store)
    runner = jobs.runner_pid(store)
    before = resource.prlimit(runner, resource.RLIMIT_NOFILE)
    resource.prlimit(runner, resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        os.kill(jobs.program_pid(store), signal.SIGKILL)
        until(lambda: b"Too many open files" in store.read("runner.log"), "the runner may open nothing")
    finally:
        resource.prlimit(runner, resource.RLIMIT_NOFILE, before)
    assert until_over(store).state is State.DONE


@pytest.mark.slow
def test_a_sweep_goes_on_after_an_outage(project: Project, outage: Outage) -> None:
    """The runner of a sweep waits for the disk as those of its points do."""
    spec = project.spec("commit:{x},sleep:1", run="s", sweep={"x": ("1", "2", "3")})
    store = verbs.submit(Local(outage.environ), spec)
    first = Store(f"{store.url}/points/0")
    until(lambda: first.exists("run.json") and run_status.status(first).committed_step == 1, "the first point trains")
    with outage.during():
        time.sleep(3)
    until(lambda: not lock.held(store), "the sweep is over", seconds=90)
    states = [run_status.status(Store(f"{store.url}/points/{number}")).state for number in range(3)]
    assert states == [State.DONE] * 3


@pytest.mark.slow
def test_who_waits_goes_on_waiting(project: Project, outage: Outage) -> None:
    """`submit --wait` says that the disk does not answer, and ends with the run and not before."""
    options = ("--run", str(project.runs / "r"), "--wait", "--", "python", "job.py", "commit:1,sleep:3,exit:0")
    with project.start("submit", *options, **outage.environ) as waiting:
        store = Store(project.runs / "r")
        until(lambda: run_status.status(store).committed_step == 1 if store.exists("run.json") else False, "it trains")
        with outage.during():
            time.sleep(2)
        out, err = waiting.communicate(timeout=90)
    assert waiting.returncode == 0, (out, err)
    assert "done after 1 attempt" in out


# What is printed.


def supervised(*command: str, run: Path, redirect: str, environ: dict[str, str] | None = None) -> int:
    """Supervise a command by hand, with its output redirected by a shell; return the exit code."""
    words = [sys.executable, "-m", "jobkit.supervise", "--", *command]
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirect}', "sh", *words],
        env=os.environ | {contract.ENV_RUN: str(run)} | (environ or {}),
        timeout=60,
        check=False,
    ).returncode


@pytest.mark.slow
@pytest.mark.parametrize("redirect", [">/dev/full 2>&1", ">&- 2>&-", "2>&-", "2>/dev/full"])
def test_what_cannot_be_printed_changes_no_exit_code(redirect: str, tmp_path: Path) -> None:
    """A full disk or a closed stream under a supervisor's output leaves its exit codes as they are."""
    assert supervised("sh", "-c", "echo some words; exit 5", run=tmp_path / "a", redirect=redirect) == 5
    assert supervised("sh", "-c", "echo some words", run=tmp_path / "b", redirect=redirect) == 0
    assert supervised("no-such-program", run=tmp_path / "c", redirect=redirect) == contract.Exit.CONFIG
    (tmp_path / "file").touch()
    assert supervised("true", run=tmp_path / "file" / "d", redirect=redirect) == contract.Exit.CONFIG


@pytest.mark.slow
def test_a_full_disk_at_the_first_file_is_the_storage_s(tmp_path: Path) -> None:
    """A supervisor that can write neither its attempt nor its own log ends with 74, and not with 1."""
    outage = Outage(tmp_path, tmp_path / "run")
    outage.begin(errno.ENOSPC)
    environ = os.environ | outage.environ | {contract.ENV_RUN: str(tmp_path / "run")}
    with (
        open("/dev/full", "wb") as full,
        subprocess.Popen(
            [sys.executable, "-m", "jobkit.supervise", "--", "true"], env=environ, stdout=full, stderr=full
        ) as process,
    ):
        time.sleep(3)
        process.terminate()  # it would wait a minute for room
        assert process.wait(timeout=60) == contract.Exit.STORAGE


# Memory that program and supervisor share.

_SMALL = """
mount -t tmpfs -o {options} tmpfs /dev/shm || exit 99
{fill}
TMPDIR={temporary} exec "$@"
"""


def in_small_memory(options: str, fill: str, temporary: Path, run: Path) -> subprocess.CompletedProcess[str]:
    """Supervise a command that tells where the shared directory is, with a /dev/shm of its own."""
    script = _SMALL.format(options=options, fill=fill, temporary=temporary)
    words = [sys.executable, "-m", "jobkit.supervise", "--", "sh", "-c", "echo in $JOBKIT_SUPERVISOR"]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *words],
        env=os.environ | {contract.ENV_RUN: str(run)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode in (1, 99) and "ermitted" in done.stderr:
        pytest.skip("left out, needs root to mount a small /dev/shm")
    return done


@pytest.mark.parametrize(
    ("options", "fill"),
    [
        ("size=4k", "echo x >/dev/shm/x"),
        ("nr_inodes=1", ""),
        ("nr_inodes=2", ""),
        ("nr_inodes=3", ""),
        ("ro", ""),
    ],
)
def test_a_full_dev_shm(options: str, fill: str, tmp_path: Path) -> None:
    """Without room in /dev/shm, as in a container of Docker's, the heartbeat lies on the disk, and nothing is left."""
    done = in_small_memory(options, fill, tmp_path, tmp_path / "run")
    assert done.stdout.startswith(f"in {tmp_path}/jobkit-"), done.stderr
    assert not list(tmp_path.glob("jobkit-*"))


def test_no_room_for_a_heartbeat_names_the_right_disk(tmp_path: Path) -> None:
    """Where nothing on the node has room, the message names those places, and not the run directory."""
    everywhere = [f"mount --bind /dev/shm {place}" for place in ("/tmp", "/var/tmp")]
    fill = "\n".join([f"mount --bind {tmp_path} /mnt", "echo x >/dev/shm/x", *everywhere, "cd /dev/shm"])
    done = in_small_memory("size=4k", fill, Path("/dev/shm"), Path("/mnt/run"))
    assert done.returncode == contract.Exit.STORAGE, done.stderr
    assert "on this node neither in /dev/shm nor in the directory for temporary files (TMPDIR)" in done.stderr
    assert "/mnt/run" not in done.stderr


@pytest.mark.slow
def test_events_of_an_outage(project: Project, outage: Outage) -> None:
    """What happened to a run while its disk did not answer is in its ledger afterwards."""
    store = verbs.submit(Local(outage.environ), project.spec("commit:2,sleep:2,exit:3", "exit:0"))
    until(lambda: run_status.status(store).committed_step == 2, "it has committed")
    supervisor = jobs.supervisor_pid(store)
    with outage.during(errno.ESTALE, writes=True):
        until(lambda: not any(map(processes.alive, processes.descendants(supervisor))), "the program has ended")
        time.sleep(1)
    assert until_over(store).state is State.DONE
    told = [event for event in read_events(store) if event["event"] == "exited"]
    assert [event["exit_code"] for event in told] == [3, 0]

"""Several processes of one attempt under the local runner: one hangs, one is killed, a supervisor is killed."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobkit import contract
from jobkit.rundir import commits
from jobkit.rundir.ledger import attempt_events, read_json
from jobkit.rundir.store import Store
from launch.backends.local import Local
from launch.lifecycle import orphans, verbs
from launch.lifecycle.history import read_history
from launch.report.goodput import measure
from launch.report.lives import PEER
from tests.harness import jobs, training
from tests.harness.jobs import Project, children, until, until_over

TRAIN = '''\
"""train.py HOW: trains in several processes; in attempt 0 process 1 hangs after step 12, if HOW says so."""
import os, sys, time
from tests.harness import training

def hook(point, run):
    here = (sys.argv[1], os.environ["JOBKIT_PROCESS"], run.attempt, point, run.step)
    if here == ("hang", "1", 0, "step", 12):
        never_joins()

def never_joins():
    while True:
        time.sleep(0.1)

training.train_many(os.environ["JOBKIT_RUN"], steps=int(sys.argv[2]), pause_s=0.05, hook=hook)
'''

IMPORTS = '''\
"""imports.py TOLD JOINED: trains in several processes; in attempt 0 those of TOLD get a notice while they import."""
import os, signal, sys, time
import jobkit

if sys.argv[2] == "joined":
    jobkit.initialize()
if os.environ["JOBKIT_ATTEMPT"] == "0" and os.environ["JOBKIT_PROCESS"] in sys.argv[1].split(","):
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(100)
from tests.harness import training
training.train_many(os.environ["JOBKIT_RUN"], steps=20)
'''


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    for made in jobs.project(tmp_path):
        (made.path / "train.py").write_text(TRAIN)
        (made.path / "imports.py").write_text(IMPORTS)
        yield made


def submit(project: Project, count: int, how: str, steps: int, **options: Any) -> Store:
    """Submit train.py in so many processes."""
    spec = project.spec(sbatch={"ntasks-per-node": str(count)}, **options)
    return verbs.submit(Local(), msgspec.structs.replace(spec, command=("python", "train.py", how, str(steps))))


def until_committed(store: Store, step: int) -> None:
    """Wait until a step is committed."""
    until(lambda: max(commits.steps(store), default=-1) >= step, f"step {step} is committed", seconds=120)


def program_of(store: Store, process: int) -> tuple[int, int]:
    """Return the pids of a process of attempt 0: its supervisor's and its program's."""
    name = "supervisor.json" if process == 0 else f"supervisor-{process}.json"
    supervisor = int((read_json(store, f"attempts/0/{name}") or {})["pid"])
    (program,) = children(supervisor)
    return supervisor, program


@pytest.mark.slow
def test_one_never_joins_a_collective(project: Project) -> None:
    """One of two hangs before a collective, the other in it: the attempt ends as stalled, the culprit is named."""
    store = submit(project, 2, "hang", 30, stall_s=8.0, grace_s=3.0)
    status = until_over(store, seconds=180)
    log = store.read("attempts/0/log-1.txt").decode()
    assert (status.state, jobs.outcomes(store)) == ("done", ["stalled", "done"]), log
    reason = status.endings[0].reason
    assert reason.startswith(f"process 1 on {os.uname().nodename}: no progress for "), reason
    assert re.search(r"in train\.py:\d+ in never_joins$", reason), reason
    assert "most recent call first" in log
    stalls = [event for event in attempt_events(store, 0) if event["event"] == "stalled"]
    assert {event["writer"] for event in stalls} >= {"supervisor-1"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Train without interruption in 2 and in 4 processes; return the digests of the ends."""
    found = {}
    for count in (2, 4):
        url = tmp_path_factory.mktemp("undisturbed") / "run"
        assert training.join_many(training.start_many(url, count, steps=20)) == [0] * count
        found[count] = training.digest(url)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "told", "joined"),
    [(2, "1", "no"), (2, "0", "no"), (2, "1", "joined"), (4, "0,2", "no"), (4, "0,1,2,3", "no")],
)
def test_a_notice_while_they_import(
    count: int, told: str, joined: str, project: Project, undisturbed: dict[int, str]
) -> None:
    """Who gets a notice during imports is gone at once; the others do not wait for it, and the next attempt begins."""
    spec = project.spec(sbatch={"ntasks-per-node": str(count)}, grace_s=15.0)
    store = verbs.submit(Local(), msgspec.structs.replace(spec, command=("python", "imports.py", told, joined)))
    status = until_over(store, seconds=180)
    assert (status.state, jobs.outcomes(store)) == ("done", ["preempted", "done"])
    assert (status.endings[0].duration_s or 0) < 60, "they waited for what was gone"
    assert training.digest(store.path) == undisturbed[count]


@pytest.mark.slow
def test_one_of_four_is_killed(project: Project) -> None:
    """SIGKILL of one of four processes: within 15 s the next attempt runs, and the log's last line says who died."""
    store = submit(project, 4, "none", 30, grace_s=30.0)
    until_committed(store, 10)
    _, program = program_of(store, 2)
    killed_at = time.time()
    os.kill(program, signal.SIGKILL)
    until(lambda: len(jobs.events(store, "started")) > 4, "the next attempt starts", seconds=60)
    started = [event for event in attempt_events(store, 1) if event["event"] == "started"]
    assert started[0]["t"] - killed_at < 15
    last = store.read("attempts/0/log-0.txt").decode().splitlines()[-1]
    assert last.startswith(f"jobkit: process 2 on {os.uname().nodename}: killed by SIGKILL"), last
    status = until_over(store, seconds=180)
    assert (status.state, jobs.outcomes(store)) == ("done", ["killed", "done"])
    assert orphans.processes_of(store) == []
    found = measure(read_history(store))
    assert (found.attempts[0].notice, found.preemption.notices, found.preemption.to_save) == (PEER, 0, 0)


@pytest.mark.slow
def test_one_supervisor_of_two_is_killed(project: Project) -> None:
    """SIGKILL of one process's supervisor is a notice to all: they commit one step and the run goes on."""
    store = submit(project, 2, "none", 40)
    until_committed(store, 10)
    supervisor, _ = program_of(store, 1)
    os.kill(supervisor, signal.SIGKILL)
    status = until_over(store, seconds=180)
    stopped = {event["step"] for event in attempt_events(store, 0) if event["event"] == "stopped"}
    assert (status.state, jobs.outcomes(store)) == ("done", ["preempted", "done"])
    assert stopped == {status.endings[0].committed_step}
    assert status.endings[0].reason.startswith("the supervisor was killed (SIGKILL)")


def test_what_is_wrong_with_the_program_is_what_is_told(tmp_path: Path) -> None:
    """Of several processes that ended badly the one that names the user's mistake counts, not who was aborted by it."""
    assert told_of(Store(tmp_path), (134, 78, 134)) == (78, "process 1 on n1: code 78")


def test_who_is_aborted_when_another_left_on_notice(tmp_path: Path) -> None:
    """JAX aborts who still begins when another process has left: the attempt was preempted, if both were told."""
    assert told_of(Store(tmp_path / "a"), (134, 75)) == (75, "code 75")
    assert told_of(Store(tmp_path / "b"), (134, 75), noticed=False) == (134, "process 0 on n1: code 134")
    assert told_of(Store(tmp_path / "c"), (134, 137)) == (134, "process 0 on n1: code 134")


def told_of(store: Store, codes: tuple[int, ...], *, noticed: bool = True) -> tuple[int, str]:
    """Return what is told of an attempt whose processes ended with these codes, one after another."""
    for process, code in enumerate(codes):
        told = {"process": process, "processes": len(codes), "node": "n1", "exit_code": code, "ended": float(process)}
        told |= {"reason": f"code {code}", "step": 0, "notice": {"source": "SIGTERM"} if noticed else None}
        store.write(contract.process_outcome(0, process), json.dumps(told))
    together = orphans.of_all_processes(store, 0)
    assert together is not None
    return together["exit_code"], together["reason"]

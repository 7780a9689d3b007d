"""A tiny program for tests of the launching side: real processes and signals, no jax; and waiting for what it does."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jobkit.rundir.ledger import read_events
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from launch.backends import registry
from launch.backends.local import Local
from launch.cli import main
from launch.lifecycle import lock, orphans, run_status, verbs
from launch.lifecycle.submission import open_run
from launch.spec.jobspec import JobSpec

ROOT = Path(__file__).parent.parent.parent

JOB = '''\
"""job.py PLAN...: attempt n does PLAN[n] (the last one for all later): words joined by commas."""
import fcntl, json, os, select, signal, sys, time
from pathlib import Path
from jobkit.supervise.heartbeat import Heartbeat, Phase, open_alive

run, attempt = Path(os.environ["JOBKIT_RUN"]), int(os.environ["JOBKIT_ATTEMPT"])
link = Path(os.environ["JOBKIT_SUPERVISOR"])
heartbeat, alive, told = Heartbeat(link), open_alive(link), []
only = open(f"{run}.only", "w")
try:
    fcntl.flock(only, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    Path(f"{run}.overlap").write_text(f"attempt {attempt}")

def commit(step):
    directory = run / "checkpoints" / str(step)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "commit.json").write_text("{}")
    heartbeat.step = heartbeat.committed_step = step
    heartbeat.beat()

def hold():
    """Step until told to stop, or until the supervisor is gone; then commit and leave as a run does."""
    poll = select.poll()
    poll.register(alive, select.POLLHUP)
    while not told and not poll.poll(20):
        heartbeat.step += 1
        heartbeat.beat()
    heartbeat.enter(Phase.STOPPING)
    commit(max(heartbeat.step, heartbeat.committed_step + 1))
    heartbeat.enter(Phase.STOPPED)
    sys.exit(75)

plan = sys.argv[1:][min(attempt, len(sys.argv) - 2)]
print(f"attempt {attempt}: {plan}", flush=True)
if "stubborn" in plan:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
if "hold" in plan:
    heartbeat.enter(Phase.LISTENING)
for word in plan.split(","):
    name, _, value = word.partition(":")
    if name == "commit":
        commit(int(value))
    elif name == "hold":
        hold()
    elif name == "step":
        heartbeat.enter(Phase.FIRST_STEP)
        for _ in range(int(value)):
            heartbeat.step, heartbeat.phase = heartbeat.step + 1, Phase.STEPPING
            heartbeat.beat()
            time.sleep(0.02)
    elif name == "sleep" or name == "stubborn":
        time.sleep(float(value or 60))
    elif name == "exit":
        sys.exit(int(value))
    elif name == "kill":
        os.kill(os.getpid(), int(value))
    elif name == "fill":
        with open(value, "wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(bytes(1 << 16))
            except OSError:
                pass
    elif name == "read":
        print(Path(value).read_text(), flush=True)
    elif name == "import":
        print(__import__(value).WORD, flush=True)
    elif name == "touch":
        Path(value).touch()
'''


class Project:
    """A directory with job.py, and the runs started from it."""

    def __init__(self, path: Path) -> None:
        self.path = path / "project"
        self.path.mkdir()
        self.runs = path / "runs"
        (self.path / "job.py").write_text(JOB)

    def spec(self, *plan: str, run: str = "r", **options: Any) -> JobSpec:
        """Specify a job whose attempts do what `plan` says."""
        command, cwd = ("python", "job.py", *plan), str(self.path)
        return JobSpec(command=command, run=str(self.runs / run), cwd=cwd, **({"grace_s": 5.0} | options))

    def submit(self, *plan: str, run: str = "r", **options: Any) -> Store:
        """Submit such a job."""
        return verbs.submit(Local(), self.spec(*plan, run=run, **options))

    def cli(self, *arguments: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run `jobkit` from the project directory, to its end."""
        with self.start(*arguments, cwd=cwd, **environ) as process:
            out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def start(self, *arguments: str, cwd: Path | None = None, **environ: str) -> "subprocess.Popen[str]":
        """Start `jobkit` from the project directory, on no terminal; pytest's workers set the width of theirs."""
        own = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        return subprocess.Popen(
            [sys.executable, "-m", "launch", *arguments],
            cwd=cwd or self.path,
            env=own | {"PYTHONPATH": str(ROOT)} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End whatever a test left, and fail if two programs of one run ever lived at once."""
        for path in registry.find_runs(self.runs):
            store = open_run(path)
            for pid in [runner_pid(store), *orphans.processes_of(store)]:
                if pid and lock.held(store):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            assert not Path(f"{store.url}.overlap").exists(), "two programs of one run lived at the same time"


def command_line(*words: str, errors: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `jobkit` in this process, which costs no start of an interpreter; what it starts are processes as ever.

    Args:
        words: The command line.
        errors: Whether to catch what goes to standard error.
    """
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["jobkit", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err if errors else sys.stderr):
            main.main()
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def runner_pid(store: Store) -> int:
    """Return the pid of a live runner, 0 if there is none."""
    pid = lock.holder(store).get("pid", 0)
    return pid if lock.held(store) and processes.alive(pid) else 0


def supervisor_pid(store: Store, attempt: int = 0) -> int:
    """Return the pid of an attempt's supervisor, 0 before it has one."""
    from jobkit.rundir.ledger import read_json

    return int((read_json(store, f"attempts/{attempt}/supervisor.json") or {}).get("pid", 0))


def program_pid(store: Store, attempt: int = 0) -> int:
    """Return the pid of an attempt's program, 0 before it has one."""
    return max(orphans.program_pids(store, attempt)[-1:], default=0)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started itself."""
    below = processes.descendants(pid)
    deeper = {one for child in below for one in processes.descendants(child)}
    return [one for one in below if one not in deeper]


def until(condition: Callable[[], Any], what: str, *, seconds: float = 20.0) -> Any:
    """Wait until something is true and return it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s in vain until {what}")
        time.sleep(0.02)
    return value


def until_stepping(store: Store, attempt: int = 0) -> None:
    """Wait until an attempt's program works."""

    def stepping() -> bool:
        status = run_status.status(store)
        return status.attempt == attempt and status.phase == "listening" and (status.step or 0) > 0

    until(stepping, f"attempt {attempt} steps")


def until_over(store: Store, *, seconds: float = 30.0) -> run_status.Status:
    """Wait until a run is over and nothing of it is left, and return its status."""
    until(lambda: run_status.status(store).state.over and not lock.held(store), "the run is over", seconds=seconds)
    assert orphans.processes_of(store) == []
    return run_status.status(store)


def outcomes(store: Store) -> list[str]:
    """Return how the attempts ended, oldest first."""
    return [ending.outcome for ending in run_status.status(store).endings]


def events(store: Store, name: str) -> list[dict[str, Any]]:
    """Return the events of one kind."""
    return [event for event in read_events(store) if event["event"] == name]


def project(path: Path) -> Iterator[Project]:
    """Make a project for one test."""
    made = Project(path)
    try:
        yield made
    finally:
        made.close()


IN_A_CONTAINER = """
import os, pathlib, shutil, signal, sys, time
from jobkit.supervise.heartbeat import Heartbeat, Phase
beat, deaf = Heartbeat(pathlib.Path(os.environ["JOBKIT_SUPERVISOR"])), sys.argv[1:] == ["deaf"]
noticed = []
signal.signal(signal.SIGTERM, lambda *_: noticed.append(1))
beat.enter(Phase.LISTENING)
data, token = pathlib.Path("data/words").read_text(), os.environ.get("SOME_TOKEN")
print("scontrol", shutil.which("scontrol"), "prefix", sys.prefix, "data", data, "token", token, flush=True)
beat.step = 0
while os.environ["JOBKIT_ATTEMPT"] == "0" and (deaf or not noticed):
    time.sleep(0.02)
    beat.step += 1
    beat.enter(Phase.STEPPING)
if noticed:
    beat.enter(Phase.STOPPED)
    sys.exit(75)
beat.enter(Phase.FINISHED)
"""
"""A program without jax that steps until it is told to stop, and ends in its second attempt; `deaf`, it goes on."""

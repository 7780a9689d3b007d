"""The supervisor with real processes and signals: what it passes on, what it leaves, what it writes down."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobkit import contract
from jobkit.preemption.notice import Listener
from jobkit.rundir import commits
from jobkit.rundir.ledger import Ledger, attempt_events
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from jobkit.supervise.heartbeat import Link, Phase, read_beat
from jobkit.supervise.oom import Memory
from jobkit.supervise.program import Attempt, Program, read_ahead
from jobkit.supervise.supervisor import Notices
from tests.harness.jobs import children

# A stand-in for a training that needs no jax: it speaks the heartbeat and serves SIGTERM like a Run does.
PROGRAM = """
import os, pathlib, signal, sys, time
from jobkit.supervise.heartbeat import Heartbeat, Phase
beat = Heartbeat(pathlib.Path(os.environ["JOBKIT_SUPERVISOR"]))
noticed = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
    signal.signal(number, lambda number, frame: noticed.append(number))
beat.enter(Phase.LISTENING)
print("listening", flush=True)
beat.step = 0
while not noticed and beat.step < int(sys.argv[1]):
    time.sleep(0.01)
    beat.step += 1
    beat.enter(Phase.STEPPING)
if noticed:
    beat.enter(Phase.STOPPING)
    time.sleep(float(sys.argv[2]))
    print("saved", signal.Signals(noticed[0]).name, len(noticed), flush=True)
    beat.enter(Phase.STOPPED)
    sys.exit(75)
beat.enter(Phase.FINISHED)
"""


class Supervised:
    """A supervisor under test."""

    def __init__(self, url: Path, *command: str, environment: dict[str, str] | None = None) -> None:
        self.store = Store(url)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobkit.supervise", "--", *command],
            env=os.environ | {contract.ENV_RUN: str(url)} | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
        """Wait until `condition()` is true, and return it."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(0.01)
        return found

    def log(self) -> str:
        """Return the program's log so far."""
        path = self.store.file(contract.log_file(0))
        return path.read_text() if path.exists() else ""

    def beat(self) -> Any:
        """Return the program's heartbeat."""
        told = json.loads(self.store.read("attempts/0/supervisor.json"))
        return read_beat(Path(told["heartbeat"]))

    def end(self, timeout_s: float = 20.0) -> tuple[int, str, dict[str, Any]]:
        """Wait for the end; return exit code, what was printed and the outcome."""
        printed, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, printed, json.loads(self.store.read("attempts/0/outcome.json"))


def _in_memory(path: Path) -> bool:
    """Tell whether the page cache has all of a file."""
    return int(subprocess.check_output(["fincore", "-bnro", "RES", path])) >= path.stat().st_size


def _committed(store: Store, nbytes: int) -> Path:
    """Commit a step with a file of so many bytes, and drop it from memory; return the file."""
    stage = commits.new_stage(store, 1, 0)
    stage.mkdir()
    (stage / "values").write_bytes(os.urandom(nbytes))
    commit = commits.Commit(step=1, attempt=0, at=0.0, reason="interval", files={})
    assert commits.publish(store, stage, state={}, commit=commit)
    path = store.file(f"{contract.step_dir(1)}/values")
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


@pytest.mark.skipif(shutil.which("fincore") is None, reason="needs fincore of util-linux")
def test_the_newest_step_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor has the step that is wanted in memory while the program starts; none that would fill it."""
    store = Store(tmp_path / "run")
    path = _committed(store, 40 << 20)
    assert not _in_memory(path)
    with monkeypatch.context() as patch:
        patch.setattr(Memory, "spare_bytes", lambda self: 79 << 20)
        assert not read_ahead(store)
    assert not _in_memory(path)
    run = Supervised(tmp_path / "run", "sleep", "2")
    run.wait_for(lambda: _in_memory(path))
    assert run.end()[0] == 0
    path.unlink()
    assert not read_ahead(store)


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    """Return a command that trains 10,000 tiny steps and takes 0.3 s to save on notice."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return [sys.executable, str(path), "10000", "0.3"]


@pytest.mark.parametrize(
    ("command", "code", "outcome"),
    [
        (["true"], 0, "done"),
        (["sh", "-c", "echo oops >&2; exit 3"], 3, "failed"),
        (["sh", "-c", "exit 75"], 75, "preempted"),
        (["sh", "-c", "exit 78"], 78, "config"),
        (["sh", "-c", "kill -9 $$"], 137, "killed"),
        (["sh", "-c", "kill -TERM $$"], 75, "preempted"),
        (["no-such-command"], 78, "config"),
        (["/etc/passwd"], 78, "config"),
    ],
)
def test_exit_codes(command: list[str], code: int, outcome: str, tmp_path: Path) -> None:
    """The attempt ends with the command's own code or the one that says what became of it, and writes it down."""
    ended, printed, told = Supervised(tmp_path / "run", *command).end()
    assert (ended, told["exit_code"], told["outcome"]) == (code, code, outcome)
    if outcome == "failed":
        assert printed == "oops\n"
        assert told["reason"] == "exit code 3: oops"
    if command[0] == "no-such-command":
        assert told["reason"] == (
            "the command 'no-such-command' was not found: give its path, or install it where the job runs"
        )


@pytest.mark.parametrize(
    ("raised", "code", "outcome"),
    [
        ("OSError(errno.ESTALE, 'Stale file handle', '/shared/lab/model.py')", 74, "storage"),
        ("ImportError('libops.so: cannot read file data: Input/output error')", 74, "storage"),
        ("OSError(errno.ENOSPC, 'No space left on device')", 1, "failed"),
        ("ValueError('an Input/output error was seen')", 1, "failed"),
    ],
)
def test_a_program_whose_files_are_away_has_not_failed(raised: str, code: int, outcome: str, tmp_path: Path) -> None:
    """An import from a shared disk that is away just then is the storage's failure, which is tried again."""
    (tmp_path / "away.py").write_text(f"import errno\nraise {raised}\n")
    words = (sys.executable, "-c", "import away")
    ended, _, told = Supervised(tmp_path / "run", *words, environment={"PYTHONPATH": str(tmp_path)}).end()
    assert (ended, told["outcome"]) == (code, outcome), told
    assert raised.split("'")[1] in told["reason"]


def test_the_reason_of_a_jax_program_is_its_error(tmp_path: Path) -> None:
    """What JAX says of its own frames behind an error in a jitted function is not why the program failed."""
    code = "import jax; jax.jit(lambda x: x @ x.reshape(2, 3))(jax.numpy.ones((6, 1)))"
    _, printed, told = Supervised(tmp_path / "run", sys.executable, "-c", code).end()
    assert "JAX has removed its internal frames" in printed
    assert told["reason"].startswith("exit code 1: TypeError: dot_general requires")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_notice_reaches_the_program_as_it_came(number: signal.Signals, program: list[str], tmp_path: Path) -> None:
    """Each signal that stands for a notice is passed on as it is; the supervisor waits for the save."""
    under_test = Supervised(tmp_path / "run", *program)
    under_test.wait_for(lambda: "listening" in under_test.log())
    under_test.process.send_signal(number)
    code, printed, told = under_test.end()
    assert code == 75
    assert f"saved {number.name} 1" in printed
    assert told["outcome"] == "preempted"
    assert told["notice"]["source"] == number.name
    assert told["step"] > 0


@pytest.mark.slow
def test_the_program_learns_what_is_known_of_a_notice(tmp_path: Path) -> None:
    """A signal's notice has the launcher's grace as deadline; where it comes from and why is the supervisor's word."""
    script = tmp_path / "train.py"
    script.write_text(
        "import time, jobkit\n"
        "with jobkit.Run(save_every=None) as run:\n"
        "    state = run.resume(total=0, optimizer=None)\n"
        "    print('listening', flush=True)\n"
        "    for step in run.steps(100_000):\n"
        "        state.total += 1\n"
        "        while run.notice is None:\n"
        "            time.sleep(0.01)\n"
        "        print(run.notice.source, run.notice.reason, round(run.notice.deadline_s), flush=True)\n"
    )
    grace = {contract.ENV_GRACE: "25", contract.ENV_WARNED: "70"}
    for number, expected in (signal.SIGTERM, "SIGTERM signal 25"), (signal.SIGUSR2, "SIGUSR2 signal 70"):
        under_test = Supervised(tmp_path / number.name, sys.executable, str(script), environment=grace)
        under_test.wait_for(lambda under_test=under_test: "listening" in under_test.log())  # type: ignore[misc]
        under_test.process.send_signal(number)
        code, printed, _ = under_test.end()
        assert code == 75, printed
        assert expected in printed


@pytest.mark.timing
def test_a_nearer_deadline_tightens(tmp_path: Path) -> None:
    """The first notice wins, and counts from when it came; a later one may only bring its deadline nearer."""
    link = Link(tmp_path, 0)
    listener = Listener(link.directory)
    listener.open()
    try:
        program = Program(Attempt(Store(tmp_path / "run"), 0, (0, 1), ["true"], None), link)
        program.pid = os.getpid()
        notices = Notices(program, link, Ledger(tmp_path / "ledger"))
        told = []
        for source, deadline_s in ("gce", 30.0), ("SIGTERM", 40.0), ("SIGTERM", 10.0), ("stop", None):
            notices.give(source, f"by {source}", deadline_s)
            time.sleep(0.05)
            assert listener.notice is not None
            assert listener.notice.deadline_s is not None
            told.append((listener.notice.source, listener.notice.reason, round(listener.notice.deadline_s)))
        assert told == [("gce", "by gce", 30)] * 2 + [("gce", "by gce", 10)] * 2
        assert notices.source == "gce"
    finally:
        listener.close()
        link.close()


@pytest.mark.timing
def test_a_preemption_puts_off_no_cancel(program: list[str], tmp_path: Path) -> None:
    """Cancelled inside the grace of a preemption a program has the grace of the cancel, not the rest of the other."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    times = "PreemptTime=2026-01-01T00:00:00 EndTime=2026-01-01T00:05:00"
    scontrol.write_text(f"#!/bin/sh\necho JobId=7 JobState=RUNNING {times}\n")
    scontrol.chmod(0o755)
    environment = {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", contract.ENV_GRACE: "3"}
    under_test = Supervised(tmp_path / "run", *program[:-1], "3", environment=environment)
    under_test.wait_for(lambda: "listening" in under_test.log())
    under_test.process.terminate()
    under_test.store.write(contract.CANCEL, "{}")
    assert under_test.end()[0] == 75
    later = [event["deadline_s"] for event in attempt_events(under_test.store, 0) if event["event"] == "put_off"]
    assert [deadline_s for deadline_s in later if deadline_s > 3] == []


def test_a_burst_of_notices_changes_nothing(program: list[str], tmp_path: Path) -> None:
    """Twenty SIGTERMs while the program saves: it still saves once and ends with 75."""
    under_test = Supervised(tmp_path / "run", *program)
    under_test.wait_for(lambda: "listening" in under_test.log())
    for _ in range(20):
        under_test.process.terminate()
        time.sleep(0.01)
    code, printed, _ = under_test.end()
    assert code == 75
    assert "saved SIGTERM" in printed


@pytest.mark.parametrize("script", ["{program}; echo after", "{program}; true", "exec {program}", "set -e; {program}"])
def test_a_shell_around_the_program_loses_nothing(script: str, program: list[str], tmp_path: Path) -> None:
    """Whatever a shell makes of the exit code, a program that stopped on notice ends the attempt with 75."""
    under_test = Supervised(tmp_path / "run", "sh", "-c", script.format(program=" ".join(program)))
    under_test.wait_for(lambda: "listening" in under_test.log())
    under_test.process.terminate()
    code, printed, _ = under_test.end()
    assert code == 75
    assert "saved SIGTERM" in printed


def test_the_program_outlives_a_shell_that_was_shot(program: list[str], tmp_path: Path) -> None:
    """SIGKILL of the shell between: the orphaned program is told, saves, and its own code counts."""
    under_test = Supervised(tmp_path / "run", "sh", "-c", f"{' '.join(program)}; true")
    under_test.wait_for(lambda: "listening" in under_test.log())
    (shell,) = children(under_test.process.pid)
    os.kill(shell, signal.SIGKILL)
    code, printed, _ = under_test.end()
    assert code == 75
    assert "saved SIGTERM" in printed


def test_a_killed_program_inside_a_shell_that_exits_0_is_not_done(program: list[str], tmp_path: Path) -> None:
    """`sh -c 'train; true'` whose training was killed has not finished, whatever the shell says."""
    under_test = Supervised(tmp_path / "run", "sh", "-c", f"{' '.join(program)}; true")
    beat = under_test.wait_for(lambda: "listening" in under_test.log() and under_test.beat())
    os.kill(beat.pid, signal.SIGKILL)
    code, _, told = under_test.end()
    assert code == 1
    assert "had not finished" in told["reason"]


def test_a_notice_before_the_program_listens(tmp_path: Path) -> None:
    """SIGUSR1 to a program that cannot listen yet ends it at once, as preempted: nothing was lost."""
    under_test = Supervised(tmp_path / "run", "sleep", "60")
    under_test.wait_for(lambda: (tmp_path / "run/attempts/0/events-supervisor.jsonl").exists())
    under_test.wait_for(lambda: processes.descendants(under_test.process.pid))
    under_test.process.send_signal(signal.SIGUSR1)
    code, _, told = under_test.end(5)
    assert (code, told["outcome"], told["notice"]["source"]) == (75, "preempted", "SIGUSR1")


@pytest.mark.slow
@pytest.mark.parametrize(("kept", "number"), [("trap : TERM;", signal.SIGTERM), ("", signal.SIGINT)])
def test_a_notice_that_a_shell_keeps_to_itself(kept: str, number: signal.Signals, tmp_path: Path) -> None:
    """A program that was importing when the shell around it took the notice hears of it as soon as it listens."""
    script = tmp_path / "train.py"
    script.write_text(
        "import time\n"
        "print('importing', flush=True)\n"
        "time.sleep(1)\n"
        "import jobkit\n"
        "with jobkit.Run(save_every=None, trackers=()) as run:\n"
        "    state = run.resume(total=0)\n"
        "    for step in run.steps(10_000):\n"
        "        time.sleep(0.01)\n"
    )
    under_test = Supervised(tmp_path / "run", "bash", "-c", f"{kept} {sys.executable} {script}; echo after")
    under_test.wait_for(lambda: "importing" in under_test.log())
    under_test.process.send_signal(number)
    code, _, told = under_test.end()
    assert (code, told["outcome"], told["step"]) == (75, "preempted", 0)


@pytest.mark.parametrize("own", [0, 1, 143])
def test_the_exit_code_of_a_command_that_was_told_to_end(own: int, tmp_path: Path) -> None:
    """A shell that is told to end before the program inside it listens has finished nothing, and has not failed."""
    script = f"trap 'exit {own}' TERM; echo begun; sleep 60 & wait"
    under_test = Supervised(tmp_path / "run", "sh", "-c", script)
    under_test.wait_for(lambda: "begun" in under_test.log())
    under_test.process.terminate()
    code, _, told = under_test.end()
    assert (code, told["outcome"], told["reason"]) == (75, "preempted", "stopped on SIGTERM")


def test_a_supervisor_that_was_gone_before_its_program_listened(tmp_path: Path) -> None:
    """A program whose supervisor was killed while it was importing notices that as well."""
    gone = "import os, sys; from pathlib import Path; from jobkit.supervise.heartbeat import Link\n"
    gone += "print(Link(Path(sys.argv[1]), 0).directory, flush=True); os.kill(os.getpid(), 9)"
    printed = subprocess.run([sys.executable, "-c", gone, str(tmp_path)], stdout=subprocess.PIPE, text=True).stdout
    directory = Path(printed.strip())
    listener = Listener(directory)
    listener.open()
    try:
        deadline = time.monotonic() + 5
        while not listener.noticed and time.monotonic() < deadline:
            time.sleep(0.01)
        assert listener.notice is not None
        assert listener.notice.source == "supervisor"
    finally:
        listener.close()
        shutil.rmtree(directory)


def test_what_the_command_leaves_running_is_ended(tmp_path: Path) -> None:
    """Daemons that the command leaves behind, double-forked ones too, are gone when the attempt is."""
    script = "sleep 300 & setsid sh -c 'sleep 301 & sleep 302' & sleep 0.2; echo left"
    under_test = Supervised(tmp_path / "run", "sh", "-c", script)
    below = under_test.wait_for(lambda: len(found := processes.descendants(under_test.process.pid)) >= 4 and found)
    code, _, _ = under_test.end()
    assert code == 0
    assert not [pid for pid in below if processes.alive(pid)]


def test_another_users_process_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CMD leaves running as another user, by sudo say, cannot be ended, and keeps no attempt from its end."""
    left = subprocess.Popen(["sleep", "60"])

    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    link = Link(tmp_path, 0)
    below = Program.__new__(Program)
    below._link, below._ended_at = link, time.monotonic()
    monkeypatch.setattr(processes, "descendants", lambda: [left.pid])
    try:
        assert below.end_leftovers()
        monkeypatch.setattr(os, "kill", refuse)
        assert not below.end_leftovers()
    finally:
        monkeypatch.undo()
        left.kill()
        left.wait()
        link.close()


@pytest.mark.slow
def test_sigkill_of_the_supervisor_is_a_notice_to_a_run(tmp_path: Path) -> None:
    """A Run whose supervisor is killed commits the step in progress and exits by itself."""
    script = tmp_path / "train.py"
    script.write_text(
        "import time, jobkit\n"
        "with jobkit.Run(save_every=None) as run:\n"
        "    state = run.resume(total=0)\n"
        "    for step in run.steps(10_000):\n"
        "        state.total += 1\n"
        "        time.sleep(0.01)\n"
    )
    under_test = Supervised(tmp_path / "run", sys.executable, str(script))
    beat = under_test.wait_for(
        lambda: (
            (tmp_path / "run/attempts/0/supervisor.json").exists()
            and (beat := under_test.beat()).phase == Phase.STEPPING
            and beat
        )
    )
    directory = Path(json.loads(under_test.store.read("attempts/0/supervisor.json"))["heartbeat"])
    under_test.process.kill()
    under_test.wait_for(lambda: not processes.alive(beat.pid))
    stopped = [event for event in attempt_events(under_test.store, 0) if event["event"] == "stopped"]
    assert len(stopped) == 1
    assert stopped[0]["step"] > 0
    assert under_test.store.exists(f"checkpoints/{stopped[0]['step']}/commit.json")
    assert not directory.exists()
    under_test.process.communicate()


@pytest.mark.slow
def test_a_stop_that_the_end_of_the_run_serves_is_none_that_is_done(tmp_path: Path) -> None:
    """A loop of the program's own that ends on a stop, inside a shell that exits 0: preempted, and not done."""
    script = tmp_path / "train.py"
    script.write_text(
        "import time, jobkit\n"
        "with jobkit.Run(save_every=None) as run:\n"
        "    state = run.resume(total=0)\n"
        "    run.save(1, wait=True)\n"
        "    while not run.should_stop:\n"
        "        time.sleep(0.01)\n"
    )
    under_test = Supervised(tmp_path / "run", "sh", "-c", f"{sys.executable} {script}; true")
    under_test.wait_for(lambda: under_test.store.exists("checkpoints/1/commit.json"))
    under_test.process.send_signal(signal.SIGTERM)
    code, printed, outcome = under_test.end()
    assert (code, outcome["outcome"]) == (75, "preempted"), printed


def test_output_goes_to_the_log_and_on(tmp_path: Path) -> None:
    """What the command prints is in the attempt's log and comes out of the supervisor, bytes and all."""
    code, printed, _ = Supervised(tmp_path / "run", "printf", "%s\\n%s", "one", "tail").end()
    assert code == 0
    assert printed == "one\ntail"
    assert (tmp_path / "run/attempts/0/log-0.txt").read_text() == "one\ntail"


def test_attempts_are_numbered(tmp_path: Path) -> None:
    """Each supervisor on a run directory is an attempt with a number of its own, which the program can read."""
    for expected in range(3):
        process = subprocess.run(
            [
                sys.executable,
                "-m",
                "jobkit.supervise",
                "--run",
                str(tmp_path / "run"),
                "--",
                "sh",
                "-c",
                "echo $JOBKIT_ATTEMPT",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        assert process.stdout == f"{expected}\n"


def test_without_a_run_directory(tmp_path: Path) -> None:
    """A supervisor without a run directory says so and exits 78."""
    environment = {key: value for key, value in os.environ.items() if key != contract.ENV_RUN}
    process = subprocess.run(
        [sys.executable, "-m", "jobkit.supervise", "--", "true"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 78
    assert process.stderr == "jobkit: no run directory: set JOBKIT_RUN or give --run\n"

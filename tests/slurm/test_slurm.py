"""Runs on a real SLURM cluster: every way in which a job is stopped, and every state in which it is cancelled."""

import json
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobkit import contract
from jobkit.checkpoint import restore
from jobkit.rundir import commits
from jobkit.rundir.ledger import read_events, read_json
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from jobkit.supervise.heartbeat import read_beat
from launch.lifecycle import orphans, run_status
from tests.fakes.gcs_server import GcsServer
from tests.harness import jobs, training
from tests.harness.login import SCRIPT, Login
from tests.harness.slurm import Cluster

ROOT = Path(__file__).parent.parent.parent


def node_of(login: Login, job: str) -> str:
    """Return the name of the node a job runs on."""
    return login.cluster.job(job)["BatchHost"]


def trainer(login: Login) -> int:
    """Return the process that trains."""
    attempt = login.store.numbers(contract.ATTEMPTS)[-1]
    link = orphans.heartbeat_directory(login.store, attempt)
    assert link is not None
    return read_beat(link).pid


def preempt(login: Login, job: str) -> None:
    """Take the job's node for a job of higher priority."""
    login.cluster.preempt([node_of(login, job)], seconds=1)


def requeue(login: Login, job: str) -> None:
    """Have an administrator requeue the job."""
    login.cluster.run("scontrol", "requeue", job)


def reach_limit(login: Login, job: str) -> None:
    """Bring the job's time limit near."""
    login.cluster.set_end(job, 45)


def set_down(login: Login, job: str) -> None:
    """Declare the job's node down, and bring it back later."""
    node = node_of(login, job)
    login.cluster.set_down(node)
    login.until(lambda told: told["attempt"] == 1)
    login.cluster.resume(node)


def lose_node(login: Login, job: str) -> None:
    """Kill everything on the job's node, SLURM's daemon included."""
    node = node_of(login, job)
    login.cluster.kill_slurmd(node, and_tasks=True)
    login.until(lambda told: told["attempt"] == 1)
    login.cluster.start_slurmd(node)


def lose_daemon(login: Login, job: str) -> None:
    """Kill SLURM's daemon alone: the job is started elsewhere while the old one still runs."""
    node = node_of(login, job)
    login.cluster.kill_slurmd(node)
    login.until(lambda told: told["attempt"] == 1)
    login.cluster.start_slurmd(node)


def kill_trainer(login: Login, job: str) -> None:
    """SIGKILL the program."""
    os.kill(trainer(login), signal.SIGKILL)


def kill_runner(login: Login, job: str) -> None:
    """SIGKILL what the batch script runs, as the kernel does when memory is short."""
    (pid,) = [
        pid
        for pid in processes.with_environment("SLURM_JOB_ID", job)
        if b"launch.backends.slurm.job" in (words := Path(f"/proc/{pid}/cmdline").read_bytes())
        and words.startswith(b"/")
    ]
    os.kill(pid, signal.SIGKILL)


WAYS: dict[str, tuple[Callable[[Login, str], None], list[str], float, bool]] = {
    "preempt requeue 0": (preempt, ["-p", "requeue0"], 0.1, True),
    "preempt requeue 5": (preempt, ["-p", "requeue5"], 0.1, True),
    "preempt cancel 5": (preempt, ["-p", "cancel5"], 0.1, True),
    "preempt no-requeue": (preempt, ["-p", "requeue5", "--sbatch", "no-requeue"], 0.1, True),
    "time limit": (reach_limit, ["--time", "10", "--grace", "5s"], 1.5, True),
    "node down": (set_down, [], 0.1, True),
    "node lost": (lose_node, [], 0.3, False),
    "slurmd lost": (lose_daemon, [], 0.5, False),
    "scontrol requeue": (requeue, [], 0.1, True),
    "SIGKILL of the program": (kill_trainer, [], 0.1, False),
    "SIGKILL of the runner": (kill_runner, [], 0.1, False),
}
"""How a job is stopped: the deed, options of the submit, seconds per step, whether a notice comes."""


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_be_stopped(way: str, nodes: int, login: Login, undisturbed: str, undisturbed_many: str) -> None:
    """However SLURM ends the job, the run goes on by itself and ends bit-equal; with a notice no step is lost."""
    deed, options, pause_s, noticed = WAYS[way]
    job = login.submit(*options, pause_s=pause_s, nodes=nodes)
    login.until_step(12)
    deed(login, job)
    login.check_end(undisturbed if nodes == 1 else undisturbed_many)
    first, *_, last = login.outcomes()
    assert last["outcome"] == "done"
    if noticed:
        assert first["outcome"] == "preempted", first
        assert first["committed_step"] == first["step"] > 10, "a step was lost"
    for again in (event for event in read_events(login.store) if event["event"] == "restored"):
        assert again["step"] >= 10


@pytest.mark.slow
def test_a_preempted_job_goes_on(login: Login, undisturbed: str) -> None:
    """A preemption with five seconds of grace: committed, requeued by itself, bit-equal in the end."""
    job = login.submit("-p", "requeue5", pause_s=0.05)
    login.until_step(5)
    preempt(login, job)
    login.check_end(undisturbed)
    assert [outcome["outcome"] for outcome in login.outcomes()] == ["preempted", "done"]
    assert login.outcomes()[0]["committed_step"] == login.outcomes()[0]["step"]


LONG = """\
import os, time
from pathlib import Path
from tests.harness import training

def hook(point, run):
    if (point, run.step, run.attempt) == ("step", 12, 0):
        Path(run.url, "long").touch()
        while run.notice is None:
            time.sleep(0.01)
        time.sleep(4.6)

training.train(os.environ["JOBKIT_RUN"], hook=hook)
"""


@pytest.mark.slow
def test_a_preemption_between_two_attempts(login: Login) -> None:
    """A job that waits before its next attempt has no step that SLURM could tell: it looks by itself, and goes on."""
    job = login.submit_command("sh", "-c", f"test -e {login.home}/room || exit 74", options=("-p", "cancel5"))

    def delays() -> list[float]:
        return [event["delay_s"] for event in run_status.events(login.store) if event["event"] == "decision"]

    login.until(lambda told: max(delays(), default=0.0) >= 16.0)
    preempt(login, job)
    (login.home / "room").touch()
    told = login.until(lambda told: told["state"] in ("done", "failed", "cancelled"), 60)
    assert told["state"] == "done", told
    assert [event for event in run_status.events(login.store) if event["event"] == "requeued"]
    login.until_no_job()


@pytest.mark.timing
@pytest.mark.slow
def test_a_step_that_takes_longer_than_kill_wait(login: Login, undisturbed: str) -> None:
    """The grace of a preemption counts whole: a step that is through in time is not given up at the end of KillWait."""
    (login.home / "long.py").write_text(LONG)
    job = login.submit_command("python", "long.py", options=("-p", "requeue5"))
    jobs.until((login.home / "run" / "long").exists, "the long step begins", seconds=90)
    preempt(login, job)
    login.check_end(undisturbed)
    (stopped,) = [event for event in read_events(login.store) if event["event"] == "stopped"]
    assert stopped["step"] == 13
    assert any(event["event"] == "put_off" for event in read_events(login.store))


@pytest.mark.slow
def test_ten_preemptions_in_a_row(login: Login, undisturbed: str) -> None:
    """Preempted again and again, the run gets to its end, and the status is one of the honest ones at every poll."""
    job = login.submit("-p", "requeue0", pause_s=0.5)
    for attempt in range(10):
        login.until(
            lambda told, attempt=attempt: (
                told["attempt"] == attempt and told["phase"] == "stepping" and told["state"] == "running"
            )
        )
        login.cluster.run("scontrol", "requeue", job) if attempt % 2 else preempt(login, job)
        login.until(lambda told, attempt=attempt: told["state"] == "requeued" or told["attempt"] > attempt)
    login.check_end(undisturbed)
    assert [outcome["outcome"] for outcome in login.outcomes()] == ["preempted"] * 10 + ["done"]


def pending(login: Login) -> None:
    """Submit a job that waits."""
    login.submit("--sbatch", "begin=now+1hour")


def starting(login: Login) -> None:
    """Submit a job and wait until SLURM has started it."""
    login.cluster.wait_state(login.submit(), "RUNNING")


def in_training(login: Login) -> None:
    """Submit a job and wait for some steps."""
    login.submit(pause_s=0.3)
    login.until_step(3)


def in_saving(login: Login) -> None:
    """Submit a job whose program stands still in the middle of a save, and wait for that."""
    stands = f"export=ALL,{contract.ENV_FAULT}=during_write:2=STOP"
    login.submit("--grace", "5s", "--sbatch", stands, pause_s=0.1)
    login.until(lambda told: told["phase"] == "saving" and told["step"] == 10)
    login.cluster.wait(lambda: login.store.names(contract.STAGE), "a save is under way", 20)


def in_grace(login: Login) -> None:
    """Preempt a job that needs its whole grace, and wait for the notice."""
    job = login.submit("-p", "requeue5", pause_s=1.5)
    login.until_step(1)
    preempt(login, job)
    login.cluster.wait(lambda: login.cluster.job(job).get("PreemptTime", "None") != "None", "the notice has come", 20)


def held_back(login: Login) -> None:
    """Requeue a job and wait until SLURM holds it back."""
    job = login.submit(pause_s=0.3)
    login.until_step(3)
    requeue(login, job)
    login.cluster.wait_state(job, "PENDING")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["jobkit cancel", "scancel"])
@pytest.mark.parametrize("when", [pending, starting, in_training, in_saving, in_grace, held_back])
def test_a_cancel_is_for_good(when: Callable[[Login], None], how: str, login: Login) -> None:
    """In every state, by our command and by SLURM's own: the job ends and never comes back."""
    when(login)
    if how == "scancel":
        for job in login.cluster.run("squeue", "--noheader", "--me", "--format=%i|%j").splitlines():
            if job.endswith("|run"):
                login.cluster.run("scancel", job.split("|")[0])
    else:
        login.jobkit("cancel", "run")
    told = login.until(lambda told: told["state"] not in ("queued", "running", "requeued"), 40)
    assert told["state"] == "cancelled", told
    login.until_no_job()
    attempts = login.store.numbers(contract.ATTEMPTS)
    time.sleep(10)  # longer than SLURM holds a requeued job back
    assert login.store.numbers(contract.ATTEMPTS) == attempts
    assert not login.cluster.run("squeue", "--noheader", "--me").strip()
    assert login.status()["state"] == "cancelled"
    for outcome in login.outcomes():
        # One that had not opened its run yet dies of the signal in its own way.
        assert outcome["outcome"] in ("preempted", "killed") or outcome["step"] < 0, outcome


@pytest.mark.slow
def test_resume_after_a_cancel(login: Login, undisturbed: str) -> None:
    """A cancelled run is resumed in a new job and ends bit-equal; a second resume meanwhile is refused."""
    in_training(login)
    told = login.status()
    assert f"{told['partition']}|{told['node']}" in login.cluster.run("squeue", "--noheader", "--me", "--format=%P|%N")
    where = f"slurm, job {told['job']}, partition {told['partition']}, on {told['node']}"
    assert re.search(rf"{where}\n.*step +\d+ of {told['total_steps']} \(", login.jobkit("status", "run"), re.DOTALL)
    login.jobkit("cancel", "run")
    committed = commits.steps(login.store)[-1]
    login.jobkit("resume", "run")
    assert "is alive: job" in login.jobkit("resume", "run", code=2)
    login.check_end(undisturbed)
    restored = [event["step"] for event in read_events(login.store) if event["event"] == "restored"]
    assert restored == [committed]


def test_dry_run_prints_the_script(login: Login) -> None:
    """A dry run prints the batch script and writes nothing; no input of the user's reaches a shell unquoted."""
    evil = "a; touch pwned $(touch pwned)"
    (login.home / "train.py").write_text(SCRIPT)
    printed = login.jobkit(
        "submit", "--on", "slurm", "--run", evil, "-p", "low", "--time", "1:00:00", "--sbatch", "exclude=n[1-3]",
        "--dry-run", "--", "python", "train.py", "'; touch pwned",
    )  # fmt: skip
    assert "#SBATCH --partition=low\n" in printed
    assert "#SBATCH --time=1:00:00\n" in printed
    assert "#SBATCH --exclude='n[1-3]'\n" in printed or "#SBATCH --exclude=n[1-3]\n" in printed
    last = printed.rstrip().splitlines()[-1]
    assert f"{login.home / evil};" in shlex.split(last)
    assert sorted(path.name for path in login.home.iterdir()) == ["train.py"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "nope"], "invalid partition specified: nope"),
        (["--sbatch", "array=0-3"], "one run is one job"),
        (["--sbatch", "requeue=expedite"], "SLURM then takes any exit code but 0 for a broken node"),
        (["--ntasks-per-node", "0"], "give a number of processes"),
        (["--time", "2"], "leaves hardly time to train"),
        (["--time", "soon"], "Invalid --time specification"),
    ],
)
def test_refused_submissions_leave_nothing(options: list[str], message: str, login: Login) -> None:
    """What SLURM or jobkit refuses is one sentence, exit code 2, and no run directory."""
    (login.home / "train.py").write_text(SCRIPT)
    said = login.jobkit("submit", "--on", "slurm", "--run", "run", *options, "--", "python", "train.py", code=2)
    assert message in said
    assert len(said.strip().splitlines()) == 1, said
    assert [path.name for path in login.home.iterdir()] == ["train.py"]


def test_an_environment_that_requeues_at_any_exit_code(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    """SBATCH_REQUEUE=expedite is refused as the option is: sbatch would take it from the environment."""
    monkeypatch.setenv("SBATCH_REQUEUE", "expedite")
    (login.home / "train.py").touch()
    said = login.jobkit("submit", "--on", "slurm", "--run", "run", "--", "python", "train.py", code=2)
    assert "SBATCH_REQUEUE=expedite" in said


def test_a_secret_stays_out_of_files(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment reaches the program, and no file of the run holds it."""
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-value")
    (login.home / "show.py").write_text("import os; print(len(os.environ['WANDB_API_KEY']))")
    login.jobkit("submit", "--on", "slurm", "--run", "run", "--", "python", "show.py")
    login.until(lambda told: told["state"] == "done")
    assert login.store.read(contract.log_file(0)).split() == [b"12"]
    files = [path for path in login.store.path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if b"s3cr3t-value" in path.read_bytes()]


def test_a_failing_program_fails_in_its_job(login: Login) -> None:
    """A program that fails twice without progress ends the run, with the reason, in the job it had."""
    (login.home / "train.py").write_text("raise SystemExit(3)")
    login.jobkit("submit", "--on", "slurm", "--run", "run", "--", "python", "train.py")
    told = login.until(lambda told: told["state"] == "failed")
    assert "failed (exit code 3) before committing anything" in told["reason"]
    assert read_json(login.store, f"{contract.attempt_dir(0)}/{contract.OUTCOME}")
    login.until_no_job()


@pytest.mark.slow
def test_readme(login: Login) -> None:
    """The README's command for a cluster, on the README's own train.py."""
    readme = (ROOT / "README.md").read_text()
    (line,) = [line for line in readme.splitlines() if line.startswith("jobkit submit --on slurm")]
    (login.home / "train.py").write_text(readme.partition("```python\n")[2].partition("```")[0])
    login.jobkit(*shlex.split(line)[1:])
    told = json.loads(login.jobkit("status", "runs/big", "--json"))
    assert login.cluster.job(told["job"])["TimeLimit"] == "12:00:00"
    deadline = time.monotonic() + 120
    while told["state"] in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
        told = json.loads(login.jobkit("ls", "--json"))[0]
    assert (told["state"], told["committed_step"]) == ("done", 2000)


@pytest.mark.slow
def test_time_limit_of_a_program_that_does_not_stop(login: Login) -> None:
    """A program that ignores every notice is killed at the time limit, and the run goes on in another job."""
    (login.home / "train.py").write_text(
        "import os, signal, sys, time\n"
        "for number in (signal.SIGTERM, signal.SIGUSR2): signal.signal(number, signal.SIG_IGN)\n"
        "if os.environ['JOBKIT_ATTEMPT'] == '0': time.sleep(600)\n"
    )
    login.jobkit("submit", "--on", "slurm", "--run", "run", "--time", "10", "--", "python", "train.py")
    told = login.until(lambda told: told["attempt"] == 0)
    login.cluster.set_end(told["job"], 1)
    told = login.until(lambda told: told["state"] in ("done", "failed", "cancelled"), 120)
    assert told["state"] == "done", told
    assert [outcome["outcome"] for outcome in login.outcomes()] == ["killed", "done"]


@pytest.mark.slow
def test_a_job_that_nobody_wrote_down(login: Login) -> None:
    """A submit that is killed right after sbatch leaves a job that is known by its comment: seen, cancelled."""
    in_training(login)
    ledger = login.store.file(contract.EVENTS)
    ledger.write_text("".join(line for line in ledger.read_text().splitlines(True) if '"job"' not in line))
    assert login.status()["state"] == "running"
    assert "is alive: job" in login.jobkit("resume", "run", code=2)
    login.jobkit("cancel", "run")
    assert login.status()["state"] == "cancelled"
    login.until_no_job()


@pytest.mark.slow
def test_a_successor_where_requeues_are_held_back(tmp_path: Path, undisturbed: str) -> None:
    """With SLURM's default of 120 s between a requeue and its start, a successor job goes on within seconds."""
    with Cluster(nodes=2, cred_expire_s=120) as cluster:
        login = Login(cluster, tmp_path)
        job = login.submit("-p", "requeue5", pause_s=0.1)
        login.until_step(12)
        begun = time.monotonic()
        preempt(login, job)
        login.until(lambda told: told["attempt"] == 1 and told["phase"] == "stepping", 60)
        assert time.monotonic() - begun < 60
        login.check_end(undisturbed)
        assert login.status()["job"] != job
        login.jobkit("resume", "run")
        told = [event for event in run_status.events(login.store) if event["event"] == "requeued"]
        assert "since a requeue is held back for 2 min 0 s" in told[0]["how"]


@pytest.mark.slow
def test_a_cancelled_job_has_no_successor(tmp_path: Path) -> None:
    """A scancel in the grace, where jobkit submits a successor: that one ends at once and trains nothing."""
    with Cluster(nodes=2, cred_expire_s=120) as cluster:
        login = Login(cluster, tmp_path)
        in_grace(login)
        first = login.status()["job"]
        cluster.run("scancel", first)
        login.until(lambda told: told["state"] == "cancelled", 60)
        login.until_no_job()
        time.sleep(3)
        assert len(login.store.numbers(contract.ATTEMPTS)) == 1
        assert login.status()["state"] == "cancelled"


@pytest.mark.slow
def test_the_hold_after_slurm_s_own_requeue_is_lifted(tmp_path: Path, undisturbed: str) -> None:
    """Preempted without grace where SLURM holds a requeued job back for 120 s: it runs again within seconds."""
    with Cluster(nodes=2, cred_expire_s=120) as cluster:
        login = Login(cluster, tmp_path)
        job = login.submit("-p", "requeue0", pause_s=0.1)
        login.until_step(12)
        begun = time.monotonic()
        preempt(login, job)
        login.until(lambda told: told["attempt"] == 1 and told["phase"] == "stepping", 90)
        assert time.monotonic() - begun < 90
        login.check_end(undisturbed)
        assert login.status()["job"] == job
        assert [outcome["outcome"] for outcome in login.outcomes()] == ["preempted", "done"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["jobkit cancel", "scancel"])
def test_a_lifted_hold_undoes_no_cancel(how: str, tmp_path: Path) -> None:
    """A job cancelled between SLURM's requeue and the end of its hold stays cancelled, and nothing of it is left."""
    with Cluster(nodes=2, cred_expire_s=120) as cluster:
        login = Login(cluster, tmp_path)
        job = login.submit("-p", "requeue0", pause_s=0.3)
        login.until_step(3)
        requeue(login, job)
        cluster.wait(
            lambda: "jobkit-wake" in cluster.run("squeue", "--noheader", "--format=%j"), "the waker is submitted", 30
        )
        if how == "scancel":
            cluster.run("scancel", job)
        else:
            login.jobkit("cancel", "run")
        told = login.until(lambda told: told["state"] not in ("queued", "running", "requeued"), 60)
        assert told["state"] == "cancelled", told
        login.until_no_job()
        assert len(login.store.numbers(contract.ATTEMPTS)) == 1
        assert login.status()["state"] == "cancelled"


@pytest.mark.slow
def test_a_run_in_a_bucket(login: Login, undisturbed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes without a shared disk and a login node with neither: preempted, it goes on elsewhere, bit-equal."""
    (login.home / "train.py").write_text(SCRIPT)
    monkeypatch.setenv("HOME", str(login.home))  # the script lies there
    monkeypatch.setenv(contract.ENV_HOME, str(login.home / "disk-of-login"))
    with GcsServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        url = "gs://bucket/run"
        elsewhere = f"export=ALL,{contract.ENV_HOME}={login.home / 'disk-of-nodes'}"
        options = ("--on", "slurm", "-p", "requeue5", "--run", url, "--sbatch", elsewhere)
        login.jobkit("submit", *options, "--", "python", "train.py", "0.1")

        def status() -> dict[str, Any]:
            told: dict[str, Any] = json.loads(login.jobkit("status", url, "--json"))
            return told

        deadline = time.monotonic() + 120
        while not any("checkpoints/10/commit.json" in name for name in server.names()):
            assert time.monotonic() < deadline, status()
            time.sleep(0.3)
        preempt(login, status()["job"])
        while status()["state"] != "requeued":
            assert time.monotonic() < deadline
            time.sleep(0.3)
        shutil.rmtree(login.home / "disk-of-nodes")  # the next attempt has another node's disk
        while (told := status())["state"] in ("queued", "running", "requeued"):
            assert time.monotonic() < deadline, told
            time.sleep(0.5)
        assert (told["state"], told["attempts"]) == ("done", 2), told
        assert [ending["outcome"] for ending in told["endings"]] == ["preempted", "done"]
        restore.fetch(Store(url), "latest")  # on the login node; the other's disk is emptied
        assert training.digest(Store(url).path) == undisturbed


@pytest.mark.slow
def test_a_job_that_waits_for_its_bucket_until_its_time_is_up(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that is down from a job's start to its time limit: the job has itself requeued."""
    (login.home / "train.py").write_text("print('trained')")
    monkeypatch.setenv("HOME", str(login.home))
    monkeypatch.setenv(contract.ENV_HOME, str(login.home / "disk-of-login"))
    with GcsServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        url = "gs://bucket/waits"
        elsewhere = f"export=ALL,{contract.ENV_HOME}={login.home / 'disk-of-nodes'}"
        options = ("-p", "requeue5", "--run", url, "--sbatch", elsewhere, "--sbatch", "hold")
        login.jobkit("submit", "--on", "slurm", *options, "--", "python", "train.py")
        job = str(json.loads(login.jobkit("status", url, "--json"))["job"])
        server.faults.down = "closed"
        login.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")  # less than a submit would take
        login.cluster.run("scontrol", "release", job)
        shown = ("show", "job", job)
        jobs.until(lambda: "Restarts=1" in login.cluster.run("scontrol", *shown), "it is requeued", seconds=80)
        login.cluster.run("scancel", job)


@pytest.mark.slow
def test_an_srun_that_loses_its_step_is_not_the_end(
    login: Login, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An srun that exits 0 with nothing done, as on a lost node, is not taken for a finished run."""
    another_srun(login, f'[ -e {login.home}/lied ] && exec {{real}} "$@"\ntouch {login.home}/lied\nexit 0', monkeypatch)
    login.submit(pause_s=0.01)
    login.check_end(undisturbed)
    assert (login.home / "lied").exists()
    decisions = [event for event in run_status.events(login.store) if event["event"] == "decision"]
    assert decisions[0]["action"] == "restart"


@pytest.mark.slow
def test_a_cancel_while_srun_makes_its_step(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel that comes when the runner has looked for one, and SLURM has no step to signal yet, is heard."""
    another_srun(login, f'touch {login.home}/starts\nsleep 3\nexec {{real}} "$@"', monkeypatch)
    login.submit(pause_s=0.3)
    jobs.until((login.home / "starts").exists, "srun is started", seconds=60)
    login.jobkit("cancel", "run")
    told = login.until(lambda told: told["state"] not in ("queued", "running", "requeued"), 40)
    assert told["state"] == "cancelled", told
    assert (told["step"] or 0) < 10, "it was only killed when its grace was over"
    login.until_no_job()


def another_srun(login: Login, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program of that text before SLURM's own srun, which it calls {real}."""
    program = login.home / "bin" / "srun"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n" + text.format(real=login.cluster.slurm.programs["srun"]) + "\n")
    program.chmod(0o755)
    monkeypatch.setitem(login.cluster.environment, "PATH", f"{program.parent}:{login.cluster.environment['PATH']}")

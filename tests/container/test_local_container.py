"""Attempts in containers on this machine: `jobkit submit --image IMAGE`, and a drill in one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobkit import contract
from jobkit.contract import State
from jobkit.errors import ConfigError
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from launch.backends import registry
from launch.backends.local import Local
from launch.drill import observe
from launch.lifecycle import lock, orphans, run_status, verbs
from launch.spec import container
from launch.spec.container import Container
from launch.spec.jobspec import JobSpec
from tests.harness.engine import BASE, ROOT, Engine
from tests.harness.jobs import IN_A_CONTAINER, children, until
from tests.training.test_drill import SCRIPTS, drill


def test_words(tmp_path: Path) -> None:
    """Same paths, user and process ids as outside; of variables the names alone, and not what is a machine's own."""
    environ = {"JOBKIT_RUN": "/r", "WANDB_API_KEY": "secret", "PATH": "/bin", "LD_PRELOAD": "x", "BASH_FUNC_f%%": "()"}
    told = Container(image="train:1", runtime="docker", mounts=("/scratch", "/a:/b:ro"))
    words = container.words(
        told, paths=[Path("/r"), Path("/r/code/1")], cwd=Path("/r/code/1"), environ=environ, gpus=True
    )
    assert words[:5] == ["docker", "run", "--rm", "--pid=host", "--network=host"]
    assert words[5:7] == [f"--user={os.getuid()}:{os.getgid()}", "--label=jobkit.run=/r"]
    assert [word for word in words if word.startswith("--volume")] == [
        "--volume=/dev/shm:/dev/shm", "--volume=/r:/r", "--volume=/scratch:/scratch", "--volume=/a:/b:ro",
    ]  # fmt: skip
    names = {word.removeprefix("--env=") for word in words if word.startswith("--env")}
    assert names == {"JOBKIT_RUN", "WANDB_API_KEY", *container.LATER}
    assert not [word for word in words if "secret" in word]
    assert words[-3:] == ["--workdir=/r/code/1", "--entrypoint=", "train:1"]


def test_docker_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon of another machine does not see the run directory: refused, and so is a machine without docker."""
    monkeypatch.setenv("DOCKER_HOST", "ssh://gpu.example")
    with pytest.raises(ConfigError, match=r"this one is on ssh://gpu\.example"):
        container.check_docker()
    monkeypatch.setenv("DOCKER_HOST", "")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="needs docker, and there is none on PATH"):
        container.check_docker()


def test_runtimes_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apptainer is for SLURM, Docker for this machine: what a backend does not know is refused before it writes."""
    monkeypatch.chdir(tmp_path)
    spec = JobSpec(command=("true",), run=str(tmp_path / "r"), container=Container(image="a.sif"))
    with pytest.raises(ConfigError, match="--on local knows the container runtime docker, not apptainer"):
        verbs.submit(Local(), spec)
    assert list(tmp_path.iterdir()) == []


class Submitted:
    """A run in containers, as a user of Docker has it."""

    def __init__(self, place: Path, image: str, how: str) -> None:
        (place / "code").mkdir()
        (place / "code" / "train.py").write_text(IN_A_CONTAINER)
        (place / "code" / "data").mkdir()
        (place / "code" / "data" / "words").write_text("there")
        command = [
            sys.executable,
            "-m",
            "launch",
            "submit",
            "--image",
            image,
            "--grace",
            "4s",
            "--run",
            str(place / "run"),
        ]
        subprocess.run(
            [*command, "--", "python3", "train.py", how],
            cwd=place / "code",
            env=os.environ | {"PYTHONPATH": str(ROOT), "SOME_TOKEN": "s3cr3t"},
            check=True,
        )
        self.store = Store(place / "run")

    @property
    def status(self) -> run_status.Status:
        """What it is doing."""
        return run_status.status(self.store)

    def steps(self) -> dict[str, int]:
        """Wait until it steps; return the process ids of runner, docker's client, supervisor and program."""
        until(lambda: (one := observe.living(self.store, 0)) and one.beat.step > 0, "it steps", seconds=60)
        one = observe.living(self.store, 0)
        assert one is not None
        runner = lock.holder(self.store)["pid"]
        (client,) = children(runner)
        return {"runner": runner, "client": client, "supervisor": one.supervisor, "program": one.beat.pid}

    def ends(self) -> run_status.Status:
        """Wait until it is over and nothing of it is left."""
        until(lambda: self.status.state.over and not orphans.processes_of(self.store), "it is over", seconds=90)
        return self.status


@pytest.fixture
def run(docker: Engine, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Submitted]:
    """Submit a run."""
    made = Submitted(tmp_path, docker.image(), getattr(request, "param", "polite"))
    yield made
    observe.end_now(made.store)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["supervisor", "client"])
def test_a_notice_reaches_the_program(run: Submitted, who: str) -> None:
    """A SIGTERM to the supervisor, or docker's client, is a notice; Python is the image's, data and token are there."""
    pids = run.steps()
    told = Path(f"/proc/{pids['client']}/cmdline").read_text() + run.store.file("run.json").read_text()
    assert "s3cr3t" not in told
    os.kill(pids[who], signal.SIGTERM)
    ended = run.ends()
    assert (ended.state, [one.outcome for one in ended.endings]) == (State.DONE, ["preempted", "done"])
    assert "prefix /opt/jobkit data there token s3cr3t" in run.store.file(contract.log_file(1)).read_text()


@pytest.mark.slow
def test_kills(run: Submitted) -> None:
    """Docker's client killed, the container saves and goes, and the next one starts; never two at a time."""
    pids = run.steps()
    os.kill(pids["client"], signal.SIGKILL)
    ended = run.ends()
    assert (ended.state, [one.outcome for one in ended.endings]) == (State.DONE, ["preempted", "done"])


@pytest.mark.slow
def test_a_supervisor_that_is_killed(run: Submitted) -> None:
    """With the container's first process everything in it goes: killed, and the next one starts."""
    os.kill(run.steps()["supervisor"], signal.SIGKILL)
    ended = run.ends()
    assert (ended.state, [one.outcome for one in ended.endings]) == (State.DONE, ["killed", "done"])


@pytest.mark.slow
@pytest.mark.parametrize("killed", [("runner",), ("runner", "client")])
def test_a_runner_that_is_killed(run: Submitted, killed: tuple[str, ...]) -> None:
    """Without its runner, and docker's client too, the container saves and goes; a resume goes on."""
    pids = run.steps()
    for who in killed:
        os.kill(pids[who], signal.SIGKILL)
    until(lambda: not any(processes.alive(pid) for pid in pids.values()), "all are gone", seconds=30)
    assert run.status.endings[0].outcome == "preempted"
    verbs.resume(Local({"SOME_TOKEN": "again"}), run.store)
    assert run.ends().state is State.DONE


@pytest.mark.slow
def test_a_runner_that_is_killed_before_the_container_is_there(
    docker: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docker's client hears before it has started a container it passes on to nobody: the supervisor looks."""
    image, programs = docker.image(), tmp_path / "bin"
    programs.mkdir()
    slow = f"""#!/bin/sh
    if [ "$1 $3" = "run --pid=host" ]; then
        touch {tmp_path}/asked
        trap '' TERM
        while ! [ -e {tmp_path}/go ]; do sleep 0.05; done
    fi
    exec {docker.program} "$@"
    """
    (programs / "docker").write_text(slow)
    (programs / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    made = Submitted(tmp_path, image, "deaf")
    until((tmp_path / "asked").exists, "docker is asked for a container")
    os.kill(lock.holder(made.store)["pid"], signal.SIGKILL)
    (tmp_path / "go").touch()
    until(lambda: not orphans.processes_of(made.store), "nothing of the run is left", seconds=30)
    assert run_status.status(made.store).step is None


def sleeping() -> int | None:
    """Return the process that sleeps for 61 seconds."""
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")[:2] == [b"sleep", b"61"]:
                return int(name)
    return None


@pytest.mark.slow
def test_attach(run: Submitted) -> None:
    """A command beside the attempt is in its container, with its Python, data and token, and is no part of it."""
    pids = run.steps()
    attach = [sys.executable, "-m", "launch", "attach", run.store.url]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    script = "import os, sys; print(sys.prefix, open('data/words').read(), os.environ['SOME_TOKEN'], os.getcwd())"
    done = subprocess.run([*attach, "--", "python3", "-c", script], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["/opt/jobkit", "there", "s3cr3t", os.readlink(f"/proc/{pids['program']}/cwd")]
    terminal, inside = os.openpty()
    with subprocess.Popen(attach, env=environ, stdin=inside, stdout=inside, stderr=inside):
        os.write(terminal, b"echo it is $((6 * 7)); exec sleep 61\n")
        told = b""
        while b"it is 42" not in told:
            told += os.read(terminal, 4096)
        until(lambda: sleeping() is not None, "the shell is what it was asked to become", seconds=60)
        sleeper = sleeping()
        assert sleeper is not None
        assert sleeper not in orphans.processes_of(run.store)
        os.kill(sleeper, signal.SIGKILL)
    assert run.steps() == pids


@pytest.mark.slow
@pytest.mark.parametrize("run", ["deaf"], indirect=True)
def test_a_cancel_insists(run: Submitted) -> None:
    """A program that ignores the notice is killed when its grace is over, in its container too."""
    pids = run.steps()
    assert registry.cancel(run.store.url) is State.CANCELLED
    assert not any(processes.alive(pid) for pid in pids.values())
    assert run.status.attempt == 0
    assert run.ends().endings[0].outcome == "killed"


@pytest.mark.slow
def test_an_image_that_is_gone(docker: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose image was removed after the submit fails at once, and says where docker's own words are."""
    monkeypatch.setattr(container, "check_image", lambda told: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    told = Container(image="jobkit-test:nobody-built-it", runtime="docker")
    store = verbs.submit(Local(), JobSpec(command=("python3", "train.py"), run=str(tmp_path / "run"), container=told))
    until(lambda: run_status.status(store).state.over, "it is over", seconds=90)
    ended = run_status.status(store)
    assert ended.state is State.FAILED
    assert "docker could not start the container (exit code 125): see " in ended.endings[0].reason
    assert "nobody-built-it" in store.file("runner.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ("jobkit-test:nobody-built-it", [], "there is no image jobkit-test:nobody-built-it here, and docker pull says"),
        (BASE, [], f"the image {BASE} has no jobkit that python3 finds (ModuleNotFoundError: No module named 'jobkit'"),
        ("", ["--mount", "/nowhere/data:/data"], "--mount /nowhere/data:/data: there is no /nowhere/data here"),
    ],
    ids=["not there", "without jobkit", "a mount"],
)
def test_what_cannot_work_in_a_container_is_refused(
    docker: Engine, tmp_path: Path, image: str, options: list[str], message: str
) -> None:
    """An image that is not there or has no jobkit, a mount of nothing: exit code 2 at submit, and nothing is made."""
    ours = docker.image()
    (tmp_path / "train.py").touch()
    words = ["submit", "--run", "run", "--image", image or ours, *options, "--", "python3", "train.py"]
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert os.listdir(tmp_path) == ["train.py"]
    assert not os.path.exists("/nowhere")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_drill_in_a_container(docker: Engine, tmp_path: Path) -> None:
    """A drill whose attempts are in containers: interrupted from outside, lost with their node, woken up again."""
    image = docker.image("train,gcs,report")
    only = [word for name in ("notice", "kill-commit", "node", "zombie-save") for word in ("--only", name)]
    (tmp_path / "sound.py").write_bytes((SCRIPTS / "sound.py").read_bytes())
    where = ["--image", image, "-j", "2", "--run", str(tmp_path / "d"), "--json"]
    done = drill(*where, *only, "--", "python", "sound.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert [each["identical"] for each in told["scenarios"]] == [True] * 4
    assert docker.docker("ps", "--quiet", "--filter", f"volume={tmp_path / 'd'}").stdout == ""

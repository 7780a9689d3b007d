"""A run on SLURM in a container: the words of srun to the letter, and a run that is preempted inside one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobkit.errors import ConfigError
from launch.spec import container
from launch.spec.container import Container
from tests.harness import apptainer
from tests.harness.engine import Engine
from tests.harness.jobs import IN_A_CONTAINER
from tests.harness.login import Login
from tests.harness.slurm import Cluster


def words(told: Container, **more: bool) -> list[str]:
    """Return the words for a run below /shared whose data is elsewhere."""
    paths = [Path("/shared/run"), Path("/shared/run/code/1"), Path("/data")]
    environ = {"JOBKIT_RUN": "/shared/run", "PATH": "/bin", "PYTHONPATH": "/shared/run/code/1"}
    return container.words(told, paths=paths, cwd=Path("/shared/run/code/1"), environ=environ, **more)


def test_an_image_that_is_a_file_is_named_in_full(tmp_path: Path) -> None:
    """A job begins in another directory; a name and a node's own directory are taken as they are, a typo is refused."""
    (tmp_path / "train.sif").touch()

    def full(image: str, runtime: str) -> str:
        return container.in_full(Container(image=image, runtime=runtime), str(tmp_path)).image

    assert full("train.sif", "apptainer") == full("./train.sif", "pyxis") == str(tmp_path / "train.sif")
    for image, runtime in (
        ("docker://team/train:1", "apptainer"),
        ("team/train:1", "pyxis"),
        ("/on/nodes/a.sif", "singularity"),
    ):
        assert full(image, runtime) == image
    for image, runtime in (
        ("tain.sif", "apptainer"),
        (f"{tmp_path}/tain.sif", "singularity"),
        ("images/a.sqsh", "pyxis"),
    ):
        with pytest.raises(ConfigError, match="there is no image"):
            full(image, runtime)


def test_pyxis() -> None:
    """Options of srun's: image, mounts, directory, no entry point, and which variables the image may not overrule."""
    assert words(Container(image="registry#team/train:1", runtime="pyxis", mounts=("/scratch", "/a:/b:ro"))) == [
        "--container-image=registry#team/train:1",
        "--container-mounts=/data:/data,/dev/shm:/dev/shm,/shared/run:/shared/run,/scratch:/scratch,/a:/b:ro",
        "--container-workdir=/shared/run/code/1",
        "--no-container-entrypoint",
        "--container-env=JOBKIT_RUN,PYTHONPATH",
    ]


def test_apptainer() -> None:
    """A program between srun and the supervisor; told of GPUs where the job has some."""
    assert words(Container(image="/images/train.sif"), gpus=True) == [
        "apptainer",
        "exec",
        "--nv",
        "--bind=/data:/data,/dev/shm:/dev/shm,/shared/run:/shared/run",
        "--pwd=/shared/run/code/1",
        "/images/train.sif",
    ]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (Container(image="a b"), "--image 'a b' is no image: give a .sif file, docker://NAME or a name"),
        (Container(image="--nv"), "--image '--nv' is no image: give a .sif file, docker://NAME or a name"),
        (Container(image="a", runtime="podman"), "give docker, apptainer, singularity, pyxis"),
        (Container(image="a", mounts=("data:/data",)), "--mount 'data:/data' is not SOURCE"),
    ],
)
def test_what_cannot_work(told: Container, message: str) -> None:
    """Values that no runtime takes are refused, with the remedy."""
    with pytest.raises(ConfigError) as caught:
        container.check(told)
    assert message in str(caught.value)


def test_a_path_that_cannot_be_mounted() -> None:
    """Mounts are written with colons and commas: a run below such a name is refused before anything is submitted."""
    with pytest.raises(ConfigError, match="cannot be mounted into a container"):
        container.words(Container(image="a"), paths=[Path("/shared/a,b")], cwd=Path("/shared"), environ={})


@pytest.mark.slow
def test_dry_run_shows_the_step(login: Login) -> None:
    """What Pyxis is told stands in the dry run; the command is looked for in no place but the image."""
    (login.home / "train.py").touch()
    (login.home / "jobkit.toml").write_text(
        '[profile.a]\ncontainer-runtime = "pyxis"\nmount = ["/scratch:/scratch:ro"]\n'
    )
    asked = ["--on", "slurm", "--profile", "a", "--run", "run", "--image", "team/train:1", "--dry-run"]
    printed = login.jobkit("submit", *asked, "--", "python3.99", "train.py")
    run = login.home / "run"
    (step,) = [line for line in printed.splitlines() if line.startswith("srun ")]
    code = step.partition("--container-workdir=")[2].split()[0]
    ours = "JOBKIT_ATTEMPT,JOBKIT_GRACE_S,JOBKIT_RUN,JOBKIT_WARNED_S,PYTHONNOUSERSITE,PYTHONPATH,PYTHONUNBUFFERED"
    assert step == (
        f"srun --container-image=team/train:1 --container-mounts=/dev/shm:/dev/shm,{run}:{run},/scratch:/scratch:ro "
        f"--container-workdir={code} --no-container-entrypoint --container-env={ours} "
        f"python3 -P -m jobkit.supervise --cwd {code} -- python3.99 train.py"
    )
    assert code.startswith(f"{run}/code/")
    missing = ["--on", "slurm", "--image", "nope.sif", "--", "python", "train.py"]
    assert f"there is no image {login.home}/nope.sif here" in login.jobkit("submit", *missing, code=2)
    assert "give --image too" in login.jobkit("submit", "--mount", "/a", "--", "python", "train.py", code=2)


@pytest.fixture
def image(
    docker: Engine, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Provide the unpacked image of docker/Dockerfile, and an `apptainer` on PATH that enters it."""
    if os.geteuid() != 0:
        pytest.skip("mounts of one's own take root")
    tmp_path = tmp_path_factory.mktemp("image")  # no part of the project
    root, programs = tmp_path / "image", tmp_path / "bin"
    root.mkdir()
    programs.mkdir()
    made = docker.docker("create", docker.image()).stdout.strip()
    docker.docker("export", "-o", str(tmp_path / "image.tar"), made)
    docker.docker("rm", made)
    subprocess.run(["tar", "-xf", tmp_path / "image.tar", "-C", root], check=True)
    (tmp_path / "image.tar").unlink()
    program = programs / "apptainer"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {apptainer.__file__} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setitem(cluster.environment, "PATH", f"{programs}{os.pathsep}{cluster.environment['PATH']}")
    return root


@pytest.mark.slow
@pytest.mark.timeout(600)  # the image may have to be made first
def test_a_preempted_run_in_a_container_goes_on(login: Login, image: Path) -> None:
    """The notice reaches the program inside, its supervisor's word comes out, and the job is requeued from outside."""
    (login.home / "train.py").write_text(IN_A_CONTAINER)
    (login.home / "data").mkdir()
    (login.home / "data" / "words").write_text("linked")
    options = ["-p", "low", "--image", str(image), "--container-runtime", "apptainer"]
    job = login.submit_command("python", "train.py", options=options)
    login.until(lambda told: told["attempt"] == 0 and (told["step"] or 0) > 5)
    login.cluster.preempt([login.cluster.job(job)["BatchHost"]], seconds=1)
    told = login.until(lambda told: told["state"] in ("done", "failed", "cancelled"))
    assert told["state"] == "done", told
    assert [outcome["outcome"] for outcome in login.outcomes()] == ["preempted", "done"]
    for attempt in range(2):
        log = login.store.file(f"attempts/{attempt}/log-0.txt").read_text()
        assert "scontrol None prefix /opt/jobkit data linked" in log

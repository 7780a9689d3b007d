"""An attempt in a container: the words that start it by Docker on this machine, by Apptainer or Pyxis in a SLURM step.

Only the supervisor and the program are inside. What starts the run again is the runner, outside of it: an image needs
neither scontrol nor a munge socket. The paths inside are those outside, so that what the run directory says of itself
holds in both. /dev/shm is shared, where the runner reads how far the program is; and in Docker the processes have the
numbers that they have outside, so that whoever looks after them need not know of containers.
"""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from jobkit import contract
from jobkit.errors import ConfigError, say

DOCKER, PYXIS = "docker", "pyxis"
RUNTIMES = (DOCKER, "apptainer", "singularity", PYXIS)
_SHARED = "/dev/shm"
_ANSWER_S, _LONG_S = 20.0, 120.0
"""How long the daemon may take to answer, and to start a container."""


class Container(msgspec.Struct, frozen=True, kw_only=True):
    """What the processes of a run are in.

    Args:
        image: Image with python3 and jobkit in it, as the runtime names it: a .sif file, docker://..., a name.
        runtime: 'docker', on this machine; on SLURM 'apptainer', 'singularity', or 'pyxis', a plugin of the cluster's.
        mounts: What is seen inside beside the run directory, the code and its data, as SOURCE[:TARGET[:ro]].
    """

    image: str
    runtime: str = "apptainer"
    mounts: tuple[str, ...] = ()


def check(container: Container) -> None:
    """Refuse values that cannot work.

    Raises:
        ConfigError: With the value and the remedy.
    """
    if container.runtime not in RUNTIMES:
        raise ConfigError(f"the container runtime {container.runtime!r} is not known; give {', '.join(RUNTIMES)}")
    if not re.fullmatch(r"[^\s,-][^\s,]*", container.image):
        raise ConfigError(f"--image {container.image!r} is no image: give a .sif file, docker://NAME or a name")
    for mount in container.mounts:
        if not re.fullmatch(r"/[^:,\s]*(:/[^:,\s]*(:(ro|rw))?)?", mount):
            raise ConfigError(f"--mount {mount!r} is not SOURCE[:TARGET[:ro]] with absolute paths")


def in_full(container: Container, cwd: str) -> Container:
    """Name an image that is a file by its whole path: a job begins elsewhere.

    A directory that is not seen here is taken to be on the nodes.

    Args:
        container: For Apptainer, Singularity or Pyxis.
        cwd: The directory of the submit.

    Raises:
        ConfigError: If there is no such file: a program in it would be blamed for that.
    """
    image = container.image
    is_file = container.runtime != PYXIS or image.startswith((".", "/")) or image.endswith(".sqsh")
    if "://" in image or not is_file:
        return container
    path = Path(cwd, image)
    if not path.exists() and (path.parent.is_dir() or not os.path.isabs(image)):
        registry = "REGISTRY#NAME" if container.runtime == PYXIS else "docker://NAME"
        raise ConfigError(f"there is no image {path} here: give the path of one, or {registry}")
    return msgspec.structs.replace(container, image=str(path))


def check_image(container: Container) -> None:
    """See whether Docker has an image, or gets it, with a jobkit in it, and what is to be mounted.

    Raises:
        ConfigError: If not; a program in it would be blamed for that.
    """
    for mount in container.mounts:
        source = mount.split(":")[0]
        if not os.path.exists(source):  # Docker would make it, a directory of root's
            raise ConfigError(f"--mount {mount}: there is no {source} here; make it, or name what is there")
    if _run_docker("image", "inspect", "--format", "{{.Id}}", container.image).returncode:
        say(f"image {container.image} is not here yet: docker pull ...")
        done = _run_docker("pull", "--quiet", container.image, timeout_s=None)
        if done.returncode:
            raise ConfigError(f"there is no image {container.image} here, and docker pull says: {_last(done.stderr)}")
    probe = [f"--user={os.getuid()}:{os.getgid()}", "--entrypoint=", container.image]
    done = _run_docker(
        "run", "--rm", "--network=none", *probe, "python3", "-P", "-c", "import jobkit.supervise.supervisor"
    )
    if done.returncode:
        raise ConfigError(
            f"the image {container.image} has no jobkit that python3 finds ({_last(done.stderr)}): install the "
            "checkout in it, as docker/Dockerfile does"
        )


def _run_docker(*words: str, timeout_s: float | None = _LONG_S) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            [DOCKER, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"docker has not answered within {timeout_s:.0f} s: see 'docker info'") from None


def _last(said: str) -> str:
    return (said.strip().splitlines() or [""])[-1][:300]


def remove(url: str) -> None:
    """Remove the containers of a run that has no attempt just now, started or not; at best, for Docker may be down."""
    listed = ("ps", "--all", "--quiet", "--no-trunc", "--filter", f"label={_LABEL}={url}")
    with contextlib.suppress(OSError, ConfigError):
        if ids := _run_docker(*listed, timeout_s=_ANSWER_S).stdout.split():
            _run_docker("rm", "--force", *ids, timeout_s=_ANSWER_S)


def beside(url: str, command: Sequence[str]) -> list[str]:
    """Return the words that run a command in the container of a run's live attempt.

    Raises:
        ConfigError: If there is none.
    """
    found = _run_docker("ps", "--quiet", "--no-trunc", "--filter", f"label={_LABEL}={url}").stdout.split()
    if not found:
        raise ConfigError(f"no container of {url} runs just now: 'jobkit status {url}'")
    # Whoever looks for what is left of an attempt must not take a person's shell for a part of it.
    own = [word for name in contract.OF_ATTEMPT for word in ("-u", name)]
    tty = ["--tty"] if sys.stdin.isatty() else []
    return [DOCKER, "exec", "--interactive", *tty, found[0], "env", *own, *command]


def refuse_foreign(container: Container, backend: str, known: Sequence[str]) -> None:
    """Raise ConfigError if a backend does not know a runtime."""
    if container.runtime not in known:
        raise ConfigError(f"--on {backend} knows the container runtime {', '.join(known)}, not {container.runtime}")


def check_docker() -> None:
    """See whether Docker can run attempts here.

    Raises:
        ConfigError: If it does not answer, runs elsewhere, or as another user.
    """
    host = os.environ.get("DOCKER_HOST", "")
    if not sys.platform.startswith("linux") or (not host.startswith(("unix://", "/")) and host):
        where = host or sys.platform
        raise ConfigError(f"--image needs a docker daemon of this very machine, on Linux; this one is on {where}")
    if shutil.which(DOCKER) is None:
        raise ConfigError("--image needs docker, and there is none on PATH: install it, or leave --image out")
    done = _run_docker("info", "--format", "{{json .SecurityOptions}}", timeout_s=_ANSWER_S)
    if done.returncode:
        raise ConfigError(f"docker does not answer: {_last(done.stderr) or 'see docker info'}")
    options = json.loads(done.stdout or "null") or []
    if foreign := [name for name in ("rootless", "userns") if any(f"name={name}" in option for option in options)]:
        raise ConfigError(
            f"this docker daemon gives the users of containers other numbers ({foreign[0]}), and then they could not "
            "write to your run directory: use a daemon of root's, or leave --image out"
        )


def words(
    container: Container, *, paths: Iterable[Path], cwd: Path, environ: Mapping[str, str], gpus: bool = False
) -> list[str]:
    """Return what stands between what starts an attempt, srun on SLURM, and the command in the container.

    Args:
        container: The container.
        paths: Directories that the processes need: the run, the code, its data.
        cwd: Where the command runs.
        environ: The environment of the attempt: the image may not overrule what is ours in it.
        gpus: Whether there are GPUs to hand in: Pyxis sees it by itself.

    Raises:
        ConfigError: If a path cannot be written as a mount.
    """
    binds, mounted = _binds([*paths, Path(_SHARED)]), [_with_target(mount) for mount in container.mounts]
    volumes = [*binds, *mounted]
    if container.runtime == DOCKER:  # takes no place twice; what was asked for wins
        taken = {mount.split(":")[1] for mount in mounted}
        volumes = [*(bind for bind in binds if bind.split(":")[1] not in taken), *mounted]
        return _docker(container, volumes, cwd=cwd, environ=environ, gpus=gpus)
    mounts = ",".join(volumes)
    if container.runtime == PYXIS:
        # Our image's entry point is the supervisor; the step brings it along itself.
        options = [f"--container-image={container.image}", f"--container-mounts={mounts}"]
        options += [f"--container-workdir={cwd}", "--no-container-entrypoint"]
        return [*options, f"--container-env={','.join(sorted(ours(environ)))}"]
    nvidia = ["--nv"] if gpus else []
    return [container.runtime, "exec", *nvidia, f"--bind={mounts}", f"--pwd={cwd}", container.image]


def _docker(
    container: Container, volumes: Iterable[str], *, cwd: Path, environ: Mapping[str, str], gpus: bool
) -> list[str]:
    stop_s = math.ceil(float(environ.get(contract.ENV_GRACE) or 30)) + 5
    # Values of variables are in the client's environment, not on its command line, where everybody could read them.
    names = sorted({name for name in environ if _NAME.fullmatch(name) and not _ITS_OWN.fullmatch(name)} | {*LATER})
    return [
        *(DOCKER, "run", "--rm", "--pid=host", "--network=host", f"--user={os.getuid()}:{os.getgid()}"),
        f"--label={_LABEL}={environ.get(contract.ENV_RUN, '')}",
        *(f"--group-add={number}" for number in sorted(os.getgroups())),
        *(f"--stop-timeout={stop_s}", "--log-driver=none"),  # the attempt's log has what it prints
        *(["--gpus=all"] if gpus else []),
        *(f"--volume={volume}" for volume in volumes),
        *(f"--env={name}" for name in names),
        *(f"--workdir={cwd}", "--entrypoint=", container.image),  # ours is the supervisor, which comes along
    ]


def command(supervise: Sequence[str]) -> list[str]:
    """Return a supervisor's command with the image's own Python instead of this one."""
    return ["python3", *supervise[1:]]


ENVIRONMENT = {"PYTHONNOUSERSITE": "1"}
"""What is set for a container beside what the step has: packages below a home belong to another Python."""


def ours(environ: Mapping[str, str]) -> list[str]:
    """Name the variables that are ours, whatever the image sets."""
    return [name for name in environ if name.startswith("JOBKIT_") or name in _PYTHON]


LATER = tuple(variable.name for variable in contract.VARIABLES if variable.crosses)
"""Variables of ours that an attempt may have, though they are not known yet when its words are made."""
_LABEL = "jobkit.run"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ITS_OWN = re.compile(
    "PATH|HOME|USER|LOGNAME|SHELL|PWD|OLDPWD|SHLVL|_|MAIL|TMPDIR|HOSTNAME|LD_.*|XDG_.*|VIRTUAL_ENV|CONDA_.*|PYTHONHOME"
    "|DOCKER_.*|DISPLAY|DBUS_.*|SSH_.*|SSL_CERT_.*|.*_CA_(BUNDLE|CERTS?)|GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"
    "|NVIDIA_(VISIBLE_DEVICES|DRIVER_.*)|CUDA_(HOME|PATH)"
)
"""What says where things are on a machine, and is the image's to say."""
_PYTHON = ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONNOUSERSITE")


def _binds(paths: Sequence[Path]) -> list[str]:
    """Write directories as mounts, without those that lie below others."""
    roots: list[Path] = []
    for path in sorted(set(paths)):
        if re.search(r"[:,\s]", str(path)):
            raise ConfigError(f"{path} cannot be mounted into a container: it has a colon, a comma or a space in it")
        if not any(path.is_relative_to(above) for above in roots):
            roots.append(path)
    return [f"{path}:{path}" for path in roots]


def _with_target(mount: str) -> str:
    return mount if ":" in mount else f"{mount}:{mount}"

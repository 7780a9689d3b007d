"""A SLURM step in a container: the words of srun, by Apptainer or Pyxis.

Only the supervisor and the program are inside. What requeues the run is the runner, in the batch script outside of it:
an image needs neither scontrol nor a munge socket. The paths inside are those outside, so that what the run directory
says of itself holds in both. /dev/shm is shared, where the runner reads how far the program is.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from jobkit.errors import ConfigError

RUNTIMES = ("apptainer", "singularity", "pyxis")
_SHARED = "/dev/shm"


class Container(msgspec.Struct, frozen=True, kw_only=True):
    """What the processes of a run are in.

    Args:
        image: Image with python3 and jobkit in it, as the runtime names it: a .sif file, docker://..., a name.
        runtime: 'apptainer', 'singularity', or 'pyxis', which is a plugin of the cluster's.
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


def words(
    container: Container, *, paths: Iterable[Path], cwd: Path, environ: Mapping[str, str], gpus: bool = False
) -> list[str]:
    """Return what stands between srun's own options and the command in the container.

    Args:
        container: The container.
        paths: Directories that the processes need: the run, the code, its data.
        cwd: Where the command runs.
        environ: The environment of the step: the image may not overrule what is ours in it.
        gpus: Whether the job has GPUs: Apptainer has to be told, Pyxis sees it.

    Raises:
        ConfigError: If a path cannot be written as a mount.
    """
    mounts = ",".join([*_binds([*paths, Path(_SHARED)]), *map(_with_target, container.mounts)])
    if container.runtime == "pyxis":
        # Our image's entry point is the supervisor; the step brings it along itself.
        options = [f"--container-image={container.image}", f"--container-mounts={mounts}"]
        options += [f"--container-workdir={cwd}", "--no-container-entrypoint"]
        return [*options, f"--container-env={','.join(sorted(ours(environ)))}"]
    nvidia = ["--nv"] if gpus else []
    return [container.runtime, "exec", *nvidia, f"--bind={mounts}", f"--pwd={cwd}", container.image]


def command(supervise: Sequence[str]) -> list[str]:
    """Return a supervisor's command with the image's own Python instead of this one."""
    return ["python3", *supervise[1:]]


ENVIRONMENT = {"PYTHONNOUSERSITE": "1"}
"""What is set for a container beside what the step has: packages below a home belong to another Python."""


def ours(environ: Mapping[str, str]) -> list[str]:
    """Name the variables that are ours, whatever the image sets."""
    return [name for name in environ if name.startswith("JOBKIT_") or name in _PYTHON]


_PYTHON = ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONNOUSERSITE")


def _binds(paths: Sequence[Path]) -> list[str]:
    """Write directories as mounts, without those that lie below others."""
    found: list[Path] = []
    for path in sorted(set(paths)):
        if re.search(r"[:,\s]", str(path)):
            raise ConfigError(f"{path} cannot be mounted into a container: it has a colon, a comma or a space in it")
        if not any(path.is_relative_to(above) for above in found):
            found.append(path)
    return [f"{path}:{path}" for path in found]


def _with_target(mount: str) -> str:
    return mount if ":" in mount else f"{mount}:{mount}"

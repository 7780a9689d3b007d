"""The command of a job: whether it can be run at all, and how it reads inside the unpacked snapshot."""

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from jobkit import contract
from jobkit.errors import ConfigError
from jobkit.rundir.store import Store
from launch.spec import container
from launch.spec import jobspec as specs
from launch.spec.jobspec import JobSpec

_PYTHON = re.compile(r"python(\d+(\.\d+)?)?")
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
"""Python's own options that take the next word as their value."""


def search_path(environ: Mapping[str, str]) -> str:
    """Return PATH with this Python's directory first, so that `python` means this environment's."""
    return os.pathsep.join([os.path.dirname(sys.executable), environ.get("PATH", os.defpath)])


def script_index(command: Sequence[str]) -> int | None:
    """Return which word of a command names a Python script, None if none does (`-m`, `-c`, another program)."""
    if not _PYTHON.fullmatch(os.path.basename(command[0])):
        return None
    index = 1
    while index < len(command):
        word = command[index]
        if word in _WITH_VALUE:
            index += 2
        elif word == "-" or re.match(r"-[A-Za-z]*[mc]", word):
            return None
        elif word.startswith("-"):
            index += 1
        else:
            return index
    return None


def check_command(command: Sequence[str], cwd: Path, environ: Mapping[str, str]) -> None:
    """Refuse a command that cannot start.

    Raises:
        ConfigError: If the program or the script does not exist.
    """
    program = command[0]
    executable = shutil.which(str(cwd / program) if os.sep in program else program, path=search_path(environ))
    if executable is None and os.sep in program:
        why = "is not executable: chmod +x it" if (cwd / program).is_file() else f"does not exist (from {cwd})"
        raise ConfigError(f"the command {program!r} {why}")
    if executable is None:
        hint = f"; for a script write: python {program}" if (cwd / program).is_file() else "; check its spelling"
        raise ConfigError(f"the command {program!r} does not exist on PATH{hint}")
    index = script_index(command)
    if index is not None and not (cwd / command[index]).exists():
        raise ConfigError(f"the script {command[index]!r} does not exist in {cwd}; check its spelling or change there")


def check_script(command: Sequence[str], cwd: Path, *, in_snapshot: bool) -> None:
    """Refuse a script that is not there, where the program itself is another machine's.

    Raises:
        ConfigError: If the script does not exist, though it should be in the snapshot.
    """
    index = script_index(command)
    if not in_snapshot or index is None or Path(command[index]).is_absolute():
        return
    if not (cwd / command[index]).exists():
        raise ConfigError(f"the script {command[index]!r} does not exist in {cwd}; check its spelling")


def check_code(url: str, spec: JobSpec) -> None:
    """Refuse a run that has neither a snapshot of its code nor the directory that it runs in.

    Raises:
        ConfigError: With the directory.
    """
    if spec.code is None and not os.path.isdir(spec.root):
        raise ConfigError(f"{spec.root} does not exist here, and run {url} has no snapshot of its code")


def with_setup(store: Store, spec: JobSpec, lines: Sequence[str] | None) -> JobSpec:
    """Give a run that goes on the lines of `--setup`, which its directory does not have.

    Args:
        store: The run.
        spec: What was submitted.
        lines: What a person has given now; None for nothing.

    Raises:
        ConfigError: If it had some, and was given none now.
    """
    if lines:
        return msgspec.structs.replace(spec, setup=tuple(lines))
    if spec.setup_digest:
        raise ConfigError(
            f"{store.url} was submitted with lines of --setup, which are never taken from a run directory: give them "
            "again (--setup LINE, or `setup` in [profile.default] of jobkit.toml), or --no-setup to go on without"
        )
    return spec


def command_in(spec: JobSpec, top: Path) -> list[str]:
    """Return the command with the program and script that were named by absolute path taken from the snapshot.

    Args:
        spec: What was submitted.
        top: The unpacked tree, or the working tree itself where there is no snapshot.
    """
    words = list(spec.command)
    for index in {0, script_index(words)} - {None}:
        assert index is not None
        path = Path(words[index])
        if path.is_absolute() and path.is_relative_to(spec.root):
            copy = top / path.relative_to(spec.root)
            if copy.exists() and not copy.is_dir():
                words[index] = str(copy)
    return words


def in_container(store: Store, spec: JobSpec, *, cwd: Path, environ: Mapping[str, str]) -> list[str]:
    """Return the words that put a supervisor of a run into its container: on SLURM, srun gets them behind its options.

    Args:
        store: The run.
        spec: What was submitted; with a container.
        cwd: Where the command runs.
        environ: The environment of the attempt.

    Raises:
        ConfigError: If a path cannot be written as a mount.
    """
    assert spec.container is not None
    # Data is linked into the unpacked code: what is there has to be visible too.
    data = [Path(os.path.realpath(Path(spec.root) / name)) for name in spec.links]
    # A home's directory has to be its owner's, in the container too; Docker would make it root's.
    docker = spec.container.runtime == container.DOCKER
    own = store.path.parent if docker and store.remote is not None else store.path
    paths = [own, cwd, *data, *([Path(spec.root)] if spec.code is None else [])]
    paths += [specs.code_store(store, spec).path] if spec.sweep_url else []  # its points share the code that is there
    asked = any(name.startswith(("gpus", "gres")) for name in spec.sbatch)
    # Docker hands in GPUs only where NVIDIA's toolkit is, and does not start at all where it is not.
    there = os.path.exists(_GPU) and shutil.which("nvidia-container-cli") is not None
    gpus = there if docker else asked
    return container.words(spec.container, paths=paths, cwd=cwd, environ=environ, gpus=gpus)


def shown_in_container(store: Store, spec: JobSpec) -> list[str]:
    """Return the words of an attempt in a container, but for srun's own options, which depend on the job's nodes."""
    top = store.file(f"{contract.CODE}/{spec.code}") if spec.code is not None else Path(spec.root)
    cwd = top / os.path.relpath(spec.cwd, spec.root)
    environ = dict.fromkeys((*_OF_ATTEMPT, *container.ENVIRONMENT), "")
    words = in_container(store, spec, cwd=cwd, environ=environ)
    supervise = ["python3", "-P", "-m", "jobkit.supervise", "--cwd", str(cwd), "--", *spec.command]
    docker = spec.container is not None and spec.container.runtime == container.DOCKER
    return [*([] if docker else ["srun"]), *words, *supervise]


_GPU = "/dev/nvidiactl"
_OF_ATTEMPT = (
    contract.ENV_RUN,
    contract.ENV_ATTEMPT,
    contract.ENV_GRACE,
    contract.ENV_WARNED,
    "PYTHONPATH",
    "PYTHONUNBUFFERED",
)
"""What the environment of an attempt has for a supervisor."""


def environment(store: Store, environ: dict[str, str], *, path: str) -> dict[str, str]:
    """Return the environment of a supervisor.

    Args:
        store: The run.
        environ: The runner's own.
        path: PYTHONPATH.
    """
    ours = {"PATH": search_path(environ), contract.ENV_RUN: store.url}
    # Lines printed before a SIGKILL must be in the log.
    return {"PYTHONUNBUFFERED": "1"} | environ | ours | ({"PYTHONPATH": path} if path else {})

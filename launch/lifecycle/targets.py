"""Who is told what becomes of a run: named in run.json, never written there.

The address of a webhook is often the secret itself, and so are words of a command. So a target of `--notify` is

    env:NAME     the variable NAME holds an address or a command
    file:PATH    the file holds it; it is read when there is something to tell, and is part of no snapshot

where an address is https://host/path, and anything else is a command, run without a shell.
"""

import os
import re
import shlex
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from jobkit.errors import ConfigError
from launch.lifecycle import webhook

_FORMS = "write env:NAME, a variable that holds it, or file:PATH, a file that does"
_IN_A_CLOUD = "keep it with the cloud's secret manager, and give --secret NAME=SECRET and --notify env:NAME"


def check(targets: Sequence[str], *, cwd: Path, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Refuse targets that cannot work, for a runner that sees the files and variables of this process.

    Args:
        targets: What `--notify` was given.
        cwd: Where relative paths begin, and where commands will run.
        environ: The variables that the runner will have.

    Returns:
        The same with absolute paths.

    Raises:
        ConfigError: With the remedy; nothing that may be a secret is in it.
    """
    resolved = []
    for target in targets:
        kind, name = _named(target)
        if kind == "file":
            target = f"file:{os.path.abspath(cwd / Path(name).expanduser())}"
        elif name not in environ:
            raise ConfigError(f"--notify {target}: {name} is not set where the run will be; set it first")
        try:
            _check_content(read(target, environ), cwd)
        except ConfigError as error:
            raise ConfigError(f"--notify {target}: {error}") from None
        resolved.append(target)
    return tuple(resolved)


def check_elsewhere(targets: Sequence[str], *, plain: Collection[str], secrets: Collection[str]) -> None:
    """Refuse targets that cannot work, or would be written down, for a runner in a cloud.

    Args:
        targets: What `--notify` was given.
        plain: Names of variables whose values are in run.json.
        secrets: Names of variables that the service gets from its secret manager.

    Raises:
        ConfigError: With the remedy.
    """
    for target in targets:
        kind, name = _named(target)
        if kind == "file":
            raise ConfigError(f"--notify {target}: no file of this machine is there; {_IN_A_CLOUD}")
        if name in plain:
            raise ConfigError(f"--notify {target}: run.json would show what is in --env {name}; {_IN_A_CLOUD}")
        if name not in secrets:
            raise ConfigError(f"--notify {target}: {name} is not set where the run will be; {_IN_A_CLOUD}")


def files(targets: Sequence[str]) -> list[Path]:
    """List the files that targets are in."""
    return [Path(target.removeprefix("file:")) for target in targets if target.startswith("file:")]


def read(target: str, environ: Mapping[str, str]) -> str:
    """Return the address or the command that a target stands for.

    Raises:
        ConfigError: If there is none.
    """
    kind, name = _named(target)
    where = f"the variable {name}" if kind == "env" else f"the file {name}"
    try:
        content = environ.get(name, "") if kind == "env" else Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read ({getattr(error, 'strerror', None) or 'no text'})") from None
    if not content.strip():
        raise ConfigError(f"{where} holds neither an address nor a command where the run's jobs are started")
    return content.strip()


def is_address(content: str) -> bool:
    """Tell an address from a command."""
    return re.match("https?://", content, re.IGNORECASE) is not None


def words(command: str) -> list[str]:
    """Return the words of a command, none if there are none."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


def _named(target: str) -> tuple[str, str]:
    kind, _, name = target.partition(":")
    if kind == "env" and not name.isidentifier():
        raise ConfigError(f"--notify {target!r} names no variable; write env:NAME")
    if kind == "file" and not name.strip():
        raise ConfigError(f"--notify {target!r} names no file; write file:PATH")
    if kind not in ("env", "file"):
        raise ConfigError(f"an address or a command of --notify may be a secret, and run.json would show it: {_FORMS}")
    return kind, name


def _check_content(content: str, cwd: Path) -> None:
    if is_address(content):
        webhook.check(content)
        return
    program = (words(content) or [""])[0]
    if shutil.which(cwd / program if os.sep in program else program) is None:
        raise ConfigError(
            "it holds neither an address (https://host/path) nor a command whose program is here; check its spelling"
        )

"""Which versions are here: of jobkit, of Python, and of what a run needs; and which format a run's files have.

The floors are pyproject's own, as the installed distribution declares them: what CI tests is what is asked for here. A
package below its floor is refused by name, before a save fails over an argument that it does not know.
"""

import platform
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, requires

import msgspec

import jobkit
from jobkit import contract
from jobkit.errors import ConfigError

DISTRIBUTION = "jobkit-jax"
TRAINING = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
"""What a training stands on."""


@cache
def found() -> dict[str, str]:
    """Return the versions that a checkpoint and an attempt's ledger record, by package."""
    known = {"python": platform.python_version(), "jobkit": jobkit.__version__}
    for package in TRAINING:
        with suppress(PackageNotFoundError):
            known[package] = version(package)
    return known


def version(package: str) -> str:
    """Return the version of an installed package; `importlib.metadata.version` reads through its whole README for it.

    Raises:
        PackageNotFoundError: If it is not installed.
    """
    there = distribution(package)
    said = re.search(r"^Version: *(\S+)", there.read_text("METADATA") or "", re.MULTILINE)
    return said[1] if said is not None else there.version


def check(packages: Iterable[str] = TRAINING) -> None:
    """Refuse installed packages that are older than what jobkit is tested with.

    Args:
        packages: Their distributions' names; what is not installed is no fault here.

    Raises:
        ConfigError: With the versions that are here, those that are needed, and what to install.
    """
    wanted = floors()
    old = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            if package in wanted and _release(version(package)) < _release(wanted[package]):
                old[package] = version(package)
    if old:
        here = ", ".join(f"{package} {there}" for package, there in old.items())
        mend = " ".join(f"'{package}>={wanted[package]}'" for package in old)
        raise ConfigError(f"{here} is too old for jobkit, which would fail to save: pip install {mend}")


def floors() -> dict[str, str]:
    """Return the lowest version of each package that jobkit declares; empty where it is no installed distribution."""
    try:
        declared = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return {}
    pairs = (re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*>=\s*([\w.]+)", line) for line in declared)
    return {pair[1].lower(): pair[2] for pair in pairs if pair is not None}


class _Header(msgspec.Struct, frozen=True):
    """The part of run.json that every version has."""

    version: int
    jobkit: str = ""
    removing: bool = False
    """Whether the run is being removed: nothing else stands in the file then."""


def check_run(content: bytes, where: object) -> None:
    """Refuse a run that a newer jobkit began, or that is being removed, by its run.json.

    Args:
        content: The file's.
        where: Its place, for messages.

    Raises:
        ConfigError: With both versions.
        ValueError: If it is damaged.
    """
    try:
        header = msgspec.json.decode(content, type=_Header)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if header.removing:
        raise ConfigError(f"{where} says that this run is being removed: repeat 'jobkit rm' of it to remove the rest")
    check_format(header.version, where, writer=header.jobkit)


def is_removing(content: bytes) -> bool:
    """Tell whether a run.json says that the run is being removed."""
    try:
        return msgspec.json.decode(content, type=_Header).removing
    except (ValueError, RecursionError):
        return False


def check_format(version: int, where: object, *, writer: str = "") -> None:
    """Refuse a file of a newer format.

    Args:
        version: Its format.
        where: Its place, for messages.
        writer: The version of the jobkit that wrote it, as far as is known.

    Raises:
        ConfigError: With both versions.
    """
    if version > contract.RUN_VERSION:
        raise ConfigError(
            f"{where} has format {version}, written by {f'jobkit {writer}' if writer else 'a newer jobkit'}; this is "
            f"jobkit {jobkit.__version__}, which reads up to format {contract.RUN_VERSION}: upgrade jobkit here"
            + (f" to {writer} or newer" if writer else "")
        )


def _release(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version; what follows them (rc1, .post1, +cuda12) orders nothing here."""
    numbers = [int(part) for part in re.match(r"[\d.]*", text)[0].strip(".").split(".") if part]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)

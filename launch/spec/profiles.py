"""What a person asks for before it is checked: the options of a profile in jobkit.toml, and where a run is to run."""

import dataclasses
import json
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jobkit.errors import ConfigError
from launch.spec.cloud_options import OPTIONS, Cloud
from launch.spec.container import Container
from launch.spec.jobspec import JobSpec


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a run runs, and on what.

    Args:
        backend: Its name.
        sbatch, container, price_per_hour, max_time_s, max_cost: As in `JobSpec`.
        cloud: The fields of `Cloud` that were given; None where there is no managed service.
    """

    backend: str
    sbatch: dict[str, str]
    cloud: dict[str, Any] | None
    container: Container | None
    price_per_hour: float | None
    max_time_s: float | None = None
    max_cost: float | None = None


SBATCH = (
    "partition", "account", "qos", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time",
    "constraint",
)  # fmt: skip
"""Options of sbatch that are options of `jobkit submit` too."""


def refuse_foreign(spec: JobSpec, backend: str, known: Collection[str]) -> None:
    """Refuse a specification with an option that its backend would not look at.

    Args:
        spec: The specification.
        backend: Name of its backend.
        known: See `Backend.options`.

    Raises:
        ConfigError: With the option.
    """
    for option in _asked(spec):
        if option not in known:
            raise ConfigError(f"--{option} means nothing to --on {backend}: leave it out")


def _asked(spec: JobSpec) -> Iterator[str]:
    """Name the options of `Backend.options` that a specification has."""
    yield from (name if name in SBATCH else "sbatch" for name in spec.sbatch)
    if spec.container is not None:
        yield "container-runtime"
    cloud, default = spec.cloud or Cloud(), Cloud()
    for name, option in OPTIONS.items():
        field = option.field or name.replace("-", "_")
        if name != "image" and getattr(cloud, field) != getattr(default, field):
            yield name


_OPTIONS: dict[str, Any] = (
    {
        "name": str,
        "run": str,
        "on": str,
        "grace": (str, int, float),
        "max-failures": int,
        "stall": (str, int, float),
        "snapshot": bool,
        "shared": bool,
        "notify": list,
        "sbatch": dict,
        "array-parallelism": int,
        "price-per-hour": (int, float),
        "max-time": (str, int, float),
        "max-cost": (int, float),
        "container-runtime": str,
        "mount": list,
        "setup": list,
    }
    | {name: option.kinds for name, option in OPTIONS.items()}
    | dict.fromkeys(SBATCH, (str, int))
)
"""Options that a profile may set, and their types in TOML."""


def read_profile(name: str, *, cwd: Path, home: Path) -> dict[str, Any]:
    """Read the options of one profile; the project's file comes before the user's.

    Raises:
        ConfigError: If no file has the profile, or it has an unknown option or a value of a wrong type.
    """
    known: list[str] = []
    files = [cwd / "jobkit.toml", home / ".config" / "jobkit" / "jobkit.toml"]
    for path in files:
        profiles = _profiles(path)
        if name in profiles:
            return _checked(profiles[name], f"profile {name!r} in {path}")
        known += [other for other in profiles if other not in known]
    have = f"known are: {', '.join(sorted(known))}" if known else "there are none"
    where = " or ".join(str(path) for path in files)
    raise ConfigError(f"no profile {name!r}; {have}. Write a table [profile.{name}] into {where}")


DEFAULT = "default"
"""The profile that applies by itself."""
_ANYWHERE = frozenset({
    "name", "run", "grace", "max-failures", "stall", "snapshot", "shared", "notify", "array-parallelism", "image",
    "max-time", "max-cost",
})  # fmt: skip
"""Options that mean the same on every backend."""


def options_of(profile: str | None, *, on: str | None, cwd: Path, home: Path) -> dict[str, Any]:
    """Return the options that apply where the command line says nothing: a profile's, above those of `default`.

    Where the run goes to another backend than `default` names, what `default` says of its own backend is left out.

    Args:
        profile: Its name; None for `default` alone, if a file has it.
        on: The backend that the command line names.
        cwd, home: As in `read_profile`.

    Raises:
        ConfigError: As `read_profile`.
    """
    files = (cwd / "jobkit.toml", home / ".config" / "jobkit" / "jobkit.toml")
    default = read_profile(DEFAULT, cwd=cwd, home=home) if any(DEFAULT in _profiles(path) for path in files) else {}
    above = read_profile(profile, cwd=cwd, home=home) if profile is not None else {}
    backend = on or above.get("on") or default.get("on", "local")
    if backend != default.get("on", "local"):
        default = {name: value for name, value in default.items() if name in _ANYWHERE}
    tables = {
        name: default[name] | above[name] for name in default if isinstance(default[name], dict) and name in above
    }
    return default | above | tables


def _profiles(path: Path) -> Mapping[str, Any]:
    try:
        profiles = tomllib.loads(path.read_text(encoding="utf-8")).get("profile", {})
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}; mend it, or leave --profile out") from None
    if not isinstance(profiles, dict):
        raise ConfigError(f"'profile' in {path} is not a table; write [profile.NAME]")
    return profiles


_KINDS = {
    str: "text",
    bool: "true or false",
    dict: "a table",
    list: "a list",
    (str, int): "text or a number",
    (str, list): "text or a list",
}


def _checked(options: Any, where: str) -> dict[str, Any]:
    if not isinstance(options, dict):
        raise ConfigError(f"{where} is not a table; write [profile.NAME]")
    checked = {}
    for option, value in options.items():
        name = option.replace("_", "-")
        if name not in _OPTIONS:
            raise ConfigError(f"{where} has an unknown option {option!r}; valid are {', '.join(_OPTIONS)}")
        wanted = _OPTIONS[name]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            kind = _KINDS.get(wanted, "a number")
            raise ConfigError(f"{where}: {option} is {json.dumps(value, default=str)}; it must be {kind}")
        checked[name] = value
    return checked

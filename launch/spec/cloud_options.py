"""What a run asks of a managed batch service: one struct in run.json, made of options, checked before anything is sent.

No value of a secret is ever in it: secrets are named, and the service fetches them inside the VM.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from jobkit.errors import ConfigError
from jobkit.units import duration_s, parse_limit, show_duration, size_bytes

STOP_S = 25.0
"""From SIGTERM to SIGKILL in the container: a spot VM of Google has about 30 s, of which docker needs some."""
RETRIED = (50001, 50002, 50006, 125, 137, 143, 75)
"""Exit codes after which a task of Google Batch is started again: preempted, reporting timeout, VM recreated (its own:
"Troubleshooting" in its documentation); docker's client lost its daemon; SIGKILL, SIGTERM of the container; ours."""
_SECRETIVE = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OURS = re.compile(r"JOBKIT_|BATCH_|AWS_BATCH_")


class Cloud(msgspec.Struct, frozen=True, kw_only=True):
    """Where and on what a managed service runs a job.

    Args:
        image: Container image; it has jobkit installed.
        project: Google Cloud project; empty for the credentials' own.
        region: Of the service.
        zones: Of the region; empty for all.
        machine_type: Empty for one that suits the GPUs.
        gpus: TYPE:COUNT, such as L4:1; empty for none.
        spot: Whether on spot capacity.
        max_restarts: How often a lost or preempted VM is replaced, over all jobs of the run since its submit or resume;
            None for no limit.
        time_s: How long the run may train until it saves and stops, in seconds; None for no limit.
        env: Environment variables of the program: no secrets.
        secrets: Environment variable -> name of a secret that the service puts there.
        labels: For the bill.
        service_account: That the VM acts as; on AWS the job's role.
        network, subnetwork: Empty for the default ones.
        boot_disk_gb: Size of the boot disk, None for the default.
        queue: AWS: the job queue.
        execution_role: AWS: ARN of the role with which the service reads the secrets.
        cpus, memory_mib: AWS: what the container asks for.
    """

    image: str = ""
    project: str = ""
    region: str = ""
    zones: tuple[str, ...] = ()
    machine_type: str = ""
    gpus: str = ""
    spot: bool = True
    max_restarts: int | None = None
    time_s: float | None = None
    env: dict[str, str] = {}
    secrets: dict[str, str] = {}
    labels: dict[str, str] = {}
    service_account: str = ""
    network: str = ""
    subnetwork: str = ""
    boot_disk_gb: int | None = None
    queue: str = ""
    execution_role: str = ""
    cpus: int | None = None
    memory_mib: int | None = None

    def restarts(self, most: int) -> int:
        """Return how often a service starts one job again.

        Args:
            most: How often it does so at most.
        """
        return most if self.max_restarts is None else min(most, self.max_restarts)

    @property
    def gpu(self) -> tuple[str, int] | None:
        """Type, as people call it, and number of GPUs."""
        if not self.gpus:
            return None
        kind, _, count = self.gpus.partition(":")
        return kind.upper().removeprefix("NVIDIA-").removeprefix("TESLA-"), int(count or 1)


class Option(NamedTuple):
    """An option of a managed service, and the field that it becomes.

    Args:
        kinds: Its type in TOML.
        field: Of `Cloud`; '' for the option's own name.
        read: Makes the field's value of what was given; raises ConfigError if that cannot be read.
    """

    kinds: Any = str
    field: str = ""
    read: Callable[[Any], Any] = lambda value: value


def _texts(table: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in table.items()}


def _limit_s(text: str) -> float:
    """Read a time limit: 4h, 90m, or SLURM's 12:00:00."""
    if ":" in text:
        limit_s = parse_limit(text)
        if limit_s is None:
            raise ConfigError(f"--time {text!r} is no time limit; write 12h, 90m or 12:00:00")
        return limit_s
    return duration_s(text)


def _zones(value: str | list[Any]) -> tuple[str, ...]:
    return tuple(value.replace(",", " ").split() if isinstance(value, str) else map(str, value))


def _gigabytes(value: str | int) -> int:
    return int(value) if str(value).isdecimal() else -(-size_bytes(value) // 10**9)


OPTIONS = {
    "image": Option(),
    "project": Option(),
    "region": Option(),
    "zones": Option((str, list), read=_zones),
    "machine-type": Option(),
    "gpus": Option(),
    "spot": Option(bool),
    "max-restarts": Option(int),
    "env": Option(dict, read=_texts),
    "secret": Option(dict, "secrets", _texts),
    "label": Option(dict, "labels", _texts),
    "service-account": Option(),
    "network": Option(),
    "subnetwork": Option(),
    "boot-disk-size": Option((str, int), "boot_disk_gb", _gigabytes),
    "queue": Option(),
    "execution-role": Option(),
    "cpus": Option(int),
    "memory": Option((str, int), "memory_mib", lambda value: size_bytes(value) // 2**20),
}
"""What a person may ask of a managed service, in a profile too."""


def fields_of(options: Mapping[str, Any], *, time: str = "") -> dict[str, Any]:
    """Return the fields of `Cloud` that options give.

    Args:
        options: Those of `OPTIONS` that were given.
        time: The time limit; '' for none.

    Raises:
        ConfigError: If one cannot be read.
    """
    fields = {OPTIONS[name].field or name.replace("-", "_"): OPTIONS[name].read(options[name]) for name in options}
    return fields | ({"time_s": _limit_s(time)} if time else {})


def check(cloud: Cloud, *, grace_s: float) -> None:
    """Refuse what neither service takes.

    Raises:
        ConfigError: With the value and the remedy.
    """
    if not cloud.image:
        raise ConfigError(
            "no container image: give --image, one that has jobkit and your packages installed (docker/README.md)"
        )
    if not re.fullmatch(r"[\w.:@/-]+", cloud.image) or "//" in cloud.image:
        raise ConfigError(f"--image {cloud.image!r} is not the name of an image, such as REGISTRY/PROJECT/train:1")
    if cloud.max_restarts is not None and cloud.max_restarts < 0:
        raise ConfigError(
            f"--max-restarts is {cloud.max_restarts}; give 0 or more, or leave it out for no limit. A run that has "
            "used them up keeps all it committed: 'jobkit resume' gives it as many again"
        )
    if cloud.gpus and not re.fullmatch(r"[A-Za-z0-9-]+(:[1-9]\d?)?", cloud.gpus):
        raise ConfigError(f"--gpus {cloud.gpus!r} is not TYPE:COUNT, such as L4:1")
    if cloud.time_s is not None and cloud.time_s < 2 * grace_s:
        raise ConfigError(
            f"--time {show_duration(cloud.time_s)} leaves hardly time to train: the last "
            f"{show_duration(grace_s)} of it are for saving (--grace)"
        )
    for name in [*cloud.env, *cloud.secrets]:
        if not _VARIABLE.fullmatch(name) or _OURS.match(name):
            raise ConfigError(f"{name!r} cannot be an environment variable of the program; choose another name")
    for name in cloud.env:
        if _SECRETIVE.search(name):
            raise ConfigError(
                f"--env {name}: its value would be readable in the job and in run.json; keep it with the cloud's "
                f"secret manager and give --secret {name}=NAME"
            )

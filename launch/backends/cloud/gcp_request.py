"""What Google Batch is asked for: the job as its API, and `gcloud batch jobs submit --config`, take it."""

import re
from typing import Any

from jobkit.errors import ConfigError
from jobkit.rundir.store import Store
from launch.backends.cloud.managed import command, variables
from launch.spec.cloud_options import RETRIED, STOP_S, Cloud
from launch.spec.jobspec import JobSpec

RESTARTS = 10
"""taskSpec.maxRetryCount is 0..10."""
OURS, LABEL = "jobkit", "jobkit-run"
"""Labels of every job of ours; the second one's value is the run's part of the job's id."""
_ATTACHED = {"T4": "nvidia-tesla-t4", "V100": "nvidia-tesla-v100", "P100": "nvidia-tesla-p100", "P4": "nvidia-tesla-p4"}
"""GPUs that are attached to N1 machines, by the names people use."""
_BUILT_IN: dict[str, dict[int, str]] = {
    "L4": {1: "g2-standard-8", 2: "g2-standard-24", 4: "g2-standard-48", 8: "g2-standard-96"},
    "A100": {n: f"a2-highgpu-{n}g" for n in (1, 2, 4, 8)} | {16: "a2-megagpu-16g"},
    "A100-80GB": {n: f"a2-ultragpu-{n}g" for n in (1, 2, 4, 8)},
    "H100": {n: f"a3-highgpu-{n}g" for n in (1, 2, 4, 8)},
    "H200": {8: "a3-ultragpu-8g"},
    "B200": {8: "a4-highgpu-8g"},
}
"""GPUs that machine types come with (Compute Engine, "GPU machine types"): such a type is all that has to be said."""
_CPUS = {"a2-highgpu": 12, "a2-ultragpu": 12, "a2-megagpu": 6, "a3-highgpu": 26, "a3-ultragpu": 28, "a4-highgpu": 28}
"""vCPUs per GPU of types whose names count GPUs."""
_MIB_PER_CPU = {"highmem": 6500, "highcpu": 900}
"""At least this much per vCPU, in every family; asking for more than there is would be refused."""


def run_label(job: str) -> str:
    """Return what all jobs of a run have in common."""
    return job.rpartition("-")[0]


def machine_type(cloud: Cloud) -> str:
    """Return the machine type that suits the GPUs.

    Raises:
        ConfigError: If there is none, or the one that was given does not.
    """
    if cloud.machine_type and not re.fullmatch(r"[a-z]\w*(-[a-z0-9]+){1,4}", cloud.machine_type):
        raise ConfigError(
            f"--machine-type {cloud.machine_type!r} is no machine type: see gcloud compute machine-types list"
        )
    if cloud.gpu is None:
        return cloud.machine_type or "e2-standard-4"
    kind, count = cloud.gpu
    if kind in _ATTACHED:
        if cloud.machine_type and not cloud.machine_type.startswith("n1-"):
            raise ConfigError(
                f"--gpus {cloud.gpus} is attached to n1 machines, not to {cloud.machine_type}; leave one out"
            )
        return cloud.machine_type or f"n1-standard-{min(96, 8 * count)}"
    types = _BUILT_IN.get(kind)
    if types is None:
        raise ConfigError(
            f"--gpus {cloud.gpus}: known are {', '.join([*_BUILT_IN, *_ATTACHED])}; or give --machine-type alone"
        )
    if cloud.machine_type:
        family = next(iter(types.values())).split("-")[0]
        if cloud.machine_type.split("-")[0] != family:
            raise ConfigError(
                f"--gpus {cloud.gpus} comes with {family} machines, not with {cloud.machine_type}; leave one out"
            )
        return cloud.machine_type
    if count not in types:
        raise ConfigError(f"no machine has {cloud.gpus}: {kind} comes in {', '.join(map(str, types))}")
    return types[count]


def nodes(spec: JobSpec) -> int:
    """Return how many VMs a job has, with one process each where there are several."""
    return int(spec.sbatch.get("nodes") or 1)


def resources(machine_type: str) -> dict[str, str]:
    """Return what a task asks for, which is the whole VM; nothing where the name does not tell how large that is."""
    family, _, size = machine_type.rpartition("-")
    number = re.fullmatch(r"(\d+)g?", size)
    if number is None or (size.endswith("g") and family not in _CPUS):
        return {}
    cpus = int(number[1]) * (_CPUS[family] if size.endswith("g") else 1)
    per_cpu = next((mib for word, mib in _MIB_PER_CPU.items() if word in family), 3500)
    return {"cpuMilli": str(cpus * 1000), "memoryMib": str(cpus * per_cpu)}


def request(store: Store, spec: JobSpec, job: str) -> dict[str, Any]:
    """Return the job as the API, and `gcloud batch jobs submit --config`, take it."""
    cloud = spec.cloud
    assert cloud is not None
    has_gpu = cloud.gpu is not None or cloud.machine_type.split("-")[0] in ("a2", "a3", "a4", "g2")
    words = command(store, spec)
    options = f"--network host --stop-timeout {STOP_S:.0f} --shm-size 8g"
    container = {
        "imageUri": cloud.image,
        "entrypoint": words[0],
        "commands": words[1:],
        "options": options + (" --gpus all" if has_gpu else ""),
    }
    environment: dict[str, Any] = {"variables": variables(spec, job, "gcp")}
    if cloud.secrets:
        environment["secretVariables"] = {name: _secret(cloud, secret) for name, secret in cloud.secrets.items()}
    task: dict[str, Any] = {
        "runnables": [{"container": container}],
        "environment": environment,
        "maxRetryCount": cloud.restarts(RESTARTS),
        # Listing these makes every other code fail at once.
        "lifecyclePolicies": [{"action": "RETRY_TASK", "actionCondition": {"exitCodes": list(RETRIED)}}],
    }
    if whole := resources(cloud.machine_type):
        task["computeResource"] = whole
    if cloud.time_s is not None:
        task["maxRunDuration"] = f"{cloud.time_s:.0f}s"
    # Container-optimized images seem to run docker with live-restore, under which a container gets no SIGTERM.
    disk: dict[str, Any] = {"image": "batch-debian"}
    if cloud.boot_disk_gb is not None:
        disk["sizeGb"] = str(cloud.boot_disk_gb)
    policy: dict[str, Any] = {
        "machineType": cloud.machine_type,
        "provisioningModel": "SPOT" if cloud.spot else "STANDARD",
        "bootDisk": disk,
    }
    if cloud.gpu is not None:
        kind, count = cloud.gpu
        if kind in _ATTACHED:
            policy["accelerators"] = [{"type": _ATTACHED[kind], "count": str(count)}]
    # One VM for each task; Batch starts the task of a lost VM again, and leaves the others alone.
    group: dict[str, Any] = {"taskCount": str(nodes(spec)), "parallelism": str(nodes(spec)), "taskSpec": task}
    if nodes(spec) > 1:
        group["taskCountPerNode"] = "1"
    labels = cloud.labels | {OURS: "run", LABEL: run_label(job)}
    allocation: dict[str, Any] = {
        "location": {"allowedLocations": [f"regions/{cloud.region}", *(f"zones/{zone}" for zone in cloud.zones)]},
        "instances": [{"policy": policy} | ({"installGpuDrivers": True} if has_gpu else {})],
        "labels": labels,
    }
    if cloud.service_account:
        allocation["serviceAccount"] = {"email": cloud.service_account}
    if cloud.network or cloud.subnetwork:
        allocation["network"] = {"networkInterfaces": [_interface(cloud)]}
    return {
        "taskGroups": [group],
        "allocationPolicy": allocation,
        "labels": labels,
        "logsPolicy": {"destination": "CLOUD_LOGGING"},
    }


def _secret(cloud: Cloud, secret: str) -> str:
    if not secret.startswith("projects/"):
        secret = f"projects/{cloud.project}/secrets/{secret}"
    return secret if "/versions/" in secret else f"{secret}/versions/latest"


def _interface(cloud: Cloud) -> dict[str, str]:
    interface = {}
    for key, name, where in (
        ("network", cloud.network, "global/networks"),
        ("subnetwork", cloud.subnetwork, f"regions/{cloud.region}/subnetworks"),
    ):
        if name:
            interface[key] = name if "/" in name else f"projects/{cloud.project}/{where}/{name}"
    return interface

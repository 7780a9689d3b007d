"""The VMs of the fake batch services: what runs a container, as a process or with an engine, and pulls its plug."""

import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jobkit.supervise import processes
from tests.fakes.metadata_server import Gce
from tests.harness.engine import Engine

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Vm:
    """One VM of a job, from boot to power-off.

    Args:
        job: The job's id.
        container: The container that it runs, as the API names its fields.
        environment: What the container gets.
    """

    job: str
    container: dict[str, Any]
    environment: dict[str, str]
    disk: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="jobkit-test-vm-")))
    metadata: Gce = field(default_factory=Gce)
    lost: int = 0
    """Exit code that Batch reports because the VM is gone; 0 while it is not."""

    def close(self) -> None:
        """Power off for good."""
        self.metadata.close()
        shutil.rmtree(self.disk, ignore_errors=True)


class Container(Protocol):
    """A started container."""

    def terminate(self) -> None:
        """Send SIGTERM to PID 1."""

    def kill(self) -> None:
        """Pull the plug."""

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit code as docker has it, None if it still runs."""


class Executor(Protocol):
    """Starts containers."""

    def start(self, vm: Vm, log: Path) -> Container:
        """Start a VM's container, its output into a file."""


class Machine:
    """Where a service's job runs, while it does."""

    vm: Vm | None = None
    container: Container | None = None

    def stop(self, grace_s: float, *, lost: int = 0) -> None:
        """Ask the container to stop; pull the plug after a while."""
        vm, container = self.vm, self.container
        if vm is None or container is None:
            return
        container.terminate()
        until = time.monotonic() + grace_s
        while self.vm is vm:
            if time.monotonic() > until:
                vm.lost = lost
                container.kill()
            time.sleep(0.02)


class Process:
    """A container that is but a process: the image is this checkout, the disk a directory."""

    def __init__(self, vm: Vm, log: Path) -> None:
        words = [vm.container.get("entrypoint", ""), *vm.container.get("commands", [])]
        command = [sys.executable if word == "python3" else word for word in words if word]
        image = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(vm.disk), "TMPDIR": str(vm.disk)}
        caches = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax")}
        self._mark = secrets.token_hex(8)
        environ = image | caches | vm.environment | vm.metadata.environment | {"TEST_VM": self._mark}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, cwd=vm.disk, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def terminate(self) -> None:
        """See `Container`."""
        self._process.terminate()

    def left(self) -> list[int]:
        """Return what runs in it."""
        return [pid for pid in processes.with_environment("TEST_VM", self._mark) if processes.alive(pid)]

    def kill(self) -> None:
        """See `Container`."""
        while left := self.left():
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self.wait(0.05)

    def wait(self, timeout_s: float) -> int | None:
        """See `Container`."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        return code if code >= 0 else 128 - code


class Processes:
    """Runs containers as processes; a container whose PID 1 has ended has nothing left."""

    def start(self, vm: Vm, log: Path) -> Container:
        """See `Executor`."""
        return Process(vm, log)


class Containers:
    """Runs containers with an engine.

    Args:
        engine: The engine.
        image: What stands for every image that a job names.
    """

    def __init__(self, engine: Engine, image: str) -> None:
        self.engine, self.image = engine, image

    def start(self, vm: Vm, log: Path) -> Container:
        """See `Executor`."""
        return _Engined(self, vm, log)


class _Engined:
    def __init__(self, containers: Containers, vm: Vm, log: Path) -> None:
        self._engine, self._name = containers.engine, f"jobkit-test-{secrets.token_hex(6)}"
        environ = {"JAX_PLATFORMS": "cpu"} | vm.environment | vm.metadata.environment
        given = [word for name, value in environ.items() for word in ("--env", f"{name}={value}")]
        options = [*shlex.split(vm.container.get("options", "")), "--entrypoint", vm.container["entrypoint"]]
        words = ["run", "--rm", "--name", self._name, *given, *options, containers.image]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [self._engine.program, *words, *vm.container.get("commands", [])], env=self._engine.environment(),
                stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def terminate(self) -> None:
        self._engine.docker("kill", "--signal=TERM", self._name, check=False)

    def kill(self) -> None:
        self._engine.docker("kill", self._name, check=False)
        self.wait(10)

    def wait(self, timeout_s: float) -> int | None:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

"""A container engine for the tests: the docker of this machine, or one that is installed and started for a while.

`python -m tests.harness.engine COMMAND...` runs a command with an engine, as `make test-all` does. Where no daemon
answers, CI (root on Debian) installs one and starts it with everything it has in a directory of its own, without a
bridge or a rule in the firewall; it ends with the command. Images are made without a registry. Elsewhere the tests are
skipped.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jobkit.supervise import processes

ROOT = Path(__file__).parent.parent.parent
CACHE = ROOT / ".venv" / "docker"
BASE = "jobkit-base"
HOW = "start docker (Debian, Ubuntu: apt-get install docker.io), or run the tests as root with CI=true"
_PACKAGES = "python3,python3-venv"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


@dataclass(frozen=True)
class Engine:
    """A daemon that answers.

    Args:
        program: The client. Debian's knows BuildKit by itself; a newer one needs a plugin.
        host: DOCKER_HOST of the daemon, empty for the usual one.
    """

    program: str
    host: str = ""

    def docker(
        self, *arguments: str, check: bool = True, timeout_s: float = 120.0
    ) -> "subprocess.CompletedProcess[str]":
        """Run a docker command to its end."""
        done = subprocess.run(
            [self.program, *arguments],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode:
            raise OSError(f"docker {' '.join(arguments)}: exit code {done.returncode}: {done.stderr[-3000:]}")
        return done

    def environment(self) -> dict[str, str]:
        """Return what a docker client needs to be told."""
        return os.environ | {"DOCKER_BUILDKIT": "1"} | ({"DOCKER_HOST": self.host} if self.host else {})

    def has(self, image: str) -> bool:
        """Tell whether there is such an image."""
        return self.docker("image", "inspect", image, check=False).returncode == 0

    def base(self) -> str:
        """Return an image with Debian's python3 in it, made from Debian's packages at the first time."""
        with _alone("base"):
            if not self.has(BASE):
                path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
                self.docker("import", "-c", f"ENV {path}", str(base_tar()), BASE)
        return BASE

    def image(self, extras: str = "") -> str:
        """Return the image of docker/Dockerfile with some extras of jobkit, by default those of a supervisor alone."""
        return _image(self, extras)

    def build(self, tag: str, *options: str, dockerfile: Path = ROOT / "docker" / "Dockerfile") -> None:
        """Build an image from the repository."""
        secret = [f"--secret=id=ca,src={_CERTIFICATES}"] if _CERTIFICATES.exists() else []
        arguments = ["--network=host", *secret, *options, "-t", tag, "-f", str(dockerfile), str(ROOT)]
        self.docker("build", "-q", *arguments, timeout_s=500)

    @contextlib.contextmanager
    def container(self, image: str, *command: str, options: Sequence[str] = ()) -> "Iterator[Container]":
        """Start a container without a network; remove it at the end."""
        name = f"jobkit-{os.getpid()}-{time.monotonic_ns()}"
        self.docker("run", "-d", "--name", name, "--network=none", *options, image, *command)
        try:
            yield Container(self, name)
        finally:
            self.docker("rm", "-f", name, check=False)


@dataclass(frozen=True)
class Container:
    """A container that was started."""

    engine: Engine
    name: str

    def stop(self, timeout_s: int) -> float:
        """Stop it as `docker stop -t` does; return the seconds that took."""
        begun = time.monotonic()
        self.engine.docker("stop", "-t", str(timeout_s), self.name)
        return time.monotonic() - begun

    def kill(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal to PID 1."""
        self.engine.docker("kill", f"--signal={number.name}", self.name)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Wait for the end; return the exit code."""
        return int(self.engine.docker("wait", self.name, timeout_s=timeout_s).stdout)

    def logs(self) -> str:
        """Return what it printed."""
        done = self.engine.docker("logs", self.name)
        return done.stdout + done.stderr

    def execute(self, *command: str) -> str:
        """Run a command inside; return what it printed."""
        return self.engine.docker("exec", self.name, *command).stdout

    def state(self) -> dict[str, Any]:
        """Return the engine's view of it."""
        state: dict[str, Any] = json.loads(self.engine.docker("inspect", "-f", "{{json .State}}", self.name).stdout)
        return state


@cache
def _image(engine: Engine, extras: str) -> str:
    """Build an image once for each process: what has not changed, the engine has in its cache."""
    base, name = engine.base(), f"jobkit-test:{extras.replace(',', '-') or 'light'}"
    with _alone(name.replace(":", "-")):
        engine.build(name, f"--build-arg=BASE_IMAGE={base}", f"--build-arg=EXTRAS={extras}")
    return name


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Have one of several test processes make what all need."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def base_tar() -> Path:
    """Return the files of the base image, made from Debian's packages at the first time."""
    made = CACHE / "base.tar"
    if not made.exists():
        _install("mmdebstrap")
        CACHE.mkdir(parents=True, exist_ok=True)
        new = CACHE / "base.new.tar"  # never a pipe: a left side that fails would leave an empty image
        slim = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "locale", "man")]
        command = ["mmdebstrap", "--quiet", "--variant=apt", f"--include={_PACKAGES}", *slim, "bookworm", str(new)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"mmdebstrap: {done.stderr[-2000:]}")
        new.rename(made)
    return made


@cache
def find() -> Engine | None:
    """Return an engine that answers, None where there is none."""
    host = os.environ.get("DOCKER_HOST", "")
    for program in dict.fromkeys(("/usr/bin/docker", shutil.which("docker") or "")):
        if program and os.access(program, os.X_OK):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                Engine(program, host).docker("version", timeout_s=20)
                return Engine(program, host)
    return None


def _install(package: str, program: str = "") -> None:
    """Install a package of Debian's, unless its program is there."""
    if shutil.which(program or package):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise OSError(f"{package} is missing, and only root can install it, from Debian's packages")
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", package]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    if subprocess.run(install, env=environment, check=False, **quiet).returncode:  # type: ignore[call-overload]
        subprocess.run(["apt-get", "update", "-qq"], check=True, **quiet)  # type: ignore[call-overload]
        subprocess.run(install, env=environment, check=True, **quiet)  # type: ignore[call-overload]


@contextlib.contextmanager
def started() -> Iterator[Engine]:
    """Install an engine where there is none, and run it in a directory of its own."""
    _install("docker.io", "dockerd")
    with tempfile.TemporaryDirectory(prefix="jobkit-docker-") as made:
        # The socket's path is short enough there; the images lie on the disk, not in memory.
        at = Path(made)
        host = f"unix://{at}/socket"
        files = [f"--data-root={at}/data", f"--exec-root={at}/exec", f"--pidfile={at}/pid", f"--host={host}"]
        network = ["--bridge=none", "--iptables=false", "--ip6tables=false"]
        with open(at / "log", "wb") as log:
            daemon = subprocess.Popen(
                ["dockerd", *files, *network],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: processes.signal_on_parent_death(signal.SIGTERM),
            )
        try:
            yield _answering(Engine("/usr/bin/docker", host), daemon, at / "log")
        finally:
            daemon.terminate()  # ends its containers and its containerd too
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
            # What a container on the host's network leaves mounted would keep the directory from being removed.
            subprocess.run(["umount", str(at / "exec" / "netns" / "default")], capture_output=True, check=False)


def _answering(engine: Engine, daemon: "subprocess.Popen[bytes]", log: Path) -> Engine:
    deadline = time.monotonic() + 60
    while engine.docker("version", check=False).returncode:
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise OSError(f"dockerd does not start: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.2)
    return engine


def main(command: list[str]) -> int:
    """Run a command with an engine; where none can be had, only CI fails."""
    if find() is not None:
        print(f"docker for the tests: found at {os.environ.get('DOCKER_HOST') or 'its usual place'}", flush=True)
        return subprocess.run(command, check=False).returncode
    if not os.environ.get("CI"):
        print(f"the container tests are left out: no docker daemon answers; {HOW}", file=sys.stderr)
        return subprocess.run(command, check=False).returncode
    try:
        with started() as engine:
            print(f"docker for the tests: started at {engine.host}", flush=True)
            return subprocess.run(command, env=engine.environment(), check=False).returncode
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no container engine: {error}; {HOW}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Machines that share nothing but a bucket: each with a disk, and as root with a network and an address of its own.

    with Machines(tmp_path, 2) as machines, machines.bucket() as server:
        machines[1].start([sys.executable, "-c", "..."])
        machines[1].lose(disk=True)

The networks hang on a bridge in a namespace beside them, so that no rule of this host is asked what may pass; this
process reaches them, and they its bucket, through one address on that bridge. Where namespaces cannot be had, machines
are disks alone, and say so.
"""

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import fsspec

from jobkit import contract
from jobkit.rundir.files import remove_tree
from jobkit.supervise import processes
from tests.fakes.gcs_server import GcsServer

_PREFIX = "jobkit-test-"
_BECOME = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
_NUMBERS = itertools.count()
_SUBNETS = 1 << 12


@contextlib.contextmanager
def bucket(home: Path, *, host: str = "127.0.0.1") -> Iterator[GcsServer]:
    """Run a bucket's server, which this process's clients use meanwhile, as from a machine with that home."""
    with GcsServer(host=host) as server, environment(server.environment() | {contract.ENV_HOME: str(home)}):
        _forget_clients()
        yield server
    _forget_clients()


def _forget_clients() -> None:
    fsspec.config.conf.clear()
    fsspec.config.set_conf_env(fsspec.config.conf)
    fsspec.get_filesystem_class("gs").clear_instance_cache()


@contextlib.contextmanager
def environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Have this process's environment say so, for a while."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Machine:
    """One machine: what runs on it sees its disk, its directory for temporary files, and its network.

    Args:
        index: Which one.
        place: Its disk.
        words: What a command begins with that runs in its network; nothing where it has none of its own.
    """

    def __init__(self, index: int, place: Path, words: Sequence[str] = ()) -> None:
        self.index, self.place, self._words = index, place, list(words)
        self.started: list[subprocess.Popen[bytes]] = []
        self._make_disk()

    def _make_disk(self) -> None:
        (self.place / "tmp").mkdir(parents=True, exist_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        """What makes programs use its disk."""
        return {contract.ENV_HOME: str(self.place / "home"), "TMPDIR": str(self.place / "tmp")}

    @property
    def log(self) -> Path:
        """What was printed on it, which is not lost with its disk."""
        return self.place.with_name(self.place.name + ".log")

    def start(self, command: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
        """Start a program on it."""
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                [*self._words, *command],
                env=os.environ | self.environment | environment,
                cwd=self.place,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.started.append(process)
        return process

    def pids(self) -> list[int]:
        """Return all that runs on it, those too whose parents are gone."""
        return list(processes.with_environment("TMPDIR", str(self.place / "tmp")))

    def lose(self, *, disk: bool = False) -> None:
        """Take it away at this instant, with all that runs on it.

        Args:
            disk: Whether another one comes in its place, whose disk is empty.
        """
        while pids := self.pids():
            for pid in pids:
                processes.send(pid, signal.SIGKILL)
            for process in self.started:
                process.poll()
        for process in self.started:
            process.wait()
        if disk:
            remove_tree(self.place)
            self._make_disk()


class Machines:
    """Some machines, and the network between them, until they are given back.

    Args:
        place: Below it are their disks.
        count: How many.
    """

    def __init__(self, place: Path, count: int) -> None:
        self._place, self._count = place, count
        self._name = f"{_PREFIX}{os.getpid()}-{next(_NUMBERS)}"
        self._all: list[Machine] = []
        self._lock = contextlib.ExitStack()
        self.host = "127.0.0.1"
        """This process's address, as they see it."""
        self.alone = ""
        """Why they have no networks of their own; empty where they have."""

    def __getitem__(self, index: int) -> Machine:
        return self._all[index]

    def __iter__(self) -> Iterator[Machine]:
        return iter(self._all)

    def __enter__(self) -> "Machines":
        words: list[list[str]] = [[] for _ in range(self._count)]
        try:
            self._connect()
            words = [self._enter(index) for index in range(self._count)]
        except (OSError, subprocess.CalledProcessError) as error:
            self._disconnect()
            said = getattr(error, "stderr", None) or str(error)
            if os.geteuid() == 0 and "CI" in os.environ:
                raise AssertionError(f"root on CI has network namespaces: {said}") from None
            self.host, self.alone = "127.0.0.1", f"no network namespaces for machines of their own: {said.strip()}"
            warnings.warn(self.alone, stacklevel=2)
        self._all = [Machine(index, self._place / f"machine-{index}", words[index]) for index in range(self._count)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for machine in self._all:
            machine.lose()
        self._disconnect()

    def bucket(self) -> contextlib.AbstractContextManager[GcsServer]:
        """Run a bucket's server that they reach, as this process does, which has a disk of its own too."""
        return bucket(self._place / "desk", host=self.host)

    def _space(self, index: int | str) -> str:
        return f"{self._name}-{index}"

    def _connect(self) -> None:
        """Give each a network namespace with an address of its own, and this process one on the same bridge."""
        if os.geteuid() != 0:
            raise PermissionError("only root may make them")
        if missing := [tool for tool in ("ip", "nsenter") if shutil.which(tool) is None]:
            raise FileNotFoundError(f"there is no {missing[0]}")
        self._clear_up_after_the_dead()
        subnet = self._own_subnet()
        bridge = self._space("bridge")
        _ip("netns", "add", bridge)
        _ip("-n", bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", bridge, "link", "set", "bridge", "up")
        outside = f"jk{subnet}"
        _ip("link", "delete", outside, check=False)  # the kernel takes it away some time after its namespace
        _ip("link", "add", outside, "type", "veth", "peer", "name", "desk", "netns", bridge)
        _ip("address", "add", f"{_address(subnet, 1)}/24", "dev", outside)
        _ip("link", "set", outside, "up")
        _ip("-n", bridge, "link", "set", "desk", "master", "bridge", "up")
        for index in range(self._count):
            space = self._space(index)
            _ip("netns", "add", space)
            _ip("-n", bridge, "link", "add", f"to-{index}", "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", bridge, "link", "set", f"to-{index}", "master", "bridge", "up")
            _ip("-n", space, "address", "add", f"{_address(subnet, index + 2)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "route", "add", "default", "via", _address(subnet, 1))
            (self._place / f"machine-{index}.hosts").write_text(f"{_address(subnet, index + 2)} machine-{index}\n")
        self.host = _address(subnet, 1)

    def _enter(self, index: int) -> list[str]:
        """Return what a command begins with that is to run on a machine, with its name, by which others reach it."""
        enter = ["nsenter", f"--net=/run/netns/{self._space(index)}", "unshare", "--uts", "--mount"]
        hosts = str(self._place / f"machine-{index}.hosts")
        return [*enter, "sh", "-ec", _BECOME, f"machine-{index}", hosts]

    def _own_subnet(self) -> int:
        """Take the number of a subnet that nobody else has on this machine, until all are given back."""
        first = os.getpid() % _SUBNETS
        for number in (*range(first, _SUBNETS), *range(first)):
            with contextlib.suppress(OSError):
                taken = self._lock.enter_context(socket.socket(socket.AF_UNIX))
                taken.bind(f"\0{_PREFIX}subnet-{number}")
                return number
        raise OSError("every subnet is taken")

    def _clear_up_after_the_dead(self) -> None:
        """Give back what a process has left that was killed."""
        os.makedirs("/run/netns", exist_ok=True)
        for name in os.listdir("/run/netns"):
            pid = name.removeprefix(_PREFIX).partition("-")[0]
            if name.startswith(_PREFIX) and pid.isdigit() and not processes.alive(int(pid)):
                _ip("netns", "delete", name, check=False)

    def _disconnect(self) -> None:
        if os.path.isdir("/run/netns"):
            for name in os.listdir("/run/netns"):
                if name.startswith(f"{self._name}-"):
                    _ip("netns", "delete", name, check=False)
        self._lock.close()


def _address(subnet: int, number: int) -> str:
    return f"10.{224 + subnet // 256}.{subnet % 256}.{number}"


def _ip(*words: str, check: bool = True) -> Any:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


def supervise(machine: Machine, url: str, program: str, *, attempt: int, count: int, **more: str) -> Any:
    """Start the supervisor of one process of an attempt on its machine, the process having the machine's number."""
    return machine.start(
        [sys.executable, "-m", "jobkit.supervise", "--", sys.executable, "-c", program],
        **{
            contract.ENV_RUN: url,
            contract.ENV_ATTEMPT: str(attempt),
            contract.ENV_PROCESS: str(machine.index),
            contract.ENV_PROCESSES: str(count),
            contract.ENV_GATHER: "60",
        },
        **more,
    )

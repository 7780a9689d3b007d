"""A private SLURM cluster of several nodes on one machine: real daemons, jobs, preemption and node failures.

Everything lies below one short directory in /tmp (SLURM's sockets lie there too, and their paths are limited), on
ports of its own and behind a munge key of its own; so several clusters run at once, as root or as anybody. The nodes
are named 127.0.0.1, 127.0.0.2, ...: names that resolve everywhere, as `jax.distributed.initialize()` needs.
"""

import contextlib
import os
import pwd
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jobkit.supervise import processes
from jobkit.supervise.slurm_grace import parse_pairs
from tests.harness import slurm_packages

CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={prefix}/munge/socket,cred_expire={cred_expire_s}
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation={prefix}/state
SlurmdSpoolDir={prefix}/spool/%n
SlurmctldPidFile={prefix}/run/slurmctld.pid
SlurmdPidFile={prefix}/run/slurmd-%n.pid
SlurmctldLogFile={prefix}/log/slurmctld.log
SlurmdLogFile={prefix}/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true
FirstJobId={first_job}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=1
SlurmdTimeout=10
SlurmctldTimeout=30
MessageTimeout=2
KillWait={kill_wait_s}
MinJobAge=3600
JobRequeue=1
PropagateResourceLimits=NONE
"""
PARTITIONS = """\
PartitionName=requeue0 Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1  PreemptMode=REQUEUE GraceTime=0
PartitionName=requeue5 Nodes=ALL Default=NO  MaxTime=INFINITE PriorityTier=1  PreemptMode=REQUEUE GraceTime=5
PartitionName=low      Nodes=ALL Default=NO  MaxTime=INFINITE PriorityTier=1  PreemptMode=REQUEUE GraceTime=5
PartitionName=cancel5  Nodes=ALL Default=NO  MaxTime=INFINITE PriorityTier=1  PreemptMode=CANCEL  GraceTime=5
PartitionName=high     Nodes=ALL Default=NO  MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
FOREIGN = r"(SLURM|SBATCH|SRUN|SALLOC|SCANCEL|SQUEUE|SINFO|SCONTROL)_"
"""Variables of a cluster on which the tests themselves may be running."""


class SlurmError(Exception):
    """A daemon did not start, or a command of SLURM's failed; the message holds what it said."""


class Cluster:
    """A running cluster, to be closed: `with Cluster() as cluster: cluster.run("squeue")`.

    The partitions are requeue0 (the default), requeue5 (also named low) and cancel5, whose jobs are preempted with 0, 5
    and 5 seconds of grace, and high, which preempts them. SLURM lengthens a grace: 5 seconds are 7 (KillWait +
    MessageTimeout).

    Args:
        nodes: How many nodes, of 8 CPUs each; at most 254.
        cred_expire_s: How long SLURM holds a requeued job back; fewer than 5 count as 120.
        kill_wait_s: The seconds from SIGTERM to SIGKILL; fewer than 5 count as 5.
        extra_conf: Further lines of slurm.conf.
    """

    def __init__(self, nodes: int = 4, cred_expire_s: int = 5, kill_wait_s: int = 5, extra_conf: str = "") -> None:
        found = slurm_packages.find()
        if found is None:
            raise SlurmError(f"SLURM is not on this machine; {slurm_packages.HOW}")
        self.slurm = found
        self.nodes = [f"127.0.0.{number}" for number in range(1, nodes + 1)]
        self.prefix = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.prefix.chmod(0o755)  # munged refuses a socket that others cannot reach
        self.environment = found.environment | {"SLURM_CONF": str(self.prefix / "slurm.conf")}
        """What the environment of a program needs so that its SLURM commands reach this cluster."""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._settings = {"cred_expire_s": cred_expire_s, "kill_wait_s": kill_wait_s}
        self._guard = subprocess.Popen(  # closes the cluster if this process dies without doing so
            [sys.executable, "-m", "tests.harness.slurm", str(self.prefix)],
            stdin=subprocess.PIPE,
            cwd=Path(__file__).parent.parent.parent,
            start_new_session=True,
        )
        try:
            for name in ["munge", "state", "run", "log", *(f"spool/{node}" for node in self.nodes)]:
                (self.prefix / name).mkdir(parents=True)
            self._start_munged()
            self._start_slurm(extra_conf)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What users and administrators do

    def run(self, command: str, *arguments: object, cwd: str | Path = "/", **environ: str) -> str:
        """Run a command such as squeue and return its output; raise if it fails."""
        done = subprocess.run(
            [self.slurm.programs.get(command, command), *map(str, arguments)],
            cwd=cwd,
            env=self._environ(**environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise SlurmError(f"{command} {' '.join(map(str, arguments))}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def submit(self, script: str, *options: str, cwd: str | Path = "/", output: str | Path = "/dev/null") -> int:
        """Submit a batch script, given without its first line, and return the job's id."""
        line = f"--output={output}"
        return int(self.run("sbatch", "--parsable", "--open-mode=append", line, *options, "--wrap", script, cwd=cwd))

    def preempt(self, nodes: Sequence[str] | None = None, seconds: float = 1.0) -> int:
        """Submit a job that takes whole nodes, all by default, from the jobs there; return its id."""
        names = self.nodes if nodes is None else nodes
        options = [f"--nodes={len(names)}", f"--nodelist={','.join(names)}", "--exclusive", "--partition=high"]
        return self.submit(f"sleep {seconds}", *options)

    def job(self, job: int | str) -> dict[str, str]:
        """Return what `scontrol show job` tells; of an array, what it tells of the first task."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()
        return parse_pairs(lines[0])

    def wait_state(self, job: int | str, states: str | Iterable[str], timeout_s: float = 60.0) -> dict[str, str]:
        """Wait until a job is in one of some states, as RUNNING, and return what `scontrol show job` tells."""
        wanted = {states} if isinstance(states, str) else set(states)
        return self.wait(lambda: self._job_in(job, wanted), f"job {job} is {' or '.join(sorted(wanted))}", timeout_s)

    def wait_nodes(self, timeout_s: float = 30.0) -> None:
        """Wait until every node is up and idle."""
        self.wait(lambda: self._states() == ["idle"] * len(self.nodes), "all nodes are idle", timeout_s)

    def set_down(self, node: str) -> None:
        """Declare a node down, as an administrator does, until `resume`; its jobs are requeued at once, elsewhere."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def resume(self, node: str, timeout_s: float = 30.0) -> None:
        """Take a node that was declared down back into service, as soon as its jobs have left it."""
        self.wait(lambda: self._resumed(node), f"node {node} is back", timeout_s)

    def set_end(self, job: int | str, seconds: float) -> None:
        """Give a running job a time limit that ends so many seconds from now."""
        self.run("scontrol", "update", f"jobid={job}", f"EndTime=now+{round(seconds)}")

    def start_now(self, job: int | str) -> None:
        """Let a requeued job that waits (PENDING, for BeginTime) start, but not in the second in which it was ended."""
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now+2")

    # What happens to machines

    def kill_slurmd(self, node: str, and_tasks: bool = False) -> None:
        """Kill a node's slurmd, and with `and_tasks` everything that runs on the node: the machine is gone."""
        daemon = self._daemons[node]
        daemon.kill()
        daemon.wait()
        if and_tasks:
            _end(lambda: self.processes(node))

    def start_slurmd(self, node: str) -> None:
        """Start the slurmd of a node, again after `kill_slurmd`."""
        self._launch_slurmd(node)
        self._wait_port(node, self._ports[1 + self.nodes.index(node)])

    def kill_slurmctld(self) -> None:
        """Kill the cluster's controller; what runs goes on."""
        self._daemons["slurmctld"].kill()
        self._daemons["slurmctld"].wait()

    def start_slurmctld(self) -> None:
        """Start the controller, again after `kill_slurmctld`."""
        self._start("slurmctld", "slurmctld", "-D")
        self._wait_port("slurmctld", self._ports[0])

    def processes(self, node: str) -> list[int]:
        """Return the processes of jobs on a node, first the slurmstepds, which would report how others died."""
        tasks = set(processes.with_environment("SLURM_CONF", self.environment["SLURM_CONF"]))
        tasks &= set(processes.with_environment("SLURMD_NODENAME", node))
        below = {stepd: processes.descendants(stepd) for stepd in _stepds(self.prefix)}
        stepds = [stepd for stepd, found in below.items() if tasks & set(found)]
        tasks.update(pid for stepd in stepds for pid in below[stepd])
        return stepds + sorted(tasks - set(stepds))

    def tidy(self) -> None:
        """Cancel every job and bring every node back: what a test may expect of a cluster that others used."""
        if jobs := set(self.run("squeue", "--noheader", "--format=%A").split()):
            self.run("scancel", *sorted(jobs))
        if self._daemons["slurmctld"].poll() is not None:
            self.start_slurmctld()
        for node in self.nodes:
            if self._daemons[node].poll() is not None:
                self.start_slurmd(node)
        self.wait(self._all_idle, "no job is left and all nodes are idle", 60)

    def logs(self, lines: int = 15) -> str:
        """Return the ends of the daemons' logs, for the message of a failure."""
        parts = []
        for path in sorted((self.prefix / "log").glob("*.log")):
            parts += [f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(parts)

    def close(self) -> None:
        """End the daemons and every process of every job, and remove the directory."""
        _end_cluster(self.prefix)
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        shutil.rmtree(self.prefix, ignore_errors=True)
        if self._guard.stdin and not self._guard.stdin.closed:
            self._guard.stdin.close()
        self._guard.wait()

    # How it starts

    def _start_munged(self) -> None:
        directory = self.prefix / "munge"
        (directory / "key").write_bytes(secrets.token_bytes(128))
        (directory / "key").chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={directory / name}" for option, name in files.items()]
        self._start("munged", "munged", "--foreground", "--num-threads=2", *options)
        self._wait_daemon("munged", (directory / "socket").exists)

    def _start_slurm(self, extra_conf: str) -> None:
        for again in (True, True, False):  # others may take a port between its choice and its use
            self._ports = _free_ports(1 + len(self.nodes))
            self._write_conf(extra_conf)
            try:
                self.start_slurmctld()
                for node in self.nodes:
                    self._launch_slurmd(node)
                self.wait_nodes()
                return
            except SlurmError:
                if not again:
                    raise
                for name in self._daemons.keys() - {"munged"}:
                    self._daemons[name].kill()
                    self._daemons[name].wait()

    def _write_conf(self, extra_conf: str) -> None:
        host = socket.gethostname().split(".")[0]
        conf = CONF.format(
            host=host,
            user=_user(),
            prefix=self.prefix,
            ports=self._ports,
            first_job=random.randint(1000, 1_000_000),  # JAX derives its port from the job's id
            **self._settings,
        )
        for node, port in zip(self.nodes, self._ports[1:], strict=True):
            where = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            conf += f"NodeName={node} {where} CPUs=8 RealMemory=8000 State=UNKNOWN\n"
        conf += PARTITIONS + extra_conf.rstrip() + "\n"
        if self.slurm.plugins:
            conf += f"PluginDir={self.slurm.plugins}\n"
        (self.prefix / "slurm.conf").write_text(conf)

    def _launch_slurmd(self, node: str) -> None:
        stepd = ["-d", self.slurm.programs["slurmstepd"]] if "slurmstepd" in self.slurm.programs else []
        self._start(node, "slurmd", *stepd, "-D", "-N", node)

    def _start(self, name: str, program: str, *arguments: str) -> None:
        with (self.prefix / "log" / f"{name}.out").open("wb") as out:
            self._daemons[name] = subprocess.Popen(
                [self.slurm.programs[program], *arguments],
                cwd=self.prefix,  # slurmstepd inherits it and is found by it
                env=self._environ(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _environ(self, **environ: str) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not re.match(FOREIGN, name)}
        return ours | self.environment | environ

    # Waiting

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float) -> Any:
        """Wait until something is true and return it; a failure shows the daemons' logs."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout_s} s in vain until {what}\n{self.logs()}")
            time.sleep(0.03)
        return value

    def _wait_port(self, name: str, port: int) -> None:
        def open_() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        self._wait_daemon(name, open_)

    def _wait_daemon(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not ready():
            if self._daemons[name].poll() is not None or time.monotonic() > deadline:
                said = (self.prefix / "log" / f"{name}.out").read_text(errors="replace")
                raise SlurmError(f"{self._daemons[name].args!r} did not start: {said[-2000:]}")
            time.sleep(0.003)

    def _job_in(self, job: int | str, states: set[str]) -> dict[str, str] | None:
        found = self.job(job)
        return found if found["JobState"] in states else None

    def _states(self) -> list[str]:
        """Return the nodes' states, in the order of the nodes."""
        return self.run("sinfo", "--noheader", "--Node", "--partition=high", "--format=%T").split()

    def _all_idle(self) -> bool:
        states = self._states()
        for node, state in zip(self.nodes, states, strict=True):
            if state.startswith(("down", "drain")):
                self._resumed(node)
        return set(states) == {"idle"} and not self.run("squeue", "--noheader").strip()

    def _resumed(self, node: str) -> bool:
        try:
            self.run("scontrol", "update", f"nodename={node}", "state=resume")
        except SlurmError:  # refused while the node still ends a job
            return False
        return True


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _free_ports(count: int) -> list[int]:
    """Choose ports below those that the kernel hands out, and thus below JAX's."""
    found: set[int] = set()
    while len(found) < count:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.add(port)
    return list(found)


def _stepds(prefix: Path) -> list[int]:
    """Return the slurmstepds of a cluster: nothing but their directory tells whose they are."""
    return [pid for pid in _pids() if "slurmstepd" in _link(pid, "exe") and _link(pid, "cwd") == str(prefix)]


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _link(pid: int, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/{name}")
    except OSError:
        return ""


def _members(prefix: Path) -> list[int]:
    """Return every process of a cluster: daemons, slurmstepds, and what jobs and tests started."""
    stepds = _stepds(prefix)
    below = [pid for stepd in stepds for pid in processes.descendants(stepd)]
    found = {*processes.with_environment("SLURM_CONF", str(prefix / "slurm.conf")), *stepds, *below}
    return sorted(pid for pid in found if processes.alive(pid))


def _end(find: Callable[[], list[int]]) -> None:
    """Kill processes until no more of them come: a job may be about to start some."""
    empty, deadline = 0, time.monotonic() + 20
    while empty < 4:
        found = find()
        empty = 0 if found else empty + 1
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise SlurmError(f"processes {found} do not end")
        time.sleep(0.005)


def _end_cluster(prefix: Path) -> None:
    """End a cluster's daemons and then the rest: the other way round, they would start more."""
    for pid in _members(prefix):
        if Path(_link(pid, "exe")).name.startswith(("munged", "slurmctld", "slurmd")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    _end(lambda: _members(prefix))


def guard(prefix: Path) -> None:
    """Wait until the process that made a cluster closed it or died, and end what is left of it."""
    sys.stdin.buffer.read()
    if prefix.exists():
        _end_cluster(prefix)
        shutil.rmtree(prefix, ignore_errors=True)


if __name__ == "__main__":
    guard(Path(sys.argv[1]))

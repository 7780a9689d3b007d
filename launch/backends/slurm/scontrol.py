"""What SLURM is asked and how it answers: one-line formats that are the same from 22.05 on, read into plain values.

Sources: scontrol(1), squeue(1); what a job sees on each event was measured on a real cluster, and the table is in
`cause`, which is a pure function.
"""

import contextlib
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping

from jobkit.errors import ConfigError, JobkitError
from jobkit.supervise.slurm_grace import parse_pairs, parse_time
from launch.lifecycle.restart import Cause
from launch.lifecycle.run_status import Job
from launch.spec import sweep

_COMMAND_S = 30.0
"""SLURM's own message timeout is 10 s; a controller that restarts answers later."""
_PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "REQUEUE_FED")
_ACTIVE = (*_PENDING, "RUNNING", "COMPLETING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING")
_DEFAULT_KILL_WAIT_S = 30.0
"""slurm.conf(5)."""
_QOS_FIELDS = ("Name", "PreemptMode", "GraceTime", "PreemptExemptTime")
_DEFAULT_HOLD_S = 120.0
"""AuthInfo's cred_expire: a requeued job may not start sooner."""


class SlurmError(JobkitError):
    """SLURM refused a request, or does not answer."""


def run(*command: str) -> str:
    """Run one of SLURM's commands and return what it printed.

    Raises:
        ConfigError: If it is not installed here.
        SlurmError: If it fails; says what SLURM said.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]} is not on PATH: run this on a login node of the cluster")
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"SLURM_BITSTR_LEN": "0"},  # the tasks of an array are never abbreviated
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMMAND_S,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} has not answered for {_COMMAND_S:.0f} s") from None
    if done.returncode != 0:
        said = " ".join((done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").split())
        raise SlurmError(f"{command[0]}: {said.removeprefix(f'{command[0]}: ').removeprefix('error: ')}")
    return done.stdout


def job_of(name: str, state: str, reason: str = "", comment: str = "") -> Job:
    """Return a job by its number, SLURM's word for its state, and the rest of what SLURM shows of it."""
    return Job(name, state, reason, active=state in _ACTIVE, pending=state in _PENDING, comment=comment)


def queue() -> list[Job]:
    """List this user's jobs with one `squeue`, those lately ended too, in the order of their numbers.

    Raises:
        JobkitError: If SLURM does not answer.
    """
    jobs = parse_queue(run("squeue", "--noheader", "--array", "--states=all", "--me", "--format=%i|%T|%r|%k"))
    return sorted(jobs, key=lambda job: number(job.id))


def parse_queue(printed: str) -> list[Job]:
    """Read squeue's lines of `%i|%T|%r|%k`; the last is the user's own text and may hold anything."""
    fields = (line.rstrip("\n").split("|", 3) for line in printed.splitlines() if line.count("|") >= 3)
    return [
        job_of(job.strip(), state, "" if reason == "None" else reason, "" if comment == "(null)" else comment)
        for job, state, reason, comment in fields
    ]


def accounted(jobs: Iterable[str]) -> dict[str, Job]:
    """Ask the accounting once how jobs ended that SLURM itself has forgotten; nothing where there is no accounting."""
    numbers = sorted({number(job) for job in jobs} - {-1})
    if not numbers:
        return {}
    try:
        asked = ("--noheader", "--parsable2", "--allocations", "--format=JobID,State")
        return parse_accounts(run("sacct", *asked, f"--jobs={','.join(map(str, numbers))}"))
    except JobkitError:  # "Slurm accounting storage is disabled", or its database does not answer
        return {}


def parse_accounts(printed: str) -> dict[str, Job]:
    """Read sacct's lines of JobID and State, those of jobs that have ended.

    A state may say more, as in 'CANCELLED by 1000'; tasks of an array that never started share a line: '7_[3-5]'. What
    it calls PENDING or RUNNING is left out: `squeue` would know of it, so the accounting has not heard the end.
    """
    jobs = {}
    for line in printed.splitlines():
        name, _, state = line.strip().partition("|")
        state, _, more = state.partition(" ")
        head, bracket, tasks = name.partition("_[")
        parts = tasks.partition("]")[0].partition("%")[0].split(",")
        numbers = sweep.expand(",".join(part for part in parts if re.fullmatch(r"\d+(-\d+)?", part)))
        for job in [f"{head}_{task}" for task in numbers] if bracket else [name]:
            record = job_of(job, state.rstrip("+"), more)
            if number(job) >= 0 and state and not record.active:
                jobs[job] = record
    return jobs


def number(job: str) -> int:
    """Return a job's number, of an array's task the array's; -1 for what is none. A later job has a larger one."""
    head = job.split("_")[0]
    return int(head) if head.isdecimal() else -1


def show_job(job: str) -> dict[str, str]:
    """Return `scontrol -o show job` as names and values.

    Raises:
        JobkitError: If SLURM does not know it, or does not answer.
    """
    return parse_pairs(run("scontrol", "-o", "show", "job", job))


def hold_s(config: str | None = None) -> float:
    """Return how long SLURM holds a requeued job back, in seconds, from `scontrol show config`."""
    config = run("scontrol", "show", "config") if config is None else config
    newer = re.search(r"requeue_delay=(\d+)", config)
    if newer:
        return float(newer[1])
    match = re.search(r"cred_expire=(\d+)", config)
    return float(match[1]) if match and int(match[1]) >= 5 else _DEFAULT_HOLD_S


def own_qos(given: str | None = None) -> dict[str, str]:
    """Return what the accounting says of a QOS: Name, PreemptMode, GraceTime, PreemptExemptTime.

    Args:
        given: Its name; the user's default one if not given.

    Raises:
        JobkitError: If there is no such QOS, or no accounting.
    """
    asked = ("sacctmgr", "--noheader", "--parsable2", "show")
    if given is None:
        user = pwd.getpwuid(os.getuid()).pw_name
        answer = run(*asked, "assoc", "where", f"user={user}", "format=DefaultQOS")
        given = next(filter(None, answer.split()), "normal")
    known = parse_qos(run(*asked, "qos", f"format={','.join(_QOS_FIELDS)}"))
    if given not in known:
        raise ConfigError(f"the cluster has no QOS {given!r}; it has {', '.join(known) or 'none'}")
    return known[given]


def parse_qos(printed: str) -> dict[str, dict[str, str]]:
    """Read sacctmgr's lines of `_QOS_FIELDS`; return the fields by the QOS's name."""
    lines = (line.split("|") for line in printed.splitlines() if line.count("|") == len(_QOS_FIELDS) - 1)
    return {fields[0]: dict(zip(_QOS_FIELDS, fields, strict=True)) for fields in lines}


def kill_wait_s(config: str | None = None) -> float:
    """Return how long SLURM at least waits between SIGTERM and SIGKILL, in seconds, from `scontrol show config`.

    Fewer than 5 count as 5, of which 4.7 were measured.
    """
    match = re.search(r"KillWait\s*=\s*(\d+)", _shown("show", "config") if config is None else config)
    return max(5.0, float(match[1]) if match else _DEFAULT_KILL_WAIT_S) - 0.5


def cause(job: Mapping[str, str], *, restarts: int, now: float, warned_s: float, preempt_mode: str = "") -> Cause:
    """Tell why a job is being stopped; a pure function of what `scontrol show job` says.

    | event | JobState | Reason | Restarts | PreemptTime |
    |---|---|---|---|---|
    | notice of a preemption | RUNNING | None | same | set |
    | preempted without grace, requeued, node down | COMPLETING | None | one more | absent |
    | scancel | COMPLETING | None | same | None |
    | warning before the time limit | RUNNING, EndTime near | None | same | None |
    | time limit | COMPLETING | TimeLimit | same | None |

    A job that is ended by PreemptMode=CANCEL looks like one that a person cancelled, until it has ended.

    Args:
        job: Names and values of `scontrol -o show job`.
        restarts: SLURM_RESTART_COUNT of this incarnation.
        now: Time of the question (epoch, s).
        warned_s: How long before the time limit the warning may come.
        preempt_mode: PreemptMode of the job's partition.
    """
    if int(job.get("Restarts", "0") or 0) > restarts:
        return Cause.REQUEUED
    state, reason = job.get("JobState", ""), job.get("Reason", "None")
    preempted = job.get("PreemptTime", "None") not in ("None", "Unknown", "")
    if reason == "TimeLimit" or state == "TIMEOUT":
        return Cause.TIME_LIMIT
    if state in ("RUNNING", "SUSPENDED", "SIGNALING", "RESIZING"):
        if preempted:
            return Cause.PREEMPTED
        end = parse_time(job.get("EndTime", ""))
        return Cause.TIME_LIMIT if end is not None and end - now < warned_s else Cause.PROGRAM
    if state in ("PENDING", "REQUEUED", "REQUEUE_HOLD"):
        return Cause.REQUEUED
    if state == "CANCELLED":
        return Cause.CANCELLED
    maybe = state == "PREEMPTED" or preempted or "CANCEL" in preempt_mode or job.get("Requeue") == "0"
    return Cause.GONE if maybe else Cause.CANCELLED


def preempt_mode(job: Mapping[str, str]) -> str:
    """Return the PreemptMode of a job's partition, '' if it is not told."""
    return parse_pairs(_shown("-o", "show", "partition", job.get("Partition", ""))).get("PreemptMode", "")


def hostnames(nodes: str) -> list[str]:
    """Write a list of nodes out, 'n[1-2]' as n1 and n2; empty where scontrol does not tell."""
    return _shown("show", "hostnames", nodes).split()


def lost_nodes(nodes: str) -> list[str]:
    """Name those of some nodes that SLURM has given up on.

    Args:
        nodes: As SLURM writes them: 'n[1-2]'.
    """
    known = [parse_pairs(line) for line in _shown("-o", "show", "node", nodes).splitlines() if line.strip()]
    return [node["NodeName"] for node in known if re.match("DOWN|FAIL|.*NOT_RESPONDING|.*[*]", node.get("State", ""))]


def address(node: str) -> str:
    """Return the address by which SLURM reaches a node; its name where scontrol does not tell.

    Args:
        node: Name of the node.
    """
    return parse_pairs(_shown("-o", "show", "node", node)).get("NodeAddr") or node


def _shown(*words: str) -> str:
    """Return what scontrol shows of the thing that the last word names; nothing of none, or where it does not tell."""
    try:
        return run("scontrol", *words) if words[-1] else ""
    except JobkitError:
        return ""


def flags(options: Mapping[str, str]) -> list[str]:
    """Write long options of sbatch out; one with an empty value is a switch."""
    return [f"--{name}={value}" if value else f"--{name}" for name, value in options.items()]


def submit(*words: str) -> str:
    """Submit a job that is none of a run's own; return its number.

    Raises:
        JobkitError: If SLURM refuses it.
    """
    return run("sbatch", "--parsable", *words).strip().split(";")[0]


def requeue(job: str) -> None:
    """Have a running job of ours started again.

    Raises:
        SlurmError: If SLURM refuses.
    """
    with contextlib.suppress(SlurmError):
        run("scontrol", "update", f"JobId={job}", "Requeue=1")  # of a job that was submitted with --no-requeue
    run("scontrol", "requeue", job)


def never_requeue(job: str) -> None:
    """Keep SLURM from starting a job again by itself, now that what follows it is settled.

    From 23.11 on a job that leaves inside its grace is requeued whatever its exit code, behind the hold; its successor
    would wait for the second end. From 24.05 to 26.05.3 the mark of a preemption also outlives other requeues, so that
    the end of a later life counts as one too (measured on 24.11.5 and 26.05.5; tests/recorded). A job that is being
    ended refuses this, and so may a site: then its second life finds that it has nothing to do, and leaves.
    """
    with contextlib.suppress(JobkitError):
        run("scontrol", "update", f"JobId={job}", "Requeue=0")

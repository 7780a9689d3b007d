"""`jobkit doctor --on slurm`: what will happen there to a run, on each event, read from the cluster's configuration."""

import contextlib
import json
import re
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.store import Store
from jobkit.supervise.slurm_grace import parse_pairs
from jobkit.units import parse_limit, show_duration, show_size
from launch.backends.slurm import scontrol
from launch.backends.slurm.batch_script import WARNING_S, python
from launch.spec.finding import Finding
from launch.spec.jobspec import check_line

_BY_QOS = "preempt/qos"
_PROBE_S = 120.0
_PROBE_BYTES = 64 << 20
_SWEEP_S = 30.0
"""slurmctld ends graces and time limits in sweeps of this length."""


def examine(partition: str | None = None, *, qos: str | None = None, grace_s: float = 30.0) -> list[Finding]:
    """Read the cluster's configuration and say what it means for a run.

    Args:
        partition: Where runs are to be submitted; the default partition if not given.
        qos: The QOS of runs; the user's default one if not given.
        grace_s: How long the program may take to save, as `--grace` says.

    Raises:
        ConfigError: If SLURM is not here, or there is no such partition or QOS.
    """
    config = parse_config(scontrol.run("scontrol", "show", "config"))
    lines = scontrol.run("scontrol", "-o", "show", "partition").splitlines()
    qos_fields = None
    if config.get("PreemptType") == _BY_QOS:
        try:
            qos_fields = scontrol.own_qos(qos)
        except scontrol.SlurmError as error:
            qos_fields = {"error": str(error)}
    return explain(config, choose(lines, partition), qos_fields, grace_s=grace_s)


def parse_config(printed: str) -> dict[str, str]:
    """Read `scontrol show config`: lines of `Name = value`."""
    return dict(re.findall(r"^(\w+)\s+= (.*?)\s*$", printed, flags=re.MULTILINE))


def choose(lines: list[str], partition: str | None) -> dict[str, str]:
    """Choose a partition by name, or the default one.

    Raises:
        ConfigError: If there is none.
    """
    known = {pairs.get("PartitionName", ""): pairs for pairs in map(parse_pairs, filter(str.strip, lines))}
    default = next((name for name, pairs in known.items() if pairs.get("Default") == "YES"), None)
    chosen = default if partition is None else partition
    if chosen is not None and chosen in known:
        return known[chosen]
    names = ", ".join(known)
    if partition is None:
        raise ConfigError(f"the cluster has no default partition: give --partition, one of {names}")
    raise ConfigError(f"there is no partition {partition!r}; the cluster has {names}")


def explain(
    config: Mapping[str, str], partition: Mapping[str, str], qos: Mapping[str, str] | None = None, *, grace_s: float
) -> list[Finding]:
    """Say in plain words what will happen to a run; a pure function of what scontrol and sacctmgr printed.

    Args:
        config: Names and values of `scontrol show config`.
        partition: Those of the partition.
        qos: Those of the runs' QOS where PreemptType=preempt/qos; `error` where they cannot be had.
        grace_s: How long the program may take to save.
    """
    return [
        Finding("cluster", f"SLURM {config.get('SLURM_VERSION', 'unknown')}, partition {partition['PartitionName']}"),
        *_down(partition),
        _preemption(config, partition, qos, grace_s),
        *_marked(config),
        _time_limit(config, partition, grace_s),
        _node_failure(config),
        _restart(config),
        Finding("cancel", "'jobkit cancel' gives the job its grace, then insists; a bare scancel is never undone"),
        _accounting(config),
        _sweep(config),
    ]


def _down(partition: Mapping[str, str]) -> Iterator[Finding]:
    if partition.get("State", "UP") != "UP":
        yield Finding("partition", f"it is {partition['State'].lower()}: jobs will not start", "fail")


def _seconds(text: str) -> float:
    match = re.match(r"\d+", text)
    return float(match[0]) if match else 0.0


def _preemption(
    config: Mapping[str, str], partition: Mapping[str, str], qos: Mapping[str, str] | None, grace_s: float
) -> Finding:
    whole = config.get("PreemptMode", "OFF")
    mode, grace = partition.get("PreemptMode", whole), _seconds(partition.get("GraceTime", "0"))
    whose, by, exempt = "partition", "", config.get("PreemptExemptTime", "")
    if qos is not None:  # what the partition says counts for nothing then (preempt_qos.c)
        if "error" in qos:
            why = f"the QOS of a job decides, which the accounting does not tell: {qos['error']}"
            return Finding("preemption", f"PreemptType={_BY_QOS}: {why}", "warning")
        mode = whole if qos["PreemptMode"] in ("", "cluster") else qos["PreemptMode"].upper()
        grace, exempt = parse_limit(qos["GraceTime"]) or 0.0, qos["PreemptExemptTime"] or exempt
        whose, by = "QOS", f"by QOS {qos['Name']}, whatever the partition says: "
    if config.get("PreemptType", "preempt/none") == "preempt/none" or mode == "OFF":
        return Finding("preemption", f"jobs of this {whose} are not preempted")
    if "SUSPEND" in mode or "GANG" in mode:
        text = f"{by}PreemptMode={mode}: jobs are stopped and continued where they are; nothing is lost"
        return Finding("preemption", text)
    kill = max(5.0, _seconds(config.get("KillWait", "30")))
    notice = grace + kill
    what = f"{by}PreemptMode={mode}, GraceTime={grace:.0f} s, KillWait={kill:.0f} s"
    if exempt_s := parse_limit(exempt):
        what += f", none in a job's first {show_duration(exempt_s)} (PreemptExemptTime)"
    requeues = "REQUEUE" in mode and not grace
    then = "SLURM requeues the job" if requeues else "the job commits and has itself started again"
    fit, verdict = "no step is lost if a save takes less than that", "ok"
    if notice < grace_s:
        fit = f"the save has to fit into that, less than --grace {show_duration(grace_s)}: keep 'save_every' short"
        verdict = "warning"
    text = f"{what}: a notice comes {show_duration(notice)} before the kill; {then}; {fit}"
    return Finding("preemption", text, verdict)


def _marked(config: Mapping[str, str]) -> Iterator[Finding]:
    """Tell of the versions whose mark of a preemption outlives other requeues (scontrol.never_requeue)."""
    version = tuple(int(part) for part in re.findall(r"\d+", config.get("SLURM_VERSION", ""))[:3])
    if (24, 5) <= version <= (26, 5, 3) and config.get("PreemptType", "preempt/none") != "preempt/none":
        yield Finding(
            "ended jobs",
            "this version may requeue a job at its end that was preempted in an earlier life; a run's last job sets "
            "Requeue=0 before it leaves, so that nothing starts again",
        )


def _time_limit(config: Mapping[str, str], partition: Mapping[str, str], grace_s: float) -> Finding:
    limit, default = partition.get("MaxTime", "UNLIMITED"), partition.get("DefaultTime", "NONE")
    limits = f"at most {limit} (default {default if default != 'NONE' else limit})"
    if limit == "UNLIMITED" and default in ("NONE", "UNLIMITED"):
        limits = "none unless --time gives one"
    warned = show_duration(grace_s + WARNING_S)
    return Finding(
        "time limit", f"{limits}; jobkit asks for a warning {warned} before it, commits, and goes on in the next job"
    )


def _node_failure(config: Mapping[str, str]) -> Finding:
    timeout = _seconds(config.get("SlurmdTimeout", "300"))
    if timeout == 0:
        return Finding("lost node", "SlurmdTimeout=0: a dead node is never noticed, and the run waits for it", "fail")
    text = (
        f"SlurmdTimeout={timeout:.0f} s: found out after up to {show_duration(timeout + _SWEEP_S)}, then requeued; at "
        "most the save interval and the save in flight are lost; its node, and one where the program was killed twice, "
        "is left out of later jobs while enough others are up"
    )
    return Finding("lost node", text)


def _restart(config: Mapping[str, str]) -> Finding:
    hold = scontrol.hold_s("\n".join(f"{name}={value}" for name, value in config.items()))
    own = re.search(r"requeue_delay=\d+", config.get("SchedulerParameters", ""))
    why = f" ({own[0]})" if own else ""
    if hold <= 15:
        return Finding("restart", f"a requeued job may start after {show_duration(hold)}{why}")
    remedy = "SchedulerParameters=requeue_delay=5" if own else "AuthInfo=cred_expire=5"
    text = (
        f"SLURM holds a requeued job back for {show_duration(hold)}{why}: with a notice, a run submits a successor "
        "instead; after SLURM's own requeue a job of one minute and one CPU lifts the hold as soon as there is "
        f"room, unless the run's first node died; an administrator can set {remedy}"
    )
    return Finding("restart", text, "warning")


def _accounting(config: Mapping[str, str]) -> Finding:
    kind = config.get("AccountingStorageType", "(null)")
    text = f"accounting by {kind.rpartition('/')[2]}: how a job ended is told for as long as it keeps it"
    if kind.endswith("none") or kind == "(null)":
        age = config.get("MinJobAge", "300").removesuffix(" sec")
        text = f"no accounting here: SLURM forgets a job {age} s after its end; the run's own ledger stays"
    return Finding("status", text)


def _sweep(config: Mapping[str, str]) -> Finding:
    size = min(_seconds(config.get("MaxArraySize", "1001")), _seconds(config.get("MaxJobCount", "10000")))
    if size < 2:
        return Finding("sweep", "MaxArraySize=0: job arrays are switched off, so that --sweep is refused", "warning")
    return Finding("sweep", f"one job array, of at most {size:.0f} points here")


# A job that tries it.

_PROBE = """\
import json, os, signal, sys, time
from jobkit.rundir.store import Store
answer = {"node": os.environ.get("SLURMD_NODENAME", "")}
signal.signal(signal.SIGTERM, lambda *_: answer.setdefault("answered", time.time()))
store, content, begun = Store(sys.argv[1]), os.urandom(int(sys.argv[2])), time.monotonic()
(store.remote or store).write("doctor/probe", content)
answer["write_s"] = time.monotonic() - begun
print(json.dumps({"ready": True}), flush=True)
end = time.monotonic() + 45
while "answered" not in answer and time.monotonic() < end:
    time.sleep(0.05)
print(json.dumps(answer), flush=True)
"""


def probe(url: str, partition: str | None, options: Mapping[str, str]) -> list[Finding]:
    """Submit a one-minute job that writes to a run's URL from a compute node and must answer a signal.

    Args:
        url: Where runs are to lie.
        partition: Where the job is submitted.
        options: Further options of sbatch.

    Raises:
        JobkitError: If SLURM refuses the job.
    """
    for name, value in {"partition": partition or "", **options}.items():
        check_line(f"--{name}", value)
    parent = Path.cwd() if "://" in url else Path(Store(url).path).parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".jobkit-doctor-", dir=parent) as made:
        folder = Path(made)
        (folder / "probe.py").write_text(_PROBE)
        words = python(str(folder / "probe.py"), url, str(_PROBE_BYTES))
        script = folder / "probe.sh"
        script.write_text(f"#!/bin/bash\nsrun --ntasks=1 {shlex.join(words)}\n")
        own = {"partition": partition or "", "time": "1", "job-name": "jobkit-doctor", "output": str(folder / "out")}
        own = {name: value for name, value in (own | dict(options)).items() if value}
        job = scontrol.submit("--requeue", *scontrol.flags(own), str(script))
        try:
            return _watch(job, folder / "out")
        finally:
            with contextlib.suppress(JobkitError):
                scontrol.run("scancel", job)
            _remove_probe(url)


def _watch(job: str, output: Path) -> list[Finding]:
    begun, signalled = time.monotonic(), 0.0
    while time.monotonic() - begun < _PROBE_S:
        lines = [line for line in _lines(output) if line.startswith("{")]
        if lines and not signalled:
            signalled = time.time()
            scontrol.run("scancel", "--signal=TERM", job)
        if len(lines) > 1:
            return _judge(json.loads(lines[1]), signalled)
        if not signalled and job not in {one.id for one in scontrol.queue() if one.active}:
            output_end = " ".join(_lines(output))[-400:] or "it printed nothing"
            return [Finding("probe", f"the job could not write to the run's URL: {output_end}", "fail")]
        time.sleep(0.3)
    started = "it never answered a signal" if signalled else "it did not start"
    return [Finding("probe", f"job {job}: {started} within {show_duration(_PROBE_S)}", "fail")]


def _judge(answer: Mapping[str, float], signalled: float) -> list[Finding]:
    if "answered" not in answer:
        return [Finding("probe", "the program in the job did not get SIGTERM: a notice would not reach it", "fail")]
    rate = _PROBE_BYTES / max(answer["write_s"], 1e-9)
    speed = f"{show_size(_PROBE_BYTES)} reached the run's URL from node {answer['node']} at {show_size(rate)}/s"
    delay = show_duration(answer["answered"] - signalled)
    return [Finding("probe", f"a signal reached the program after {delay}; {speed}")]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _remove_probe(url: str) -> None:
    with contextlib.suppress(JobkitError, OSError):
        store = Store(url)
        if store.remote is not None:
            store.remote.remove(["doctor/probe"])
        else:
            store.remove("doctor/probe")
            store.file("doctor").rmdir()
            store.path.rmdir()

"""`jobkit doctor`: what is said of a configuration, and the probe on a real cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobkit.errors import ConfigError
from launch.backends.slurm import doctor, scontrol
from tests.harness.slurm import Cluster

ROOT = Path(__file__).parent.parent.parent
CONFIG = doctor.parse_config((ROOT / "tests/recorded/show_config-22.05.txt").read_text())
LINE = (ROOT / "tests/recorded/show_partition-22.05.txt").read_text()


def said(
    topic: str, config: dict[str, str] | None = None, qos: dict[str, str] | None = None, **partition: str
) -> tuple[str, str]:
    """Return what is said of one topic, and the verdict."""
    chosen = doctor.choose([LINE], "cancel5") | partition
    told = doctor.explain(CONFIG | (config or {}), chosen, qos, grace_s=30.0)
    (found,) = [one for one in told if one.topic == topic]
    return found.text, found.verdict


def test_preemption() -> None:
    """Mode, grace and kill wait decide what is said, and whether the save may be too long for it."""
    text, verdict = said("preemption")
    assert text.startswith("PreemptMode=CANCEL, GraceTime=5 s, KillWait=5 s: a notice comes 10 s before the kill")
    assert verdict == "warning"
    assert said("preemption", GraceTime="120")[1] == "ok"
    assert said("preemption", PreemptMode="OFF") == ("jobs of this partition are not preempted", "ok")
    assert said("preemption", {"PreemptType": "preempt/none"})[0] == "jobs of this partition are not preempted"
    assert (
        "SLURM requeues the job" in said("preemption", {"KillWait": "30 sec"}, PreemptMode="REQUEUE", GraceTime="0")[0]
    )


@pytest.mark.parametrize(
    ("qos", "text", "verdict"),
    [
        (
            "low",
            "by QOS low, whatever the partition says: PreemptMode=REQUEUE, GraceTime=7 s, KillWait=5 s, none in a "
            "job's first 3.0 s (PreemptExemptTime): a notice comes 12 s before the kill; the job commits and has "
            "itself started again",
            "warning",
        ),
        ("cut", "by QOS cut, whatever the partition says: PreemptMode=CANCEL, GraceTime=0 s, KillWait=5 s", "warning"),
        (
            "normal",
            "by QOS normal, whatever the partition says: PreemptMode=REQUEUE, GraceTime=0 s, KillWait=5 s: a notice "
            "comes 5.0 s before the kill; SLURM requeues the job",
            "warning",
        ),
    ],
)
def test_preemption_by_qos(qos: str, text: str, verdict: str) -> None:
    """Where a QOS decides over preemption, its mode and grace are told, and not those of the partition."""
    known = scontrol.parse_qos((ROOT / "tests/recorded/sacctmgr_qos-22.05.txt").read_text())
    told = said("preemption", {"PreemptType": "preempt/qos"}, known[qos], GraceTime="120")
    assert told[0].startswith(text)
    assert told[1] == verdict


def test_preemption_by_a_qos_that_nobody_tells() -> None:
    """Where the accounting does not answer, that is said, and nothing made up from the partition."""
    text, verdict = said("preemption", {"PreemptType": "preempt/qos"}, {"error": "sacctmgr: no slurmdbd"})
    assert text.endswith("the QOS of a job decides, which the accounting does not tell: sacctmgr: no slurmdbd")
    assert verdict == "warning"


@pytest.mark.parametrize(
    ("version", "marked"),
    [
        ("22.05.8", False),
        ("23.11.10", False),
        ("24.05.0", True),
        ("24.11.5", True),
        ("26.05.3", True),
        ("26.05.5", False),
    ],
)
def test_versions_that_mark_a_preempted_job(version: str, marked: bool) -> None:
    """The versions that may start an ended job once more are named as such, and no others."""
    told = doctor.explain(CONFIG | {"SLURM_VERSION": version}, doctor.choose([LINE], "cancel5"), grace_s=30.0)
    assert ["Requeue=0" in one.text for one in told if one.topic == "ended jobs"] == [True] * marked


def test_what_cannot_be_kept_fails() -> None:
    """A partition that is down, and dead nodes that are never noticed, are failures."""
    assert said("partition", State="DOWN") == ("it is down: jobs will not start", "fail")
    assert said("lost node", {"SlurmdTimeout": "0 sec"})[1] == "fail"
    assert said("lost node", {"SlurmdTimeout": "300 sec"})[0].startswith(
        "SlurmdTimeout=300 s: found out after up to 5 min 30 s"
    )


def test_restart() -> None:
    """A requeue that is held back for long is a warning with the remedy."""
    assert said("restart") == ("a requeued job may start after 5.0 s", "ok")
    text, verdict = said("restart", {"AuthInfo": "(null)"})
    assert ("2 min 0 s" in text, "cred_expire=5" in text, verdict) == (True, True, "warning")
    assert said("restart", {"SchedulerParameters": "bf_interval=1,requeue_delay=7"})[0] == (
        "a requeued job may start after 7.0 s (requeue_delay=7)"
    )
    text, _ = said("restart", {"SchedulerParameters": "requeue_delay=60"})
    assert text.startswith("SLURM holds a requeued job back for 60 s (requeue_delay=60): with a notice")
    assert text.endswith("an administrator can set SchedulerParameters=requeue_delay=5")


def test_sweeps_and_accounting() -> None:
    """How large a sweep may be, and whether SLURM remembers how a job ended."""
    assert said("sweep") == ("one job array, of at most 1001 points here", "ok")
    assert said("sweep", {"MaxArraySize": "0"})[1] == "warning"
    assert said("status")[0].startswith("no accounting here: SLURM forgets a job 3600 s after its end")
    assert said("status", {"AccountingStorageType": "accounting_storage/slurmdbd"})[0].startswith(
        "accounting by slurmdbd"
    )


def test_a_newer_slurm() -> None:
    """The configuration of SLURM 24.11 is read like that of 22.05."""
    config = doctor.parse_config((ROOT / "tests/recorded/show_config-24.11.txt").read_text())
    line = (ROOT / "tests/recorded/show_partition-24.11.txt").read_text()
    found = {one.topic: one.text for one in doctor.explain(config, doctor.choose([line], "cancel5"), grace_s=30.0)}
    assert found["cluster"] == "SLURM 24.11.5, partition cancel5"
    assert found["preemption"].startswith("PreemptMode=CANCEL, GraceTime=5 s, KillWait=5 s")
    assert found["restart"] == "a requeued job may start after 5.0 s"


def test_time_limit() -> None:
    """The partition's limit is told, and what jobkit asks for."""
    assert said("time limit")[0].startswith("none unless --time gives one; jobkit asks for a warning 90 s before it")
    assert said("time limit", MaxTime="1-00:00:00")[0].startswith("at most 1-00:00:00 (default 1-00:00:00)")


def test_unknown_partition() -> None:
    """A partition that is not there is an error that lists those that are."""
    with pytest.raises(ConfigError, match=r"there is no partition 'nope'; the cluster has cancel5"):
        doctor.choose([LINE], "nope")


def run(cluster: Cluster, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `jobkit doctor` on the cluster."""
    return subprocess.run(
        [sys.executable, "-m", "launch", "doctor", *arguments], cwd=cwd, capture_output=True, text=True, check=False,
        env=os.environ | cluster.environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.slow
def test_on_a_cluster(cluster: Cluster, tmp_path: Path) -> None:
    """On a real cluster: findings, as JSON too, a probe that writes and answers, and nothing left behind."""
    cluster.tidy()
    told = run(cluster, tmp_path, "-p", "requeue5")
    assert told.returncode == 0, told.stderr
    assert "SLURM 22." in told.stdout or "SLURM 2" in told.stdout
    found = run(cluster, tmp_path, "-p", "requeue5", "--run", "runs/one", "--probe", "--json")
    assert found.returncode == 0, found.stdout + found.stderr
    probe = json.loads(found.stdout)[-1]
    assert probe["verdict"] == "ok"
    assert "a signal reached the program after" in probe["text"]
    assert "67.1 MB reached the run's URL from node 127.0.0." in probe["text"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_probe_that_cannot_write(cluster: Cluster, tmp_path: Path) -> None:
    """A place that the job cannot write to is a failed promise and exit code 1, with what it said."""
    cluster.tidy()
    (tmp_path / "file").write_text("")
    told = run(cluster, tmp_path, "-p", "requeue5", "--run", "gs+nothing://bucket/run", "--probe")
    assert told.returncode == 1, told.stderr
    assert "FAIL" in told.stdout
    assert "could not write to the run's URL" in told.stdout

"""`jobkit doctor`: what is said of a configuration, and the probe on a real cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobkit.errors import ConfigError
from launch import doctor
from tests.slurm import Cluster

ROOT = Path(__file__).parent.parent
CONFIG = doctor.parse_config((ROOT / "tests/recorded/show_config-22.05.txt").read_text())
LINE = (ROOT / "tests/recorded/show_partition-22.05.txt").read_text()


def said(topic: str, config: dict[str, str] | None = None, **partition: str) -> tuple[str, str]:
    """Return what is said of one topic, and the verdict."""
    chosen = doctor.choose([LINE], "cancel5") | partition
    (found,) = [one for one in doctor.explain(CONFIG | (config or {}), chosen, grace_s=30.0) if one.topic == topic]
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

"""What SLURM says, read back from its recorded output; the version is in the file's name."""

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit.supervise.slurm_grace import parse_pairs, parse_time, preemption_s
from jobkit.units import parse_limit
from launch.backends.slurm import scontrol
from launch.lifecycle.restart import Cause

RECORDED = Path(__file__).parent.parent / "recorded"


def recorded(name: str, version: str = "22.05") -> dict[str, str]:
    """Return a recorded `scontrol -o show job`."""
    return parse_pairs((RECORDED / f"show_job-{version}-{name}.txt").read_text())


def test_a_user_s_own_text_forges_nothing() -> None:
    """Newer SLURM shows the line that submitted a job, in which a user may have written names and values."""
    job = recorded("submit-line", "26.05")
    assert (job["JobId"], job["JobState"], job["Requeue"]) == ("106878", "RUNNING", "1")


@pytest.mark.parametrize(
    ("name", "cause", "preempt_mode"),
    [
        ("running", Cause.PROGRAM, "REQUEUE"),
        ("preempt-notice", Cause.PREEMPTED, "REQUEUE"),
        ("preempted-without-grace", Cause.REQUEUED, "REQUEUE"),
        ("requeued", Cause.REQUEUED, "REQUEUE"),
        ("scancel", Cause.CANCELLED, "REQUEUE"),
        ("scancel", Cause.GONE, "CANCEL"),
        ("scancel-in-grace", Cause.GONE, "REQUEUE"),
        ("cancelled", Cause.CANCELLED, "CANCEL"),
        ("preempt-cancel-after-grace", Cause.GONE, "CANCEL"),
        ("preempted", Cause.GONE, "CANCEL"),
        ("time-limit", Cause.TIME_LIMIT, "REQUEUE"),
    ],
)
def test_cause(name: str, cause: Cause, preempt_mode: str) -> None:
    """Each event is told from what SLURM showed when it happened."""
    job = recorded(name)
    now = parse_time(job["StartTime"]) or 0.0
    assert scontrol.cause(job, restarts=0, now=now, warned_s=125, preempt_mode=preempt_mode) is cause


@pytest.mark.parametrize(
    ("name", "cause", "preempt_mode"),
    [
        ("running", Cause.PROGRAM, "REQUEUE"),
        ("preempt-notice", Cause.PREEMPTED, "REQUEUE"),
        ("preempted-without-grace", Cause.REQUEUED, "REQUEUE"),
        ("held-back", Cause.REQUEUED, "REQUEUE"),
        ("requeued", Cause.REQUEUED, "REQUEUE"),
        ("scancel", Cause.REQUEUED, "REQUEUE"),
        ("scancel-in-grace", Cause.GONE, "REQUEUE"),
        ("cancelled", Cause.REQUEUED, "CANCEL"),
        ("preempted", Cause.GONE, "CANCEL"),
        ("time-limit", Cause.TIME_LIMIT, "REQUEUE"),
    ],
)
def test_cause_of_a_newer_slurm(name: str, cause: Cause, preempt_mode: str) -> None:
    """SLURM 24.11 tells the same in the same words; the cancelled job there had been restarted once."""
    job = recorded(name, "24.11")
    now = parse_time(job["StartTime"]) or 0.0
    assert scontrol.cause(job, restarts=0, now=now, warned_s=125, preempt_mode=preempt_mode) is cause
    if name in ("scancel", "cancelled"):
        own = scontrol.cause(job, restarts=1, now=now, warned_s=125, preempt_mode="REQUEUE")
        assert own is Cause.CANCELLED


@pytest.mark.parametrize(
    ("event", "version", "causes"),
    [
        # From 23.11 on SLURM requeues a job that leaves in its grace by itself; PENDING without a reason comes first.
        ("leaves-in-grace", "22.05", "own preempted gone"),
        ("leaves-in-grace", "24.11", "own preempted requeued"),
        ("leaves-in-grace", "26.05", "own preempted requeued"),
        ("norequeue-in-grace", "22.05", "own preempted gone"),
        ("norequeue-in-grace", "24.11", "own preempted gone"),
        ("norequeue-in-grace", "26.05", "own preempted gone"),
        ("scancel-in-grace", "22.05", "own preempted gone cancelled"),
        ("scancel-in-grace", "24.11", "own preempted gone cancelled"),
        ("scancel-in-grace", "26.05", "own preempted gone cancelled"),
        ("late", "22.05", "own preempted requeued"),
        ("late", "24.11", "own preempted requeued"),
        ("late", "26.05", "own preempted requeued"),
    ],
)
def test_the_causes_of_a_job_s_life(event: str, version: str, causes: str) -> None:
    """A whole recorded life of a job, line by line on each version: what its first life is told at each change."""
    lines = (RECORDED / f"history-{version}-{event}.txt").read_text().splitlines()
    told: list[str] = []
    for job in map(parse_pairs, lines):
        now = parse_time(job["StartTime"]) or 0.0
        cause = scontrol.cause(job, restarts=0, now=now, warned_s=30, preempt_mode="REQUEUE")
        told += [cause] if cause not in told[-1:] else []
    assert " ".join(told) == causes


def test_one_version_starts_an_ended_job_again() -> None:
    """Ended by itself in its second life after a preemption, the recorded job has a third one on 24.11 alone."""
    lives = {}
    for version in ("22.05", "24.11", "26.05"):
        last = parse_pairs((RECORDED / f"history-{version}-late.txt").read_text().splitlines()[-1])
        assert last["JobState"] == "COMPLETED"
        lives[version] = 1 + int(last["Restarts"])
    assert lives == {"22.05": 2, "24.11": 3, "26.05": 2}


def test_a_near_end_is_the_time_limit() -> None:
    """A running job whose end is near is being warned of its time limit."""
    job = recorded("running")
    end = parse_time(job["EndTime"])
    assert end is not None
    assert scontrol.cause(job, restarts=0, now=end - 100, warned_s=125) is Cause.TIME_LIMIT
    assert scontrol.cause(job, restarts=0, now=end - 130, warned_s=125) is Cause.PROGRAM


def test_an_incarnation_knows_its_own_restarts() -> None:
    """A job that was restarted before is not taken for one that is being restarted now."""
    job = recorded("running") | {"Restarts": "2"}
    assert scontrol.cause(job, restarts=2, now=0.0, warned_s=125) is Cause.PROGRAM
    assert scontrol.cause(job, restarts=1, now=0.0, warned_s=125) is Cause.REQUEUED


def test_a_person_s_cancel_is_never_undone() -> None:
    """A job that SLURM calls cancelled, or is ending for no reason it tells, is not requeued."""
    for state in ("CANCELLED", "COMPLETING", "FAILED", "NODE_FAIL"):
        job = recorded("scancel") | {"JobState": state}
        assert scontrol.cause(job, restarts=0, now=0.0, warned_s=0) is Cause.CANCELLED


def test_queue() -> None:
    """Jobs are listed with their states, none of them active."""
    jobs = scontrol.parse_queue((RECORDED / "squeue-22.05.txt").read_text())
    assert sorted(job.state for job in jobs) == sorted(["PREEMPTED", "TIMEOUT", *["COMPLETED"] * 3, *["CANCELLED"] * 3])
    assert not any(job.active or job.pending for job in jobs)


def test_queue_of_a_newer_slurm() -> None:
    """SLURM 24.11 lists tasks of an array, and reasons with blanks and commas in them."""
    jobs = {job.id: job for job in scontrol.parse_queue((RECORDED / "squeue-24.11.txt").read_text())}
    assert [jobs[f"4734_{task}"].state for task in range(4)] == ["RUNNING", "PENDING", "PENDING", "PENDING"]
    assert jobs["4734_2"].comment == "/runs/sweep"
    assert jobs["4723"].reason == "ReqNodeNotAvail, UnavailableNodes:127.0.0.2"
    assert jobs["4719"].comment == "/runs/a"
    assert jobs["4733"].active
    assert recorded("array-task", "24.11")["ArrayTaskId"] == "2"


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"])
def test_states_that_are_not_over(state: str) -> None:
    """A job that may still do something is never shown as over."""
    assert scontrol.parse_queue(f"7|{state}|None|gs://bucket/a|b")[0] == scontrol.job_of(
        "7", state, "", "gs://bucket/a|b"
    )
    assert scontrol.job_of("7", state).active


@given(st.text(string.printable), st.integers(1, 10**9))
def test_a_comment_may_hold_anything(comment: str, number: int) -> None:
    """Whatever a comment holds, the job's number and state are read."""
    line = f"{number}|RUNNING|None|{comment}".splitlines()[0]
    (job,) = scontrol.parse_queue(line)
    assert (job.id, job.state) == (str(number), "RUNNING")


def test_accounts() -> None:
    """Ends are told apart, tasks that share a line get it each, and what has not ended by the accounts is left out."""
    found = scontrol.parse_accounts((RECORDED / "sacct-22.05.txt").read_text())
    cancelled = {f"94019_{task}": ("CANCELLED", "by 0") for task in (0, 2, 3)}
    ended = {"94020": "FAILED", "94021": "COMPLETED", "94022": "FAILED", "94023": "NODE_FAIL", "94025": "PREEMPTED"}
    told = {job: (one.state, one.reason) for job, one in found.items()}
    assert told == cancelled | {job: (state, "") for job, state in ended.items()}
    assert scontrol.parse_accounts("7|CANCELLED+\n8.batch|COMPLETED\n\n9|RUNNING\n|x")["7"].state == "CANCELLED"
    assert scontrol.parse_accounts("7_[1,3-4,...%5]|FAILED").keys() == {"7_1", "7_3", "7_4"}


@given(st.text(string.printable))
def test_accounts_may_say_anything(printed: str) -> None:
    """Whatever sacct prints, nothing that is still active comes out of it."""
    assert not [job for job in scontrol.parse_accounts(printed).values() if job.active]


def test_qos() -> None:
    """What sacctmgr tells of each QOS is read by its name."""
    known = scontrol.parse_qos((RECORDED / "sacctmgr_qos-22.05.txt").read_text())
    assert list(known) == ["normal", "low", "cut", "urgent"]
    assert known["low"] == {
        "Name": "low",
        "PreemptMode": "requeue",
        "GraceTime": "00:00:07",
        "PreemptExemptTime": "00:00:03",
    }


def test_hold() -> None:
    """How long a requeued job is held back, with cred_expire set, by default, and too short to count."""
    config = (RECORDED / "show_config-22.05.txt").read_text()
    assert scontrol.hold_s(config) == 5
    assert scontrol.hold_s(config.replace("cred_expire=5", "ttl=9")) == 120
    assert scontrol.hold_s(config.replace("cred_expire=5", "cred_expire=4")) == 120
    newer = (RECORDED / "show_config-24.11.txt").read_text()
    assert scontrol.hold_s(newer) == 5
    assert scontrol.hold_s(newer.replace("bf_interval=1", "bf_interval=1,requeue_delay=30")) == 30


def test_partition() -> None:
    """A partition's line is read into names and values."""
    assert parse_pairs((RECORDED / "show_partition-22.05.txt").read_text())["PreemptMode"] == "CANCEL"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:05", 7205), ("1-2", 93600), ("1-2:30", 95400), ("1-00:00:01", 86401),
     ("", None), ("UNLIMITED", None), ("soon", None)],
)  # fmt: skip
def test_time_limits(text: str, seconds: float | None) -> None:
    """Every form of sbatch(1) is read; what is none is left to sbatch."""
    assert parse_limit(text) == seconds


def test_kill_wait() -> None:
    """SLURM's seconds between SIGTERM and SIGKILL, never told longer than they are."""
    assert scontrol.kill_wait_s((RECORDED / "show_config-22.05.txt").read_text()) == 4.5
    assert scontrol.kill_wait_s("KillWait                = 60 sec") == 59.5
    assert scontrol.kill_wait_s("") == 29.5


@pytest.mark.parametrize(
    ("name", "version", "left_s"),
    [
        ("preempt-notice", "22.05", 5.0),
        ("preempt-notice", "24.11", 7.0),
        ("preempt-cancel-after-grace", "22.05", None),
        ("preempted-without-grace", "22.05", None),
        ("running", "22.05", None),
        ("time-limit", "22.05", None),
        ("scancel-in-grace", "24.11", None),
    ],
)
def test_how_long_a_preemption_leaves(name: str, version: str, left_s: float | None) -> None:
    """The grace as the job shows it, or its partition where a job without a time limit shows none; None elsewhere."""
    assert preemption_s(recorded(name, version), lambda: {"GraceTime": "7"}) == left_s


def test_a_preemption_while_the_clock_is_put_back() -> None:
    """Half a minute is not taken for an hour: then rather none is known of."""
    job = {"JobState": "RUNNING", "PreemptTime": "2026-10-25T02:59:50", "EndTime": "2026-10-25T02:00:20"}
    assert preemption_s(job, dict) == 0.0
    assert preemption_s(job | {"EndTime": "2026-10-25T03:00:20"}, dict) == 30.0

"""jobkit explain: the exact words for each thing that can happen, from ledgers written by hand."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from msgspec.structs import astuple

from launch.lifecycle.history import History, read_history
from launch.report.explain import Story, explain
from launch.report.goodput import measure
from tests.harness import ledgers
from tests.harness.jobs import Project
from tests.training.test_goodput import histories


@pytest.fixture
def run(tmp_path: Path) -> ledgers.Written:
    """A run directory without a history."""
    return ledgers.Written(tmp_path / "r")


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Show times as they are in Greenwich."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def story(run: ledgers.Written, *, state: str = "", now: float | None = None) -> Story:
    """Explain a run."""
    history = read_history(run.store, state=state)
    history.now = now
    return explain(measure(history), history)


def texts(explanation: Story) -> list[str]:
    """Return the sentences."""
    return [one.text for one in explanation.story]


def advice(run: ledgers.Written, **options: Any) -> dict[str, str]:
    """Return the advice by its cause."""
    return {one.cause: one.text for one in story(run, **options).advice}


def life(
    run: ledgers.Written,
    number: int,
    start: float,
    end: float,
    outcome: str,
    reason: str = "",
    *,
    steps: tuple[int, int] = (0, 10),
    committed: int = 0,
    node: str = "n1",
    saves: Sequence[float] = (),
    blocking_s: float = 1.0,
) -> None:
    """Write an attempt that starts for 2 s, restores for 1 s, compiles for 2 s, and then trains and saves."""
    run.supervisor(number, start, "started", pid=1)
    run.program(number, start + 3, "restored" if number else "fresh", step=steps[0], seconds=1.0)
    run.program(number, start + 5, "first_step", step=steps[0] + 1)
    for t in saves:
        run.program(number, t, "saved", step=0, reason="interval", blocking_s=blocking_s, durable_s=2 * blocking_s)
    run.program(number, end, "metrics", step=steps[1], values={"loss": 1.0})
    run.supervisor(number, end, "exited", outcome=outcome, reason=reason)
    run.outcome(number, outcome=outcome, reason=reason, step=steps[1], committed_step=committed, ended=end, node=node)


# What happened.


def test_killed_and_preempted(tmp_path: Path, utc: None) -> None:
    """A kill says where and what it took back, a preemption how soon all was committed; both what they cost."""
    told = story(ledgers.interrupted(tmp_path / "r"), state="done")
    assert texts(told) == [
        "The run was submitted and started 60 s later.",
        "Attempt 0 was killed by SIGKILL at step 80 on n1. 30 steps lost; it cost 60 s (31 s of training, "
        "9.0 s waiting, 8.0 s starting, 4.0 s restoring, 8.0 s compiling).",
        "Attempt 1 was told to stop (SIGTERM) at step 100; everything was committed 4.00 s after the notice. No step "
        "lost; it cost 2 min 0 s (4.0 s saving, 1.0 s stopping, 102 s waiting, 6.0 s starting, 1.0 s restoring, "
        "6.0 s compiling).",
        "The run ended as done at step 130 after 3 attempts and 6 min 42 s: goodput 32.1 %, 0.92 of 2.21 not for "
        "training.",
    ]
    assert [(one.t, one.cause, one.attempt, one.cost_s) for one in told.story] == [
        (0.0, "submitted", None, 60.0),
        (171.0, "killed", 0, 60.0),
        (255.0, "preempted", 1, 120.0),
        (402.0, "end", None, 0.0),
    ]


def test_stalled_late_resumed_and_damaged(tmp_path: Path) -> None:
    """A stall, a notice that was not served in time, a resume by hand, a damaged checkpoint, while the run is alive."""
    told = story(ledgers.troubled(tmp_path / "r"), state="running", now=1172.0)
    assert texts(told) == [
        "The run was submitted and started 1.0 s later.",
        "Attempt 0 hung in phase stepping at step 40; after 60 s without progress it was given up. 40 steps lost; "
        "it cost 110 s (62 s of silence, 40 s of training, 2.0 s waiting, 2.0 s starting, 2.0 s restoring, 2.0 s "
        "compiling).",
        "Attempt 1 was killed at step 52 after a notice (gce) that it could not serve in time: the supervisor was "
        "killed. 22 steps lost; it cost 40 s (22 s of training, 8.0 s saving, 2.0 s waiting, 3.0 s starting, "
        "5.0 s compiling).",
        "It had ended (failed: too many failures) and was resumed by hand 16 min 40 s later.",
        "The checkpoint of step 30 was damaged: default/d/0 has another checksum. It was set aside and an older one "
        "used.",
        "The run is running at step 11 after 3 attempts and 2 min 52 s: goodput 7.0 %.",
    ]


def test_other_endings(run: ledgers.Written) -> None:
    """The program's own failure, storage, a mistake, an end that nobody could write, a notice during the imports."""
    life(run, 0, 0, 20, "failed", "exit code 1: ValueError: bad batch", committed=0)
    life(run, 1, 20, 40, "storage", "exit code 74: the bucket is gone", committed=0)
    run.supervisor(2, 40, "started", pid=1)
    run.supervisor(2, 41, "notice", source="SIGTERM")
    run.supervisor(2, 42, "exited", outcome="preempted", reason="stopped on SIGTERM")
    run.supervisor(3, 42, "started", pid=1)
    run.supervisor(3, 43, "exited", outcome="config", reason="exit code 78: no optimizer")
    told = texts(story(run))
    assert [text.partition(". ")[0] for text in told[1:5]] == [
        "Attempt 0 failed at step 10: exit code 1: ValueError: bad batch",
        "Attempt 1 could not commit or restore at step 10: exit code 74: the bucket is gone",
        "Attempt 2 was told to stop (SIGTERM) before it had a step; there was nothing to save yet",
        "Attempt 3 cannot work as it is before it had a step: exit code 78: no optimizer",
    ]


def test_a_notice_that_could_not_be_served_whole(run: ledgers.Written) -> None:
    """What the program could not commit after a notice is told with its reason, and is no hit."""
    run.supervisor(0, 0, "started")
    run.program(0, 3, "fresh", step=0)
    run.program(0, 5, "first_step", step=1)
    run.program(0, 20, "saved", step=10, reason="interval", blocking_s=0.0, durable_s=2.0)
    run.supervisor(0, 30, "notice", source="SIGTERM", deadline_s=5.0)
    run.program(0, 34, "notice", source="SIGTERM", age_s=4.0, step=20)
    run.program(0, 35, "stopped", step=10, notice_to_commit_s=5.0, lost_steps=10, why="a step takes longer")
    run.supervisor(0, 35, "exited", outcome="preempted", reason="stopped on SIGTERM")
    run.outcome(0, outcome="preempted", step=20, committed_step=10, ended=35.0)
    assert texts(story(run))[1].startswith(
        "Attempt 0 was told to stop (SIGTERM) at step 20; its newest steps could not be committed: a step takes "
        "longer. 10 steps lost; it cost 17 s (16 s of training, 1.0 s saving)."
    )
    found = measure(read_history(run.store))
    assert astuple(found.preemption)[3:] == (0.0, None)
    assert found.progress.lost_steps == 10


def test_saves_and_uploads_that_failed(run: ledgers.Written) -> None:
    """Saves that failed and a bucket that did not answer are told once an attempt, with the first reason."""
    life(run, 0, 0, 100, "done", "finished", committed=10)
    run.program(0, 30, "save_failed", step=3, reason="no space left on /data.")
    run.program(0, 40, "save_failed", step=4, reason="no space left on /data.")
    run.supervisor(0, 50, "upload_failed", reason="gs://b does not answer")
    run.supervisor(0, 80, "upload_back", after_s=30.0)
    life(run, 1, 100, 200, "done", "finished", committed=20)
    run.program(1, 130, "save_failed", step=13, reason="no space left on /data.")
    run.program(1, 140, "saved", step=14, reason="interval", blocking_s=0.0, durable_s=2.0)
    run.program(1, 150, "unchanged", step=20, kind="unchanged", count=1, reason="step 20 holds the same as step 14")
    assert texts(story(run))[1:-1] == [
        "2 saves of attempt 0 failed: no space left on /data. Step 4 is not saved, and nothing after it.",
        "Uploads of attempt 0 failed for 30 s: gs://b does not answer.",
        "A save of attempt 1 failed: no space left on /data.",
        "Attempt 1 saved nothing new: step 20 holds the same as step 14.",
    ]


def test_hundreds_of_interruptions(run: ledgers.Written) -> None:
    """Of hundreds the costliest are told one by one and the rest together, so that the costs still add up."""
    for number in range(100):
        life(run, number, number * 50, number * 50 + 45, "preempted", steps=(number, number + 1), committed=number + 1)
    told = story(run)
    assert len(told.story) == 28
    rest = next(one for one in told.story if one.cause == "more")
    assert rest.text.startswith("75 more interruptions cost ")
    ended = [one for one in told.story if one.cause in ("preempted", "more")]
    assert sum(one.cost_s for one in ended) == pytest.approx(sum(one.ending_s for one in measured(run)))


def measured(run: ledgers.Written) -> list[Any]:
    """Return a run's attempts."""
    return measure(read_history(run.store)).attempts


# What would avoid it.


def test_nothing_to_advise(tmp_path: Path) -> None:
    """A run that went well gets no advice but about what it spent on saving."""
    assert set(advice(ledgers.smooth(tmp_path / "r"))) <= {"interval"}


def test_a_larger_grace(run: ledgers.Written) -> None:
    """A notice that left no time for the save asks for twice what a save takes; one that did asks to look why."""
    life(run, 0, 0, 100, "killed", saves=[50.0], blocking_s=20.0)
    run.supervisor(0, 100, "notice", source="SIGTERM")
    assert advice(run)["grace"] == (
        "1 of 1 notice ended before the save was committed. A save took up to 40 s: ask for a grace period of 80 s "
        "(there were 30 s)."
    )
    run.supervisor(0, 100, "notice", source="gce", deadline_s=300.0)
    assert advice(run)["grace"] == (
        "1 of 1 notice ended before the save was committed, although 5 min 0 s were given and a save took at most "
        "40 s: jobkit logs --attempt 0."
    )


def test_saves_too_far_apart(run: ledgers.Written) -> None:
    """Losses that are long against what a save costs ask for the interval that costs least.

    Held 2 x 1000 s with 2 losses: one in 1000 s. A save weighs 0.2 s and 1 % of 0.2 s: sqrt(2 * 0.202 * 1000) = 20 s.
    """
    for number in range(2):
        start = number * 1000
        saves = [start + 405, start + 805]
        life(run, number, start, start + 1000, "killed", "killed by SIGTERM", saves=saves, blocking_s=0.2)
    assert advice(run)["interval"] == (
        "2 interruptions took back 33 min 10 s of training; the run saved every 6 min 40 s. For a save that blocks "
        "0.20 s and this many losses, save_every='20s' costs least; 'auto' finds it."
    )


def test_saves_of_its_own_too_far_apart(run: ledgers.Written) -> None:
    """Of a program that saves by itself it is said how often it did, and how often it should; save_every is not its."""
    for number in range(2):
        start = number * 1000.0
        run.supervisor(number, start, "started", pid=1)
        run.program(number, start + 3, "restored" if number else "fresh", step=100 * number, seconds=1.0)
        for step in (50, 100):
            saved = {"step": 100 * number + step, "reason": "asked", "blocking_s": 0.2, "durable_s": 0.4}
            run.program(number, start + 400 * step / 50, "saved", **saved)
        run.supervisor(number, start + 1000, "exited", outcome="killed")
        run.outcome(number, outcome="killed", step=100 * number + 110, committed_step=100 * number + 100)
    assert advice(run)["interval"] == (
        "2 interruptions took back 6 min 41 s of training; the run saved every 50 steps, 6 min 40 s apart, by its own "
        "save(). For a save that blocks 0.20 s and this many losses, a save every 20 s costs least."
    )


def test_saves_too_often(run: ledgers.Written) -> None:
    """Saves that cost more than the losses they avoid ask for a longer interval: 9 s in 105 s are 8.6 times 1 %."""
    life(run, 0, 0, 105, "done", "finished", committed=10, saves=[15.0 + 10 * index for index in range(9)])
    assert advice(run)["interval"] == (
        "Saving every 10 s took 8.6 % of the time, more than the losses it avoided: a longer save_every, such as "
        "'86s' or 'auto', costs about 1 %."
    )


def test_a_bad_node(run: ledgers.Written) -> None:
    """A node on which attempts die while they do well on others is named."""
    for number, node in enumerate(["bad", "good", "bad"]):
        outcome = "killed" if node == "bad" else "preempted"
        life(run, number, number * 50, number * 50 + 40, outcome, "killed by SIGBUS", node=node)
    assert advice(run)["node"] == "2 of 2 bad endings were on bad: leave it out (--sbatch exclude=bad)."


def test_one_node_alone_is_no_proof(run: ledgers.Written) -> None:
    """Where everything ran on one node, it is not blamed."""
    for number in range(3):
        life(run, number, number * 50, number * 50 + 40, "killed", "killed by SIGBUS", node="only")
    assert "node" not in advice(run)


def test_memory(run: ledgers.Written) -> None:
    """Memory is named where the reason says it, and suspected where SIGKILL comes again and again without a notice."""
    for number in range(2):
        life(run, number, number * 50, number * 50 + 40, "killed", "killed by SIGKILL")
    assert advice(run)["memory"] == (
        "2 attempts got a SIGKILL without a notice, as the kernel does when memory is out: look for 'oom' in the "
        "node's log, and ask for more memory if it is there."
    )
    life(run, 2, 100, 140, "killed", "killed by SIGKILL: out of memory, limit 4.0 GB")
    assert texts(story(run))[3].startswith(
        "Attempt 2 was killed by SIGKILL at step 10 on n1: out of memory, limit 4.0 GB. 10 steps lost; "
    )
    assert advice(run)["memory"] == (
        "Attempt 2 ran out of memory (killed by SIGKILL: out of memory, limit 4.0 GB): ask for more, or use less."
    )


def test_words_that_only_sound_like_memory(run: ledgers.Written) -> None:
    """A program's own error is not taken for want of memory because of its letters."""
    life(run, 0, 0, 40, "failed", "exit code 1: ValueError: boom: no room for memory_bank")
    assert "memory" not in advice(run)


def test_a_hang_and_a_failing_program(run: ledgers.Written) -> None:
    """Both say where to look; a program that fails at one step again and again is not mended by a restart."""
    life(run, 0, 0, 100, "stalled", "no step")
    run.supervisor(0, 99, "stalled", phase="first_step", waited_s=50.0, frame="train.py:7 (load)")
    run.supervisor(0, 99, "notice", source="watchdog", reason="no progress for 50 s", deadline_s=30.0)
    told = texts(story(run))[1]
    assert "hung in phase first step at step 10, in train.py:7 (load); after 50 s without progress it was" in told
    assert "grace" not in advice(run)
    for number in (1, 2):
        life(run, number, number * 100, number * 100 + 50, "failed", "exit code 1", steps=(0, 7))
    told = advice(run)
    assert told["stalled"] == "1 attempt hung (0): what each thread did is in the log, jobkit logs --attempt 0."
    assert told["program"] == "The program failed 2 times at step 7, which no restart mends: jobkit logs --attempt 2."


def test_recompiled(run: ledgers.Written) -> None:
    """What a restart compiled again is counted, but for what only a restart runs."""
    for number in range(2):
        life(
            run, number, number * 20, number * 20 + 20, "preempted", committed=10, steps=(number * 10, 10 + number * 10)
        )
    run.program(0, 6, "compiled", hits=0, misses=5, seconds=2.0)
    assert "compile" not in advice(run)
    run.program(1, 26, "compiled", hits=3, misses=1, seconds=2.0)
    assert "compile" not in advice(run)  # what only a restart runs
    run.program(1, 26, "compiled", hits=9, misses=1, seconds=0.3, again=["add"], why="jax was 1 and is 2")
    assert "compile" not in advice(run)  # nobody waited for that
    run.program(1, 27, "compiled", hits=3, misses=3, seconds=2.4, again=["step", "evaluate"], why="jax was 1 and is 2")
    assert (
        advice(run)["compile"] == "After a restart 3 programs had to be compiled again, in 2.7 s: jax was 1 and is 2."
    )


def test_no_compile_cache(run: ledgers.Written) -> None:
    """A cache is recommended where programs were compiled without one, not where first steps are long by themselves."""
    for number in range(2):
        steps = (number * 10, 10 + number * 10)
        life(run, number, number * 20, number * 20 + 20, "preempted", committed=10, steps=steps)
    assert "compile" not in advice(run)
    for number in range(2):
        run.program(number, 6 + 20 * number, "compiled", hits=0, misses=0, seconds=2.0)
    assert advice(run)["compile"] == (
        "10.0 % of the time went into 2 first steps, mostly compiling; JAX's compilation cache "
        "(JAX_COMPILATION_CACHE_DIR) keeps that from one attempt to the next."
    )
    run.program(1, 27, "compiled", hits=3, misses=0, seconds=0.1)
    assert "compile" not in advice(run)


def test_a_notice_of_its_own_supervisor(run: ledgers.Written) -> None:
    """That a watchdog gives up, or a newer attempt takes over, is no preemption, and no save that was missed."""
    for number, source in enumerate(("watchdog", "process 1: watchdog", "superseded", "gce")):
        life(run, number, number * 100, number * 100 + 50, "preempted", "stopped on notice", steps=(0, 7))
        run.program(number, number * 100 + 40, "notice", source=source, step=7)
    history = read_history(run.store, state="")
    found = measure(history)
    assert astuple(found.preemption)[:3] == (1, 1, 0)
    assert advice(run)["grace"].startswith("1 of 1 notice ended before the save was committed")
    told = [one.text for one in explain(found, history).story if one.cause == "preempted"]
    assert told[2].startswith("Attempt 2 was told to stop (superseded) at step 7. ")
    assert "; its newest steps could not be committed" in told[3]


def test_docker_kill_is_no_notice(run: ledgers.Written) -> None:
    """A program that sees its supervisor die, killed with it or not, was given no notice that could be missed."""
    life(run, 0, 0, 50, "killed", "the supervisor was killed (SIGKILL)", steps=(0, 7))
    run.program(0, 50, "notice", source="supervisor", reason="the supervisor of this attempt is gone", step=7)
    life(run, 1, 60, 100, "preempted", "the supervisor was killed (SIGKILL); the program ended with exit code 75")
    run.program(1, 99, "notice", source="supervisor", step=10)
    run.program(1, 100, "stopped", step=10, notice_to_commit_s=0.25)
    told = story(run)
    found = measure(read_history(run.store))
    assert astuple(found.preemption)[:4] == (0, 0, 0, None)
    assert [text.partition(". ")[0] for text in texts(told)[1:3]] == [
        "Attempt 0 was killed at step 7 on n1: the supervisor was killed (SIGKILL)",
        "Attempt 1 stopped at step 10: its supervisor was gone; everything was committed 0.25 s later",
    ]
    assert advice(run) == {}


def of_two(run: ledgers.Written, *, warned: tuple[int, ...]) -> None:
    """Write an attempt of two processes of which process 1 is killed, with notices in those that are named."""
    life(run, 0, 0, 50, "killed", "process 1 on n2: killed by SIGKILL", steps=(0, 7))
    run.writer(0, "supervisor-1", 0, "started", pid=2)
    run.writer(0, "1", 3, "opened")
    for process in warned:
        run.writer(0, f"supervisor-{process}" if process else "supervisor", 40, "notice", source="SIGTERM")
    run.writer(0, "supervisor-1", 39, "exited", exit_code=137, outcome="killed", reason="killed by SIGKILL")


def test_the_end_of_a_peer_is_no_notice(run: ledgers.Written) -> None:
    """The SIGTERM with which a launcher ends what is left of an attempt is none; one that reaches all is."""
    of_two(run, warned=(0,))
    found = measure(read_history(run.store))
    assert (found.attempts[0].notice, *astuple(found.preemption)[:2]) == ("peer", 0, 0)
    assert texts(story(run))[1].startswith("Attempt 0 was killed at step 7 on n1: process 1 on n2: killed by SIGKILL. ")
    assert "grace" not in advice(run)
    warned = ledgers.Written(run.path.with_name("warned"))
    of_two(warned, warned=(0, 1))
    found = measure(read_history(warned.store))
    assert (found.attempts[0].notice, *astuple(found.preemption)[:3]) == ("SIGTERM", 1, 1, 0)
    assert "after a notice (SIGTERM) that it could not serve in time" in texts(story(warned))[1]


def test_a_peer_that_left_in_order_is_no_death(run: ledgers.Written) -> None:
    """A process that was through before the notice came has not died of anything."""
    life(run, 0, 0, 50, "preempted", "stopped on SIGTERM", steps=(0, 7))
    run.writer(0, "supervisor-1", 39, "exited", exit_code=0, outcome="done", reason="finished")
    run.supervisor(0, 40, "notice", source="SIGTERM")
    found = measure(read_history(run.store))
    assert (found.attempts[0].notice, found.preemption.notices) == ("SIGTERM", 1)


def test_a_slow_bucket(run: ledgers.Written) -> None:
    """Uploads that crawl ask for a bucket that is nearer; quick or small ones do not."""
    life(run, 0, 0, 200, "done", "finished", committed=10)
    run.supervisor(0, 60, "uploaded", step=1, seconds=0.5, bytes=1_000)
    assert "bucket" not in advice(run)
    run.supervisor(0, 160, "uploaded", step=2, seconds=99.5, bytes=500_000_000)
    assert advice(run)["bucket"] == (
        "2 uploads ran at 5.0 MB/s: a bucket in the region of the machines is several times faster."
    )


def test_a_long_queue_and_a_bad_disk(tmp_path: Path) -> None:
    """Waiting that takes most of the time is named, and so is storage that changes what was committed."""
    run = ledgers.Written(tmp_path / "r")
    run.launcher(0, "submitted")
    life(run, 0, 3600, 3700, "done", "finished", committed=10)
    assert advice(run)["queue"] == (
        "97.3 % of the time the job was queued: a shorter --time or another partition starts sooner."
    )
    assert advice(ledgers.troubled(tmp_path / "t"))["disk"] == (
        "1 checkpoint changed on storage after the commit: have the disk looked at."
    )


# Any history, and the command.


@given(histories)
@settings(deadline=None, max_examples=60)
def test_any_history_is_told(history: History) -> None:
    """Whatever the ledgers hold, a story comes of it, in order of time up to its end, and it is JSON."""
    from launch.lifecycle.run_status import to_json

    told = explain(measure(history), history)
    times = [one.t for one in told.story if one.cause != "end"]
    assert times == sorted(times)
    assert all(one.text.endswith(".") for one in told.story)
    assert json.loads(to_json(told))["run"] == ""


def test_command(tmp_path: Path) -> None:
    """`jobkit explain` prints the story with its times and the advice below; `--json` the same as one document."""
    project = Project(tmp_path)
    run = ledgers.interrupted(project.runs / "a")
    run.supervisor(2, 390, "uploaded", step=130, seconds=99.5, bytes=500_000_000)
    done = project.cli("explain", str(run.path), TZ="UTC")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "1970-01-01 00:00:00  The run was submitted and started 60 s later."
    assert lines[1].startswith("1970-01-01 00:02:51  Attempt 0 was killed by SIGKILL at step 80 on n1. ")
    assert lines[4:6] == ["", "Next time:"]
    assert lines[6].startswith("- ")
    told = json.loads(project.cli("explain", str(run.path), "--json").stdout)
    assert [one["text"] for one in told["story"]] == texts(story(run, state="done"))
    ledgers.smooth(project.runs / "b")
    two = project.cli("explain", str(project.runs))
    assert two.returncode == 2
    assert "holds 2 runs; explain one of them" in two.stderr


def test_nothing_is_told_twice(run: ledgers.Written) -> None:
    """Attempts that end alike for the same reason: it is told once, and each later one refers to the first."""
    run.launcher(0, "submitted")
    for number in range(3):
        life(run, number, 10.0 * number, 10.0 * number + 5, "failed", "ValueError: boom (exit code 1)")
    told = texts(story(run, state="failed"))
    assert sum("boom" in text for text in told) == 1
    assert [text.partition(". ")[0] for text in told if text.startswith(("Attempt 1", "Attempt 2"))] == [
        "Attempt 1 ended as attempt 0 did",
        "Attempt 2 ended as attempt 0 did",
    ]

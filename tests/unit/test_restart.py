"""The restart decision: examples of every rule, and properties over any history."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit.contract import Outcome, State
from launch.lifecycle.restart import Decision, Ended, Policy, decide

CODES = {"done": 0, "preempted": 75, "storage": 74, "config": 78, "stalled": 76, "failed": 1, "killed": 137}
INTERRUPTED = [Outcome.PREEMPTED, Outcome.STORAGE, Outcome.STALLED, Outcome.FAILED, Outcome.KILLED]


def ended(outcome: str, committed: int = -1, step: int = -1) -> Ended:
    return Ended(Outcome(outcome), CODES[outcome], committed, step)


def after(*history: Ended, **policy: int) -> Decision:
    return decide(history, Policy(**policy))


endings = st.builds(
    lambda outcome, committed: ended(outcome, committed),
    st.sampled_from(list(Outcome)),
    st.integers(-1, 30),
)
interruptions = endings.filter(lambda one: one.outcome in INTERRUPTED)


@pytest.mark.parametrize(
    ("history", "delay_s"),
    [
        ([ended("preempted", 5)], 0.0),
        ([ended("preempted")] * 3, 0.0),
        ([ended("preempted")] * 4, 1.0),
        ([ended("preempted")] * 6, 4.0),
        ([ended("preempted")] * 19, 60.0),
        ([ended("preempted")] * 19 + [ended("preempted", 1)], 0.0),
        ([ended("killed", 5)], 1.0),
        ([ended("killed")] * 2, 2.0),
        ([ended("killed")] * 4, 8.0),
        ([ended("killed")] * 4 + [ended("killed", 1)], 1.0),
        ([ended("storage")] * 9, 60.0),
        ([ended("stalled")] * 2, 2.0),
        ([ended("failed", 5)], 1.0),
        ([ended("failed", 5), ended("failed", 6)], 1.0),
        ([ended("failed", 5), ended("preempted", 6), ended("failed", 6)], 1.0),
    ],
)
def test_restarts(history: list[Ended], delay_s: float) -> None:
    """Every cause is restarted within its budget, with its delay."""
    decision = after(*history)
    assert (decision.action, decision.delay_s, decision.state) == ("restart", delay_s, State.REQUEUED)


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        ([ended("config")], "no restart can help (exit code 78)"),
        ([ended("failed")], "failed (exit code 1) before committing anything"),
        (
            [ended("failed", 5, 7), ended("failed", 5, 7)],
            "failed twice at step 7 (exit code 1) without committing anything newer than step 5 in between",
        ),
        (
            [ended("failed", 5, 7), ended("killed", 5), ended("failed", 5, 7)],
            "failed twice at step 7 (exit code 1) without committing anything newer than step 5 in between",
        ),
        ([ended("preempted")] * 20, "no progress: preempted 20 times without committing a new step"),
        ([ended("storage")] * 10, "no progress: could not commit or restore 10 times without committing a new step"),
        ([ended("stalled")] * 3, "no progress: stalled 3 times without committing a new step"),
        ([ended("killed")] * 5, "no progress: killed 5 times without committing a new step"),
        ([ended("failed", n) for n in range(11)], "11 failures, and 10 are allowed (--max-failures)"),
    ],
)
def test_stops(history: list[Ended], reason: str) -> None:
    """Every cause ends the run when its budget is used up, and says so."""
    decision = after(*history)
    assert (decision.action, decision.reason, decision.state) == ("stop", reason, State.FAILED)


def test_what_was_committed_before_the_start_is_no_progress() -> None:
    """A resumed run that fails at once stops at once, though it has checkpoints."""
    decision = after(ended("failed", 100), committed_at_start=100)
    assert decision.reason == "failed (exit code 1) before committing anything newer than step 100"


def test_no_failures_allowed() -> None:
    """With max_failures 0 the first failure ends the run, progress or not."""
    assert not after(ended("failed", 5), max_failures=0).restart
    assert after(ended("killed", 5), max_failures=0).restart


@given(st.lists(endings), st.sampled_from(["done", "config"]))
def test_never_restarts_after_done_or_config(history: list[Ended], last: str) -> None:
    """Nothing that came before brings back a run that is done or cannot be helped."""
    decision = after(*history, ended(last))
    assert not decision.restart
    assert decision.state is (State.DONE if last == "done" else State.FAILED)


@given(st.lists(interruptions, min_size=1), st.integers(-1, 30))
def test_without_progress_it_stops(history: list[Ended], at_start: int) -> None:
    """Whatever mixture of causes: without a new commit a run ends within 40 attempts."""
    idle = [dataclasses.replace(one, committed_step=at_start) for one in history * 40]
    policy = Policy(committed_at_start=at_start)
    first = next(n for n in range(1, len(idle) + 1) if not decide(idle[:n], policy).restart)
    assert first <= 1 + sum((policy.idle_preempted, policy.idle_storage, policy.idle_stalled, policy.idle_killed))


@given(st.data(), st.integers(0, 4), st.integers(0, 12))
def test_no_history_goes_on_for_ever(data: st.DataObject, commits: int, max_failures: int) -> None:
    """Stalls, kills, preemptions, outages and failures in any order: the attempts are bounded by what was committed."""
    policy = Policy(max_failures=max_failures)
    idle = policy.idle_preempted + policy.idle_storage + policy.idle_stalled + policy.idle_killed
    history: list[Ended] = []
    newest = -1
    while True:
        outcome = data.draw(st.sampled_from(INTERRUPTED))
        if commits and data.draw(st.booleans()):
            newest, commits = newest + 1, commits - 1
        history.append(ended(outcome, newest))
        if not decide(history, policy).restart:
            break
        # Between two commits each cause has its own budget, less than all of them together, and a failure has one.
        assert len(history) <= (newest + 2) * (idle + 1)
    stalls = sum(one.outcome in (Outcome.STALLED, Outcome.FAILED) for one in history)
    assert stalls <= max_failures + 1


@given(st.lists(endings))
def test_preempted_with_progress_restarts_at_once(history: list[Ended]) -> None:
    """A preemption after a new commit is free, whatever the history."""
    best = max((one.committed_step for one in history), default=-1)
    decision = after(*history, ended("preempted", best + 1))
    assert (decision.action, decision.delay_s) == ("restart", 0.0)


@given(st.lists(endings, min_size=1), st.integers(0, 5), st.integers(-1, 30))
def test_decision_is_sane_and_deterministic(history: list[Ended], max_failures: int, at_start: int) -> None:
    """The same history gives the same decision; delays lie within a minute; state and action agree."""
    policy = Policy(max_failures=max_failures, committed_at_start=at_start)
    decision = decide(history, policy)
    assert decision == decide(list(history), policy)
    assert 0 <= decision.delay_s <= 60
    assert decision.restart == (decision.state is State.REQUEUED)
    assert decision.restart or decision.delay_s == 0
    assert decision.reason


@given(st.lists(interruptions, min_size=1), st.integers(-1, 30))
def test_progress_never_stops_a_run_earlier(history: list[Ended], at_start: int) -> None:
    """If the last attempt had committed something new, a run that goes on would go on too, and no later."""
    policy = Policy(committed_at_start=at_start)
    best = max([at_start, *(one.committed_step for one in history)])
    more = [*history[:-1], dataclasses.replace(history[-1], committed_step=best + 1)]
    before, with_progress = decide(history, policy), decide(more, policy)
    if before.restart:
        assert with_progress.restart
        assert with_progress.delay_s <= before.delay_s


@given(st.lists(endings, min_size=1), st.integers(0, 1000))
def test_only_order_of_steps_counts(history: list[Ended], shift: int) -> None:
    """Shifting every step, the start's too, changes no decision."""
    moved = [dataclasses.replace(one, committed_step=one.committed_step + shift) for one in history]
    before = decide(history, Policy())
    after_shift = decide(moved, Policy(committed_at_start=shift - 1))
    assert (before.action, before.delay_s) == (after_shift.action, after_shift.delay_s)

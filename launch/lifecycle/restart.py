"""Whether a run goes on after an attempt ended: a pure function of how its attempts ended.

Progress means a newer committed step, nothing else: a step that was computed but not committed is computed again.
Every outcome has its own count of attempts since the last progress, so that no mixture of them goes on for ever.
"""

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jobkit.contract import Outcome, State, describe_exit

MAX_DELAY_S = 60.0


@dataclasses.dataclass(frozen=True)
class Ended:
    """How one attempt ended.

    Args:
        outcome: The outcome that the supervisor wrote, or the runner in its place.
        exit_code: 0..255.
        committed_step: Newest committed step at the end, -1 if there is none.
        step: Completed steps at the end, -1 if unknown.
        duration_s: How long the attempt lived; 0 if that is not known.
        unsaved: Whether it ended well without one step of the run, so that nothing of what it did is saved.
    """

    outcome: Outcome
    exit_code: int = 0
    committed_step: int = -1
    step: int = -1
    duration_s: float = 0.0
    unsaved: bool = False


class Cause(enum.StrEnum):
    """Why an attempt has ended or is to end, as who runs the machine has it."""

    PROGRAM = "own"
    """Nobody's doing but the program's: the machine stays, and the next attempt may start there at once."""
    PREEMPTED = "preempted"
    """Notice with a grace period; the machine will go, and whether the run is started again is not known."""
    REQUEUED = "requeued"
    """The job is queued again already: preemption without grace, a lost node, or an administrator."""
    TIME_LIMIT = "time limit"
    CANCELLED = "cancelled"
    """By a person; never undone."""
    GONE = "gone"
    """The job is being ended and will not start again; whether by a preemption or by a person is seen later."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """How long to go on.

    Args:
        max_failures: Failures and stalls, over the whole history, after which a run may still be restarted.
        committed_at_start: Newest committed step before the first attempt of the history, -1 if there was none.
        idle_preempted: Preemptions without progress in between that end the run; likewise the next three.
        free_preempted: Preemptions without progress that are restarted with no delay.
    """

    max_failures: int = 10
    committed_at_start: int = -1
    idle_preempted: int = 20
    idle_storage: int = 10
    idle_stalled: int = 3
    idle_killed: int = 5
    free_preempted: int = 3


@dataclasses.dataclass(frozen=True)
class Decision:
    """What happens next.

    Args:
        state: The run's state from here on; REQUEUED where another attempt is due.
        reason: One clause for a person.
        delay_s: Seconds before the restart, 0..60.
    """

    state: State
    reason: str
    delay_s: float = 0.0

    @property
    def restart(self) -> bool:
        """Whether another attempt is due."""
        return self.state is State.REQUEUED

    @property
    def action(self) -> str:
        """The decision in a word, as the ledger has it."""
        return "restart" if self.restart else "stop"


def budget_from(events: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Tell since when the attempts of a run count, in events of the launching side: the submit, or the last resume
    after an end. Where only the runner had died, whoever goes on has what budget is left.

    Returns:
        Number of the first attempt that counts, and the newest step that was committed before it, -1 for none.
    """
    begun: Mapping[str, Any] = {}
    for event in events:
        if event["event"] == "submitted" or (event["event"] == "resumed" and "attempts" in event):
            begun = event
    return begun.get("attempts", 0), begun.get("committed", -1)


def decide(history: Sequence[Ended], policy: Policy) -> Decision:
    """Decide after the last attempt of a history.

    Args:
        history: Attempts since the run was submitted or resumed, oldest first; not empty.
        policy: Budgets.
    """
    last = history[-1]
    if last.outcome is Outcome.DONE:
        step = _best(history, policy)
        reason = f"finished; step {step} is committed" if step >= 0 else "finished"
        if last.unsaved:
            reason = "finished, but without one step of the run: what it trained is not saved, its log says how"
        return Decision(State.DONE, reason)
    if last.outcome is Outcome.CONFIG:
        return _stop("no restart can help (exit code 78)")
    failures = sum(ended.outcome in (Outcome.FAILED, Outcome.STALLED) for ended in history)
    if last.outcome in (Outcome.FAILED, Outcome.STALLED) and failures > policy.max_failures:
        return _stop(f"{failures} failures, and {policy.max_failures} are allowed (--max-failures)")
    if last.outcome is Outcome.FAILED:
        return _after_failure(history, policy)
    return _after_interruption(history, policy)


def _stop(reason: str) -> Decision:
    return Decision(State.FAILED, reason)


def _restart(delay_s: float, reason: str) -> Decision:
    return Decision(State.REQUEUED, reason, min(delay_s, MAX_DELAY_S))


def _after_failure(history: Sequence[Ended], policy: Policy) -> Decision:
    """Restart after the program's own failure if a step was committed since its previous one."""
    last = history[-1]
    failures = [index for index, ended in enumerate(history) if ended.outcome is Outcome.FAILED]
    before = _best(history[: failures[-2] + 1] if len(failures) > 1 else (), policy)
    now = _best(history, policy)
    how = describe_exit(last.exit_code)
    if now > before:
        return _restart(1.0, f"failed ({how}), but step {now} was committed since the start or the failure before")
    if len(failures) > 1:
        newest = f"newer than step {now}" if now >= 0 else "at all"
        where = f" at step {last.step}" if last.step >= 0 else ""
        return _stop(f"failed twice{where} ({how}) without committing anything {newest} in between")
    return _stop(f"failed ({how}) before committing anything" + (f" newer than step {now}" if now >= 0 else ""))


def _after_interruption(history: Sequence[Ended], policy: Policy) -> Decision:
    """Restart after what is not the program's fault, unless it keeps happening without progress."""
    outcome = history[-1].outcome
    idle = sum(ended.outcome is outcome for ended in history[_last_progress(history, policy) + 1 :])
    words, limit = {
        Outcome.PREEMPTED: ("preempted", policy.idle_preempted),
        Outcome.STORAGE: ("could not commit or restore", policy.idle_storage),
        Outcome.STALLED: ("stalled", policy.idle_stalled),
        Outcome.KILLED: ("killed", policy.idle_killed),
    }[outcome]
    if idle >= limit:
        return _stop(f"no progress: {words} {idle} times without committing a new step")
    if outcome is Outcome.PREEMPTED and idle <= policy.free_preempted:
        return _restart(0.0, words)
    return _restart(_doubling(idle - (policy.free_preempted if outcome is Outcome.PREEMPTED else 0)), words)


def _doubling(count: int) -> float:
    """1, 1, 2, 4 ... 60 seconds for 0, 1, 2, 3 ... idle attempts."""
    return min(MAX_DELAY_S, 2.0 ** min(max(count - 1, 0), 10))


def _best(history: Sequence[Ended], policy: Policy) -> int:
    return max([policy.committed_at_start, *(ended.committed_step for ended in history)])


def _last_progress(history: Sequence[Ended], policy: Policy) -> int:
    """Return the index of the last attempt that committed something newer than all before it, -1 if none did."""
    best, last = policy.committed_at_start, -1
    for index, ended in enumerate(history):
        if ended.committed_step > best:
            best, last = ended.committed_step, index
    return last

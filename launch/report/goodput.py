"""From a run's history to what its time was spent on: the timeline, goodput and badput by cause, and what it cost.

The time of a run, from its submit until its end (until now while it is alive), is cut into intervals that follow one
another without gap or overlap; each has one phase, so that the shares of the phases sum to 1:

    train      steps that the run still has; goodput is the share of this phase, every other one is badput
    lost       training whose steps were taken back: all an attempt trained and saved after the newest step that a later
               attempt restored (or, once it has ended and nothing has followed, after the newest committed step); in a
               loop of the program's own its time is known, and not how many steps they were
    stalled    no step for more than ten times the longest one, and a minute: from the last sign of life until the next,
               or the end of the attempt, which a watchdog may have brought about
    save       training stood still for a save: the blocking part of a save, all of the last one
    emergency  from the moment the program left its loop on a notice until the commit
    stop       from there, or from the last commit, until all processes are gone
    start      from the start of the supervisor to the restore: imports and the program's own preparation
    restore    reading the checkpoint (`seconds` of `restored`)
    compile    from the restore to the end of the first step; a loop of the program's own does not tell that end, so
               there it is as many seconds as were spent compiling until the loop was noticed
    queue      from the submit, or the end of an attempt, until a scheduler started the job
    idle       between two attempts, in a job that was running: backoff, decisions, the launcher

The time between an `ended` and the `resumed` after it belongs to nobody and is left out (`off`).

Clocks are the writers' own wall clocks. Within one file the order written counts: a time before the one above it counts
as equal to it. An attempt ends at the latest where the next one begins, so what an old attempt still writes then moves
nothing. A jumping clock can thus make a share wrong, never their sum. An event that is missing lengthens the phase
before it; waiting for a save under way before the next one starts counts as training. Phases are those of process 0:
the processes of an attempt go in step.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import median

import msgspec

from jobkit.contract import Outcome
from launch.lifecycle.history import History, count_of, number_of
from launch.report.lives import Span, from_outside, notice_of, saved_on_notice, spans_of
from launch.report.timeline import Interval, Phase, blocked_s, timeline


class Spread(msgspec.Struct, frozen=True):
    """Some measurements."""

    count: int
    median: float
    max: float
    total: float


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt.

    Args:
        started, ended: Epoch seconds; `ended` None while it runs.
        outcome: One of `contract.Outcome`, '' while it runs or where nobody could write it.
        from_step: Completed steps with which it began; None if it got no state.
        to_step: Completed steps at its end; None if it got no state.
        lost_steps: Those of its steps that were taken back, as far as they are known.
        first_step_s: From its start to the end of its first step; None if it got none.
        notice: Source of the first notice it got, '' for none; 'supervisor' where its own supervisor had died, PEER
            where another process of it had.
        saved_on_notice: Whether all its steps were committed after a notice from outside; None without one, while it is
            being served, and where there was no step to save.
        unsaved: Why not all of them were, where the program could say it.
        notice_to_commit_s: Seconds from the notice to the commit.
        wait_s: Queue and idle seconds between its end and the next attempt.
        ending_s: What its ending cost the run: its own lost, stalled, emergency and stop seconds, the wait after it,
            and start, restore and compile of the attempt that followed; 0 for one that is done or runs.
        held_s: Its whole length.
        seconds: Of each phase.
        cost: Money for its length.
    """

    attempt: int
    started: float
    ended: float | None
    outcome: str
    reason: str
    node: str
    from_step: int | None
    to_step: int | None
    lost_steps: int
    first_step_s: float | None
    notice: str
    saved_on_notice: bool | None
    unsaved: str
    notice_to_commit_s: float | None
    wait_s: float
    ending_s: float
    held_s: float
    seconds: dict[Phase, float]
    cost: float | None


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """What a run's time was spent on.

    Args:
        total_s: From the submit to the end, without what lies between an end and the resume after it.
        held_s: In attempts: when something was allotted to the run.
        seconds, shares: By phase; the shares are of `total_s` and sum to 1 (all are 0 where no time has passed).
        goodput: Share of `train`.
        goodput_held: Seconds of `train` per held second.
        steps: Completed steps that the run still has.
        executed_steps: All steps that were ever completed, the same one as often as it was.
        lost_steps: Those of them that were taken back; see `lost_unseen`.
        repeated_steps: Those of them that had been completed before.
        notices: Attempts that got a notice from outside.
        to_save: Those of them that had steps to save, and are not being served just now.
        saved_on_notice: Those of these whose every step was committed.
        save_hit_rate: saved_on_notice / to_save; None without any.
        first_step_s: Of each attempt, from its start to the end of its first step.
        saves: How many were committed; `blocking_s` is the time that each kept training waiting, `durable_s` from its
            start to its commit, `save_bytes` the size of the newest.
        failed_saves: `save_failed` events.
        compile_hits, compile_misses, compile_s: Of the compile cache; None where no attempt told.
        stalls: Attempts that a watchdog ended.
        price_per_hour, cost: Money for `held_s`.
        cost_lost: Money for the part of `held_s` that was not `train`.
        off_s: See the module.
    """

    run: str
    name: str
    state: str
    reason: str
    submitted: float | None
    ended: float | None
    total_s: float
    held_s: float
    off_s: float
    seconds: dict[Phase, float]
    shares: dict[Phase, float]
    goodput: float
    goodput_held: float
    steps: int | None
    executed_steps: int
    lost_steps: int
    repeated_steps: int
    notices: int
    to_save: int
    saved_on_notice: int
    save_hit_rate: float | None
    notice_to_commit_s: Spread | None
    first_step_s: Spread | None
    saves: int
    failed_saves: int
    blocking_s: Spread | None
    durable_s: Spread | None
    save_bytes: int | None
    compile_hits: int | None
    compile_misses: int | None
    compile_s: float | None
    stalls: int
    price_per_hour: float | None
    cost: float | None
    cost_lost: float | None
    attempts: list[Attempt]
    intervals: list[Interval]


def measure(history: History) -> Goodput:
    """Measure what a run's time was spent on."""
    spans = spans_of(history)
    intervals = timeline(history, spans)
    seconds = {phase: _total(intervals, phase) for phase in Phase}
    off_s = seconds.pop(Phase.OFF)
    total_s = math.fsum(seconds.values())
    held_s = math.fsum(interval.seconds for interval in intervals if interval.attempt is not None)
    price = history.price_per_hour
    attempts = _attempts(spans, intervals, price)
    to_save = [one for one in attempts if one.saved_on_notice is not None]
    saved = [event for span in spans for event in span.life.program if event["event"] == "saved"]
    compiled = [event for span in spans for event in span.life.program if event["event"] == "compiled"]
    saved_on_notice = sum(bool(one.saved_on_notice) for one in to_save)
    executed = [range(span.first, span.last) for span in spans if span.first is not None and span.last is not None]
    lost_steps = sum(span.lost_steps for span in spans)
    return Goodput(
        run=history.run,
        name=history.name,
        state=history.state,
        reason=history.reason,
        submitted=intervals[0].start if intervals else None,
        ended=None if history.now is not None or not intervals else intervals[-1].end,
        total_s=total_s,
        held_s=held_s,
        off_s=off_s,
        seconds=seconds,
        shares={phase: spent / total_s if total_s else 0.0 for phase, spent in seconds.items()},
        goodput=seconds[Phase.TRAIN] / total_s if total_s else 0.0,
        goodput_held=seconds[Phase.TRAIN] / held_s if held_s else 0.0,
        steps=_steps(spans),
        executed_steps=sum(map(len, executed)),
        lost_steps=lost_steps,
        repeated_steps=sum(map(len, executed)) - _distinct(executed),
        notices=sum(from_outside(one.notice) for one in attempts),
        to_save=len(to_save),
        saved_on_notice=saved_on_notice,
        save_hit_rate=saved_on_notice / len(to_save) if to_save else None,
        notice_to_commit_s=_spread(one.notice_to_commit_s for one in attempts),
        first_step_s=_spread(one.first_step_s for one in attempts),
        saves=len(saved),
        failed_saves=sum(event["event"] == "save_failed" for span in spans for event in span.life.program),
        blocking_s=_spread(blocked_s(event) for event in saved),
        durable_s=_spread(number_of(event.get("durable_s")) for event in saved),
        save_bytes=count_of(saved[-1].get("bytes")) if saved else None,
        compile_hits=sum(count_of(event.get("hits")) or 0 for event in compiled) if compiled else None,
        compile_misses=sum(count_of(event.get("misses")) or 0 for event in compiled) if compiled else None,
        compile_s=math.fsum(number_of(event.get("seconds")) or 0.0 for event in compiled) if compiled else None,
        stalls=sum(one.outcome == Outcome.STALLED for one in attempts),
        price_per_hour=price,
        cost=None if price is None else price * held_s / 3600,
        cost_lost=None if price is None else price * (held_s - seconds[Phase.TRAIN]) / 3600,
        attempts=attempts,
        intervals=intervals,
    )


def _attempts(spans: Sequence[Span], intervals: Sequence[Interval], price: float | None) -> list[Attempt]:
    by_attempt: dict[int | None, list[Interval]] = {}
    waits: dict[int, float] = {}
    newest = None
    for interval in intervals:
        by_attempt.setdefault(interval.attempt, []).append(interval)
        if interval.attempt is not None:
            newest = interval.attempt
        elif newest is not None and interval.phase is not Phase.OFF:
            waits[newest] = waits.get(newest, 0.0) + interval.seconds
    spent = [
        {phase: _total(by_attempt.get(span.life.number, []), phase) for phase in Phase if phase not in _WAITS}
        for span in spans
    ]
    attempts = []
    for index, span in enumerate(spans):
        own, after = spent[index], spent[index + 1] if index + 1 < len(spans) else {}
        outcome, wait_s = span.life.outcome, waits.get(span.life.number, 0.0)
        exited = [event for _, event in span.at("exited")][-1:]
        ending = {**(exited[0] if exited else {}), **outcome}
        how = str(ending.get("outcome", ""))
        held_s = span.end - span.start
        cost_s = [own[phase] for phase in _ENDING] + [after.get(phase, 0.0) for phase in _BEGINNING] + [wait_s]
        first_step = span.at("first_step")[:1]
        stopped = [event for _, event in span.at("stopped")]
        whole = [number_of(event.get("notice_to_commit_s")) for event in stopped if not event.get("lost_steps")]
        attempts.append(
            Attempt(
                attempt=span.life.number,
                started=span.start,
                ended=None if span.running else span.end,
                outcome=how,
                reason=str(ending.get("reason", "")),
                node=str(outcome.get("node", "")),
                from_step=span.first,
                to_step=span.last,
                lost_steps=span.lost_steps,
                first_step_s=max(0.0, min(first_step[0][0], span.end) - span.start) if first_step else None,
                notice=notice_of(span.life),
                saved_on_notice=saved_on_notice(span),
                unsaved=str(stopped[0].get("why", "")) if stopped else "",
                notice_to_commit_s=whole[0] if whole else None,
                wait_s=wait_s,
                ending_s=0.0 if span.running or how == Outcome.DONE else math.fsum(cost_s),
                held_s=held_s,
                seconds=own,
                cost=None if price is None else price * held_s / 3600,
            )
        )
    return attempts


_WAITS = (Phase.QUEUE, Phase.IDLE, Phase.OFF)
_ENDING = (Phase.LOST, Phase.STALLED, Phase.EMERGENCY, Phase.STOP)
_BEGINNING = (Phase.START, Phase.RESTORE, Phase.COMPILE)


def _steps(spans: Sequence[Span]) -> int | None:
    known = [span for span in spans if span.last is not None]
    if not known or known[-1].last is None:
        return None
    return known[-1].last - known[-1].lost_steps


def _distinct(executed: Iterable[range]) -> int:
    count, end = 0, 0
    for steps in sorted(executed, key=lambda steps: steps.start):
        count += max(0, steps.stop - max(end, steps.start))
        end = max(end, steps.stop)
    return count


def _total(intervals: Iterable[Interval], phase: Phase) -> float:
    return math.fsum(interval.seconds for interval in intervals if interval.phase is phase)


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread(len(known), median(known), max(known), math.fsum(known)) if known else None


def lost_unseen(found: Attempt | Goodput) -> bool:
    """Tell whether training was taken back in a loop of the program's own, and nobody knows how many steps it was."""
    return found.lost_steps == 0 and found.seconds[Phase.LOST] >= _UNSEEN_S


_UNSEEN_S = 0.5
"""Less is what passes between a save and the end of an attempt in good order."""


def lost_of(found: Attempt | Goodput) -> str:
    """Write how many steps were taken back; '?' where nobody knows."""
    return "?" if lost_unseen(found) else f"{found.lost_steps:,}"


def by_share(found: Goodput) -> list[tuple[Phase, float]]:
    """Return the phases that took any time with their seconds, training first, then the costliest."""
    spent = [(phase, seconds) for phase, seconds in found.seconds.items() if seconds > 0]
    return sorted(spent, key=lambda pair: (pair[0] is not Phase.TRAIN, -pair[1]))

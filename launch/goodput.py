"""From a run's history to what its time was spent on: the timeline, goodput and badput by cause, and what it cost.

The time of a run, from its submit until its end (until now while it is alive), is cut into intervals that follow one
another without gap or overlap; each has one phase, so that the shares of the phases sum to 1:

    train      steps that the run still has; goodput is the share of this phase, every other one is badput
    lost       training whose steps were taken back: all an attempt trained and saved after the newest step that a later
               attempt restored (or, once it has ended and nothing has followed, after the newest committed step)
    stalled    from the last sign of life of a program that its watchdog gave up, to the end of the attempt
    save       training stood still for a save: the blocking part of a save, all of the last one
    emergency  from the moment the program left its loop on a notice until the commit
    stop       from there, or from the last commit, until all processes are gone
    start      from the start of the supervisor to the restore: imports and the program's own preparation
    restore    reading the checkpoint (`seconds` of `restored`)
    compile    from the restore to the end of the first step
    queue      from the submit, or the end of an attempt, until a scheduler started the job
    idle       between two attempts, in a job that was running: backoff, decisions, the launcher

The time between an `ended` and the `resumed` after it belongs to nobody and is left out (`off`).

Clocks are the writers' own wall clocks. Within one file the order written counts: a time before the one above it counts
as equal to it. An attempt ends at the latest where the next one begins, so what an old attempt still writes then moves
nothing. A jumping clock can thus make a share wrong, never their sum. An event that is missing lengthens the phase
before it; waiting for a save under way before the next one starts counts as training. Phases are those of process 0:
the processes of an attempt go in step.
"""

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import msgspec

from jobkit.contract import Outcome
from jobkit.ledger import Event
from launch.history import History, Life, count_of, number_of


class Phase(enum.StrEnum):
    """What a moment of a run was spent on."""

    TRAIN = "train"
    LOST = "lost"
    STALLED = "stalled"
    SAVE = "save"
    EMERGENCY = "emergency"
    STOP = "stop"
    START = "start"
    RESTORE = "restore"
    COMPILE = "compile"
    QUEUE = "queue"
    IDLE = "idle"
    OFF = "off"


class Interval(msgspec.Struct, frozen=True):
    """A stretch of time in one phase, of an attempt or, with `attempt` None, between two."""

    start: float
    end: float
    phase: Phase
    attempt: int | None = None

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


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
        lost_steps: Those of its steps that were taken back.
        first_step_s: From its start to the end of its first step; None if it got none.
        notice: Source of the first notice it got, '' for none.
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
        lost_steps: Those of them that were taken back.
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
    spans = _spans(history)
    _settle(spans)
    intervals = _timeline(history, spans)
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
        blocking_s=_spread(_blocked(event) for event in saved),
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


# One attempt in time and steps.


@dataclass
class _Span:
    """An attempt with its place on the run's timeline.

    Args:
        events: Of process 0 and its supervisor, at corrected times.
        running: Whether it has not ended.
        points: Times at which a number of completed steps was known, both rising.
        first, last: Completed steps with which it began and ended; None if it got no state.
        kept: Completed steps of which nothing was taken back.
    """

    life: Life
    events: list[tuple[float, Event]]
    start: float
    end: float
    running: bool
    points: list[tuple[float, int]]
    first: int | None = None
    last: int | None = None
    kept: int | None = None

    @property
    def lost_steps(self) -> int:
        """Steps of this attempt that were taken back."""
        if self.first is None or self.last is None or self.kept is None:
            return 0
        return max(0, self.last - max(self.first, self.kept))

    def at(self, name: str) -> list[tuple[float, Event]]:
        """Return the events of one name with their times."""
        return [(t, event) for t, event in self.events if event["event"] == name]


def _spans(history: History) -> list[_Span]:
    spans: list[_Span] = []
    newest = max((life.number for life in history.lives), default=-1)
    for life in sorted(history.lives, key=lambda life: life.number):
        program, supervisor = _rising(life.program), _rising(life.supervisor)
        events = sorted([*supervisor, *program], key=lambda pair: pair[0])
        ended = [t for t, event in supervisor if event["event"] == "exited"]
        wrote_end = number_of(life.outcome.get("ended"))
        running = not ended and not life.outcome and life.number == newest and history.now is not None
        start = events[0][0] if events else number_of(life.outcome.get("started"))
        if start is None:
            continue  # its number was claimed, and nothing more
        told = [ended[-1]] if ended else [wrote_end] if wrote_end is not None else [t for t, _ in events[-1:]]
        end = history.now if running and history.now is not None else max(told, default=start)
        spans.append(_Span(life, events, start, max(start, end), running, []))
    for earlier, later in pairwise(spans):
        later.start = max(later.start, earlier.start)
        later.end = max(later.end, later.start)
        earlier.end = min(earlier.end, later.start)
    for span in spans:
        _measure_steps(span)
    return spans


def _rising(events: Iterable[Event]) -> list[tuple[float, Event]]:
    """Return events with their times, a time before the one above it raised to it."""
    found, latest = [], -math.inf
    for event in events:
        latest = max(latest, float(event["t"]))
        found.append((latest, event))
    return found


def _measure_steps(span: _Span) -> None:
    points = []
    for t, event in span.events:
        step = count_of(event.get("step"))
        if step is None or event["event"] not in _TELL_STEP:
            continue
        durable_s = number_of(event.get("durable_s")) if event["event"] in ("saved", "skipped") else 0.0
        points.append((min(max(t - (durable_s or 0.0), span.start), span.end), step))
    ended = count_of(span.life.outcome.get("step"))
    if ended is not None:
        points.append((span.end, ended))
    first = _begun_at(span.life)
    if first is None and points:
        first = min(step for _, step in points)
    if first is None:
        return
    reached = span.first = first
    for t, step in sorted(points):
        if step >= reached:
            span.points.append((t, step))
            reached = step
    span.last = reached


_TELL_STEP = (
    "fresh",
    "restored",
    "first_step",
    "metrics",
    "saved",
    "skipped",
    "notice",
    "stopped",
    "finished",
    "raised",
)


def _settle(spans: Sequence[_Span]) -> None:
    """Find what each attempt's successors took back."""
    committed = -1
    for span in spans:
        begun = _begun_at(span.life)
        committed = committed if begun is None else begun  # what was newer is no more
        saved = [count_of(event.get("step")) for event in span.life.program if event["event"] in _COMMITTED]
        told = [*saved, count_of(span.life.outcome.get("committed_step"))]
        committed = max([committed, *(step for step in told if step is not None)])
        if not span.running:
            span.kept = committed
    resumed: int | None = None
    for span in reversed(spans):
        if resumed is not None:
            span.kept = resumed
        begun = _begun_at(span.life)
        if begun is not None:
            resumed = begun if resumed is None else min(resumed, begun)


_COMMITTED = ("saved", "skipped", "stopped", "finished")


def _begun_at(life: Life) -> int | None:
    """Return the completed steps with which an attempt began, None if it got no state."""
    begun = [event for event in life.program if event["event"] in ("fresh", "restored")]
    return count_of(begun[0].get("step", 0)) if begun else None


def _reached(span: _Span, step: int) -> float:
    """Return when an attempt had completed a number of steps; between two known points it went evenly."""
    before = (span.start, span.first or 0)
    for point in span.points:
        if point[1] >= step:
            gained = point[1] - before[1]
            part = (step - before[1]) / gained if gained > 0 else 1.0
            return before[0] + max(0.0, part) * (point[0] - before[0])
        before = point
    return span.end


# The timeline.


def _timeline(history: History, spans: Sequence[_Span]) -> list[Interval]:
    launcher = _rising(history.launcher)
    begun = [t for t, event in launcher if event["event"] == "submitted"][:1] or [t for t, _ in launcher[:1]]
    cursor = min([*begun, *(span.start for span in spans[:1])], default=None)
    if cursor is None:
        return []
    found: list[Interval] = []
    for index, span in enumerate(spans):
        found += _between(launcher, cursor, span.start, waits=index == 0)
        found += _phases(span)
        cursor = span.end
    ended = [t for t, event in launcher if event["event"] == "ended"][-1:]
    end = history.now if history.now is not None else max([cursor, *ended])
    requeued = any(t >= cursor and event["event"] == "requeued" for t, event in launcher)
    found += _between(launcher, cursor, max(end, cursor), waits=not spans or requeued)
    return _joined(interval for interval in found if interval.end > interval.start)


def _joined(intervals: Iterable[Interval]) -> list[Interval]:
    """Join neighbours of one attempt and phase."""
    found: list[Interval] = []
    for interval in intervals:
        before = found[-1] if found else None
        if before is not None and (before.phase, before.attempt) == (interval.phase, interval.attempt):
            found[-1] = Interval(before.start, interval.end, interval.phase, interval.attempt)
        else:
            found.append(interval)
    return found


def _between(launcher: Sequence[tuple[float, Event]], start: float, end: float, *, waits: bool) -> list[Interval]:
    """Cut the time between two attempts into off, queue and idle.

    Args:
        launcher: Events of the launching side.
        start: End of the attempt before.
        end: Start of the attempt after.
        waits: Whether it is a scheduler that starts the next attempt, where no `job_started` shows it.
    """
    inside = [(t, event["event"]) for t, event in launcher if start <= t <= end]
    began = [t for t, name in inside if name == "job_started"]
    queued_until = began[-1] if began else end if waits else start
    cuts = [(start, Phase.QUEUE), (queued_until, Phase.IDLE)]
    found = [Interval(a, b, phase) for (a, phase), b in zip(cuts, [queued_until, end], strict=True)]
    off_since: float | None = None
    for t, name in inside:
        if name == "ended":
            off_since = t if off_since is None else off_since
        elif name in ("resumed", "submitted") and off_since is not None:
            found = _paint(found, off_since, t, Phase.OFF)
            off_since = None
    return found if off_since is None else _paint(found, off_since, end, Phase.OFF)


_BEGINS = {"opened": Phase.START, "fresh": Phase.COMPILE, "restored": Phase.COMPILE, "first_step": Phase.TRAIN}
_LEAVES = {"notice": Phase.EMERGENCY, "stopped": Phase.STOP, "finished": Phase.STOP, "raised": Phase.STOP}


def _phases(span: _Span) -> list[Interval]:
    """Cut an attempt into phases."""
    number = span.life.number
    program = {id(event) for event in span.life.program}
    cuts = [(span.start, Phase.START)]
    for t, event in span.events:
        phase = _BEGINS.get(event["event"]) or _LEAVES.get(event["event"]) if id(event) in program else None
        if phase is not None:
            cuts.append((min(max(t, cuts[-1][0]), span.end), phase))
    ends = [*(t for t, _ in cuts[1:]), span.end]
    found = [Interval(a, b, phase, number) for (a, phase), b in zip(cuts, ends, strict=True)]
    for t, event in span.at("restored"):
        found = _paint(found, t - (number_of(event.get("seconds")) or 0.0), t, Phase.RESTORE, over=(Phase.START,))
    for t, event in [*span.at("saved"), *span.at("skipped")]:
        begun = t - (number_of(event.get("durable_s")) or 0.0)
        waited = begun + (_blocked(event) or 0.0)
        found = _paint(found, begun, waited, Phase.SAVE, over=(Phase.TRAIN, Phase.COMPILE))
    if span.kept is not None and span.lost_steps:
        since = _reached(span, max(span.kept, span.first or 0))
        found = _paint(found, since, span.end, Phase.LOST, over=(Phase.TRAIN, Phase.SAVE))
    for t, event in span.at("stalled")[-1:]:
        found = _paint(found, t - (number_of(event.get("waited_s")) or 0.0), span.end, Phase.STALLED)
    return found


def _paint(
    intervals: Iterable[Interval], start: float, end: float, phase: Phase, *, over: Sequence[Phase] = tuple(Phase)
) -> list[Interval]:
    """Return the same stretch of time with another phase from `start` to `end`, where it had one of `over`."""
    found = []
    for old in intervals:
        a, b = max(start, old.start), min(end, old.end)
        if old.phase not in over or b <= a:
            found.append(old)
            continue
        parts = [(old.start, a, old.phase), (a, b, phase), (b, old.end, old.phase)]
        found += [Interval(x, y, part, old.attempt) for x, y, part in parts if y > x]
    return found


def _blocked(event: Event) -> float | None:
    """Return how long a save kept training waiting: the last one, and one on notice, until it was durable."""
    last = event.get("reason") in ("end", "notice")
    return number_of(event.get("durable_s" if last else "blocking_s"))


# The figures.


def _attempts(spans: Sequence[_Span], intervals: Sequence[Interval], price: float | None) -> list[Attempt]:
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
    found = []
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
        found.append(
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
                notice=_notice(span.life),
                saved_on_notice=_saved_on_notice(span),
                unsaved=str(stopped[0].get("why", "")) if stopped else "",
                notice_to_commit_s=whole[0] if whole else None,
                wait_s=wait_s,
                ending_s=0.0 if span.running or how == Outcome.DONE else math.fsum(cost_s),
                held_s=held_s,
                seconds=own,
                cost=None if price is None else price * held_s / 3600,
            )
        )
    return found


_WAITS = (Phase.QUEUE, Phase.IDLE, Phase.OFF)
_ENDING = (Phase.LOST, Phase.STALLED, Phase.EMERGENCY, Phase.STOP)
_BEGINNING = (Phase.START, Phase.RESTORE, Phase.COMPILE)


def _notice(life: Life) -> str:
    """Return the source of an attempt's notice; the program knows it best."""
    heard = [event for event in (*life.program, *life.supervisor, *life.others) if event["event"] == "notice"]
    return str(heard[0].get("source") or "notice") if heard else ""


def from_outside(source: str) -> bool:
    """Tell whether a notice came from outside, rather than from the supervisor that gives its program up.

    Args:
        source: Where it came from; in a run of several processes perhaps by way of another one, '' for no notice.
    """
    return source != "" and source.rpartition(": ")[2] not in ("watchdog", "superseded")


def _saved_on_notice(span: _Span) -> bool | None:
    if not from_outside(_notice(span.life)) or span.running:
        return None
    if span.first is None or span.last is None or span.last <= span.first:
        return None
    served = [event for event in span.life.program if event["event"] in ("stopped", "finished")]
    return any(not event.get("lost_steps") for event in served)


def _steps(spans: Sequence[_Span]) -> int | None:
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


def by_share(found: Goodput) -> list[tuple[Phase, float]]:
    """Return the phases that took any time with their seconds, training first, then the costliest."""
    spent = [(phase, seconds) for phase, seconds in found.seconds.items() if seconds > 0]
    return sorted(spent, key=lambda pair: (pair[0] is not Phase.TRAIN, -pair[1]))

"""From a run's history to what its time was spent on: the timeline, goodput and badput by cause, and what it cost.

The time of a run, from its submit until its end (until now while it is alive), is cut into stretches that follow one
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
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median

import msgspec

from jobkit.contract import Outcome
from jobkit.rundir.ledger import Event
from launch.lifecycle.history import History, count_of, number_of
from launch.report.lives import Span, from_outside, named, notice_of, saved_on_notice, seconds_of, spans_of
from launch.report.phases import RunPhase
from launch.report.timeline import Stretch, blocked_s, timeline


class Spread(msgspec.Struct, frozen=True):
    """Some measurements."""

    count: int
    median: float
    max: float
    total: float


class AttemptFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What one attempt did and cost.

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
    seconds: dict[RunPhase, float]
    cost: float | None


class _Group(msgspec.Struct, frozen=True):
    """Figures that belong together; JSON has them beside those of the run."""


class TimeFigures(_Group, frozen=True, kw_only=True):
    """What a run's time was spent on.

    Args:
        total_s: From the submit to the end, without what lies between an end and the resume after it.
        held_s: In attempts: when something was allotted to the run.
        off_s: See the module.
        seconds, shares: By phase; the shares are of `total_s` and sum to 1 (all are 0 where no time has passed).
        goodput: Share of `train`.
        goodput_held: Seconds of `train` per held second.
    """

    total_s: float
    held_s: float
    off_s: float
    seconds: dict[RunPhase, float]
    shares: dict[RunPhase, float]
    goodput: float
    goodput_held: float


class StepFigures(_Group, frozen=True, kw_only=True):
    """What a run's steps came to.

    Args:
        steps: Completed steps that the run still has.
        executed_steps: All steps that were ever completed, the same one as often as it was.
        lost_steps: Those of them that were taken back; see `lost_unseen`.
        repeated_steps: Those of them that had been completed before.
    """

    steps: int | None
    executed_steps: int
    lost_steps: int
    repeated_steps: int


class NoticeFigures(_Group, frozen=True, kw_only=True):
    """What became of the notices.

    Args:
        notices: Attempts that got a notice from outside.
        to_save: Those of them that had steps to save, and are not being served just now.
        saved_on_notice: Those of these whose every step was committed.
        save_hit_rate: saved_on_notice / to_save; None without any.
        notice_to_commit_s: Of those that were served whole.
    """

    notices: int
    to_save: int
    saved_on_notice: int
    save_hit_rate: float | None
    notice_to_commit_s: Spread | None


class SaveFigures(_Group, frozen=True, kw_only=True):
    """What the saves cost.

    Args:
        saves: How many were committed.
        failed_saves: `save_failed` events.
        blocking_s: The time that each kept training waiting.
        durable_s: From the start of each to its commit.
        save_bytes: Size of the newest.
    """

    saves: int
    failed_saves: int
    blocking_s: Spread | None
    durable_s: Spread | None
    save_bytes: int | None


class CompileFigures(_Group, frozen=True, kw_only=True):
    """What was compiled, and what the compile cache had; None where no attempt told."""

    compile_hits: int | None = None
    compile_misses: int | None = None
    compile_s: float | None = None

    @property
    def cached(self) -> bool | None:
        """Whether there was a cache: what is compiled with one is a hit or a miss of it."""
        return None if self.compile_hits is None else self.compile_hits + (self.compile_misses or 0) > 0


class MoneyFigures(_Group, frozen=True, kw_only=True):
    """What the run cost.

    Args:
        price_per_hour, cost: Money for `held_s`; None where no price is given.
        cost_lost: Money for the part of `held_s` that was not `train`.
    """

    price_per_hour: float | None
    cost: float | None
    cost_lost: float | None


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """What a run's time was spent on, and what it came to.

    Args:
        submitted, ended: Epoch seconds; `ended` None while it is alive.
        first_step_s: Of each attempt, from its start to the end of its first step.
        stalls: Attempts that a watchdog ended.
    """

    run: str
    name: str
    state: str
    reason: str
    submitted: float | None
    ended: float | None
    time: TimeFigures
    progress: StepFigures
    preemption: NoticeFigures
    first_step_s: Spread | None
    saving: SaveFigures
    compiling: CompileFigures
    stalls: int
    money: MoneyFigures
    attempts: list[AttemptFigures]
    intervals: list[Stretch]

    def for_json(self) -> dict[str, object]:
        """Return all figures beside each other, without the groups."""
        figures: dict[str, object] = {}
        for name, value in msgspec.structs.asdict(self).items():
            figures |= msgspec.structs.asdict(value) if isinstance(value, _Group) else {name: value}
        return figures


def measure(history: History) -> Goodput:
    """Measure what a run's time was spent on."""
    spans = spans_of(history)
    stretches = timeline(history, spans)
    time = _time(stretches)
    price = history.price_per_hour
    attempts = _attempts(spans, stretches, price)
    events = [event for span in spans for event in span.life.program]
    return Goodput(
        run=history.run,
        name=history.name,
        state=history.state,
        reason=history.reason,
        submitted=stretches[0].start if stretches else None,
        ended=None if history.now is not None or not stretches else stretches[-1].end,
        time=time,
        progress=_progress(spans),
        preemption=_preemption(attempts),
        first_step_s=_spread(one.first_step_s for one in attempts),
        saving=_saving(events),
        compiling=_compiling(events),
        stalls=sum(one.outcome == Outcome.STALLED for one in attempts),
        money=MoneyFigures(
            price_per_hour=price,
            cost=None if price is None else price * time.held_s / 3600,
            cost_lost=None if price is None else price * (time.held_s - time.seconds[RunPhase.TRAIN]) / 3600,
        ),
        attempts=attempts,
        intervals=stretches,
    )


def _time(stretches: Sequence[Stretch]) -> TimeFigures:
    seconds = _by_phase(stretches)
    off_s = seconds.pop(RunPhase.OFF)
    total_s = math.fsum(seconds.values())
    held_s = math.fsum(one.seconds for one in stretches if one.attempt is not None)
    shares = {phase: spent / total_s if total_s else 0.0 for phase, spent in seconds.items()}
    return TimeFigures(
        total_s=total_s,
        held_s=held_s,
        off_s=off_s,
        seconds=seconds,
        shares=shares,
        goodput=shares[RunPhase.TRAIN],
        goodput_held=seconds[RunPhase.TRAIN] / held_s if held_s else 0.0,
    )


def _progress(spans: Sequence[Span]) -> StepFigures:
    executed = [range(span.first, span.last) for span in spans if span.first is not None and span.last is not None]
    known = [span.last - span.lost_steps for span in spans if span.last is not None]
    distinct, end = 0, 0
    for steps in sorted(executed, key=lambda steps: steps.start):
        distinct += max(0, steps.stop - max(end, steps.start))
        end = max(end, steps.stop)
    return StepFigures(
        steps=known[-1] if known else None,
        executed_steps=sum(map(len, executed)),
        lost_steps=sum(span.lost_steps for span in spans),
        repeated_steps=sum(map(len, executed)) - distinct,
    )


def _preemption(attempts: Sequence[AttemptFigures]) -> NoticeFigures:
    served = [one.saved_on_notice for one in attempts if one.saved_on_notice is not None]
    return NoticeFigures(
        notices=sum(from_outside(one.notice) for one in attempts),
        to_save=len(served),
        saved_on_notice=sum(served),
        save_hit_rate=sum(served) / len(served) if served else None,
        notice_to_commit_s=_spread(one.notice_to_commit_s for one in attempts),
    )


def _saving(events: Sequence[Event]) -> SaveFigures:
    saved = named(events, "saved")
    return SaveFigures(
        saves=len(saved),
        failed_saves=len(named(events, "save_failed")),
        blocking_s=_spread(blocked_s(event) for event in saved),
        durable_s=_spread(number_of(event.get("durable_s")) for event in saved),
        save_bytes=count_of(saved[-1].get("bytes")) if saved else None,
    )


def _compiling(events: Sequence[Event]) -> CompileFigures:
    compiled = named(events, "compiled")
    if not compiled:
        return CompileFigures()
    hits, misses = (sum(count_of(event.get(field)) or 0 for event in compiled) for field in ("hits", "misses"))
    return CompileFigures(compile_hits=hits, compile_misses=misses, compile_s=seconds_of(compiled))


ENDING = (RunPhase.LOST, RunPhase.STALLED, RunPhase.EMERGENCY, RunPhase.STOP)
BEGINNING = (RunPhase.START, RunPhase.RESTORE, RunPhase.COMPILE)
"""What an interruption costs: in the attempt that it ends, and in the one after it."""


def _attempts(spans: Sequence[Span], stretches: Sequence[Stretch], price: float | None) -> list[AttemptFigures]:
    """Measure the attempts; what lies between two counts for the earlier one."""
    own: dict[int, list[Stretch]] = defaultdict(list)
    waits: dict[int | None, list[float]] = defaultdict(list)
    newest = None
    for one in stretches:
        if one.attempt is not None:
            newest = one.attempt
            own[newest].append(one)
        elif one.phase.waits:
            waits[newest].append(one.seconds)
    spent = [_by_phase(own[span.life.number]) for span in spans]
    return [
        _attempt(span, seconds, after, math.fsum(waits[span.life.number]), price)
        for span, seconds, after in zip(spans, spent, [*spent[1:], {}], strict=False)
    ]


def _attempt(
    span: Span, spent: dict[RunPhase, float], after: dict[RunPhase, float], wait_s: float, price: float | None
) -> AttemptFigures:
    """Measure an attempt.

    Args:
        span: Its place in time and steps.
        spent: Its seconds by phase.
        after: Those of the attempt that followed.
        wait_s: How long it was until that one began.
        price: Of an hour.
    """
    outcome = span.life.outcome
    exited = [event for _, event in span.at("exited")][-1:]
    ending = {**(exited[0] if exited else {}), **outcome}
    how = str(ending.get("outcome", ""))
    held_s = span.end - span.start
    cost_s = [spent[phase] for phase in ENDING] + [after.get(phase, 0.0) for phase in BEGINNING] + [wait_s]
    first_step = span.at("first_step")[:1]
    stopped = [event for _, event in span.at("stopped")]
    whole = [number_of(event.get("notice_to_commit_s")) for event in stopped if not event.get("lost_steps")]
    return AttemptFigures(
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
        seconds={phase: seconds for phase, seconds in spent.items() if not phase.waits and phase is not RunPhase.OFF},
        cost=None if price is None else price * held_s / 3600,
    )


def _by_phase(stretches: Iterable[Stretch]) -> dict[RunPhase, float]:
    """Add up the seconds of each phase."""
    parts: dict[RunPhase, list[float]] = {phase: [] for phase in RunPhase}
    for one in stretches:
        parts[one.phase].append(one.seconds)
    return {phase: math.fsum(seconds) for phase, seconds in parts.items()}


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread(len(known), median(known), max(known), math.fsum(known)) if known else None


_UNSEEN_S = 0.5
"""Less is what passes between a save and the end of an attempt in good order."""


def lost_unseen(figures: AttemptFigures | Goodput) -> bool:
    """Tell whether training was taken back in a loop of the program's own, and nobody knows how many steps it was."""
    spent = figures.time.seconds if isinstance(figures, Goodput) else figures.seconds
    return _lost_steps(figures) == 0 and spent[RunPhase.LOST] >= _UNSEEN_S


def _lost_steps(figures: AttemptFigures | Goodput) -> int:
    return figures.progress.lost_steps if isinstance(figures, Goodput) else figures.lost_steps


def lost_of(figures: AttemptFigures | Goodput) -> str:
    """Write how many steps were taken back; '?' where nobody knows."""
    return "?" if lost_unseen(figures) else f"{_lost_steps(figures):,}"


def by_share(goodput: Goodput) -> list[tuple[RunPhase, float]]:
    """Return the phases that took any time with their seconds, training first, then the costliest."""
    spent = [(phase, seconds) for phase, seconds in goodput.time.seconds.items() if seconds > 0]
    return sorted(spent, key=lambda pair: (pair[0] is not RunPhase.TRAIN, -pair[1]))

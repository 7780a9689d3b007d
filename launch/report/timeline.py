"""The time of a run cut into phases that follow one another without gap or overlap (what they mean: goodput.py)."""

import enum
import math
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from jobkit.rundir.ledger import Event
from launch.lifecycle.history import History, number_of
from launch.report.lives import Span, reached_at, rising


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


def timeline(history: History, spans: Sequence[Span]) -> list[Interval]:
    """Cut the time of a run, from its submit until its end or now, into phases."""
    launcher = rising(history.launcher)
    begun = [t for t, event in launcher if event["event"] == "submitted"][:1] or [t for t, _ in launcher[:1]]
    cursor = min([*begun, *(span.start for span in spans[:1])], default=None)
    if cursor is None:
        return []
    intervals: list[Interval] = []
    for index, span in enumerate(spans):
        intervals += _between(launcher, cursor, span.start, waits=index == 0)
        intervals += _phases(span)
        cursor = span.end
    ended = [t for t, event in launcher if event["event"] == "ended"][-1:]
    end = history.now if history.now is not None else max([cursor, *ended])
    requeued = any(t >= cursor and event["event"] == "requeued" for t, event in launcher)
    intervals += _between(launcher, cursor, max(end, cursor), waits=not spans or requeued)
    return _joined(interval for interval in intervals if interval.end > interval.start)


def _joined(intervals: Iterable[Interval]) -> list[Interval]:
    """Join neighbours of one attempt and phase."""
    joined: list[Interval] = []
    for interval in intervals:
        before = joined[-1] if joined else None
        if before is not None and (before.phase, before.attempt) == (interval.phase, interval.attempt):
            joined[-1] = Interval(before.start, interval.end, interval.phase, interval.attempt)
        else:
            joined.append(interval)
    return joined


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
    intervals = [Interval(a, b, phase) for (a, phase), b in zip(cuts, [queued_until, end], strict=True)]
    off_since: float | None = None
    for t, name in inside:
        if name == "ended":
            off_since = t if off_since is None else off_since
        elif name in ("resumed", "submitted") and off_since is not None:
            intervals = _paint(intervals, off_since, t, Phase.OFF)
            off_since = None
    return intervals if off_since is None else _paint(intervals, off_since, end, Phase.OFF)


_BEGINS = {
    "opened": Phase.START,
    "fresh": Phase.COMPILE,
    "restored": Phase.COMPILE,
    "first_step": Phase.TRAIN,
    "goes_on": Phase.TRAIN,
}
_LEAVES = {"notice": Phase.EMERGENCY, "stopped": Phase.STOP, "finished": Phase.STOP, "raised": Phase.STOP}


def _phases(span: Span) -> list[Interval]:
    """Cut an attempt into phases."""
    number = span.life.number
    program = {id(event) for event in span.life.program}
    cuts = [(span.start, Phase.START)]
    for t, event in span.events:
        phase = _BEGINS.get(event["event"]) or _LEAVES.get(event["event"]) if id(event) in program else None
        if phase is not None:
            cuts.append((min(max(t, cuts[-1][0]), span.end), phase))
    ends = [*(t for t, _ in cuts[1:]), span.end]
    intervals = [Interval(a, b, phase, number) for (a, phase), b in zip(cuts, ends, strict=True)]
    for t, event in span.at("restored"):
        intervals = _paint(
            intervals, t - (number_of(event.get("seconds")) or 0.0), t, Phase.RESTORE, over=(Phase.START,)
        )
    if span.own:
        compiled = span.at("compiled")[:1]
        compiled_s = math.fsum(number_of(event.get("seconds")) or 0.0 for _, event in compiled)
        for t, _ in [*span.at("fresh"), *span.at("restored")][:1]:
            intervals = _paint(intervals, t + compiled_s, span.end, Phase.TRAIN, over=(Phase.COMPILE,))
    for t, event in [*span.at("saved"), *span.at("skipped")]:
        begun = t - (number_of(event.get("durable_s")) or 0.0)
        waited = begun + (blocked_s(event) or 0.0)
        intervals = _paint(intervals, begun, waited, Phase.SAVE, over=(Phase.TRAIN, Phase.COMPILE))
    # Of a loop of the program's own nobody knows how many steps there were after its last save.
    if span.kept is not None and (span.lost_steps or (span.own and not span.done)):
        since = reached_at(span, max(span.kept, span.first or 0))
        intervals = _paint(intervals, since, span.end, Phase.LOST, over=(Phase.TRAIN, Phase.SAVE))
    for start, end in _silences(span):
        intervals = _paint(intervals, start, end, Phase.STALLED, over=(Phase.TRAIN, Phase.LOST))
    for t, event in span.at("stalled")[-1:]:
        intervals = _paint(intervals, t - (number_of(event.get("waited_s")) or 0.0), span.end, Phase.STALLED)
    return intervals


def _silences(span: Span) -> Iterator[tuple[float, float]]:
    """Yield from when to when the supervisor missed the program's steps."""
    since: float | None = None
    for t, event in span.events:
        if event["event"] == "silent" and since is None:
            since = t - (number_of(event.get("waited_s")) or 0.0)
        elif event["event"] == "heard_again" and since is not None:
            yield since, t
            since = None
    if since is not None:
        yield since, span.end


def _paint(
    intervals: Iterable[Interval], start: float, end: float, phase: Phase, *, over: Sequence[Phase] = tuple(Phase)
) -> list[Interval]:
    """Return the same stretch of time with another phase from `start` to `end`, where it had one of `over`."""
    painted = []
    for old in intervals:
        a, b = max(start, old.start), min(end, old.end)
        if old.phase not in over or b <= a:
            painted.append(old)
            continue
        parts = [(old.start, a, old.phase), (a, b, phase), (b, old.end, old.phase)]
        painted += [Interval(x, y, part, old.attempt) for x, y, part in parts if y > x]
    return painted


def blocked_s(event: Event) -> float | None:
    """Return how long a save kept training waiting: the last one, and one on notice, until it was durable."""
    last = event.get("reason") in ("end", "notice")
    return number_of(event.get("durable_s" if last else "blocking_s"))

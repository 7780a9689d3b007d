"""The time of a run cut into phases that follow one another without gap or overlap (what they mean: goodput.py)."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise

import msgspec

from jobkit.rundir.ledger import Event
from launch.lifecycle.history import History, number_of
from launch.report.lives import Span, reached_at, rising, seconds_of
from launch.report.phases import RunPhase


class Stretch(msgspec.Struct, frozen=True):
    """A stretch of time in one phase, of an attempt or, with `attempt` None, between two."""

    start: float
    end: float
    phase: RunPhase
    attempt: int | None = None

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


def timeline(history: History, spans: Sequence[Span]) -> list[Stretch]:
    """Cut the time of a run, from its submit until its end or now, into phases."""
    launcher = rising(history.launcher)
    begun = [t for t, event in launcher if event["event"] == "submitted"][:1] or [t for t, _ in launcher[:1]]
    cursor = min([*begun, *(span.start for span in spans[:1])], default=None)
    if cursor is None:
        return []
    stretches: list[Stretch] = []
    for index, span in enumerate(spans):
        stretches += _between(launcher, cursor, span.start, waits=index == 0)
        stretches += _phases(span)
        cursor = span.end
    ended = [t for t, event in launcher if event["event"] == "ended"][-1:]
    end = history.now if history.now is not None else max([cursor, *ended])
    requeued = any(t >= cursor and event["event"] == "requeued" for t, event in launcher)
    stretches += _between(launcher, cursor, max(end, cursor), waits=not spans or requeued)
    return list(_joined(one for one in stretches if one.end > one.start))


def _joined(stretches: Iterable[Stretch]) -> Iterator[Stretch]:
    """Join neighbours of one attempt and phase."""
    for (phase, attempt), neighbours in groupby(stretches, key=lambda one: (one.phase, one.attempt)):
        first, *more = neighbours
        yield Stretch(first.start, more[-1].end if more else first.end, phase, attempt)


def _between(launcher: Sequence[tuple[float, Event]], start: float, end: float, *, waits: bool) -> list[Stretch]:
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
    stretches = [Stretch(start, queued_until, RunPhase.QUEUE), Stretch(queued_until, end, RunPhase.IDLE)]
    for since, until in _spells(inside, "ended", ("resumed", "submitted"), end):
        stretches = _paint(stretches, since, until, RunPhase.OFF)
    return stretches


def _spells(
    moments: Iterable[tuple[float, str]], begins: str, ends: Sequence[str], last: float
) -> Iterator[tuple[float, float]]:
    """Yield from when to when something lasted: from the first event that begins it to the next that ends it."""
    since: float | None = None
    for t, name in moments:
        if name == begins and since is None:
            since = t
        elif name in ends and since is not None:
            yield since, t
            since = None
    if since is not None:
        yield since, last


_BEGINS = {
    "opened": RunPhase.START,
    "fresh": RunPhase.COMPILE,
    "restored": RunPhase.COMPILE,
    "first_step": RunPhase.TRAIN,
    "goes_on": RunPhase.TRAIN,
    "notice": RunPhase.EMERGENCY,
    "stopped": RunPhase.STOP,
    "finished": RunPhase.STOP,
    "raised": RunPhase.STOP,
}
"""The phase that begins with an event of the program."""


def _phases(span: Span) -> list[Stretch]:
    """Cut an attempt into phases."""
    program = {id(event) for event in span.life.program}
    cuts = [(span.start, RunPhase.START)]
    for t, event in span.events:
        if id(event) in program and event["event"] in _BEGINS:
            cuts.append((min(max(t, cuts[-1][0]), span.end), _BEGINS[event["event"]]))
    cuts.append((span.end, RunPhase.STOP))
    stretches = [Stretch(start, end, phase, span.life.number) for (start, phase), (end, _) in pairwise(cuts)]
    for t, event in span.at("restored"):
        stretches = _paint(stretches, t - _seconds(event, "seconds"), t, RunPhase.RESTORE, over=[RunPhase.START])
    if span.own:
        compiled_s = seconds_of(event for _, event in span.at("compiled")[:1])
        for t, _ in [*span.at("fresh"), *span.at("restored")][:1]:
            stretches = _paint(stretches, t + compiled_s, span.end, RunPhase.TRAIN, over=[RunPhase.COMPILE])
    for t, event in [*span.at("saved"), *span.at("skipped")]:
        begun = t - _seconds(event, "durable_s")
        waited = begun + (blocked_s(event) or 0.0)
        stretches = _paint(stretches, begun, waited, RunPhase.SAVE, over=[RunPhase.TRAIN, RunPhase.COMPILE])
    # Of a loop of the program's own nobody knows how many steps there were after its last save.
    if span.kept is not None and (span.lost_steps or (span.own and not span.done)):
        since = reached_at(span, max(span.kept, span.first or 0))
        stretches = _paint(stretches, since, span.end, RunPhase.LOST, over=[RunPhase.TRAIN, RunPhase.SAVE])
    # The supervisor missed steps for a while before it says so.
    moments = [
        (t - (event["event"] == "silent") * _seconds(event, "waited_s"), event["event"]) for t, event in span.events
    ]
    for start, end in _spells(moments, "silent", ["heard_again"], span.end):
        stretches = _paint(stretches, start, end, RunPhase.STALLED, over=[RunPhase.TRAIN, RunPhase.LOST])
    for t, event in span.at("stalled")[-1:]:
        stretches = _paint(stretches, t - _seconds(event, "waited_s"), span.end, RunPhase.STALLED)
    return stretches


def _seconds(event: Event, field: str) -> float:
    return number_of(event.get(field)) or 0.0


def _paint(
    stretches: Iterable[Stretch], start: float, end: float, phase: RunPhase, *, over: Sequence[RunPhase] = ()
) -> list[Stretch]:
    """Return the same stretches with another phase from `start` to `end`, where they had one of `over`, or any."""
    painted = []
    for old in stretches:
        a, b = max(start, old.start), min(end, old.end)
        if (over and old.phase not in over) or b <= a:
            painted.append(old)
            continue
        parts = [(old.start, a, old.phase), (a, b, phase), (b, old.end, old.phase)]
        painted += [Stretch(x, y, part, old.attempt) for x, y, part in parts if y > x]
    return painted


def blocked_s(event: Event) -> float | None:
    """Return how long a save kept training waiting: the last one, and one on notice, until it was durable."""
    last = event.get("reason") in ("end", "notice")
    return number_of(event.get("durable_s" if last else "blocking_s"))


def time_axis(length_s: float) -> tuple[float, str]:
    """Return the unit in which a length of time is written along an axis: its seconds, and its name."""
    units = ((2 * 86400.0, 86400.0, "d"), (2 * 3600.0, 3600.0, "h"), (180.0, 60.0, "min"))
    return next(((size, name) for least, size, name in units if length_s >= least), (1.0, "s"))


def lanes(stretches: Sequence[Stretch], attempts: Sequence[int]) -> dict[int, list[Stretch]]:
    """Lay out a lane for each attempt, without what lies after an end: a wait is in that of the attempt after it.

    Args:
        stretches: A run's timeline.
        attempts: Numbers of its attempts, rising; a run that still waits for its first has a lane of number 0.
    """
    by_attempt: dict[int, list[Stretch]] = {number: [] for number in attempts or [0]}
    lane = max(by_attempt)
    for one in reversed(stretches):
        lane = lane if one.attempt is None else one.attempt
        if one.phase is not RunPhase.OFF:
            by_attempt[lane].insert(0, one)
    return by_attempt

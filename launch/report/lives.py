"""The attempts of a run in time and steps: when each began and ended, what it completed, what was taken back of it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from jobkit.contract import Outcome
from jobkit.rundir.ledger import Event, last_word
from launch.lifecycle.history import History, Life, count_of, number_of


@dataclass
class Span:
    """An attempt with its place on the run's timeline.

    Args:
        events: Of process 0 and its supervisor, at corrected times.
        running: Whether it has not ended.
        points: Times at which a number of completed steps was known, both rising.
        first, last: Completed steps with which it began and ended; None if it got no state.
        kept: Completed steps of which nothing was taken back.
        own: Whether the program trains in a loop of its own: of its steps only the saves are known.
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
    own: bool = False

    @property
    def lost_steps(self) -> int:
        """Steps of this attempt that were taken back."""
        if self.first is None or self.last is None or self.kept is None:
            return 0
        return max(0, self.last - max(self.first, self.kept))

    @property
    def done(self) -> bool:
        """Whether the program came to its end."""
        endings = [self.life.outcome, *(event for _, event in self.at("exited"))]
        own = [event for event in self.life.program if event["event"] != "raised"]  # by what follows the training
        return last_word(own) == "finished" or any(one.get("outcome") == Outcome.DONE for one in endings)

    def at(self, name: str) -> list[tuple[float, Event]]:
        """Return the events of one name with their times."""
        return [(t, event) for t, event in self.events if event["event"] == name]


def named(events: Iterable[Event], *names: str) -> list[Event]:
    """Return the events of some names, in the order given."""
    return [event for event in events if event["event"] in names]


def seconds_of(events: Iterable[Event], field: str = "seconds") -> float:
    """Add up what events say of how long something took."""
    return math.fsum(number_of(event.get(field)) or 0.0 for event in events)


def spans_of(history: History) -> list[Span]:
    """Place the attempts of a run, oldest first, in time and steps."""
    spans: list[Span] = []
    newest = max((life.number for life in history.lives), default=-1)
    for life in sorted(history.lives, key=lambda life: life.number):
        program, supervisor = rising(life.program), rising(life.supervisor)
        events = sorted([*supervisor, *program], key=lambda pair: pair[0])
        ended = [t for t, event in supervisor if event["event"] == "exited"]
        wrote_end = number_of(life.outcome.get("ended"))
        running = not ended and not life.outcome and life.number == newest and history.now is not None
        start = events[0][0] if events else number_of(life.outcome.get("started"))
        if start is None:
            continue  # its number was claimed, and nothing more
        ends = [ended[-1]] if ended else [wrote_end] if wrote_end is not None else [t for t, _ in events[-1:]]
        end = history.now if running and history.now is not None else max(ends, default=start)
        spans.append(Span(life, events, start, max(start, end), running, []))
    for earlier, later in pairwise(spans):
        later.start = max(later.start, earlier.start)
        later.end = max(later.end, later.start)
        earlier.end = min(earlier.end, later.start)
    own = _own_loops(history)
    for span in spans:
        _measure_steps(span)
        span.own = own
    _settle(spans)
    return spans


def _own_loops(history: History) -> bool:
    """Tell whether the run's program counts its steps itself, as it says or as its saves tell."""
    events = [event for life in history.lives for event in life.program]
    asked = [event for event in named(events, "saved") if event.get("reason") == "asked"]
    return not named(events, "first_step") and bool(asked or named(events, "own_loop"))


def rising(events: Iterable[Event]) -> list[tuple[float, Event]]:
    """Return events with their times, a time before the one above it raised to it."""
    pairs, latest = [], -math.inf
    for event in events:
        latest = max(latest, float(event["t"]))
        pairs.append((latest, event))
    return pairs


def _measure_steps(span: Span) -> None:
    points = []
    for t, event in span.events:
        step = count_of(event.get("step"))
        if step is not None and event["event"] in _TELL_STEP:
            durable_s = number_of(event.get("durable_s")) if event["event"] in ("saved", "skipped") else 0.0
            points.append((min(max(t - (durable_s or 0.0), span.start), span.end), step))
    ended = count_of(span.life.outcome.get("step"))
    if ended is not None:
        points.append((span.end, ended))
    first = begun_at(span.life)
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


_COMMITTED = ("saved", "skipped", "stopped", "finished")
_TELL_STEP = (*_COMMITTED, "fresh", "restored", "first_step", "metrics", "notice", "raised")


def _settle(spans: Sequence[Span]) -> None:
    """Find what each attempt's successors took back."""
    committed = -1
    for span in spans:
        begun = begun_at(span.life)
        committed = committed if begun is None else begun  # what was newer is no more
        saved = [count_of(event.get("step")) for event in named(span.life.program, *_COMMITTED)]
        steps = [*saved, count_of(span.life.outcome.get("committed_step"))]
        committed = max([committed, *(step for step in steps if step is not None)])
        if not span.running:
            span.kept = committed
    resumed: int | None = None
    for span in reversed(spans):
        if resumed is not None:
            span.kept = resumed
        begun = begun_at(span.life)
        if begun is not None:
            resumed = begun if resumed is None else min(resumed, begun)


def begun_at(life: Life) -> int | None:
    """Return the completed steps with which an attempt began, None if it got no state."""
    begun = named(life.program, "fresh", "restored")
    return count_of(begun[0].get("step", 0)) if begun else None


def reached_at(span: Span, step: int) -> float:
    """Return when an attempt had completed a number of steps; between two known points it went evenly."""
    before = (span.start, span.first or 0)
    for point in span.points:
        if point[1] >= step:
            gained = point[1] - before[1]
            part = (step - before[1]) / gained if gained > 0 else 1.0
            return before[0] + max(0.0, part) * (point[0] - before[0])
        before = point
    return span.end


# Notices.


PEER = "peer"
"""Source of a notice that only followed the death of another process of the attempt."""


def notice_of(life: Life) -> str:
    """Return the source of an attempt's notice; the program knows it best."""
    by_process = [[*life.program, *life.supervisor], *life.others.values()]
    notices = [named(events, "notice") for events in by_process]
    if not any(notices):
        return ""
    if any(events and not own and not _left_well(events) for own, events in zip(notices, by_process, strict=True)):
        # It had died, and the launcher ended the others. By who heard of it: no two machines' clocks are compared.
        return PEER
    return next(str(event.get("source") or "notice") for own in notices for event in own)


def _left_well(events: Iterable[Event]) -> bool:
    return any(event.get("outcome") in (Outcome.DONE, Outcome.PREEMPTED) for event in events)


def from_outside(source: str) -> bool:
    """Tell whether a notice came from outside, rather than of something that has ended or given the program up.

    Args:
        source: Where it came from; in a run of several processes perhaps by way of another one, '' for no notice.
    """
    return source != "" and source.rpartition(": ")[2] not in ("watchdog", "superseded", "supervisor", PEER)


def saved_on_notice(span: Span) -> bool | None:
    """Tell whether an attempt that got a notice from outside committed all of its steps; None if it had none."""
    trained = span.first is not None and span.last is not None and span.last > span.first
    if span.running or not trained or not from_outside(notice_of(span.life)):
        return None
    return any(not event.get("lost_steps") for event in named(span.life.program, "stopped", "finished"))

"""What would avoid the next time what has cost a run time, where the figures of this very run call for it."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from statistics import median

import msgspec

from jobkit.checkpoint.interval import Cost, interval_s
from jobkit.contract import Outcome
from jobkit.rundir.ledger import Event
from jobkit.units import counted, show_duration, show_size
from launch.lifecycle.history import History, count_of, number_of
from launch.report.goodput import AttemptFigures, Goodput
from launch.report.lives import PEER, begun_at, named, seconds_of
from launch.report.phases import RunPhase, percent


class Advice(msgspec.Struct, frozen=True):
    """What would avoid it the next time.

    Args:
        cause: One word: 'grace', 'interval', 'node', 'compile', 'bucket', 'memory', 'stalled', 'queue', 'program',
            'disk'.
        cost_s: Seconds that it is about.
    """

    cause: str
    text: str
    cost_s: float = 0.0


def clause(reason: str) -> str:
    """Put a reason behind a colon, if there is one."""
    reason = reason.strip().rstrip(".")
    return f": {reason}" if reason else ""


def reason_of(event: Event) -> str:
    """Put an event's reason behind a colon, if it has one."""
    return clause(str(event.get("reason", "")))


def advice(goodput: Goodput, history: History) -> Iterator[Advice]:
    """Yield what would avoid it, where it is worth saying."""
    for one in (_grace, _interval, _node, _memory, _stalled, _program, _compile, _bucket, _queue, _disk):
        yield from one(goodput, history)


def _cost_s(attempts: Iterable[AttemptFigures]) -> float:
    return math.fsum(one.ending_s for one in attempts)


def _grace(goodput: Goodput, history: History) -> Iterator[Advice]:
    """A notice came and the save did not land."""
    late = [one for one in goodput.attempts if one.saved_on_notice is False]
    if not late:
        return
    needs = goodput.saving.durable_s.max if goodput.saving.durable_s is not None else 0.0
    text = f"{len(late)} of {counted(goodput.preemption.to_save, 'notice')} ended before the save was committed"
    grace_s = _deadline(history, late[-1].attempt)
    if grace_s is not None and grace_s >= 2 * needs:
        log = f"jobkit logs --attempt {late[-1].attempt}"
        text += f", although {show_duration(grace_s)} were given and a save took at most {show_duration(needs)}: {log}."
    else:
        had = f" (there were {show_duration(grace_s)})" if grace_s is not None else ""
        took = f". A save took up to {show_duration(needs)}" if needs else ""
        text += f"{took}: ask for a grace period of {show_duration(max(30.0, 2 * needs))}{had}."
    yield Advice("grace", text, _cost_s(late))


def _deadline(history: History, attempt: int) -> float | None:
    """Return how much time the notice of an attempt gave: as it said itself, or as the run was submitted."""
    notices = [event for life in history.lives if life.number == attempt for event in named(life.supervisor, "notice")]
    deadlines = [number_of(event.get("deadline_s")) for event in notices]
    return next((grace_s for grace_s in deadlines if grace_s is not None), history.grace_s)


def _interval(goodput: Goodput, history: History) -> Iterator[Advice]:
    """Saves are far from the interval that this run's own losses and costs call for."""
    saves = [event for life in history.lives for event in named(life.program, "saved")]
    blocking = [
        number_of(event.get("blocking_s")) or 0.0 for event in saves if event.get("reason") not in ("end", "notice")
    ]
    losses = [one for one in goodput.attempts if one.ended is not None and one.lost_steps]
    if not blocking or goodput.saving.durable_s is None:
        return
    lost_s = math.fsum(one.seconds[RunPhase.LOST] for one in losses)
    periodic, asked = _between_saves(history, "interval"), _between_saves(history, "asked")
    now_s, now_steps = periodic or asked or (math.inf, 0.0)
    if losses:
        best_s = interval_s(Cost(median(blocking), goodput.saving.durable_s.median), goodput.time.held_s / len(losses))
        if best_s < now_s / 2:
            every, remedy = "not at intervals", f"save_every='{_as_option(best_s)}' costs least; 'auto' finds it"
            if periodic:
                every = f"every {show_duration(now_s)}"
            elif asked:
                every = f"every {counted(round(now_steps), 'step')}, {show_duration(now_s)} apart, by its own save()"
                remedy = f"a save every {show_duration(best_s)} costs least"
            text = (
                f"{counted(len(losses), 'interruption')} took back {show_duration(lost_s)} of training; the run saved "
                f"{every}. For a save that blocks {median(blocking):.2f} s and this many losses, {remedy}."
            )
            yield Advice("interval", text, lost_s)
            return
    share, spent = goodput.time.shares[RunPhase.SAVE], goodput.time.seconds[RunPhase.SAVE]
    if periodic and share > 0.02 and lost_s < spent / 2:
        text = (
            f"Saving every {show_duration(now_s)} took {percent(share)} of the time, more than the losses it "
            f"avoided: a longer save_every, such as '{_as_option(now_s * share / 0.01)}' or 'auto', costs about 1 %."
        )
        yield Advice("interval", text, spent)


def _between_saves(history: History, reason: str) -> tuple[float, float] | None:
    """Return the usual time and the usual number of steps between two saves of one attempt; None without any.

    Args:
        history: The run's.
        reason: Why they were made: 'interval', or 'asked' by the program.
    """
    seconds, counts = [], []
    for life in history.lives:
        saves = [event for event in named(life.program, "saved") if event.get("reason") == reason]
        times = [event["t"] for event in [*named(life.program, "first_step")[:1], *saves]]
        steps = [begun_at(life), *(count_of(event.get("step")) for event in saves)]
        seconds += [later - earlier for earlier, later in pairwise(times) if later > earlier]
        counts += [b - a for a, b in pairwise(step for step in steps if step is not None) if b > a]
    return (median(seconds), median(counts or [0])) if seconds else None


def _as_option(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))}s"
    return f"{round(seconds / 60)}m" if seconds < 5400 else f"{seconds / 3600:.1f}h".replace(".0h", "h")


_BAD = (Outcome.KILLED, Outcome.STALLED, Outcome.FAILED, Outcome.STORAGE)


def _node(goodput: Goodput, history: History) -> Iterator[Advice]:
    """One node stands out among the bad endings, while others did well."""
    bad = Counter(one.node for one in goodput.attempts if one.node and one.outcome in _BAD)
    good = {one.node for one in goodput.attempts if one.node and one.outcome not in _BAD}
    for node, count in bad.most_common(1):
        if count >= 2 and count > sum(bad.values()) / 2 and node not in good and (good or len(bad) > 1):
            there = [one for one in goodput.attempts if one.node == node and one.outcome in _BAD]
            text = f"{count} of {sum(bad.values())} bad endings were on {node}: leave it out (--sbatch exclude={node})."
            yield Advice("node", text, _cost_s(there))


_OUT_OF_MEMORY = re.compile(r"out of memory|\bOOM\b|MemoryError", re.IGNORECASE)


def _memory(goodput: Goodput, history: History) -> Iterator[Advice]:
    """Killed without a notice: mostly memory, and said so where the reason does."""
    killed = [
        one
        for one in goodput.attempts
        if one.outcome == Outcome.KILLED and one.notice in ("", PEER) and "SIGKILL" in one.reason
    ]
    named_it = [one for one in goodput.attempts if _OUT_OF_MEMORY.search(one.reason)]
    cost_s = _cost_s({one.attempt: one for one in [*killed, *named_it]}.values())
    if named_it:
        text = f"Attempt {named_it[0].attempt} ran out of memory ({named_it[0].reason}): ask for more, or use less."
        yield Advice("memory", text, cost_s)
    elif len(killed) >= 2:
        text = (
            f"{len(killed)} attempts got a SIGKILL without a notice, as the kernel does when memory is out: look for "
            "'oom' in the node's log, and ask for more memory if it is there."
        )
        yield Advice("memory", text, cost_s)


def _stalled(goodput: Goodput, history: History) -> Iterator[Advice]:
    hung = [one for one in goodput.attempts if one.outcome == Outcome.STALLED]
    if hung:
        which = ", ".join(str(one.attempt) for one in hung[:5])
        log = f"jobkit logs --attempt {hung[-1].attempt}"
        text = f"{counted(len(hung), 'attempt')} hung ({which}): what each thread did is in the log, {log}."
        yield Advice("stalled", text, _cost_s(hung))


def _program(goodput: Goodput, history: History) -> Iterator[Advice]:
    """The program failed, at the same step again and again or not."""
    failed = [one for one in goodput.attempts if one.outcome == Outcome.FAILED]
    if not failed:
        return
    step, count = Counter(one.to_step for one in failed).most_common(1)[0]
    text = f"The program itself failed {'once' if len(failed) == 1 else f'{len(failed)} times'}"
    if count >= 2 and step is not None:
        text = f"The program failed {count} times at step {step:,}, which no restart mends"
    yield Advice("program", f"{text}: jobkit logs --attempt {failed[-1].attempt}.", _cost_s(failed))


_WORTH_S = 2.0
"""Seconds of compiling per restart above which it is worth a word; a tiny program takes a tenth of one."""


def _compile(goodput: Goodput, history: History) -> Iterator[Advice]:
    """Restarts compile what was compiled before: not all fits that the cache has, or there is none."""
    again = [[event for event in named(life.program, "compiled") if _missed(event)] for life in history.lives[1:]]
    compiled = [event for events in again for event in events]
    spent_s = seconds_of(compiled)
    share, figures = goodput.time.shares[RunPhase.COMPILE], goodput.compiling
    if spent_s >= _WORTH_S * sum(map(bool, again)) > 0:
        why = clause(str(compiled[-1].get("why", ""))) or ": the compile cache did not have them"
        misses = counted(sum(map(_missed, compiled)), "program")
        text = f"After a restart {misses} had to be compiled again, in {show_duration(spent_s)}{why}."
        yield Advice("compile", text, spent_s)
    elif figures.cached is False and (figures.compile_s or 0.0) >= _WORTH_S * len(again) > 0 and share > 0.05:
        text = (
            f"{percent(share)} of the time went into {len(goodput.attempts)} first steps, mostly "
            "compiling; JAX's compilation cache (JAX_COMPILATION_CACHE_DIR) keeps that from one attempt to the next."
        )
        yield Advice("compile", text, math.fsum(one.seconds[RunPhase.COMPILE] for one in goodput.attempts[1:]))


def _missed(event: Event) -> int:
    # What only a restart runs is missed once, and is no sign of anything.
    again = event.get("again")
    return len(again) if isinstance(again, list) else 0


_SLOW = 20e6
"""Bytes per second below which an upload is slow: a bucket in the same region takes several times that."""


def _bucket(goodput: Goodput, history: History) -> Iterator[Advice]:
    uploads = [
        (size, seconds)
        for life in history.lives
        for event in named([*life.supervisor, *life.program], "uploaded")
        if (size := number_of(event.get("bytes"))) and (seconds := number_of(event.get("seconds")))
    ]
    size, seconds = map(math.fsum, zip(*uploads, strict=True)) if uploads else (0.0, 0.0)
    if uploads and seconds / len(uploads) > 10 and size / seconds < _SLOW:
        text = (
            f"{counted(len(uploads), 'upload')} ran at {show_size(size / seconds)}/s: a bucket in the region of the "
            "machines is several times faster."
        )
        yield Advice("bucket", text, seconds)


def _queue(goodput: Goodput, history: History) -> Iterator[Advice]:
    share, waited_s = goodput.time.shares[RunPhase.QUEUE], goodput.time.seconds[RunPhase.QUEUE]
    if share > 0.25 and waited_s > 600:
        text = f"{percent(share)} of the time the job was queued: a shorter --time or another partition starts sooner."
        yield Advice("queue", text, waited_s)


def _disk(goodput: Goodput, history: History) -> Iterator[Advice]:
    damaged = [event for life in history.lives for event in named(life.program, "set_aside")]
    if damaged:
        text = f"{counted(len(damaged), 'checkpoint')} changed on storage after the commit: have the disk looked at."
        yield Advice("disk", text)

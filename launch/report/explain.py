"""What happened to a run, in sentences: when, what, why, what it cost, and what would avoid it the next time.

All of it comes from the ledgers. An advice is given only where the figures of this very run call for it.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median

import msgspec

from jobkit.checkpoint.interval import Cost, interval_s
from jobkit.contract import Outcome
from jobkit.rundir.ledger import Event
from jobkit.supervise.unsaved import nothing_new
from jobkit.units import show_duration, show_size
from launch.lifecycle import troubles
from launch.lifecycle.history import History, number_of
from launch.report.goodput import Attempt, Goodput, lost_unseen
from launch.report.lives import PEER, from_outside
from launch.report.phases import percent
from launch.report.timeline import Phase

_MOST = 25
"""How many interruptions are told one by one; of more the costliest."""


class Sentence(msgspec.Struct, frozen=True):
    """One thing that happened.

    Args:
        t: When, epoch seconds.
        cause: One word: 'submitted', 'queue', an outcome, 'damaged', 'uploads', 'saves', 'silent', 'resumed', 'more',
            'end'.
        attempt: Whose; None for the run's own.
        cost_s: Seconds that the run would not have spent without it.
    """

    t: float
    cause: str
    attempt: int | None
    text: str
    cost_s: float = 0.0


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


class Story(msgspec.Struct, frozen=True):
    """A run's story."""

    run: str
    name: str
    state: str
    story: list[Sentence]
    advice: list[Advice]


def explain(goodput: Goodput, history: History) -> Story:
    """Tell a run's story.

    Args:
        goodput: Its figures.
        history: Where they come from.
    """
    sentences = [*_beginning(goodput), *_endings(goodput, history), *_troubles(history), *_resumes(history)]
    sentences = [*sorted(sentences, key=lambda one: one.t), *_end(goodput)]
    return Story(goodput.run, goodput.name, goodput.state, sentences, list(_advice(goodput, history)))


# What happened.


def _beginning(goodput: Goodput) -> Iterator[Sentence]:
    if goodput.submitted is None:
        return
    waited = goodput.intervals[0] if goodput.intervals[0].phase is Phase.QUEUE else None
    after = f" and started {show_duration(waited.seconds)} later" if waited is not None and goodput.attempts else ""
    yield Sentence(
        goodput.submitted, "submitted", None, f"The run was submitted{after}.", waited.seconds if waited else 0.0
    )


def _endings(goodput: Goodput, history: History) -> Iterator[Sentence]:
    """Tell of every attempt that ended before the run was done."""
    ended = [one for one in goodput.attempts if one.ended is not None and one.outcome != Outcome.DONE]
    costliest = sorted(sorted(ended, key=lambda one: -one.ending_s)[:_MOST], key=lambda one: one.attempt)
    waited = {life.number: life.supervisor for life in history.lives}
    for one in costliest:
        after = [later for later in goodput.attempts if later.attempt > one.attempt]
        stalls = [event for event in waited.get(one.attempt, []) if event["event"] == "stalled"]
        text = f"{_what(one, stalls)} {_cost(one, after[0] if after else None)}"
        yield Sentence(one.ended or one.started, one.outcome or "unknown", one.attempt, text, one.ending_s)
    left = [one for one in ended if one not in costliest]
    if left:
        cost_s = math.fsum(one.ending_s for one in left)
        lost = sum(one.lost_steps for one in left)
        text = f"{len(left)} more interruptions cost {show_duration(cost_s)} and {_steps(lost)}."
        yield Sentence(max(one.ended or 0.0 for one in left), "more", None, text, cost_s)


def _what(one: Attempt, stalls: Sequence[Event]) -> str:
    """Say how an attempt ended, and why."""
    at = f" at step {one.to_step:,}" if one.to_step is not None else " before it had a step"
    who = f"Attempt {one.attempt}"
    if one.outcome == Outcome.PREEMPTED:
        text = f"{who} was told to stop ({one.notice or 'notice'}){at}"
        if not from_outside(one.notice):
            whole = one.notice_to_commit_s is not None
            text = f"{who} stopped{at}: its supervisor was gone" if one.notice == "supervisor" else text
            return f"{text}; everything was committed {one.notice_to_commit_s:.2f} s later." if whole else f"{text}."
        if one.saved_on_notice and one.notice_to_commit_s is not None:
            return f"{text}; everything was committed {one.notice_to_commit_s:.2f} s after the notice."
        if one.saved_on_notice is None:
            return f"{text}; there was nothing to save yet."
        late = f"; its newest steps could not be committed{_clause(one.unsaved)}."
        return f"{text}{'.' if one.saved_on_notice else late}"
    if one.outcome == Outcome.STALLED:
        event = stalls[-1] if stalls else {}
        where = f" in phase {str(event['phase']).replace('_', ' ')}" if event.get("phase") else ""
        frame = f", in {event['frame']}" if event.get("frame") else ""
        # How long until it ended is told with the costs: it had a while to save what its threads still could.
        waited = show_duration(number_of(event.get("waited_s")) or one.seconds[Phase.STALLED])
        return f"{who} hung{where}{at}{frame}; after {waited} without progress it was given up."
    late = f" after a notice ({one.notice}) that it could not serve in time" if one.saved_on_notice is False else ""
    node = f" on {one.node}" if one.node else ""
    reason = _clause(one.reason)
    if one.outcome == Outcome.KILLED:
        how, _, more = one.reason.partition(": ") if one.reason.startswith("killed by ") else ("killed", "", one.reason)
        return f"{who} was {how}{at}{node}{late}{_clause(more)}."
    words = {
        Outcome.FAILED: "failed",
        Outcome.STORAGE: "could not commit or restore",
        Outcome.CONFIG: "cannot work as it is",
    }
    return f"{who} {words.get(one.outcome, 'ended')}{at}{late}{reason}."  # type: ignore[call-overload]


def _clause(reason: str) -> str:
    reason = reason.strip().rstrip(".")
    return f": {reason}" if reason else ""


def _cost(one: Attempt, after: Attempt | None) -> str:
    """Say what the end of an attempt cost."""
    parts = [
        (one.seconds[Phase.STALLED], "of silence"),
        (one.seconds[Phase.LOST], "of training"),
        (one.seconds[Phase.EMERGENCY], "saving"),
        (one.seconds[Phase.STOP], "stopping"),
        (one.wait_s, "waiting"),
    ]
    if after is not None:
        parts += [
            (after.seconds[Phase.START], "starting"),
            (after.seconds[Phase.RESTORE], "restoring"),
            (after.seconds[Phase.COMPILE], "compiling"),
        ]
    known = [f"{show_duration(seconds)} {what}" for seconds, what in parts if seconds >= 0.05]
    lost = f"{_steps(one.lost_steps)} lost"
    if lost_unseen(one):
        lost = f"what it had trained since step {one.to_step:,} was lost"
    total = f"{lost}; it cost {show_duration(one.ending_s)}"
    text = f"{total} ({', '.join(known)})." if known else f"{total}."
    return text[0].upper() + text[1:]


def _steps(count: int) -> str:
    return "no step" if count == 0 else _count(count, "step")


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _troubles(history: History) -> Iterator[Sentence]:
    """Tell of damaged checkpoints, saves that failed and buckets that did not answer."""
    for life in history.lives:
        for event in life.program:
            if event["event"] == "set_aside":
                text = (
                    f"The checkpoint of step {event.get('step')} was damaged{_clause(str(event.get('reason', '')))}. "
                )
                yield Sentence(event["t"], "damaged", life.number, text + "It was set aside and an older one used.")
        failed = [event for event in life.program if event["event"] == "save_failed"]
        if failed:
            count = "A save" if len(failed) == 1 else f"{len(failed)} saves"
            text = f"{count} of attempt {life.number} failed{_clause(str(failed[0].get('reason', '')))}."
            last = number_of(failed[-1].get("step"))
            saved = [number_of(event.get("step")) for event in life.program if event["event"] == "saved"]
            if last is not None and not any(step is not None and step >= last for step in saved):
                text += f" Step {last:.0f} is not saved, and nothing after it."
            yield Sentence(failed[0]["t"], "saves", life.number, text)
        if idle := [event for event in life.program if event["event"] == "unchanged"]:
            reason = _clause(str(idle[-1].get("reason", "")))
            text = f"Attempt {life.number} saved {nothing_new(idle[-1])}{reason}."
            yield Sentence(idle[0]["t"], "saves", life.number, text)
        again = [event for event in life.supervisor if event["event"] == "heard_again"]
        if again:
            waited_s = math.fsum(number_of(event.get("after_s")) or 0.0 for event in again)
            times = "" if len(again) == 1 else f" in all, {len(again)} times,"
            text = f"Attempt {life.number} made no step for {show_duration(waited_s)}{times} and then went on."
            yield Sentence(again[0]["t"], "silent", life.number, text)
        if history.now is not None and life is history.lives[-1]:
            for trouble in troubles.standing(life.supervisor):
                yield Sentence(history.now, trouble.kind, life.number, f"Attempt {life.number}: {trouble.text}.")
        outages = [event for event in [*life.supervisor, *life.program] if event["event"] == "upload_failed"]
        if outages:
            back = [
                number_of(event.get("after_s")) or 0.0 for event in life.supervisor if event["event"] == "upload_back"
            ]
            long = f" for {show_duration(math.fsum(back))}" if back else ""
            text = f"Uploads of attempt {life.number} failed{long}{_clause(str(outages[0].get('reason', '')))}."
            yield Sentence(outages[0]["t"], "uploads", life.number, text)


def _resumes(history: History) -> Iterator[Sentence]:
    ended: Event | None = None
    for event in history.launcher:
        if event["event"] == "ended":
            ended = event
        elif event["event"] == "resumed" and ended is not None:
            away = show_duration(max(0.0, event["t"] - ended["t"]))
            why = _clause(str(ended.get("reason", "")))
            text = f"It had ended ({ended.get('state', 'ended')}{why}) and was resumed by hand {away} later."
            yield Sentence(event["t"], "resumed", None, text)
            ended = None


def _end(goodput: Goodput) -> Iterator[Sentence]:
    if not goodput.intervals:
        return
    state = goodput.state or ("over" if goodput.ended is not None else "alive")
    at = f" at step {goodput.steps:,}" if goodput.steps is not None else ""
    count = f"{len(goodput.attempts)} attempt{'s' * (len(goodput.attempts) != 1)}"
    money = f", {goodput.cost_lost:,.2f} of {goodput.cost:,.2f} not for training" if goodput.cost else ""
    verb = "is" if goodput.ended is None else "ended as"
    so_far = f"after {count} and {show_duration(goodput.total_s)}: goodput {percent(goodput.goodput)}{money}"
    yield Sentence(goodput.intervals[-1].end, "end", None, f"The run {verb} {state}{at} {so_far}.")


# What would avoid it.


def _advice(goodput: Goodput, history: History) -> Iterator[Advice]:
    for one in (_grace, _interval, _node, _memory, _stalled, _program, _compile, _bucket, _queue, _disk):
        yield from one(goodput, history)


def _grace(goodput: Goodput, history: History) -> Iterator[Advice]:
    """A notice came and the save did not land."""
    late = [one for one in goodput.attempts if one.saved_on_notice is False]
    if not late:
        return
    needs = goodput.durable_s.max if goodput.durable_s is not None else 0.0
    text = f"{len(late)} of {_count(goodput.to_save, 'notice')} ended before the save was committed"
    given = _deadline(history, late[-1].attempt)
    if given is not None and given >= 2 * needs:
        log = f"jobkit logs --attempt {late[-1].attempt}"
        text += f", although {show_duration(given)} were given and a save took at most {show_duration(needs)}: {log}."
    else:
        had = f" (there were {show_duration(given)})" if given is not None else ""
        took = f". A save took up to {show_duration(needs)}" if needs else ""
        text += f"{took}: ask for a grace period of {show_duration(max(30.0, 2 * needs))}{had}."
    yield Advice("grace", text, math.fsum(one.ending_s for one in late))


def _deadline(history: History, attempt: int) -> float | None:
    """Return how much time the notice of an attempt gave: as it said itself, or as the run was submitted."""
    events = [event for life in history.lives if life.number == attempt for event in life.supervisor]
    deadlines = [number_of(event.get("deadline_s")) for event in events if event["event"] == "notice"]
    return next((given for given in deadlines if given is not None), history.grace_s)


def _interval(goodput: Goodput, history: History) -> Iterator[Advice]:
    """Saves are far from the interval that this run's own losses and costs call for."""
    saves = [event for life in history.lives for event in life.program if event["event"] == "saved"]
    blocking = [
        number_of(event.get("blocking_s")) or 0.0 for event in saves if event.get("reason") not in ("end", "notice")
    ]
    losses = [one for one in goodput.attempts if one.ended is not None and one.lost_steps]
    if not blocking or goodput.durable_s is None:
        return
    now_s = _saved_every(history)
    lost_s = math.fsum(one.seconds[Phase.LOST] for one in losses)
    if losses:
        best_s = interval_s(Cost(median(blocking), goodput.durable_s.median), goodput.held_s / len(losses))
        if now_s is None or best_s < now_s / 2:
            every = f"every {show_duration(now_s)}" if now_s is not None else "not at intervals"
            text = (
                f"{_count(len(losses), 'interruption')} took back {show_duration(lost_s)} of training; the run saved "
                f"{every}. For a save that blocks {median(blocking):.2f} s and this many losses, "
                f"save_every='{_as_option(best_s)}' costs least; 'auto' finds it."
            )
            yield Advice("interval", text, lost_s)
            return
    share, spent = goodput.shares[Phase.SAVE], goodput.seconds[Phase.SAVE]
    if now_s is not None and share > 0.02 and lost_s < spent / 2:
        text = (
            f"Saving every {show_duration(now_s)} took {percent(share)} of the time, more than the losses it "
            f"avoided: a longer save_every, such as '{_as_option(now_s * share / 0.01)}' or 'auto', costs about 1 %."
        )
        yield Advice("interval", text, spent)


def _saved_every(history: History) -> float | None:
    """Return the usual time between two periodic saves of one attempt, None without any."""
    gaps = []
    for life in history.lives:
        times = [
            event["t"] for event in life.program if event["event"] == "saved" and event.get("reason") == "interval"
        ]
        begun = [event["t"] for event in life.program if event["event"] == "first_step"][:1]
        gaps += [b - a for a, b in zip([*begun, *times], times, strict=False) if b > a]
    return median(gaps) if gaps else None


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
            cost_s = math.fsum(one.ending_s for one in goodput.attempts if one.node == node and one.outcome in _BAD)
            text = f"{count} of {sum(bad.values())} bad endings were on {node}: leave it out (--sbatch exclude={node})."
            yield Advice("node", text, cost_s)


def _memory(goodput: Goodput, history: History) -> Iterator[Advice]:
    """Killed without a notice: mostly memory, and said so where the reason does."""
    killed = [
        one
        for one in goodput.attempts
        if one.outcome == Outcome.KILLED and one.notice in ("", PEER) and "SIGKILL" in one.reason
    ]
    said = [
        one for one in goodput.attempts if re.search(r"out of memory|\bOOM\b|MemoryError", one.reason, re.IGNORECASE)
    ]
    cost_s = math.fsum(one.ending_s for one in {one.attempt: one for one in [*killed, *said]}.values())
    if said:
        text = f"Attempt {said[0].attempt} ran out of memory ({said[0].reason}): ask for more, or use less."
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
        text = f"{_count(len(hung), 'attempt')} hung ({which}): what each thread did is in the log, {log}."
        yield Advice("stalled", text, math.fsum(one.ending_s for one in hung))


def _program(goodput: Goodput, history: History) -> Iterator[Advice]:
    """The program failed, at the same step again and again or not."""
    failed = [one for one in goodput.attempts if one.outcome == Outcome.FAILED]
    if not failed:
        return
    steps = Counter(one.to_step for one in failed)
    step, count = steps.most_common(1)[0]
    cost_s = math.fsum(one.ending_s for one in failed)
    log = f"jobkit logs --attempt {failed[-1].attempt}"
    if count >= 2 and step is not None:
        yield Advice(
            "program", f"The program failed {count} times at step {step:,}, which no restart mends: {log}.", cost_s
        )
    else:
        times = "once" if len(failed) == 1 else f"{len(failed)} times"
        yield Advice("program", f"The program itself failed {times}: {log}.", cost_s)


_WORTH_S = 2.0
"""Seconds of compiling per restart above which it is worth a word; a tiny program takes a tenth of one."""


def _compile(goodput: Goodput, history: History) -> Iterator[Advice]:
    """Restarts compile what was compiled before."""
    again = [[event for event in life.program if _missed(event)] for life in history.lives[1:]]
    compiled = [event for events in again for event in events]
    spent_s = math.fsum(number_of(event.get("seconds")) or 0.0 for event in compiled)
    if spent_s >= _WORTH_S * sum(map(bool, again)) > 0:
        why = _clause(str(compiled[-1].get("why", ""))) or ": the compile cache did not have them"
        misses = _count(sum(map(_missed, compiled)), "program")
        yield Advice(
            "compile", f"After a restart {misses} had to be compiled again, in {show_duration(spent_s)}{why}.", spent_s
        )
    elif goodput.compile_hits is None and len(goodput.attempts) > 1 and goodput.shares[Phase.COMPILE] > 0.05:
        text = (
            f"{percent(goodput.shares[Phase.COMPILE])} of the time went into {len(goodput.attempts)} first steps, "
            "mostly compiling; JAX's compilation cache (JAX_COMPILATION_CACHE_DIR) keeps that from one attempt to the "
            "next."
        )
        yield Advice("compile", text, _compiled_again(goodput))


def _missed(event: Event) -> int:
    # What only a restart runs is missed once, and is no sign of anything.
    again = event.get("again") if event["event"] == "compiled" else None
    return len(again) if isinstance(again, list) else 0


def _compiled_again(goodput: Goodput) -> float:
    return math.fsum(one.seconds[Phase.COMPILE] for one in goodput.attempts[1:])


_SLOW = 20e6
"""Bytes per second below which an upload is slow: a bucket in the same region takes several times that."""


def _bucket(goodput: Goodput, history: History) -> Iterator[Advice]:
    uploads = [
        (size, seconds)
        for life in history.lives
        for event in [*life.supervisor, *life.program]
        if event["event"] == "uploaded"
        and (size := number_of(event.get("bytes")))
        and (seconds := number_of(event.get("seconds")))
    ]
    size, seconds = sum(size for size, _ in uploads), math.fsum(seconds for _, seconds in uploads)
    if uploads and seconds / len(uploads) > 10 and size / seconds < _SLOW:
        text = (
            f"{_count(len(uploads), 'upload')} ran at {show_size(size / seconds)}/s: a bucket in the region of the "
            "machines is several times faster."
        )
        yield Advice("bucket", text, seconds)


def _queue(goodput: Goodput, history: History) -> Iterator[Advice]:
    share = goodput.shares[Phase.QUEUE]
    if share > 0.25 and goodput.seconds[Phase.QUEUE] > 600:
        text = f"{percent(share)} of the time the job was queued: a shorter --time or another partition starts sooner."
        yield Advice("queue", text, goodput.seconds[Phase.QUEUE])


def _disk(goodput: Goodput, history: History) -> Iterator[Advice]:
    damaged = [event for life in history.lives for event in life.program if event["event"] == "set_aside"]
    if damaged:
        text = f"{_count(len(damaged), 'checkpoint')} changed on storage after the commit: have the disk looked at."
        yield Advice("disk", text)

"""What happened to a run, in sentences: when, what, why, what it cost, and what would avoid it the next time.

All of it comes from the ledgers.
"""

import math
from collections.abc import Iterator, Sequence

import msgspec

from jobkit.contract import Outcome
from jobkit.rundir.ledger import Event
from jobkit.supervise.unsaved import nothing_new
from jobkit.units import show_duration
from launch.lifecycle import troubles
from launch.lifecycle.history import History, number_of
from launch.report.advice import Advice, advice, clause, counted
from launch.report.goodput import Attempt, Goodput, lost_unseen
from launch.report.lives import from_outside
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
    return Story(goodput.run, goodput.name, goodput.state, sentences, list(advice(goodput, history)))


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
        late = f"; its newest steps could not be committed{clause(one.unsaved)}."
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
    reason = clause(one.reason)
    if one.outcome == Outcome.KILLED:
        how, _, more = one.reason.partition(": ") if one.reason.startswith("killed by ") else ("killed", "", one.reason)
        return f"{who} was {how}{at}{node}{late}{clause(more)}."
    words = {
        Outcome.FAILED: "failed",
        Outcome.STORAGE: "could not commit or restore",
        Outcome.CONFIG: "cannot work as it is",
    }
    return f"{who} {words.get(one.outcome, 'ended')}{at}{late}{reason}."  # type: ignore[call-overload]


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
    return "no step" if count == 0 else counted(count, "step")


def _troubles(history: History) -> Iterator[Sentence]:
    """Tell of damaged checkpoints, saves that failed and buckets that did not answer."""
    for life in history.lives:
        for event in life.program:
            if event["event"] == "set_aside":
                text = f"The checkpoint of step {event.get('step')} was damaged{clause(str(event.get('reason', '')))}. "
                yield Sentence(event["t"], "damaged", life.number, text + "It was set aside and an older one used.")
        failed = [event for event in life.program if event["event"] == "save_failed"]
        if failed:
            count = "A save" if len(failed) == 1 else f"{len(failed)} saves"
            text = f"{count} of attempt {life.number} failed{clause(str(failed[0].get('reason', '')))}."
            last = number_of(failed[-1].get("step"))
            saved = [number_of(event.get("step")) for event in life.program if event["event"] == "saved"]
            if last is not None and not any(step is not None and step >= last for step in saved):
                text += f" Step {last:.0f} is not saved, and nothing after it."
            yield Sentence(failed[0]["t"], "saves", life.number, text)
        if idle := [event for event in life.program if event["event"] == "unchanged"]:
            reason = clause(str(idle[-1].get("reason", "")))
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
            text = f"Uploads of attempt {life.number} failed{long}{clause(str(outages[0].get('reason', '')))}."
            yield Sentence(outages[0]["t"], "uploads", life.number, text)


def _resumes(history: History) -> Iterator[Sentence]:
    ended: Event | None = None
    for event in history.launcher:
        if event["event"] == "ended":
            ended = event
        elif event["event"] == "resumed" and ended is not None:
            away = show_duration(max(0.0, event["t"] - ended["t"]))
            why = clause(str(ended.get("reason", "")))
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

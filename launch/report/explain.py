"""What happened to a run, in sentences: when, what, why, what it cost, and what would avoid it the next time.

All of it comes from the ledgers.
"""

import math
from collections.abc import Iterator

import msgspec

from jobkit.contract import Outcome, State
from jobkit.rundir.ledger import Event
from jobkit.supervise.unsaved import nothing_new
from jobkit.units import counted, show_duration
from launch.lifecycle import troubles
from launch.lifecycle.history import History, Life, count_of, number_of
from launch.report.advice import Advice, advice, clause, reason_of
from launch.report.goodput import BEGINNING, AttemptFigures, Goodput, lost_unseen
from launch.report.lives import begun_at, from_outside, named, seconds_of
from launch.report.phases import RunPhase, percent
from launch.spec import changes

_MOST = 25
"""How many interruptions are told one by one; of more the costliest."""


class Sentence(msgspec.Struct, frozen=True):
    """One thing that happened.

    Args:
        t: When, epoch seconds.
        cause: One word: 'submitted', 'started', 'queue', an outcome, 'damaged', 'uploads', 'saves', 'silent',
            'resumed', 'code', 'more', 'end'.
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
    sentences = [
        *_beginning(goodput, history),
        *_endings(goodput, history),
        *_troubles(history),
        *_resumes(history),
        *_jobs(history),
        *_new_code(history),
    ]
    sentences = [*sorted(sentences, key=lambda one: one.t), *_end(goodput)]
    return Story(goodput.run, goodput.name, goodput.state, sentences, list(advice(goodput, history)))


def _beginning(goodput: Goodput, history: History) -> Iterator[Sentence]:
    if goodput.submitted is None:
        return
    if history.by_hand:
        text = "The run was started by hand: nobody but its program's own user starts it again."
        yield Sentence(goodput.submitted, "started", None, text)
        return
    waited = goodput.intervals[0] if goodput.intervals[0].phase is RunPhase.QUEUE else None
    after = f" and started {show_duration(waited.seconds)} later" if waited is not None and goodput.attempts else ""
    yield Sentence(
        goodput.submitted, "submitted", None, f"The run was submitted{after}.", waited.seconds if waited else 0.0
    )


def _endings(goodput: Goodput, history: History) -> Iterator[Sentence]:
    """Tell of every attempt that ended before the run was done."""
    ended = [one for one in goodput.attempts if one.ended is not None and one.outcome != Outcome.DONE]
    costliest = sorted(ended, key=lambda one: -one.ending_s)[:_MOST]
    stalls = {life.number: event for life in history.lives for event in named(life.supervisor, "stalled")}
    following = dict(zip([one.attempt for one in goodput.attempts], goodput.attempts[1:], strict=False))
    first: dict[str, int] = {}
    for one in sorted(costliest, key=lambda one: one.attempt):
        what = _what(one, stalls.get(one.attempt))
        earlier = first.setdefault(what, one.attempt)
        if one.reason and earlier != one.attempt:  # the same end for the same reason is not told again
            what = f"ended as attempt {earlier} did."
        text = f"Attempt {one.attempt} {what} {_cost(one, following.get(one.attempt))}"
        yield Sentence(one.ended or one.started, one.outcome or "unknown", one.attempt, text, one.ending_s)
    left = [one for one in ended if one not in costliest]
    if left:
        cost_s = math.fsum(one.ending_s for one in left)
        lost = sum(one.lost_steps for one in left)
        text = f"{len(left)} more interruptions cost {show_duration(cost_s)} and {_steps(lost)}."
        yield Sentence(max(one.ended or 0.0 for one in left), "more", None, text, cost_s)


_ENDED = {
    Outcome.FAILED: "failed",
    Outcome.STORAGE: "could not commit or restore",
    Outcome.CONFIG: "cannot work as it is",
}


def _what(one: AttemptFigures, stall: Event | None) -> str:
    """Say how an attempt ended, and why: what follows its number."""
    at = f" at step {one.to_step:,}" if one.to_step is not None else " before it had a step"
    late = f" after a notice ({one.notice}) that it could not serve in time" if one.saved_on_notice is False else ""
    if one.outcome == Outcome.PREEMPTED:
        what = _stopped(one, at)
    elif one.outcome == Outcome.STALLED:
        event = stall or {}
        where = f" in phase {str(event['phase']).replace('_', ' ')}" if event.get("phase") else ""
        frame = f", in {event['frame']}" if event.get("frame") else ""
        # How long until it ended is told with the costs: it had a while to save what its threads still could.
        waited = show_duration(number_of(event.get("waited_s")) or one.seconds[RunPhase.STALLED])
        what = f"hung{where}{at}{frame}; after {waited} without progress it was given up"
    elif one.outcome == Outcome.KILLED:
        how, _, more = one.reason.partition(": ") if one.reason.startswith("killed by ") else ("killed", "", one.reason)
        node = f" on {one.node}" if one.node else ""
        what = f"was {how}{at}{node}{late}{clause(more)}"
    else:
        what = f"{_ENDED.get(one.outcome, 'ended')}{at}{late}{clause(one.reason)}"  # type: ignore[call-overload]
    return f"{what}."


def _stopped(one: AttemptFigures, at: str) -> str:
    """Say how an attempt ended that stopped on a notice."""
    known = one.notice_to_commit_s is not None
    committed = f"; everything was committed {one.notice_to_commit_s:.2f} s" if known else ""
    how = f"was told to stop ({one.notice or 'notice'}){at}"
    if not from_outside(one.notice):
        how = f"stopped{at}: its supervisor was gone" if one.notice == "supervisor" else how
        return how + f"{committed} later" * known
    if one.saved_on_notice is None:
        return f"{how}; there was nothing to save yet"
    if one.saved_on_notice:
        return how + f"{committed} after the notice" * known
    return f"{how}; its newest steps could not be committed{clause(one.unsaved)}"


def _cost(one: AttemptFigures, after: AttemptFigures | None) -> str:
    """Say what the end of an attempt cost."""
    parts = [
        (one.seconds[RunPhase.STALLED], "of silence"),
        (one.seconds[RunPhase.LOST], "of training"),
        (one.seconds[RunPhase.EMERGENCY], "saving"),
        (one.seconds[RunPhase.STOP], "stopping"),
        (one.wait_s, "waiting"),
        *((after.seconds[phase], phase.words) for phase in BEGINNING if after is not None),
    ]
    known = [f"{show_duration(seconds)} {what}" for seconds, what in parts if seconds >= 0.05]
    lost = f"{_steps(one.lost_steps)} lost"
    if lost_unseen(one):
        lost = f"what it had trained since step {one.to_step:,} was lost"
    text = f"{lost}; it cost {show_duration(one.ending_s)}" + (f" ({', '.join(known)})." if known else ".")
    return text[0].upper() + text[1:]


def _steps(count: int) -> str:
    return "no step" if count == 0 else counted(count, "step")


def _troubles(history: History) -> Iterator[Sentence]:
    """Tell of damaged checkpoints, saves that failed and buckets that did not answer."""
    for life in history.lives:
        for event, cause, text in _troubles_of(life):
            yield Sentence(event["t"], cause, life.number, text)
        if history.now is not None and life is history.lives[-1]:
            for trouble in troubles.standing(life.supervisor):
                yield Sentence(history.now, trouble.kind, life.number, f"Attempt {life.number}: {trouble.text}.")


def _troubles_of(life: Life) -> Iterator[tuple[Event, str, str]]:
    """Yield what went wrong in an attempt: since which event, in one word, and in a sentence."""
    for event in named(life.program, "set_aside"):
        text = f"The checkpoint of step {event.get('step')} was damaged{reason_of(event)}. "
        yield event, "damaged", text + "It was set aside and an older one used."
    if failed := named(life.program, "save_failed"):
        count = "A save" if len(failed) == 1 else f"{len(failed)} saves"
        text = f"{count} of attempt {life.number} failed{reason_of(failed[0])}."
        last = number_of(failed[-1].get("step"))
        saved = [number_of(event.get("step")) for event in named(life.program, "saved")]
        if last is not None and not any(step is not None and step >= last for step in saved):
            text += f" Step {last:.0f} is not saved, and nothing after it."
        yield failed[0], "saves", text
    if idle := named(life.program, "unchanged"):
        yield idle[0], "saves", f"Attempt {life.number} saved {nothing_new(idle[-1])}{reason_of(idle[-1])}."
    if blind := named(life.program, "no_steps"):
        later = " Later it did." if named(life.program, "steps_seen") else ""
        yield blind[0], "saves", f"Attempt {life.number} trained past the run{reason_of(blind[0])}.{later}"
    if again := named(life.supervisor, "heard_again"):
        waited = show_duration(seconds_of(again, "after_s"))
        times = "" if len(again) == 1 else f" in all, {len(again)} times,"
        yield again[0], "silent", f"Attempt {life.number} made no step for {waited}{times} and then went on."
    if outages := named([*life.supervisor, *life.program], "upload_failed"):
        back = named(life.supervisor, "upload_back")
        long = f" for {show_duration(seconds_of(back, 'after_s'))}" if back else ""
        yield outages[0], "uploads", f"Uploads of attempt {life.number} failed{long}{reason_of(outages[0])}."


def _resumes(history: History) -> Iterator[Sentence]:
    ended: Event | None = None
    for event in history.launcher:
        if event["event"] == "ended":
            ended = event
        elif event["event"] == "resumed" and ended is not None:
            away = show_duration(max(0.0, event["t"] - ended["t"]))
            text = (
                f"It had ended ({ended.get('state', 'ended')}{reason_of(ended)}) and was resumed by hand {away} later."
            )
            yield Sentence(event["t"], "resumed", None, text)
            ended = None


def _jobs(history: History) -> Iterator[Sentence]:
    """Tell why a job of a batch service could not submit another one."""
    for event in named(history.launcher, "job"):
        if why := clause(str(event.get("refused", ""))):
            yield Sentence(event["t"], "refused", None, f"A job whose restarts were used up had no successor{why}.")
    for event in named(history.launcher, "lane"):
        if why := clause(str(event.get("refused", ""))):
            yield Sentence(event["t"], "refused", None, f"The next point of the sweep could not be submitted{why}.")


def _new_code(history: History) -> Iterator[Sentence]:
    """Tell with what it began, and from which step which code ran."""
    for event in named(history.launcher, "begun_from"):
        kept = "" if event.get("begins") == event.get("step") else f", counted as step {event.get('begins')}"
        text = f"It began with step {event.get('step')} of {event.get('source')}{kept}."
        yield Sentence(event["t"], "submitted", None, text)
    for event in named(history.launcher, "new_code"):
        first, step = count_of(event.get("attempts")), count_of(event.get("committed")) or 0
        begun = (begun_at(life) for life in history.lives if first is not None and life.number >= first)
        step = next((at for at in begun if at is not None), step)
        text = f"From step {step:,} on (attempt {first}) other code or options ran: {changes.told(event)}."
        yield Sentence(event["t"], "code", None, text)


def _end(goodput: Goodput) -> Iterator[Sentence]:
    if not goodput.intervals:
        return
    time, steps, cost = goodput.time, goodput.progress.steps, goodput.money
    state = goodput.state or ("over" if goodput.ended is not None else "alive")
    at = f" at step {steps:,}" if steps is not None else ""
    money = f", {cost.cost_lost:,.2f} of {cost.cost:,.2f} not for training" if cost.cost else ""
    verb = "is" if goodput.ended is None else "ended as"
    so_far = f"after {counted(len(goodput.attempts), 'attempt')} and {show_duration(time.total_s)}"
    text = f"The run {verb} {state}{at} {so_far}: goodput {percent(time.goodput)}{money}."
    if goodput.state == State.CANCELLED and goodput.reason:
        text += f" It was {goodput.reason}."
    if not goodput.attempts and goodput.reason and goodput.state == State.FAILED:
        text += f" {goodput.reason[:1].upper()}{goodput.reason[1:]}."
    yield Sentence(goodput.intervals[-1].end, "end", None, text)

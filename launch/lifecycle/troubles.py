"""What is wrong with a run while it runs, as its ledgers tell it: the same words for everybody who looks or is told."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from jobkit import contract
from jobkit.rundir.ledger import Event, newest_event
from jobkit.rundir.store import Store
from jobkit.supervise.heartbeat import read_unsaved
from jobkit.supervise.unsaved import nothing_new
from launch.lifecycle import orphans
from launch.lifecycle.history import number_of


class Trouble(msgspec.Struct, frozen=True):
    """One thing that is wrong.

    Args:
        kind: One word: the event that told of it.
        short: It, in two words, which do not change while it lasts.
        text: It, in a clause.
    """

    kind: str
    short: str
    text: str


def of(event: Mapping[str, Any]) -> Trouble | None:
    """Return what an event tells to be wrong, as it is now; None if it tells of nothing."""
    kind = KINDS.get(str(event.get("event")))
    text = "" if kind is None else kind.text(event)
    return None if kind is None or not text else Trouble(str(event["event"]), kind.short, text)


def standing(events: Iterable[Event]) -> list[Trouble]:
    """Return what is wrong at the end of what one writer of an attempt wrote down."""
    current: dict[str, Event] = {}
    for event in events:
        current = {name: earlier for name, earlier in current.items() if event["event"] not in KINDS[name].ends}
        if event["event"] in KINDS:
            current[event["event"]] = event
    return [trouble for name, event in current.items() if KINDS[name].shown and (trouble := of(event)) is not None]


def unsaved(store: Store, attempt: int) -> Event:
    """Return what a program that runs last wrote down of its saves: that one is not saved, or is; {} if nothing.

    Where it runs on this machine it tells that also when its ledger lies on the storage that fails.
    """
    return here(store, attempt) or newest_event(store, contract.events_file(attempt, 0), _OF_SAVES)


def here(store: Store, attempt: int) -> Event:
    """Return what a program on this machine shows as not saved, {} if nothing."""
    link = orphans.heartbeat_directory(store, attempt)
    return (read_unsaved(link) if link is not None else None) or {}


def _silent(event: Mapping[str, Any]) -> str:
    waited_s, usual_s, budget_s = (number_of(event.get(name)) for name in ("waited_s", "usual_s", "budget_s"))
    t = number_of(event.get("t"))
    waited_s = max(waited_s or 0.0, 0.0 if t is None else time.time() - t + (waited_s or 0.0))
    usual = "" if usual_s is None else f" (usually {_about(usual_s)})"
    after = "never restarted" if budget_s is None else f"restarted after {_about(budget_s)}"
    return f"no step for {_about(waited_s)}{usual}; {after}: --stall"


def _unsaved(event: Mapping[str, Any]) -> str:
    step, committed = number_of(event.get("step")), number_of(event.get("committed_step"))
    if step is None or (committed is not None and step <= committed):
        return ""  # what failed was to tidy up after it
    newest = "nothing is committed yet" if committed is None else f"the newest committed step is {committed:.0f}"
    return f"step {step:.0f} is not saved{_times(event)}: {event.get('reason', '')}; {newest}"


def _unchanged(event: Mapping[str, Any]) -> str:
    return f"{nothing_new(event)} is saved{_times(event)}: {event.get('reason', '')}"


def _times(event: Mapping[str, Any]) -> str:
    count = number_of(event.get("count")) or 1
    return f" ({count:.0f} intervals in a row)" if count > 1 else ""


def _about(seconds: float) -> str:
    """Write a duration for who wants to know roughly: '0.02 s', '6 min', '1.5 h'."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.3g} h"


@dataclass(frozen=True)
class _Kind:
    """A kind of trouble.

    Args:
        short: As in Trouble.
        ends: Events of the same writer with which it is over.
        text: Makes a clause of the event, now.
        shown: Whether it is among what stands; not where a status has a word of its own for it.
    """

    short: str
    ends: tuple[str, ...]
    text: Callable[[Mapping[str, Any]], str]
    shown: bool = True


KINDS = {
    "silent": _Kind("no step", ("heard_again", "exited"), _silent),
    "save_failed": _Kind("not saved", ("saved", "skipped"), _unsaved),
    "unchanged": _Kind("nothing new is saved", ("changed",), _unchanged),
    "no_steps": _Kind("no step is counted", ("steps_seen",), lambda event: str(event.get("reason"))),
    "upload_failed": _Kind("uploads fail", ("uploaded", "upload_back"), lambda event: str(event.get("reason")), False),
}
"""The events that tell of trouble."""

_OF_SAVES = frozenset(name for kind in ("save_failed", "unchanged", "no_steps") for name in (kind, *KINDS[kind].ends))

"""What to do with the time that is left after a notice: a pure function of what is known.

A save that is expected not to land is tried all the same where nothing better is under way: deadlines are told on the
safe side, and one that SIGKILL cuts short damages nothing.
"""

import enum
from dataclasses import dataclass

MARGIN = 1.5
"""A save may take so much longer than the slowest of the last ones."""
UNKNOWN_S = 10.0
"""What is taken for granted where nobody told a deadline: docker's stop timeout, the shortest of the usual ones."""
ABANDON_S = 0.2
"""To abandon a save in flight takes 0.01 to 0.12 s at 1 GB."""


class Choice(enum.StrEnum):
    """What is done about the newest step that is in hand."""

    FULL = "full save"
    LOCAL = "local commit, the supervisor uploads"
    """The upload is not expected to land in time; it goes on as long as the node lives, and with the next attempt."""
    PROMOTE = "promote the save in flight"
    NOTHING = "nothing newer is expected to land"
    COMMITTED = "committed already"


@dataclass(frozen=True)
class Situation:
    """What is known when a notice is served.

    Args:
        step: The newest step whose state is in hand; -1 for none.
        committed: The newest committed step; -1 for none.
        saving: Step of the save in flight; None for none.
        saving_for_s: How long it has been in flight.
        nbytes: Size of the state.
        save_s: How long a save is expected to take until its local commit.
        upload_s: How long its upload is expected to take; 0 for a run on a file system.
        left_s: Seconds until the program is killed; None where nobody said.
        can_abandon: Whether the save in flight can be broken off.
    """

    step: int
    committed: int = -1
    saving: int | None = None
    saving_for_s: float = 0.0
    nbytes: int = 0
    save_s: float = 1.0
    upload_s: float = 0.0
    left_s: float | None = None
    can_abandon: bool = False


@dataclass(frozen=True)
class Plan:
    """What to do.

    Args:
        choice: See `Choice`.
        expected_s: Seconds until the local commit that the choice is about.
        abandon: Whether to break the save in flight off first.
    """

    choice: Choice
    expected_s: float = 0.0
    abandon: bool = False


def choose(now: Situation) -> Plan:
    """Choose what to do about the newest step in hand."""
    left_s = UNKNOWN_S if now.left_s is None else max(0.0, now.left_s)
    in_flight = now.saving is not None and now.saving > now.committed
    # It may be late, so that there is always something to wait for.
    remaining_s = max(now.save_s - now.saving_for_s, 0.1 * now.save_s) if in_flight else 0.0
    if now.step <= now.committed or (in_flight and now.saving is not None and now.step <= now.saving):
        return Plan(Choice.PROMOTE, remaining_s) if in_flight else Plan(Choice.COMMITTED)

    def fits_deadline(seconds: float) -> bool:
        return seconds * MARGIN <= left_s

    def full(seconds: float, *, abandon: bool = False) -> Plan:
        both = now.upload_s == 0 or fits_deadline(seconds + now.upload_s)
        return Plan(Choice.FULL if both else Choice.LOCAL, seconds, abandon)

    if not in_flight:
        return full(now.save_s) if fits_deadline(now.save_s) else Plan(Choice.NOTHING, now.save_s)
    afresh_s, after_s = ABANDON_S + now.save_s, remaining_s + now.save_s
    if now.can_abandon and afresh_s < after_s and fits_deadline(afresh_s):
        return full(afresh_s, abandon=True)
    return full(after_s) if fits_deadline(after_s) else Plan(Choice.PROMOTE, remaining_s)

"""How fast a program steps, and when it has been silent for so long that it trains no more.

A watchdog is patient, for it ends what it takes for a stall (stall.py). This is for telling: far longer than any
step of this run ever took, and long enough for a person to care. An evaluation that comes for the first time is told of
too; from then on it counts as a step like any other.
"""

from dataclasses import dataclass

from jobkit.supervise.heartbeat import Beat, Phase

FACTOR, FLOOR_S = 10.0, 60.0
"""Silence is longer than so many times the longest step, and than this."""
_ENOUGH = 3
"""So many signs of progress between steps must have been seen before any are missed."""


@dataclass(frozen=True)
class Silence:
    """No sign of progress for far too long.

    Args:
        step: Completed steps.
        waited_s: Seconds since the last sign.
        usual_s: What a step usually takes.
    """

    step: int
    waited_s: float
    usual_s: float


class Pace:
    """Follows the steps of one attempt. Time is what the watchdog has lived through.

    Args:
        longest_s: The longest step of earlier attempts.
    """

    def __init__(self, longest_s: float = 0.0) -> None:
        self.longest_s = longest_s
        """The longest step so far."""
        self._seen = self._steps = 0
        self._spent_s = self._waited_s = 0.0

    def wait(self, seconds: float) -> None:
        """Let time pass between two steps without a sign of progress."""
        self._waited_s += seconds

    def progress(self, before: Beat, now: Beat, seconds: float, *, warm: bool) -> None:
        """Take a sign of progress.

        Args:
            before: The sign before.
            now: This one.
            seconds: Time that passed since the last look.
            warm: Whether what compiles with the first steps has compiled.
        """
        if before.phase is Phase.STEPPING and warm:
            self.longest_s = max(self.longest_s, self._waited_s)
            self._seen += 1
            self._steps += max(0, now.step - before.step)
            self._spent_s += self._waited_s + seconds
        self._waited_s = 0.0

    def silence(self, beat: Beat) -> Silence | None:
        """Return the silence since a sign of progress, None while it is none."""
        if beat.phase is not Phase.STEPPING or self._seen < _ENOUGH or not self._steps:
            return None
        if self._waited_s <= max(FLOOR_S, FACTOR * self.longest_s):
            return None
        return Silence(beat.step, self._waited_s, self._spent_s / self._steps)

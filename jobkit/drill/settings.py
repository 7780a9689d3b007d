"""What `jobkit drill` asks of a program, through one environment variable. Knows neither jax nor numpy."""

import os
from collections.abc import Mapping

import msgspec

from jobkit.checkpoint.schedule import SaveEvery
from jobkit.contract import ENV_DRILL

OPEN = 1 << 48
"""The total of a loop that learns from its data alone which step is the last one."""


class Drill(msgspec.Struct, frozen=True):
    """How a run goes while it is drilled.

    Args:
        until: `steps()` ends here, as if that were the program's own number of steps; None for the program's own.
        save_every: Save at least this often, in steps, and not by the clock: a drill has no ten minutes.
        pace_s: Added to each step, so that a tiny program can be hit from outside.
        probe: Completed steps at which fingerprints of all state go to the ledger (see fingerprints.py); where there
            are any, also in the first two steps of each attempt, wherever a step is saved and in the two after it, and
            as an attempt ends on a notice.
    """

    until: int | None = None
    save_every: int | None = None
    pace_s: float = 0.0
    probe: tuple[int, ...] = ()

    def to_json(self) -> str:
        """Write it down for the environment."""
        return msgspec.json.encode(self).decode()

    def ends(self, total: int) -> int:
        """Return at which step a run of `total` steps ends."""
        return total if self.until is None else min(total, self.until)

    def adapt(self, strategy: SaveEvery) -> None:
        """Have a strategy save as often as the drill needs."""
        if self.save_every is not None:
            strategy.every_s, strategy.auto = float("inf"), False
            strategy.every_steps = min(strategy.every_steps or self.save_every, self.save_every)


def drill_from(environ: Mapping[str, str] = os.environ) -> Drill | None:
    """Read from the environment what a drill asks; None outside of one."""
    text = environ.get(ENV_DRILL)
    return msgspec.json.decode(text, type=Drill) if text else None

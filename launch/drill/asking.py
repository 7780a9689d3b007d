"""Runs of the user's program that answer a question: started together, and waited for."""

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from jobkit import contract
from jobkit.contract import Outcome
from jobkit.errors import JobkitError
from jobkit.rundir.store import Store
from launch.lifecycle import orphans

Start = Callable[[str, dict[str, str]], Callable[[], Store]]
"""Start a run by name, with variables in its environment; what it returns waits for the end."""
NOON_S = 1_700_000_000.0
_FROZEN = """\
import os
if os.environ.get("JOBKIT_SUPERVISOR"):
    from jobkit.drill.frozen_clock import freeze
    freeze(float(os.environ["JOBKIT_DRILL_CLOCK"]))
"""


class AskedError(JobkitError):
    """A run that was to tell something did not come to its end."""


def must_end(store: Store) -> None:
    """Check that a run which was to tell something came to its end.

    Raises:
        AskedError: If it did not.
    """
    outcomes = [orphans.read_outcome(store, attempt) or {} for attempt in store.numbers(contract.ATTEMPTS)]
    if not outcomes or outcomes[-1].get("outcome") != Outcome.DONE:
        reasons = [outcome["reason"] for outcome in outcomes if outcome.get("reason")]
        reason = reasons[-1] if reasons else "it did not end in time"
        raise AskedError(f"another run, {store.url}, came to nothing: {reason}")


class Ask:
    """Starts runs together and waits for them.

    Args:
        start: Starts one.
        place: Where the drill lies.
    """

    def __init__(self, start: Start, place: Path) -> None:
        self._start, self._place = start, place

    def __call__(self, wanted: Mapping[str, dict[str, str]], whole: Collection[str] | None = None) -> list[Store]:
        """Run programs by name, each with its environment, and return their runs in that order.

        Args:
            wanted: The environments.
            whole: Which of them have to come to their end; None for all.

        Raises:
            AskedError: If one does not that has to.
        """
        stores = [finish() for finish in [self._start(name, environ) for name, environ in wanted.items()]]
        for name, store in zip(wanted, stores, strict=True):
            if whole is None or name in whole:
                must_end(store)
        return stores

    def frozen(self, environ: dict[str, str], *, at_s: float = NOON_S) -> dict[str, str]:
        """Return an environment in which the program's wall clock stands still."""
        directory = self._place / "clock"
        directory.mkdir(exist_ok=True)
        (directory / "sitecustomize.py").write_text(_FROZEN)
        path = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
        return environ | {contract.ENV_DRILL_CLOCK: str(at_s), "PYTHONPATH": os.pathsep.join(path)}

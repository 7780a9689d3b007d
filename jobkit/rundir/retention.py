"""Which committed steps stay, as the program's `Run` has said: retention in the home and on the URL goes by it."""

import contextlib
from collections.abc import Mapping
from typing import Annotated

import msgspec

from jobkit import contract
from jobkit.rundir.store import Store

_EVERYTHING = 1 << 30
_Mode = Annotated[str, msgspec.Meta(pattern="^(min|max)$")]


class Keep(msgspec.Struct, frozen=True):
    """Which committed steps stay.

    Args:
        newest: How many of the newest; at least 1.
        best: Metric and 'min' or 'max'; the best step by it stays too.
    """

    newest: Annotated[int, msgspec.Meta(ge=1)] = msgspec.field(name="keep")
    best: tuple[str, _Mode] | None = msgspec.field(default=None, name="keep_best")

    def superfluous(self, known: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Say which steps may go, oldest first; never the newest.

        Args:
            known: Committed steps with their metrics.
        """
        ordered = sorted(known)
        kept = set(ordered[-max(1, self.newest) :])
        best = self.best_of(known)
        if best is not None:
            kept.add(best)
        return [step for step in ordered if step not in kept]

    def best_of(self, known: Mapping[int, Mapping[str, float]]) -> int | None:
        """Return the best step by the metric, the earliest among equals; NaN is never best."""
        if self.best is None:
            return None
        name, mode = self.best
        sign = 1.0 if mode == "min" else -1.0
        scored = [(sign * values[name], step) for step, values in known.items() if name in values]
        scored = [(score, step) for score, step in scored if score == score]
        return min(scored)[1] if scored else None


def keep_of(store: Store) -> Keep:
    """Return what the program's `Run` keeps; everything while it has not said, or says it in no words of ours.

    Raises:
        StorageError: If the storage does not answer.
    """
    with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError):
        return msgspec.json.decode(store.get(contract.STRATEGY) or b"", type=Keep)
    return Keep(_EVERYTHING)

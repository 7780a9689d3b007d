"""The loops of an attempt, and which of them the run has left early."""

from collections.abc import Iterable

import msgspec


class EarlyStop(msgspec.Struct, frozen=True, kw_only=True):
    """A loop that the program left before its end (see leaving.py).

    Args:
        kind: 'steps', 'epochs' or 'through'.
        total: What it was to reach: steps, epochs of `data`, or the end of a range.
        data: The part that it went through; '' for none.
        step: Completed steps when it was left.
        again: Whether the program has entered it again: leaving it is no end of the training.
    """

    kind: str
    total: int
    data: str = ""
    step: int
    again: bool = False


class Loops:
    """The loops of one attempt, and which of them the run has left early.

    A loop is known by its kind, by what it is to reach and by the data that it goes through: one with others is another
    loop. Where a program enters a loop again that it has left, for its next epoch, `break` is its way to end an epoch,
    no early stop.

    Args:
        early: The early stops that the restored step knows of.
    """

    def __init__(self, early: Iterable[EarlyStop] = ()) -> None:
        self._early = {(stop.kind, stop.total, stop.data): stop for stop in early}
        self._begun: list[tuple[str, int, str]] = []

    @property
    def newest(self) -> tuple[str, int, str] | None:
        """Kind, total and data of the loop that was begun last; None before the first one."""
        return self._begun[-1] if self._begun else None

    @property
    def early(self) -> list[EarlyStop]:
        """The early stops of the run."""
        return list(self._early.values())

    def begin(self, kind: str, total: int, data: str = "") -> EarlyStop | None:
        """Begin a loop; return what changes by it.

        Args:
            kind, total, data: As in `EarlyStop`.

        Returns:
            The early stop in an earlier attempt, after which nothing of the loop is left; or one that is none, since
            the loop is entered `again`; None if it was never left.
        """
        key = (kind, total, data)
        known, first = self._early.get(key), key not in self._begun
        self._begun.append(key)
        if known is None or known.again:
            return None
        if not first:
            known = self._early[key] = msgspec.structs.replace(known, again=True)
        return known

    def stop(self, step: int) -> None:
        """Remember that the loop begun last was left early, after so many completed steps."""
        kind, total, data = key = self._begun[-1]
        if key not in self._early:
            self._early[key] = EarlyStop(kind=kind, total=total, data=data, step=step)

"""How a program leaves its loops before their end, and that a run which was stopped early stays so.

Early stopping is a decision of the program's. What it has decided goes into the commit of the step at which it did, and
from there into all that follow: whichever step an attempt restores, it does not enter a loop again that was left by
then. Of a step that was committed before the loop was left, in a loop of the program's own, it lies beside the commit.
"""

import opcode
import sys
from collections.abc import Callable, Iterable
from inspect import CO_GENERATOR
from types import FrameType

import msgspec

from jobkit.rundir.commits import EarlyStop

_DROPS_LOOP = ("POP_TOP", "POP_ITER")
"""The instruction with which `break` and `return` drop what the loop goes through; the second one from 3.14 on."""


class Loops:
    """The loops of one attempt, and which of them the run has left early.

    A loop is known by its kind and by what it is to reach: one that is given another number is another loop. Where a
    program enters a loop again that it has left, for its next epoch, `break` is its way to end an epoch, no early stop.

    Args:
        early: The early stops that the restored step knows of.
    """

    def __init__(self, early: Iterable[EarlyStop] = ()) -> None:
        self._early = {(stop.kind, stop.total): stop for stop in early}
        self._begun: list[tuple[str, int]] = []

    @property
    def early(self) -> list[EarlyStop]:
        """The early stops of the run."""
        return list(self._early.values())

    def begin(self, kind: str, total: int) -> EarlyStop | None:
        """Begin a loop; return what changes by it.

        Args:
            kind: 'steps' or 'through'.
            total: What it is to reach.

        Returns:
            The early stop in an earlier attempt, after which nothing of the loop is left; or one that is none, since
            the loop is entered `again`; None if it was never left.
        """
        key = (kind, total)
        known, first = self._early.get(key), key not in self._begun
        self._begun.append(key)
        if known is None or known.again:
            return None
        if not first:
            known = self._early[key] = msgspec.structs.replace(known, again=True)
        return known

    def stop(self, step: int) -> None:
        """Remember that the loop begun last was left early, after so many completed steps."""
        kind, total = key = self._begun[-1]
        if key not in self._early:
            self._early[key] = EarlyStop(kind=kind, total=total, step=step)


class Leaving:
    """A loop that was left before its end, until that has been served.

    At once, where it is sure that no error is on its way: what a program does next may take hours. Else before the next
    thing that needs it. Nothing can be raised while a generator is closed, so that what comes of it is raised then too.
    """

    def __init__(self) -> None:
        self._serve: Callable[[bool], None] | None = None
        self._came_of_it: BaseException | None = None
        self._closed = False

    def leave(self, serve: Callable[[bool], None], *, sure: bool) -> None:
        """Leave a loop; called while its generator is closed.

        Args:
            serve: Commits, and whatever else the end of a training takes; told whether it is no end, since another
                loop follows.
            sure: Whether it was left with `break`, rather than by an error perhaps.
        """
        if self._closed:
            return
        self._serve = serve
        if sure:
            try:
                self.settle()
            except BaseException as error:
                self._came_of_it = error

    def settle(self, *, another: bool = False) -> None:
        """Serve the loop that was left, if there is one; raise what came of it.

        Args:
            another: Whether another loop is about to begin.
        """
        serve, self._serve = self._serve, None
        if serve is not None:
            serve(another)
        error, self._came_of_it = self._came_of_it, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Serve nothing any more: the run is over, however it ended."""
        self._serve, self._closed = None, True


def by_break() -> bool:
    """Tell, where a generator is being closed, whether its loop was left with `break` or `return`.

    Whoever drops a generator closes it, in the middle of an instruction: the loop's own one for `break` and `return`,
    and the one that raised where an error leaves the loop, which a generator cannot see otherwise: no exception is
    *handled* yet. The frame tells. False where it does not: the loop was held by a variable, or closed by hand.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if frame.f_lasti >= 0 and opcode.opname[code.co_code[frame.f_lasti]] in _DROPS_LOOP:
            return True
        if not code.co_flags & CO_GENERATOR:  # a generator around ours, a progress bar, is being closed itself
            return False
        frame = frame.f_back
    return False

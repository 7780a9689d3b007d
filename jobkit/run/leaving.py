"""How a program leaves its loops before their end, and that a run which was stopped early stays so.

Early stopping is a decision of the program's. What it has decided goes into the commit of the step at which it did, and
from there into all that follow: whichever step an attempt restores, it does not enter a loop again that was left by
then. Of a step that was committed before the loop was left, in a loop of the program's own, it lies beside the commit.
"""

import opcode
import sys
from collections.abc import Callable
from inspect import CO_GENERATOR
from types import FrameType

_DROPS_LOOP = ("POP_TOP", "POP_ITER")
"""The instruction with which `break` and `return` drop what the loop goes through; the second one from 3.14 on."""


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
            serve: Commits, and whatever else the end of a training takes; told whether it is no end, since the
                program enters the same loop again.
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

    def settle(self, *, again: bool = False) -> None:
        """Serve the loop that was left, if there is one; raise what came of it.

        Args:
            again: Whether the same loop is about to begin.
        """
        serve, self._serve = self._serve, None
        if serve is not None:
            serve(again)
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

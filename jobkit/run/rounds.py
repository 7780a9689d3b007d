"""The rounds of a loop of the program's own, which saves by itself: what `Run.through` does between two of them."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from jobkit.errors import ConfigError
from jobkit.run.boundary import Boundary, Loop
from jobkit.run.ending import Ending
from jobkit.run.leaving import by_break
from jobkit.run.saving import Saving
from jobkit.run.session import Session

_Item = TypeVar("_Item")


class Rounds:
    """Loops of the program's own in one attempt.

    Args:
        session: What the attempt has open.
        saving: Saves.
        boundary: Knows who counts the steps.
        ending: How the training ends.
        stop: Tells whether to stop.
        save: Saves so many completed steps.
    """

    def __init__(
        self,
        session: Session,
        saving: Saving,
        boundary: Boundary,
        ending: Ending,
        *,
        stop: Callable[[], bool],
        save: Callable[[int], None],
    ) -> None:
        self._session, self._saving, self._boundary, self._ending = session, saving, boundary, ending
        self._stop, self._save = stop, save
        self.depth = 0
        """How many of these loops the program is in."""
        self.saves = 0
        """How often the program has saved with a step of its own."""

    def through(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Go through a loop of the program's own; see `Run.through`."""
        session, boundary, ending, parts = self._session, self._boundary, self._ending, self._saving.parts
        ending.settle_before("through", items.stop if isinstance(items, range) else None)
        if boundary.loop is Loop.OURS:
            raise ConfigError(
                "through() inside steps(), which looks for notices and saves by itself: loop as usual there"
            )
        self._saving.warn_of_draws()
        outer, saved, none, asked = not self.depth, self.saves, True, False
        if outer and isinstance(items, range) and items and ending.stopped_early("through", items.stop):
            items = ()
        self.depth += 1
        try:
            for item in items:
                if self._stop():
                    # `should_save`, if the program asks it, is to be asked once more: where all of a round is done.
                    if boundary.unsaved_step is None or asked:
                        ending.stop()
                    asked = outer
                if session.probe is not None:
                    session.probe.begin_round(session.step, parts, self._saving.given)
                if outer:
                    boundary.first_round = none
                    boundary.loop = Loop.THEIRS if boundary.loop is Loop.DONE else boundary.loop
                    ending.take_back()
                none = False
                yield item
        except GeneratorExit:
            told = self.saves > saved or boundary.unsaved_step is not None
            if outer and isinstance(items, range) and told:
                ending.leaving.leave(self._left, sure=by_break())
            raise
        finally:
            self.depth -= 1
            if outer:
                boundary.first_round = False
        if outer:
            self.settle()
            if none or self.saves > saved:
                ending.finish_rounds()

    def _left(self, again: bool) -> None:
        self.settle()
        self._ending.left_rounds(again)

    def settle(self) -> None:
        """Save what a loop of the program's own has ended with, where `should_save` has not wanted it saved before."""
        if (step := self._boundary.unsaved_step) is not None and not self._saving.strategy.only_best:
            self._save(step)

"""Epochs: the loop over a run's steps in two, with room for a validation between them.

What follows an epoch's last step, before the next epoch begins, belongs to that step: it is completed, and may be
committed, once the validation is through. So there is no state in which an epoch is trained and half validated, and a
step is as good a place to go on from inside of an epoch as between two.
"""

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

from jobkit.checkpoint.objects import position_of
from jobkit.data.batches import Batches
from jobkit.drill.settings import OPEN
from jobkit.errors import ConfigError
from jobkit.run.boundary import Boundary
from jobkit.run.ending import Ending
from jobkit.run.saving import Saving
from jobkit.run.session import Session
from jobkit.run.stepping import steps

_Loop = Generator[int, int | None, None]
_NONE: Any = object()


class Epoch(int):
    """One epoch of `run.epochs`: its number, counted from 0, and what is left of it to go through, once."""

    _items: Iterator[Any]
    _left: int | None

    def __new__(cls, number: int, items: Iterator[Any], left: int | None) -> "Epoch":
        """Make it of its number, of what it gives, and of how much that is: None where nobody knows."""
        made = super().__new__(cls, number)
        made._items, made._left = items, left
        return made

    def __iter__(self) -> Iterator[Any]:
        """Go through the steps or the batches that are left of the epoch."""
        return self._items

    def __len__(self) -> int:
        """Return how many are left of the epoch as it begins in this attempt.

        Raises:
            TypeError: If only the data tells.
        """
        if self._left is None:
            raise TypeError("only the data tells how many batches an epoch has")
        return self._left


def epochs(
    session: Session,
    saving: Saving,
    boundary: Boundary,
    ending: Ending,
    count: int,
    data: Any,
    steps_per_epoch: int | None,
) -> Iterator[Epoch]:
    """Count the run's epochs; see `Run.epochs`. The first four are as for `stepping.steps`."""
    saving.parts  # noqa: B018  (there are any)
    size = _check(count, data, steps_per_epoch, saving.positions)
    batches = data if isinstance(data, Batches) else None
    if batches is not None and batches.is_last:
        batches.next_epoch()
    if size is not None:
        total = count * size
    else:
        total = OPEN if batches is not None and batches.epoch < count else session.step
    end = total if session.probe is None else session.probe.ends(total)
    expected = None
    if batches is not None and batches.left is not None and batches.per_epoch is not None:
        expected = session.step + batches.left + (count - batches.epoch - 1) * batches.per_epoch
    loop = steps(session, saving, boundary, ending, total, epochs=count, expected=expected)
    try:
        if size is not None:
            yield from _of_steps(loop, end, size, data)
        elif batches is not None:
            yield from _of_batches(loop, end, count, batches)
    finally:
        loop.close()


def _of_steps(loop: _Loop, end: int, size: int, data: Any) -> Iterator[Epoch]:
    for first in loop:
        number, left = first // size, min(size - first % size, end - first)
        way = _Way(loop, first)
        items = iter(data) if data is not None else None
        yield Epoch(number, way.steps(left) if items is None else way.items(left, items), left)
        if way.begun < left:
            raise ConfigError(
                f"epoch {number} was left after {way.begun} of its {left} steps, by which epochs are counted: go "
                "through all of it, `for step in epoch`; epochs of a jobkit.Batches may be left early"
            )
        if items is not None and items is not data:  # a loader has to know that its epoch is over before it is saved
            next(items, None)


def _of_batches(loop: _Loop, end: int, count: int, batches: Batches) -> Iterator[Epoch]:
    for first in loop:
        number = batches.epoch
        way = _Way(loop, first)
        yield Epoch(number, way.batches(batches, end), batches.left)
        if not way.begun:
            raise ConfigError(f"epoch {number} was not gone through: `for batch in epoch`, inside of the loop")
        batches.next_epoch()
        if batches.epoch >= count:
            with contextlib.suppress(StopIteration):
                loop.send(first + way.begun)
            return


class _Way:
    """The way through one epoch, from the step with which it begins, or goes on, in this attempt."""

    def __init__(self, loop: _Loop, first: int) -> None:
        self._loop, self._first = loop, first
        self.begun = 0
        """Steps of it that have begun."""

    def steps(self, left: int) -> Iterator[int]:
        for step in range(self._first, self._first + left):
            if step > self._first:
                next(self._loop)
            self.begun += 1
            yield step

    def items(self, left: int, items: Iterator[Any]) -> Iterator[Any]:
        for number in range(left):
            if number:
                next(self._loop)
            item = next(items, _NONE)
            if item is _NONE:
                raise ConfigError(f"the data ended after {number} of the {left} batches that were left of the epoch")
            self.begun += 1
            yield item

    def batches(self, batches: Batches, end: int) -> Iterator[Any]:
        while True:
            batch = next(batches)
            self.begun += 1
            yield batch
            if batches.is_last or self._first + self.begun >= end:
                return
            next(self._loop)


def _check(count: int, data: Any, steps_per_epoch: int | None, positions: list[Any]) -> int | None:
    """Return how many steps an epoch has, None where only the data tells; refuse what makes no sense."""
    if not _is_number(count, 0):
        raise ConfigError(f"epochs({count!r}): give the number of epochs of the whole run")
    if steps_per_epoch is not None and not _is_number(steps_per_epoch, 1):
        raise ConfigError(f"epochs(..., steps_per_epoch={steps_per_epoch!r}): give a number of steps, at least 1")
    if data is None:
        if steps_per_epoch is None:
            raise ConfigError(
                "epochs() has to know where an epoch ends: epochs(10, steps_per_epoch=100), or epochs(10, batches) of "
                "a jobkit.Batches"
            )
        return steps_per_epoch
    what = f"a {type(data).__name__}"
    if not hasattr(type(data), "__iter__") or position_of(data) is None:
        raise ConfigError(
            f"epochs(..., data) was given {what}, which has no position: make jobkit.Batches of it, and give those to "
            "resume(data=...) and here"
        )
    if not any(part is data for part in positions):
        raise ConfigError(f"epochs(..., data) was given {what} that is no part of the run: resume(..., data=data)")
    if isinstance(data, Batches):
        if steps_per_epoch is not None:
            raise ConfigError("an epoch ends where jobkit.Batches do: leave steps_per_epoch out")
        return None
    if steps_per_epoch is None and not hasattr(type(data), "__len__"):
        raise ConfigError(f"epochs(..., data) was given {what}, which has no length: give steps_per_epoch=... too")
    return steps_per_epoch or len(data)


def _is_number(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

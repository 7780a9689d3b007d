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
from jobkit.data.epoch import Epoch
from jobkit.drill.settings import OPEN
from jobkit.errors import ConfigError
from jobkit.run.boundary import Boundary
from jobkit.run.ending import Ending
from jobkit.run.saving import Saving
from jobkit.run.session import Session
from jobkit.run.stepping import steps

_Loop = Generator[int, int | None, None]
_NONE: Any = object()


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
    name = next((name for name, part in saving.positions.items() if part is data), "")
    size = _check(count, data, steps_per_epoch, name)
    batches = data if isinstance(data, Batches) else None
    if size is not None:
        total = count * size
    else:
        total = OPEN if batches is not None and batches.epoch + batches.is_last < count else session.step
    end = total if session.probe is None else session.probe.ends(total)
    expected = None
    if batches is not None and batches.left is not None and batches.per_epoch is not None:
        expected = session.step + batches.left + (count - batches.epoch - 1) * batches.per_epoch
    key = "epochs", count if size is None else total, name
    loop = steps(session, saving, boundary, ending, total, key=key, expected=expected)
    try:
        if size is not None:
            yield from _of_steps(loop, boundary, end, size, data)
        elif batches is not None:
            yield from _of_batches(loop, boundary, end, count, batches)
    finally:
        loop.close()


def _of_steps(loop: _Loop, boundary: Boundary, end: int, size: int, data: Any) -> Iterator[Epoch]:
    for first in loop:
        number, left = first // size, min(size - first % size, end - first)
        way = _Way(loop, boundary, first)
        items = iter(data) if data is not None else None
        yield Epoch(number, way.steps(left) if items is None else way.items(left, items), left)
        if way.begun < left:
            raise ConfigError(
                f"epoch {number} was left after {way.begun} of its {left} steps, by which epochs are counted: go "
                "through all of it, `for step in epoch`; epochs of a jobkit.Batches may be left early"
            )
        if items is None or items is data or (first + left) % size:
            continue
        if next(items, _NONE) is not _NONE:  # a loader has to know that its epoch is over before it is saved
            raise ConfigError(
                f"a {type(data).__name__} goes on after the {size} batches of its epoch: it has to end there; give one "
                "that does, or jobkit.Batches"
            )


def _of_batches(loop: _Loop, boundary: Boundary, end: int, count: int, batches: Batches) -> Iterator[Epoch]:
    for first in loop:
        if batches.is_last:  # another loop has gone so far
            batches.next_epoch()
        number = batches.epoch
        way = _Way(loop, boundary, first)
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

    def __init__(self, loop: _Loop, boundary: Boundary, first: int) -> None:
        self._loop, self._boundary, self._first = loop, boundary, first
        self.begun = 0
        """Steps of it that have begun."""
        boundary.step_begun = False

    def _begin(self) -> None:
        self.begun += 1
        self._boundary.step_begun = True

    def steps(self, left: int) -> Iterator[int]:
        for step in range(self._first, self._first + left):
            if step > self._first:
                next(self._loop)
            self._begin()
            yield step

    def items(self, left: int, items: Iterator[Any]) -> Iterator[Any]:
        for number in range(left):
            if number:
                next(self._loop)
            item = next(items, _NONE)
            if item is _NONE:
                raise ConfigError(f"the data ended after {number} of the {left} batches that were left of the epoch")
            self._begin()
            yield item

    def batches(self, batches: Batches, end: int) -> Iterator[Any]:
        while True:
            batch = next(batches)
            self._begin()
            yield batch
            if batches.is_last or self._first + self.begun >= end:
                return
            next(self._loop)


def _check(count: int, data: Any, steps_per_epoch: int | None, name: str) -> int | None:
    """Return how many steps an epoch has, None where only the data tells; refuse what makes no sense.

    Args:
        count, data, steps_per_epoch: As in `Run.epochs`.
        name: Of the part that the data is; '' if it is none.
    """
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
    if not name:
        raise ConfigError(f"epochs(..., data) was given {what} that is no part of the run: resume(..., data=data)")
    if isinstance(data, Batches):
        if steps_per_epoch is not None:
            raise ConfigError("an epoch ends where jobkit.Batches do: leave steps_per_epoch out")
        return None
    length = None if isinstance(data, Iterator) and steps_per_epoch is not None else _length(data)
    if steps_per_epoch is None and length is None:
        raise ConfigError(f"epochs(..., data) was given {what}, which has no length: give steps_per_epoch=... too")
    if None not in (steps_per_epoch, length) and steps_per_epoch != length:
        raise ConfigError(
            f"epochs(..., data, steps_per_epoch={steps_per_epoch}) was given {what} of {length} batches, which is how "
            "long its epochs are: leave steps_per_epoch out; for shorter ones give what ends there, or jobkit.Batches"
        )
    return steps_per_epoch or length


def _length(data: Any) -> int | None:
    """Return how many batches there are in an epoch of a loader; None if it does not know."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):  # a loader of PyTorch's over what has no length
        return None


def _is_number(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

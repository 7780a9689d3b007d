"""One epoch of a training, as the loop over them gives it."""

from collections.abc import Iterator
from typing import Any


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

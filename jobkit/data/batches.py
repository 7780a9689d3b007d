"""Batches in epochs, made anew from (seed, epoch), so that they can be rewound: a part of a run by themselves."""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jobkit.errors import ConfigError, say

_NONE: Any = object()


class Batches:
    """Batches over epochs without end, which know where they are: give them to `resume`, and take `next(batches)`, or
    go through `run.epochs(10, batches)`.

        batches = jobkit.Batches((images, labels), batch_size=32)
        batches = jobkit.Batches(lambda seed, epoch: dataset.shuffle(seed=seed).iter(32))

    In several processes each gets its own share: of arrays and lists, its rows of every batch; of what a function
    makes, every batch whose turn is its own. All get equally many.

    Args:
        source: An array of shape (rows, ...), a tuple or dict of arrays with as many rows, or a list of examples:
            shuffled anew in each epoch. A batch has the same form, with `batch_size` rows, divided by the number of
            processes that share it. Or a function of (seed, epoch) that returns the batches of one epoch: a list, a
            generator, a tf.data dataset, a torch DataLoader, ... `seed` is an integer below 2**31 of that epoch's own,
            to shuffle with; called again with the same two, it has to return the same batches.
        batch_size: Rows of a batch, over all processes; only for arrays and lists.
        seed: Makes the order of each epoch.
        shuffle: Whether arrays and lists are shuffled.
        drop_remainder: Whether the last batch of arrays and lists is left out where it is a smaller one.
        shard: Whether several processes share the batches; else each gets all.

    Raises:
        ConfigError: If a source, or a number, is none.
    """

    def __init__(
        self,
        source: Any,
        batch_size: int | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_remainder: bool = False,
        shard: bool = True,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
            raise ConfigError(f"Batches(..., seed={seed!r}): give an integer")
        self._seed, self._shard = int(seed), shard
        self._make: Callable[[int, int], Any]
        if callable(source):
            if batch_size is not None:
                raise ConfigError("Batches(make_epoch, batch_size=...): the function makes the batches; leave it out")
            self._make = source
        else:
            size = _length(source)
            if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
                raise ConfigError(f"Batches(..., batch_size={batch_size!r}): give the number of rows of a batch")
            self._make = _Rows(source, size, batch_size, shuffle, drop_remainder, self._share)
        self._epoch = self._given = self._taken = 0
        self._sums: dict[str, tuple[Any, int]] = {}
        self._iterator: Iterator[Any] | None = None
        self._ahead: Any = _NONE

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0, of the batch that was given last; of the next one before there is any."""
        return self._epoch

    @property
    def index(self) -> int:
        """Which batch of its epoch was given last, counted from 0; -1 before its first one."""
        return self._given - 1

    @property
    def is_last(self) -> bool:
        """Whether the batch that was given last is the last one of its epoch; it makes the next one to know."""
        return self._given > 0 and not self._more()

    @property
    def per_epoch(self) -> int | None:
        """How many batches an epoch has; None where only the data tells."""
        return self._make.count if isinstance(self._make, _Rows) and self._share()[1] == 1 else None

    @property
    def left(self) -> int | None:
        """How many batches are left of the epoch; None where only the data tells."""
        return None if self.per_epoch is None else self.per_epoch - self._given

    def __iter__(self) -> Iterator[Any]:
        """Return itself: epochs follow each other without end."""
        return self

    def __next__(self) -> Any:
        """Return the next batch, of the next epoch after the last one.

        Returns:
            Rows in the form that the source has, of numpy's, with a first axis of `batch_size` (the last batch of an
            epoch may have fewer); or what the function made, as it is.

        Raises:
            ConfigError: If an epoch has no batch.
        """
        if not self._more():
            self.next_epoch()
            if not self._more():
                raise ConfigError(
                    f"Batches: there is no batch in epoch {self._epoch}: a function makes them anew each time"
                )
        batch, self._ahead = self._ahead, _NONE
        self._given += 1
        self._taken += 1 if isinstance(self._make, _Rows) else self._share()[1]
        return batch

    def next_epoch(self) -> None:
        """Go on with the next epoch, whatever is left of this one; its sums begin at 0."""
        if self._given:
            self._epoch, self._given, self._taken, self._sums = self._epoch + 1, 0, 0, {}
            self._iterator, self._ahead = None, _NONE

    def _more(self) -> bool:
        """Tell whether the epoch has another batch; that one waits, and counts as given when it is."""
        if self._ahead is _NONE:
            if self._iterator is None:
                self._iterator = self._begin()
            try:
                self._ahead = next(self._iterator, _NONE)
            except BaseException:  # a generator that raised is at its end: who tries again is to get that batch
                self._iterator = None
                raise
        return self._ahead is not _NONE

    def _begin(self) -> Iterator[Any]:
        """Make what is left of the epoch."""
        made = self._make(self._epoch_seed(), self._epoch)
        if isinstance(made, _Order):
            return made.batches(self._taken)
        if not hasattr(type(made), "__iter__"):
            raise ConfigError(f"Batches: the function returned a {type(made).__name__}, and no batches to go through")
        index, count = self._share()
        left = made[self._taken :] if isinstance(made, list | tuple) else itertools.islice(made, self._taken, None)
        return iter(left) if count == 1 else _turns(iter(left), index, count)

    def _epoch_seed(self) -> int:
        """Return a seed for this epoch: none that seed and epoch could exchange, the same everywhere and always."""
        digest = hashlib.blake2b(f"{self._seed} {self._epoch}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") >> 1

    def _share(self) -> tuple[int, int]:
        """Return which share of the batches is this process's, and how many there are."""
        return (jax.process_index(), jax.process_count()) if self._shard else (0, 1)

    # What an epoch adds up to.

    def add(self, **values: Any) -> None:
        """Add numbers of the batch that was given last, a loss, to what the epoch adds up to; the device is not waited
        for.

        Args:
            values: Numbers, or arrays of shape (); they are added up as float32.
        """
        for name, value in values.items():
            value = value.astype("float32") if hasattr(value, "astype") else np.float32(value)
            total, count = self._sums.get(name, (None, 0))
            self._sums[name] = (value if total is None else total + value, count + 1)

    def means(self) -> dict[str, float]:
        """Return the means of what was added in this epoch, by name; waits for the device."""
        return {name: float(total) / count for name, (total, count) in self._sums.items()}

    # The state.

    def state_dict(self) -> dict[str, Any]:
        """Return where the batches are, and what the epoch adds up to."""
        place = {"seed": self._seed, "epoch": self._epoch, "given": self._given, "taken": self._taken}
        rows = self._make.shape if isinstance(self._make, _Rows) else None
        return place | {"rows": rows, "sums": {name: list(sums) for name, sums in self._sums.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where the batches were; batches before that, which a function makes, are made and passed over.

        Where the rows are divided into others now, it goes on with the row that comes next, if a batch begins there,
        else with the first one of the epoch, and says so.

        Args:
            state: What `state_dict` returned.
        """
        if state["seed"] != self._seed:
            say(f"Batches: the run began with seed {state['seed']} and goes on with it; seed={self._seed} is not used")
        self._seed, self._epoch, self._given, self._taken = (
            state[name] for name in ("seed", "epoch", "given", "taken")
        )
        self._sums = {name: (_of_no_device(total), count) for name, (total, count) in state["sums"].items()}
        self._iterator, self._ahead = None, _NONE
        before = state.get("rows")
        if isinstance(self._make, _Rows) and before is not None and self._given and before != self._make.shape:
            self._divide_anew(self._make, *before)

    def _divide_anew(self, made: "_Rows", size: int, batch_size: int, count: int) -> None:
        """Find the place in an epoch whose rows were divided otherwise.

        Args:
            made: How they are now.
            size, batch_size, count: As in `_Rows.shape`, how they were.
        """
        done = self._taken * batch_size
        if self._taken >= count:  # the epoch was over, and stays so
            self._given = self._taken = made.count
        elif size == made.size and done % made.batch_size == 0:
            self._given = self._taken = done // made.batch_size
        else:
            say(
                f"Batches: epoch {self._epoch} begins anew: {done} of its {size} rows were given, in batches of "
                f"{batch_size}, and there are {made.size} in batches of {made.batch_size} now"
            )
            self._given = self._taken = 0
            self._sums = {}


class _Rows:
    """Batches of the rows of arrays, or of a list; called with seed and epoch, it gives the order of one epoch."""

    def __init__(
        self, source: Any, size: int, batch_size: int, shuffle: bool, drop: bool, share: Callable[[], tuple[int, int]]
    ) -> None:
        self.source, self.size, self.batch_size, self.share = source, size, batch_size, share
        self.shuffle = shuffle
        self.count = size // batch_size if drop else math.ceil(size / batch_size)
        self.shape = [size, batch_size, self.count]
        """Rows, rows of a batch, and batches of an epoch."""
        if not self.count:
            raise ConfigError(f"Batches: {size} rows make no batch of {batch_size}")

    def __call__(self, seed: int, epoch: int) -> "_Order":
        rows = np.random.default_rng(seed).permutation(self.size) if self.shuffle else np.arange(self.size)
        return _Order(self, rows)


class _Order:
    """The rows of one epoch, in their order."""

    def __init__(self, of: _Rows, rows: np.ndarray) -> None:
        self._of, self._rows = of, rows

    def __iter__(self) -> Iterator[Any]:
        return self.batches(0)

    def batches(self, begin: int) -> Iterator[Any]:
        """Yield the batches from one on: this process's rows of each."""
        of = self._of
        index, count = of.share()
        if of.batch_size % count:
            raise ConfigError(
                f"Batches: {count} processes cannot share batches of {of.batch_size} rows alike: choose a multiple of "
                f"{count}, or shard=False to give all rows to each"
            )
        for number in range(begin, of.count):
            rows = self._rows[number * of.batch_size : (number + 1) * of.batch_size]
            each = len(rows) // count
            if not each:
                return
            own = rows[index * each : (index + 1) * each]
            if isinstance(of.source, list):
                yield [of.source[row] for row in own]
            else:
                yield jax.tree.map(lambda array, own=own: array[own], of.source)


def _length(source: Any) -> int:
    """Return the number of rows of a source.

    Raises:
        ConfigError: If it has none.
    """
    remedy = (
        "give arrays with the same first axis, a list of examples, or a function of (seed, epoch) that makes the "
        "batches of one epoch: Batches(lambda seed, epoch: ...)"
    )
    if isinstance(source, list):
        return len(source)
    sizes = {np.shape(array)[0] if np.ndim(array) else 0 for array in _arrays(source)}
    if len(sizes) != 1:
        what = f"a {type(source).__name__}" if not sizes else f"arrays of {sorted(map(str, sizes))} rows"
        raise ConfigError(f"Batches: {what} cannot be made anew for each epoch: {remedy}")
    return sizes.pop()


def _arrays(source: Any) -> list[Any]:
    leaves = jax.tree.leaves(source) if isinstance(source, tuple | dict | np.ndarray | jax.Array) else []
    return leaves if all(isinstance(leaf, np.ndarray | jax.Array) for leaf in leaves) else []


def _of_no_device(total: Any) -> Any:
    """Return a sum that the next value decides the devices of, as before the restart."""
    return jnp.asarray(np.asarray(total)) if isinstance(total, jax.Array) else total


def _turns(batches: Iterator[Any], index: int, count: int) -> Iterator[Any]:
    """Yield every batch whose turn is this process's, of whole rounds alone."""
    while len(turn := list(itertools.islice(batches, count))) == count:
        yield turn[index]

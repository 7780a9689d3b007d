"""Batches: what an epoch is made of, in which order, and how it is rewound."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jobkit
from jobkit.checkpoint.objects import decode, encode

ROWS = np.arange(20)


def rewound(make: Callable[[], jobkit.Batches], given: int) -> jobkit.Batches:
    """Return batches in the state that others have after so many, by way of what a checkpoint holds."""
    before, after = make(), make()
    for _ in range(given):
        before.add(loss=float(np.sum(next(before))))
    after.load_state_dict(decode(*encode(before.state_dict())))
    assert (after.epoch, after.index, after.means()) == (before.epoch, before.index, before.means())
    return after


def taken(batches: jobkit.Batches, count: int) -> list[Any]:
    """Take so many batches, with where they are from."""
    return [(np.asarray(next(batches)).tolist(), batches.epoch, batches.index) for _ in range(count)]


def drawn(seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Make one epoch, of another length each time."""
    yield from np.random.default_rng(seed).permutation(20).reshape(10, 2)[: 3 + epoch]


class Dataset:
    """What tf.data's datasets, torch's DataLoader and Hugging Face's iter() are: made with a seed, iterated once."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __iter__(self) -> Iterator[list[int]]:
        return iter(np.random.default_rng(self._seed).permutation(20).reshape(5, 4).tolist())


MADE: dict[str, Callable[[], jobkit.Batches]] = {
    "array": lambda: jobkit.Batches(ROWS, batch_size=6, seed=5),
    "jax": lambda: jobkit.Batches(jnp.arange(20), batch_size=6, drop_remainder=True),
    "list": lambda: jobkit.Batches(list(range(20)), batch_size=8, shuffle=False),
    "generator": lambda: jobkit.Batches(drawn, seed=2),
    "list of batches": lambda: jobkit.Batches(lambda seed, epoch: [[seed], [epoch], [-seed]]),
    "dataset": lambda: jobkit.Batches(lambda seed, epoch: Dataset(seed)),
}


@pytest.mark.parametrize("kind", MADE)
def test_rewound_anywhere(kind: str) -> None:
    """From every position of the first epochs the same batches follow as without interruption."""
    whole = taken(MADE[kind](), 14)
    assert {epoch for _, epoch, _ in whole} >= {0, 1, 2}
    for given in range(12):
        assert taken(rewound(MADE[kind], given), 14 - given) == whole[given:]


@pytest.mark.parametrize("kind", MADE)
def test_looking_ahead_takes_nothing(kind: str) -> None:
    """To ask whether a batch is the last one of its epoch changes neither what follows nor the state."""
    batches, whole = MADE[kind](), taken(MADE[kind](), 12)
    for number in range(11):
        next(batches)
        state = batches.state_dict()
        assert batches.is_last == (whole[number][1] != whole[number + 1][1])
        assert batches.state_dict() == state
    assert taken(batches, 1) == whole[11:]


def test_an_epoch_has_each_row_once_and_another_order() -> None:
    """Shuffled arrays are whole in each epoch, in an order of seed and epoch."""

    def orders(seed: int) -> list[tuple[int, ...]]:
        batches = jobkit.Batches({"x": ROWS, "y": -ROWS}, batch_size=6, seed=seed)
        epochs: list[list[int]] = [[], [], []]
        for _ in range(12):
            batch = next(batches)
            assert (batch["x"] == -batch["y"]).all()
            epochs[batches.epoch] += batch["x"].tolist()
        return [tuple(epoch) for epoch in epochs]

    assert all(sorted(order) == ROWS.tolist() for order in orders(0))
    assert len({*orders(0), *orders(1)}) == 6  # seed 0 in epoch 1 is not seed 1 in epoch 0
    assert orders(1) == orders(1)


def test_means_of_an_epoch() -> None:
    """What is added makes a mean of its epoch, on the device where it is from, and begins anew with the next one."""
    batches = jobkit.Batches(ROWS, batch_size=5)
    for number in range(6):
        next(batches)
        batches.add(loss=jnp.bfloat16(number), accuracy=number)
        if batches.is_last:
            assert batches.means() == {"loss": 1.5, "accuracy": 1.5}
    assert batches.means() == {"loss": 4.5, "accuracy": 4.5}
    batches.next_epoch()
    assert (batches.means(), batches.epoch, batches.index) == ({}, 2, -1)


@pytest.mark.parametrize("kind", MADE)
def test_processes_share(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Two processes get equally many batches of an epoch, together those of one process and none twice; another number
    of processes goes on where they were.
    """

    def of(index: int, count: int) -> jobkit.Batches:
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        return MADE[kind]()

    def first_epoch(batches: jobkit.Batches) -> list[list[Any]]:
        return [items for items, epoch, _ in taken(batches, 12) if epoch == 0]

    alone = first_epoch(of(0, 1))
    both = [first_epoch(of(index, 2)) for index in range(2)]
    assert len(both[0]) == len(both[1]) > 0
    assert [len(batch) for batch in both[0]] == [len(batch) for batch in both[1]]
    shared = [item for pair in zip(*both, strict=True) for batch in pair for item in batch]
    every = [item for batch in alone for item in batch]
    assert [item for item in every if item in shared] == shared
    state = rewound(lambda: of(1, 2), 1).state_dict()
    goes_on = of(0, 1)
    goes_on.load_state_dict(state)
    done = len(both[0][0]) + len(both[1][0])
    assert [item for batch in first_epoch(goes_on) for item in batch] == every[done:]


@pytest.mark.parametrize(
    ("source", "named", "said"),
    [
        (iter([1]), {"batch_size": 1}, "a function of"),
        (Dataset(0), {"batch_size": 1}, "a function of"),
        ((ROWS, ROWS[:3]), {"batch_size": 1}, "arrays of"),
        (np.float32(1), {"batch_size": 1}, "a function of"),
        (ROWS, {}, "batch_size=None"),
        (ROWS, {"batch_size": 0}, "batch_size=0"),
        (ROWS, {"batch_size": 30, "drop_remainder": True}, "20 rows make no batch of 30"),
        ([], {"batch_size": 30}, "0 rows make no batch"),
        (drawn, {"batch_size": 3}, "leave it out"),
        (drawn, {"seed": "a"}, "seed='a'"),
    ],
)
def test_refused(source: Any, named: dict[str, Any], said: str) -> None:
    """What cannot be made anew is refused, with what to give instead."""
    with pytest.raises(jobkit.ConfigError, match=said):
        jobkit.Batches(source, **named)


def test_a_function_that_makes_nothing_anew() -> None:
    """One generator for all epochs, or none at all, is found when its epoch is."""
    once = iter([1, 2])
    batches = jobkit.Batches(lambda seed, epoch: once)
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(jobkit.ConfigError, match="no batch in epoch 1"):
        next(batches)
    with pytest.raises(jobkit.ConfigError, match="returned a int"):
        next(jobkit.Batches(lambda seed, epoch: seed))


def test_rows_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that leaves rows over is refused before it is trained on."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(jobkit.ConfigError, match="choose a multiple of 4"):
        next(jobkit.Batches(ROWS, batch_size=6))
    assert len(next(jobkit.Batches(ROWS, batch_size=6, shard=False))) == 6


def test_a_batch_that_could_not_be_made() -> None:
    """Who tries again after an error gets that batch, and no end of the epoch."""
    fails = [OSError("the storage does not answer")]

    def make(seed: int, epoch: int) -> Iterator[int]:
        for number in range(4):
            if number == 2 and fails:
                raise fails.pop()
            yield number

    batches = jobkit.Batches(make)
    taken(batches, 2)
    with pytest.raises(OSError, match="does not answer"):
        next(batches)
    assert taken(batches, 3) == [(2, 0, 2), (3, 0, 3), (0, 1, 0)]


def moved(before: jobkit.Batches, given: int, after: jobkit.Batches) -> jobkit.Batches:
    """Return batches in the state that others, of other rows, have after so many."""
    for _ in range(given):
        before.add(loss=float(np.sum(next(before))))
    after.load_state_dict(decode(*encode(before.state_dict())))
    return after


def test_another_size_of_batches(capfd: pytest.CaptureFixture[str]) -> None:
    """An epoch goes on with the row that comes next, if a batch begins there; else it begins anew, which is said; one
    that was over stays so.
    """

    def rows(batches: jobkit.Batches, count: int) -> list[int]:
        return [row for batch, _, _ in taken(batches, count) for row in batch]

    def of(size: int, source: np.ndarray = ROWS, **named: Any) -> jobkit.Batches:
        return jobkit.Batches(source, batch_size=size, seed=5, **named)

    order = rows(of(4), 5)
    goes_on = moved(of(4), 2, of(2))
    assert (goes_on.index, goes_on.left, set(goes_on.means())) == (3, 6, {"loss"})
    assert rows(goes_on, 6) == order[8:]
    over = moved(of(6), 4, of(4))
    assert (over.epoch, over.is_last, rows(over, 5)) == (0, True, rows(moved(of(4), 5, of(4)), 5))
    assert moved(of(6, drop_remainder=True), 3, of(4)).is_last
    assert capfd.readouterr().err == ""
    anew = moved(of(6), 1, of(4))
    assert "epoch 0 begins anew: 6 of its 20 rows were given, in batches of 6" in capfd.readouterr().err
    assert (anew.epoch, anew.index, anew.means(), rows(anew, 5)) == (0, -1, {}, order)
    assert moved(of(4), 2, of(4, np.arange(24))).index == -1
    assert "there are 24 in batches of 4 now" in capfd.readouterr().err


def test_another_seed(capfd: pytest.CaptureFixture[str]) -> None:
    """The run goes on with the seed that it began with, and says so."""
    state = jobkit.Batches(ROWS, batch_size=4, seed=5).state_dict()
    batches = jobkit.Batches(ROWS, batch_size=4, seed=6)
    batches.load_state_dict(state)
    assert "began with seed 5 and goes on with it; seed=6 is not used" in capfd.readouterr().err
    assert taken(batches, 5) == taken(jobkit.Batches(ROWS, batch_size=4, seed=5), 5)

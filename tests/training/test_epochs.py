"""Epochs: a loop in a loop, interrupted anywhere, goes on where it was; validations count once."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jobkit
from jobkit.compare import compare
from jobkit.rundir import commits
from jobkit.rundir.ledger import read_events
from jobkit.rundir.store import Store
from tests.harness import training

ROWS = np.arange(10.0, dtype=np.float32)
EPOCHS, SIZE = 4, 5


class Bar:
    """A progress bar, as tqdm is made."""

    def __init__(self, iterable: Iterable[Any]) -> None:
        self.iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        yield from self.iterable


class Loader:
    """A loader as torchdata's StatefulDataLoader: iterated anew in each epoch, which it has to have seen to its end."""

    def __init__(self) -> None:
        self.epoch = self.given = 0

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[np.ndarray]:
        order = np.random.default_rng(self.epoch).permutation(10).reshape(SIZE, 2)
        while self.given < SIZE:
            self.given += 1
            yield ROWS[order[self.given - 1]]
        self.epoch, self.given = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Return the position."""
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go there."""
        self.epoch, self.given = state["epoch"], state["given"]


class Pairs:
    """An iterator with a position, as Grain's are."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        self.at += 1
        return ROWS[[self.at % 10, 3 * self.at % 10]]

    def get_state(self) -> int:
        """Return the position."""
        return self.at

    def set_state(self, state: int) -> None:
        """Go there."""
        self.at = state


def uneven(seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Make the batches of one epoch, of which even ones have one fewer."""
    order = np.random.default_rng(seed).permutation(10).reshape(SIZE, 2)
    for rows in order[: SIZE - (epoch + 1) % 2]:
        yield ROWS[rows]


KINDS: dict[str, Callable[[], Any]] = {
    "arrays": lambda: jobkit.Batches(ROWS, batch_size=2, seed=3),
    "generator": lambda: jobkit.Batches(uneven, seed=3),
    "loader": Loader,
    "iterator": Pairs,
    "steps": Pairs,
}


def train(
    url: Any,
    kind: str = "arrays",
    hit: tuple[int, int] | None = None,
    name: str = "SIGTERM",
    save_every: Any = 3,
    bar: Callable[[Any], Any] = Bar,
) -> list[int]:
    """Train in epochs with validations, and take a signal in the middle of one.

    Args:
        hit: The epoch and how many steps of it are done when the signal comes; in its validation where that is all.
        name: The signal.
        bar: What goes around each loop.

    Returns:
        The epochs that were validated.
    """
    data, validated = KINDS[kind](), []
    fixed = {"steps_per_epoch": SIZE} if kind in ("iterator", "steps") else {}
    with jobkit.Run(url, save_every=save_every, keep=100, trackers=()) as run:
        state = run.resume(w=jnp.zeros(()), data=data, seen=[], optimizer=None)
        for epoch in bar(run.epochs(EPOCHS, *() if kind == "steps" else (data,), **fixed)):
            for done, item in enumerate(bar(epoch), 1):
                batch = next(data) if kind == "steps" else item
                state.w = 0.9 * state.w + batch.sum()
                state.seen = [*state.seen, int(epoch)]
                run.log(loss=state.w)
                if hit == (epoch, done):
                    os.kill(os.getpid(), signal.Signals[name])
            if hit == (epoch, -1):
                while name == "SIGKILL" and run.committed_step < SIZE * epoch:
                    time.sleep(0.01)  # what the epoch before has asked for is on its way
                os.kill(os.getpid(), signal.Signals[name])
            validated.append(int(epoch))
            run.save(val_loss=float(state.w))
    return validated


def metrics(url: Path) -> dict[int, dict[str, float]]:
    """Return the metrics of the commits that have any, by step."""
    store = Store(url)
    every = {step: dict(commits.read(store, step).metrics) for step in commits.steps(store)}
    return {step: values for step, values in every.items() if values}


@pytest.mark.parametrize("kind", KINDS)
def test_a_notice_in_the_middle_of_an_epoch(tmp_path: Path, kind: str) -> None:
    """The next attempt goes on at the right batch of the same epoch, and ends with the same bits and validations."""
    assert train(tmp_path / "whole", kind) == [0, 1, 2, 3]
    seen: list[int] = []
    for hit in ((0, 2), (1, 4), (2, -1)):
        with pytest.raises(jobkit.Preempted):
            seen += train(tmp_path / "run", kind, hit)
    seen += train(tmp_path / "run", kind)
    assert compare(tmp_path / "whole", tmp_path / "run").equal
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == EPOCHS
    stopped = [event["step"] for event in read_events(Store(tmp_path / "run")) if event["event"] == "stopped"]
    assert stopped == ([2, 8, 13] if kind == "generator" else [2, 9, 15])
    ends = {event["total"] for event in read_events(Store(tmp_path / "run")) if event["event"] == "loop"}
    assert ends == (set() if kind == "generator" else {EPOCHS * SIZE})
    # Nothing is left to do, and nothing is done again.
    assert train(tmp_path / "run", kind) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["arrays", "loader"])
def test_a_kill_in_a_validation(tmp_path: Path, kind: str) -> None:
    """A validation that was interrupted runs again, one that was committed does not; the bits are the same."""
    assert training.attempt(tmp_path / "whole", function=train, kind=kind)[0] == 0
    code, printed = training.attempt(tmp_path / "run", function=train, kind=kind, hit=(1, -1), name="SIGKILL")
    assert code == -signal.SIGKILL, printed
    assert SIZE in metrics(tmp_path / "run")
    assert 2 * SIZE not in metrics(tmp_path / "run")
    code, printed = training.attempt(tmp_path / "run", function=train, kind=kind, hit=(3, -1), name="SIGKILL")
    assert code == -signal.SIGKILL, printed
    assert training.attempt(tmp_path / "run", function=train, kind=kind)[0] == 0
    assert compare(tmp_path / "whole", tmp_path / "run").equal
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")


def stop_early(url: Path, hit: tuple[int, int] | None = None) -> int:
    """Train until the validation is no better for three epochs; return the step at the end."""
    data, stopping = jobkit.Batches(ROWS, batch_size=2), jobkit.EarlyStopping(patience=3)
    losses = [5.0, 4.0, 4.5, 3.0, 3.1, float("nan"), 3.0, 1.0, 0.5]
    with jobkit.Run(url, save_every=None, keep=100, keep_best=("val_loss", "min"), trackers=()) as run:
        state = run.resume(w=jnp.zeros(()), data=data, stopping=stopping, optimizer=None)
        for epoch in run.epochs(9, data):
            for number, batch in enumerate(epoch):
                state.w += batch.sum()
                if hit == (epoch, number):
                    os.kill(os.getpid(), signal.SIGTERM)
            run.save(val_loss=losses[epoch])
            if stopping.update(losses[epoch]):
                break
        assert run.restore("best") == 4 * SIZE
        return run.step


def test_early_stopping(tmp_path: Path) -> None:
    """Patience is part of the state: interrupted while it waits, a training stops where an undisturbed one does, and
    stays so.
    """
    assert stop_early(tmp_path / "whole") == 7 * SIZE
    for hit in ((4, 3), (5, 0)):
        with pytest.raises(jobkit.Preempted):
            stop_early(tmp_path / "run", hit)
    assert stop_early(tmp_path / "run") == 7 * SIZE
    assert compare(tmp_path / "whole", tmp_path / "run").equal
    assert stop_early(tmp_path / "run", (7, 0)) == 7 * SIZE


@pytest.mark.parametrize(
    ("arguments", "said"), [({"patience": 0}, "patience=0"), ({"patience": 2, "mode": "least"}, "'least'"),
    ({"patience": 2, "min_delta": float("nan")}, "min_delta=nan")]
)  # fmt: skip
def test_early_stopping_refuses(arguments: dict[str, Any], said: str) -> None:
    """What makes no sense is refused with the value."""
    with pytest.raises(jobkit.ConfigError, match=said):
        jobkit.EarlyStopping(**arguments)


def test_early_stopping_of_what_is_to_grow() -> None:
    """With mode max and a least difference, only what is better by more counts."""
    stopping = jobkit.EarlyStopping(patience=2, mode="max", min_delta=0.1)
    assert [stopping.update(value) for value in (0.5, 0.55, jnp.float32(0.7), 0.75, 0.79)] == [False] * 4 + [True]
    assert stopping.best == pytest.approx(0.7)


def go_through(place: Path, parts: dict[str, Any], *arguments: Any, **named: Any) -> None:
    """Go through epochs, and through none of their steps."""
    with jobkit.Run(place, trackers=()) as run:
        run.resume(w=0.0, optimizer=None, **parts)
        for _ in run.epochs(*arguments, **named):
            pass


def refused(tmp_path: Path, *arguments: Any, give: bool = True, **named: Any) -> str:
    """Return why `run.epochs` refuses arguments."""
    parts = {"data": arguments[1]} if give and len(arguments) > 1 else {}
    place = tmp_path / str(len(list(tmp_path.iterdir())))
    with pytest.raises(jobkit.ConfigError) as told:
        go_through(place, parts, *arguments, **named)
    return str(told.value)


@pytest.mark.parametrize("loop", ["steps", "epochs", "through"])
def test_batches_that_are_drawn_before_the_loop(tmp_path: Path, loop: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A draw between `resume` and the first loop is warned of, since each restart repeats it; one before is not."""
    for draws in ("before", "between"):
        data, shown = jobkit.Batches(ROWS, batch_size=2), jobkit.Batches(ROWS, batch_size=2)
        if draws == "before":
            next(data)
        with jobkit.Run(tmp_path / draws, trackers=()) as run:
            run.resume(w=0.0, data=data, optimizer=None)
            next(shown)
            if draws == "between":
                next(data)
            items: Iterable[Any] = run.steps(2) if loop == "steps" else run.through(range(2))
            for item in run.epochs(2, steps_per_epoch=1) if loop == "epochs" else items:
                list(item if loop == "epochs" else ())
                next(data)
            if loop == "through":
                run.save(2)
    warned = [line for line in capfd.readouterr().err.splitlines() if "was drawn from between" in line]
    assert len(warned) == 1
    assert warned[0].startswith("jobkit: warning: data was drawn from between resume() and the loop")


def test_epochs_refuse_what_has_no_end_or_position(tmp_path: Path) -> None:
    """What is wrong is said, with what to write instead."""
    batches = jobkit.Batches(ROWS, batch_size=2)
    assert "steps_per_epoch=100" in refused(tmp_path, 3)
    assert "jobkit.Batches" in refused(tmp_path, 3, [1, 2], give=False)
    assert "resume(..., data=data)" in refused(tmp_path, 3, batches, give=False)
    assert "leave steps_per_epoch out" in refused(tmp_path, 3, batches, steps_per_epoch=5)
    assert "has no length" in refused(tmp_path, 3, Pairs())
    assert "epochs(-1)" in refused(tmp_path, -1, steps_per_epoch=5)
    assert "steps_per_epoch=0" in refused(tmp_path, 1, steps_per_epoch=0)


def test_an_epoch_that_is_not_gone_through(tmp_path: Path) -> None:
    """Where epochs are counted by steps all have to be made; those of Batches may be left early, or hold a limit."""
    assert "epoch 0 was left after 0 of its 5 steps" in refused(tmp_path, 2, steps_per_epoch=5)
    assert "epoch 0 was not gone through" in refused(tmp_path, 2, jobkit.Batches(ROWS, batch_size=2))
    data = jobkit.Batches(ROWS, batch_size=2)
    with jobkit.Run(tmp_path / "limited", trackers=()) as run:
        run.resume(w=0.0, data=data, optimizer=None)
        for epoch in run.epochs(3, data):
            for _ in epoch:
                run.state.w += 1
                if data.index == 1:
                    break
            assert len(epoch) == SIZE
        assert (run.step, run.committed_step, run.state.w, data.epoch) == (6, 6, 6.0, 3)


class Watch:
    """An object of a program's own that keeps the epoch."""

    def __init__(self) -> None:
        self.epoch = -1

    def state_dict(self) -> dict[str, int]:
        """Return the epoch."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take it back."""
        self.epoch = state["epoch"]


def test_an_epoch_is_its_number(tmp_path: Path) -> None:
    """It can be printed, logged, compared, saved, and given to JAX; a bar knows how many steps are left of it."""
    watch = Watch()
    with jobkit.Run(tmp_path / "r", save_every=1, trackers=()) as run:
        run.resume(w=0.0, last=0, watch=watch, optimizer=None)
        for epoch in run.epochs(2, steps_per_epoch=3):
            assert len(epoch) == 3
            for step in epoch:
                run.state.w += float(jax.jit(lambda number: number + 1)(epoch))
                run.log(epoch=epoch, step_here=step)
                run.state.last = watch.epoch = epoch
                assert step // 3 == epoch
        assert (f"{epoch:02d}", epoch % 2, run.state.w) == ("01", 1, 9.0)
        assert jax.random.fold_in(jax.random.key(0), epoch) == jax.random.fold_in(jax.random.key(0), 1)
    loaded = jobkit.load(tmp_path / "r", last=0, watch=(again := Watch()))
    assert [(type(one), one) for one in (loaded.last, again.epoch)] == [(int, 1)] * 2


def two_phases(url: Path, kind: str = "batches", hit: tuple[int, int] | None = None) -> None:
    """Stop pretraining early, and train on in as many epochs of other data; a signal comes in one of those.

    Args:
        kind: What the phases go through; 'held' in a variable that is used again.
        hit: The epoch of the second phase, and how many steps of it are done when the signal comes.
    """
    first, second = (jobkit.Batches(ROWS, batch_size=2, seed=seed) for seed in (1, 2))
    with jobkit.Run(url, save_every=None, trackers=()) as run:
        state = run.resume(w=jnp.zeros(()), first=first, second=second, optimizer=None)

        def phase(data: jobkit.Batches, size: int) -> Iterator[Any]:
            return run.epochs(3, steps_per_epoch=size) if kind == "steps" else run.epochs(3, data)

        loop = phase(first, SIZE) if kind == "held" else None
        for epoch in loop or phase(first, SIZE):
            for item in epoch:
                state.w = 0.9 * state.w + np.sum(item)
            if epoch == 1:
                break
        loop = phase(second, 2 * SIZE)
        for epoch in loop:
            for done, item in enumerate(epoch, 1):
                state.w = 0.8 * state.w - np.sum(item)
                if hit == (epoch, done):
                    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("kind", ["batches", "steps", "held"])
def test_an_early_stop_of_one_phase_stays_in_the_next(tmp_path: Path, kind: str) -> None:
    """Interrupted in its second phase, a training does not enter the first again, which was left with `break`."""
    two_phases(tmp_path / "whole", kind)
    for hit in ((1, 2), (2, 3)):
        with pytest.raises(jobkit.Preempted):
            two_phases(tmp_path / "run", kind, hit)
    two_phases(tmp_path / "run", kind)
    assert compare(tmp_path / "whole", tmp_path / "run").equal


@pytest.mark.parametrize("kind", ["arrays", "steps"])
@pytest.mark.parametrize("save_every", [None, SIZE])
def test_a_break_before_the_first_step_of_an_epoch(tmp_path: Path, kind: str, save_every: int | None) -> None:
    """It counts no step, ends the training with the epoch before, and does so in the next attempt too."""
    for attempt in range(2):
        data, begun = jobkit.Batches(ROWS, batch_size=2), []
        with jobkit.Run(tmp_path / "r", save_every=save_every, trackers=()) as run:
            state = run.resume(w=0.0, data=data, optimizer=None)
            for epoch in run.epochs(4, data) if kind == "arrays" else run.epochs(4, steps_per_epoch=SIZE):
                begun.append(int(epoch))
                while save_every and (run.committed_step < run.step or run._session.checkpoints.saving):
                    time.sleep(0.01)
                if epoch == 2:
                    break
                for _ in epoch:
                    state.w += 1
            assert (run.step, run.committed_step, state.w) == (2 * SIZE, 2 * SIZE, 2.0 * SIZE)
        assert begun == ([] if attempt else [0, 1, 2])


class Stream(Loader):
    """A loader over what has no length, as PyTorch's are: it has the method."""

    def __len__(self) -> int:
        raise TypeError("object of type 'Rows' has no len()")


def test_an_epoch_of_a_loader_is_all_of_it(tmp_path: Path) -> None:
    """A part of one would be another after a restart: refused before it is trained, or where it turns out."""
    said = refused(tmp_path, 3, Loader(), steps_per_epoch=3)
    assert "of 5 batches" in said
    assert "leave steps_per_epoch out" in said
    assert "has no length" in refused(tmp_path, 3, Stream())
    for size in (SIZE, 3):
        data, steps = Stream(), []
        refuses = pytest.raises(jobkit.ConfigError, match="a Stream goes on after the 3 batches")
        ends = refuses if size < SIZE else contextlib.nullcontext()
        with ends, jobkit.Run(tmp_path / f"of-{size}", trackers=()) as run:
            run.resume(w=0.0, data=data, optimizer=None)
            for epoch in run.epochs(2, data, steps_per_epoch=size):
                for _ in epoch:
                    run.state.w += 1
                    steps.append(run.step)
        assert len(steps) == (3 if size < SIZE else 2 * SIZE)

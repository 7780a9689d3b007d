"""Loops that are left before their end, loops of the program's own, and what a stop means for the code behind them."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import jobkit
from jobkit import contract
from jobkit.errors import ConfigError, Preempted, StorageError
from jobkit.run.leaving import by_break
from jobkit.rundir import commits
from jobkit.rundir.ledger import attempt_events
from jobkit.rundir.loops import Loops
from jobkit.rundir.store import Store
from launch.backends import registry
from launch.backends.local import Local
from launch.lifecycle import verbs
from launch.report import follow
from tests.harness import jobs, training

# How a loop was left, as the generator sees it.


def _counting(seen: list[bool]) -> Iterator[int]:
    try:
        yield from range(10)
    except GeneratorExit:
        seen.append(by_break())
        raise


class Bar:
    """A progress bar, as tqdm is made."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        items = self.items
        try:
            for item in items:  # noqa: UP028
                yield item
        finally:
            self.close()

    def close(self) -> None:
        """Draw the bar for the last time."""


def _breaks(seen: list[bool]) -> None:
    for _ in _counting(seen):
        break


def _breaks_in_a_with(seen: list[bool]) -> None:
    for number in _counting(seen):
        with open(os.devnull):
            try:
                if number == 3:
                    break
            finally:
                number += 1


def _returns(seen: list[bool]) -> Any:
    for number in _counting(seen):
        if number:
            return [number]
    return None


def _breaks_while_handling(seen: list[bool]) -> None:
    try:
        raise ValueError
    except ValueError:
        for _ in _counting(seen):
            break


def _breaks_counted(seen: list[bool]) -> None:
    for _ in enumerate(zip(_counting(seen), "abc", strict=False)):
        break


def _breaks_wrapped(seen: list[bool]) -> None:
    def wrapped() -> Iterator[int]:
        yield from _counting(seen)

    for _ in Bar(wrapped()):
        break


def _raises(seen: list[bool]) -> None:
    try:
        for _ in _counting(seen):
            raise ValueError
    except ValueError:
        pass


def _raises_below(seen: list[bool]) -> None:
    def train() -> None:
        for _ in _counting(seen):
            int("x")

    try:
        train()
    except ValueError:
        pass


def _raises_wrapped(seen: list[bool]) -> None:
    try:
        for _ in enumerate(number for number in _counting(seen)):
            raise KeyError
    except KeyError:
        pass


def _exits(seen: list[bool]) -> None:
    try:
        for _ in _counting(seen):
            raise SystemExit
    except SystemExit:
        pass


def _is_held(seen: list[bool]) -> None:
    loop = _counting(seen)
    for _ in loop:
        break
    del loop


@pytest.mark.parametrize(
    "leave", [_breaks, _breaks_in_a_with, _returns, _breaks_while_handling, _breaks_counted, _breaks_wrapped]
)
def test_a_break_is_known(leave: Callable[[list[bool]], Any]) -> None:
    """`break` and `return` are told from errors, through whatever lies around the loop."""
    seen: list[bool] = []
    leave(seen)
    assert seen == [True]


@pytest.mark.parametrize("leave", [_raises, _raises_below, _raises_wrapped, _exits, _is_held])
def test_an_error_is_no_break(leave: Callable[[list[bool]], Any]) -> None:
    """An error that leaves the loop is never taken for a `break`, nor is what cannot be known."""
    seen: list[bool] = []
    leave(seen)
    assert seen == [False]


def test_loops_are_known_by_their_end() -> None:
    """A loop that was left stays left in the next attempt, one with another end does not, nor one entered again."""
    first = Loops()
    assert first.begin("steps", 10) is None
    first.stop(4)
    second = Loops(first.early)
    assert second.begin("steps", 20) is None
    assert second.begin("through", 10) is None
    left = second.begin("steps", 10)
    assert left is not None
    assert (left.step, left.again) == (4, False)
    again = second.begin("steps", 10)
    assert again is not None
    assert again.again
    third = Loops(second.early)
    assert third.begin("steps", 10) is None
    third.stop(9)
    assert [stop.again for stop in third.early] == [True]
    assert third.begin("epochs", 10, "pairs") is None
    third.stop(12)
    fourth = Loops(third.early)
    assert fourth.begin("epochs", 10, "rows") is None
    assert fourth.newest == ("epochs", 10, "rows")
    assert fourth.begin("epochs", 10, "pairs") is not None


# Early stopping in steps().


def _stops_early(url: str, total: int = 1000, kill: str = "", held: bool = False) -> None:
    import jobkit

    with jobkit.Run(url, save_every="20 steps", keep_best=("loss", "min")) as run:
        state = run.resume(total=0, bad=0, optimizer=None)
        loop = run.steps(total) if held else iter(())
        for step in loop if held else Bar(run.steps(total)):
            state.total += 1
            if step == 15:
                run.save(loss=0.5)
            if kill == "notice" and step == 49:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
            if kill == "commit" and step == 49:
                while run._session.checkpoints.saving:
                    time.sleep(0.01)
                os.environ[contract.ENV_FAULT] = "before_rename"
            if step % 10 == 9:
                state.bad += 1
                if state.bad >= 5:
                    break
        if kill == "behind":
            os.kill(os.getpid(), signal.SIGKILL)
        if held:
            loop.close()  # type: ignore[attr-defined]
        run.save(loss=1.0)
        best = run.restore("best")
        print("published", run.step, best, state.total)


def test_an_early_stop_is_remembered(tmp_path: Path) -> None:
    """Killed in the code behind a `break`, and started again after its end, a run does not train on."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, function=_stops_early, kill="behind")
    assert code == -signal.SIGKILL, printed
    commit = commits.read(Store(url), commits.steps(Store(url))[-1])
    assert (commit.step, commit.reason) == (50, "end")  # at once, not when the run closes
    for _ in range(2):
        code, printed = training.attempt(url, function=_stops_early)
        assert (code, printed.splitlines()[-1]) == (0, "published 50 16 16"), printed
        assert "stopped early after step 50" in printed
    assert dict(follow.rows(registry.status(Store(url))))["step"] == "50 of 1000, stopped early"
    code, printed = training.attempt(url, function=_stops_early, total=70)
    assert (code, printed.splitlines()[-1]) == (0, "published 60 16 16"), printed


@pytest.mark.parametrize("held", [False, True])
def test_restore_and_score_after_a_break(tmp_path: Path, held: bool) -> None:
    """`break` closes `steps()`: the best step is restored inside the `with`, the last one scored before."""
    code, printed = training.attempt(tmp_path / "run", function=_stops_early, held=held)
    assert (code, printed.splitlines()[-1]) == (0, "published 50 16 16"), printed
    assert commits.read(Store(tmp_path / "run"), 50).metrics == {"loss": 1.0}


@pytest.mark.slow
def test_an_early_stop_in_a_crash(tmp_path: Path) -> None:
    """Killed between the `break` and its commit, the run restores an earlier step, and decides again."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, function=_stops_early, kill="commit")
    assert code == -signal.SIGKILL, printed
    assert 50 not in commits.steps(Store(url))
    code, printed = training.attempt(url, function=_stops_early)
    assert (code, printed.splitlines()[-1]) == (0, "published 50 16 16"), printed


def test_a_notice_in_the_step_of_an_early_stop(tmp_path: Path) -> None:
    """A program that did not look at the notice has decided by itself: the run is over."""
    code, printed = training.attempt(tmp_path / "run", function=_stops_early, kill="notice")
    assert (code, printed.splitlines()[-1]) == (0, "published 50 16 16"), printed


def _raises_in_a_step(url: str, swallowed: bool) -> None:
    import jobkit

    with jobkit.Run(url, save_every="5 steps") as run:
        state = run.resume(total=0, optimizer=None)
        try:
            for step in run.steps(20):
                state.total += 1
                while run._session.checkpoints.saving:
                    time.sleep(0.01)
                if step == 7 and run.attempt == 0:
                    raise ValueError("in the middle of a step")
        except ValueError:
            os.kill(os.getpid(), signal.SIGKILL) if swallowed else None
            raise


@pytest.mark.slow
def test_an_error_is_no_early_stop(tmp_path: Path) -> None:
    """What an error leaves behind in the middle of a step is not committed, and the next attempt trains on."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, function=_raises_in_a_step, swallowed=True)
    assert (code, commits.steps(Store(url))[-1]) == (-signal.SIGKILL, 5), printed
    code, printed = training.attempt(url, function=_raises_in_a_step, swallowed=False)
    assert (code, jobkit.load(url, total=0).total) == (0, 20), printed


def _epochs_with_break(url: str) -> None:
    import jobkit

    with jobkit.Run(url, save_every=None) as run:
        state = run.resume(total=0, epoch=0, optimizer=None)
        while state.epoch < 4:
            for step in run.steps(20):
                state.total += 1 + state.epoch
                if step % 5 == 4:
                    break
            state.epoch += 1
            if run.attempt == 0 and state.epoch == 3:
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_loop_that_is_entered_again_was_not_stopped_early(tmp_path: Path) -> None:
    """Where `break` ends an epoch and not the training, an attempt goes on with its epochs as it always did."""
    url = tmp_path / "run"
    assert training.attempt(url, function=_epochs_with_break)[0] == -signal.SIGKILL
    code, printed = training.attempt(url, function=_epochs_with_break)
    assert (code, jobkit.load(url, total=0, epoch=0).total) == (0, 5 * (1 + 2 + 3) + 5 * 3), printed


def _stops_early_together(url: str, kill: bool = False) -> None:
    import jobkit

    with jobkit.Run(url, save_every=None) as run:
        state = run.resume(total=0, optimizer=None)
        for step in run.steps(100):
            state.total += 1
            if step == 11:
                break
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        print(f"behind {state.total}")


@pytest.mark.slow
def test_processes_stop_early_together(tmp_path: Path) -> None:
    """Two processes leave at the same step, are killed behind the loop, and stay stopped."""
    url = tmp_path / "run"
    training.join_many(training.start_many(url, 2, function=_stops_early_together, kill=True))
    assert commits.steps(Store(url))[-1] == 12
    codes = training.join_many(training.start_many(url, 2, function=_stops_early_together))
    assert codes == [0, 0]
    for index in range(2):
        assert Path(f"{url}-{index}.log").read_text().splitlines()[-1] == "behind 12"


# Loops of the program's own.


def _epochs(url: str, notice_at: str = "", behind: str = "", stop: int = 8, patience: int = 99) -> None:
    """Train in a loop of one's own; what is behind it publishes."""
    import jobkit

    def notice(place: str) -> None:
        if place == notice_at and run.attempt == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    with jobkit.Run(url, save_every=None, keep_best=("loss", "min")) as run:
        state = run.resume(epoch=0, total=0, optimizer=None)
        notice("before")
        for epoch in run.through(range(state.epoch, stop)):
            for batch in run.through([1, 2, 3]):
                state.total += batch
                if epoch == 4 and batch == 2:
                    notice("inside")
                if epoch == 5 and batch == 2:
                    break  # of batches: no end of the training
            state.epoch = epoch + 1
            if epoch == 4:
                notice("save")
                if notice_at == "save":
                    run.log(loss=object(), seen=run.should_stop)
            run.save(epoch + 1, loss=abs(epoch - 2.5))
            notice(f"after {epoch}")
            if epoch >= patience:
                break
        if behind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        print("published", state.epoch, run.restore("best"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notice_at", "committed"), [("before", 0), ("inside", 4), ("save", 5), ("after 2", 3), ("after 6", 7)]
)
def test_a_notice_leaves_a_loop_of_ones_own(tmp_path: Path, notice_at: str, committed: int) -> None:
    """Wherever it comes, what was saved is committed, and nothing behind the loop is done with half a training."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, function=_epochs, notice_at=notice_at)
    assert (code, "published" in printed) == (contract.Exit.PREEMPTED, False), printed
    assert commits.steps(Store(url))[-1] == committed
    assert "Traceback" not in printed
    code, printed = training.attempt(url, function=_epochs)
    assert (code, printed.splitlines()[-1]) == (0, "published 8 3"), printed
    assert jobkit.load(url, total=0, epoch=0).total == 8 * 6 - 3


def test_a_notice_after_the_last_save(tmp_path: Path) -> None:
    """A loop of one's own that has come to its end is over, as `steps()` is."""
    code, printed = training.attempt(tmp_path / "run", function=_epochs, notice_at="after 7")
    assert (code, printed.splitlines()[-1]) == (0, "published 8 3"), printed


@pytest.mark.slow
def test_an_early_stop_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    """Left with `break`, killed behind it, it stays left; a range with another end is gone through."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, function=_epochs, patience=3, behind="kill")
    assert code == -signal.SIGKILL, printed
    code, printed = training.attempt(url, function=_epochs, patience=3)
    assert (code, printed.splitlines()[-1]) == (0, "published 4 3"), printed
    code, printed = training.attempt(url, function=_epochs, stop=6)
    assert (code, printed.splitlines()[-1]) == (0, "published 6 3"), printed


def _hears_in_an_own_loop(url: Path, leave: str) -> None:
    with jobkit.Run(url, save_every=None) as run:
        state = run.resume(total=0, optimizer=None)
        run.save(1, wait=True)
        os.kill(os.getpid(), signal.SIGTERM)
        while not run.should_stop:
            time.sleep(0.01)
        run.log(loss=1.0, wrong="a text")
        state.total = 7
        if leave == "save":
            run.save(2)
        if leave == "restore":
            run.restore("latest")
        assert leave == "end"


@pytest.mark.parametrize(("leave", "step", "total"), [("save", 2, 7), ("restore", 1, 0), ("end", 1, 0)])
def test_a_stop_that_was_said_is_raised(tmp_path: Path, leave: str, step: int, total: int) -> None:
    """Once `should_stop` was True: `log` goes on, `save` commits and raises, `restore` and the end of `with` raise."""
    with pytest.raises(Preempted):
        _hears_in_an_own_loop(tmp_path / "run", leave)
    assert jobkit.load(tmp_path / "run", total=0).total == total
    (stopped,) = [event for event in attempt_events(Store(tmp_path / "run"), 0) if event["event"] == "stopped"]
    assert stopped["step"] == step


def _stops_while_the_start_is_saved(url: Path) -> None:
    fails = [StorageError("the disk is full")]

    def before_commit(step: int) -> None:
        while not run.should_stop:
            time.sleep(0.01)
        time.sleep(0.3)
        if fails:
            raise fails.pop()

    with jobkit.Run(url, save_every=None) as run:
        run._session.checkpoints._before_commit = before_commit
        state = run.resume(total=0, optimizer=None)
        for _ in run.through(range(4)):
            state.total = 7
            os.kill(os.getpid(), signal.SIGTERM)
            while run.notice is None:
                time.sleep(0.01)


def test_a_round_in_progress_is_never_saved_as_the_start(tmp_path: Path) -> None:
    """Where the save of the start fails while a stop is served, what a round has changed does not take its place."""
    with pytest.raises(StorageError, match="disk is full"):
        _stops_while_the_start_is_saved(tmp_path / "run")
    assert commits.steps(Store(tmp_path / "run")) == []


def test_through_inside_steps(tmp_path: Path) -> None:
    """The loop of one's own has no place inside `steps()`."""
    with jobkit.Run(tmp_path / "run") as run:
        run.resume(total=0, optimizer=None)
        for _ in run.steps(1):
            run.state.total = 1
            with pytest.raises(ConfigError, match="inside steps"):
                next(run.through([1]))


# Submitted, resumed, drilled.

EARLY = """
import os, signal, time, jax.numpy as jnp, jobkit
with jobkit.Run(save_every="20 steps", keep_best=("loss", "min")) as run:
    run.resume(w=jnp.zeros(3), bad=0)
    for step in run.steps(1000):
        run.state.w = run.state.w + 1
        if step % 10 == 9:
            run.save(loss=1 / (1 + step))
            run.state.bad += 1
            if run.state.bad >= 5:
                break
    run.restore("best")
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[jobs.Project]:
    """Yield a project that stops early."""
    for made in jobs.project(tmp_path):
        (made.path / "early.py").write_text(EARLY)
        (made.path / "forgets.py").write_text(
            EARLY.replace("bad=0", "b=0").replace("run.state.bad", "bad").replace("with", "bad = 0\nwith")
        )
        (made.path / "killed.py").write_text(EARLY + "if run.attempt == 0: os.kill(os.getpid(), signal.SIGKILL)\n")
        yield made


@pytest.mark.slow
def test_a_run_that_stopped_early_is_resumed(project: jobs.Project) -> None:
    """r12: killed after its early stop it is done with 50 steps, and `resume` trains no more."""
    spec = project.spec()
    store = verbs.submit(Local(), msgspec.structs.replace(spec, command=("python", "killed.py")))
    assert jobs.until_over(store, seconds=90).state is contract.State.DONE
    assert jobs.outcomes(store) == ["killed", "done"]
    registry.resume(store.url)
    assert jobs.until_over(store, seconds=90).state is contract.State.DONE
    assert commits.steps(store)[-1] == 50


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_early_stop_is_certified(project: jobs.Project) -> None:
    """r12: neither a notice in the step of the early stop changes anything, nor a kill before or after it."""
    only = [word for name in ("notice-end", "kill", "notice", "after") for word in ("--only", name)]
    with project.start("drill", "--json", "--keep", *only, "--", "python", "early.py") as process:
        out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
    told = json.loads(out)
    assert [(each["identical"], len(each["endings"])) for each in told["scenarios"]] == [
        (True, 2),
        (True, 1),
        (True, 2),
        (True, 2),
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_patience_that_is_no_part_is_not_certified(project: jobs.Project) -> None:
    """Where an early stop comes later after a kill, the drill does not hide it by an end of its own."""
    with project.start("drill", "--json", "--only", "kill", "--", "python", "forgets.py") as process:
        out, err = process.communicate(timeout=500)
    assert process.returncode == 1, out + err
    assert "the reference with 50" in out

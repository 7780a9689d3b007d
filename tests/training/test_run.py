"""A real training, interrupted by real signals at every moment that matters, ends with the undisturbed run's bits."""

import os
import random
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

import jobkit
from jobkit import contract, faults
from jobkit.errors import ConfigError
from jobkit.rundir import commits
from jobkit.rundir.ledger import attempt_events, read_events, read_metrics
from jobkit.rundir.store import Store
from launch.backends.local import Local
from launch.lifecycle import verbs
from tests.harness import jobs, training


def finish(url: Path, **named: Any) -> None:
    """Run a last attempt to its end."""
    code, printed = training.attempt(url, **named)
    assert code == 0, printed


def assert_same(url: Path, undisturbed: Path) -> None:
    """Final state and every loss equal the undisturbed run's, to the bit, and repeated steps agree."""
    assert training.digest(url) == training.digest(undisturbed)
    series, expected = read_metrics(Store(url)), read_metrics(Store(undisturbed))
    assert series.values == expected.values
    assert sorted(series.values["loss"]) == list(range(training.STEPS))
    for again in series.repeated.get("loss", {}).values():
        assert len(set(again)) == 1


def assert_tidy(url: Path, keep: int = 2) -> None:
    """Nothing is left of dead attempts, and retention holds."""
    store = Store(url)
    assert store.names(contract.STAGE) == store.names(contract.TRASH) == []
    assert len(commits.steps(store)) <= keep
    assert all(commits.problems(store, step) == [] for step in commits.steps(store))
    assert list(url.rglob("*.tmp")) == []


ONCE = ("resumed", "finished")
"""What an attempt comes to once."""


QUICK = {("during_write", 3), ("before_rename", 1), ("after_rename", 3), ("during_retention", 1), ("finished", 1)}
"""What the quick tests have of the points: writing, either side of the commit, removing, the end."""


@pytest.mark.parametrize(
    ("point", "passes"),
    [
        pytest.param(point, passes, marks=() if (point, passes) in QUICK else pytest.mark.slow)
        for point in faults.POINTS
        for passes in ((1,) if point in ONCE else (1, 3))
        if point != "during_restore" and not re.search("create|join|gather|_part", point)
    ],
)
def test_sigkill_at_every_named_point_of_save_and_commit(
    point: str, passes: int, tmp_path: Path, undisturbed: Path
) -> None:
    """SIGKILL at a named point of the save path: the next attempt ends with the same bits and no leftovers."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, fault=f"{point}:{passes}", pause_s=0.01)
    assert code == -signal.SIGKILL, printed
    finish(url)
    assert_same(url, undisturbed)
    assert_tidy(url)


def test_sigkill_during_restore(tmp_path: Path, undisturbed: Path) -> None:
    """SIGKILL between reading a checkpoint and using it changes nothing."""
    url = tmp_path / "run"
    assert training.attempt(url, at={30: "SIGTERM"})[0] == 75
    assert training.attempt(url, fault="during_restore")[0] == -signal.SIGKILL
    finish(url)
    assert_same(url, undisturbed)


@pytest.mark.slow
def test_thirty_random_kills_in_a_row(tmp_path: Path, undisturbed: Path) -> None:
    """Thirty SIGKILLs at random moments, one after the other: the thirty-first attempt ends with the same bits."""
    url, log = tmp_path / "run", tmp_path / "log"
    seed = int(os.environ.get("JOBKIT_TEST_SEED", time.time_ns() % 10**6))
    print("seed", seed)
    moments = random.Random(seed)
    restored_before = -1
    for kill in range(30):
        process = training.start(training.train, str(url), log=log, pause_s=0.04, save_every="3 steps")
        # Half of them early (imports, restore, compile), half while training.
        process.join(moments.uniform(0.0, 1.0) if kill % 2 else moments.uniform(0.8, 2.0))
        process.kill()
        process.join()
        steps = commits.steps(Store(url))
        assert max(steps, default=-1) >= restored_before, "a committed step was lost"
        restored_before = max(steps, default=-1)
    finish(url)
    assert_same(url, undisturbed)
    assert_tidy(url)


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGUSR1", "SIGUSR2", "SIGINT"))]
)
def test_each_signal_commits_the_step_in_progress(name: str, tmp_path: Path, undisturbed: Path) -> None:
    """A notice commits the step in progress, exits 75, and the next attempt starts right after it: none lost."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, at={23: name}, save_every=None)
    assert code == 75
    assert f"{name}: stopped after step 24" in printed
    assert commits.steps(Store(url))[-1] == 24
    finish(url)
    assert [event["step"] for event in read_events(Store(url)) if event["event"] == "restored"] == [24]
    assert read_metrics(Store(url)).repeated == {}
    assert_same(url, undisturbed)


def _twice(point: str, run: Any) -> None:
    if point == "step" and run.step == 20:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)


@pytest.mark.slow
def test_the_first_notice_wins(tmp_path: Path, undisturbed: Path) -> None:
    """Four signals in a burst are one notice, the first one's."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, hook=_twice)
    assert code == 75
    assert "SIGUSR1: stopped after step 21" in printed
    finish(url)
    assert_same(url, undisturbed)


def _notice_at(point: str, wanted: str) -> None:
    if point == wanted:
        os.kill(os.getpid(), signal.SIGTERM)


def _when_opened(point: str, run: Any) -> None:
    _notice_at(point, "opened")


def _when_resumed(point: str, run: Any) -> None:
    _notice_at(point, "resumed")


def _when_ended(point: str, run: Any) -> None:
    _notice_at(point, "ended")


def _stop_before_resume(url: str) -> None:
    with jobkit.Run(url, trackers=()) as run:
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.should_stop


def test_a_program_that_leaves_before_it_resumes(tmp_path: Path) -> None:
    """Who looks at `should_stop` while it builds the model, and leaves, has finished nothing: 75, as everywhere."""
    assert training.attempt(tmp_path / "run", function=_stop_before_resume)[0] == 75


@pytest.mark.slow
@pytest.mark.parametrize("hook", [_when_opened, _when_resumed])
def test_notice_before_the_first_step(hook: Any, tmp_path: Path, undisturbed: Path) -> None:
    """A notice before the first step ends with 75 at once, on a fresh run and on a resumed one."""
    url = tmp_path / "run"
    assert training.attempt(url, hook=hook)[0] == 75
    assert commits.steps(Store(url)) == [0]
    assert training.attempt(url, at={30: "SIGTERM"})[0] == 75
    assert training.attempt(url, hook=hook)[0] == 75
    assert commits.steps(Store(url))[-1] == 31
    finish(url)
    assert_same(url, undisturbed)


@pytest.mark.slow
def test_notice_after_the_last_step(tmp_path: Path, undisturbed: Path) -> None:
    """A notice after the last step leaves a finished run finished: exit 0."""
    url = tmp_path / "run"
    assert training.attempt(url, hook=_when_ended) == (0, "")
    assert_same(url, undisturbed)


@pytest.mark.slow
def test_notice_in_the_last_step(tmp_path: Path, undisturbed: Path) -> None:
    """A notice while the last step runs: the run commits the end and is done, not preempted."""
    url = tmp_path / "run"
    assert training.attempt(url, at={training.STEPS - 1: "SIGTERM"})[0] == 0
    assert_same(url, undisturbed)


def test_a_finished_run_started_again_does_nothing(undisturbed: Path) -> None:
    """An attempt on a finished run takes no step and exits 0."""
    before = training.digest(undisturbed)
    assert training.attempt(undisturbed)[0] == 0
    assert training.digest(undisturbed) == before


@pytest.mark.slow
def test_notice_during_import_compile_and_training_from_outside(tmp_path: Path, undisturbed: Path) -> None:
    """SIGTERM at any time from outside: exit 75 once the run listens, no step lost or repeated."""
    url, log = tmp_path / "run", tmp_path / "log"
    moments = random.Random(5)
    codes = []
    while True:
        process = training.start(training.train, str(url), log=log, pause_s=0.01)
        process.join(moments.uniform(0.2, 1.8) * (1 + len(codes) / 10))  # a slow machine must come to the end too
        if process.is_alive():
            process.terminate()
        process.join(30)
        codes.append(process.exitcode)
        if process.exitcode == 0:
            break
        assert process.exitcode in (75, -signal.SIGTERM), log.read_text()
        assert len(codes) < 40
    assert read_metrics(Store(url)).repeated == {}, "a noticed step ran twice"
    assert_same(url, undisturbed)


def _big(point: str, run: Any) -> None:
    if point == "step" and run.step == 5:
        deadline = time.monotonic() + 5
        while not run._session.checkpoints.saving and time.monotonic() < deadline:
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_notice_behind_a_save_in_flight(tmp_path: Path) -> None:
    """A notice while an earlier save is being written: the newest step lands; the earlier one too, or gives way."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, hook=_big, width=400_000, save_every="5 steps", keep=5)
    assert code == 75, printed
    told = [(event["event"], event.get("step")) for event in read_events(Store(url))]
    assert [step for name, step in told if name == "saved"] in ([0, 5, 6], [0, 6])
    assert (("abandoned", 5) in told) != (("saved", 5) in told)
    assert commits.problems(Store(url), 6) == []
    assert Store(url).names(contract.STAGE) == [], "something is left of the save that gave way"
    assert "Traceback" not in printed, printed


def _handlers(url: str) -> None:
    import jobkit

    def mine(*_: object) -> None:
        print("mine", flush=True)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, mine)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    with jobkit.Run(url) as run:
        run.resume(value=1, optimizer=None)
        assert signal.getsignal(signal.SIGTERM) is not mine
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.set_wakeup_fd(-1) == -1
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)


def test_earlier_handlers_come_back(tmp_path: Path) -> None:
    """Handlers that were installed before the run are back when it closes, and work."""
    code, printed = training.attempt(tmp_path / "run", function=_handlers)
    assert (code, printed.splitlines()[-1]) == (0, "mine")


@pytest.mark.slow
def test_a_continued_old_attempt_can_neither_commit_nor_remove(tmp_path: Path, undisturbed: Path) -> None:
    """SIGSTOP, a new attempt, SIGCONT: the old attempt ends itself with a clear line and changes nothing."""
    url, log = tmp_path / "run", tmp_path / "log"
    old = training.start(training.train, str(url), log=log, pause_s=0.02, save_every="2 steps")
    deadline = time.monotonic() + 30
    while max(commits.steps(Store(url)), default=0) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert old.pid is not None
    os.kill(old.pid, signal.SIGSTOP)
    finish(url)
    before = {step: commits.read(Store(url), step) for step in commits.steps(Store(url))}
    os.kill(old.pid, signal.SIGCONT)
    old.join(30)
    assert old.exitcode == contract.Exit.CONFIG
    assert "attempt 1 has taken over" in log.read_text().splitlines()[-1]
    assert {step: commits.read(Store(url), step) for step in commits.steps(Store(url))} == before
    assert training.digest(url) == training.digest(undisturbed)


def _own_loop(url: str, stop_at: int = -1) -> None:
    import jobkit

    with jobkit.Run(url, keep=2) as run:
        state = run.resume(total=0, optimizer=None)
        for step in range(run.step, 20):
            if run.should_stop:
                break
            state.total += step
            run.save(step + 1)
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
    print(state.total)


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    """A loop without steps(), built from step, save and should_stop, is preempted with 75 and resumed."""
    url = tmp_path / "run"
    assert training.attempt(url, function=_own_loop, stop_at=7)[0] == 75
    code, printed = training.attempt(url, function=_own_loop)
    assert code == 0
    assert printed.endswith(f"{sum(range(20))}\n")


def _left_early(url: str) -> None:
    import jobkit

    with jobkit.Run(url) as run:
        state = run.resume(total=0, optimizer=None)
        for step in run.steps(100):
            state.total += 1
            if step == 6:
                break


def test_leaving_the_loop_early_commits_the_last_step(tmp_path: Path) -> None:
    """`break` ends the training with the step in progress counted and committed."""
    assert training.attempt(tmp_path / "run", function=_left_early) == (0, "")
    assert commits.steps(Store(tmp_path / "run"))[-1] == 7


def _two_loops(url: str) -> None:
    import jobkit

    with jobkit.Run(url, save_every=None) as run:
        state = run.resume(total=0, optimizer=None)
        for _ in run.steps(5):
            state.total += 1
        for step in run.steps(50):
            state.total += 1
            if step == 20:
                break


def test_a_loop_after_the_loop(tmp_path: Path) -> None:
    """What a second loop trains is committed as well, also where it is left early."""
    assert training.attempt(tmp_path / "run", function=_two_loops) == (0, "")
    assert commits.steps(Store(tmp_path / "run"))[-1] == 21


def _counts_by_itself(url: str) -> None:
    import jobkit

    with jobkit.Run(url, save_every=None) as run:
        state = run.resume(total=0, optimizer=None)
        step = run.step
        while step < 40 and not run.should_stop:
            step += 1
            state.total += 1
            if step == 10:
                run.save(step, wait=True)
            if step == 17:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
        print(run.step, state.total)


def test_a_loop_of_ones_own_is_saved_as_it_was_counted(tmp_path: Path) -> None:
    """On a notice no state goes under the number of an older step: only what the loop asked to save counts."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, function=_counts_by_itself)
    assert code == contract.Exit.PREEMPTED, printed
    assert "10 17" in printed
    code, printed = training.attempt(url, function=_counts_by_itself)
    assert commits.steps(Store(url))[-1] == 10
    assert "10 17" in printed, "the state of step 17 came back as that of step 10"


def _logs_what_it_donates(url: str) -> None:
    import jax
    import jax.numpy as jnp

    import jobkit

    update = jax.jit(lambda train: {"n": train["n"] + 1}, donate_argnums=0)
    with jobkit.Run(url, save_every="3 steps") as run:
        state = run.resume(train={"n": jnp.zeros(())}, optimizer=None)
        for step in run.steps(30):
            state.train = update(state.train)
            run.log(n=state.train["n"])
            time.sleep(0.02)
            if step == 15:
                os.kill(os.getpid(), signal.SIGTERM)


def test_a_logged_value_that_the_next_step_donates(tmp_path: Path) -> None:
    """A value that is gone costs no save and no step."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, function=_logs_what_it_donates)
    assert code == contract.Exit.PREEMPTED, printed
    assert commits.steps(Store(url))[-1] == 16


def _gives_its_state_away(url: str, back: int, end: int) -> None:
    import jax
    import jax.numpy as jnp

    import jobkit

    update = jax.jit(lambda train: {"n": train["n"] + 1}, donate_argnums=0)
    with jobkit.Run(url, save_every="3 steps") as run:
        train = run.resume(train={"n": jnp.zeros(())}, optimizer=None).train
        for step in run.steps(end):
            train = update(train)
            run._session.checkpoints.wait()  # a save is not begun while one is under way
            if step == 0 or run.step % back == back - 1:
                run.state.train = train
            if step == 8:
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("back", "committed"), [(1, 9), (2, 6), (4, 0)])
def test_a_state_that_was_given_away(tmp_path: Path, back: int, committed: int) -> None:
    """Donated arrays with nothing in their place are named; training goes on for one interval, and no longer."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, function=_gives_its_state_away, back=back, end=30)
    told = "train/n is gone: the program gave it away (donate_argnums) and put nothing in its place"
    assert commits.steps(Store(url))[-1] == committed, printed
    assert "Traceback" not in printed
    assert code == {1: contract.Exit.PREEMPTED, 2: contract.Exit.FAILED, 4: contract.Exit.CONFIG}[back]
    assert (told in printed) is (back > 1)
    failed = [event["step"] for event in attempt_events(Store(url), 0) if event["event"] == "save_failed"]
    assert failed == {1: [], 2: [3], 4: [3, 6]}[back]


def test_a_state_that_is_gone_after_the_first_step(tmp_path: Path) -> None:
    """A program that never puts back what it donates is refused at its first boundary, before hours are spent."""
    url = tmp_path / "run"
    assert training.attempt(url, function=_gives_its_state_away, back=8, end=1)[0] == contract.Exit.DONE
    code, printed = training.attempt(url, function=_gives_its_state_away, back=8, end=30)
    assert code == contract.Exit.FAILED
    assert "resumes at step 1" in printed
    assert "train/n is gone" in printed
    assert attempt_events(Store(url), 1)[-1]["step"] == 2


def _ends_on_a_notice(url: str) -> None:
    import jobkit

    start = threading.Thread.start

    def late(thread: threading.Thread) -> None:
        if thread.name == "jobkit-deadline":
            time.sleep(2.0)
        start(thread)

    threading.Thread.start = late  # type: ignore[method-assign]
    with jobkit.Run(url, save_every=None) as run:
        state = run.resume(total=0, optimizer=None)
        for step in run.steps(3):
            state.total += 1
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_notice_in_the_last_step_on_a_slow_machine(tmp_path: Path) -> None:
    """A run that is over before the guard has been started ends as well as any other."""
    code, printed = training.attempt(tmp_path / "run", function=_ends_on_a_notice)
    assert (code, "Traceback" in printed) == (contract.Exit.DONE, False), printed
    assert commits.steps(Store(tmp_path / "run"))[-1] == 3


def _breaks(url: str, how: str) -> None:
    import jobkit

    with jobkit.Run(url, save_every=None) as run:
        state = run.resume(total=0, optimizer=None)
        for step in run.steps(100):
            state.total += 1
            if run.attempt == 0 and step == 20 and how == "noticed":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
            if run.should_stop or (how == "twice" and step == 20):
                break
        if how == "twice":
            for _ in run.steps(30):
                state.total += 1


def test_a_break_because_of_a_notice_is_no_end(tmp_path: Path) -> None:
    """`if run.should_stop: break` inside steps(): the run goes on with its next attempt, and to its end."""
    code, printed = training.attempt(tmp_path / "run", function=_breaks, how="noticed")
    assert (code, commits.steps(Store(tmp_path / "run"))[-1]) == (contract.Exit.PREEMPTED, 21), printed
    code, printed = training.attempt(tmp_path / "run", function=_breaks, how="noticed")
    assert (code, jobkit.load(tmp_path / "run", total=0).total) == (contract.Exit.DONE, 100), printed


def test_a_loop_after_a_break(tmp_path: Path) -> None:
    """A loop that was left with `break` may be followed by another one: the step in progress counts as completed."""
    code, printed = training.attempt(tmp_path / "run", function=_breaks, how="twice")
    assert (code, jobkit.load(tmp_path / "run", total=0).total) == (contract.Exit.DONE, 30), printed


def _prepares(url: str) -> None:
    import jobkit

    with jobkit.Run(url, save_every=None) as run:
        run.resume(total=0, optimizer=None)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)


@pytest.mark.slow
def test_a_notice_between_resume_and_the_loop(tmp_path: Path) -> None:
    """What compiles ahead for long and has nothing to save leaves in good order, before it is killed."""
    code, printed = training.attempt(tmp_path / "run", function=_prepares, environment={contract.ENV_GRACE: "3"})
    assert code == contract.Exit.PREEMPTED, printed
    (stopped,) = [event for event in attempt_events(Store(tmp_path / "run"), 0) if event["event"] == "stopped"]
    assert (stopped["step"], "why" in stopped) == (0, False)


def _best_in_flight(url: str) -> None:
    import jax.numpy as jnp

    import jobkit

    with jobkit.Run(url, save_every=None, keep_best=("loss", "min")) as run:
        state = run.resume(net={"w": jnp.zeros((64, 1 << 20))}, optimizer=None)
        for step in run.steps(100):
            state.net = {"w": state.net["w"] + 1}
            if step == 4:
                run.save(loss=0.1)
            if step == 5:
                assert run._session.checkpoints.saving_step == 5
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_what_was_asked_for_is_not_abandoned(tmp_path: Path) -> None:
    """A save in flight that the program asked for is finished before the newer one: its metric may be the best."""
    environment = {contract.ENV_GRACE: "60"}
    code, printed = training.attempt(tmp_path / "run", function=_best_in_flight, environment=environment)
    assert code == contract.Exit.PREEMPTED, printed
    assert commits.metrics(Store(tmp_path / "run"))[5] == {"loss": 0.1}
    assert commits.steps(Store(tmp_path / "run"))[-1] == 6


def _slow_step(url: str) -> None:
    import jobkit

    with jobkit.Run(url, save_every=None) as run:
        state = run.resume(total=0, optimizer=None)
        for step in run.steps(100):
            state.total += 1
            time.sleep(0.02)
            if step == 20:
                run._session.checkpoints.rates.saves.append((1 << 20, 5.0))
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(6)


@pytest.mark.timing
@pytest.mark.slow
def test_a_step_that_comes_in_time_after_all(tmp_path: Path) -> None:
    """Where saves were slow the guard commits early; the step in progress that still completes is committed too."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, function=_slow_step, environment={contract.ENV_GRACE: "12"})
    assert code == contract.Exit.PREEMPTED, printed
    assert commits.steps(Store(url))[-2:] == [20, 21]


def _raises(url: str) -> None:
    import jobkit

    with jobkit.Run(url, save_every="2 steps") as run:
        state = run.resume(total=0, optimizer=None)
        for step in run.steps(100):
            state.total += 1
            if step == 9:
                raise ValueError("boom")


def test_the_programs_own_failure_keeps_its_traceback(tmp_path: Path) -> None:
    """An exception of the program comes through unchanged; saves under way are finished, nothing newer is saved."""
    code, printed = training.attempt(tmp_path / "run", function=_raises)
    assert code == 1
    assert "ValueError: boom" in printed
    assert commits.steps(Store(tmp_path / "run"))[-1] <= 9


def _forks(url: str) -> None:
    import jobkit

    with jobkit.Run(url) as run:
        state = run.resume(total=0, optimizer=None)
        for step in run.steps(6):
            state.total += 1
            if step == 2:
                worker = os.fork()
                if worker == 0:
                    time.sleep(20)
                    os._exit(0)
                time.sleep(0.2)
                os.kill(worker, signal.SIGTERM)
                print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), flush=True)
                time.sleep(0.1)
        print(run.notice, state.total)


def test_a_forked_worker_can_be_terminated(tmp_path: Path) -> None:
    """SIGTERM to a forked worker, as a pool sends it, ends the worker at once and is no notice to the run."""
    code, printed = training.attempt(tmp_path / "run", function=_forks, timeout_s=15)
    assert code == 0, printed
    assert "-15\nNone 6" in printed


def _two_runs(url: str) -> None:
    import jobkit

    for name in ("one", "two"):
        with jobkit.Run(f"{url}-{name}") as run:
            run.resume(total=0, optimizer=None)
            for _ in run.steps(3):
                run.state.total += 1


@pytest.mark.slow
def test_two_runs_in_one_program(tmp_path: Path) -> None:
    """Two runs one after the other work alone; submitted as one run, the second is refused instead of mixed in."""
    assert training.attempt(tmp_path / "run", function=_two_runs) == (0, "")
    code, printed = training.attempt(
        tmp_path / "run", function=_two_runs, environment={contract.ENV_RUN: str(tmp_path / "launched")}
    )
    assert code == contract.Exit.CONFIG
    assert "submit each run on its own" in printed


@pytest.mark.slow
def test_an_old_attempt_stops_soon_after_a_newer_began(tmp_path: Path) -> None:
    """Two programs in one directory: the first ends by itself within seconds, long before its next save."""
    url, log = tmp_path / "run", tmp_path / "old.log"
    old = training.start(training.train, str(url), log=log, save_every=None, pause_s=0.05, steps=2000)
    deadline = time.monotonic() + 60
    while not list(url.glob("checkpoints/0/commit.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    code, printed = training.attempt(url, save_every=None, at={1: "SIGTERM"}, steps=2000)
    assert code == 75, printed
    old.join(20)
    assert old.exitcode == contract.Exit.CONFIG
    assert "attempt 0 may not go on: attempt 1 has taken over" in log.read_text().splitlines()[-1]


def test_best_needs_its_metric(tmp_path: Path) -> None:
    """A misspelt metric is an error at once, where saving depends on it."""
    with jobkit.Run(tmp_path / "run", save_every="best", keep_best=("val_loss", "min")) as run:
        run.resume(n=0, optimizer=None)
        with pytest.raises(ConfigError, match=r"needs the metric 'val_loss', by which .* it was given vall"):
            run.save(vall=1.0)


def test_metrics_before_any_step(tmp_path: Path) -> None:
    """A loop that the run knows nothing of cannot score the untrained state as if it were the trained one."""
    with jobkit.Run(tmp_path / "run", save_every=None) as run:
        run.resume(n=0, optimizer=None)
        with pytest.raises(ConfigError, match=r"loop with `for step in run.steps\(n\)`, or, in a loop of your own"):
            run.save(val_loss=1.0)
    assert commits.metrics(Store(tmp_path / "run"))[0] == {}


def _loops_by_itself(url: str, *, save: bool) -> None:
    import jax.numpy as jnp

    with jobkit.Run(url) as run:
        run.resume(net=jnp.zeros(3), optimizer=None)
        for step in range(run.step, 5):
            run.state.net = run.state.net + 1
            if save:
                run.save(step + 1)


@pytest.mark.slow
def test_a_loop_that_the_run_knows_nothing_of(tmp_path: Path) -> None:
    """Who trains past the run is told at the end that nothing of it is saved; who saves by hand is not."""
    for _ in range(2):  # the second time there is nothing left to do
        code, printed = training.attempt(tmp_path / "saves", function=_loops_by_itself, save=True)
        assert (code, "warning" in printed) == (0, False)
    project = jobs.Project(tmp_path)
    call = "_loops_by_itself(os.environ['JOBKIT_RUN'], save=False)"
    (project.path / "train.py").write_text(f"from tests.training.test_run import _loops_by_itself\nimport os\n{call}\n")
    store = verbs.submit(Local(), msgspec.structs.replace(project.spec(), command=("python", "train.py")))
    told = jobs.until_over(store, seconds=60)
    assert (told.state, told.committed_step) == ("done", 0)
    assert told.reason == "finished, but without one step of the run: what it trained is not saved, its log says how"
    assert told.endings[0].reason == "finished without one step of the run: what it trained is not saved"
    log = store.read(contract.log_file(0)).decode()
    assert "the state at the start alone is. Loop with 'for step in run.steps(n)', or call run.save(step)" in log
    project.close()

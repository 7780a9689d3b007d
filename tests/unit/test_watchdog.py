"""When a program counts as stalled, as a model and on real processes: noticed, named, ended, started again."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit import contract
from jobkit.rundir.ledger import Ledger, attempt_events
from jobkit.rundir.store import Store
from jobkit.supervise import stacks
from jobkit.supervise.heartbeat import Beat, Phase
from jobkit.supervise.stall import FACTOR, FLOOR_S, UNSEEN_S, Known, Stall, Watchdog, learn
from tests.training.test_supervise import Supervised

HOUR_S = 3600.0


def warm(known: Known | None = None, *, stall_s: float | None = None) -> Watchdog:
    """Return a watchdog that has seen a program step before."""
    dog = Watchdog(known, stall_s=stall_s)
    dog.look(Beat(7, Phase.STEPPING, -9, 0, 0.0), 0.0)
    return dog


def watched(dog: Watchdog, phase: Phase, *, silent_s: float, step: int = 5, tick_s: float = 0.25) -> Stall | None:
    """Let a program be silent for so long, and return the first stall."""
    now = 1000.0
    beat = Beat(7, phase, step, 0, now)
    for tick in range(int(silent_s / tick_s) + 2):
        if (stall := dog.look(beat, now + tick * tick_s)) is not None:
            return stall
    return None


def test_a_first_long_evaluation_is_no_stall() -> None:
    """Forty minutes between two steps, after thousands of steps of a second, are within the budget; a day is not."""
    dog = Watchdog()
    for step in range(3000):
        dog.look(Beat(7, Phase.STEPPING, step, 0, step), float(step))
    assert watched(dog, Phase.STEPPING, silent_s=40 * 60.0, step=3000) is None
    assert watched(dog, Phase.STEPPING, silent_s=24 * HOUR_S, step=3000) is not None


@pytest.mark.parametrize("phase", [Phase.LISTENING, Phase.RESTORING, Phase.FIRST_STEP])
def test_slow_starts_are_no_stalls(phase: Phase) -> None:
    """A download before the first step, the restore of a big checkpoint and a long compilation are within budget."""
    assert watched(Watchdog(stall_s=5.0), phase, silent_s=1.9 * HOUR_S, tick_s=0.9) is None
    assert watched(Watchdog(), phase, silent_s=5 * HOUR_S, tick_s=0.9) is not None


def test_a_second_compilation_is_no_stall() -> None:
    """The second and third step of an attempt may take as long as the first, since JAX may compile them again."""
    dog = Watchdog(stall_s=5.0)
    assert watched(dog, Phase.FIRST_STEP, step=40, silent_s=1.0) is None
    assert watched(dog, Phase.STEPPING, step=41, silent_s=600.0) is None
    assert watched(dog, Phase.STEPPING, step=42, silent_s=600.0) is None
    assert watched(dog, Phase.STEPPING, step=43, silent_s=600.0) is not None


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.FINISHED])
def test_what_is_the_programs_own_is_not_watched(phase: Phase) -> None:
    """Before the run is opened and after its last step the program may do what it likes."""
    assert watched(Watchdog(stall_s=1.0), phase, silent_s=100 * HOUR_S, tick_s=0.9) is None


def test_what_was_said_counts_for_steps_alone() -> None:
    """`--stall 5s` is exact for a step, and off is off."""
    stall = watched(warm(stall_s=5.0), Phase.STEPPING, silent_s=60.0)
    assert stall is not None
    assert 5.0 < stall.waited_s <= 5.5
    assert str(stall) == f"no progress for {stall.waited_s:.1f} s after step 5 (phase: stepping)"
    assert watched(Watchdog(stall_s=5.0), Phase.SAVING, silent_s=0.5 * HOUR_S) is None
    assert watched(Watchdog(stall_s=0.0), Phase.STEPPING, silent_s=100 * HOUR_S, tick_s=0.9) is None


def test_a_suspended_job_is_no_stall() -> None:
    """What the supervisor has not lived through itself does not count: a job suspended for a night goes on."""
    dog = warm(stall_s=60.0)
    beat = Beat(7, Phase.STEPPING, 5, 0, 0.0)
    for now in (0.0, 0.25, 0.5, 8 * HOUR_S, 8 * HOUR_S + 0.25, 20 * HOUR_S):
        assert dog.look(beat, now) is None


def test_a_debugger_is_no_stall() -> None:
    """While somebody holds the program in a debugger, or it is gone, no time counts."""
    dog = warm(stall_s=1.0)
    beat = Beat(7, Phase.STEPPING, 5, 0, 0.0)
    assert all(dog.look(beat, now / 4, counts=False) is None for now in range(100))
    assert any(dog.look(beat, 25 + now / 4) is not None for now in range(100))


@given(
    st.sampled_from(sorted(UNSEEN_S)),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
    st.one_of(st.none(), st.floats(1, 1e6)),
    st.integers(-1, 3),
)
def test_budgets(phase: Phase, seen_s: float, stalled_s: float, stall_s: float | None, step: int) -> None:
    """A budget is never below its floor nor below a multiple of what was seen, and what was a stall gets more time."""
    known = Known({phase: seen_s} if seen_s else {}, {(phase, 2): stalled_s})
    budget_s = warm(known, stall_s=stall_s).budget_s(phase, step)
    assert budget_s is not None
    if stall_s is not None and phase is Phase.STEPPING:
        assert budget_s == max(stall_s, 2 * stalled_s * (step == 2))
        return
    assert budget_s >= max(FLOOR_S[phase], FACTOR * seen_s, stall_s or 0.0)
    assert step != 2 or budget_s >= 2 * stalled_s
    assert budget_s <= max(UNSEEN_S[phase], FACTOR * seen_s, stall_s or 0.0, 2 * stalled_s)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 5)), max_size=60))
def test_a_stall_is_told_exactly_when_the_loop_is_silent(ticks: list[tuple[bool, float]]) -> None:
    """For any pattern of beats and looks: a stall is told if and only if the time lived since the last beat is over."""
    dog, now, beats, lived = warm(stall_s=3.0), 0.0, 1, 0.0
    dog.look(Beat(7, Phase.STEPPING, 0, 0, beats), now)
    for beat, passed in ticks:
        now += passed
        beats += beat
        lived = 0.0 if beat else lived + min(passed, 1.0)
        stall = dog.look(Beat(7, Phase.STEPPING, 0, 0, beats), now)
        assert (stall is not None) == (lived > 3.0 + 1e-9) or abs(lived - 3.0) < 1e-6


DEEP = """
import pathlib, sys, threading
from jobkit.supervise import stacks
stacks.answer(pathlib.Path(sys.argv[1]))
ready = threading.Barrier(41)

def down(levels):
    if levels:
        return down(levels - 1)
    ready.wait()
    threading.Event().wait()

for _ in range(40):
    threading.Thread(target=down, args=(90,), daemon=True).start()
ready.wait()
print("ready", flush=True)
threading.Event().wait()
"""


def test_stacks_are_waited_for_to_their_last_line(tmp_path: Path) -> None:
    """A program that gets no processor while it writes its stacks is waited for; what is read is all of it."""
    program = subprocess.Popen([sys.executable, "-c", DEEP, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        size = (tmp_path / "stacks").stat().st_size

        def starve() -> None:
            while (tmp_path / "stacks").stat().st_size == size:
                pass
            for _ in range(3):
                program.send_signal(signal.SIGSTOP)
                time.sleep(0.25)
                program.send_signal(signal.SIGCONT)

        starving = threading.Thread(target=starve)
        starving.start()
        text = stacks.take(tmp_path, program.pid)
        starving.join()
        assert text.endswith("\n")
        assert text.count("  File ") == stacks.take(tmp_path, program.pid).count("  File ") > 40 * 90
        assert stacks.innermost(text)
    finally:
        program.kill()
        program.wait()


def test_earlier_attempts_are_learned_from(tmp_path: Path) -> None:
    """What supervisors wrote down raises budgets; a stall doubles the budget of its own step alone; junk is skipped."""
    store = Store(tmp_path / "run")
    for attempt, longest in enumerate(
        [{"stepping": 3000.0, "first_step": 10.0}, {"stepping": 20.0, "dancing": 9.0}, "x"]
    ):
        ledger = Ledger(store.file(contract.events_file(attempt, "supervisor")))
        ledger.append("stalled", phase="stepping", step=40, waited_s=8000.0)
        ledger.append("exited", longest_s=longest)
        ledger.close()
    dog = warm(learn(store, 3, "supervisor"))
    assert dog.budget_s(Phase.STEPPING, 1) == 9000.0
    assert dog.budget_s(Phase.STEPPING, 40) == 16_000.0
    assert dog.budget_s(Phase.FIRST_STEP, 0) == HOUR_S
    assert dog.budget_s(Phase.RESTORING, 0) == UNSEEN_S[Phase.RESTORING]
    assert warm(learn(store, 0, "supervisor")).budget_s(Phase.STEPPING, 1) == HOUR_S


# On real processes.

TRAIN = '''\
"""train.py HOW: trains; in attempt 0, after step 20, it hangs."""
import ctypes, os, queue, signal, sys, threading, time
import jobkit

how, attempt = sys.argv[1], int(os.environ.get("JOBKIT_ATTEMPT", 0))
empty = queue.Queue()

def batches():
    while True:
        if how == "loader" and attempt == 0 and run.step == 25:
            yield empty.get()
        yield 1

def hold_the_interpreter():
    lock = ctypes.create_string_buffer(64)
    libc = ctypes.PyDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)

def live_on():
    while True:
        time.sleep(0.05)

threading.Thread(target=live_on, daemon=True).start()
with jobkit.Run(save_every="10 steps") as run:
    state = run.resume(total=0)
    data = batches()
    for step in run.steps(40):
        state.total += next(data)
        time.sleep({3: 1.0, 24: 0.2}.get(step, 0.01))
        if attempt == 0 and step == 19:
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif how == "gil":
                hold_the_interpreter()
            elif how == "slow":
                time.sleep(2.5)
            elif how == "beats":
                for _ in range(12):
                    time.sleep(0.4)
                    run.beat()
'''


class Watched(Supervised):
    """A supervised train.py, under a short `--stall`."""

    def __init__(self, tmp_path: Path, how: str, *, attempt: int = 0, stall: str = "3", grace: str = "2") -> None:
        script = tmp_path / "train.py"
        script.write_text(TRAIN)
        told = {contract.ENV_STALL: stall, contract.ENV_GRACE: grace, contract.ENV_ATTEMPT: str(attempt)}
        self.attempt = attempt
        super().__init__(tmp_path / "run", sys.executable, str(script), how, environment=told)

    def ends(self) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
        """Wait for the end; return exit code, outcome and the stalls that were noticed."""
        self.process.communicate(timeout=60)
        outcome = json.loads(self.store.read(f"attempts/{self.attempt}/outcome.json"))
        events = attempt_events(self.store, self.attempt)
        return self.process.returncode, outcome, [event for event in events if event["event"] == "stalled"]


CASES = {
    "stopped": (r"train.py:\d+ in <module>", "stopped by a signal", 20),
    "loader": ("train.py:11 in batches", "", 25),
    "gil": ("train.py:18 in hold_the_interpreter", "", 10),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", CASES)
def test_a_frozen_program_is_ended_and_started_again(how: str, tmp_path: Path) -> None:
    """SIGSTOP, a data loader that delivers nothing, C code that holds the interpreter: 76, stacks, and it goes on."""
    frame, word, committed = CASES[how]
    under_test = Watched(tmp_path, how)
    code, outcome, stalls = under_test.ends()
    log = under_test.log()
    assert (code, outcome["outcome"], len(stalls)) == (76, "stalled", 1), log
    assert re.fullmatch(frame, stalls[0]["frame"]), stalls[0]["stacks"]
    assert (stalls[0]["phase"], stalls[0]["budget_s"]) == ("stepping", 3.0)
    assert outcome["reason"].startswith("no progress for ")
    assert f"in {stalls[0]['frame']}" in outcome["reason"]
    assert outcome["reason"].endswith(word)
    assert stalls[0]["stacks"] in log
    assert outcome["committed_step"] >= committed
    again = Watched(tmp_path, how, attempt=1)
    assert again.ends()[0] == 0, again.log()
    assert again.store.exists("checkpoints/40/commit.json")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["slow", "beats"])
def test_what_takes_long_is_no_stall(how: str, tmp_path: Path) -> None:
    """A step within its budget, and an evaluation that says it lives, are left alone."""
    under_test = Watched(tmp_path, how, stall="3" if how == "beats" else "30")
    code, outcome, stalls = under_test.ends()
    assert (code, outcome["outcome"], stalls) == (0, "done", []), under_test.log()


@pytest.mark.slow
def test_a_suspended_attempt_goes_on(tmp_path: Path) -> None:
    """A scheduler that stops all processes for longer than the budget, and lets them go on, is no stall."""
    under_test = Watched(tmp_path, "none", stall="2")
    beat = under_test.wait_for(
        lambda: (
            under_test.store.exists("attempts/0/supervisor.json")
            and (beat := under_test.beat()).phase == Phase.STEPPING
            and beat
        )
    )
    for number in (signal.SIGSTOP, signal.SIGCONT):
        os.kill(under_test.process.pid, number)
        os.kill(beat.pid, number)
        time.sleep(5.0 if number == signal.SIGSTOP else 0.0)
    code, _, stalls = under_test.ends()
    assert (code, stalls) == (0, []), under_test.log()


DUMP = """\
main thread 0x00007f0000000001
Thread 0x00007f0000000002 (most recent call first):
  File "/data/other.py", line 3 in live_on

Current thread 0x00007f0000000001 (most recent call first):
  File "{library}/queue.py", line 171 in get
  File "/venv/lib/python3.12/site-packages/torch/loader.py", line 9 in __next__
  File "/data/me/train.py", line 33 in batches
  File "/data/me/train.py", line 40 in <module>
"""


def test_the_innermost_frame_of_the_users() -> None:
    """The place that is named is the user's own, in the main thread, whichever thread wrote the stacks."""
    assert stacks.innermost(DUMP.format(library=os.path.dirname(os.__file__))) == "train.py:33 in batches"
    assert stacks.innermost(DUMP.replace("/data/me", "/usr/lib/python3/dist-packages")) == "queue.py:171 in get"
    assert stacks.innermost("") == ""

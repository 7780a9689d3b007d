"""The scenarios of `jobkit drill`: what is done to a run, and how its attempts must end.

Each is a function that interrupts one run of the user's own program; what it needs to know, the reference showed.
"""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobkit import contract, faults
from jobkit.contract import Outcome
from jobkit.drill.settings import Drill
from jobkit.errors import JobkitError
from jobkit.rundir import commits, ledger
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from jobkit.supervise.heartbeat import Beat, Phase
from launch.backends.local import Local
from launch.backends.local_runner import runner_of
from launch.backends.slurm import queue, scontrol
from launch.drill.observe import MissedError, beat_of, living, newest_attempt, send, wait_until
from launch.lifecycle import lock, orphans, verbs
from launch.lifecycle.submission import runner_environment
from launch.spec.jobspec import JobSpec


@dataclass(frozen=True)
class Shown:
    """What an uninterrupted run of the program showed.

    Args:
        run: Its URL.
        steps: Completed steps at its end.
        step_s: Seconds per step.
        start_s: Seconds from its start to the end of its first step.
        save_s: Seconds from the start of a save to its commit, the longest.
        save_every: Every how many steps the scenarios save.
        pace_s: What a drill adds to each step.
        until: Where a drill ends the program's loops; None where the program has come to its end by itself, with
            early stopping perhaps, which must not look like the loop's own end.
        total: Steps of the program's own `steps()`, as far as it got; None in a loop of its own.
        at: Where a run is interrupted in mid-run; None for the middle.
        loops: How often it came to the end of a loop; 0 if the run saw none.
        tail_s: Seconds from its last commit to its end, 0.0 where the drill ended it.
        usual_s: Seconds of the program's own per step, the median.
        long_step: The last step that took much longer, and its seconds; None if there is none.
    """

    run: str
    steps: int
    step_s: float
    start_s: float
    save_s: float
    save_every: int
    pace_s: float
    until: int | None = None
    total: int | None = None
    at: int | None = None
    loops: int = 1
    tail_s: float = 0.0
    usual_s: float = 0.0
    long_step: tuple[int, float] | None = None

    @property
    def whole(self) -> bool:
        """Whether the program came to its own end."""
        return self.until is None or (self.total is not None and self.total <= self.until)

    @property
    def scenario_s(self) -> float:
        """About how long a scenario with one restart takes."""
        return 2 * self.start_s + self.steps * (self.step_s + self.pace_s) + 3 * self.save_s + 1

    @property
    def middle(self) -> int:
        """The step that is asked for, or one in the middle, a little after a save was due."""
        if self.at is not None:
            return self.at
        return max(1, (self.steps // 2) // self.save_every * self.save_every + max(1, self.save_every // 3))

    @property
    def hit_save(self) -> int:
        """Which save to hit, counted from 1, the one at the start included: not the first, where there is time."""
        if self.at is not None:
            return self.at // self.save_every + 1
        return 3 if self.save_s < self.save_every * (self.step_s + self.pace_s) else 2

    @property
    def allowed_loss(self) -> int:
        """Steps that a kill may cost: the save interval, and what was trained while the save after it was in flight."""
        per_step = self.step_s + self.pace_s
        return self.save_every + max(1, round(3 * self.save_s / per_step) if per_step > 0 else 1)


@dataclass
class Stage:
    """One run of a scenario, and hands on it.

    Args:
        store: The run.
        spec: What was submitted.
        shown: The reference.
        environ: What the program has in its environment for the drill.
        deadline_s: When to give up, on the clock of `time.monotonic`.
        over: Whether the run is over, or everything is to end now.
    """

    store: Store
    spec: JobSpec
    shown: Shown
    environ: Mapping[str, str]
    deadline_s: float
    over: Callable[[], bool]
    done: list[str] = field(default_factory=list)
    """What was done, for a person."""
    wrong: list[str] = field(default_factory=list)
    """Promises of this scenario alone that did not hold."""

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait for something; MissedError if it cannot come any more."""
        return wait_until(condition, what, deadline_s=self.deadline_s, over=self.over)

    def living(self, attempt: int | None = None) -> dict[str, Any] | None:
        """Return the living supervisor's note of an attempt; of the newest by default."""
        number = newest_attempt(self.store) if attempt is None else attempt
        return living(self.store, number) if number is not None else None

    def beat(self, attempt: int | None = None) -> Beat:
        """Return an attempt's heartbeat; an empty one if it does not live."""
        link = self.living(attempt)
        return beat_of(link) if link is not None else Beat()

    def until_step(self, step: int, attempt: int = 0) -> Beat:
        """Wait until an attempt has completed so many steps."""

        def reached() -> Beat | None:
            beat = self.beat(attempt)
            return beat if beat.phase == Phase.STEPPING and beat.step >= step else None

        latest: Beat = self.until(reached, f"attempt {attempt} was at step {step}")
        return latest

    def notice(self, attempt: int = 0) -> None:
        """Send the supervisor a SIGTERM, as a scheduler does."""
        link, beat = self.living(attempt), self.beat(attempt)
        if link is None or not send(link["pid"], signal.SIGTERM):
            raise MissedError("the attempt was over before the notice could be sent")
        self.say(f"SIGTERM to attempt {attempt} ({_where(beat)})")

    def kill(self, attempt: int = 0) -> None:
        """Send the program a SIGKILL."""
        beat = self.beat(attempt)
        pid = beat.pid or max(orphans.program_pids(self.store, attempt)[-1:], default=0)
        if not pid or not send(pid, signal.SIGKILL):
            raise MissedError("the attempt was over before it could be killed")
        self.say(f"SIGKILL to attempt {attempt} ({_where(beat)})")

    def say(self, text: str) -> None:
        """Write down what was done."""
        self.done.append(text)

    def events(self, name: str, attempt: int = 0) -> list[dict[str, Any]]:
        """Return an attempt's events of one kind."""
        return [event for event in ledger.attempt_events(self.store, attempt) if event["event"] == name]


def _where(beat: Beat) -> str:
    phase = beat.phase.name.lower().replace("_", " ")
    return f"step {beat.step}" if beat.phase == Phase.STEPPING else phase


@dataclass(frozen=True)
class Scenario:
    """One way to interrupt a run.

    Args:
        name: For --only.
        text: What happens, in a few words.
        ends: How the attempts before the last must end.
        act: What is done from outside, once the run is submitted.
        fault: What the program does to itself (see jobkit/faults.py).
        quick: Whether --quick has it.
        lacking: Why a program gives no occasion for it, '' if it does.
    """

    name: str
    text: str
    ends: tuple[str, ...]
    act: Callable[[Stage], None] = lambda stage: None
    fault: Callable[[Shown], str] = lambda shown: ""
    quick: bool = False
    lacking: Callable[[Shown], str] = lambda shown: ""

    def environment(self, shown: Shown, probe: tuple[int, ...] = ()) -> dict[str, str]:
        """Return what the program is told; `probe` is as in `Drill`."""
        drill = Drill(until=shown.until, save_every=shown.save_every, pace_s=shown.pace_s, probe=probe)
        return {contract.ENV_DRILL: drill.to_json(), contract.ENV_FAULT: self.fault(shown)}


def _while_starting(stage: Stage) -> None:
    stage.until(lambda: orphans.program_pids(stage.store, 0), "the program was started")
    time.sleep(min(0.3, stage.shown.start_s / 10))
    stage.notice()


def _while_compiling(stage: Stage) -> None:
    stage.until(lambda: stage.beat().phase >= Phase.FIRST_STEP, "the first step began")
    stage.notice()


def _while_training(stage: Stage) -> None:
    stage.until_step(stage.shown.middle)
    stage.notice()


def _kill(stage: Stage) -> None:
    stage.until_step(stage.shown.middle)
    stage.kill()


def _damage(stage: Stage) -> None:
    """Flip a bit of the newest checkpoint, and kill the program before it can write a newer one."""
    stage.until_step(stage.shown.middle)
    stage.until(lambda: len(commits.steps(stage.store)) > 1, "two checkpoints were there")
    pid = stage.beat().pid
    # Stopped, so that "newest" stays true while the bit is flipped.
    if not pid or not send(pid, signal.SIGSTOP):
        raise MissedError("the attempt was over before it could be killed")
    newest = commits.steps(stage.store)[-1]
    _flip(stage, newest)
    stage.kill()
    send(pid, signal.SIGCONT)
    stage.until(lambda: stage.events("restored", 1) or stage.events("fresh", 1), "the next attempt had restored")
    _must_be_aside(stage, newest)


def _flip(stage: Stage, step: int) -> None:
    directory = stage.store.file(contract.step_dir(step))
    path = max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    flip_bit(path)
    stage.say(f"a bit of {path.relative_to(stage.store.path)} flipped")


def _must_be_aside(stage: Stage, step: int) -> None:
    if step not in [event["step"] for event in stage.events("set_aside", 1)]:
        stage.wrong.append(f"the damaged checkpoint of step {step} was not set aside")


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    with path.open("r+b") as file:
        middle = file.seek(0, 2) // 2
        file.seek(middle)
        byte = file.read(1)
        file.seek(middle)
        file.write(bytes([byte[0] ^ 0x10]))


def _fail_storage(stage: Stage) -> None:
    """Make every save fail for a while: a file stands where saves are written."""
    blocked = stage.store.file(contract.STAGE)
    stage.until_step(max(1, stage.shown.steps // 4))
    stage.until(lambda: commits.steps(stage.store), "a checkpoint was there")
    _block(blocked, stage)
    stage.say(f"{contract.STAGE} made unusable at step {stage.beat().step}")
    try:
        stage.until(lambda: stage.events("save_failed"), "a save had failed")
    finally:
        blocked.unlink()
        blocked.with_name(".stage-before").rename(blocked)
    back = stage.beat().step
    stage.say(f"usable again at step {back}")
    stage.until(lambda: commits.steps(stage.store)[-1] >= back, "a save succeeded again")


def _block(blocked: Path, stage: Stage) -> None:
    """Put a file in place of the directory of saves, between two saves, whose files are in it."""

    def swapped() -> bool:
        if blocked.is_dir() and any(blocked.iterdir()):
            return False
        with contextlib.suppress(FileNotFoundError):
            blocked.rename(blocked.with_name(".stage-before"))
        try:
            blocked.touch(exist_ok=False)
        except FileExistsError:  # a save was quicker
            blocked.with_name(".stage-before").rmdir()
            return False
        return True

    stage.until(swapped, "no save was under way")


def _kill_again(stage: Stage) -> None:
    _kill(stage)  # and the next attempt dies while it restores: see `fault`


def _lose_node(stage: Stage) -> None:
    """Kill everything at once, as a power cut does, and start the run again."""
    stage.until_step(stage.shown.middle)
    link = stage.living()
    pids = [lock.holder(stage.store).get("pid", 0), link["pid"] if link else 0, stage.beat().pid]
    if not all(pids):
        raise MissedError("the attempt was over before its node could be lost")
    stage.say(f"SIGKILL to runner, supervisor and program ({_where(stage.beat())})")
    for pid in pids:
        send(pid, signal.SIGKILL)
    verbs.resume(Local(stage.environ), stage.store)
    stage.say("jobkit resume")


def _outlive(stage: Stage) -> None:
    stage.until_step(stage.shown.middle)
    _freeze_and_wake(stage)


def _outlive_saving(stage: Stage) -> None:
    """Have what the old attempt was writing when it froze (see `fault`) tidied up by the new one."""
    stage.until(lambda: processes.state(stage.beat().pid) == "T", "attempt 0 froze in a save")
    _freeze_and_wake(stage)


def _freeze_and_wake(stage: Stage) -> None:
    """Freeze a whole attempt, start another as another node would, and let the old one go on."""
    link, program = stage.living(0), stage.beat(0).pid
    runner = lock.holder(stage.store).get("pid", 0)
    if link is None or not program or not runner:
        raise MissedError("the attempt was over before it could be frozen")
    old = [link["pid"], program]
    for pid in (runner, *old):
        send(pid, signal.SIGSTOP)
    stage.say(f"SIGSTOP to attempt 0 ({_where(stage.beat(0))})")
    send(runner, signal.SIGKILL)  # a frozen node schedules nothing
    new = _start_elsewhere(stage)
    try:
        wait_until(lambda: stage.events("first_step", 1), "attempt 1 stepped", deadline_s=stage.deadline_s)
        before, at = set(commits.steps(stage.store)), time.time()
        for pid in old:
            send(pid, signal.SIGCONT)
        stage.say("attempt 1 steps; SIGCONT to attempt 0")

        def both_over() -> bool:
            return new.poll() is not None and not any(processes.alive(pid) for pid in old)

        wait_until(both_over, "both attempts had ended", deadline_s=stage.deadline_s)
        _judge_old(stage, before, at)
    finally:
        if new.poll() is None:
            new.kill()
            new.wait()


def _start_elsewhere(stage: Stage) -> "subprocess.Popen[bytes]":
    """Start an attempt the way another machine does, which does not see this one's lock."""
    command, environ = runner_of(stage.store, stage.spec).prepare(runner_environment() | dict(stage.environ))
    return subprocess.Popen(
        command, cwd=stage.store.path, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _judge_old(stage: Stage, before: set[int], at: float) -> None:
    """Hold against the old attempt what it did after it woke up."""
    for step in commits.steps(stage.store):
        commit = commits.read(stage.store, step)
        if commit.attempt == 0 and step not in before:
            stage.wrong.append(f"the old attempt published step {step} after attempt 1 had begun")
    removed = [event["step"] for event in stage.events("removed", 0) if event["t"] > at]
    if removed:
        stage.wrong.append(f"the old attempt removed step {removed[0]} after attempt 1 had begun")


_WHERE = {"resumed": "behind resume()", "finished": "behind the last commit"}


def describe(fault: str) -> str:
    """Say what the program does to itself, for a person."""
    match = faults.FAULT.fullmatch(fault)
    assert match is not None
    point, count, attempt, name, delay = match.groups()
    which = _WHERE.get(point) or (f"step {count}" if point == "step" else f"{point.replace('_', ' ')}, number {count}")
    later = f", {float(delay):.2f} s after that" if delay else ""
    return f"SIG{name or 'KILL'} to attempt {attempt} ({which}{later})"


_NO_STEPS = "the program counts its steps in a loop of its own"


def _no_counted_steps(shown: Shown) -> str:
    return _NO_STEPS if shown.total is None else ""


def _no_long_step(shown: Shown) -> str:
    if shown.long_step is None:
        return _no_counted_steps(shown) or "no step took much longer than the others"
    return ""


def _in_long_step(shown: Shown) -> str:
    """Hit the long step in the half of it that other steps do not have."""
    step, seconds = shown.long_step or (0, 0.0)
    return f"step:{step + 1}@0=KILL+{(shown.usual_s + seconds) / 2:.3f}"


def _after_the_end(shown: Shown) -> str:
    """Hit what follows the last commit: at its half, where that is known and takes long enough to be hit."""
    later = f"+{shown.tail_s / 2:.3f}" if shown.tail_s >= _TAIL_S else ""
    return f"finished:{shown.loops}@0=KILL{later}"


_TAIL_S = 3.0
"""What follows the last commit is hit at its half if it takes that long, else at its beginning: Python's own end does
not count."""

PREEMPTED, KILLED = Outcome.PREEMPTED, Outcome.KILLED

_BEFORE_STEPS = Scenario(
    "resumed", "notice between resume() and the first step", (PREEMPTED,), fault=lambda shown: "resumed:1@0=TERM"
)
_AFTER_STEPS = Scenario(
    "after", "SIGKILL behind the last commit", (KILLED,), fault=_after_the_end, quick=True,
    lacking=lambda shown: "" if shown.loops else "the program ended before the run saw the end of its loop",
)  # fmt: skip
_LONG_STEP = Scenario(
    "evaluation", "SIGKILL in the longest step (evaluation)", (KILLED,), fault=_in_long_step, lacking=_no_long_step
)

ALL = (
    Scenario("start", "notice while the program starts", (PREEMPTED,), _while_starting),
    _BEFORE_STEPS,
    Scenario("compile", "notice in the first step", (PREEMPTED,), _while_compiling, quick=True),
    Scenario("notice", "notice in mid-run", (PREEMPTED,), _while_training, quick=True),
    Scenario(
        "notice-save", "notice while a save is written", (PREEMPTED,),
        fault=lambda shown: f"during_write:{shown.hit_save}@0=TERM",
    ),
    Scenario(
        "notice-end", "notice in the last step", (),
        fault=lambda shown: f"step:{shown.steps}@0=TERM", lacking=_no_counted_steps,
    ),
    Scenario("kill", "SIGKILL in mid-run", (KILLED,), _kill),
    _LONG_STEP,
    _AFTER_STEPS,
    Scenario(
        "kill-save", "SIGKILL while a save is written", (KILLED,),
        fault=lambda shown: f"during_write:{shown.hit_save}@0",
    ),
    Scenario(
        "kill-commit", "SIGKILL between data and commit", (KILLED,),
        fault=lambda shown: f"before_rename:{shown.hit_save}@0", quick=True,
    ),
    Scenario(
        "twice", "SIGKILL, and again while restoring", (KILLED, KILLED), _kill_again,
        fault=lambda shown: "during_restore:1@1",
    ),
    Scenario("damage", "newest checkpoint damaged, SIGKILL", (KILLED,), _damage, quick=True),
    Scenario("storage", "storage fails for a while", (), _fail_storage),
    Scenario("node", "the whole node lost, then resumed", (KILLED,), _lose_node),
    Scenario("zombie", "an old attempt wakes up beside a new one", ("",), _outlive),
    Scenario(
        "zombie-save", "an old attempt wakes up in a save", ("",), _outlive_saving,
        fault=lambda shown: f"during_write:{shown.hit_save}@0=STOP",
    ),
)  # fmt: skip


# On a cluster, which is not seen from here: the program's own faults, the run directory, and the scheduler's commands.


def _requeue(stage: Stage) -> None:
    """Have the scheduler take the job off its node and queue it again, as a preemption does."""
    job = stage.until(lambda: queue.jobs(stage.store), "the job was submitted")[-1]
    wanted = stage.shown.save_every
    stage.until(lambda: max(commits.steps(stage.store), default=0) >= wanted, f"step {wanted} was committed")
    try:
        scontrol.run("scontrol", "requeue", job)
    except JobkitError as error:
        raise MissedError(f"job {job} could not be requeued: {error}") from None
    stage.say(f"scontrol requeue {job}")


def _damage_between(stage: Stage) -> None:
    """Flip a bit of the newest checkpoint while no attempt runs: the job waits in the queue."""
    stage.until(lambda: orphans.read_outcome(stage.store, 0), "attempt 0 had ended")
    newest = commits.steps(stage.store)[-1]
    _flip(stage, newest)
    stage.until(lambda: stage.events("restored", 1) or stage.events("fresh", 1), "the next attempt had restored")
    _must_be_aside(stage, newest)


ON_SLURM = (
    _BEFORE_STEPS,
    Scenario("requeue", "the job requeued in mid-run", (PREEMPTED,), _requeue, quick=True),
    Scenario(
        "notice", "notice in mid-run", (PREEMPTED,),
        fault=lambda shown: f"step:{shown.middle}@0=TERM", quick=True, lacking=_no_counted_steps,
    ),
    Scenario(
        "notice-save", "notice while a save is written", (PREEMPTED,),
        fault=lambda shown: f"during_write:{shown.hit_save}@0=TERM",
    ),
    Scenario(
        "kill", "SIGKILL in mid-run", (KILLED,),
        fault=lambda shown: f"step:{shown.middle}@0", lacking=_no_counted_steps,
    ),
    _LONG_STEP,
    _AFTER_STEPS,
    Scenario(
        "kill-commit", "SIGKILL between data and commit", (KILLED,),
        fault=lambda shown: f"before_rename:{shown.hit_save}@0", quick=True,
    ),
    Scenario(
        "damage", "newest checkpoint damaged, SIGKILL", (KILLED,), _damage_between,
        fault=lambda shown: f"step:{shown.middle}@0", quick=True, lacking=_no_counted_steps,
    ),
)  # fmt: skip

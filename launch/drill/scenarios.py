"""The scenarios of `jobkit drill`: what is done to a run, and how its attempts must end.

Each is a function that interrupts one run of the user's own program; what it needs to know, the reference showed.
"""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobkit import contract, faults
from jobkit.contract import Outcome
from jobkit.errors import JobkitError
from jobkit.rundir import commits
from jobkit.supervise import processes
from jobkit.supervise.heartbeat import Phase
from launch.backends.local import Local
from launch.backends.local_runner import runner_of
from launch.backends.slurm import queue, scontrol
from launch.drill.observe import MissedError, send, wait_until
from launch.drill.reference import Reference
from launch.drill.runs import Watched
from launch.lifecycle import lock, orphans, verbs
from launch.lifecycle.submission import runner_environment
from launch.spec import jobspec as specs

PREEMPTED, KILLED = Outcome.PREEMPTED, Outcome.KILLED
Act = Callable[[Watched, Reference], None]
"""Do something to a run that was just started, with what the reference showed."""


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
    act: Act = lambda run, reference: None
    fault: Callable[[Reference], str] = lambda reference: ""
    quick: bool = False
    lacking: Callable[[Reference], str] = lambda reference: ""

    def play(self, run: Watched, reference: Reference) -> None:
        """Interrupt a run that was started with `fault`, and wait for its end."""
        if fault := self.fault(reference):
            run.say(f"by itself: {describe(fault)}")
        run.play(lambda: self.act(run, reference))


def _while_starting(run: Watched, reference: Reference) -> None:
    run.until(lambda: orphans.program_pids(run.store, 0), "the program was started")
    time.sleep(min(0.3, reference.start_s / 10))
    run.notice()


def _while_compiling(run: Watched, reference: Reference) -> None:
    run.until(lambda: (one := run.living()) and one.beat.phase >= Phase.FIRST_STEP, "the first step began")
    run.notice()


def _while_training(run: Watched, reference: Reference) -> None:
    run.until_step(reference.middle)
    run.notice()


def _kill(run: Watched, reference: Reference) -> None:
    run.until_step(reference.middle)
    run.kill()


def _damage(run: Watched, reference: Reference) -> None:
    """Flip a bit of the newest checkpoint, and kill the program before it can write a newer one."""
    run.until_step(reference.middle)
    run.until(lambda: len(commits.steps(run.store)) > 1, "two checkpoints were there")
    stopped = run.send(signal.SIGSTOP)  # so that "newest" stays true while the bit is flipped
    newest = _flip_newest(run)
    run.kill()
    send(stopped.beat.pid, signal.SIGCONT)
    _must_be_set_aside(run, newest)


def _flip_newest(run: Watched) -> int:
    """Flip a bit of the newest checkpoint, and return its step."""
    newest = commits.steps(run.store)[-1]
    files = [path for path in run.store.file(contract.step_dir(newest)).rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    with path.open("r+b") as file:
        middle = file.seek(0, 2) // 2
        file.seek(middle)
        byte = file.read(1)
        file.seek(middle)
        file.write(bytes([byte[0] ^ 0x10]))
    run.say(f"a bit of {path.relative_to(run.store.path)} flipped")
    return newest


def _must_be_set_aside(run: Watched, step: int) -> None:
    run.until(lambda: run.events("restored", 1) or run.events("fresh", 1), "the next attempt had restored")
    if step not in [event["step"] for event in run.events("set_aside", 1)]:
        run.wrong.append(f"the damaged checkpoint of step {step} was not set aside")


def _fail_storage(run: Watched, reference: Reference) -> None:
    """Make every save fail for a while: a file stands where saves are written."""

    def step() -> int:
        one = run.living()
        return one.beat.step if one is not None else 0

    blocked = run.store.file(contract.STAGE)
    run.until_step(max(1, reference.steps // 4))
    run.until(lambda: commits.steps(run.store), "a checkpoint was there")
    run.until(lambda: _block(blocked), "no save was under way")
    run.say(f"{contract.STAGE} made unusable at step {step()}")
    try:
        run.until(lambda: run.events("save_failed"), "a save had failed")
    finally:
        blocked.unlink()
        blocked.with_name(".stage-before").rename(blocked)
    back = step()
    run.say(f"usable again at step {back}")
    run.until(lambda: commits.steps(run.store)[-1] >= back, "a save succeeded again")


def _block(blocked: Path) -> bool:
    """Put a file in place of the directory of saves; False during a save, whose files are in it."""
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


def _lose_node(run: Watched, reference: Reference) -> None:
    """Kill everything at once, as a power cut does, and start the run again."""
    run.until_step(reference.middle)
    one, runner = run.living(), lock.holder(run.store).get("pid", 0)
    if one is None or not one.beat.pid or not runner:
        raise MissedError("the attempt was over before its node could be lost")
    run.say(f"SIGKILL to runner, supervisor and program ({one.where})")
    for pid in (runner, one.supervisor, one.beat.pid):
        send(pid, signal.SIGKILL)
    verbs.resume(Local(run.environ), run.store)
    run.say("jobkit resume")


def _outlive(run: Watched, reference: Reference) -> None:
    """Freeze a whole attempt in mid-run, and wake it beside another one."""
    run.until_step(reference.middle)
    _freeze_and_wake(run)


def _outlive_saving(run: Watched, reference: Reference) -> None:
    """Have what the old attempt was writing when it froze (see `fault`) tidied up by the new one."""
    run.until(lambda: (one := run.living()) and processes.state(one.beat.pid) == "T", "attempt 0 froze in a save")
    _freeze_and_wake(run)


def _freeze_and_wake(run: Watched) -> None:
    """Freeze a whole attempt, start another as another node would, and let the old one go on."""
    one, runner = run.living(0), lock.holder(run.store).get("pid", 0)
    if one is None or not one.beat.pid or not runner:
        raise MissedError("the attempt was over before it could be frozen")
    old = [one.supervisor, one.beat.pid]
    for pid in (runner, *old):
        send(pid, signal.SIGSTOP)
    run.say(f"SIGSTOP to attempt 0 ({one.where})")
    send(runner, signal.SIGKILL)  # a frozen node schedules nothing
    new = _start_elsewhere(run)
    try:
        wait_until(lambda: run.events("first_step", 1), "attempt 1 stepped", deadline_s=run.deadline_s)
        before, at = set(commits.steps(run.store)), time.time()
        for pid in old:
            send(pid, signal.SIGCONT)
        run.say("attempt 1 steps; SIGCONT to attempt 0")

        def both_over() -> bool:
            return new.poll() is not None and not any(processes.alive(pid) for pid in old)

        wait_until(both_over, "both attempts had ended", deadline_s=run.deadline_s)
        _judge_old(run, before, at)
    finally:
        if new.poll() is None:
            new.kill()
            new.wait()


def _start_elsewhere(run: Watched) -> "subprocess.Popen[bytes]":
    """Start an attempt the way another machine does, which does not see this one's lock."""
    command, environ = runner_of(run.store, specs.read(run.store)).prepare(runner_environment() | dict(run.environ))
    return subprocess.Popen(
        command, cwd=run.store.path, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _judge_old(run: Watched, before: set[int], at: float) -> None:
    """Hold against the old attempt what it did after it woke up."""
    for step in commits.steps(run.store):
        if commits.read(run.store, step).attempt == 0 and step not in before:
            run.wrong.append(f"the old attempt published step {step} after attempt 1 had begun")
    removed = [event["step"] for event in run.events("removed", 0) if event["t"] > at]
    if removed:
        run.wrong.append(f"the old attempt removed step {removed[0]} after attempt 1 had begun")


_WHERE = {"resumed": "behind resume()", "finished": "behind the last commit"}


def describe(fault: str) -> str:
    """Say what the program does to itself, for a person."""
    match = faults.FAULT.fullmatch(fault)
    assert match is not None
    point, count, attempt, name, delay = match.groups()
    which = _WHERE.get(point) or (f"step {count}" if point == "step" else f"{point.replace('_', ' ')}, number {count}")
    later = f", {float(delay):.2f} s after that" if delay else ""
    return f"SIG{name or 'KILL'} to attempt {attempt} ({which}{later})"


def _no_counted_steps(reference: Reference) -> str:
    return "the program counts its steps in a loop of its own" if not reference.counted else ""


def _no_long_step(reference: Reference) -> str:
    if reference.long_step is None:
        return _no_counted_steps(reference) or "no step took much longer than the others"
    return ""


def _in_long_step(reference: Reference) -> str:
    """Hit the long step in the half of it that other steps do not have."""
    step, seconds = reference.long_step or (0, 0.0)
    return f"step:{step + 1}@0=KILL+{(reference.usual_s + seconds) / 2:.3f}"


def _after_the_end(reference: Reference) -> str:
    """Hit what follows the last commit: at its half, where that is known and takes long enough to be hit."""
    later = f"+{reference.tail_s / 2:.3f}" if reference.tail_s >= _TAIL_S else ""
    return f"finished:{reference.loops}@0=KILL{later}"


_TAIL_S = 3.0
"""What follows the last commit is hit at its half if it takes that long, else at its beginning: Python's own end does
not count."""

_BEFORE_STEPS = Scenario(
    "resumed", "notice between resume() and the first step", (PREEMPTED,), fault=lambda reference: "resumed:1@0=TERM"
)
_IN_SAVE = Scenario(
    "notice-save", "notice while a save is written", (PREEMPTED,),
    fault=lambda reference: f"during_write:{reference.hit_save}@0=TERM",
)  # fmt: skip
_LONG_STEP = Scenario(
    "evaluation", "SIGKILL in the longest step (evaluation)", (KILLED,), fault=_in_long_step, lacking=_no_long_step
)
_AFTER_STEPS = Scenario(
    "after", "SIGKILL behind the last commit", (KILLED,), fault=_after_the_end, quick=True,
    lacking=lambda reference: "" if reference.loops else "the program ended before the run saw the end of its loop",
)  # fmt: skip
_IN_COMMIT = Scenario(
    "kill-commit", "SIGKILL between data and commit", (KILLED,),
    fault=lambda reference: f"before_rename:{reference.hit_save}@0", quick=True,
)  # fmt: skip

ALL = (
    Scenario("start", "notice while the program starts", (PREEMPTED,), _while_starting),
    _BEFORE_STEPS,
    Scenario("compile", "notice in the first step", (PREEMPTED,), _while_compiling, quick=True),
    Scenario("notice", "notice in mid-run", (PREEMPTED,), _while_training, quick=True),
    _IN_SAVE,
    Scenario(
        "notice-end", "notice in the last step", (),
        fault=lambda reference: f"step:{reference.steps}@0=TERM", lacking=_no_counted_steps,
    ),
    Scenario("kill", "SIGKILL in mid-run", (KILLED,), _kill),
    _LONG_STEP,
    _AFTER_STEPS,
    Scenario(
        "kill-save", "SIGKILL while a save is written", (KILLED,),
        fault=lambda reference: f"during_write:{reference.hit_save}@0",
    ),
    _IN_COMMIT,
    Scenario(  # the next attempt dies while it restores
        "twice", "SIGKILL, and again while restoring", (KILLED, KILLED), _kill,
        fault=lambda reference: "during_restore:1@1",
    ),
    Scenario("damage", "newest checkpoint damaged, SIGKILL", (KILLED,), _damage, quick=True),
    Scenario("storage", "storage fails for a while", (), _fail_storage),
    Scenario("node", "the whole node lost, then resumed", (KILLED,), _lose_node),
    Scenario("zombie", "an old attempt wakes up beside a new one", ("",), _outlive),
    Scenario(
        "zombie-save", "an old attempt wakes up in a save", ("",), _outlive_saving,
        fault=lambda reference: f"during_write:{reference.hit_save}@0=STOP",
    ),
)  # fmt: skip


# On a cluster, which is not seen from here: the program's own faults, the run directory, and the scheduler's commands.


def _requeue(run: Watched, reference: Reference) -> None:
    """Have the scheduler take the job off its node and queue it again, as a preemption does."""
    job = run.until(lambda: queue.jobs(run.store), "the job was submitted")[-1]
    wanted = reference.save_every
    run.until(lambda: max(commits.steps(run.store), default=0) >= wanted, f"step {wanted} was committed")
    try:
        scontrol.run("scontrol", "requeue", job)
    except JobkitError as error:
        raise MissedError(f"job {job} could not be requeued: {error}") from None
    run.say(f"scontrol requeue {job}")


def _damage_between(run: Watched, reference: Reference) -> None:
    """Flip a bit of the newest checkpoint while no attempt runs: the job waits in the queue."""
    run.until(lambda: orphans.read_outcome(run.store, 0), "attempt 0 had ended")
    _must_be_set_aside(run, _flip_newest(run))


def _at_middle(reference: Reference) -> str:
    """Kill the program where it would be hit from outside."""
    return f"step:{reference.middle}@0"


ON_SLURM = (
    _BEFORE_STEPS,
    Scenario("requeue", "the job requeued in mid-run", (PREEMPTED,), _requeue, quick=True),
    Scenario(
        "notice", "notice in mid-run", (PREEMPTED,),
        fault=lambda reference: f"{_at_middle(reference)}=TERM", quick=True, lacking=_no_counted_steps,
    ),
    _IN_SAVE,
    Scenario("kill", "SIGKILL in mid-run", (KILLED,), fault=_at_middle, lacking=_no_counted_steps),
    _LONG_STEP,
    _AFTER_STEPS,
    _IN_COMMIT,
    Scenario(
        "damage", "newest checkpoint damaged, SIGKILL", (KILLED,), _damage_between,
        fault=_at_middle, quick=True, lacking=_no_counted_steps,
    ),
)  # fmt: skip

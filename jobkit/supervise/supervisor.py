"""The supervisor of one attempt: `python -m jobkit.supervise -- CMD`.

What a SLURM task, a container's PID 1 and the local backend run. It starts CMD, passes notices on to the process that
can serve them, reaps orphans, and decides and writes down how the attempt ended. It never imports jax.

CMD's output goes straight to the attempt's log, not through a pipe: a supervisor that is killed must not take the
program down with a broken pipe in the middle of its emergency save. The log is copied to our own output as it grows.
"""

import contextlib
import os
import select
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import click

from jobkit import compilecache, contract, names
from jobkit.contract import Exit, Outcome
from jobkit.errors import ConfigError, JobkitError, leave, say
from jobkit.patience import Patience
from jobkit.rundir import commits, mirror
from jobkit.rundir.control import Control, says_stop
from jobkit.rundir.ledger import Ledger, tail_events
from jobkit.rundir.store import Store, explain
from jobkit.rundir.uploader import Uploader
from jobkit.supervise import cloud_metadata, processes
from jobkit.supervise import stall as watchdog
from jobkit.supervise.heartbeat import SHARED, Beat, Link, Phase
from jobkit.supervise.oom import Memory
from jobkit.supervise.slurm_grace import DeadlineExtension
from jobkit.supervise.stall_monitor import StallMonitor

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_LEFTOVER_S = 5.0
"""What CMD leaves running when it ends gets this long between SIGTERM and SIGKILL."""
_SAVING_S = 60.0
"""A program that outlives the shell around it gets this long to end by itself, since it may be saving."""
_TICK_S = 0.25
_UPLOAD_S, _UPLOAD_NOTICED_S = 600.0, 120.0
"""How long the last uploads may take; what is not up by then waits on this node for the next attempt."""
_OUTAGE_S = 60.0
"""How long a storage may not answer before the program begins, and after it has ended."""
_STAY_S = 15.0
"""A machine that is still there so long after its cloud was to take it away stays."""


@dataclass
class Attempt:
    """One attempt as its supervisor knows it.

    Args:
        store: The run directory.
        number: Number of the attempt.
        process: Index of our program in the attempt, and how many there are.
        command: CMD with its arguments.
        cwd: Where it runs; None for here.
    """

    store: Store
    number: int
    process: tuple[int, int]
    command: Sequence[str]
    cwd: Path | None
    started: float = field(default_factory=time.time)
    notice: str | None = None
    """Source of the first notice."""
    notice_reason: str = "signal"
    deadline_at: float | None = None
    """When the program is killed, as far as anybody said; on the clock of `time.monotonic`."""
    until: float = float("inf")
    """When a cloud takes the machine away, or the grace of a cancel is over: nothing puts that off."""
    asked: bool = False
    """Whether a signal has asked us to stop, whatever a cloud says of it before or after."""
    going: bool = False
    """Whether a cloud is taking this machine away, and has not come to its shutdown yet."""
    hint: str = ""
    """Why, where the exit code alone would mislead."""
    control: Control | None = None
    """Hears what is asked from outside; in process 0 alone."""
    memory: Memory = field(default_factory=Memory)
    child: int = 0
    stopped: bool = False
    """Whether a notice came before CMD ended: one that comes later has changed nothing."""
    codes: dict[int, int] = field(default_factory=dict)
    """Exit codes of everything reaped, by pid; negative for a death by signal."""

    @property
    def log(self) -> Path:
        """Where the program's output goes."""
        return self.store.file(contract.log_file(self.number, self.process[0]))

    @property
    def alone(self) -> bool:
        """Whether the attempt has no other processes."""
        return self.process[1] == 1

    @property
    def writer(self) -> str:
        """Name of this supervisor's ledger."""
        return "supervisor" if self.process[0] == 0 else f"supervisor-{self.process[0]}"


def supervise(store: Store, command: Sequence[str], *, cwd: Path | None = None) -> int:
    """Run one attempt to its end.

    Returns:
        The exit code of the attempt: CMD's own, 128+n for a death by signal n, 75 if it was stopped by a notice before
        it could listen to one, 78 if CMD cannot be started.

    Signals: must be called on the main thread; takes over all signals that stand for a notice.
    """
    processes.become_subreaper()
    asked: list[int] = []
    wakeup = _listen(asked)
    # What is read and written before and after the program waits for the storage a while; whoever started us goes on.
    patient = store.patient(Patience(over=lambda: bool(asked), deadline_s=_OUTAGE_S))
    watch = cloud_metadata.Watch(cloud_metadata.cloud_of())
    given, (index, count) = contract.attempt_from(), contract.process_from()
    if given is None and count > 1:
        raise ConfigError(f"{count} processes but no {contract.ENV_ATTEMPT} that they share: use jobkit submit")
    control = Control.of_attempt(store, given) if index == 0 else None
    attempt = Attempt(patient, mirror.claim(patient) if given is None else given, (index, count), command, cwd)
    attempt.control = control
    ledger = patient.insist(lambda: Ledger(store.file(contract.events_file(attempt.number, attempt.writer))))
    uploader = Uploader(store, attempt.number, ledger)
    link = _link(attempt)
    known = watchdog.learn(patient, attempt.number, attempt.writer)
    monitor = StallMonitor(known, link.directory, ledger, attempt.log)
    try:
        watch.start()
        if index == 0:
            uploader.start()
        patient.write(
            f"{contract.attempt_dir(attempt.number)}/{contract.of_process('supervisor.json', index)}",
            _json(pid=os.getpid(), started=attempt.started, heartbeat=str(link.directory)),
        )
        if index == 0:
            compilecache.share(store)
        with patient.insist(lambda: _open_log(attempt)) as log:
            try:
                attempt.child = _start(attempt, link, log)
            except ConfigError as error:
                attempt.hint = str(error)
                with contextlib.suppress(OSError):
                    log.write(f"jobkit: {error}\n".encode())
        if attempt.child:
            ledger.append("started", pid=attempt.child, command=shlex.join(command))
            code = _watch(attempt, link, ledger, wakeup, uploader, watch, monitor)
            if index == 0:
                code = _upload(attempt, uploader, code)
        else:
            _copy_log(attempt, _Tail())
            code = int(Exit.CONFIG)
        _end(attempt, ledger, link.read(), code, monitor)
        if index == 0:
            with contextlib.suppress(JobkitError):
                uploader.upload_files()  # the outcome itself
        _stay(attempt, code, wakeup, watch)
        # A launcher of several processes ends all when one ends badly. These may still be saving; but where this one
        # never came to its run, none did, and they would wait for it for minutes.
        begun = link.read().phase >= Phase.LISTENING
        return 0 if code == Exit.PREEMPTED and not attempt.alone and begun else code
    finally:
        watch.close()
        link.close()
        ledger.close()


def _link(attempt: Attempt) -> Link:
    try:
        return Link(attempt.store.path, attempt.number)
    except OSError as error:
        places = f"{SHARED} nor in the directory for temporary files (TMPDIR)"
        message = f"there is room for what supervisor and program share on this node neither in {places}"
        raise explain(error, message) from None


def _open_log(attempt: Attempt) -> IO[bytes]:
    try:
        return open(attempt.log, "ab", buffering=0, opener=names.opener)
    except OSError as error:
        raise explain(error, f"cannot write {attempt.log}") from None


def _listen(asked: list[int]) -> int:
    """Install handlers that only wake the main loop and write down what they heard; return what that waits on."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in _FORWARDED:
        signal.signal(number, lambda number, _: asked.append(number))
    # Who starts us may have held signals back until we can listen: for a PID 1 they would be lost (docker/Dockerfile).
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    return reader


def _start(attempt: Attempt, link: Link, log: IO[bytes]) -> int:
    """Start CMD in a process group of its own."""
    environment = os.environ | {
        contract.ENV_RUN: attempt.store.url,
        contract.ENV_ATTEMPT: str(attempt.number),
        contract.ENV_SUPERVISOR: str(link.directory),
        contract.ENV_PROCESS: str(attempt.process[0]),
        contract.ENV_PROCESSES: str(attempt.process[1]),
        "PYTHONUNBUFFERED": os.environ.get("PYTHONUNBUFFERED", "1"),
    }
    environment |= compilecache.environment(attempt.store, environment)
    for ours in filter(lambda variable: variable.ends_here, contract.VARIABLES):
        environment.pop(ours.name, None)
    try:
        # CMD's group is its own, so that a Ctrl-C at our terminal reaches it once, through us.
        process = subprocess.Popen(
            attempt.command,
            cwd=attempt.cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    except FileNotFoundError as error:
        if attempt.cwd is not None and not attempt.cwd.is_dir():
            raise ConfigError(f"the directory {attempt.cwd} does not exist: submit again from one that does") from error
        raise ConfigError(
            f"the command {attempt.command[0]!r} was not found: give its path, or install it where the job runs"
        ) from error
    except OSError as error:
        raise ConfigError(f"the command {attempt.command[0]!r} cannot be started: {error.strerror}") from error
    process.returncode = 0  # reaped by our own waitpid: keeps Popen's destructor from looking for it
    return process.pid


class _Tail:
    """How much of the log has been copied to our own output."""

    def __init__(self) -> None:
        self.offset = 0


def _upload(attempt: Attempt, uploader: Uploader, code: int) -> int:
    """Finish what the program left to upload; the attempt is neither done nor preempted in good order without it."""
    try:
        uploader.close(deadline_s=_UPLOAD_NOTICED_S if attempt.notice else _UPLOAD_S)
    except JobkitError as error:
        attempt.hint = str(error)
        return int(error.exit_code) if code in (Exit.DONE, Exit.PREEMPTED) else code
    return code


def _watch(
    attempt: Attempt,
    link: Link,
    ledger: Ledger,
    wakeup: int,
    uploader: Uploader,
    watch: cloud_metadata.Watch,
    monitor: StallMonitor,
) -> int:
    """Pass notices on until CMD and all it started are gone; return the attempt's exit code."""
    tail = _Tail()
    poll = select.poll()
    poll.register(wakeup, select.POLLIN)
    interrupts = 0
    extension = DeadlineExtension()
    ended_at: float | None = None
    while True:
        numbers = os.read(wakeup, 512) if poll.poll(_TICK_S * 1000) else b""
        for number in numbers:
            if number in _FORWARDED:
                attempt.going, attempt.asked = False, True
                interrupts += number == signal.SIGINT
                if interrupts >= 3 and os.isatty(0):
                    _send(attempt, link, signal.SIGKILL)
                else:
                    name, grace_s = signal.Signals(number).name, contract.grace_s_from(number)
                    give_notice(attempt, link, ledger, source=name, reason="signal", deadline_s=grace_s, number=number)
                    if number == signal.SIGTERM:
                        extension.begin(grace_s)
        for said in watch.said():
            _hear(attempt, link, ledger, said)
        if (later := extension.deadline_at()) is not None:
            _extend_deadline(attempt, link, ledger, later)
        if uploader.superseded is not None and attempt.notice is None:
            give_notice(attempt, link, ledger, source="superseded", reason=str(uploader.superseded))
        if attempt.control is not None and (request := attempt.control.new(contract.CANCEL)) is not None:
            grace_s = contract.grace_s_from(signal.SIGTERM)
            attempt.until = min(attempt.until, float("inf") if grace_s is None else time.monotonic() + grace_s)
            give_notice(attempt, link, ledger, source="stop", reason=says_stop(request), deadline_s=grace_s)
        if (patience_s := monitor.look(link.read())) is not None:
            attempt.hint = monitor.reason
            if patience_s:
                give_notice(attempt, link, ledger, source="watchdog", reason=monitor.reason, deadline_s=patience_s)
        _reap(attempt)
        _copy_log(attempt, tail)
        if attempt.child in attempt.codes:
            if ended_at is None:
                ended_at, attempt.stopped = time.monotonic(), attempt.notice is not None
            if not _end_leftovers(attempt, link, time.monotonic() - ended_at):
                break
    _reap(attempt)
    _copy_log(attempt, tail)
    return _exit_code(attempt, link.read(), monitor.stall)


def _hear(attempt: Attempt, link: Link, ledger: Ledger, said: cloud_metadata.Said) -> None:
    """Act on what a cloud says of this machine."""
    if said.kind is cloud_metadata.Kind.NOTICE:
        left_s = None if said.deadline_at is None else max(0.0, said.deadline_at - time.monotonic())
        attempt.until = min(attempt.until, said.deadline_at or float("inf"))
        give_notice(attempt, link, ledger, source=said.source, reason=said.reason, deadline_s=left_s)
    else:
        ledger.append("metadata", source=said.source, kind=said.kind, reason=said.reason)
    if said.kind is not cloud_metadata.Kind.INFORMATION:
        attempt.going = said.kind is cloud_metadata.Kind.NOTICE and not attempt.asked


def _extend_deadline(attempt: Attempt, link: Link, ledger: Ledger, deadline_at: float) -> None:
    """Move the deadline of the notice to where SLURM has told that it is, if nothing else ends the program before."""
    deadline_at = min(deadline_at, attempt.until)
    if attempt.notice is not None and attempt.deadline_at is not None and deadline_at > attempt.deadline_at:
        attempt.deadline_at = deadline_at
        link.tell(attempt.notice, attempt.notice_reason, deadline_at)
        ledger.append("put_off", deadline_s=round(deadline_at - time.monotonic(), 3))


def _stay(attempt: Attempt, code: int, wakeup: int, watch: cloud_metadata.Watch) -> None:
    """Stay until a machine that its cloud takes away is gone, or is not going any more.

    Everything is on storage. Who starts the run again would do it on this machine, and lose one of its tries; SLURM
    knows better which nodes it has.
    """
    until = (attempt.deadline_at or time.monotonic()) + _STAY_S
    staying = code == Exit.PREEMPTED and attempt.alone and "SLURM_JOB_ID" not in os.environ
    poll = select.poll()
    poll.register(wakeup, select.POLLIN)
    while staying and attempt.going and time.monotonic() < until:
        numbers = os.read(wakeup, 512) if poll.poll(_TICK_S * 1000) else b""
        if any(number in _FORWARDED for number in numbers):
            attempt.going = False
        if any(said.kind is cloud_metadata.Kind.WITHDRAWN for said in watch.said()):
            attempt.going = False


def give_notice(
    attempt: Attempt,
    link: Link,
    ledger: Ledger,
    *,
    source: str,
    reason: str,
    deadline_s: float | None = None,
    number: int = signal.SIGTERM,
) -> None:
    """Take a notice, wherever it comes from: write it down, tell the program what is known of it, and signal it.

    The first one wins; a later one with a nearer deadline tightens it.

    Args:
        attempt: The attempt.
        link: Where the program reads what is known.
        ledger: The supervisor's.
        source: 'SIGTERM', 'gce', 'stop', ...
        reason: What is known of the cause, for a person.
        deadline_s: Seconds from now until the program is killed; None where nobody said.
        number: The signal that the program gets.
    """
    deadline_at = None if deadline_s is None else time.monotonic() + deadline_s
    first = attempt.notice is None
    # Half a second: a burst of the same signal has deadlines that differ by nothing.
    tightens = deadline_at is not None and deadline_at < (attempt.deadline_at or float("inf")) - 0.5
    if first:
        attempt.notice, attempt.notice_reason = source, reason
    if first or tightens:
        attempt.deadline_at = deadline_at
        link.tell(attempt.notice or source, attempt.notice_reason, deadline_at)
        ledger.append("notice", source=source, reason=reason, deadline_s=deadline_s)
    _send(attempt, link, number)


def _send(attempt: Attempt, link: Link, number: int) -> None:
    """Signal the process that listens for a notice, else CMD itself.

    A SIGTERM that comes during imports ends the program at once: no step was done, so nothing is lost, and its node is
    free sooner than if it were held back.
    """
    beat = link.read()
    listens = beat.phase >= Phase.LISTENING and beat.pid in processes.descendants()
    target = beat.pid if listens else attempt.child
    if target in attempt.codes:
        return
    # What does not listen to a notice knows SIGTERM; SIGUSR1 or SIGHUP would be taken for something else.
    sent = number if listens or number in (signal.SIGKILL, signal.SIGINT) else signal.SIGTERM
    with contextlib.suppress(ProcessLookupError):
        os.kill(target, signal.SIGTERM if sent == signal.SIGHUP else sent)


def _reap(attempt: Attempt) -> None:
    attempt.codes.update(processes.reaped())


def _end_leftovers(attempt: Attempt, link: Link, since_s: float) -> bool:
    """End what CMD left running; tell whether something still is."""
    left = processes.descendants()
    if not left:
        return False
    beat = link.read()
    saving = beat.pid in left and Phase.LISTENING <= beat.phase <= Phase.STOPPING
    patience_s = _SAVING_S if saving else _LEFTOVER_S
    number = signal.SIGTERM if since_s < patience_s else signal.SIGKILL
    # While the program saves, it alone is told: its worker processes must live until it is through.
    for pid in [beat.pid] if saving and number == signal.SIGTERM else left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return True


def _exit_code(attempt: Attempt, beat: Beat, stall: watchdog.Stall | None) -> int:
    """Decide the attempt's exit code: CMD's, unless the program inside it told better.

    In `sh -c 'python train.py; echo done'` the shell exits 0 whatever became of the training; taken for done, the run
    would be lost.
    """
    code = attempt.codes[attempt.child]
    if stall is not None and stall.phase is not Phase.STOPPED:
        if code == Exit.DONE and beat.phase == Phase.FINISHED:  # it came back, and that was its last step
            attempt.hint = ""
            return int(Exit.DONE)
        return int(Exit.STALLED)
    if beat.phase == Phase.STOPPED:
        return int(Exit.PREEMPTED)
    if beat.phase >= Phase.LISTENING and beat.pid in attempt.codes and code != 0:
        code = attempt.codes[beat.pid]  # the shell died of the signal that the program served
    if code == 0 and beat.phase not in (Phase.STARTING, Phase.FINISHED):
        attempt.hint = f"the command exited 0 but the run inside it had not finished (step {beat.step})"
        return int(Exit.FAILED)
    shot = code in (-signal.SIGKILL, 128 + signal.SIGKILL)
    asked = -code in {int(number) for number in _FORWARDED} or (attempt.stopped and not shot)
    # Ended on a notice before it could listen, or cannot listen at all: nothing was lost that a restart does not redo.
    # Whatever it makes of that in its exit code: it was not through, and has not failed by itself.
    if asked and beat.phase == Phase.STARTING:
        attempt.notice = attempt.notice or signal.Signals(-code).name
        return int(Exit.PREEMPTED)
    return 128 - code if code < 0 else code


def _copy_log(attempt: Attempt, tail: _Tail) -> None:
    """Copy what the log has grown by to our own output, unless that is closed."""
    if sys.stdout is None:
        return
    with contextlib.suppress(OSError), open(attempt.log, "rb", opener=names.opener) as log:
        log.seek(tail.offset)
        while chunk := log.read(1 << 16):
            tail.offset += len(chunk)
            sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()


def _end(attempt: Attempt, ledger: Ledger, beat: Beat, code: int, monitor: StallMonitor) -> None:
    """Write down how the attempt ended."""
    outcome = contract.outcome_of(code)
    committed = beat.committed_step
    try:
        committed = max(commits.steps(attempt.store), default=-1)
        if outcome is Outcome.DONE and tail_events(attempt.store, contract.events_file(attempt.number, 0), "unsaved"):
            attempt.hint = attempt.hint or "finished without one step of the run: what it trained is not saved"
    except JobkitError as error:
        say(str(error))
    reason = (attempt.hint or _reason(attempt, outcome, code)) + _memory(attempt, outcome)
    record = {
        "attempt": attempt.number,
        "exit_code": code,
        "outcome": outcome,
        "reason": reason,
        "step": max(beat.step, -1),
        "committed_step": committed,
        "started": attempt.started,
        "ended": time.time(),
        "notice": {"source": attempt.notice, "reason": attempt.notice_reason} if attempt.notice else None,
        "process": attempt.process[0],
        "processes": attempt.process[1],
        "node": os.environ.get("SLURMD_NODENAME") or os.uname().nodename,
    } | monitor.outcome
    ledger.append("exited", durable=True, exit_code=code, outcome=outcome, reason=reason, **monitor.longest)
    with contextlib.suppress(JobkitError):
        attempt.store.insist(ledger.flush)
    name = f"{contract.attempt_dir(attempt.number)}/{contract.OUTCOME}"
    try:
        # What became of several processes together is written by who started them.
        attempt.store.write(
            name if attempt.alone else contract.process_outcome(attempt.number, attempt.process[0]), _json(**record)
        )
    except JobkitError as error:  # a full disk: the exit code still tells those who wait for us
        say(str(error))


def _reason(attempt: Attempt, outcome: Outcome, code: int) -> str:
    """Say why in a sentence; the last line of the log knows best where the program ended itself."""
    if outcome is Outcome.DONE:
        return "finished"
    if outcome is Outcome.PREEMPTED:
        cause = attempt.notice if attempt.notice_reason == "signal" else f"notice: {attempt.notice_reason}"
        return f"stopped on {cause or 'notice'}"
    if outcome is Outcome.KILLED:
        return f"killed by {contract.describe_exit(code)}"
    return f"{contract.describe_exit(code)}: {_last_line(attempt)}".rstrip(": ")


def _memory(attempt: Attempt, outcome: Outcome) -> str:
    """Say that the kernel killed for want of memory, if it did and the attempt did not end well."""
    if outcome in (Outcome.DONE, Outcome.PREEMPTED) or not attempt.memory.killed():
        return ""
    killed = outcome is Outcome.KILLED
    return f"{': out of memory' if killed else '; the kernel killed a process: out of memory'}{attempt.memory.limit()}"


def _last_line(attempt: Attempt) -> str:
    try:
        with open(attempt.log, "rb", opener=names.opener) as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
            lines = log.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    stripped = (line.strip() for line in reversed(lines))
    return textwrap.shorten(next((line for line in stripped if line.strip("-") and _JAX not in line), ""), 500)


_JAX = "JAX has removed its internal frames from the traceback"
"""JAX ends an error that was raised below its own functions with this, after a line of dashes."""


def _json(**values: object) -> str:
    import json

    return json.dumps(values, indent=1) + "\n"


def _outlive(runner: int) -> None:
    """Take the end of a runner that is not this process's parent for a SIGTERM."""
    while processes.alive(runner):
        time.sleep(_TICK_S)
    os.kill(os.getpid(), signal.SIGTERM)


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--run", "url", envvar=contract.ENV_RUN, help="The run directory; JOBKIT_RUN by default.")
@click.option("--cwd", type=click.Path(path_type=Path), help="Directory in which CMD runs.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def main(url: str | None, cwd: Path | None, command: tuple[str, ...]) -> None:
    """Run one attempt of CMD and exit as it does.

    Example: JOBKIT_RUN=runs/mnist python -m jobkit.supervise -- python train.py
    """
    runner = os.environ.get(contract.ENV_RUNNER, "")
    if runner.isdigit():  # told to stop when the local runner dies; the lock it handed down stays held until we end
        processes.signal_on_parent_death(signal.SIGTERM)
        if os.getppid() != int(runner):  # gone already; or the parent is the engine's, in a container
            threading.Thread(target=_outlive, args=(int(runner),), daemon=True).start()
    try:
        if not url:
            raise ConfigError(f"no run directory: set {contract.ENV_RUN} or give --run")
        code = supervise(Store(url), command, cwd=cwd)
    except JobkitError as error:
        say(str(error))
        code = error.exit_code
    except OSError as error:
        failure = explain(error, f"cannot supervise an attempt in {url}")
        say(str(failure))
        code = failure.exit_code
    leave(int(code))

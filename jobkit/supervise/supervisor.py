"""The supervisor of one attempt: `python -m jobkit.supervise -- CMD`.

What a SLURM task, a container's PID 1 and the local backend run. It starts CMD, passes notices on to the process that
can serve them, reaps orphans, and decides and writes down how the attempt ended. It never imports jax.

CMD's output goes straight to the attempt's log, not through a pipe: a supervisor that is killed must not take the
program down with a broken pipe in the middle of its emergency save. The log is copied to our own output as it grows.
"""

import contextlib
import json
import os
import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from jobkit import compilecache, contract
from jobkit.contract import Exit, Outcome
from jobkit.errors import ConfigError, JobkitError, say
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
from jobkit.supervise.program import Attempt, Program
from jobkit.supervise.slurm_grace import DeadlineExtension
from jobkit.supervise.stall_monitor import StallMonitor
from jobkit.supervise.together.gathering import Gathering
from jobkit.supervise.together.peers import Peers

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_TICK_S = 0.25
_UPLOAD_S, _UPLOAD_NOTICED_S = 600.0, 120.0
"""How long the last uploads may take; what is not up by then waits on this node for the next attempt."""
_OUTAGE_S = 60.0
"""How long a storage may not answer before the program begins, and after it has ended."""
_FOLLOW_S = 6.0
"""How long a program goes on when another process of its attempt has ended badly: it can commit nothing any more."""
_STAY_S = 15.0
"""A machine that is still there so long after its cloud was to take it away stays."""
_NEVER = float("inf")


class Notices:
    """What is known of the end of a program: the first notice wins, and a nearer deadline tightens it.

    Args:
        program: Gets the signals.
        link: Where the program reads what is known.
        ledger: The supervisor's.
    """

    def __init__(self, program: Program, link: Link, ledger: Ledger) -> None:
        self._program, self._link, self._ledger = program, link, ledger
        self.source: str | None = None
        """Of the first notice."""
        self.reason = "signal"
        self.deadline_at: float | None = None
        """When the program is killed, as far as anybody said; on the clock of `time.monotonic`."""
        self.leaving = False
        """Whether a cloud is taking this machine away, and has not come to its shutdown yet."""
        self._fixed_at = _NEVER
        """When a cloud takes the machine away, or the grace of a cancel is over: nothing puts that off."""
        self._extension = DeadlineExtension()
        self._signalled = False
        self._interrupts = 0

    def give(self, source: str, reason: str, deadline_s: float | None = None, *, number: int = signal.SIGTERM) -> None:
        """Take a notice, wherever it comes from: write it down, show the program what is known of it, and signal it.

        Args:
            source: 'SIGTERM', 'gce', 'stop', ...
            reason: What is known of the cause, for a person.
            deadline_s: Seconds from now until the program is killed; None where nobody said.
            number: The signal that the program gets.
        """
        deadline_at = None if deadline_s is None else time.monotonic() + deadline_s
        first = self.source is None
        # Half a second: a burst of the same signal has deadlines that differ by nothing.
        tightens = deadline_at is not None and deadline_at < (self.deadline_at or _NEVER) - 0.5
        if self.source is None:
            self.source, self.reason = source, reason
        if first or tightens:
            self.deadline_at = deadline_at
            self._link.show_notice(self.source, self.reason, deadline_at)
            self._ledger.append("notice", source=source, reason=reason, deadline_s=deadline_s)
        self._program.send(number)

    def take_signal(self, number: int) -> None:
        """Take a signal for a notice; a person who presses Ctrl-C three times waits for nothing."""
        self.leaving, self._signalled = False, True
        self._interrupts += number == signal.SIGINT
        if self._interrupts >= 3 and os.isatty(0):
            self._program.send(signal.SIGKILL)
            return
        grace_s = contract.grace_s_from(number)
        self.give(signal.Signals(number).name, "signal", grace_s, number=number)
        if number == signal.SIGTERM:
            self._extension.begin(grace_s)

    def take_from_cloud(self, event: cloud_metadata.CloudEvent) -> None:
        """Act on what a cloud says of this machine."""
        if event.kind is cloud_metadata.Kind.NOTICE:
            left_s = None if event.deadline_at is None else max(0.0, event.deadline_at - time.monotonic())
            self._fixed_at = min(self._fixed_at, event.deadline_at or _NEVER)
            self.give(event.source, event.reason, left_s)
        else:
            self._ledger.append("metadata", source=event.source, kind=event.kind, reason=event.reason)
        if event.kind is not cloud_metadata.Kind.INFORMATION:
            self.leaving = event.kind is cloud_metadata.Kind.NOTICE and not self._signalled

    def take_cancel(self, reason: str) -> None:
        """Take a person's wish for a notice: it has its own grace, whatever else leaves more."""
        grace_s = contract.grace_s_from(signal.SIGTERM)
        self._fixed_at = min(self._fixed_at, _NEVER if grace_s is None else time.monotonic() + grace_s)
        self.give("stop", reason, grace_s)

    def extend(self) -> None:
        """Move the deadline to where SLURM has said that it is, if nothing else ends the program before."""
        if (answer := self._extension.deadline_at()) is None:
            return
        deadline_at = min(answer, self._fixed_at)
        if self.source is not None and self.deadline_at is not None and deadline_at > self.deadline_at:
            self.deadline_at = deadline_at
            self._link.show_notice(self.source, self.reason, deadline_at)
            self._ledger.append("put_off", deadline_s=round(deadline_at - time.monotonic(), 3))


class Supervisor:
    """Runs one attempt to its end.

    Signals: must be made and run on the main thread; takes over all signals that stand for a notice.

    Args:
        store: The run directory.
        command: CMD with its arguments.
        cwd: Where it runs; None for here.

    Raises:
        ConfigError: If nobody said which attempt this is one of several processes of.
        JobkitError: If the storage does not answer in time, or the attempt cannot be claimed.
    """

    def __init__(self, store: Store, command: Sequence[str], *, cwd: Path | None = None) -> None:
        processes.become_subreaper()
        self._signals = processes.Signals(*_FORWARDED)
        self._signals.listen()
        # What is read and written before and after the program waits for the storage a while, and then we go on.
        patient = store.patient(Patience(over=lambda: self._signals.first is not None, deadline_s=_OUTAGE_S))
        self._watch = cloud_metadata.Watch(cloud_metadata.cloud_of())
        given, (index, count) = contract.attempt_from(), contract.process_from()
        if given is None and count > 1:
            raise ConfigError(f"{count} processes but no {contract.ENV_ATTEMPT} that they share: use jobkit submit")
        # What is asked from outside process 0 alone looks for.
        self._control = Control.of_attempt(store, given) if index == 0 else None
        number = mirror.claim(patient) if given is None else given
        self._peers = Peers(store, number, index, count)
        if self._peers.apart and index:
            patient.insist(lambda: mirror.set_other_aside(store))
        attempt = self._attempt = Attempt(patient, number, (index, count), command, cwd)
        self._memory = Memory()
        self._ledger = patient.insist(lambda: Ledger(store.file(contract.events_file(number, attempt.writer))))
        self._uploader = Uploader(store, number, self._ledger, process=(index, count))
        self._link = _link(attempt)
        known = watchdog.learn(patient, number, attempt.writer)
        self._monitor = StallMonitor(known, self._link.directory, self._ledger, attempt.log)
        self._program = Program(attempt, self._link)
        self._notices = Notices(self._program, self._link, self._ledger)
        self._hint = ""
        """Why, where the exit code alone would mislead."""

    @property
    def _leads(self) -> bool:
        """Whether this is process 0, which does what is done once for all."""
        return self._attempt.process[0] == 0

    @property
    def _uploads(self) -> bool:
        """Whether what lies in this home is this supervisor's to carry to the URL."""
        return self._leads or self._peers.apart

    @property
    def _begun(self) -> bool:
        """Whether the program has come to its run; else none of several has, and the others wait for it for minutes."""
        return self._link.read().phase >= Phase.LISTENING

    def run(self) -> int:
        """Start CMD, watch over it, and write down how it ended.

        Returns:
            The exit code of the attempt: CMD's own, 128+n for a death by signal n, 75 if it was stopped by a notice
            before it could listen to one, 78 if CMD cannot be started.
        """
        try:
            self._begin()
            code = self._gather() if self._peers.apart else int(Exit.DONE)
            if code == Exit.DONE:
                code = self._attend()
            if self._uploads:
                code = self._upload(code)
            self._end(self._link.read(), code)
            if self._uploads:
                with contextlib.suppress(JobkitError):
                    self._uploader.upload_files()  # the outcome itself
            self._peers.wait()
            self._stay(code)
            # A launcher of several processes ends all when one ends badly: these may still be saving.
            return 0 if code == Exit.PREEMPTED and not self._attempt.alone and self._begun else code
        finally:
            self._watch.close()
            self._peers.close()
            self._link.close()
            self._ledger.close()

    def _begin(self) -> None:
        attempt = self._attempt
        self._watch.start()
        if self._uploads:
            self._uploader.start()
        attempt.store.write(
            f"{contract.attempt_dir(attempt.number)}/{contract.of_process('supervisor.json', attempt.process[0])}",
            _json(
                pid=os.getpid(),
                started=attempt.started,
                heartbeat=str(self._link.directory),
                node=_node(),
                partition=os.environ.get("SLURM_JOB_PARTITION", ""),
            ),
        )
        if self._uploads:
            compilecache.share(attempt.store)

    def _gather(self) -> int:
        """Wait for the other processes, and have the program find them; return 0, or why this attempt is none.

        75 where one of them does not come, or a notice does before they have: the next attempt may be whole.
        """
        attempt = self._attempt
        gathering = Gathering(attempt.store, attempt.number, *attempt.process)
        try:
            while (where := gathering.look()) is None:
                self._take_notices()
                if self._notices.source is not None:
                    gathering.give_up(self._reason(Outcome.PREEMPTED, Exit.PREEMPTED))
                    return int(Exit.PREEMPTED)
        except JobkitError as error:
            self._hint = str(error)
            return int(error.exit_code)
        os.environ[contract.ENV_COORDINATOR] = where
        self._peers.start()
        return int(Exit.DONE)

    def _attend(self) -> int:
        """Run CMD to its end; return the attempt's exit code."""
        self._hint = self._program.start()
        if not self._program.pid:
            self._program.copy_log()
            code = int(Exit.CONFIG)
        else:
            self._ledger.append("started", pid=self._program.pid, command=shlex.join(self._attempt.command))
            code = self._follow()
        if code not in (Exit.DONE, Exit.PREEMPTED) or (code == Exit.PREEMPTED and not self._begun):
            self._peers.break_up(self._hint or self._reason(contract.outcome_of(code), code))
        return code

    def _take_notices(self) -> None:
        """Wait a moment for word of the program's end, wherever it comes from."""
        for number in self._signals.wait(_TICK_S):
            self._notices.take_signal(number)
        for event in self._watch.events():
            self._notices.take_from_cloud(event)
        self._notices.extend()
        if self._uploader.superseded is not None and self._notices.source is None:
            self._notices.give("superseded", str(self._uploader.superseded))
        if self._control is not None and (request := self._control.new(contract.CANCEL)) is not None:
            self._notices.take_cancel(says_stop(request))

    def _follow(self) -> int:
        """Pass notices on until CMD and all it started are gone; return the attempt's exit code."""
        noticed: bool | None = None
        lost_at = _NEVER
        while True:
            self._take_notices()
            if self._peers.lost is not None and lost_at == _NEVER:
                lost_at = time.monotonic()
                self._notices.give(*self._peers.lost, _FOLLOW_S)
            if time.monotonic() >= lost_at + _FOLLOW_S:  # it hangs in a collective
                for pid in processes.descendants():
                    processes.send(pid, signal.SIGKILL)
            if (patience_s := self._monitor.look(self._link.read())) is not None:
                self._hint = self._monitor.reason
                if patience_s:
                    self._notices.give("watchdog", self._monitor.reason, patience_s)
            if self._program.look():
                if noticed is None:  # a notice that comes later has changed nothing
                    noticed = self._notices.source is not None
                if not self._program.end_leftovers():
                    break
        self._program.look()
        return self._exit_code(self._link.read(), noticed=bool(noticed))

    def _exit_code(self, beat: Beat, *, noticed: bool) -> int:
        """Decide the attempt's exit code: CMD's, unless the program inside it showed better.

        In `sh -c 'python train.py; echo done'` the shell exits 0 whatever became of the training; taken for done, the
        run would be lost.

        Args:
            beat: The program's last.
            noticed: Whether a notice came before CMD ended.
        """
        codes, stall = self._program.codes, self._monitor.stall
        code = codes[self._program.pid]
        if stall is not None and stall.phase is not Phase.STOPPED:
            if code == Exit.DONE and beat.phase == Phase.FINISHED:  # it came back, and that was its last step
                self._hint = ""
                return int(Exit.DONE)
            return int(Exit.STALLED)
        if beat.phase == Phase.STOPPED:
            return int(Exit.PREEMPTED)
        if beat.phase >= Phase.LISTENING and beat.pid in codes and code != 0:
            code = codes[beat.pid]  # the shell died of the signal that the program served
        if code == 0 and beat.phase not in (Phase.STARTING, Phase.FINISHED):
            self._hint = f"the command exited 0 but the run inside it had not finished (step {beat.step})"
            return int(Exit.FAILED)
        shot = code in (-signal.SIGKILL, 128 + signal.SIGKILL)
        asked = -code in {int(number) for number in _FORWARDED} or (noticed and not shot)
        # Ended on a notice before it could listen, or cannot listen at all: nothing was lost that a restart does not
        # redo. Whatever it makes of that in its exit code: it was not through, and has not failed by itself.
        if asked and beat.phase == Phase.STARTING:
            self._notices.source = self._notices.source or signal.Signals(-code).name
            return int(Exit.PREEMPTED)
        if beat.phase == Phase.STARTING and self._peers.apart and self._program.lost_the_others:
            self._hint = "the processes of this attempt did not all come to jobkit.initialize()"
            return int(Exit.PREEMPTED)
        if code > 0 and self._program.lost_its_disk:
            return int(Exit.STORAGE)
        return 128 - code if code < 0 else code

    def _upload(self, code: int) -> int:
        """Finish what the program left to upload; the attempt is neither done nor preempted in good order without."""
        try:
            self._uploader.close(deadline_s=_UPLOAD_NOTICED_S if self._notices.source else _UPLOAD_S)
        except JobkitError as error:
            self._hint = str(error)
            return int(error.exit_code) if code in (Exit.DONE, Exit.PREEMPTED) else code
        return code

    def _end(self, beat: Beat, code: int) -> None:
        """Write down how the attempt ended."""
        attempt, notices, outcome = self._attempt, self._notices, contract.outcome_of(code)
        committed = beat.committed_step
        try:
            committed = max(commits.steps(attempt.store), default=-1)
            events = contract.events_file(attempt.number, 0)
            if outcome is Outcome.DONE and tail_events(attempt.store, events, "unsaved"):
                self._hint = self._hint or "finished without one step of the run: what it trained is not saved"
        except JobkitError as error:
            say(str(error))
        reason = (self._hint or self._reason(outcome, code)) + self._out_of_memory(outcome)
        record = {
            "attempt": attempt.number,
            "exit_code": code,
            "outcome": outcome,
            "reason": reason,
            "step": max(beat.step, -1),
            "committed_step": committed,
            "started": attempt.started,
            "ended": time.time(),
            "duration_s": round(time.monotonic() - attempt.started_at, 3),  # whoever sets the clock meanwhile
            "notice": {"source": notices.source, "reason": notices.reason} if notices.source else None,
            "process": attempt.process[0],
            "processes": attempt.process[1],
            "node": _node(),
        } | self._monitor.outcome
        longest = self._monitor.longest
        self._ledger.append("exited", durable=True, exit_code=code, outcome=outcome, reason=reason, **longest)
        with contextlib.suppress(JobkitError):
            attempt.store.insist(self._ledger.flush)
        # What became of several processes together is written by who started them; that they never came together by us.
        never_began = self._peers.apart and not self._peers.gathered and code == Exit.PREEMPTED
        names = [] if attempt.alone else [contract.process_outcome(attempt.number, attempt.process[0])]
        if attempt.alone or (self._leads and never_began):
            names.append(f"{contract.attempt_dir(attempt.number)}/{contract.OUTCOME}")
        try:
            for name in names:
                attempt.store.write(name, _json(**record))
        except JobkitError as error:  # a full disk: the exit code still says it to those who wait for us
            say(str(error))

    def _reason(self, outcome: Outcome, code: int) -> str:
        """Say why in a sentence."""
        if outcome is Outcome.DONE:
            return "finished"
        if outcome is Outcome.PREEMPTED:
            notices = self._notices
            cause = notices.source if notices.reason == "signal" else f"notice: {notices.reason}"
            return f"stopped on {cause or 'notice'}"
        if outcome is Outcome.KILLED:
            return f"killed by {contract.describe_exit(code)}"
        return f"{contract.describe_exit(code)}: {self._program.last_line()}".rstrip(": ")

    def _out_of_memory(self, outcome: Outcome) -> str:
        """Say that the kernel killed for want of memory, if it did and the attempt did not end well."""
        if outcome in (Outcome.DONE, Outcome.PREEMPTED) or not self._memory.killed():
            return ""
        killed = outcome is Outcome.KILLED
        return (
            f"{': out of memory' if killed else '; the kernel killed a process: out of memory'}{self._memory.limit()}"
        )

    def _stay(self, code: int) -> None:
        """Stay until a machine that its cloud takes away is gone, or is not going any more.

        Everything is on storage. Who starts the run again would do it on this machine, and lose one of its tries; SLURM
        knows better which nodes it has.
        """
        if code != Exit.PREEMPTED or not (self._attempt.alone or self._peers.apart) or "SLURM_JOB_ID" in os.environ:
            return
        until = (self._notices.deadline_at or time.monotonic()) + _STAY_S
        while self._notices.leaving and time.monotonic() < until:
            signalled = self._signals.wait(_TICK_S)
            withdrawn = [event for event in self._watch.events() if event.kind is cloud_metadata.Kind.WITHDRAWN]
            if signalled or withdrawn:
                return


def _link(attempt: Attempt) -> Link:
    try:
        return Link(attempt.store.path, attempt.number)
    except OSError as error:
        places = f"{SHARED} nor in the directory for temporary files (TMPDIR)"
        message = f"there is room for what supervisor and program share on this node neither in {places}"
        raise explain(error, message) from None


def _json(**values: object) -> str:
    return json.dumps(values, indent=1) + "\n"


def _node() -> str:
    """Name the machine, as SLURM does where there is one."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename

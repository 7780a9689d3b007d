"""The runner: one attempt after another until the run has ended or goes on elsewhere. One loop for every backend.

It has no memory of its own. Everything it knows is in the run directory, so it may be killed at any instant: its
supervisor then stops the program, and the next runner takes up the history as the ledgers have it. It never starts an
attempt while a process of an earlier one lives.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobkit import contract, names
from jobkit.contract import Exit, Outcome, State
from jobkit.errors import JobkitError, say
from jobkit.patience import Patience, at_once
from jobkit.rundir import emptying, mirror
from jobkit.rundir.ledger import Ledger, attempt_events
from jobkit.rundir.store import Store, explain
from jobkit.supervise import processes
from launch.lifecycle import notify, orphans, restart, run_status
from launch.lifecycle.restart import Cause
from launch.spec import container, unpacking
from launch.spec import jobspec as specs
from launch.spec.command import command_in, environment, in_container
from launch.spec.jobspec import JobSpec

POLL_S = 0.1
"""How often cancel.json is looked for."""
_CLAIM_S = 20.0
"""How long a bucket may take to give an attempt its number."""
_FOLLOW_S = 6.0
"""How long the other processes of an attempt may go on when one of them has ended badly: without it they can commit
nothing, and most hang in a collective."""
KILLED = 128 + signal.SIGKILL
"""Exit code of what has not told how it ended."""


class Runner(ABC):
    """Run attempts of one run until there is nothing more to do here.

    Args:
        store: The run.
        spec: What was submitted.
    """

    output: int | None = subprocess.DEVNULL
    """Where supervisors copy the program's output to: the attempt's log has it in any case."""
    lock_fd: int | None = None
    """Descriptor of the run's lock, which supervisors inherit; None where a scheduler runs no run twice."""
    codes: Mapping[State, int] = {State.DONE: Exit.DONE, State.CANCELLED: Exit.DONE}
    """Exit code of the runner by how the run ended; any other end is a failure."""
    superseded_code: int = Exit.DONE
    in_child: Callable[[], None] | None = None
    """Called in a supervisor's process before it begins."""

    def __init__(self, store: Store, spec: JobSpec) -> None:
        self._spec = spec
        self._store = store.patient(Patience(nap=self._bide, over=lambda: self._over() is not None))
        """Waits for a storage that does not answer, until the run is to stop: nothing else is lost by waiting."""
        self._quick = store.patient(at_once)
        """For what is done while an attempt runs, whose signals must not wait."""
        self._signals = processes.Signals(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self._codes: dict[int, int] = {}
        self._notifier: int | None = None
        """The process that notifies others of the run."""
        self._history: list[restart.Ended] = []
        self._newest_attempt = -1
        """The newest attempt that this process knows to be its own, or an earlier one's."""
        self._spent_s, self._attempt_since = 0.0, float("inf")
        """How long attempts that are over have taken, and since when one runs, on the clock of `time.monotonic`."""
        self._asked = False
        """Whether the newest attempt was asked to stop before anything of it had ended badly."""

    def run(self, ready: Callable[[], None] = lambda: None) -> int:
        """Run until the run has ended or goes on elsewhere; return the exit code that says so.

        Args:
            ready: Called once signals are heard.

        Signals: main thread only; SIGTERM, SIGINT, SIGHUP stop the run in good order.
        """
        self._signals.listen()
        ready()
        self._notifier = notify.start(self._store, self._spec.notify, self._spec.cwd)
        processes.become_subreaper()
        try:
            return self._attempts()
        except JobkitError as error:
            return self._end(*(self._over() or (State.FAILED, str(error))))

    def _attempts(self) -> int:
        """The loop: take up the history, then an attempt and a decision in turn."""
        if (code := self._begin()) is not None:
            return code
        policy = self._remember()
        if self._history and (code := self._decide(policy, Cause.PROGRAM, before=True)) is not None:
            return code
        while True:
            if (over := self._over_anywhere()) is not None:
                return self._end(*over)
            self._history.append(self._attempt())
            if (code := self._decide(policy, self._cause_of(self._history[-1].outcome))) is not None:
                return code

    @abstractmethod
    def _begin(self) -> int | None:
        """Clear up after an earlier runner; return an exit code if there is nothing to do here."""

    def _remember(self) -> restart.Policy:
        """Take up the history of the run since it was submitted, or resumed after its end: earlier runners and jobs."""
        skip, committed = restart.budget_from(run_status.events(self._store))
        attempts = [number for number in self._store.numbers(contract.ATTEMPTS) if number >= skip]
        self._history = [self._ended(attempt) for attempt in attempts]
        if self._spec.max_time_s is not None or self._spec.max_cost is not None:
            before = map(self._ended, self._store.numbers(contract.ATTEMPTS))
            self._spent_s = sum(ended.duration_s for ended in before)
        return restart.Policy(max_failures=self._spec.max_failures, committed_at_start=committed)

    def _decide(self, policy: restart.Policy, why: Cause, *, before: bool = False) -> int | None:
        """Act on how the last attempt ended; return an exit code, or None to go on here.

        Args:
            policy: Budgets.
            why: Why it ended.
            before: Whether it is an attempt of an earlier runner, of which that has written down a decision.
        """
        if (other := self._superseded()) is not None:
            return self._leave(f"{other} has taken over", self.superseded_code)
        decision = restart.decide(self._history, policy)
        done = decision.state is State.DONE  # whoever asked to stop it meanwhile
        over = None if done else self._over()
        if over == self._used_up() and not (decision.restart or self._asked or why is Cause.REQUEUED):
            over = None  # no limit hides a failure that ends the run in any case
        if over is not None and over[0] is not State.REQUEUED:
            return self._end(*over)
        if not done and why is Cause.CANCELLED:
            return self._end(State.CANCELLED, self._says_cancelled())
        if not before:
            fields = {"action": decision.action, "delay_s": decision.delay_s} | self._facts(decision, why)
            self._write_down("decision", **fields, attempt=self._newest_attempt)
        if done:
            return self._end(State.DONE, decision.reason)
        if not decision.restart and why is not Cause.REQUEUED:
            return self._end(decision.state, decision.reason)
        return None if before else self._go_on(decision, why)

    def _says_cancelled(self) -> str:
        """Say who ended the attempt for good, where it was whoever runs the machine."""
        return run_status.cancel_reason(self._quick)

    def _facts(self, decision: restart.Decision, why: Cause) -> dict[str, Any]:
        """Return what the ledger is told of a decision besides what is done."""
        return {"reason": decision.reason}

    def _cause_of(self, outcome: Outcome) -> Cause:
        """Tell why the attempt that has just ended did."""
        return Cause.PROGRAM

    def _go_on(self, decision: restart.Decision, why: Cause) -> int | None:
        """Wait until the next attempt may start here, or hand the run over; return an exit code then."""
        self._wait(decision.delay_s)
        return None

    def _superseded(self) -> str | None:
        """Name what has taken over from this runner."""
        return None

    @abstractmethod
    def _end(self, state: State, reason: str) -> int:
        """Write down the end of the run, and leave."""

    def _leave(self, reason: str, code: int) -> int:
        """Leave; bring what the run says of itself to its URL first."""
        say(reason)
        try:
            mirror.upload_described(self._store)
        except JobkitError as error:
            say(str(error))
        return int(code)

    def _code(self, state: object) -> int:
        return int(next((code for ended, code in self.codes.items() if ended == state), Exit.FAILED))

    @functools.cached_property
    def _ledger(self) -> Ledger:
        return self._store.insist(lambda: Ledger(self._store.file(contract.EVENTS)))

    def _write_down(self, event: str, **fields: Any) -> None:
        """Append to the ledger what must not be lost."""
        self._ledger.append(event, durable=True, **fields)
        self._store.insist(self._ledger.flush)

    def _bide(self, seconds: float) -> None:
        """Wait while no attempt runs: for the next one, or for a storage that does not answer."""
        self._nap(seconds)

    def empty_home(self) -> None:
        """Give back the room on this node once the run has ended, unless somebody is likely to go on here soon."""
        if self._signals.first is not None:
            return
        with contextlib.suppress(JobkitError):
            stopped = self._cancelled() and run_status.cancel_reason(self._quick).startswith("stopped")
            if not stopped and run_status.has_ended(self._quick):
                emptying.empty(self._quick)

    def _over(self) -> tuple[State, str] | None:
        """Tell how the run ends if no further attempt may start; REQUEUED where it goes on elsewhere."""
        if self._cancelled():
            return State.CANCELLED, run_status.cancel_reason(self._quick)
        return self._used_up()

    def _used_up(self) -> tuple[State, str] | None:
        running_s = max(0.0, time.monotonic() - self._attempt_since)
        # Another attempt has no use for less than it is given to stop.
        spare_s = self._spec.grace_s if self._spent_s and self._attempt_since == float("inf") else 0.0
        used_up = self._spec.used_up(self._spent_s + running_s + spare_s)
        more = f"continue with: jobkit resume {self._store.url}, and a higher one"
        return (State.CANCELLED, f"stopped: {used_up}; {more}") if used_up else None

    def _over_anywhere(self) -> tuple[State, str] | None:
        """Like `_over`, and look on the run's URL too: before each attempt, not ten times a second."""
        with contextlib.suppress(JobkitError):
            mirror.fetch_request(self._store, contract.CANCEL)
        return self._over()

    def _cancelled(self) -> bool:
        try:
            return self._quick.exists(contract.CANCEL)
        except JobkitError:
            return False  # a shared disk that does not answer must not end the training

    def _wait(self, delay_s: float) -> None:
        deadline = time.monotonic() + delay_s
        while not self._done_here() and (left := deadline - time.monotonic()) > 0:
            self._bide(min(left, POLL_S))

    def _done_here(self) -> bool:
        """Tell whether no further attempt is to start here, however long it was to wait."""
        return self._over() is not None

    def _attempt(self) -> restart.Ended:
        """Run one attempt and return how it ended; no process of it is left then."""
        command, environ = self._store.insist(lambda: self.prepare(dict(os.environ)))
        attempt = self._store.insist(lambda: mirror.claim(self._quick.with_deadline(_CLAIM_S)))
        self._newest_attempt = attempt
        self._asked, begun = False, time.monotonic()
        self._attempt_since = begun
        code = self._follow(self._start(command, environ | {contract.ENV_ATTEMPT: str(attempt)}))
        self._clear()
        self._close(attempt, code)
        self._spent_s, self._attempt_since = self._spent_s + time.monotonic() - begun, float("inf")
        return self._ended(attempt, code)

    def prepare(self, environ: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """Make the code ready; return the supervisor's command and environment.

        In a container the packages are the image's, whatever is on the path here.

        Args:
            environ: The environment of a runner.
        """
        try:
            return self._prepare(environ)
        except OSError as error:
            raise explain(error, f"cannot make the code of {self._store.url} ready") from None

    def _prepare(self, environ: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        spec = self._spec
        if spec.container is not None:
            environ = {name: environ[name] for name in environ if name != "PYTHONPATH"}
        old = environ.get("PYTHONPATH", "")
        if spec.code is None:
            top, path = Path(spec.root), old
        else:
            at = specs.code_store(self._quick, spec)
            top = unpacking.unpack(at, spec.code, root=Path(spec.root), links=spec.links)
            path = unpacking.python_path(top, Path(spec.root), spec.imports, old)
        place = os.path.relpath(spec.cwd, spec.root)
        cwd = top / place
        if spec.code is not None and not cwd.is_dir():
            names.below(top, place).mkdir(parents=True, exist_ok=True)
        command = command_in(spec, top)
        supervise = [sys.executable, "-P", "-m", "jobkit.supervise", "--cwd", str(cwd), "--", *command]
        limits = self._grace() if spec.stall_s is None else self._grace() | {contract.ENV_STALL: f"{spec.stall_s:g}"}
        environ = environment(self._store, environ, path=path) | limits
        if spec.container is None:
            return supervise, environ
        environ |= container.ENVIRONMENT | self._in_container()
        words = in_container(self._store, spec, cwd=cwd, environ=environ)
        return [*words, *container.command(supervise)], environ

    def _in_container(self) -> dict[str, str]:
        """Return what a container is told besides."""
        return {}

    def _grace(self) -> dict[str, str]:
        """Return how long an attempt has between being asked to stop and being killed."""
        return {contract.ENV_GRACE: f"{self._spec.grace_s:g}"}

    def _start(self, supervise: list[str], environ: dict[str, str]) -> list[int]:
        """Start the supervisors of an attempt; return the processes to wait for."""
        return [
            self._store.insist(functools.partial(self._start_one, supervise, environ | own))
            for own in self._processes()
        ]

    def _start_one(self, supervise: list[str], environ: dict[str, str]) -> int:
        try:
            process = subprocess.Popen(
                [*self._launcher(), *supervise],
                cwd=self._store.path,
                env=self._hand_down(environ),
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                pass_fds=[self.lock_fd] if self.lock_fd is not None else [],
                preexec_fn=self.in_child,
            )
        except (FileNotFoundError, PermissionError) as error:
            raise JobkitError(f"cannot start the supervisor: {error}") from None
        except OSError as error:
            raise explain(error, "cannot start the supervisor") from None
        process.returncode = 0  # reaped by `_reap`, which reaps orphans too
        return process.pid

    def _processes(self) -> list[dict[str, str]]:
        """Return what to start for one attempt: the environment of each."""
        count = self._spec.tasks_per_node
        if count == 1:
            return [{}]
        shared = {contract.ENV_PROCESSES: str(count), contract.ENV_COORDINATOR: f"127.0.0.1:{processes.free_port()}"}
        return [shared | {contract.ENV_PROCESS: str(index)} for index in range(count)]

    def _launcher(self) -> list[str]:
        """Return what the supervisor is started with."""
        return []

    def _hand_down(self, environ: dict[str, str]) -> dict[str, str]:
        """Add to a supervisor's environment what ties it to this process: it stops when that is gone."""
        return environ | {contract.ENV_RUNNER: str(os.getpid())}

    def _inside(self) -> tuple[set[int], set[int]]:
        """Return the processes of the attempt that are no children of ours, and which of them are supervisors."""
        return set(), set()

    def _while_running(self) -> None:  # noqa: B027  (most have nothing to do)
        """Do what is due while an attempt runs."""

    def _ask_to_stop(self, started: list[int]) -> None:
        for pid in [*started, *self._inside()[1]]:
            if pid not in self._codes:
                processes.send(pid, signal.SIGTERM)

    def _follow(self, started: list[int]) -> int:
        """Wait for what was started, passing on a wish to stop; kill what is left after the grace period.

        Returns:
            0, or the code of the first that ended badly; then the others are not left to wait for it. Where all of
            several ended well, 137: those that stopped on notice did as well, and only their supervisors' own word
            says that a run is done.
        """
        asked: float | None = None
        bad = 0
        while True:
            self._nap(POLL_S)
            if all(pid in self._codes for pid in started):
                break
            self._while_running()
            bad = bad or next((code for pid in started if (code := self._codes.get(pid, 0)) != 0), 0)
            if self._over() is None and not bad:
                continue
            if asked is None:
                asked, self._asked = time.monotonic(), not bad
                self._ask_to_stop(started)
            hang = bad not in (0, Exit.PREEMPTED)
            late = time.monotonic() - asked - (min(self._spec.grace_s, _FOLLOW_S) if hang else self._spec.grace_s)
            if late >= 0:
                inside, tops = self._inside()
                for pid in {*processes.descendants(), *inside}:
                    # A supervisor a little later: it still writes how the program ended.
                    if pid not in {*started, *tops} or late > 3:
                        processes.send(pid, signal.SIGKILL)
        several = KILLED if len(started) > 1 else 0
        return bad or next((code for pid in started if (code := self._codes[pid]) != 0), several)

    def _clear(self) -> None:
        """Wait for processes that lost their supervisor; they save and go by themselves, or are made to."""

        def tick() -> list[int]:
            self._reap()
            return processes.descendants()

        orphans.clear(self._store, grace_s=self._spec.grace_s, tick=tick)
        self._reap()  # the last one may have ended since: its exit code tells what became of the attempt

    def _close(self, attempt: int, code: int) -> None:
        """Write the outcome if the supervisor did not."""
        if orphans.read_outcome(self._store, attempt) is not None:
            return
        # Only of a program whose supervisor was killed; of several processes it may be any.
        programs = orphans.program_pids(self._store, attempt)
        program_code = next((self._codes[pid] for pid in reversed(programs) if pid in self._codes), None)
        killed = contract.outcome_of(code) is Outcome.KILLED
        how = f"was killed ({contract.describe_exit(code)})" if killed else f"ended with {contract.describe_exit(code)}"
        if not killed and program_code is None:
            program_code = code
        reason = f"the supervisor {how}"
        if program_code is not None:
            reason += f"; the program ended with {contract.describe_exit(program_code)}"
        if not programs:
            reason, program_code = self._not_started(code, reason, program_code)
        orphans.write_outcome(self._store, attempt, program_code=program_code, reason=reason, ended=time.time())

    def _not_started(self, code: int, reason: str, program_code: int | None) -> tuple[str, int | None]:
        """Say why a supervisor never started a program, where that is known."""
        return reason, program_code

    def _ended(self, attempt: int, code: int | None = None) -> restart.Ended:
        """Return how an attempt ended, as its outcome says; by its exit code where that is not written.

        Args:
            attempt: Number of the attempt.
            code: What started it ended with; None of an earlier runner's, whose outcome says too what it committed.
        """
        outcome = orphans.read_outcome(self._store, attempt) or {}
        exit_code = outcome.get("exit_code", KILLED if code is None else code)
        return restart.Ended(
            outcome=contract.outcome_of(exit_code),
            exit_code=exit_code,
            committed_step=outcome.get("committed_step", -1) if code is None else orphans.committed_step(self._store),
            step=outcome.get("step", -1),
            duration_s=max(0.0, outcome.get("duration_s", outcome.get("ended", 0.0) - outcome.get("started", 0.0))),
            unsaved=any(event["event"] == "unsaved" for event in attempt_events(self._store, attempt)),
        )

    def _nap(self, seconds: float) -> None:
        """Sleep until a signal comes (a child's death too), at most `seconds`."""
        self._signals.wait(seconds)
        self._reap()

    def _reap(self) -> None:
        for pid, code in processes.reaped():
            self._codes[pid] = code if code >= 0 else 128 - code

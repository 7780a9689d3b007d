"""The runs of one program: started, shown while they go, interrupted, waited for, and ended.

`jobkit drill` and `jobkit demo` are made of it.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from jobkit import contract
from jobkit.errors import JobkitError
from jobkit.rundir import ledger
from jobkit.rundir.store import Store
from jobkit.supervise.heartbeat import Phase
from launch.backends import registry
from launch.backends.local import Local
from launch.drill import observe
from launch.drill.observe import LateError, Living, MissedError
from launch.drill.progress import Lines
from launch.lifecycle import lock, orphans, verbs
from launch.lifecycle.run_status import Status
from launch.spec.jobspec import JobSpec

_LOOK_S, _ASK_S = 0.2, 2.0
"""How often it is looked what a run does: here, and where a scheduler has to be asked."""
_ATTEMPTS = 2
"""A run that was to tell something is interrupted once; one that needs more attempts crashes."""


@dataclass
class Watched:
    """A run that was started, and hands on it.

    Args:
        runs: Those that it belongs to.
        name: What people know it by.
        store: Where it is.
        environ: What the program has in its environment for the drill.
        deadline_s: When to give up, on the clock of `time.monotonic`.
        done: What was done to it, for a person.
        wrong: What went wrong besides what its ledger shows, a sentence each.
        missed: Why it could not be interrupted; '' if it was.
    """

    runs: "Runs"
    name: str
    store: Store
    environ: Mapping[str, str]
    deadline_s: float
    done: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    missed: str = ""
    _over: bool = False
    _look_at_s: float = 0.0

    def over(self) -> bool:
        """Show what it is doing, a few times a second; tell whether nothing of it runs, or all is to end now."""
        if time.monotonic() >= self._look_at_s and not self.runs.aborted:
            self.look()
            self._look_at_s = time.monotonic() + (_LOOK_S if self.runs.here else _ASK_S)
        return self._over or self.runs.aborted

    def look(self) -> Status:
        """Show what it is doing, and return that."""
        status = registry.status(self.store)
        self.runs.telling.moved(self.name, status)
        self._over = status.state.over and not (self.runs.here and self._lives())
        return status

    def _lives(self) -> bool:
        """Tell whether a runner, a supervisor or a program of it is left on this machine."""
        return lock.held(self.store) or bool(orphans.processes_of(self.store))

    def wait(self, enough: Callable[[], bool] = lambda: False) -> bool:
        """Wait for its end; tell whether it came, or there was enough of it before. One that is late is ended."""
        while not self.over():
            if enough():
                return False
            if time.monotonic() > self.deadline_s:
                self.wrong.append("the run did not end in time")
                self.end()
                return False
            time.sleep(_LOOK_S / 4)
        return True

    def crashes(self) -> bool:
        """Tell whether it has had more attempts than one that is interrupted once needs."""
        return len(self.store.numbers(contract.ATTEMPTS)) > _ATTEMPTS

    def play(self, act: Callable[[], None]) -> None:
        """Do to it what is done from outside, and wait for its end."""
        try:
            act()
        except MissedError as missed:
            self.missed = str(missed)
        except (LateError, JobkitError) as error:
            self.wrong.append(str(error))
        self.wait()

    def end(self) -> None:
        """Leave nothing of it running."""
        if self.runs.here:
            observe.end_now(self.store)
        elif not registry.status(self.store).state.over:
            registry.cancel(self.store.url, wait=False)
        if not (self._over or self.runs.aborted):
            self.look()

    # For those who interrupt it.

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait for something; MissedError if it cannot come any more."""
        return observe.wait_until(condition, what, deadline_s=self.deadline_s, over=self.over)

    def until_step(self, step: int) -> None:
        """Wait until attempt 0 has completed so many steps."""
        self.until(lambda: self.at_step(step, 0), f"attempt 0 was at step {step}")

    def at_step(self, step: int, attempt: int | None = None) -> Living | None:
        """Look at an attempt, the newest by default, if it trains and has completed so many steps."""
        one = self.living(attempt)
        return one if one is not None and one.beat.phase == Phase.STEPPING and one.beat.step >= step else None

    def living(self, attempt: int | None = None) -> Living | None:
        """Look at an attempt, the newest by default; None if it does not live."""
        return observe.living(self.store, attempt)

    def notice(self) -> None:
        """Send the supervisor of attempt 0 a SIGTERM, as a scheduler does."""
        one = self.living(0)
        if one is None or not observe.send(one.supervisor, signal.SIGTERM):
            raise MissedError("the attempt was over before the notice could be sent")
        self.say(f"SIGTERM to attempt 0 ({one.where})")

    def kill(self) -> None:
        """Send the program of attempt 0 a SIGKILL."""
        one = self.send(signal.SIGKILL)
        self.say(f"SIGKILL to attempt 0 ({one.where})")

    def send(self, number: int) -> Living:
        """Send the program of attempt 0 a signal; return what it did then."""
        one = self.living(0)
        if one is None or not observe.send(one.beat.pid, number):
            raise MissedError("the attempt was over before it could be killed")
        return one

    def say(self, text: str) -> None:
        """Write down what was done."""
        self.done.append(text)

    def events(self, name: str, attempt: int = 0) -> list[dict[str, Any]]:
        """Return an attempt's events of one kind."""
        return [event for event in ledger.attempt_events(self.store, attempt) if event["event"] == name]


class Runs:
    """The runs of one program.

    Args:
        spec: What is run; its `run` is the directory, or the URL, below which each has its name.
        backend: Where they run.
        telling: Who is told how they go.
        environ: What the program has in its environment in all of them.
    """

    def __init__(
        self, spec: JobSpec, backend: verbs.Backend, telling: Lines, environ: Mapping[str, str] | None = None
    ) -> None:
        self._spec, self._backend, self._environ = spec, backend, environ or {}
        self.telling = telling
        self.here = backend.processes_here
        self.aborted = False
        self._started: list[Watched] = []

    def start(
        self, name: str, environ: Mapping[str, str], *, limit_s: float = math.inf, max_failures: int = 10
    ) -> Watched:
        """Start a run.

        Args:
            name: Its name.
            environ: What the program has in its environment besides.
            limit_s: How long it may take.
            max_failures: How often its program may fail.
        """
        variables = {**self._environ, **environ}
        # A job's environment is the cluster's to make.
        words = () if self.here else ("env", *(f"{each}={value}" for each, value in variables.items()))
        spec = msgspec.structs.replace(
            self._spec,
            command=(*words, *self._spec.command),
            run=f"{self._spec.run}/{name}",
            max_failures=max_failures,
        )
        store = verbs.submit(Local(variables) if self.here else self._backend, spec)
        run = Watched(self, name, store, variables, time.monotonic() + limit_s)
        self._started.append(run)
        return run

    def finish(self, wanted: Mapping[str, Mapping[str, str]], *, limit_s: float) -> list[Store]:
        """Run the program by several names at once, each with its environment; return the runs once they are over."""
        started = [self.start(name, environ, limit_s=limit_s, max_failures=1) for name, environ in wanted.items()]
        for run in started:
            run.wait(run.crashes)
            run.end()
        return [run.store for run in started]

    def close(self) -> None:
        """Leave nothing running."""
        self.aborted = True
        for run in self._started:
            with contextlib.suppress(JobkitError, OSError):
                run.end()

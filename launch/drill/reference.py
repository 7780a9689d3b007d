"""The reference of a drill: a run that nobody interrupts, and what it shows of the program."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jobkit import contract
from jobkit.contract import State
from jobkit.drill.settings import OPEN, Drill
from jobkit.errors import ConfigError
from jobkit.rundir import commits, ledger
from jobkit.rundir.store import Store
from jobkit.units import show_duration
from launch.backends import registry
from launch.drill import observe
from launch.drill.runs import Runs, Watched
from launch.lifecycle import orphans

NAME = "reference"
ENOUGH_S, ENOUGH_STEPS = 3.0, 24
"""The reference is cut after so much training, unless its end is within as much: a drill repeats it a dozen times."""
_LEAST_STEPS = 6
_SHORTEST_S = 2.0
"""A run that trains for less is slowed down: it could not be hit from outside. On a busy machine it takes longer still,
by how long a start takes."""
PROBED = (0, 1, 2, 5, 10, 20)
"""Where a drill looks into the reference and into one interrupted run, besides where that is interrupted."""


@dataclass(frozen=True)
class Reference:
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
        counted: Whether the run counts its steps, and not the program in a loop of its own.
        total: Steps of the program's own, in the loops that it came to; None where only its data tells, and in a loop
            of its own.
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
    counted: bool = True
    total: int | None = None
    at: int | None = None
    loops: int = 1
    tail_s: float = 0.0
    usual_s: float = 0.0
    long_step: tuple[int, float] | None = None

    @property
    def whole(self) -> bool:
        """Whether the program came to its own end."""
        end = self.until
        return end is None or self.steps < end or (self.total is not None and self.total <= end)

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

    def environ(self, *, paced: bool = False, probe: tuple[int, ...] = (), fault: str | None = None) -> dict[str, str]:
        """Return what a run that is to be compared with it has in its environment.

        Args:
            paced: Whether it is slowed down, to be hit from outside.
            probe: As in `Drill`.
            fault: What the program does to itself (see jobkit/faults.py).
        """
        drill = Drill(self.until, self.save_every, self.pace_s if paced else 0.0, probe)
        return {contract.ENV_DRILL: drill.to_json()} | ({} if fault is None else {contract.ENV_FAULT: fault})


def take(runs: Runs, *, steps: int | None, at: int | None, timeout_s: float) -> Reference:
    """Run the program undisturbed; return what it showed.

    One that trains for longer is cut. Another run ends there by itself then, as the interrupted ones will: where a loop
    or an epoch ends, code of the program stands behind it, which may change what is saved.

    Args:
        runs: Where it is run.
        steps: How many steps to drill; None for as many as a few seconds hold, 0 for all of the program's.
        at: The step at which to interrupt it in mid-run; None for the middle.
        timeout_s: How long it may take.

    Raises:
        ConfigError: If the program cannot be drilled: it does not run, does not end, or has no steps.
    """
    if at is not None and steps is None:
        steps = at + max(_LEAST_STEPS, at // 10)
    store, cut = _undisturbed(runs, NAME, steps=steps, timeout_s=timeout_s)
    if cut:
        steps = read(store, at).steps
        store, _ = _undisturbed(runs, f"{NAME}-2", steps=steps, timeout_s=timeout_s)
    reference = read(store, at)
    return dataclasses.replace(reference, until=steps or None if reference.counted else None)


def _undisturbed(runs: Runs, name: str, *, steps: int | None, timeout_s: float) -> tuple[Store, bool]:
    """Run the program as `take` says; return the run, and whether it was cut."""
    environ = {contract.ENV_DRILL: Drill(until=steps or None, probe=PROBED).to_json()}
    run = runs.start(name, environ, limit_s=timeout_s, max_failures=0)
    log = f"its log: {run.store.file(contract.log_file(0))}"
    whole = run.wait(_enough(run) if steps is None else lambda: False)
    if run.wrong:
        raise ConfigError(
            f"the program did not end within {show_duration(timeout_s)}: give it fewer steps, or the drill more time "
            f"(--timeout); {log}"
        )
    if not whole:
        registry.cancel(run.store.url)
    status = run.look()
    if status.state is not State.DONE and (whole or status.state is not State.CANCELLED):
        last = status.endings[-1].reason if status.endings else status.reason
        raise ConfigError(f"the program cannot be drilled: without any interruption it ended with {last}; {log}")
    return run.store, not whole and bool(observe.first(run.store, 0, "stopped"))  # else its loop had ended before


def _enough(run: Watched) -> Callable[[], bool]:
    """Return what tells whether a program has trained enough to be cut.

    A loop of one's own has no end of ours: it is drilled to its own. Only steps() writes `first_step`.
    """
    begun: tuple[float, int] | None = None

    def enough() -> bool:
        nonlocal begun
        one = run.living(0)
        if one is None or one.beat.step <= 0 or not (begun or observe.first(run.store, 0, "first_step")):
            return False
        now, step = time.monotonic(), one.beat.step
        begun = begun or (now, step)
        trained_s = now - begun[0]
        if trained_s < ENOUGH_S or step < ENOUGH_STEPS:
            return False
        left = max((event.get("total", OPEN) for event in run.events("loop")), default=0) - step
        return left * trained_s > ENOUGH_S * (step - begun[1])

    return enough


def read(store: Store, at: int | None = None) -> Reference:
    """Read from the reference's ledger what a scenario needs to know.

    Raises:
        ConfigError: If it made no step of ours, or fewer than those after which it is to be interrupted.
    """
    events = ledger.attempt_events(store, 0)
    named = {event["event"]: event for event in events}
    if "opened" not in named:
        raise ConfigError(
            "the program never opened a jobkit.Run, so there is nothing to drill: with jobkit.Run() as run: ..."
        )
    begun = float(events[0]["t"])
    steps = max(commits.steps(store), default=0)
    if steps < _LEAST_STEPS:
        raise ConfigError(f"the program made {steps} steps, too few to interrupt: let it make {_LEAST_STEPS} or more")
    if at is not None and at >= steps - 1:
        raise ConfigError(f"--at {at}: the program made {steps} steps; interrupt it before step {steps - 1}")
    looked = [event for event in events if event["event"] in ("unchanged", "changed")]
    if looked and looked[-1]["event"] == "unchanged":
        raise ConfigError(
            f"the program cannot be drilled, since nothing that it trains is saved: {looked[-1]['reason']}"
        )
    start = float(next((event["t"] for event in events if event["event"] == "first_step"), named["opened"]["t"]))
    end = float(next((event["t"] for event in events if event["event"] in ("stopped", "finished")), events[-1]["t"]))
    save_s = max((event["durable_s"] for event in events if event["event"] == "saved"), default=0.0)
    step_s = max(0.0, end - start - save_s) / max(1, steps - 1)
    finished = [float(event["t"]) for event in events if event["event"] == "finished"]
    ended = (orphans.read_outcome(store, 0) or {}).get("ended")
    times = named.get("step_times", {})
    totals = [event.get("total", OPEN) for event in events if event["event"] == "loop"]
    total = max(totals, default=OPEN)
    return Reference(
        run=store.url,
        steps=steps,
        step_s=step_s,
        start_s=start - begun,
        save_s=save_s,
        save_every=max(1, (at or steps) // 4),
        pace_s=max(0.0, max(_SHORTEST_S, (start - begun) / 2) / steps - step_s),
        counted=bool(totals),
        total=total if total < OPEN else None,
        at=at,
        loops=len(finished),
        tail_s=max(0.0, float(ended) - finished[-1]) if ended and finished else 0.0,
        usual_s=times.get("usual_s", 0.0),
        long_step=last_long(times.get("slow", [])),
    )


def last_long(slow: Sequence[tuple[int, float]]) -> tuple[int, float] | None:
    """Return the last of the longest steps: the first one may have compiled, and a busy machine makes short ones."""
    longest = max((seconds for _, seconds in slow), default=0.0)
    return max(((step, seconds) for step, seconds in slow if seconds >= longest / 5), default=None)

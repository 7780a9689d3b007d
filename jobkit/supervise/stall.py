"""When a program that shows no sign of progress counts as stalled: pure, but for reading what earlier attempts saw.

The supervisor shows it the heartbeat a few times a second. Progress is that the *loop* has beaten: threads of the
program may live on for ever beside a main thread that waits for a collective. Time is what the supervisor itself has
lived through, tick by tick: a scheduler that suspends a job stops both, and no clock that jumps over that counts.

The budgets are generous, since the two mistakes differ in price: a stall noticed late costs an hour of one job, while
an evaluation of forty minutes that is taken for a stall costs the run, as it comes again in every attempt. They grow
with what this run was seen to do and never shrink below a floor. Who knows better says so: `--stall 5m`, and
`run.beat()` inside what takes long. An operation that was taken for a stall gets twice the time when the run comes to
the same step again, and the second and third step of an attempt get the first one's time: JAX compiles a step again
when its inputs come from itself rather than from a checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jobkit import contract
from jobkit.rundir.ledger import writer_events
from jobkit.rundir.store import Store
from jobkit.supervise.heartbeat import Beat, Phase
from jobkit.supervise.pace import Pace, Silence
from jobkit.units import show_duration

_MINUTE_S, _HOUR_S = 60.0, 3600.0
UNSEEN_S = {
    Phase.LISTENING: 4 * _HOUR_S,  # data is downloaded, a model built
    Phase.RESTORING: 2 * _HOUR_S,
    Phase.FIRST_STEP: 4 * _HOUR_S,  # compilations of two hours are on record
    Phase.STEPPING: _HOUR_S,
    Phase.SAVING: _HOUR_S,
    Phase.STOPPING: _HOUR_S,  # who sent the notice is less patient
    Phase.STOPPED: 5 * _MINUTE_S,  # all is committed: nothing but the interpreter's end is left
}
"""Budget of each phase while this run was never seen in it; the rest is the program's own and not watched."""
FLOOR_S = UNSEEN_S | {Phase.LISTENING: _HOUR_S, Phase.RESTORING: 30 * _MINUTE_S, Phase.FIRST_STEP: _HOUR_S}
"""What a budget never falls below: a warm compile cache or a near checkpoint may be gone next time."""
WARM_STEPS = 3
"""After so many steps an attempt has compiled what it needs for one."""
FACTOR = 3.0
"""A budget is so many times the longest that was seen."""
_TICK_S = 1.0
"""More than this the supervisor never lives through between two looks, whatever the clock says."""
_ATTEMPTS = 50
"""So many of the newest attempts are learned from."""


@dataclass(frozen=True)
class Known:
    """What earlier attempts of a run tell.

    Args:
        longest_s: Phase -> longest time without a sign of progress that ended well.
        stalled_s: Phase and step -> how long was waited there before it counted as a stall.
        longest_step_s: The longest step, those that compile left out.
    """

    longest_s: Mapping[Phase, float] = field(default_factory=dict)
    stalled_s: Mapping[tuple[Phase, int], float] = field(default_factory=dict)
    longest_step_s: float = 0.0


@dataclass(frozen=True)
class Stall:
    """A program that counts as stalled.

    Args:
        phase: What it was doing.
        step: Completed steps, -1 before the run's state is known.
        waited_s: How long without a sign of progress.
        budget_s: How long was allowed.
    """

    phase: Phase
    step: int
    waited_s: float
    budget_s: float

    def __str__(self) -> str:
        """Say it to a person."""
        after = f" after step {self.step}" if self.step >= 0 else ""
        return f"no progress for {show_duration(self.waited_s)}{after} (phase: {self.phase.words})"


class Watchdog:
    """Watches one program.

    Args:
        known: What is known of the run.
        stall_s: What a step may take, from who knows; 0 to watch nothing, None to go by what is known.
    """

    def __init__(self, known: Known | None = None, *, stall_s: float | None = None) -> None:
        self._known, self._stall_s = known or Known(), stall_s
        self._beat = Beat()
        self._looked_s: float | None = None
        self._waited_s = 0.0
        self._warm_at: int | None = None
        self.longest_s: dict[Phase, float] = {}
        """Phase -> longest time without a sign of progress in this attempt, of those that ended well."""
        self.pace = Pace(self._known.longest_step_s)
        """How fast the program steps."""

    def budget_s(self, phase: Phase, step: int) -> float | None:
        """Return how long a phase may show no progress; None where it is not watched."""
        if self._stall_s == 0 or phase not in UNSEEN_S:
            return None
        again_s = 2 * self._known.stalled_s.get((phase, step), 0.0)
        if phase is Phase.STEPPING and not self._warm(step):
            phase = Phase.FIRST_STEP
        if self._stall_s is not None and phase is Phase.STEPPING:
            return max(self._stall_s, again_s)
        longest_s = max(self.longest_s.get(phase, 0.0), self._known.longest_s.get(phase, 0.0))
        learned_s = max(FLOOR_S[phase], FACTOR * longest_s) if longest_s else UNSEEN_S[phase]
        return max(learned_s, self._stall_s or 0.0, again_s)

    def _warm(self, step: int) -> bool:
        return self._warm_at is not None and step >= self._warm_at

    def silence(self) -> Silence | None:
        """Return for how long the program has made no step though it usually is much faster; None if it does."""
        return self.pace.silence(self._beat)

    def look(self, beat: Beat, now_s: float, *, counts: bool = True) -> Stall | None:
        """Look at the newest heartbeat.

        Args:
            beat: The heartbeat.
            now_s: Now, on a clock that never goes back.
            counts: Whether the program is there and nobody holds it in a debugger.

        Returns:
            The stall, as long as there is one.
        """
        passed_s = 0.0 if self._looked_s is None else min(max(now_s - self._looked_s, 0.0), _TICK_S)
        self._looked_s = now_s
        if beat != self._beat:
            self.pace.progress(self._beat, beat, passed_s, warm=self._warm(self._beat.step))
            self._progress(beat)
            return None
        if counts:
            self._waited_s += passed_s
            self.pace.wait(passed_s)
        budget_s = self.budget_s(beat.phase, beat.step)
        if budget_s is None or self._waited_s <= budget_s:
            return None
        return Stall(beat.phase, beat.step, self._waited_s, budget_s)

    def _progress(self, beat: Beat) -> None:
        before, self._beat = self._beat, beat
        self.longest_s[before.phase] = max(self.longest_s.get(before.phase, 0.0), self._waited_s)
        self._waited_s = 0.0
        if beat.pid != before.pid:
            self._warm_at = None
        if beat.phase is Phase.FIRST_STEP:
            self._warm_at = beat.step + WARM_STEPS
        elif self._warm_at is None and beat.phase is Phase.STEPPING:  # its first step took no time
            self._warm_at = beat.step + WARM_STEPS - 1


def learn(store: Store, before: int, writer: str) -> Known:
    """Read what the supervisors of a process saw in earlier attempts.

    Args:
        store: The run.
        before: Number of the first attempt that is not an earlier one.
        writer: Name of the supervisor's ledger.
    """
    longest: dict[Phase, float] = {}
    stalled: dict[tuple[Phase, int], float] = {}
    longest_step_s = 0.0
    numbers = [number for number in store.numbers(contract.ATTEMPTS) if number < before]
    for attempt in numbers[-_ATTEMPTS:]:
        for event in writer_events(store, attempt, writer):
            try:
                if event["event"] == "exited":
                    for name, seconds in event.get("longest_s", {}).items():
                        phase = Phase[name.upper()]
                        longest[phase] = max(longest.get(phase, 0.0), float(seconds))
                    longest_step_s = max(longest_step_s, float(event.get("longest_step_s", 0.0)))
                elif event["event"] == "stalled":
                    where = Phase[event["phase"].upper()], int(event["step"])
                    stalled[where] = max(stalled.get(where, 0.0), float(event["waited_s"]))
            except (KeyError, ValueError, TypeError, AttributeError):
                continue  # written by another version
    return Known(longest, stalled, longest_step_s)

"""All that a run's directory tells of its past, as the ledgers have it: what goodput, report and explain start from."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jobkit import contract
from jobkit.contract import Outcome, State
from jobkit.errors import JobkitError
from jobkit.rundir import commits
from jobkit.rundir.ledger import Event, Series, last_word, read_json, read_lines, read_metrics
from jobkit.rundir.retention import keep_of
from jobkit.rundir.store import Store
from launch.lifecycle import orphans


@dataclass
class Life:
    """One attempt, as each of its writers saw it; events are in the order written, whatever their clock says.

    Args:
        number: Number of the attempt.
        program: Events of process 0.
        supervisor: Events of process 0's supervisor.
        others: Of each other process, by its index: its events and its supervisor's.
        outcome: What is written of its end; empty while it runs.
    """

    number: int
    program: list[Event] = field(default_factory=list)
    supervisor: list[Event] = field(default_factory=list)
    others: dict[str, list[Event]] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)


@dataclass
class History:
    """A run from its submit until now.

    Args:
        launcher: Events of the launching side, in the order written.
        lives: The attempts, oldest first.
        now: Seconds since the epoch while the run is alive, None once nothing happens any more by itself.
        by_hand: Whether it was started by hand and not submitted.
        price_per_hour: Of everything an attempt runs on; None where no price is given.
        series: What the program logged and a curve shows; None where it was not read.
        values: Of a point of a sweep: what each swept name is there.
        best: Its best committed step by the program's `keep_best`: metric, 'min' or 'max', value.
    """

    run: str = ""
    name: str = ""
    state: str = ""
    reason: str = ""
    launcher: list[Event] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    now: float | None = None
    by_hand: bool = False
    price_per_hour: float | None = None
    grace_s: float | None = None
    series: Series | None = None
    values: dict[str, str] = field(default_factory=dict)
    best: tuple[str, str, float] | None = None


def best_score(store: Store) -> tuple[str, str, float] | None:
    """Return by what the program's `keep_best` measures, and the best committed value of it; None without either."""
    keep, known = keep_of(store), commits.metrics(store)
    step = keep.best_of(known)
    return None if keep.best is None or step is None else (*keep.best, known[step][keep.best[0]])


def read_history(store: Store, *, state: str = "", reason: str = "", over: bool = True, curves: bool = True) -> History:
    """Read the history of a run.

    Args:
        store: The run.
        state: What the run's backend says of it, and why.
        reason: Why it is in this state.
        over: Whether nothing will happen to it any more by itself.
        curves: Read what the program logged, too.
    """
    record = read_json(store, contract.RUN_JSON) or {}
    spec = record["spec"] if isinstance(record.get("spec"), dict) else {}
    numbers = store.numbers(contract.ATTEMPTS)
    lives = [_life(store, number, min(_MOST, max(_LEAST, _ALL // len(numbers)))) for number in numbers]
    for life in () if record else lives:  # nobody but the program itself could write down how it ended
        life.outcome = life.outcome or by_hand_outcome(life.program, over=over or life is not lives[-1])
    return History(
        run=store.url,
        name=str(spec.get("name") or store.path.name),
        state=state,
        reason=reason,
        launcher=_finite(read_lines(store, contract.EVENTS)),
        lives=lives,
        now=None if over else time.time(),
        by_hand=not record,
        price_per_hour=number_of(record.get("price_per_hour", spec.get("price_per_hour"))),
        grace_s=number_of(spec.get("grace_s")),
        series=read_metrics(store, only=drawn) if curves else None,
    )


def drawn(names: Collection[str]) -> tuple[str, ...]:
    """Choose the metric that is drawn, and its namesake of the validation data; none of none."""
    name = "loss" if "loss" in names else min(names, default=None)
    return () if name is None else (name, f"val_{name}")


class Pace(NamedTuple):
    """How far an attempt has come, as its ledger tells.

    Args:
        total: Where the loop ends that it is in; None where nobody said, as in a loop of the program's own.
        first, last: Time (epoch, s) and completed steps after its first step, and at the end of what was read.
    """

    total: int | None
    first: tuple[float, int] | None
    last: tuple[float, int] | None

    @property
    def steps(self) -> int:
        """Completed steps; -1 if none is known."""
        return self.last[1] if self.last is not None else -1

    def at(self, beat_age_s: float | None) -> float | None:
        """Return when the last step was completed (epoch, s), by its heartbeat if there is one; None: unknown."""
        return time.time() - beat_age_s if beat_age_s is not None else self.last[0] if self.last is not None else None

    def left_s(self, step: int | None, now: float) -> float | None:
        """Return for how long it will train on, at the pace that it had from its first step until now."""
        if self.total is None or self.first is None or step is None or step <= self.first[1]:
            return None
        return max(0, self.total - step) * max(0.0, now - self.first[0]) / (step - self.first[1])


def pace(head: Sequence[Event], tail: Sequence[Event]) -> Pace:
    """Read how far an attempt has come.

    Args:
        head: The first events that its program wrote.
        tail: The newest ones.
    """
    loops = [event for event in (*head, *tail) if event["event"] == "loop"]
    known = [
        (time_s, step)
        for event in tail
        if (step := count_of(event.get("step"))) is not None and (time_s := number_of(event["t"])) is not None
    ]
    first = next((event for event in head if event["event"] == "first_step"), {"t": None})
    begun, step = number_of(first["t"]), count_of(first.get("step"))
    last = max(known, key=lambda one: one[1], default=None)
    total = count_of(loops[-1].get("total")) if loops and number_of(loops[-1].get("total")) is not None else None
    return Pace(
        total=total if total is not None and (last is None or total >= last[1]) else None,
        first=None if begun is None or step is None else (begun, step),
        last=last,
    )


def by_hand_outcome(events: Sequence[Event], *, over: bool = False) -> dict[str, Any]:
    """Return how an attempt that has no supervisor ended, as outcome.json would have it; empty if that is not known.

    Args:
        events: The newest that its program wrote down, in the order written.
        over: Whether the program is gone.
    """
    word = last_word(events)
    if word == "raised":
        last = next(event for event in reversed(events) if event["event"] == word)
        return {
            "outcome": Outcome.FAILED,
            "reason": str(last.get("error", "")),
        }
    if word:
        done = word == "finished"
        return {"outcome": Outcome.DONE if done else Outcome.PREEMPTED, "reason": word if done else "stopped on notice"}
    return {"outcome": Outcome.KILLED, "reason": "killed, or its machine went down: it left no word"} if over else {}


def _life(store: Store, number: int, logged: int) -> Life:
    life = Life(number)
    try:
        life.outcome = read_json(store, f"{contract.attempt_dir(number)}/{contract.OUTCOME}") or {}
    except JobkitError:
        life.outcome = orphans.of_all_processes(store, number) or {}
    for name in sorted(store.names(contract.attempt_dir(number))):
        if name.startswith("events-") and name.endswith(".jsonl"):
            writer = name.removeprefix("events-").removesuffix(".jsonl")
            events = _finite(read_lines(store, f"{contract.attempt_dir(number)}/{name}", logged=logged))
            known = {"0": life.program, "supervisor": life.supervisor}.get(writer)
            (known if known is not None else life.others.setdefault(writer.removeprefix("supervisor-"), [])).extend(
                events
            )
    return life


_ALL, _MOST, _LEAST = 20_000, 2_000, 10
"""So many events of logged values tell well enough when a run was at which step: in all, and of one attempt."""


def _finite(events: list[Event]) -> list[Event]:
    return [event for event in events if number_of(event["t"]) is not None]


def state_of(value: object) -> State:
    """Return a state that the ledger has; FAILED where that is none."""
    return State(str(value)) if value in list(State) else State.FAILED


def number_of(value: object) -> float | None:
    """Return a number from 0 up to 1e12, None for anything else: a ledger may hold whatever a writer was told."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        return None
    return float(value)


def count_of(value: object) -> int | None:
    """Return a whole number of zero or more, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

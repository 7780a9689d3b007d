"""All that a run's directory tells of its past, as the ledgers have it: what goodput, report and explain start from."""

import time
from dataclasses import dataclass, field
from typing import Any

from jobkit import contract
from jobkit.errors import JobkitError
from jobkit.ledger import Event, Series, read_json, read_lines, read_metrics
from jobkit.storage import Store
from launch import leftovers


@dataclass
class Life:
    """One attempt, as each of its writers saw it; events are in the order written, whatever their clock says.

    Args:
        number: Number of the attempt.
        program: Events of process 0.
        supervisor: Events of process 0's supervisor.
        others: Events of the other processes and their supervisors.
        outcome: What is written of its end; empty while it runs.
    """

    number: int
    program: list[Event] = field(default_factory=list)
    supervisor: list[Event] = field(default_factory=list)
    others: list[Event] = field(default_factory=list)
    outcome: dict[str, Any] = field(default_factory=dict)


@dataclass
class History:
    """A run from its submit until now.

    Args:
        launcher: Events of the launching side, in the order written.
        lives: The attempts, oldest first.
        now: Seconds since the epoch while the run is alive, None once nothing happens any more by itself.
        price_per_hour: Of everything an attempt runs on; None where no price is given.
        series: What the program logged; None where it was not read.
    """

    run: str = ""
    name: str = ""
    state: str = ""
    reason: str = ""
    launcher: list[Event] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    now: float | None = None
    price_per_hour: float | None = None
    grace_s: float | None = None
    series: Series | None = None


def read_history(store: Store, *, state: str = "", reason: str = "", over: bool = True, curves: bool = True) -> History:
    """Read the history of a run.

    Args:
        store: The run.
        state: What the run's backend says of it, and why.
        reason: Why it is in this state.
        over: Whether nothing will happen to it any more by itself.
        curves: Read what the program logged, too.
    """
    told = read_json(store, contract.RUN_JSON) or {}
    spec = told["spec"] if isinstance(told.get("spec"), dict) else {}
    return History(
        run=store.url,
        name=str(spec.get("name") or store.path.name),
        state=state,
        reason=reason,
        launcher=_finite(read_lines(store, contract.EVENTS)),
        lives=[_life(store, number) for number in store.numbers(contract.ATTEMPTS)],
        now=None if over else time.time(),
        price_per_hour=number_of(told.get("price_per_hour", spec.get("price_per_hour"))),
        grace_s=number_of(spec.get("grace_s")),
        series=read_metrics(store) if curves else None,
    )


def _life(store: Store, number: int) -> Life:
    life = Life(number)
    try:
        life.outcome = read_json(store, f"{contract.attempt_dir(number)}/{contract.OUTCOME}") or {}
    except JobkitError:
        life.outcome = leftovers.of_all_processes(store, number) or {}
    for name in sorted(store.names(contract.attempt_dir(number))):
        if name.startswith("events-") and name.endswith(".jsonl"):
            writer = name.removeprefix("events-").removesuffix(".jsonl")
            events = _finite(read_lines(store, f"{contract.attempt_dir(number)}/{name}"))
            {"0": life.program, "supervisor": life.supervisor}.get(writer, life.others).extend(_thinned(events))
    return life


_MOST = 2_000
"""So many events of logged values tell well enough at which step an attempt was when."""


def _thinned(events: list[Event]) -> list[Event]:
    """Leave out most events of logged values, of which there may be millions; the last one stays."""
    logged = [index for index, event in enumerate(events) if event["event"] == "metrics"]
    if len(logged) <= _MOST:
        return events
    kept = {*logged[:: len(logged) // _MOST], logged[-1]}
    return [event for index, event in enumerate(events) if index in kept or event["event"] != "metrics"]


def _finite(events: list[Event]) -> list[Event]:
    return [event for event in events if number_of(event["t"]) is not None]


def number_of(value: object) -> float | None:
    """Return a number from 0 up to 1e12, None for anything else: a ledger may hold whatever a writer was told."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        return None
    return float(value)


def count_of(value: object) -> int | None:
    """Return a whole number of zero or more, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

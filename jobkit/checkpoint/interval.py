"""How often to save, as `save_every="auto"` has it: from what a save costs and how often work is lost without notice.

A save holds training up for b seconds; a loss that nobody announced costs half an interval, on average one every M
seconds. The sum is least at sqrt(2 b M) (Young 1974, Daly 2006); below the time d that a save takes to be durable there
is nothing to gain. Noticed interruptions commit their own step, lose nothing, and so do not count in M.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jobkit import contract
from jobkit.rundir.ledger import Event, life_events
from jobkit.rundir.store import Store

CAP = 0.01
"""At most this share of the time is spent waiting for saves to start."""
PRIOR_S = 24 * 3600.0
"""What is thought before there is any history: one loss in a day. A run that has trained much longer knows better."""
BEHIND = 0.01
"""A save that is written in the background is reckoned to slow training by this share meanwhile."""
SHORTEST_S = 1.0
UNKNOWN_S = 600.0
"""The interval while no save has been measured yet."""
_RECENT = 8
_ENOUGH = 3
"""With so many saves of its own an attempt asks no longer what saves cost earlier attempts, perhaps elsewhere."""
_CHANGE = 0.1
"""A change of the interval by less than this share is not worth a line in the ledger."""
_LEAST_MARGIN_S = 30.0
_LONGEST_S = 1e9


@dataclass(frozen=True)
class Cost:
    """What one save cost.

    Args:
        blocking_s: Seconds that training waited.
        durable_s: Seconds from the start of the save to its commit.
    """

    blocking_s: float
    durable_s: float


@dataclass(frozen=True)
class Past:
    """What the earlier attempts of a run tell.

    Args:
        exposed_s: Seconds that they trained, all together.
        losses: How many of them ended without a commit on notice, or at the end.
        costs: Of their newest saves, oldest first.
        upload_s: Seconds that a save takes from its commit on the node to its commit on the run's URL.
    """

    exposed_s: float = 0.0
    losses: int = 0
    costs: tuple[Cost, ...] = ()
    upload_s: float = 0.0


def between_s(exposed_s: float, losses: int) -> float:
    """Estimate the mean time between unnoticed losses: the prior is worth one loss in `PRIOR_S`."""
    return (PRIOR_S + max(exposed_s, 0.0)) / (1 + max(losses, 0))


def interval_s(cost: Cost, mean_s: float, *, cap: float = CAP) -> float:
    """Return the interval that costs least: finite, and longer where saves cost more or losses are rarer.

    Args:
        cost: Of one save.
        mean_s: Mean time between unnoticed losses.
        cap: Largest share of the time that training may wait for saves.
    """
    return max(_bounds(cost, mean_s, cap))


def _bounds(cost: Cost, mean_s: float, cap: float = CAP) -> dict[float, str]:
    """Return what the interval is not below, each with its reason; of equal ones the last counts."""
    weight_s = cost.blocking_s + BEHIND * max(cost.durable_s - cost.blocking_s, 0.0)
    return {
        math.sqrt(2 * weight_s * mean_s): "the least that saves and unnoticed losses cost together",
        SHORTEST_S: "the shortest there is",
        cost.blocking_s / cap: f"saves may hold training up for {cap:.0%} of the time",
        cost.durable_s: "a save takes as long to be durable",
    }


class Interval:
    """The interval of one attempt, which follows what its saves cost.

    Args:
        now_s: When the attempt began to train, on the clock of `time.monotonic`.
        ends_s: When the attempt is killed at the latest, on the same clock; infinity where nobody said.
        grace_s: How long before that it is warned.
    """

    def __init__(self, now_s: float, *, ends_s: float = math.inf, grace_s: float = 0.0) -> None:
        self.past = Past()
        """What is known of earlier attempts; may be learned after training has begun."""
        self.upload_s = 0.0
        """Seconds of the newest upload of this attempt."""
        self._began_s, self._ends_s, self._grace_s = now_s, ends_s, grace_s
        self._own: deque[Cost] = deque(maxlen=_RECENT)
        self._last_step = -1
        self._told_s = 0.0

    def saved(self, step: int, cost: Cost) -> None:
        """Take what the save of a step cost, once."""
        if step != self._last_step and _sound(cost.blocking_s) and _sound(cost.durable_s):
            self._last_step = step
            self._own.append(cost)

    @property
    def cost(self) -> Cost | None:
        """What a save costs: medians of the newest ones, since the first save of an attempt takes much longer."""
        own = list(self._own)
        costs = own if len(own) >= _ENOUGH else [*self.past.costs, *own][-_RECENT:]
        if not costs:
            return None
        upload_s = self.upload_s or self.past.upload_s
        return Cost(
            statistics.median(cost.blocking_s for cost in costs),
            statistics.median(cost.durable_s for cost in costs) + upload_s,
        )

    def seconds(self, now_s: float) -> float:
        """Return the interval as it is best now."""
        cost = self.cost
        return UNKNOWN_S if cost is None else interval_s(cost, self._between_s(now_s, self.past))

    def _between_s(self, now_s: float, past: Past) -> float:
        return between_s(past.exposed_s + max(now_s - self._began_s, 0.0), past.losses)

    def last_call_s(self) -> float:
        """Return when the one save before the time limit is due, so that it is durable before the warning comes."""
        durable_s = self.cost.durable_s if self.cost is not None else 0.0
        return self._ends_s - self._grace_s - max(2 * durable_s, _LEAST_MARGIN_S)

    def news(self, now_s: float) -> dict[str, Any] | None:
        """Return the interval and its reasons for the ledger, None if it is much the same as when last asked."""
        cost, past = self.cost, self.past  # another thread may read what earlier attempts tell this very moment
        if cost is None:
            return None
        mean_s = self._between_s(now_s, past)
        bounds = _bounds(cost, mean_s)
        seconds = max(bounds)
        if abs(seconds - self._told_s) <= _CHANGE * self._told_s:
            return None
        self._told_s = seconds
        return {
            "seconds": round(seconds, 3),
            "why": bounds[seconds],
            "blocking_s": round(cost.blocking_s, 6),
            "durable_s": round(cost.durable_s, 6),
            "between_s": round(mean_s, 1),
            "losses": past.losses,
        }


def _sound(value: Any) -> bool:
    """Tell whether something can be the seconds that a save took; a ledger may be damaged."""
    return isinstance(value, int | float) and 0 <= value < _LONGEST_S


def open_interval() -> Interval:
    """Return the interval of an attempt that begins to train now, with what its launcher tells of its end."""
    now_s, ends_at = time.monotonic(), contract.ends_at_from()
    ends_s = math.inf if ends_at is None else now_s + ends_at - time.time()
    return Interval(now_s, ends_s=ends_s, grace_s=contract.longest_grace_s())


def read_past(store: Store, attempt: int) -> Past:
    """Read from the ledgers what the attempts before this one tell."""
    exposed_s, losses = 0.0, 0
    costs: list[Cost] = []
    uploads: list[float] = []
    for earlier in store.numbers(contract.ATTEMPTS):
        if earlier < attempt:
            events = life_events(store, earlier)
            trained_s, lost = _exposure(events)
            exposed_s, losses = exposed_s + trained_s, losses + lost
            costs = [*costs, *_costs(events)][-_RECENT:]
            uploads += _numbers(events, "uploaded", "seconds")
    return Past(exposed_s, losses, tuple(costs), upload_of(uploads))


def read_upload_s(store: Store, attempt: int) -> float:
    """Read how long the uploads of this attempt take, by the supervisor that makes them; 0 while there is none."""
    return upload_of(_numbers(life_events(store, attempt, ("supervisor",)), "uploaded", "seconds"))


def upload_of(seconds: Sequence[float]) -> float:
    """Return how long an upload takes: the median of the newest."""
    return statistics.median(seconds[-_RECENT:]) if seconds else 0.0


def _exposure(events: Iterable[Event]) -> tuple[float, bool]:
    """Return how long an attempt trained, and whether it ended with a loss that nobody announced."""
    began: float | None = None
    ended, stepped, whole = 0.0, False, False
    for event in events:
        if event["event"] in ("fresh", "restored"):
            began = event["t"]
        stepped |= event["event"] == "first_step"
        whole = event["event"] in ("stopped", "finished") or (whole and event["event"] != "goes_on")
        ended = max(ended, event["t"])
    if began is None or not stepped:  # it had nothing to lose yet
        return 0.0, False
    return max(ended - began, 0.0), not whole


def _costs(events: Iterable[Event]) -> list[Cost]:
    pairs = [(event.get("blocking_s"), event.get("durable_s")) for event in events if event["event"] == "saved"]
    return [Cost(*pair) for pair in pairs if _sound(pair[0]) and _sound(pair[1])]  # type: ignore[arg-type]


def _numbers(events: Iterable[Event], name: str, field: str) -> list[float]:
    return [event[field] for event in events if event["event"] == name and _sound(event.get(field))]

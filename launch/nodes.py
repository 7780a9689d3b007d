"""Which nodes a run had better avoid: those where its processes died by themselves, for a while.

One death is nobody's proof: memory runs short, a person kills. Two on one node within hours are reason enough to go
elsewhere, and what is held against a node fades, so that a repaired one is used again.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

HALF_LIFE_S = 3 * 3600.0
_ENOUGH = 1.5
_MOST = 4
"""More nodes than this are never left out at once: at some point it is not the nodes."""


def avoid(events: Iterable[Mapping[str, Any]], now: float) -> list[str]:
    """Name the nodes to leave out, the worst first.

    Args:
        events: The launching side's ledger; `strike` events count, with `node` and `weight`.
        now: Seconds since the epoch.
    """
    held: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("event") == "strike" and event.get("node"):
            age = max(0.0, now - float(event["t"]))
            held[str(event["node"])] += float(event.get("weight", 1.0)) * 0.5 ** (age / HALF_LIFE_S)
    bad = [node for node, weight in held.items() if weight >= _ENOUGH]
    return sorted(bad, key=lambda node: (-held[node], node))[:_MOST]

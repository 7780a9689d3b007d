"""Which nodes a run had better avoid: those where its processes died by themselves, and those that SLURM lost.

One death is nobody's proof: memory runs short, a person kills. Two on one node within hours are reason enough to go
elsewhere, and what is held against a node fades, so that a repaired one is used again. But a program that dies on one
node after another dies of itself: then the nodes are innocent, and it is not chased through the whole cluster.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

HALF_LIFE_S = 3 * 3600.0
_ENOUGH = 1.5
_SUSPECT = 0.5
_MANY = 3
"""Deaths on so many nodes within hours speak against the program."""
_MOST = 4
"""More nodes than this are never left out at once: at some point it is not the nodes."""


def avoid(events: Iterable[Mapping[str, Any]], now: float) -> list[str]:
    """Name the nodes to leave out, the worst first.

    Args:
        events: The launching side's ledger; `strike` events count: `node`, and `lost` where SLURM gave up on the node,
            which is proof by itself.
        now: Seconds since the epoch.
    """
    died: dict[str, float] = defaultdict(float)
    lost: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("event") == "strike" and event.get("node"):
            age = max(0.0, now - float(event["t"]))
            held = lost if event.get("lost") else died
            held[str(event["node"])] += (2.0 if event.get("lost") else 1.0) * 0.5 ** (age / HALF_LIFE_S)
    if sum(weight >= _SUSPECT for weight in died.values()) >= _MANY:
        died.clear()
    against = {node: died.get(node, 0.0) + lost.get(node, 0.0) for node in died | lost}
    bad = [node for node, weight in against.items() if weight >= _ENOUGH]
    return sorted(bad, key=lambda node: (-against[node], node))[:_MOST]

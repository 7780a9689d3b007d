"""Find each part of a program in what was stored: by its name, else, where nothing has a part's name, by its leaves.

Shapes and dtypes must agree, since a silent cast would be another training. What a file of weights may lack is left as
the program made it, and named: random keys, running statistics, a whole collection beside `params` (a TrainState's
optimizer). A parameter that is not there is refused: half a model is none.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jobkit.checkpoint.kinds import Part
from jobkit.checkpoint.leaves import Record, quote, several
from jobkit.checkpoint.weights.source import Leaves, plain
from jobkit.errors import ConfigError

_DEPTH = 2
"""How far below an item a part is looked for."""
_MAY_LACK = ("Rng", "BatchStat", "Cache", "LoRAParam")
"""Roles of variables that weights are often saved without."""
_PARAMS = "params"


@dataclass(frozen=True)
class Node:
    """A stored tree, or a tree inside it.

    Args:
        label: Its names from the item on; the item's is '' where it has none.
        leaves: What is in it.
    """

    label: tuple[str, ...]
    leaves: Leaves

    @property
    def depth(self) -> int:
        """How far below its item it is."""
        return len(self.label) - 1

    def __str__(self) -> str:
        return "/".join(filter(None, self.label)) or "the whole tree"

    def overlaps(self, other: "Node") -> bool:
        """Tell whether one is inside the other."""
        common = min(len(self.label), len(other.label))
        return self.label[:common] == other.label[:common]


@dataclass
class Fit:
    """How a node fits a part.

    Args:
        node: It.
        given: Quoted path in the part -> stored value.
        fresh: What stays as the program made it.
        problems: Why it does not fit.
        taken: How many leaves come from the node.
    """

    node: Node
    given: Leaves = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    taken: int = 0


def nodes_of(items: Mapping[str, Leaves]) -> list[Node]:
    """List what a part may be, from the top down."""

    def below(node: Node) -> Iterator[Node]:
        if node.depth < _DEPTH:
            names = dict.fromkeys(path[0] for path in node.leaves if path)
            for name in names:
                inner = {path[1:]: value for path, value in node.leaves.items() if path and path[0] == name}
                yield Node((*node.label, name), inner)

    level = [Node((item,), leaves) for item, leaves in items.items()]
    found = []
    while level:
        found += level
        level = [inner for node in level for inner in below(node)]
    return found


def match(
    items: Mapping[str, Leaves], parts: Mapping[str, Part], records: Mapping[str, Mapping[str, Record]], *, where: str
) -> dict[str, Fit]:
    """Choose what each part gets; one that has nothing there is left out.

    Args:
        items: The stored trees.
        parts: The program's parts, none of them an object.
        records: What their leaves are, by part and key.
        where: The checkpoint, for messages.

    Raises:
        ConfigError: If nothing fits, what has a part's name does not, or several places fit a part alike.
    """
    nodes = nodes_of(items)
    chosen = {}
    for name, part in parts.items():
        if named := [node for node in nodes if node.label[-1] == quote(name)]:
            fits = [_fit(name, part, records[name], node) for node in named]
            good = [fit for fit in fits if not fit.problems]
            chosen[name] = _only(name, good, where) if good else _refuse(name, fits[0], where)
    if chosen:
        return chosen
    for name, part in parts.items():
        fits = [_fit(name, part, records[name], node) for node in nodes if not _is_used(node, chosen)]
        good = [fit for fit in fits if fit.taken and not fit.problems and set(fit.given) != {()}]
        if good:
            chosen[name] = _only(name, good, where)
    for name in parts.keys() - chosen.keys():
        fits = [_fit(name, parts[name], records[name], node) for node in nodes if not _is_used(node, chosen)]
        nearest = max(fits, key=lambda fit: fit.taken, default=None)
        if (
            nearest is not None
            and 2 * nearest.taken > (len(records[name]) if chosen else 0)
            and records[name].keys() != {""}
        ):
            _refuse(name, nearest, where)
    if not chosen:
        raise ConfigError(
            f"none of the parts {', '.join(parts)} is in the checkpoint to start from, which has "
            f"{', '.join(top_of(items))}: give resume() parts of these names"
        )
    return chosen


def top_of(items: Mapping[str, Leaves]) -> list[str]:
    """Name what a checkpoint has: its items, and what is on top of a tree that is none."""
    return sorted({*filter(None, items), *(path[0] for path in items.get("", {}) if path)})


def _is_used(node: Node, chosen: Mapping[str, Fit]) -> bool:
    return any(node.overlaps(fit.node) for fit in chosen.values())


def _only(name: str, fits: list[Fit], where: str) -> Fit:
    """Choose the node nearest to the top.

    Raises:
        ConfigError: If there are several.
    """
    depth = min(fit.node.depth for fit in fits)
    nearest = [fit for fit in fits if fit.node.depth == depth]
    if len(nearest) > 1:
        alike = " and ".join(str(fit.node) for fit in nearest)
        last = nearest[0].node.label[-1]
        raise ConfigError(
            f"part {name!r} may be {alike} of {where} alike: give it to resume() under the name of the one that is "
            f"meant, such as resume({last if last.isidentifier() else 'NAME'}=...), or begin with a directory that "
            "holds that one alone"
        )
    return nearest[0]


def _refuse(name: str, fit: Fit, where: str) -> Fit:
    raise ConfigError(
        f"the checkpoint {where} does not fit part {name!r}: {several(fit.problems)}: "
        "give the part that it holds, or convert it first"
    )


def _fit(name: str, part: Part, records: Mapping[str, Record], node: Node) -> Fit:
    """Find each leaf of a part in a node."""
    fit = Fit(node)
    slots = [(tuple(quote(one) for one in slot.path), slot) for slot in part.slots()[0]]
    collections = {path[0] for path, _ in slots if len(path) > 1} if part.kind == "value" else set()
    left = dict(node.leaves)
    if _PARAMS in collections and not any(path and path[0] in collections for path in left):
        left = {(_PARAMS, *path): value for path, value in left.items()}  # what is in the collection alone
    there = {path[0] for path in left if path}
    lacking = {
        path[0] for path, _ in slots if _PARAMS in collections & there and path and path[0] not in there
    }  # whole collections beside the parameters
    for path, slot in slots:
        record = records["/".join(path)]
        if record.get("type") == "function":  # code, which stays as the program made it
            continue
        below = (*path, "value")  # an nnx.State writes each variable's value below it
        stored = left.pop(path) if path in left else left.pop(below, None)
        where = "/".join((name, *path))
        if stored is None:
            collection = path[0] if path else ""
            if collection in lacking:
                where = f"{name}/{collection}"
            elif not (slot.role.startswith(_MAY_LACK) or record["is"] == "key" or "batch_stats" in path):
                fit.problems.append(f"{where} is not there")
                continue
            fit.given[path] = plain(slot.value)
            if where not in fit.fresh:
                fit.fresh.append(where)
        elif (difference := _difference(record, stored)) is not None:
            fit.taken += 1
            fit.problems.append(f"{where}: {difference}")
        else:
            fit.taken += 1
            fit.given[path] = stored
    fit.problems += [f"{'/'.join((name, *path))} is only there" for path in left]
    return fit


def _difference(record: Record, stored: Any) -> str | None:
    """Say how a stored value differs from what the program has, None if it fits."""
    shape, dtype = list(np.shape(stored)), np.asarray(stored).dtype
    if record["is"] == "scalar":
        if shape or record["type"] not in ("bool", "int", "float", "complex"):
            return f"{tuple(shape)} {dtype} there, a Python {record['type']} here"
        kind: Any = {"bool": bool, "int": int, "float": float, "complex": complex}[record["type"]]
        value = np.asarray(stored)[()]
        exact = kind is complex or not np.iscomplexobj(value)
        return None if exact and kind(value) == value else f"{value} there, a Python {record['type']} here"
    if record["is"] == "key":
        return None if shape[: len(record["shape"])] == record["shape"] and dtype == np.uint32 else "no key there"
    if shape != record["shape"] or (dtype.name != record["dtype"] and not isinstance(stored, bool | int | float)):
        return f"{tuple(shape)} {dtype} there, {tuple(record['shape'])} {record['dtype']} here"
    return None

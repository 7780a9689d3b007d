"""What is saved: all parts of a program's state, taken apart into arrays for Orbax and a table of all leaves.

Every leaf is written down with its kind, shape and dtype; what comes back is what was there, to the bit. Where a part
has become something else than the program gave, the table tells of both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jobkit import contract
from jobkit.checkpoint.kinds import Held, Part, Slot, refusal
from jobkit.checkpoint.leaves import (
    Path,
    Record,
    differences,
    dtype_of,
    is_gone,
    is_leaf,
    key_of,
    outline_of,
    quote,
    quoted,
    record_of,
    value_of,
)
from jobkit.errors import ConfigError, DonatedError


@dataclass
class Snapshot:
    """The state of a program at one step boundary, ready to be written.

    Args:
        arrays: Nested dicts of arrays, the tree that Orbax stores: part, then path.
        table: What goes to state.json: kind, records and skeleton of each part.
        nbytes: Bytes of all arrays.
        local: In a run of several processes, the arrays that belong to this process alone; `local` in a record tells
            where in the bytes of all of them its array lies, and how.
        donated: Leaves whose arrays are gone: such a state cannot be written.
    """

    arrays: dict[str, Any] = field(default_factory=dict)
    table: dict[str, Any] = field(default_factory=dict)
    nbytes: int = 0
    local: list[np.ndarray] = field(default_factory=list)
    donated: list[str] = field(default_factory=list)

    def check_whole(self) -> None:
        """Refuse to be written without its arrays.

        Raises:
            DonatedError: Naming one that is gone.
        """
        if self.donated:
            raise DonatedError(self.donated[0])


def take(parts: Mapping[str, Part | Held], *, shared: bool = False) -> Snapshot:
    """Take a program's state apart, at a step boundary. Holds references; copies only numpy arrays.

    Args:
        parts: The program's parts.
        shared: Whether other processes train too: what is not one array across all of them is this process's own.

    Raises:
        ConfigError: If two leaves have the same name or an object's state cannot be written down.
    """
    snapshot, local_bytes = Snapshot(), 0
    for name, part in parts.items():
        slots, skeleton = part.slots()
        records = {}
        for slot in slots:
            _check_leaf(name, slot, part.given)
            record, array = record_of(slot.value)
            if slot.role:
                record["role"] = slot.role
            key = key_of(slot.path)
            if key in records:
                raise ConfigError(f"part {name!r} has two leaves named {key!r}: rename one of the two keys")
            records[key] = record
            if is_gone(slot.value):
                snapshot.donated.append("/".join((name, *slot.path)))
                continue
            if array is None:
                continue
            snapshot.nbytes += array.nbytes
            if shared and not _is_global(array):
                record["local"] = {"at": local_bytes, "shape": list(array.shape), "dtype": array.dtype.name}
                snapshot.local.append(np.array(array, array.dtype.newbyteorder("="), order="C"))
                local_bytes += array.nbytes
            else:
                _put(snapshot.arrays, quoted(name, slot.path), array)
        entry = snapshot.table[name] = {"kind": part.kind, "leaves": records}
        if skeleton is not None or part.kind == "object":
            entry["skeleton"] = skeleton
        if part.kind != "object" and (skeleton is not None or differences(name, records, part.given)):
            entry["given"] = part.given
    return snapshot


def take_whole(parts: Mapping[str, Part | Held], *, shared: bool = False) -> Snapshot:
    """Take a program's state apart to be written; as `take`.

    Raises:
        DonatedError: If an array is gone, naming it.
    """
    snapshot = take(parts, shared=shared)
    snapshot.check_whole()
    return snapshot


def check_savable(parts: Mapping[str, Part]) -> None:
    """Look, after the first step, whether the state can be saved; what an object has in hand is seen when it is saved.

    Raises:
        ConfigError: If a part has become what cannot be saved, or not be put back after a restart.
        DonatedError: If arrays were given away and have no successor.
    """
    for name, part, slot in _live(parts):
        _check_leaf(name, slot, part.given)
    if gone := donated(parts):
        raise DonatedError(gone[0])


def donated(parts: Mapping[str, Part]) -> list[str]:
    """Name the leaves whose arrays were given away and have no successor."""
    return ["/".join((name, *slot.path)) for name, _, slot in _live(parts) if is_gone(slot.value)]


def _live(parts: Mapping[str, Part]) -> list[tuple[str, Part, Slot]]:
    """Return the leaves, each with its part; an object's state is no business of JAX's."""
    return [(name, part, slot) for name, part in parts.items() if part.kind != "object" for slot in part.slots()[0]]


def _check_leaf(part: str, slot: Slot, given: Mapping[str, Record]) -> None:
    """Refuse what cannot be written down, and functions that the program has not given."""
    code = callable(slot.value) and given.get(key_of(slot.path)) == outline_of(slot.value)
    if not is_leaf(slot.value) and not code:
        raise ConfigError(refusal("/".join((part, *slot.path)), slot.value))


def _is_global(array: Any) -> bool:
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def local_arrays(table: Mapping[str, Any], content: bytes) -> dict[tuple[str, ...], np.ndarray]:
    """Return the arrays that belonged to one process alone, by quoted path.

    Args:
        table: The process's leaf table.
        content: The bytes of its arrays.
    """
    arrays = {}
    for path, record in _paths(table):
        if (place := record.get("local")) is not None:
            count = int(np.prod(place["shape"], dtype=np.int64))
            try:
                array = np.frombuffer(content, dtype_of(place), count, place["at"])
            except ValueError as error:
                raise ConfigError(f"{contract.LOCAL} does not hold {'/'.join(path)!a}: {error}") from None
            arrays[path] = array.reshape(place["shape"]).copy()
    return arrays


def _put(tree: dict[str, Any], path: Path, value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def stored_paths(table: Mapping[str, Any]) -> dict[tuple[str, ...], Record]:
    """List the arrays that a table says Orbax holds: quoted path (part first) -> record."""
    return {
        path: record
        for path, record in _paths(table)
        if record["is"] != "scalar" and 0 not in record["shape"] and "local" not in record
    }


def _paths(table: Mapping[str, Any]) -> Iterator[tuple[Path, Record]]:
    for name, entry in table.items():
        for key, record in entry["leaves"].items():
            yield (quote(name), *(key.split("/") if key else ())), record


def check(parts: Mapping[str, Part], table: Mapping[str, Any], *, where: str) -> None:
    """Compare what the program gave with a checkpoint before anything is read: it fits what the run's program gave when
    that was saved, or else what was saved.

    Args:
        parts: The program's parts.
        table: The checkpoint's leaf table.
        where: What they differ from, for the message: 'from the checkpoint of step 7'.

    Raises:
        ConfigError: Naming the leaves that differ, what was saved, what the program has, and the remedy.
    """
    remedy = "run the code that wrote it, or start the changed program in a new run directory"
    missing, extra = sorted(parts.keys() - table.keys()), sorted(table.keys() - parts.keys())
    if missing or extra:
        mismatches = [
            f"{', '.join(missing)} only here" if missing else "",
            f"{', '.join(extra)} only there" if extra else "",
        ]
        raise ConfigError(
            f"the parts given to resume() differ {where} ({'; '.join(filter(None, mismatches))}): "
            f"give the same parts, or {remedy}"
        )
    problems = []
    for name, part in parts.items():
        entry = table[name]
        if "object" in (part.kind, entry["kind"]):
            if part.kind != entry["kind"]:
                problems.append(f"{name}: {entry['kind']} there, {part.kind} here")
            continue
        differs = differences(name, part.given, entry.get("given", entry["leaves"]))
        if differs and differences(name, part.given, entry["leaves"]):
            problems += differs
            continue
        try:
            part.order(entry)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ConfigError(f"the program's state differs {where}: {'; '.join(problems[:4])}{more}: {remedy}")


def give_back(parts: Mapping[str, Part], table: Mapping[str, Any], arrays: Mapping[tuple[str, ...], Any]) -> None:
    """Put a checkpoint's values into the program's parts.

    Args:
        parts: What `check` accepted.
        table: The checkpoint's leaf table.
        arrays: What Orbax read, by quoted path.
    """
    ready = []
    for name, part in parts.items():
        live = {key_of(slot.path): slot.value for slot in part.slots()[0]}
        records = table[name]["leaves"]
        values = [
            value_of(records[key], arrays.get((quote(name), *(key.split("/") if key else ()))), live.get(key))
            for key in part.order(table[name])
        ]
        ready.append((part, values, table[name]))
    for part, values, entry in ready:  # all values exist: nothing is half-restored if making one failed
        part.assign(values, entry)

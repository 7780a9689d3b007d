"""Did the program train what it resumed? A program that trains a copy would save the same state for ever.

After the first step the parts that it left as they were are named, since that costs nothing to see. What is proof is a
committed step that holds the same as the one before; it is looked for until there is a difference, and no longer.
"""

import random
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jobkit.checkpoint import orbax_io as arrays
from jobkit.checkpoint import state
from jobkit.checkpoint.kinds import Part
from jobkit.checkpoint.leaves import Path, Record
from jobkit.rundir import commits
from jobkit.rundir.store import Store

_FEW = 64
"""So many of the smallest leaves are read first: in a program that trains one of them differs, mostly a counter."""
_AT_ONCE_BYTES = 1 << 24
"""Of each of the two steps, or one array: a program that trains is through after the first read."""
_OFTEN = 4
"""So many saves are looked at one by one; of a program that keeps arrays it never changes, ever fewer."""


class FirstStep:
    """Weak references to the arrays that a run resumed with: by the first boundary training must have replaced some.

    Args:
        parts: The run's parts, as they were resumed.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._before = {
            name: list(map(weakref.ref, _arrays(part))) for name, part in parts.items() if part.kind != "object"
        }

    def warning(self) -> str:
        """Say, once after the first step, which parts it left as they were; '' if all changed."""
        same = []
        known, self._before = self._before, {}
        for name, before in known.items():
            now = _arrays(self._parts[name])
            if before and len(now) == len(before) and all(ref() is one for ref, one in zip(before, now, strict=True)):
                same.append(name)
        if not same:
            return ""
        return f"warning: the first step changed nothing in {', '.join(same)}: {_REMEDY}"


def _arrays(part: Part) -> list[jax.Array]:
    return [slot.value for slot in part.slots()[0] if isinstance(slot.value, jax.Array)]


_REMEDY = (
    "if the program trains a copy, assign the new values in each step, run.state.NAME = ..., or update the NNX object "
    "that was given to resume()"
)


class Repeated(NamedTuple):
    """Why a step holds what the one before holds, with the remedy; perhaps but for plain numbers, a counter say."""

    reason: str
    but_numbers: bool = False


class FirstStepCheck:
    """Compares each committed step with the one before, until they differ: from then on nothing is computed.

    What counts is every leaf outside of data iterators and generators. Both steps are read back, on the thread that
    saves, since the program may have given the arrays themselves away by then.

    Args:
        store: The run directory.
        given: What the program gave as parts, by name.
        busy: Tells that there is no time for it now.
    """

    def __init__(self, store: Store, given: Mapping[str, Any], *, busy: Callable[[], bool]) -> None:
        self._store, self._busy = store, busy
        self._sources = frozenset(name for name, value in given.items() if _is_source(value))
        self.seen = False
        """Whether there was a difference."""
        self._looks = 0

    def repeated(self, step: int) -> Repeated | None:
        """Say that a step that was just committed holds what the one before holds; None where it does not, or unknown.

        Args:
            step: The newest committed step; the one before it must not have been removed.
        """
        if self.seen or self._busy():
            return None
        try:
            before = max((known for known in commits.steps(self._store) if known < step), default=None)
            if before is None:
                return None
            self._looks += 1
            if self._looks > _OFTEN and self._looks & (self._looks - 1):
                return None
            one, other = self._tables(before), self._tables(step)
            parts = other[0]
            if not parts or len(one) != len(other):
                return None
            trained = list(map(_trained, other))
            stored, first = state.stored_paths(parts), state.stored_paths(trained[0])
            rest = {path: record for path, record in stored.items() if path not in first}
            self.seen = list(map(_trained, one)) != trained or not self._same_arrays(before, step, first)
            different = self.seen or one != other or not self._same_arrays(before, step, rest)
            self.seen |= different and not trained[0]  # where there is no array, numbers are all there is to train
        except Exception:  # whoever restores will say what is wrong with a step; here it is no proof of anything
            return None
        if self.seen or self._busy():
            return None
        if different:
            reason = (
                f"no array differs between steps {before} and {step}, though numbers do (of "
                f"{', '.join(sorted(parts))}): {_REMEDY}; if it does not train the arrays, leave them out of "
                "resume()"
            )
            return Repeated(reason, but_numbers=True)
        leaves = sum(len(entry["leaves"]) or 1 for entry in parts.values())
        reason = (
            f"step {step} holds the same as step {before} in all {leaves} leaves of "
            f"{', '.join(sorted(parts))}: {_REMEDY}; if it only evaluates, leave the model out of resume()"
        )
        return Repeated(reason)

    def _tables(self, step: int) -> list[dict[str, Any]]:
        """Return what counts of a step, by process: its leaf table, with the bytes of what is its own."""
        tables = []
        for process in range(commits.read(self._store, step).processes):
            table = {
                name: entry | {"leaves": {key: one for key, one in entry["leaves"].items() if not _is_key(key, one)}}
                for name, entry in state.table_of(self._store, step, process).items()
                if name not in self._sources and name not in _KEYS
            }
            # What an object holds besides its arrays is in its skeleton.
            tables.append({name: one for name, one in table.items() if one["leaves"] or one["kind"] == "object"})
        return tables

    def _same_arrays(self, one: int, other: int, paths: Mapping[Path, Record]) -> bool:
        """Compare arrays that Orbax holds, the smallest first; tell whether there was no difference."""
        ordered = sorted(paths, key=lambda path: arrays.size_of(paths[path]))
        for some in (ordered[:_FEW], ordered[_FEW:]):
            for batch in arrays.batches({path: paths[path] for path in some}, _AT_ONCE_BYTES):
                if self._busy():
                    return True
                left, right = (arrays.read(self._store, step, batch, alone=True) for step in (one, other))
                if any(left[path].tobytes() != right[path].tobytes() for path in batch):
                    return False
        return True


_KEYS = frozenset(["rng", "rngs"])


def _is_source(value: Any) -> bool:
    """Tell whether a part goes on by itself: a data iterator or loader, a generator of random numbers."""
    kind = type(value)
    if isinstance(value, np.random.Generator | np.random.BitGenerator | random.Random):
        return True
    has_position = any(hasattr(kind, name) for name in ("get_state", "state_dict"))
    return hasattr(kind, "__next__") or (has_position and hasattr(kind, "__iter__"))


def _trained(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a leaf table of what only training changes, without the parts that have no such leaf.

    Plain numbers and words, and an integer that is a part by itself, change in no training alone.
    """
    trained = {}
    for name, entry in table.items():
        arrays = {key: one for key, one in entry["leaves"].items() if one["is"] not in ("scalar", "numpy_scalar")}
        counts = len(entry["leaves"]) == 1 and all(
            not one["shape"] and "int" in one["dtype"] for one in arrays.values()
        )
        if arrays and not counts:
            trained[name] = {"leaves": arrays}
    return trained


def _is_key(key: str, record: Record) -> bool:
    """Tell whether a leaf is the key or the counter of a random number generator."""
    if record["is"] == "key" or record.get("role", "").startswith("Rng") or _KEYS & {*key.split("/")}:
        return True
    return record.get("dtype") == "uint32" and record.get("shape", [])[-1:] in ([2], [4])

"""A drill's eyes inside the program: fingerprints of all that the next step may depend on, saved or not.

At a step boundary it looks at the parts, at Python's and numpy's global generators, and at what the training loop
holds: the variables of the frame that iterates over `steps()`, of those around it, and the globals of the program's own
modules. Two runs that differ can then be told apart by the first thing in which they do.
"""

import random
import sys
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np

from jobkit import faults, state
from jobkit.drilled import Drill
from jobkit.errors import ConfigError
from jobkit.ledger import Ledger

_DEPTH = 4
"""How far objects of the program's own classes are followed."""
_LARGE = 1 << 28
"""Arrays above this many bytes are fingerprinted by a part of them."""
_MAX_ITEMS = 10_000
_LIBRARIES = ("site-packages", "dist-packages")


class Probe:
    """Looks at the steps that a drill names, and does what else a drill asks at each step.

    Args:
        drill: What is asked.
        ledger: Where fingerprints go, as `probed` events.
    """

    def __init__(self, drill: Drill, ledger: Ledger) -> None:
        self._drill, self._ledger = drill, ledger
        self._wanted = frozenset(drill.probe)
        self._found_donated = False

    def begin_step(self, step: int, parts: Mapping[str, state.Part], given: Mapping[str, Any]) -> None:
        """Do what is due before a step.

        Args:
            step: Completed steps.
            parts: The run's parts.
            given: What the program gave as parts, by name.
        """
        if not self._found_donated:
            self._look_for_donated(step, parts)
        if step in self._wanted:
            self.look(step, parts, given)
        if self._drill.pace_s:
            time.sleep(self._drill.pace_s)
        faults.reach("step")

    def _look_for_donated(self, step: int, parts: Mapping[str, state.Part]) -> None:
        """Write down the first boundary that cannot be saved, whether or not something is due there."""
        if gone := state.donated(parts):
            self._found_donated = True
            self._ledger.append("donated", durable=True, step=step, leaves=gone[:9])

    def look(self, step: int, parts: Mapping[str, state.Part], given: Mapping[str, Any]) -> None:
        """Write down fingerprints of all there is."""
        # A pytree lives in `run.state`: what the program calls by the same name is another thing after the first step.
        seen = {id(value) for name, value in given.items() if parts[name].kind != "value"}
        outside = {name: [kind, crc] for name, kind, crc in _outside(sys._getframe(1), seen)}
        self._ledger.append(
            "probed",
            step=step,
            parts={f"{name}/{key}".rstrip("/"): crc for name, part in parts.items() for key, crc in _leaves(part)},
            outside=outside,
            rngs=[name for name, part in parts.items() if _kind(name, given.get(name), part, part.slots()[0]) == "rng"],
            random=_crc(repr(random.getstate())),
            numpy=_crc(repr(np.random.get_state())),
        )


def _crc(content: str | bytes) -> str:
    return f"{google_crc32c.value(content.encode() if isinstance(content, str) else content):08x}"


def _leaves(part: state.Part) -> Iterator[tuple[str, str]]:
    """Yield each leaf of a part by name, with its fingerprint."""
    slots, skeleton = part.slots()
    for slot in slots:
        yield "/".join(slot.path), _of_leaf(slot.value)
    if skeleton is not None or part.kind == "object":
        yield "(its state)", _crc(repr(skeleton))


def _of_leaf(value: Any) -> str:
    if isinstance(value, jax.Array):
        if value.is_deleted():
            return "deleted"
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        if not value.is_fully_addressable:
            shards = sorted(value.addressable_shards, key=lambda shard: shard.device.id)
            return _crc("".join(_of_leaf(np.asarray(shard.data)) for shard in shards))
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = np.asarray(value)
        flat = array if array.nbytes <= _LARGE else array.reshape(-1)[:: array.nbytes // _LARGE + 1]
        return _crc(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(flat).tobytes())
    return _crc(repr(value))


# What the program holds outside of its parts.


def _outside(frame: types.FrameType | None, seen: set[int]) -> Iterator[tuple[str, str, str]]:
    """Yield (name, kind, fingerprint) of what the program's own frames and modules hold."""
    modules: dict[int, types.ModuleType] = {
        id(vars(module)): module for module in list(sys.modules.values()) if isinstance(module, types.ModuleType)
    }
    done: set[int] = set()
    while frame is not None:
        if _own(frame.f_code.co_filename):
            where = Path(frame.f_code.co_filename).name
            at_top = frame.f_locals is frame.f_globals or frame.f_code.co_name == "<module>"
            if not at_top:
                for name, value in list(frame.f_locals.items()):
                    yield from _look_at(f"{name} in {where}:{frame.f_code.co_name}", value, seen, _DEPTH)
            done.add(id(frame.f_globals))
            modules.setdefault(id(frame.f_globals), types.ModuleType("__main__"))
            for name, value in list(frame.f_globals.items()):
                yield from _look_at(f"{name} in {where}", value, seen, _DEPTH)
        frame = frame.f_back
    for identity, module in modules.items():
        file = getattr(module, "__file__", None)
        if identity not in done and file and _own(file):
            for name, value in list(vars(module).items()):
                yield from _look_at(f"{name} in {Path(file).name}", value, seen, _DEPTH)


def _own(file: str) -> bool:
    """Tell whether a file is the program's own: neither a library's, nor Python's, nor ours (but our examples)."""
    path = Path(file)
    if any(part in _LIBRARIES for part in path.parts) or file.startswith("<"):
        return False
    here = Path(__file__).parent
    if path.is_relative_to(here):
        return path.parent.name == "examples"
    return not path.is_relative_to(Path(types.__file__).parent)


def _look_at(name: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, str, str]]:
    if name.startswith("_") or id(value) in seen or depth == 0:
        return
    if isinstance(value, types.ModuleType | type | types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        return
    module = type(value).__module__
    if module.startswith("jobkit.") and not module.startswith("jobkit.examples"):
        return
    kind, crc = _fingerprint(name, value)
    if crc:
        yield name, kind, crc
        return
    seen.add(id(value))
    word, _, place = name.partition(" in ")
    if isinstance(value, types.GeneratorType):
        if value.gi_frame is not None:
            inner = [_of_any(item, depth - 1) for item in value.gi_frame.f_locals.values()]
            yield name, "iterator", _crc(repr((value.gi_frame.f_lasti, inner)))
    elif hasattr(value, "__next__"):
        try:
            reduced = value.__reduce__()
        except Exception:
            return  # it hides its position: what it yields will tell
        yield name, "iterator", _crc(_of_any(reduced, depth - 1))
    elif isinstance(getattr(value, "__dict__", None), dict) and _own(_file_of(type(value))):
        for key, item in list(vars(value).items()):
            yield from _look_at(f"{word}.{key} in {place}", item, seen, depth - 1)


def _file_of(kind: type) -> str:
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or "<none>"


def _fingerprint(name: str, value: Any) -> tuple[str, str]:
    """Return (kind, fingerprint) of what could have been a part; an empty fingerprint for anything else."""
    if isinstance(value, list | tuple | dict | set) and len(value) > _MAX_ITEMS:
        return "", ""
    if isinstance(value, set | frozenset):
        return "number", _crc(repr(sorted(map(repr, value))))
    try:
        part = state.part_of("it", value)
        leaves = list(_leaves(part))
        slots = part.slots()[0]
    except (ConfigError, TypeError, ValueError, RuntimeError):
        return "", ""
    if not leaves:
        return "", ""
    return _kind(name, value, part, slots), _crc(repr(leaves))


def _kind(name: str, value: Any, part: state.Part, slots: list[state.Slot]) -> str:
    """Say what a value is to a training: 'rng', 'iterator', 'array' or 'number'."""
    generators = np.random.Generator | np.random.BitGenerator | random.Random
    roles = [slot.role for slot in slots]
    keys = [
        isinstance(slot.value, jax.Array) and jnp.issubdtype(slot.value.dtype, jax.dtypes.prng_key) for slot in slots
    ]
    if (
        isinstance(value, generators)
        or (slots and all(role.startswith("Rng") for role in roles))
        or (keys and all(keys))
    ):
        return "rng"
    arrays = [slot.value for slot in slots if isinstance(slot.value, jax.Array | np.ndarray)]
    words = name.partition(" in ")[0].lower()
    if len(arrays) == 1 and arrays[0].dtype == np.uint32 and any(word in words for word in ("key", "rng", "seed")):
        return "rng"
    if part.kind == "object":
        return "iterator"
    return "array" if any(array.ndim for array in arrays) else "number"


def _of_any(value: Any, depth: int) -> str:
    """Return a fingerprint of anything, as good as it gets."""
    if depth == 0 or value is None or isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return type(value).__name__
    _, crc = _fingerprint("", value)
    if crc:
        return crc
    if isinstance(value, list | tuple):
        return _crc(repr([_of_any(item, depth - 1) for item in value[:_MAX_ITEMS]]))
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        held = [_of_any(item, depth - 1) for item in frame.f_locals.values()] if frame is not None else []
        return _crc(repr((frame.f_lasti if frame is not None else -1, held)))
    try:
        return _crc(_of_any(value.__reduce__(), depth - 1))
    except Exception:
        return type(value).__name__

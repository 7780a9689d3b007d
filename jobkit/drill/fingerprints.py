"""A drill's eyes inside the program: fingerprints of all that the next step may depend on, saved or not.

At a step boundary it looks at the parts, at Python's and numpy's global generators, and at what the training loop
holds: the variables of the frame that iterates over `steps()`, of those around it, the globals of the program's own
modules, what its classes and functions hold; at the files that it reads and writes, and at its threads. Two runs that
differ can then be told apart by the first thing in which they do.
"""

import collections
import os
import random
import statistics
import sys
import threading
import time
import types
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np

from jobkit import contract, faults
from jobkit.checkpoint import state
from jobkit.checkpoint.kinds import Part, Slot, is_iterator, part_of
from jobkit.drill import liveness
from jobkit.drill.settings import Drill
from jobkit.errors import ConfigError
from jobkit.rundir.ledger import Ledger

_DEPTH = 4
"""How far objects of the program's own classes are followed."""
_LARGE = 1 << 28
"""Arrays above this many bytes are fingerprinted by a part of them."""
_MAX_ITEMS = 10_000
_FEW = 100
"""Of a longer list so many items at each end are looked at."""
_LONG_S = 0.1
"""A step is a long one if it takes that much longer than the usual, and four times as long."""
_LIBRARIES = ("site-packages", "dist-packages")


class Probe:
    """Looks at the steps that a drill names, and does what else a drill asks at each step.

    Args:
        drill: What is asked.
        ledger: Where fingerprints go, as `probed` events.
    """

    def __init__(self, drill: Drill, ledger: Ledger) -> None:
        self._drill, self._ledger = drill, ledger
        self._wanted = set(drill.probe)
        self._looked: set[int] = set()
        self._begun = self._found_donated = False
        self._files = _Files(ledger.path.parents[2]) if drill.probe else None
        self._first_step, self._step_began = 0, 0.0
        self._took = array("d")

    def begin_loop(self, total: int) -> int:
        """Begin a `steps()` loop of `total` steps, of the whole run; return at which step it ends in this drill."""
        self._ledger.append("loop", total=total)
        return self._drill.ends(total)

    def saved(self, step: int) -> None:
        """Look at a step that is being saved and at the two after it: the next attempt may begin there."""
        if self._drill.probe:
            self._wanted |= {step, step + 1, step + 2}

    def stopped(self, step: int, parts: Mapping[str, Part], given: Mapping[str, Any]) -> None:
        """Look at the step after which an attempt ends on a notice."""
        if self._drill.probe:
            self._look_once(step, parts, given)

    def begin_step(self, step: int, parts: Mapping[str, Part], given: Mapping[str, Any]) -> None:
        """Do what is due before a step of `steps()`.

        Args:
            step: Completed steps.
            parts: The run's parts.
            given: What the program gave as parts, by name.
        """
        if not self._found_donated:
            self._look_for_donated(step, parts)
        self.begin_round(step, parts, given)
        if self._drill.pace_s:
            time.sleep(self._drill.pace_s)
        faults.reach("step")
        if not self._took:
            self._first_step = step
        self._step_began = time.monotonic()

    def end_step(self) -> None:
        """Measure what the program did in a step."""
        self._took.append(time.monotonic() - self._step_began)

    def close(self) -> None:
        """Write down which steps took much longer than usual, an evaluation, say; the first one compiles."""
        took = list(enumerate(self._took, self._first_step))[1:]
        if took:
            usual_s = statistics.median(seconds for _, seconds in took)
            slow = [
                (step, round(seconds, 3)) for step, seconds in took if seconds > usual_s + max(3 * usual_s, _LONG_S)
            ]
            self._ledger.append("step_times", usual_s=round(usual_s, 6), slow=slow[-9:])

    def begin_round(self, step: int, parts: Mapping[str, Part], given: Mapping[str, Any]) -> None:
        """Look if it is due, before a step, or before a round of a loop of the program's own."""
        if not self._begun:
            self._begun = True
            self.saved(step)
        if step in self._wanted:
            self._look_once(step, parts, given)

    def _look_for_donated(self, step: int, parts: Mapping[str, Part]) -> None:
        """Write down the first boundary that cannot be saved, whether or not something is due there."""
        if gone := state.donated(parts):
            self._found_donated = True
            self._ledger.append("donated", durable=True, step=step, leaves=gone[:9])

    def _look_once(self, step: int, parts: Mapping[str, Part], given: Mapping[str, Any]) -> None:
        if step in self._looked:
            return
        self._looked.add(step)
        try:
            self.look(step, parts, given)
        except Exception as error:  # whatever the program's own objects raise: it must not end the training
            self._ledger.append("probe_failed", step=step, error=f"{type(error).__name__}: {error}"[:300])

    def look(self, step: int, parts: Mapping[str, Part], given: Mapping[str, Any]) -> None:
        """Write down fingerprints of all there is.

        Of what is outside of the parts: its kind, its fingerprint, the line that writes it, whether it is read again
        before it is written, and whether all arrays in it are the parts' own as well.
        """
        # A pytree lives in `run.state`: what the program calls by the same name is another thing after the first step.
        seen = {id(value) for name, value in given.items() if parts[name].kind != "value"}
        leaves = {name: list(_leaves(part)) for name, part in parts.items()}
        saved = {crc for each in leaves.values() for _, crc in each}
        outside = {
            one.name: [one.kind, one.crc, one.line, one.live, bool(one.arrays) and one.arrays <= saved]
            for one in _outside(sys._getframe(1), seen)
        }
        self._ledger.append(
            "probed",
            step=step,
            parts={f"{name}/{key}".rstrip("/"): crc for name, each in leaves.items() for key, crc in each},
            outside=outside,
            rngs=[name for name, part in parts.items() if _kind(name, given.get(name), part, part.slots()[0]) == "rng"],
            random=_crc(repr(random.getstate())),
            numpy=_crc(repr(np.random.get_state())),
            drawn=_drawn_from(),
            files=self._files.used() if self._files is not None else {},
            threads=_threads(),
        )


class _Files:
    """What files the program has opened, for reading and for writing, from here on: an audit hook tells.

    Args:
        run: The run directory.
    """

    _NOT = ("/proc/", "/sys/", "/dev/", "/etc/", "/usr/", f"{sys.prefix}/", f"{sys.base_prefix}/")
    _MOST = 1000

    def __init__(self, run: Path) -> None:
        self._run = f"{run}/"
        self._opened: dict[str, set[str]] = {}
        sys.addaudithook(self._hear)

    def used(self) -> dict[str, str]:
        """Return by name how each was opened: 'r', 'w' or 'rw'; below the run directory the name is relative."""
        files = {}
        for path, ways in list(self._opened.items()):
            name = path.removeprefix(self._run)
            if not os.path.isabs(name):
                parts = name.split("/")
                if parts[0] == contract.CODE:
                    name = "/".join(parts[2:])
                elif contract.is_own(parts[0]):
                    continue
            if name:
                files[name] = "".join(sorted(ways))
        return files

    def _hear(self, event: str, told: tuple[Any, ...]) -> None:
        if event != "open" or len(self._opened) >= self._MOST:
            return
        path, mode, flags = told
        if not isinstance(path, str | bytes) or threading.current_thread().name.startswith("jobkit"):
            return
        name = os.path.abspath(os.fsdecode(path))
        if (
            name.startswith(self._NOT)
            or name.endswith((".py", ".pyc", ".so"))
            or any(part in name for part in _LIBRARIES)
        ):
            return
        ways = self._opened.setdefault(name, set())
        if isinstance(mode, str):
            ways |= {"r"} if "r" in mode and "+" not in mode else {"w"} if "+" not in mode else {"r", "w"}
        else:
            kind = flags & os.O_ACCMODE
            ways |= {os.O_RDONLY: {"r"}, os.O_WRONLY: {"w"}}.get(kind, {"r", "w"})


def _drawn_from() -> list[str]:
    """Name the global generators that have been drawn from: where they are seeded, they stand at the end of a block."""
    ends = (623, 624)  # numpy begins at 623 where nobody has seeded it
    positions = {"random": random.getstate()[1][-1], "numpy": np.random.get_state()[2]}  # type: ignore[index]
    return [name for name, position in positions.items() if position not in ends]


def _threads() -> list[str]:
    """Name the program's own functions that run in threads."""
    names = []
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread is threading.main_thread():
            continue
        frame, own = frames.get(thread.ident or 0), ""
        while frame is not None:
            if _own(frame.f_code.co_filename):
                own = f"{frame.f_code.co_name} in {Path(frame.f_code.co_filename).name}"
            frame = frame.f_back
        names += [own] if own else []
    return sorted(set(names))


def _crc(content: str | bytes) -> str:
    return f"{google_crc32c.value(content.encode() if isinstance(content, str) else content):08x}"


def _leaves(part: Part) -> Iterator[tuple[str, str]]:
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


@dataclass(frozen=True)
class _Held:
    """What the program holds by one name.

    Args:
        kind: 'rng', 'iterator', 'array' or 'number'.
        crc: Its fingerprint.
        line: Which line writes it, if one does.
        live: Whether it is read again before it is written.
        arrays: The fingerprints of the arrays in it.
    """

    name: str
    kind: str
    crc: str
    line: int | None
    live: bool
    arrays: frozenset[str] = frozenset()


def _outside(frame: types.FrameType | None, seen: set[int]) -> Iterator[_Held]:
    """Yield what the program's own frames and modules hold."""
    modules: dict[int, types.ModuleType] = {
        id(vars(module)): module for module in list(sys.modules.values()) if isinstance(module, types.ModuleType)
    }
    done: dict[int, tuple[types.CodeType, frozenset[str]] | None] = {}
    frames = []
    while frame is not None:
        if _own(frame.f_code.co_filename):
            frames.append(frame)
            at_top = frame.f_locals is frame.f_globals or frame.f_code.co_name == "<module>"
            done.setdefault(id(frame.f_globals), None)
            if at_top:
                done[id(frame.f_globals)] = frame.f_code, liveness.live(frame)
        frame = frame.f_back
    visited = set()
    for frame in frames:
        where, code = Path(frame.f_code.co_filename).name, frame.f_code
        if not (frame.f_locals is frame.f_globals or code.co_name == "<module>"):
            live = liveness.live(frame)
            for name, value in list(frame.f_locals.items()):
                line = liveness.line_of(code, name)
                yield from _look_at(f"{name} in {where}:{code.co_name}", value, seen, _DEPTH, line, name in live)
        if id(frame.f_globals) in visited:
            continue
        visited.add(id(frame.f_globals))
        top = done[id(frame.f_globals)]
        for name, value in list(frame.f_globals.items()):
            line = liveness.line_of(top[0], name) if top else _line_in(frame.f_code.co_filename, name)
            is_live = top is None or name in top[1]
            yield from _look_at(f"{name} in {where}", value, seen, _DEPTH, line, is_live)
    for identity, module in modules.items():
        file = getattr(module, "__file__", None)
        if identity not in done and file and _own(file):
            for name, value in list(vars(module).items()):
                yield from _look_at(f"{name} in {Path(file).name}", value, seen, _DEPTH, _line_in(file, name), True)


def _line_in(file: str, name: str, *, attribute: bool = False) -> int | None:
    code = _code_of(file)
    return liveness.line_of(code, name, attribute=attribute) if code is not None else None


@lru_cache(maxsize=64)
def _code_of(file: str) -> types.CodeType | None:
    try:
        return compile(Path(file).read_bytes(), file, "exec")
    except (OSError, SyntaxError, ValueError):
        return None


@lru_cache(maxsize=4096)
def _own(file: str) -> bool:
    """Tell whether a file is the program's own: neither a library's, nor Python's, nor ours (but our examples)."""
    path = Path(file)
    if any(part in _LIBRARIES for part in path.parts) or file.startswith("<"):
        return False
    if path.is_relative_to(_HERE):
        return path.parent.name == "examples"
    return not path.is_relative_to(Path(types.__file__).parent)


_HERE = Path(__file__).parent.parent


def _ours(file: str) -> bool:
    """Tell whether a file is jobkit's own."""
    return Path(file).is_relative_to(_HERE) and not _own(file)


def _look_at(name: str, value: Any, seen: set[int], depth: int, line: int | None, live: bool) -> Iterator[_Held]:
    if name.startswith(("__", "_ ")) or id(value) in seen or depth == 0:
        return
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType):
        return
    word, _, place = name.partition(" in ")

    def inner(items: Iterable[tuple[str, Any]], prefix: str, line_of_: Any) -> Iterator[_Held]:
        for key, item in items:
            yield from _look_at(f"{prefix}{key} in {place}", item, seen, depth - 1, line_of_(key), live)

    if isinstance(value, type | types.FunctionType) or (callable(value) and hasattr(value, "__wrapped__")):
        yield from inner(_held_by(value), f"{word}.", lambda key: line)
        return
    if isinstance(value, types.MethodType):
        return
    module = type(value).__module__
    if module.startswith("jobkit.") and not module.startswith("jobkit.examples"):
        return
    if (fingerprint := _fingerprint(name, value)) is not None:
        yield _Held(name, *fingerprint[:2], line, live, fingerprint[2])
        return
    seen.add(id(value))
    if isinstance(value, types.GeneratorType):
        if value.gi_frame is not None and not _ours(value.gi_code.co_filename):
            held = [_of_any(item, depth - 1) for item in value.gi_frame.f_locals.values()]
            yield _Held(name, "iterator", _crc(repr((value.gi_frame.f_lasti, held))), line, live)
    elif is_iterator(value):
        try:
            reduced = value.__reduce__()
        except Exception:
            return  # it hides its position: what it yields will tell
        yield _Held(name, "iterator", _crc(_of_any(reduced, depth - 1)), line, live)
    elif isinstance(getattr(value, "__dict__", None), dict) and _own(file := _file_of(type(value))):
        yield from inner(list(vars(value).items()), f"{word}.", lambda key: _line_in(file, key, attribute=True))


def _held_by(value: Any) -> list[tuple[str, Any]]:
    """Return what a class or a function of the program's own holds, by name: attributes, closures, defaults."""
    while hasattr(value, "__wrapped__"):  # jax.jit and decorators
        value = value.__wrapped__
    if isinstance(value, type):
        own = vars(value).items() if _own(_file_of(value)) else ()
        return [(key, item) for key, item in own if not callable(item) and not hasattr(type(item), "__get__")]
    if not isinstance(value, types.FunctionType) or not _own(value.__code__.co_filename):
        return []
    cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    defaults = [*enumerate(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items()]
    held = [*vars(value).items(), *((f"default {key}", item) for key, item in defaults)]
    for key, cell in cells:
        try:
            held.append((key, cell.cell_contents))
        except ValueError:  # not filled yet
            continue
    return [(key, item) for key, item in held if not isinstance(item, types.FunctionType | type)]


def _file_of(kind: type) -> str:
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or "<none>"


def _fingerprint(name: str, value: Any) -> tuple[str, str, frozenset[str]] | None:
    """Return (kind, fingerprint, those of the arrays in it) of what could have been a part; None for anything else."""
    none: frozenset[str] = frozenset()
    if value is None:  # a best model before there is one
        return "number", "none", none
    if isinstance(value, collections.deque):
        value = list(value)
    if isinstance(value, list | tuple | dict | set | frozenset):
        if not value:
            return "number", "empty", none
        if isinstance(value, list) and len(value) > _MAX_ITEMS:
            value = [len(value), *value[:_FEW], *value[-_FEW:]]
        elif len(value) > _MAX_ITEMS:
            return None
    if isinstance(value, set | frozenset):
        return "number", _crc(repr(sorted(map(repr, value)))), none
    try:
        part = part_of("it", value)
        leaves = list(_leaves(part))
        slots = part.slots()[0]
    except (ConfigError, TypeError, ValueError, RuntimeError):
        return ("number", _of_items(value, _DEPTH), none) if isinstance(value, list | tuple | dict) else None
    if not leaves:
        return None
    arrays = (crc for slot, (_, crc) in zip(slots, leaves, strict=False) if getattr(slot.value, "ndim", 0))
    return _kind(name, value, part, slots), _crc(repr(leaves)), frozenset(arrays)


def _kind(name: str, value: Any, part: Part, slots: list[Slot]) -> str:
    """Say what a value is to a training: 'rng', 'iterator', 'array' or 'number'."""
    generators = np.random.Generator | np.random.BitGenerator | np.random.RandomState | random.Random
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
    if (fingerprint := _fingerprint("", value)) is not None:
        return fingerprint[1]
    if isinstance(value, list | tuple | dict):
        return _of_items(value, depth)
    if isinstance(value, types.GeneratorType):
        if _ours(value.gi_code.co_filename):
            return type(value).__name__
        frame = value.gi_frame
        held = [_of_any(item, depth - 1) for item in frame.f_locals.values()] if frame is not None else []
        return _crc(repr((frame.f_lasti if frame is not None else -1, held)))
    try:
        return _crc(_of_any(value.__reduce__(), depth - 1))
    except Exception:
        return type(value).__name__


def _of_items(value: list[Any] | tuple[Any, ...] | dict[Any, Any], depth: int) -> str:
    items = [*value.keys(), *value.values()] if isinstance(value, dict) else value[:_MAX_ITEMS]
    return _crc(repr([len(items), *(_of_any(item, depth - 1) for item in items)]))

"""What a program holds, as fingerprints: the leaves of its parts, and by name all that is outside of them.

Outside are the variables of the frame that iterates over `steps()` and of those around it, the globals of the program's
own modules, and what its classes, functions and objects hold.
"""

import argparse
import collections
import io
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import google_crc32c
import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from jobkit.checkpoint.kinds import Part, is_iterator, part_of
from jobkit.checkpoint.objects import position_of
from jobkit.drill import liveness
from jobkit.drill.looks import Kind, Variable
from jobkit.errors import ConfigError

_DEPTH = 4
"""How far objects of the program's own classes are followed."""
_LARGE = 1 << 28
"""Arrays above this many bytes are fingerprinted by a part of them."""
_MAX_ITEMS = 10_000
_FEW = 100
"""Of a longer list so many items at each end are looked at."""
_DEEPEST = 100
"""Containers deeper than that are taken to hold themselves."""
_GENERATORS = (np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random)
_BAGS = (types.SimpleNamespace, argparse.Namespace)
"""What the standard library has for a program's own names."""
LIBRARIES = ("site-packages", "dist-packages")
_HERE = Path(__file__).parent.parent


class Outside:
    """What a program holds outside of its parts.

    Args:
        given: The identities of what it gave as parts.
        saved: The fingerprints of the parts' leaves.
    """

    def __init__(self, given: set[int], saved: set[str]) -> None:
        self._seen, self._saved = given, saved
        self.variables: dict[str, Variable] = {}

    def walk(self, frame: types.FrameType | None) -> None:
        """Look into the program's own frames, from one outwards, and into its modules."""
        frames = []
        while frame is not None:
            if own(frame.f_code.co_filename):
                frames.append(frame)
            frame = frame.f_back
        tops = {id(one.f_globals): one for one in frames if _at_top(one)}
        visited = set()
        for one in frames:
            code, place = one.f_code, Path(one.f_code.co_filename).name
            if not _at_top(one):
                lines = partial(liveness.line_of, code)
                self._look_into(one.f_locals, f"{place}:{code.co_name}", lines, one)
            if id(one.f_globals) not in visited:
                visited.add(id(one.f_globals))
                if (top := tops.get(id(one.f_globals))) is not None:
                    self._look_into(one.f_globals, place, partial(liveness.line_of, top.f_code), top)
                else:
                    self._look_into(one.f_globals, place, partial(_line_in, code.co_filename))
        for module in list(sys.modules.values()):
            file = getattr(module, "__file__", None) if isinstance(module, types.ModuleType) else None
            if file and own(file) and id(vars(module)) not in visited:
                visited.add(id(vars(module)))
                self._look_into(vars(module), Path(file).name, partial(_line_in, file))

    def _look_into(
        self,
        variables: Mapping[str, Any],
        place: str,
        line_of: Callable[[str], int | None],
        frame: types.FrameType | None = None,
    ) -> None:
        live = liveness.live(frame) if frame is not None else None
        taken = liveness.taken(frame.f_code) if frame is not None else ()
        for word, value in list(variables.items()):
            self._look_at(word, place, value, line_of(word), live is None or word in live)
            if word in taken and (variable := self.variables.get(f"{word} in {place}")) is not None:
                self.variables[f"{word} in {place}"] = msgspec.structs.replace(variable, taken=True)

    def _look_at(self, word: str, place: str, value: Any, line: int | None, live: bool, depth: int = _DEPTH) -> None:
        if isinstance(value, types.MethodType | types.BuiltinFunctionType):
            value = value.__self__  # draw = generator.normal, and nothing else may hold the generator
        if word.startswith("__") or word == "_" or id(value) in self._seen or depth == 0:
            return
        if isinstance(value, types.ModuleType):
            return
        if isinstance(value, type | types.FunctionType) or (callable(value) and hasattr(value, "__wrapped__")):
            for key, item in _held_by(value):
                self._look_at(f"{word}.{key}", place, item, line, live, depth - 1)
            return
        module = type(value).__module__
        ours = module.startswith("jobkit.") and not module.startswith("jobkit.examples")
        if ours and position_of(value) is None:  # what has one, Batches and EarlyStopping, is to be a part
            return
        name = f"{word} in {place}"
        if (fingerprint := _fingerprint(word, value)) is not None:
            kind, crc, arrays = fingerprint
            live = live or isinstance(value, _GENERATORS) or of_torch(value) is not None  # a loader may draw from it
            self.variables[name] = Variable(kind, crc, line, live, bool(arrays) and arrays <= self._saved)
            return
        self._seen.add(id(value))
        if is_iterator(value):
            if (position := _position(value, depth)) is not None:
                self.variables[name] = Variable(Kind.ITERATOR, position, line, live)
        elif isinstance(value, _BAGS) or own(_file_of(type(value))):
            for key, item in _attributes(value):
                written = _line_in(_file_of(type(value)), key, attribute=True) or line
                self._look_at(f"{word}.{key}", place, item, written, live, depth - 1)


def _at_top(frame: types.FrameType) -> bool:
    """Tell whether a frame's variables are its module's."""
    return frame.f_locals is frame.f_globals or frame.f_code.co_name == "<module>"


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
def own(file: str) -> bool:
    """Tell whether a file is the program's own: neither a library's, nor Python's, nor ours (but our examples)."""
    path = Path(file)
    if any(part in LIBRARIES for part in path.parts) or file.startswith("<"):
        return False
    if path.is_relative_to(_HERE):
        return path.parent.name == "examples"
    return not path.is_relative_to(Path(types.__file__).parent)


def _held_by(value: Any) -> list[tuple[str, Any]]:
    """Return what a class or a function of the program's own holds, by name: attributes, closures, defaults."""
    while hasattr(value, "__wrapped__"):  # jax.jit and decorators
        value = value.__wrapped__
    if isinstance(value, type):
        attributes = vars(value).items() if own(_file_of(value)) else ()
        return [(key, item) for key, item in attributes if not callable(item) and not hasattr(type(item), "__get__")]
    if not isinstance(value, types.FunctionType) or not own(value.__code__.co_filename):
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


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Return what an object holds by name, slots among it."""
    slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for each in slots for name in ((each,) if isinstance(each, str) else each)]
    held = [(name, getattr(value, name)) for name in names if not name.startswith("__") and hasattr(value, name)]
    more = getattr(value, "__dict__", None)
    return [*held, *(more.items() if isinstance(more, dict) else ())]


def _file_of(kind: type) -> str:
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or "<none>"


# Fingerprints.


def crc_of(content: str | bytes) -> str:
    """Return the fingerprint of a text, or of bytes."""
    return f"{google_crc32c.value(content.encode() if isinstance(content, str) else content):08x}"


def leaves(part: Part) -> Iterator[tuple[str, str]]:
    """Yield each leaf of a part by name, with its fingerprint."""
    slots, skeleton = part.slots()
    for slot in slots:
        yield "/".join(slot.path), _of_leaf(slot.value)
    if skeleton is not None or part.kind == "object":
        yield "(its state)", crc_of(repr(skeleton))


def _of_leaf(value: Any) -> str:
    if isinstance(value, jax.Array):
        if value.is_deleted():
            return "deleted"
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        if not value.is_fully_addressable:
            shards = sorted(value.addressable_shards, key=lambda shard: shard.device.id)
            return crc_of("".join(_of_leaf(np.asarray(shard.data)) for shard in shards))
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = np.asarray(value)
        flat = array if array.nbytes <= _LARGE else array.reshape(-1)[:: array.nbytes // _LARGE + 1]
        return crc_of(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(flat).tobytes())
    return crc_of(repr(value))


def _fingerprint(word: str, value: Any) -> tuple[Kind, str, frozenset[str]] | None:
    """Return (kind, fingerprint, those of the arrays in it) of what could have been a part; None for anything else."""
    none: frozenset[str] = frozenset()
    if (crc := of_torch(value)) is not None:
        return Kind.RNG, crc, none
    if value is None:  # a best model before there is one
        return Kind.NUMBER, "none", none
    if isinstance(value, collections.deque):
        value = list(value)
    if isinstance(value, list | tuple | dict | set | frozenset):
        if not value:
            return Kind.NUMBER, "empty", none
        if isinstance(value, list) and len(value) > _MAX_ITEMS:
            value = [len(value), *value[:_FEW], *value[-_FEW:]]
        elif len(value) > _MAX_ITEMS:
            return None
    if _holds_itself(value):
        return None
    if isinstance(value, set | frozenset):
        return Kind.NUMBER, crc_of(repr(sorted(map(repr, value)))), none
    try:
        part = part_of("it", value)
        each = list(leaves(part))
        slots = part.slots()[0]
    except (ConfigError, TypeError, ValueError, RuntimeError):
        if isinstance(value, list | tuple | dict):
            return Kind.NUMBER, _of_items(value, _DEPTH), none
        array = _as_array(value)
        return _fingerprint(word, array) if array is not value else None
    if not each:
        return None
    arrays = (crc for slot, (_, crc) in zip(slots, each, strict=False) if getattr(slot.value, "ndim", 0))
    return kind_of(word, value, part), crc_of(repr(each)), frozenset(arrays)


def _as_array(value: Any) -> Any:
    """Return a tensor of another library's as numpy's, where it lets itself be read; anything else as it is."""
    if isinstance(value, np.ndarray | np.generic | jax.Array) or not hasattr(type(value), "__array__"):
        return value
    try:
        return np.asarray(value)
    except Exception:
        return value


def _holds_itself(value: Any, above: tuple[Any, ...] = ()) -> bool:
    """Tell whether a container is in itself, as `names = globals()`: JAX would follow it until Python's stack is used
    up, and leave a program that cannot call anything any more.
    """
    if not isinstance(value, list | tuple | dict):
        return False
    items = value.values() if isinstance(value, dict) else value
    return len(above) > _DEEPEST or any(
        any(item is one for one in (*above, value)) or _holds_itself(item, (*above, value)) for item in items
    )


def of_torch(value: Any) -> str | None:
    """Return the fingerprint of a generator of PyTorch's, None of anything else; whoever has one has imported torch."""
    kind = getattr(sys.modules.get("torch"), "Generator", None)
    state = getattr(value, "get_state", None) if isinstance(kind, type) and isinstance(value, kind) else None
    return crc_of(bytes(state().tolist())) if state is not None else None


def kind_of(word: str, value: Any, part: Part) -> Kind:
    """Say what a value is to a training, by its name and what is in it."""
    slots = part.slots()[0]
    held = [slot.value for slot in slots]
    keys = [isinstance(one, jax.Array) and jnp.issubdtype(one.dtype, jax.dtypes.prng_key) for one in held]
    arrays = [one for one in held if isinstance(one, jax.Array | np.ndarray)]
    if (
        isinstance(value, _GENERATORS)
        or (slots and (all(keys) or all(slot.role.startswith("Rng") for slot in slots)))
        or (len(arrays) == 1 and arrays[0].dtype == np.uint32 and any(map(word.lower().__contains__, _KEYS)))
    ):
        return Kind.RNG
    if part.kind == "object":
        return Kind.ITERATOR if hasattr(type(value), "__next__") or hasattr(type(value), "__iter__") else Kind.NUMBER
    return Kind.ARRAY if any(array.ndim for array in arrays) else Kind.NUMBER


_KEYS = ("key", "rng", "seed")
"""What a raw key of JAX is called."""


def _of_any(value: Any, depth: int) -> str:
    """Return a fingerprint of anything, as good as it gets."""
    if depth == 0 or value is None or isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return type(value).__name__
    if (fingerprint := _fingerprint("", value)) is not None:
        return fingerprint[1]
    if isinstance(value, list | tuple | dict):
        return _of_items(value, depth)
    return _position(value, depth) or type(value).__name__


def _of_items(value: list[Any] | tuple[Any, ...] | dict[Any, Any], depth: int) -> str:
    items = [*value.keys(), *value.values()] if isinstance(value, dict) else value[:_MAX_ITEMS]
    return crc_of(repr([len(items), *(_of_any(item, depth - 1) for item in items)]))


def _position(value: Any, depth: int) -> str | None:
    """Return a fingerprint of where an iterator stands; None if it hides that, has come to its end, or is ours."""
    if isinstance(value, types.GeneratorType):
        frame, file = value.gi_frame, value.gi_code.co_filename
        if frame is None or (Path(file).is_relative_to(_HERE) and not own(file)):
            return None
        inner = _position(value.gi_yieldfrom, depth - 1) if value.gi_yieldfrom is not None and depth > 1 else None
        return crc_of(repr((frame.f_lasti, inner, [_of_any(item, depth - 1) for item in frame.f_locals.values()])))
    try:
        return crc_of(_of_any(value.__reduce__(), depth - 1))
    except Exception:  # what it counts may tell, as of PyTorch's loaders
        if isinstance(value, io.IOBase):
            return None
        counts = {key: item for key, item in getattr(value, "__dict__", {}).items() if type(item) is int}
        return crc_of(repr(counts))

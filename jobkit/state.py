"""What is saved: the parts of a program's state, taken apart into arrays for Orbax and a table of all leaves.

A part is given to `Run.resume(name=part)` and is one of
    NNX      a module, optimizer, metric or Rngs, or a container of them: saved and restored in place
    object   something with a position: get_state/set_state (Grain), state_dict/load_state_dict, a numpy Generator:
             saved and restored in place
    value    any pytree of arrays, typed PRNG keys and Python scalars: lives in `run.state.NAME`
Every leaf is written down with its kind, shape and dtype, since Orbax alone would cast silently, turn 0-d arrays into
scalars, and lose weak types; what comes back is what was there, to the bit.
"""

import base64
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jobkit.errors import ConfigError, DonatedError

Path = tuple[str, ...]
Record = dict[str, Any]
"""How one leaf is written down in state.json: `is` (jax, key, numpy, scalar), shape, dtype, ... or a value."""

_NUMBERS = (bool, int, float, complex)

_DTYPES = frozenset(
    [
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
        "complex64",
        "complex128",
        "bfloat16",
        "int2",
        "int4",
        "float4_e2m1fn",
        "float8_e3m4",
        "float8_e4m3b11fnuz",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    ]
)
"""What tensorstore can write; a test saves one array of each."""


@dataclass
class Slot:
    """One leaf of a part.

    Args:
        path: Where it lies inside the part, without the part's name.
        value: The leaf now.
        role: For NNX the variable's type ('Param', 'BatchStat', 'RngKey', ...), else ''.
    """

    path: Path
    value: Any
    role: str = ""


class Part(Protocol):
    """A part of the state, whatever its kind."""

    kind: str

    def slots(self) -> tuple[list[Slot], Any]:
        """Return the leaves as they are now, and for objects the skeleton they sit in (else None)."""

    def assign(self, values: list[Any], skeleton: Any) -> None:
        """Put leaves back, in the order of `slots` (for objects: of the skeleton)."""

    def hold(self) -> "Held":
        """Keep what the part is now, by reference; cheap, since it is done at many boundaries and hardly ever used.

        Raises:
            ConfigError: If this part cannot be held.
        """


@dataclass(frozen=True)
class Held:
    """A part as it was at one boundary, whatever has become of it since: what `take` needs of a Part.

    Args:
        kind: The part's.
        leaves: What is held.
        slots: As the part's own.
    """

    kind: str
    leaves: list[Any]
    slots: Callable[[], tuple[list[Slot], Any]]


class ValuePart:
    """A pytree, held by the run itself."""

    kind = "value"

    def __init__(self, value: Any) -> None:
        self.value = value

    def slots(self) -> tuple[list[Slot], Any]:
        """Return the leaves of the current value."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.value, is_leaf=_is_iterator)
        return [Slot(names(path), leaf) for path, leaf in leaves], None

    def hold(self) -> Held:
        """Keep the leaves: the containers may be changed in place."""
        leaves, structure = jax.tree.flatten(self.value)
        kept = [_own(leaf) for leaf in leaves]
        return Held(self.kind, kept, lambda: ValuePart(jax.tree.unflatten(structure, kept)).slots())

    def assign(self, values: list[Any], skeleton: Any) -> None:
        """Replace the value by one of the same structure."""
        self.value = jax.tree.unflatten(jax.tree.structure(self.value), values)


class NnxPart:
    """An NNX object or a container of them, changed in place."""

    kind = "nnx"

    def __init__(self, target: Any) -> None:
        self._target = target
        self._known: list[tuple[tuple[Any, ...], Any]] = []

    def _variables(self) -> list[tuple[tuple[Any, ...], Any]]:
        from flax import nnx

        return list(nnx.to_flat_state(nnx.state(self._target)))

    def slots(self) -> tuple[list[Slot], Any]:
        """Return the leaves of every variable."""
        from flax import nnx

        self._known = self._variables()
        return _slots_of(
            (path, variable, variable.get_value() if isinstance(variable, nnx.Variable) else variable)
            for path, variable in self._known
        ), None

    def hold(self) -> Held:
        """Keep the values of the variables that `slots` found last: finding them takes milliseconds."""
        known = self._known
        try:
            values = [_own_tree(variable.get_raw_value()) for _, variable in known]
        except AttributeError:
            raise ConfigError("arrays that are no nnx.Variable are changed in place unseen") from None

        def slots() -> tuple[list[Slot], Any]:
            now = self._variables()
            if len(now) != len(known) or any(
                here is not there for (_, here), (_, there) in zip(now, known, strict=True)
            ):
                raise ConfigError("the model has got other variables since the boundary")
            return _slots_of(
                (path, variable, value) for (path, variable), value in zip(known, values, strict=True)
            ), None

        return Held(self.kind, jax.tree.leaves(values), slots)

    def assign(self, values: list[Any], skeleton: Any) -> None:
        """Update every variable of the live object."""
        from flax import nnx

        left = iter(values)
        flat = []
        for path, variable in self._variables():
            is_variable = isinstance(variable, nnx.Variable)
            held = variable.get_value() if is_variable else variable
            structure: Any = jax.tree.structure(held)
            new = jax.tree.unflatten(structure, [next(left) for _ in range(structure.num_leaves)])
            flat.append((path, variable.replace(new) if is_variable else new))
        nnx.update(self._target, nnx.from_flat_state(flat))


def _slots_of(variables: Iterable[tuple[tuple[Any, ...], Any, Any]]) -> list[Slot]:
    """Take variables of NNX apart: path, variable, its value."""
    from flax import nnx

    slots = []
    for path, variable, value in variables:
        prefix = tuple(str(key) for key in path)
        role = type(variable).__name__ if isinstance(variable, nnx.Variable) else ""
        for inner, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            slots.append(Slot(prefix + names(inner), leaf, role))
    return slots


def _own(leaf: Any) -> Any:
    """Return a leaf that nobody else can write into: JAX's arrays never change."""
    return np.array(leaf) if isinstance(leaf, np.ndarray) else leaf


def _own_tree(value: Any) -> Any:
    """Do the same with a variable's value, which may be a container; nearly all are arrays."""
    return value if isinstance(value, jax.Array) else jax.tree.map(_own, value)


class ObjectPart:
    """An object that gives and takes its state as plain data."""

    kind = "object"

    def __init__(self, get: Callable[[], Any], set_: Callable[[Any], Any]) -> None:
        self._get, self._set = get, set_

    def slots(self) -> tuple[list[Slot], Any]:
        """Return the arrays of the object's state and the skeleton around them."""
        leaves: list[Any] = []
        skeleton = _encode(self._get(), leaves)
        return [Slot((str(index),), leaf) for index, leaf in enumerate(leaves)], skeleton

    def hold(self) -> Held:
        """Keep a copy of the state."""
        slots, skeleton = self.slots()
        for slot in slots:
            slot.value = _own(slot.value)
        return Held(self.kind, [slot.value for slot in slots], lambda: (slots, skeleton))

    def assign(self, values: list[Any], skeleton: Any) -> None:
        """Hand the object the state it gave."""
        self._set(_decode(skeleton, values))


def names(path: Iterable[Any]) -> Path:
    """Turn JAX's key path into names: DictKey, SequenceKey, GetAttrKey and FlattenedIndexKey have one each."""
    return tuple(str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name))) for key in path)


def part_of(name: str, value: Any) -> Part:
    """Recognise what kind of part a value is.

    Raises:
        ConfigError: If it cannot be saved and rewound, with the remedy.
    """
    if isinstance(value, np.random.BitGenerator | np.random.Generator):
        bits = value if isinstance(value, np.random.BitGenerator) else value.bit_generator
        return ObjectPart(lambda: bits.state, lambda state: setattr(bits, "state", state))
    if isinstance(value, random.Random):
        return ObjectPart(value.getstate, value.setstate)
    try:
        holds_nnx = _holds_nnx(value)
    except (TypeError, ValueError) as error:  # keys that cannot be sorted, such as 1 and '1'
        raise ConfigError(f"part {name!r} is no pytree that JAX can flatten: {error}") from None
    if holds_nnx:
        _refuse_mixture(name, value)
        return NnxPart([value] if isinstance(value, _variable_type()) else value)  # NNX has no state of a bare one
    for get, set_ in _POSITIONS:
        if callable(getattr(value, get, None)) and callable(getattr(value, set_, None)):
            return ObjectPart(getattr(value, get), getattr(value, set_))
    for path, leaf in jax.tree_util.tree_flatten_with_path(value, is_leaf=_is_iterator)[0]:
        if not _is_leaf(leaf):
            raise ConfigError(_refusal("/".join((name, *names(path))), leaf))
    return ValuePart(value)


_POSITIONS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))


def _has_position(value: Any) -> bool:
    return isinstance(value, np.random.BitGenerator | np.random.Generator | random.Random) or any(
        callable(getattr(value, get, None)) and callable(getattr(value, set_, None)) for get, set_ in _POSITIONS
    )


def _is_nnx(value: Any) -> bool:
    # Compared by module name first: a program that never imports NNX must not pay for importing it here.
    if not any(base.__module__.startswith("flax.nnx") for base in type(value).__mro__):
        return False
    from flax import nnx

    return isinstance(value, nnx.Pytree | nnx.Variable)


def _holds_nnx(value: Any) -> bool:
    return any(
        _is_nnx(node) for node in jax.tree.leaves(value, is_leaf=lambda node: _is_nnx(node) or _is_iterator(node))
    )


def _is_iterator(value: Any) -> bool:
    # Named a leaf before JAX sees it: JAX warns of iterators in trees and will refuse them in words of its own.
    return hasattr(value, "__next__")


def _variable_type() -> type:
    from flax import nnx

    return nnx.Variable


def _refuse_mixture(name: str, value: Any) -> None:
    """Refuse a container of NNX objects and plain leaves: the leaves could not be restored in place."""
    for path, node in jax.tree_util.tree_flatten_with_path(value, is_leaf=_is_nnx)[0]:
        if not _is_nnx(node):
            where = "/".join((name, *names(path)))
            raise ConfigError(
                f"part {name!r} mixes NNX objects with plain values ({where} is {_kind(node)}): "
                "give them to resume() as two parts"
            )


def _is_leaf(value: Any) -> bool:
    if isinstance(value, jax.Array):
        return jnp.issubdtype(value.dtype, jax.dtypes.prng_key) or value.dtype.name in _DTYPES
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.name in _DTYPES and not isinstance(value, np.ma.MaskedArray)
    return type(value) in (*_NUMBERS, str, bytes)  # not their subclasses (an enum): another type would come back


def _kind(value: Any) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")


def _refusal(where: str, value: Any) -> str:
    """Say why a leaf cannot be a part and what to do."""
    if isinstance(value, np.ma.MaskedArray):
        return f"{where!r} is a masked array, whose mask would be lost: pass its data and its mask as two arrays"
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        whose = "JAX" if isinstance(value, jax.Array) else "numpy"
        return (
            f"{where!r} is a {whose} array of dtype {value.dtype}, which a checkpoint cannot hold: "
            "encode it as numbers of a usual dtype"
        )
    if isinstance(value, (*_NUMBERS, str, bytes)):
        plain = next(kind for kind in (int, float, complex, str, bytes) if isinstance(value, kind)).__name__
        return f"{where!r} is {_kind(value)}, of which only the plain value could be saved: pass {plain}(...) of it"
    if _has_position(value):
        return f"{where!r} is {_kind(value)} inside a container: give it to resume() as a part of its own"
    if hasattr(value, "__next__"):
        return (
            f"{where!r} is {_kind(value)}, which cannot be rewound: iterate a Grain dataset "
            "(iter(grain.MapDataset.source(...).shuffle(seed=0).batch(32).to_iter_dataset())), or give it "
            "state_dict() and load_state_dict()"
        )
    if hasattr(value, "__iter__"):
        return f"{where!r} is {_kind(value)}, which has no position: make its iterator first and pass that, iter(...)"
    return (
        f"{where!r} is {_kind(value)}, which jobkit cannot save: pass NNX objects, pytrees of arrays and numbers, "
        "or objects with state_dict() and load_state_dict()"
    )


# One leaf <-> its record and, where there is something to store, its array.


def record_of(value: Any) -> tuple[Record, Any]:
    """Write a leaf down.

    Returns:
        The record for state.json, and the array for Orbax, None where the record holds all (Python scalars, arrays
        without elements).
    """
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            record: Record = {"is": "key", "impl": str(jax.random.key_impl(value)), "shape": list(value.shape)}
            return record, (_key_data(value) if value.size else None)
        record = {"is": "jax", "shape": list(value.shape), "dtype": value.dtype.name}
        if value.weak_type:
            record["weak"] = True
        return record, (value if value.size else None)
    if isinstance(value, np.ndarray | np.generic):
        kind = "numpy" if isinstance(value, np.ndarray) else "numpy_scalar"
        record = {"is": kind, "shape": list(value.shape), "dtype": value.dtype.name}
        if not value.dtype.isnative:
            record["swapped"] = True
        # A copy, since the program may write into its array while the save is under way.
        return record, (np.array(value) if value.size else None)
    if isinstance(value, complex):
        return {"is": "scalar", "type": "complex", "value": [value.real.hex(), value.imag.hex()]}, None
    if isinstance(value, float):
        return {"is": "scalar", "type": "float", "value": value.hex()}, None
    if isinstance(value, bytes):
        return {"is": "scalar", "type": "bytes", "value": base64.b64encode(value).decode()}, None
    return {"is": "scalar", "type": type(value).__name__, "value": value}, None


def _key_data(key: Any) -> Any:
    """Return the numbers of a typed key without computing: a computation would queue up behind a long step.

    JAX has no public way; a test holds the private one.
    """
    data = getattr(key, "_base_array", None)
    return data if isinstance(data, jax.Array) else jax.random.key_data(key)


_FROM_JSON: dict[str, Callable[[Any], Any]] = {
    "bool": bool,
    "int": int,
    "float": float.fromhex,
    "complex": lambda pair: complex(float.fromhex(pair[0]), float.fromhex(pair[1])),
    "str": str,
    "bytes": base64.b64decode,
}


def value_of(record: Record, stored: Any, live: Any = None) -> Any:
    """Make a leaf from its record.

    Args:
        record: What `record_of` wrote.
        stored: The array that Orbax read; None where the record holds all.
        live: The leaf in the running program, whose placement on devices the result takes.
    """
    kind = record["is"]
    if kind == "scalar":
        return _FROM_JSON[record["type"]](record["value"])
    if stored is None:
        stored = np.zeros(record["shape"], _dtype(record) if kind != "key" else np.uint32)
    if kind == "numpy":
        return np.asarray(stored, _dtype(record).newbyteorder("S") if record.get("swapped") else _dtype(record))
    if kind == "numpy_scalar":
        return np.asarray(stored, _dtype(record))[()]
    if kind == "key":
        made = _key_of(record, stored)
    elif isinstance(stored, jax.Array):
        made = stored
    else:
        made = jnp.asarray(np.asarray(stored, _dtype(record)))
    if record.get("weak"):
        made = _weak(made)
    if isinstance(live, jax.Array) and live.committed and (made.sharding != live.sharding or not made.committed):
        made = jax.device_put(made, live.sharding)
    return made


def _key_of(record: Record, stored: Any) -> jax.Array:
    impl = record["impl"]
    made: jax.Array
    if 0 in record["shape"]:
        made = jax.random.split(jax.random.key(0, impl=impl), 1)[:0].reshape(record["shape"])
    else:
        made = jax.random.wrap_key_data(jnp.asarray(np.asarray(stored)), impl=impl)
    return made


def _weak(value: jax.Array) -> jax.Array:
    """Give an array the weak type it had: it decides the dtype of what is computed from it.

    JAX has no public way (its `convert_element_type` makes strong arrays); a test holds the private one.
    """
    from jax._src.lax.lax import _convert_element_type

    weak: jax.Array = _convert_element_type(value, value.dtype, weak_type=True)
    return weak


def _dtype(record: Record) -> np.dtype[Any]:
    return np.dtype(record["dtype"])


def stored_args(record: Record, live: Any) -> Any:
    """Say how Orbax shall read one array: sharded like the live leaf where that is placed on purpose, else as numpy."""
    import orbax.checkpoint as ocp

    if record["is"] == "jax" and isinstance(live, jax.Array) and live.committed:
        return ocp.ArrayRestoreArgs(sharding=live.sharding, dtype=_dtype(record), strict=True)
    return ocp.RestoreArgs(restore_type=np.ndarray)


# The state of an object <-> JSON, arrays taken out.


def _encode(value: Any, leaves: list[Any]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, list):
        return [_encode(item, leaves) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, leaves) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_encode(key, leaves), _encode(item, leaves)] for key, item in value.items()]}
    if not _is_leaf(value):
        raise ConfigError(
            f"an object's state holds {_kind(value)}, which jobkit cannot save: its state_dict() or get_state() "
            "may hold numbers, text, bytes, arrays, lists, tuples and dicts"
        )
    leaves.append(value)
    return {"leaf": len(leaves) - 1}


def _decode(node: Any, leaves: list[Any]) -> Any:
    if isinstance(node, list):
        return [_decode(item, leaves) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tuple":
        return tuple(_decode(item, leaves) for item in content)
    if kind == "dict":
        return {_hashable(_decode(key, leaves)): _decode(item, leaves) for key, item in content}
    return leaves[content]


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


# All parts together.


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
            if not _is_leaf(slot.value):
                raise ConfigError(_refusal("/".join((name, *slot.path)), slot.value))
            record, array = record_of(slot.value)
            if slot.role:
                record["role"] = slot.role
            key = "/".join(_quote(item) for item in slot.path)
            if key in records:
                raise ConfigError(f"part {name!r} has two leaves named {key!r}: rename one of the two keys")
            records[key] = record
            if _is_gone(slot.value):
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
        snapshot.table[name] = {"kind": part.kind, "leaves": records}
        if skeleton is not None or part.kind == "object":
            snapshot.table[name]["skeleton"] = skeleton
    return snapshot


def donated(parts: Mapping[str, Part]) -> list[str]:
    """Name the leaves whose arrays were given away and have no successor; an object's state is no business of JAX's."""
    slots = [(name, slot) for name, part in parts.items() if part.kind != "object" for slot in part.slots()[0]]
    return ["/".join((name, *slot.path)) for name, slot in slots if _is_gone(slot.value)]


def _is_gone(value: Any) -> bool:
    return isinstance(value, jax.Array) and value.is_deleted()


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
            array = np.frombuffer(content, _dtype(place), count, place["at"])
            arrays[path] = array.reshape(place["shape"]).copy()
    return arrays


def _quote(name: str) -> str:
    """Escape what separates names: '/' in our paths; '.' in Orbax's, where {'a.b'} and {'a': {'b'}} would collide.

    And the empty name, since a path without names is a part that is one leaf; and lone surrogates, since Orbax writes
    UTF-8.
    """
    name = re.sub("[%/.\ud800-\udfff]", lambda found: f"%{ord(found[0]):02X}", name)
    return name or "%"


def quoted(part: str, path: Path) -> Path:
    """Return where Orbax stores a leaf: the part's name and the path inside it, escaped."""
    return tuple(_quote(item) for item in (part, *path))


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
            yield (_quote(name), *(key.split("/") if key else ())), record


def check(now: Mapping[str, Any], then: Mapping[str, Any], *, where: str) -> None:
    """Compare the program's leaf table with another one before anything is read or written.

    Args:
        now: The program's table.
        then: The table that it must fit.
        where: What it differs from, for the message: 'from the checkpoint of step 7'.

    Raises:
        ConfigError: Naming the leaves that differ, what was saved, what the program has, and the remedy.
    """
    remedy = "run the code that wrote it, or start the changed program in a new run directory"
    missing, extra = sorted(now.keys() - then.keys()), sorted(then.keys() - now.keys())
    if missing or extra:
        told = [f"{', '.join(missing)} only here" if missing else "", f"{', '.join(extra)} only there" if extra else ""]
        raise ConfigError(
            f"the parts given to resume() differ {where} ({'; '.join(filter(None, told))}): "
            f"give the same parts, or {remedy}"
        )
    problems = []
    for name in now:
        if "object" in (now[name]["kind"], then[name]["kind"]):
            if now[name]["kind"] != then[name]["kind"]:
                problems.append(f"{name}: {then[name]['kind']} there, {now[name]['kind']} here")
            continue
        here, there = now[name]["leaves"], then[name]["leaves"]
        for key in [*there, *(key for key in here if key not in there)]:
            was = _describe(there[key]) if key in there else "absent"
            is_ = _describe(here[key]) if key in here else "absent"
            if was != is_ and not (key in there and key in here and _both_numbers(there[key], here[key])):
                problems.append(f"{name}/{key}: {was} there, {is_} here".replace("/:", ":"))
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ConfigError(f"the program's state differs {where}: {'; '.join(problems[:4])}{more}: {remedy}")


def _describe(record: Record) -> str:
    """Say what must agree between a checkpoint and a program: shape and dtype, not whether numpy or JAX holds it."""
    if record["is"] == "scalar":
        return f"a Python {record['type']}"
    return f"{tuple(record['shape'])} {record.get('dtype') or 'key of ' + record['impl']}"


def _both_numbers(one: Record, other: Record) -> bool:
    """Allow a Python number where a 0-d array is and the other way round: TrainState.step starts as an int."""

    def number(record: Record) -> bool:
        if record["is"] == "scalar":
            return record["type"] in ("bool", "int", "float", "complex")
        return record["is"] != "key" and not record["shape"]

    return number(one) and number(other) and "scalar" in (one["is"], other["is"])


def give_back(parts: Mapping[str, Part], table: Mapping[str, Any], arrays: Mapping[tuple[str, ...], Any]) -> None:
    """Put a checkpoint's values into the program's parts.

    Args:
        parts: What `check` accepted.
        table: The checkpoint's leaf table.
        arrays: What Orbax read, by quoted path.
    """
    ready = []
    for name, part in parts.items():
        slots = part.slots()[0]
        live = {"/".join(_quote(item) for item in slot.path): slot.value for slot in slots}
        records = table[name]["leaves"]
        # Live order for values and NNX objects; an object's own leaves come in the order of its skeleton.
        keys = list(records) if part.kind == "object" else list(live)
        values = [
            value_of(records[key], arrays.get((_quote(name), *(key.split("/") if key else ()))), live.get(key))
            for key in keys
        ]
        ready.append((part, values, table[name].get("skeleton")))
    for part, values, skeleton in ready:  # all values exist: nothing is half-restored if making one failed
        part.assign(values, skeleton)


def has_optimizer(parts: Mapping[str, Any]) -> bool:
    """Tell whether any of the given objects is or holds an optimizer's state (optax, or NNX's Optimizer)."""

    def is_optimizer(node: Any) -> bool:
        names = ("Optimizer", "ModelAndOptimizer")
        return type(node).__module__.split(".")[0] == "optax" or type(node).__name__ in names

    return any(is_optimizer(node) for value in parts.values() for node in jax.tree.leaves(value, is_leaf=is_optimizer))

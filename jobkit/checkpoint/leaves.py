"""One leaf of the state: how it is written down, and made again to the bit.

Orbax alone would cast silently, turn 0-d arrays into scalars, and lose weak types.
"""

import base64
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jobkit.errors import ConfigError

Path = tuple[str, ...]
Record = dict[str, Any]
"""How one leaf is written down in state.json: `is` (jax, key, numpy, scalar), shape, dtype, ... or a value."""

NUMBERS = (bool, int, float, complex)

DTYPES = frozenset(
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
"""What tensorstore can write, if it is new enough; a test saves one array of each."""


@cache
def _written(dtype: str) -> bool:
    """Tell whether the installed tensorstore writes a dtype; what it does not know would fail every save."""
    import tensorstore

    with suppress(ValueError):
        return dtype in DTYPES and bool(tensorstore.dtype(dtype))
    return False


@cache
def _name(dtype: Any) -> str:
    return str(dtype.name)


@cache
def _is_key(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def is_leaf(value: Any) -> bool:
    """Tell what can be written down: an array of a usual dtype, a typed key, a plain number, text, bytes."""
    if isinstance(value, jax.Array):
        return _is_key(value.dtype) or _written(_name(value.dtype))
    if isinstance(value, np.ndarray | np.generic):
        return _written(_name(value.dtype)) and not isinstance(value, np.ma.MaskedArray)
    return type(value) in (*NUMBERS, str, bytes)  # not their subclasses (an enum): another type would come back


def is_gone(value: Any) -> bool:
    """Tell an array that was given away."""
    return isinstance(value, jax.Array) and value.is_deleted()


def own(leaf: Any) -> Any:
    """Return a leaf that nobody else can write into: JAX's arrays never change."""
    return np.array(leaf) if isinstance(leaf, np.ndarray) else leaf


def kind_of(value: Any) -> str:
    """Say of what type a value is."""
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")


def outline_of(value: Any) -> Record:
    """Say what a leaf is, without its content."""
    if isinstance(value, jax.Array):
        if _is_key(value.dtype):
            return {"is": "key", "impl": str(jax.random.key_impl(value)), "shape": list(value.shape)}
        weak = {"weak": True} if value.weak_type else {}
        return {"is": "jax", "shape": list(value.shape), "dtype": _name(value.dtype)} | weak
    if isinstance(value, np.ndarray | np.generic):
        kind = "numpy" if isinstance(value, np.ndarray) else "numpy_scalar"
        swapped = {} if value.dtype.isnative else {"swapped": True}
        return {"is": kind, "shape": list(value.shape), "dtype": _name(value.dtype)} | swapped
    if callable(value):
        return {"is": "scalar", "type": "function", "value": function_name(value)}
    return {"is": "scalar", "type": type(value).__name__}


def function_name(function: Any) -> str:
    """Return by what name a program finds a function again."""
    kind = type(function)
    return f"{getattr(function, '__module__', kind.__module__)}.{getattr(function, '__qualname__', kind.__qualname__)}"


def record_of(value: Any) -> tuple[Record, Any]:
    """Write a leaf down.

    Returns:
        The record for state.json, and the array for Orbax, None where the record holds all (Python scalars, arrays
        without elements).
    """
    record, array = outline_of(value), None
    if record["is"] == "scalar":
        record["value"] = record.get("value") or _TO_JSON.get(type(value), lambda same: same)(value)
    elif not value.size:
        pass
    elif record["is"] == "key":
        array = _key_data(value)
    elif record["is"] == "jax":
        array = value
    else:  # a copy, since the program may write into its array while the save is under way
        array = np.array(value)
    return record, array


def _key_data(key: Any) -> Any:
    """Return the numbers of a typed key without computing: a computation would queue up behind a long step.

    JAX has no public way; a test holds the private one.
    """
    data = getattr(key, "_base_array", None)
    return data if isinstance(data, jax.Array) else jax.random.key_data(key)


_TO_JSON: dict[type, Callable[[Any], Any]] = {
    float: float.hex,
    complex: lambda value: [value.real.hex(), value.imag.hex()],
    bytes: lambda value: base64.b64encode(value).decode(),
}
FROM_JSON: dict[str, Callable[[Any], Any]] = {
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
    if kind == "scalar" and record["type"] == "function":
        if not callable(live):
            raise ConfigError(f"the program has no function {record['value']} where the checkpoint has one")
        return live
    if kind == "scalar":
        return FROM_JSON[record["type"]](record["value"])
    if stored is None:
        stored = np.zeros(record["shape"], dtype_of(record) if kind != "key" else np.uint32)
    if kind == "numpy":
        return np.asarray(stored, dtype_of(record).newbyteorder("S") if record.get("swapped") else dtype_of(record))
    if kind == "numpy_scalar":
        return np.asarray(stored, dtype_of(record))[()]
    if kind == "key":
        made = _key_of(record, stored)
    elif isinstance(stored, jax.Array):
        made = stored
    else:
        made = jnp.asarray(np.asarray(stored, dtype_of(record)))
    if record.get("weak"):
        made = _weak(made)
    sharding = _sharding(live, record)
    if sharding is not None and (made.sharding != sharding or not made.committed):
        made = jax.device_put(made, sharding)
    return made


def _sharding(live: Any, record: Record) -> Any:
    """Return where the program has placed a leaf on purpose, None if nowhere or if the saved one has no place there."""
    if not isinstance(live, jax.Array) or not live.committed:
        return None
    try:
        live.sharding.shard_shape(tuple(record["shape"]))
    except (ValueError, IndexError):  # another shape was saved, which cannot be spread so: JAX says either
        return None
    return live.sharding


def _key_of(record: Record, stored: Any) -> jax.Array:
    impl = record["impl"]
    made: jax.Array
    try:
        if 0 in record["shape"]:
            made = jax.random.split(jax.random.key(0, impl=impl), 1)[:0].reshape(record["shape"])
        else:
            made = jax.random.wrap_key_data(jnp.asarray(np.asarray(stored)), impl=impl)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"what is stored of a key of kind {impl!a} is none: {error}") from None
    return made


def _weak(value: jax.Array) -> jax.Array:
    """Give an array the weak type it had: it decides the dtype of what is computed from it.

    JAX has no public way (its `convert_element_type` makes strong arrays); a test holds the private one.
    """
    from jax._src.lax.lax import _convert_element_type

    weak: jax.Array = _convert_element_type(value, value.dtype, weak_type=True)
    return weak


def dtype_of(record: Record) -> np.dtype[Any]:
    """Return the dtype of an array that was written down."""
    return np.dtype(record["dtype"])


def placement(record: Record, live: Any) -> Any:
    """Return how an array shall be spread over devices as it is read; None if it is to be read as numpy's."""
    return _sharding(live, record) if record["is"] == "jax" else None


def stored_args(record: Record, live: Any) -> Any:
    """Say how Orbax shall read one array: sharded like the live leaf where that is placed on purpose, else as numpy."""
    import orbax.checkpoint as ocp

    if (sharding := placement(record, live)) is not None:
        return ocp.ArrayRestoreArgs(sharding=sharding, dtype=dtype_of(record), strict=True)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def describe(record: Record) -> str:
    """Say what must agree between a checkpoint and a program: shape and dtype, not whether numpy or JAX holds it."""
    if record["is"] == "scalar":
        return f"the function {record['value']}" if record["type"] == "function" else f"a Python {record['type']}"
    return f"{tuple(record['shape'])} {record.get('dtype') or 'key of ' + record['impl']}"


def both_numbers(one: Record, other: Record) -> bool:
    """Allow a Python number where a 0-d array is and the other way round: TrainState.step starts as an int."""

    def number(record: Record) -> bool:
        if record["is"] == "scalar":
            return record["type"] in ("bool", "int", "float", "complex")
        return record["is"] != "key" and not record["shape"]

    return number(one) and number(other) and "scalar" in (one["is"], other["is"])


def differences(part: str, here: Mapping[str, Record], there: Mapping[str, Record]) -> list[str]:
    """Name the leaves that are not of one kind, shape and dtype."""
    lines = []
    for key in [*there, *(key for key in here if key not in there)]:
        was = describe(there[key]) if key in there else "absent"
        is_ = describe(here[key]) if key in here else "absent"
        if was != is_ and not (key in there and key in here and both_numbers(there[key], here[key])):
            lines.append(f"{part}/{key}: {was} there, {is_} here".replace("/:", ":"))
    return lines


def several(problems: list[str]) -> str:
    """Say what is wrong with a state: the first few, and how many more there are."""
    more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
    return f"{'; '.join(problems[:4])}{more}"


def names(path: Iterable[Any]) -> Path:
    """Turn JAX's key path into names: DictKey, SequenceKey, GetAttrKey and FlattenedIndexKey have one each."""
    return tuple(str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name))) for key in path)


@lru_cache(1 << 16)
def quote(name: str) -> str:
    """Escape what separates names: '/' in our paths; '.' in Orbax's, where {'a.b'} and {'a': {'b'}} would collide.

    And the empty name, since a path without names is a part that is one leaf; and lone surrogates, since Orbax writes
    UTF-8.
    """
    name = re.sub("[%/.\ud800-\udfff]", lambda found: f"%{ord(found[0]):02X}", name)
    return name or "%"


def key_of(path: Path) -> str:
    """Return how a table names a leaf of a part."""
    return "/".join(quote(item) for item in path)


def quoted(part: str, path: Path) -> Path:
    """Return where Orbax stores a leaf: the part's name and the path inside it, escaped."""
    return tuple(quote(item) for item in (part, *path))

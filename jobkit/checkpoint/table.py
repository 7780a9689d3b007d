"""The leaf table of a step, state.json, as it is read: what `state` relies on is looked at before anything uses it."""

import math
from typing import Annotated, Any, Literal

import msgspec

from jobkit import contract, decode
from jobkit.checkpoint.leaves import DTYPES, FROM_JSON
from jobkit.errors import ConfigError
from jobkit.rundir.store import Store

_DEEPEST = 900
"""A skeleton nests three times as deep as the program's containers."""
_Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 50)]


class _Place(msgspec.Struct):
    at: _Size
    shape: list[_Size]
    dtype: str


class _Leaf(msgspec.Struct):
    kind: Literal["jax", "numpy", "numpy_scalar", "key", "scalar"] = msgspec.field(name="is")
    shape: list[_Size] | None = None
    dtype: str | None = None
    impl: str | None = None
    type: str | None = None
    value: Any = None
    role: str | None = None
    weak: bool = False
    swapped: bool = False
    local: _Place | msgspec.UnsetType = msgspec.UNSET


class _Entry(msgspec.Struct):
    kind: str
    leaves: dict[str, _Leaf]
    given: dict[str, _Leaf] | msgspec.UnsetType = msgspec.UNSET


class _Table(msgspec.Struct):
    parts: dict[str, _Entry]


def table_of(store: Store, step: int, process: int = 0) -> dict[str, Any]:
    """Read the parts of a leaf table that one process wrote, of a step whose bytes were checked.

    Raises:
        ConfigError: If it is absent, or none that this jobkit reads. Its bytes are as they were committed, so that this
            is no damage, and nothing is set aside for it.
        JobkitError: If the storage does not answer.
    """
    name = f"{contract.step_dir(step)}/{contract.of_process(contract.STATE, process)}"
    try:
        document = decode.json_object(store.read(name), deepest=_DEEPEST, text=False)
    except FileNotFoundError:
        raise ConfigError(f"step {step} of {store.url} has no {name.rpartition('/')[2]}") from None
    try:
        table = msgspec.convert(document, _Table)
        for part, entry in table.parts.items():
            for records in (entry.leaves, {} if entry.given is msgspec.UNSET else entry.given):
                for key, leaf in records.items():
                    _check(f"{part}/{key}", leaf, whole=records is entry.leaves)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(
            f"{store.file(name)} is no table of a state that this jobkit reads, although its bytes are as committed: "
            f"{error}; install the jobkit that wrote it, or choose another step"
        ) from None
    assert document is not None
    parts: dict[str, Any] = document["parts"]
    return parts


def _check(name: str, leaf: _Leaf, *, whole: bool) -> None:
    """Refuse a record that no leaf has.

    Args:
        name: The leaf.
        leaf: Its record.
        whole: Whether something is made from it; else it only says what there was.

    Raises:
        ValueError: With the leaf.
    """
    try:
        if leaf.kind == "scalar":
            if leaf.type is None:
                raise ValueError("a scalar of no type")
            if whole and leaf.type != "function":
                FROM_JSON[leaf.type](leaf.value)
            return
        if leaf.shape is None or (leaf.impl if leaf.kind == "key" else leaf.dtype) is None:
            raise ValueError("an array without shape or dtype")
        arrays = [] if leaf.kind == "key" else [(leaf.shape, leaf.dtype)]
        if leaf.local is not msgspec.UNSET:
            arrays.append((leaf.local.shape, leaf.local.dtype))
        for shape, dtype in arrays if whole else []:
            if math.prod(filter(None, shape)) >= 1 << 60 or dtype not in DTYPES:
                raise ValueError(f"no array has shape {shape} and dtype {dtype!a}")
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"{name[:200]!a}: {error}") from None

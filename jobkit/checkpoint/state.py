"""What is saved: all parts of a program's state, taken apart into arrays for Orbax and a table of all leaves.

Every leaf is written down with its kind, shape and dtype; what comes back is what was there, to the bit. Where a part
has become something else than the program gave, the table tells of both. It is state.json, and what is relied on here
is looked at when that is read.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import jax
import msgspec
import numpy as np

from jobkit import contract, decode
from jobkit.checkpoint import leaves
from jobkit.checkpoint.kinds import Held, Part, Slot, refusal
from jobkit.checkpoint.leaves import Path, Record
from jobkit.errors import ConfigError, DonatedError
from jobkit.rundir.store import Store


@dataclass
class Snapshot:
    """The state of a program at one step boundary, ready to be written.

    Args:
        arrays: What Orbax stores, by quoted path: the part's name first.
        table: What goes to state.json: kind, records and skeleton of each part.
        nbytes: Bytes of all arrays.
        local: In a run of several processes, the arrays that belong to this process alone; `local` in a record tells
            where in the bytes of all of them its array lies, and how.
        donated: Leaves whose arrays are gone: such a state cannot be written.
    """

    arrays: dict[Path, Any] = field(default_factory=dict)
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
            record, array = leaves.record_of(slot.value)
            if slot.role:
                record["role"] = slot.role
            key = leaves.key_of(slot.path)
            if key in records:
                raise ConfigError(f"part {name!r} has two leaves named {key!r}: rename one of the two keys")
            records[key] = record
            if leaves.is_gone(slot.value):
                snapshot.donated.append("/".join((name, *slot.path)))
                continue
            if array is None:
                continue
            snapshot.nbytes += array.nbytes
            if shared and not (isinstance(array, jax.Array) and not array.is_fully_addressable):
                record["local"] = {"at": local_bytes, "shape": list(array.shape), "dtype": array.dtype.name}
                snapshot.local.append(np.array(array, array.dtype.newbyteorder("="), order="C"))
                local_bytes += array.nbytes
            else:
                snapshot.arrays[leaves.quoted(name, slot.path)] = array
        entry = snapshot.table[name] = {"kind": part.kind, "leaves": records}
        if skeleton is not None or part.kind == "object":
            entry["skeleton"] = skeleton
        if part.kind != "object" and (skeleton is not None or leaves.differences(name, records, part.given)):
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
    return ["/".join((name, *slot.path)) for name, _, slot in _live(parts) if leaves.is_gone(slot.value)]


def _live(parts: Mapping[str, Part]) -> list[tuple[str, Part, Slot]]:
    """Return the leaves, each with its part; an object's state is no business of JAX's."""
    return [(name, part, slot) for name, part in parts.items() if part.kind != "object" for slot in part.slots()[0]]


def _check_leaf(part: str, slot: Slot, given: Mapping[str, Record]) -> None:
    """Refuse what cannot be written down, and functions that the program has not given."""
    code = callable(slot.value) and given.get(leaves.key_of(slot.path)) == leaves.outline_of(slot.value)
    if not leaves.is_leaf(slot.value) and not code:
        raise ConfigError(refusal("/".join((part, *slot.path)), slot.value))


def local_arrays(table: Mapping[str, Any]) -> dict[Path, np.ndarray]:
    """Return the arrays that belonged to one process alone, by quoted path.

    Args:
        table: The process's leaf table, as `table_of` returns it.
    """
    arrays = {}
    for path, record in _paths(table):
        if (own := record.get("local")) is not None:
            arrays[path] = np.frombuffer(own["bytes"], leaves.dtype_of(own)).reshape(own["shape"]).copy()
    return arrays


def stored_paths(table: Mapping[str, Any]) -> dict[Path, Record]:
    """List the arrays that a table says Orbax holds: quoted path (part first) -> record."""
    return {
        path: record
        for path, record in _paths(table)
        if record["is"] != "scalar" and 0 not in record["shape"] and "local" not in record
    }


def _paths(table: Mapping[str, Any]) -> Iterator[tuple[Path, Record]]:
    for name, entry in table.items():
        for key, record in entry["leaves"].items():
            yield _path(name, key), record


def _path(part: str, key: str) -> Path:
    """Return where Orbax stores a leaf, by its key in the table."""
    return (leaves.quote(part), *(key.split("/") if key else ()))


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
        differs = leaves.differences(name, part.given, entry.get("given", entry["leaves"]))
        if differs and leaves.differences(name, part.given, entry["leaves"]):
            problems += differs
            continue
        try:
            part.order(entry)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(f"the program's state differs {where}: {leaves.several(problems)}: {remedy}")


def give_back(parts: Mapping[str, Part], table: Mapping[str, Any], arrays: Mapping[Path, Any]) -> None:
    """Put a checkpoint's values into the program's parts.

    Args:
        parts: What `check` accepted.
        table: The checkpoint's leaf table.
        arrays: What Orbax read, by quoted path.
    """
    ready = []
    for name, part in parts.items():
        live = {leaves.key_of(slot.path): slot.value for slot in part.slots()[0]}
        entry = table[name]
        values = [
            leaves.value_of(entry["leaves"][key], arrays.get(_path(name, key)), live.get(key))
            for key in part.order(entry)
        ]
        ready.append((part, values, entry))
    for part, values, entry in ready:  # all values exist: nothing is half-restored if making one failed
        part.assign(values, entry)


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

    Returns:
        The entry of each part; `local` in the record of an array that was this process's alone has its bytes.

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
                    _check_record(f"{part}/{key}", leaf, whole=records is entry.leaves)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(
            f"{store.file(name)} is no table of a state that this jobkit reads, although its bytes are as committed: "
            f"{error}; install the jobkit that wrote it, or choose another step"
        ) from None
    assert document is not None
    parts: dict[str, Any] = document["parts"]
    own = {path: record for path, record in _paths(parts) if "local" in record}
    file = f"{contract.step_dir(step)}/{contract.of_process(contract.LOCAL, process)}"
    content = (store.get(file) if own else None) or b""
    for path, record in own.items():
        place = record["local"]
        begin, nbytes = place.pop("at"), math.prod(place["shape"]) * leaves.dtype_of(place).itemsize
        place["bytes"] = content[begin : begin + nbytes]
        if len(place["bytes"]) < nbytes:
            raise ConfigError(f"{store.file(file)} does not hold {'/'.join(path)!a}")
    return parts


def _check_record(name: str, leaf: _Leaf, *, whole: bool) -> None:
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
                leaves.FROM_JSON[leaf.type](leaf.value)
            return
        if leaf.shape is None or (leaf.impl if leaf.kind == "key" else leaf.dtype) is None:
            raise ValueError("an array without shape or dtype")
        arrays = [] if leaf.kind == "key" else [(leaf.shape, leaf.dtype)]
        if leaf.local is not msgspec.UNSET:
            arrays.append((leaf.local.shape, leaf.local.dtype))
        for shape, dtype in arrays if whole else []:
            if math.prod(filter(None, shape)) >= 1 << 60 or dtype not in leaves.DTYPES:
                raise ValueError(f"no array has shape {shape} and dtype {dtype!a}")
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"{name[:200]!a}: {error}") from None

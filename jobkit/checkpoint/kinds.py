"""The parts of a program's state, each of one kind, with its leaves taken out and put back.

A part is given to `Run.resume(name=part)` and is one of
    NNX      a module, optimizer, metric or Rngs, or a container of them: saved and restored in place
    object   something with a position: get_state/set_state (Grain), state_dict/load_state_dict, a numpy Generator, a
             deque: saved and restored in place
    ref      a jax.Ref, or a container of them: saved and restored in place
    value    any pytree of arrays, typed PRNG keys and Python scalars, nnx.State and Equinox modules among them: lives
             in `run.state.NAME`
What a part is may change as training goes on: a dtype, a shape, the containers of a value. After a restart the program
gives `resume` its first value again, so each part knows what it was given as.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import jax
import numpy as np

from jobkit.checkpoint import leaves
from jobkit.checkpoint import skeleton as skeletons
from jobkit.checkpoint.leaves import Path, Record
from jobkit.checkpoint.objects import decode, encode, position_of, unsound
from jobkit.errors import ConfigError


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
    """A part of the state, whatever its kind; those of each kind inherit from it."""

    kind: str
    given: dict[str, Record]
    """What the leaves were that the program gave to resume(), by key; empty for objects."""

    def slots(self) -> tuple[list[Slot], Any]:
        """Return the leaves as they are now, and the skeleton they sit in: of objects, and where the program gave a
        value in other containers; else None.

        Raises:
            ConfigError: If they could not be put back into what the program gave.
        """

    def order(self, entry: Mapping[str, Any]) -> list[str]:
        """Return the keys of the leaves of a saved entry of the table in the order in which `assign` takes them.

        Raises:
            ConfigError: If they cannot be put into what the program gave.
        """
        return list(self.given or entry["leaves"])

    def assign(self, values: list[Any], entry: Mapping[str, Any]) -> None:
        """Put the leaves of a saved entry back, in that order."""

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
        given: The part's.
    """

    kind: str
    leaves: list[Any]
    slots: Callable[[], tuple[list[Slot], Any]]
    given: dict[str, Record] = field(default_factory=dict)


class ValuePart(Part):
    """A pytree, held by the run itself."""

    kind = "value"

    def __init__(self, name: str, value: Any) -> None:
        self._name, self.value = name, value
        self._structure = jax.tree.structure(value)
        self.given = _outlines(self.slots()[0])

    def slots(self) -> tuple[list[Slot], Any]:
        """Return the leaves of the current value."""
        return self._slots_of(self.value)

    def _slots_of(self, value: Any) -> tuple[list[Slot], Any]:
        structure = jax.tree.structure(value, is_leaf=is_iterator)
        return _flat(value), skeletons.encode(self._name, structure, self._structure)

    def hold(self) -> Held:
        """Keep the leaves: the containers may be changed in place."""
        values, structure = jax.tree.flatten(self.value)
        kept = [leaves.own(value) for value in values]
        return Held(self.kind, kept, lambda: self._slots_of(jax.tree.unflatten(structure, kept)), self.given)

    def order(self, entry: Mapping[str, Any]) -> list[str]:
        """Return the order of the leaves in the structure that was saved."""
        return list(self.given if self._saved(entry) is self._structure else entry["leaves"])

    def assign(self, values: list[Any], entry: Mapping[str, Any]) -> None:
        """Replace the value by one of the structure that was saved."""
        self.value = jax.tree.unflatten(self._saved(entry), values)

    def _saved(self, entry: Mapping[str, Any]) -> Any:
        skeleton = entry.get("skeleton")
        if skeleton is None:
            return self._structure
        try:
            made = skeletons.decode(skeleton, self._structure)
            if made.num_leaves != len(entry["leaves"]):
                raise ConfigError(f"{self._name} has {len(entry['leaves'])} leaves, and its structure another number")
        except skeletons.MisfitError as error:
            if self.given.keys() == entry["leaves"].keys():  # another program, which begins with what was saved
                return self._structure
            raise ConfigError(f"{self._name}: {error} there, and nothing to make it from here") from None
        return made


class NnxPart(Part):
    """An NNX object or a container of them, changed in place."""

    kind = "nnx"

    def __init__(self, name: str, target: Any) -> None:
        self._name, self._target = name, target
        self._known: list[tuple[tuple[Any, ...], Any]] = []
        self.given: dict[str, Record] = {}
        self.given = _outlines(self.slots()[0])

    def _variables(self) -> list[tuple[tuple[Any, ...], Any]]:
        from flax import nnx

        return list(nnx.to_flat_state(nnx.state(self._target)))

    def slots(self) -> tuple[list[Slot], Any]:
        """Return the leaves of every variable."""
        from flax import nnx

        self._known = self._variables()
        slots = _slots_of(
            (path, variable, variable.get_value() if isinstance(variable, nnx.Variable) else variable)
            for path, variable in self._known
        )
        other = self.given and sorted(self.given.keys() ^ {leaves.key_of(slot.path) for slot in slots})
        if other:
            change = "is gone" if other[0] in self.given else "is new"
            raise ConfigError(
                f"{self._name}/{other[0]} {change} since resume(), which cannot be restored into the object as the "
                "program makes it: make it with all its variables before resume(), and take what a step adds out again "
                "(nnx.pop(model, nnx.Intermediate))"
            )
        return slots, None

    def hold(self) -> Held:
        """Keep the values of the variables that `slots` found last: finding them takes milliseconds."""
        known = self._known
        try:
            raw = [variable.get_raw_value() for _, variable in known]
        except AttributeError:
            raise ConfigError("an array outside of any nnx.Variable can change unnoticed: make it one") from None
        # A variable's value may be a container; nearly all are arrays.
        values = [value if isinstance(value, jax.Array) else jax.tree.map(leaves.own, value) for value in raw]

        def slots() -> tuple[list[Slot], Any]:
            now = self._variables()
            if len(now) != len(known) or any(
                here is not there for (_, here), (_, there) in zip(now, known, strict=True)
            ):
                raise ConfigError("the model has got other variables since the boundary")
            return _slots_of(
                (path, variable, value) for (path, variable), value in zip(known, values, strict=True)
            ), None

        return Held(self.kind, jax.tree.leaves(values), slots, self.given)

    def assign(self, values: list[Any], entry: Mapping[str, Any]) -> None:
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


class RefPart(Part):
    """A jax.Ref, or a container of them, changed in place."""

    kind = "ref"

    def __init__(self, name: str, target: Any) -> None:
        self._name, self._target = name, target
        self.given: dict[str, Record] = {}
        self.given = _outlines(self.slots()[0])

    def slots(self) -> tuple[list[Slot], Any]:
        """Return what the refs hold now."""
        refs, _ = jax.tree_util.tree_flatten_with_path(self._target)
        slots = [Slot(leaves.names(path), ref[...]) for path, ref in refs]
        if self.given and (diffs := leaves.differences(self._name, _outlines(slots), self.given)):
            raise ConfigError(
                f"{diffs[0].replace(' there', ' when resume() was given it')}: a Ref keeps what it is; write into it, "
                "ref[...] = value, and put no other in its place"
            )
        return slots, None

    def hold(self) -> Held:
        """Keep copies of what they hold."""
        slots, _ = self.slots()
        return Held(self.kind, [slot.value for slot in slots], lambda: (slots, None), self.given)

    def assign(self, values: list[Any], entry: Mapping[str, Any]) -> None:
        """Write into every ref."""
        for ref, value in zip(jax.tree.leaves(self._target), values, strict=True):
            ref[...] = value


class ObjectPart(Part):
    """An object that gives and takes its state as plain data."""

    kind = "object"

    def __init__(self, get: Callable[[], Any], set_: Callable[[Any], Any]) -> None:
        self._get, self._set = get, set_
        self.given: dict[str, Record] = {}

    def slots(self) -> tuple[list[Slot], Any]:
        """Return the arrays of the object's state and the skeleton around them."""
        skeleton, values = encode(self._get())
        return [Slot((str(index),), value) for index, value in enumerate(values)], skeleton

    def hold(self) -> Held:
        """Keep a copy of the state."""
        slots, skeleton = self.slots()
        for slot in slots:
            slot.value = leaves.own(slot.value)
        return Held(self.kind, [slot.value for slot in slots], lambda: (slots, skeleton))

    def assign(self, values: list[Any], entry: Mapping[str, Any]) -> None:
        """Hand the object the state it gave."""
        self._set(decode(entry.get("skeleton"), values))


def _slots_of(variables: Iterable[tuple[tuple[Any, ...], Any, Any]]) -> list[Slot]:
    """Take variables of NNX apart: path, variable, its value."""
    from flax import nnx

    slots = []
    for path, variable, value in variables:
        prefix = tuple(str(key) for key in path)
        role = type(variable).__name__ if isinstance(variable, nnx.Variable) else ""
        for inner, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            slots.append(Slot(prefix + leaves.names(inner), leaf, role))
    return slots


def _outlines(slots: Iterable[Slot]) -> dict[str, Record]:
    return {leaves.key_of(slot.path): leaves.outline_of(slot.value) for slot in slots}


def _flat(value: Any) -> list[Slot]:
    """Take a value apart; a variable in an nnx.State is named, and has its role, as in the module that it is of."""
    slots = []
    flat = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda node: is_iterator(node) or _is_nnx(node))[0]
    moments = _optax_states(value) if any(_is_nnx(leaf) for _, leaf in flat) else []
    for path, leaf in flat:
        if _is_nnx(leaf):
            role = "OptVariable" if any(path[: len(root)] == root for root in moments) else type(leaf).__name__
            inner = jax.tree_util.tree_flatten_with_path(leaf)[0]
            slots += [Slot(leaves.names((*path, *below[1:])), item, role) for below, item in inner]
        else:
            slots.append(Slot(leaves.names(path), leaf))
    return slots


def _optax_states(value: Any) -> list[tuple[Any, ...]]:
    """Return where a value holds states of optax: what looks like a parameter there is none."""

    def is_optax(node: Any) -> bool:
        return type(node).__module__.split(".")[0] == "optax"

    return [path for path, node in jax.tree_util.tree_flatten_with_path(value, is_leaf=is_optax)[0] if is_optax(node)]


def part_of(name: str, value: Any) -> Part:
    """Recognise what kind of part a value is.

    Raises:
        ConfigError: If it cannot be saved and rewound, with the remedy.
    """
    try:
        nodes = jax.tree.leaves(value, is_leaf=lambda node: is_iterator(node) or _is_nnx(node) or _is_state(node))
    except (TypeError, ValueError) as error:  # keys that cannot be sorted, such as 1 and '1'
        raise ConfigError(f"part {name!r} is no pytree that JAX can flatten: {error}") from None
    if any(map(_is_nnx, nodes)):
        _refuse_mixture(name, value, _is_nnx, "NNX objects")
        from flax import nnx

        return NnxPart(name, [value] if isinstance(value, nnx.Variable) else value)  # NNX has no state of one
    if any(map(_is_ref, nodes)):
        _refuse_mixture(name, value, _is_ref, "jax.Ref")
        return RefPart(name, value)
    if (position := position_of(value)) is not None:
        if why := unsound(value):
            raise ConfigError(f"{name!r} is {why}")
        return ObjectPart(*position)
    functions = _holds_equinox(value)
    for slot in _flat(value):
        if not (leaves.is_leaf(slot.value) or (functions and callable(slot.value))):
            raise ConfigError(refusal("/".join((name, *slot.path)), slot.value))
    # The variables of nnx.state(model) are the model's own, and would be trained with it until the first restart.
    return ValuePart(name, jax.tree.map(lambda leaf: leaf, value) if any(map(_is_state, nodes)) else value)


@lru_cache(1 << 10)
def _of_nnx(kind: Any) -> bool:
    return any(base.__module__.startswith("flax.nnx") for base in kind.__mro__)


def _is_nnx(value: Any) -> bool:
    # Compared by module name first: a program that never imports NNX must not pay for importing it here.
    kind: Any = type(value)
    if not _of_nnx(kind):
        return False
    from flax import nnx

    return isinstance(value, nnx.Pytree | nnx.Variable)


def _is_state(value: Any) -> bool:
    """Tell an nnx.State, which is a value: variables that a functional loop takes out of a module and puts back."""
    return type(value).__name__ == "State" and type(value).__module__.startswith("flax.nnx")


def _is_ref(value: Any) -> bool:
    return isinstance(value, jax.Ref)


def _holds_equinox(value: Any) -> bool:
    """Tell whether a tree holds an Equinox module, in which functions are leaves: they are code, and stay."""

    def is_module(node: Any) -> bool:
        return any(base.__module__.startswith("equinox.") for base in type(node).__mro__)

    return "equinox" in sys.modules and any(
        map(is_module, jax.tree.leaves(value, is_leaf=lambda node: is_iterator(node) or is_module(node)))
    )


def is_iterator(value: Any) -> bool:
    """Tell an iterator, by its type: a dict may have its items as attributes, and raise KeyError for others."""
    # Named a leaf before JAX sees it: JAX warns of iterators in trees and will refuse them in words of its own.
    return hasattr(type(value), "__next__")


def _refuse_mixture(name: str, value: Any, is_kind: Callable[[Any], bool], kinds: str) -> None:
    """Refuse a container of what is changed in place and plain leaves, which could not be restored there."""
    for path, node in jax.tree_util.tree_flatten_with_path(value, is_leaf=is_kind)[0]:
        if not is_kind(node):
            where = "/".join((name, *leaves.names(path)))
            raise ConfigError(
                f"part {name!r} mixes {kinds} with plain values ({where} is {leaves.kind_of(node)}): "
                "give them to resume() as two parts"
            )


def refusal(where: str, value: Any) -> str:
    """Say why a leaf cannot be a part and what to do."""
    what = leaves.kind_of(value)
    if isinstance(value, np.ma.MaskedArray):
        return f"{where!r} is a masked array, whose mask would be lost: pass its data and its mask as two arrays"
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        whose = "JAX" if isinstance(value, jax.Array) else "numpy"
        newer = "a newer tensorstore writes it, or " if value.dtype.name in leaves.DTYPES else ""
        return (
            f"{where!r} is a {whose} array of dtype {value.dtype}, which a checkpoint cannot hold: "
            f"{newer}encode it as numbers of a usual dtype"
        )
    if isinstance(value, (*leaves.NUMBERS, str, bytes)):
        plain = next(kind for kind in (int, float, complex, str, bytes) if isinstance(value, kind)).__name__
        return f"{where!r} is {what}, of which only the plain value could be saved: pass {plain}(...) of it"
    if isinstance(value, set | frozenset):
        return (
            f"{where!r} is {what}, which has no order that a restart could keep: pass "
            "dict.fromkeys(sorted(...), True), which answers `in` as fast, or a sorted list"
        )
    if what == "a torch.Tensor":
        return f"{where!r} is a torch.Tensor: pass its numbers, tensor.numpy(), and make it again with torch.from_numpy"
    if position_of(value) is not None:
        return f"{where!r} is {what} inside a container: give it to resume() as a part of its own"
    if is_iterator(value):
        return (
            f"{where!r} is {what}, which cannot be rewound: iterate a Grain dataset "
            "(iter(grain.MapDataset.source(...).shuffle(seed=0).batch(32).to_iter_dataset())), make "
            "jobkit.Batches(lambda seed, epoch: ...) of what makes it, or give it state_dict() and load_state_dict()"
        )
    if what == "a torch.utils.data.dataloader.DataLoader":
        return (
            f"{where!r} is {what}, which has no position: make a "
            "torchdata.stateful_dataloader.StatefulDataLoader, without generator=, which has one, or "
            "jobkit.Batches(lambda seed, epoch: DataLoader(..., generator=torch.Generator().manual_seed(seed)))"
        )
    if hasattr(type(value), "__iter__"):
        if type(value).__module__.startswith("grain."):
            return f"{where!r} is {what}, which has no position: make its iterator first and pass that, iter(...)"
        return (
            f"{where!r} is {what}, which has no position: make jobkit.Batches of what makes it anew for each epoch, "
            "jobkit.Batches(lambda seed, epoch: ...)"
        )
    return (
        f"{where!r} is {what}, which jobkit cannot save: pass NNX objects, pytrees of arrays and numbers, "
        "or objects with state_dict() and load_state_dict()"
    )

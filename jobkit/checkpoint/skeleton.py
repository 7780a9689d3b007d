"""The containers of a value part as plain data, for what a checkpoint holds in others than the program was given.

A list grows, `best=None` becomes an array: after a restart the program gives its first value again, and the containers
come from the checkpoint. dict, list, tuple and None are written down; a container of another type (a NamedTuple, a flax
struct, an optax state) is taken from where the program has it, so it must have been there from the start.
"""

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from enum import Enum
from typing import Any

import jax
from jax.tree_util import PyTreeDef, default_registry

from jobkit.errors import ConfigError

_AS_GIVEN, _LEAF = "=", "*"
_WRITTEN: dict[str, type] = {
    "list": list,
    "tuple": tuple,
    "dict": dict,
    "OrderedDict": OrderedDict,
    "defaultdict": defaultdict,
}
"""The containers that are written down; of the last the program has the factory."""
_TAKEN = "given"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum)


class MisfitError(Exception):
    """A skeleton asks for a container that the program does not have."""


@dataclass(frozen=True)
class _Node:
    """One container: its type, what JAX keeps of it besides children, and these by name."""

    kind: Any
    held: Any
    children: dict[Any, PyTreeDef]


def encode(part: str, now: PyTreeDef, given: PyTreeDef) -> Any:
    """Write the structure of a value down.

    Args:
        part: The part's name.
        now: The structure.
        given: The structure of what the program gave to resume(), and will give again after a restart.

    Returns:
        JSON, None where both are the same.

    Raises:
        ConfigError: If the structure could not be made again from that and `given`, with the place.
    """
    return None if _equal(now, given) else {"root": _encode(now, given, part)}


def decode(skeleton: Any, given: PyTreeDef) -> PyTreeDef:
    """Make the structure again.

    Args:
        skeleton: What `encode` returned, not None.
        given: The structure of what the program gave now.

    Raises:
        MisfitError: If `given` lacks a container that the skeleton takes from there.
        ConfigError: If `encode` has not written it.
    """
    try:
        return _decode(skeleton["root"], given)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ConfigError(f"the structure of a part is none that jobkit writes: {type(error).__name__}") from None


def _encode(now: PyTreeDef, given: PyTreeDef | None, where: str) -> Any:
    if given is not None and _equal(now, given):
        return _AS_GIVEN
    node, before = _node(now), _node(given)
    if node is None:
        return _LEAF
    if node.kind is type(None):
        return None
    same = before is not None and before.kind is node.kind
    below = before.children if before is not None and same else {}
    holds = [_encode(child, below.get(key), f"{where}/{key}") for key, child in node.children.items()]
    name = node.kind.__name__
    if node.kind in (list, tuple):
        return {name: holds}
    if _WRITTEN.get(name) is node.kind and all(map(_is_plain_key, node.children)):
        if node.kind is not defaultdict or same:
            return {name: [list(pair) for pair in zip(node.children, holds, strict=True)]}
    elif before is not None and same and [*node.children] == [*below]:
        if change := _changed(before, node):
            raise ConfigError(
                f"{where}, a {name}, has static data that has changed ({change}), which is not saved: after a restart "
                "it would be as at the start; make it a leaf of the tree, a number or an array"
            )
        return {_TAKEN: _full_name(node.kind), "holds": holds}
    raise ConfigError(
        f"{where} was {_describe(before)} when resume() was given it and is {_describe(node)} now, which could not be "
        "made again after a restart: give resume() a value that has it from the start, or keep it in dicts and lists"
    )


def _decode(skeleton: Any, given: PyTreeDef | None) -> PyTreeDef:
    if skeleton == _AS_GIVEN:
        if given is None:
            raise MisfitError("what the program had from the start")
        return given
    if skeleton is None or skeleton == _LEAF:
        return jax.tree.structure(skeleton)
    before = _node(given)
    if _TAKEN in skeleton:
        holds = skeleton["holds"]
        if before is None or _full_name(before.kind) != skeleton[_TAKEN] or len(before.children) != len(holds):
            raise MisfitError(f"a {skeleton[_TAKEN]}")
        return _made(before.kind, before.held, list(map(_decode, holds, before.children.values())))
    ((name, content),) = skeleton.items()
    kind = _WRITTEN[name]
    pairs = list(enumerate(content)) if kind in (list, tuple) else [(_key(key), child) for key, child in content]
    below = before.children if before is not None and before.kind is kind else {}
    children = [_decode(child, below.get(key)) for key, child in pairs]
    held: Any = None
    if kind in (dict, OrderedDict):
        held = [key for key, _ in pairs] if kind is dict else tuple(key for key, _ in pairs)
    elif kind is defaultdict:
        if before is None or before.kind is not kind:
            raise MisfitError("a defaultdict")
        held = (before.held[0], tuple(key for key, _ in pairs))
    return _made(kind, held, children)


def _node(structure: PyTreeDef | None) -> _Node | None:
    """Return a container, None of a leaf and of nothing."""
    data = structure.node_data() if structure is not None else None
    if structure is None or data is None:
        return None
    kind, held = data
    children = structure.children()
    keys = held[1] if kind is defaultdict else getattr(kind, "_fields", held)
    named = isinstance(keys, list | tuple) and len(keys) == len(children)
    if kind not in (dict, OrderedDict, defaultdict) and not (named and all(type(key) is str for key in keys)):
        keys = range(len(children))
    return _Node(kind, held, dict(zip(keys, children, strict=True)))


def _made(kind: type, held: Any, children: list[PyTreeDef]) -> PyTreeDef:
    make = getattr(PyTreeDef, "from_node_data_and_children", None)  # JAX has renamed it
    make = make or PyTreeDef.make_from_node_data_and_children
    made: PyTreeDef = make(default_registry, (kind, held), children)
    return made


def _equal(one: PyTreeDef, other: PyTreeDef) -> bool:
    try:
        return bool(one == other)
    except Exception:  # static data that cannot be compared: an array
        return False


def _is_plain_key(key: Any) -> bool:
    return all(map(_is_plain_key, key)) if type(key) is tuple else key is None or type(key) in (bool, int, str)


def _key(key: Any) -> Any:
    """Return a dict's key from JSON, which has no tuples."""
    return tuple(map(_key, key)) if isinstance(key, list) else key


def _changed(before: _Node, node: _Node) -> str:
    """Say what plain value in a container's static data has changed, '' if none has.

    Functions are made anew often, and mean the same. An nnx.Variable's are notes for JAX's transformations.
    """
    if any(base.__name__ == "Variable" and base.__module__.startswith("flax.nnx") for base in node.kind.__mro__):
        return ""
    return _difference(before.held, node.held)


def _difference(was: Any, held: Any) -> str:
    if isinstance(was, _PLAIN) and isinstance(held, _PLAIN):
        return "" if repr(was) == repr(held) else f"{was!r} became {held!r}"
    if type(was) is not type(held) or not isinstance(was, list | tuple | dict):
        return ""
    if len(was) != len(held) or (isinstance(was, dict) and was.keys() != held.keys()):
        return f"{was!r} became {held!r}"
    pairs = ((was[key], held[key]) for key in was) if isinstance(was, dict) else zip(was, held, strict=True)
    return next(filter(None, (_difference(*pair) for pair in pairs)), "")


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _describe(node: _Node | None) -> str:
    if node is None:
        return "a leaf or absent"
    return "None" if node.kind is type(None) else f"a {node.kind.__name__} of {len(node.children)}"

"""Objects with a position: they give their state as plain data and take it back, in place.

Grain's get_state/set_state, state_dict/load_state_dict (torchdata's StatefulDataLoader, or a class of the user's own),
the random generators of numpy and Python, a deque. Their state becomes JSON, with the arrays taken out.
"""

import collections
import contextlib
import importlib
import random
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jobkit.checkpoint.leaves import is_leaf, kind_of
from jobkit.data.epoch import Epoch
from jobkit.errors import ConfigError

_POSITIONS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))


def position_of(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """Return what gives an object's state and what takes it, None if it has none."""
    if isinstance(value, np.random.BitGenerator | np.random.Generator):
        bits = value if isinstance(value, np.random.BitGenerator) else value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, collections.deque):
        return lambda: list(value), lambda items: _refill(value, items)
    for names in _POSITIONS:
        get, set_ = (_method(value, name) for name in names)
        if get is not None and set_ is not None:
            return get, set_
    return None


def unsound(value: Any) -> str:
    """Say why an object's position does not lead to the same data again, and what to do; '' where that is not known.

    A StatefulDataLoader of torchdata restores the order of the epoch that it is in. Those that follow are the same only
    if its sampler keeps a generator for itself, in torchdata's own class: of `generator=` the seeds of the workers are
    drawn too, and a random sampler of PyTorch has no state (torchdata 0.11). An IterableDataset of Hugging Face's takes
    up its state only as it is gone through, in each later epoch again, and without what its shuffle buffer held
    (datasets 5.2).
    """
    if kind_of(value) == "a datasets.iterable_dataset.IterableDataset":
        return (
            "an IterableDataset of Hugging Face's, whose state lacks its shuffle buffer and is used again by the next "
            "epoch: make jobkit.Batches(lambda seed, epoch: data.shuffle(seed=seed).iter(32)) of it"
        )
    if kind_of(value) != "a torchdata.stateful_dataloader.stateful_dataloader.StatefulDataLoader":
        return ""
    sampler, generator = getattr(value, "sampler", None), getattr(value, "generator", None)
    shared = generator is not None and getattr(sampler, "generator", None) is generator
    stateless = type(sampler).__module__ == "torch.utils.data.sampler" and hasattr(sampler, "generator")
    if not (shared or stateless):
        return ""
    return (
        f"a StatefulDataLoader with {'generator=...' if shared else f'a {type(sampler).__name__} of PyTorch'}, whose "
        "next epochs come in another order after a restart: call torch.manual_seed(...) and make it with shuffle=True, "
        "without those, or jobkit.Batches(lambda seed, epoch: DataLoader(..., "
        "generator=torch.Generator().manual_seed(seed)))"
    )


def _refill(value: collections.deque[Any], items: list[Any]) -> None:
    value.clear()
    value.extend(items)


def _method(value: Any, name: str) -> Callable[..., Any] | None:
    """Return a method of an object; a dict may have its items as attributes, and raise KeyError for others."""
    try:
        method = getattr(value, name) if not isinstance(value, Mapping) or hasattr(type(value), name) else None
    except Exception:  # whatever the program's own __getattr__ raises
        return None
    return method if callable(method) else None


def encode(value: Any) -> tuple[Any, list[Any]]:
    """Take an object's state apart into JSON and the leaves that it has none for.

    Raises:
        ConfigError: If the state holds what cannot be written down.
    """
    leaves: list[Any] = []
    return _encode(value, leaves), leaves


def _encode(value: Any, leaves: list[Any]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, Epoch):
        return int(value)
    if isinstance(value, list):
        return [_encode(item, leaves) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, leaves) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_encode(key, leaves), _encode(item, leaves)] for key, item in value.items()]}
    kind = "leaf"
    if _is_tensor(value):
        kind = "tensor"
        with contextlib.suppress(TypeError, RuntimeError, BufferError):  # bfloat16, on a GPU, sparse
            value = _array_of(value.detach())
    if not is_leaf(value):
        content = kind_of(value) if kind == "leaf" else f"{kind_of(value)} of {value.dtype} on {value.device}"
        raise ConfigError(
            f"an object's state holds {content}, which jobkit cannot save: its state_dict() or get_state() may hold "
            "numbers, text, bytes, arrays, torch tensors of usual dtypes on the CPU, lists, tuples and dicts"
        )
    leaves.append(value)
    return {kind: len(leaves) - 1}


def decode(node: Any, leaves: list[Any]) -> Any:
    """Put an object's state together again.

    Args:
        node: What `encode` returned.
        leaves: The leaves, in its order.

    Raises:
        ConfigError: If `encode` has not written it.
    """
    try:
        return _decode(node, leaves)
    except (KeyError, ValueError, TypeError, IndexError, RecursionError) as error:
        raise ConfigError(f"the state of an object is none that jobkit writes: {type(error).__name__}") from None


def _decode(node: Any, leaves: list[Any]) -> Any:
    if isinstance(node, list):
        return [_decode(item, leaves) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tuple":
        return tuple(_decode(item, leaves) for item in content)
    if kind == "dict":
        pairs = ((_decode(key, leaves), _decode(item, leaves)) for key, item in content)
        return {tuple(key) if isinstance(key, list) else key: item for key, item in pairs}
    if kind == "tensor":
        return _tensor_of(np.array(leaves[content]))
    return leaves[content]


def _array_of(tensor: Any) -> np.ndarray:
    """Return a tensor's values, also of a PyTorch that was built for an older numpy than this one."""
    try:
        array: np.ndarray = tensor.numpy()
    except RuntimeError:
        array = np.from_dlpack(tensor)
    return array


def _tensor_of(array: np.ndarray) -> Any:
    torch = importlib.import_module("torch")
    try:
        return torch.from_numpy(array)
    except RuntimeError:
        return torch.from_dlpack(array)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # whose tensors nobody has who has not imported it
    return torch is not None and isinstance(value, torch.Tensor)

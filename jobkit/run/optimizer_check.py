"""Was the optimizer's state given to resume()? Without it a resumed training goes another way, silently."""

import re
from collections.abc import Mapping
from typing import Any

import jax

from jobkit.checkpoint.kinds import is_iterator
from jobkit.checkpoint.leaves import names

_WORDS = re.compile("(opt|optim|optimi[sz]er)(_?state)?s?", re.IGNORECASE)
"""What programs call it. To be sure of what is meant matters less than to refuse nobody who has given it."""
_NNX = ("Optimizer", "ModelAndOptimizer", "OptState", "OptArray", "OptVariable")


def has_optimizer(parts: Mapping[str, Any]) -> bool:
    """Tell whether any part is or holds an optimizer's state: optax's, NNX's, in a State, or one that is named so."""
    return any(_WORDS.fullmatch(name) or _holds_optimizer(value) for name, value in parts.items())


def _holds_optimizer(value: Any) -> bool:
    leaves = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda node: is_iterator(node) or _is_optimizer(node))
    return any(_is_optimizer(leaf) or any(map(_WORDS.fullmatch, names(path))) for path, leaf in leaves[0])


def _is_optimizer(node: Any) -> bool:
    return type(node).__module__.split(".")[0] == "optax" or type(node).__name__ in _NNX

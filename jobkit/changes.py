"""Did the program train what it resumed? A program that trains a copy would save the same state for ever."""

import weakref
from collections.abc import Mapping

import jax

from jobkit import state
from jobkit.errors import ConfigError


class Changes:
    """Weak references to the arrays that a run resumed with: by the first boundary training must have replaced some.

    Args:
        parts: The run's parts, as they were resumed.
    """

    def __init__(self, parts: Mapping[str, state.Part]) -> None:
        self._parts = parts
        self._leaves = {
            name: [weakref.ref(slot.value) for slot in part.slots()[0] if isinstance(slot.value, jax.Array)]
            for name, part in parts.items()
            if part.kind != "object"
        }

    def warning(self) -> str:
        """Say, once after the first step, which parts it left as they were; '' if all changed.

        Raises:
            ConfigError: If it changed none: nothing of the training would ever be saved.
        """
        same = []
        leaves, self._leaves = self._leaves, {}
        for name, before in leaves.items():
            now = [slot.value for slot in self._parts[name].slots()[0] if isinstance(slot.value, jax.Array)]
            if (
                before
                and len(now) == len(before)
                and all(ref() is value for ref, value in zip(before, now, strict=True))
            ):
                same.append(name)
        if not same:
            return ""
        told = f"the first step changed nothing in {', '.join(same)}: the program trains a copy of it"
        remedy = "assign the new values, run.state.NAME = ..., or update the NNX object itself"
        if len(same) == sum(1 for before in leaves.values() if before):
            raise ConfigError(f"{told}, which would never be saved: {remedy}")
        return f"warning: {told}? If so {remedy}"

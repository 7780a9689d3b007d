"""`run.state`: the value parts of a run, by name."""

from typing import Any

from jobkit.checkpoint.kinds import ValuePart
from jobkit.data.epoch import Epoch
from jobkit.errors import ConfigError


class Values:
    """`run.state`: the value parts of a run by name; assign a new value after each step.

    `run.state.train, metrics = train_step(run.state.train, batch)`
    """

    def __init__(self, parts: dict[str, ValuePart]) -> None:
        object.__setattr__(self, "_parts", parts)

    def __getattr__(self, name: str) -> Any:
        return self._part(name).value

    def __setattr__(self, name: str, value: Any) -> None:
        self._part(name).value = int(value) if isinstance(value, Epoch) else value

    def __dir__(self) -> list[str]:
        return sorted(self._parts)

    def _part(self, name: str) -> ValuePart:
        parts: dict[str, ValuePart] = object.__getattribute__(self, "_parts")
        if name not in parts:
            known = ", ".join(sorted(parts)) or "none; NNX objects and iterators are changed in place"
            raise ConfigError(f"run.state has no value part {name!r} (it has: {known}): give it to resume({name}=...)")
        return parts[name]

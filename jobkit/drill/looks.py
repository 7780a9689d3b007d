"""What a probe sees of a program at one step, as it stands in the ledger. Knows neither jax nor numpy."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import msgspec


class Kind(StrEnum):
    """What a value is to a training."""

    RNG = "rng"
    ITERATOR = "iterator"
    ARRAY = "array"
    NUMBER = "number"


class Variable(msgspec.Struct, frozen=True, array_like=True):
    """What the program holds by one name, outside of its parts.

    Args:
        kind: What it is.
        crc: Its fingerprint.
        line: Which line writes it, None if none does.
        live: Whether it is read again before it is written.
        copy: Whether there are arrays in it, and all of them are the parts' own as well.
        taken: Whether it is what an iterator gave.
    """

    kind: Kind
    crc: str
    line: int | None = None
    live: bool = True
    copy: bool = False
    taken: bool = False


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """Fingerprints of all that the next step may depend on.

    Args:
        step: Completed steps.
        parts: Of each leaf of the parts.
        outside: What is outside of them, by name and place.
        rngs: The parts that are generators.
        random: Of Python's global generator.
        numpy: Of numpy's.
        torch: Of PyTorch's, where the program has imported it.
        drawn: Which of the first two have been drawn from.
        files: How each file was opened so far: 'r', 'w' or 'rw'.
        threads: The program's own functions that run in threads.
    """

    step: int
    parts: dict[str, str]
    outside: dict[str, Variable]
    random: str
    numpy: str
    torch: str = ""
    rngs: list[str] = []
    drawn: list[str] = []
    files: dict[str, str] = {}
    threads: list[str] = []

    def fingerprint(self, name: str) -> str | None:
        """Return that of a variable, or of a global generator; None if there is none."""
        variable = self.outside.get(name)
        generators = {"random": self.random, "numpy": self.numpy, "torch": self.torch}
        return variable.crc if variable is not None else generators.get(name)

    def to_event(self) -> dict[str, Any]:
        """Return the fields of its `probed` event."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields


Looks = dict[int, Look]
"""By step."""


def read(events: Iterable[dict[str, Any]]) -> Looks:
    """Read the looks among the events of an attempt."""
    looks = (msgspec.convert(event, Look) for event in events if event["event"] == "probed")
    return {look.step: look for look in looks}

"""What a person asks of a run from outside: small files in its directory, which whoever runs there looks for.

    cancel.json     stop in good order; a launcher starts nothing any more while it is there
    save.json       commit the step in progress, and go on

`jobkit stop`, `cancel` and `save` write them, on the run's URL where it has one; the mirror brings them into the home
of the node that trains. Each is served once, by the attempt that lived when it came: what an attempt finds at its start
was said to an earlier one, which has served it or died of it. So a SIGKILL at any instant drops a request or has served
it, and no request is served twice.
"""

import contextlib
import json
from typing import Any, Self

from jobkit import contract, mirror
from jobkit.errors import JobkitError
from jobkit.storage import Store

_HEAR_S = 10.0
"""How long a bucket may take to tell what was asked before."""


class Control:
    """Hears what is asked of a run from now on.

    Args:
        store: The run directory.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[str, bytes | None] = {}
        for name in (contract.CANCEL, contract.SAVE):
            self._seen[name] = self._read(name)

    @classmethod
    def after_hearing(cls, store: Store) -> Self:
        """Hear what is asked from now on; what lies on the run's URL already was said to an earlier attempt."""
        for name in (contract.CANCEL, contract.SAVE):
            with contextlib.suppress(JobkitError, OSError):  # a bucket that does not answer just now
                mirror.hear(store.with_deadline(_HEAR_S), name)
        return cls(store)

    def new(self, name: str) -> dict[str, Any] | None:
        """Return a request that nobody has heard before, once; None if there is none.

        Args:
            name: `contract.CANCEL` or `contract.SAVE`.
        """
        content = self._read(name)
        if content == self._seen[name]:
            return None
        self._seen[name] = content
        if content is None:
            return None
        try:
            told = json.loads(content)
        except ValueError:
            told = None
        return told if isinstance(told, dict) else {}  # made by hand: `touch save.json`

    def _read(self, name: str) -> bytes | None:
        try:
            return self._store.read(name)
        except FileNotFoundError:
            return None
        except OSError:
            return self._seen.get(name)  # a shared disk that does not answer just now


def says_stop(told: dict[str, Any]) -> str:
    """Say who asked a run to end: 'stopped by ada@login1'."""
    word = "stopped" if told.get("word") == "stopped" else "cancelled"
    return f"{word} by {told['by']}" if told.get("by") else word

"""What a person asks of a run from outside: small files in its directory, which whoever runs there looks for.

    cancel.json     stop in good order; a launcher starts nothing any more while it is there
    save.json       commit the step in progress, and go on

`jobkit stop`, `cancel` and `save` write them, on the run's URL where it has one; the mirror brings them into the home
of the node that trains. Each is served once, by the attempt that lived when it came: what was there before an attempt
was claimed was said to an earlier one, which has served it or died of it. So a SIGKILL at any instant drops a request
or has served it, and no request is served twice. A launcher claims none while there is a cancel: one that its attempt
finds has come since.
"""

from typing import Any, Self

from jobkit import contract, decode
from jobkit.errors import JobkitError
from jobkit.rundir import mirror
from jobkit.rundir.store import Store

_HEAR_S = 10.0
"""How long a bucket may take to tell a launched attempt what was asked before."""


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
    def of_attempt(cls, store: Store, given: int | None) -> Self:
        """Hear what is asked of an attempt; made before it is claimed, since as soon as it is somebody may ask.

        Args:
            store: The run directory.
            given: Its number, if a launcher has claimed it; such an attempt need not wait for a bucket.

        Raises:
            JobkitError: If the run's URL, on which the attempt is to be claimed, cannot be read.
        """
        for name in (contract.CANCEL, contract.SAVE):
            try:
                mirror.fetch_request(store if given is None else store.with_deadline(_HEAR_S), name)
            except JobkitError:
                if given is None:
                    raise
        control = cls(store)
        if given is not None:
            control._seen[contract.CANCEL] = None
        return control

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
        return decode.fields(decode.json_object(content) or {})  # made by hand: `touch save.json`

    def _read(self, name: str) -> bytes | None:
        try:
            return self._store.get(name)
        except JobkitError:
            return self._seen.get(name)  # a shared disk that does not answer just now


def says_stop(told: dict[str, Any]) -> str:
    """Say who asked a run to end: 'stopped by ada@login1'."""
    word = "stopped" if told.get("word") == "stopped" else "cancelled"
    return f"{word} by {told['by']}" if told.get("by") else word

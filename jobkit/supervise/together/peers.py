"""What the processes of an attempt tell each other on the run's URL while they run, and at the end.

`broken.json`, which the first one creates that ended badly, is all that the others look for: they need not wait for it
then. How each ended its supervisor writes to `process-<i>.json`, and process 0 leaves last.
"""

import contextlib
import threading
import time

from jobkit import contract, decode
from jobkit.errors import JobkitError
from jobkit.rundir.apart import whole
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store
from jobkit.supervise.together.gathering import break_up, is_claimed

_ASK_S = 3.0
_ANSWER_S = 10.0
PARTING_S = 60.0
"""How long process 0 stays for the others, which have nothing left to do but to say how they ended."""


class Peers:
    """The other processes of an attempt, as one of them sees them; of a run that is not on a URL, nobody.

    Args:
        store: The run.
        attempt: Number of the attempt.
        index: Of this process.
        count: How many processes the attempt has.
    """

    def __init__(self, store: Store, attempt: int, index: int, count: int) -> None:
        self._store, self._attempt, self._index, self._count = store, attempt, index, count
        self._remote = store.with_deadline(_ANSWER_S).remote if count > 1 else None
        self._closing = threading.Event()
        self.gathered = False
        """Whether all of them have come."""
        self.lost: tuple[str, str] | None = None
        """Why this process has to end, as source and reason of a notice: one of the others has ended badly, or a newer
        attempt has begun."""

    @property
    def apart(self) -> bool:
        """Whether there are others, which share nothing but the URL."""
        return self._remote is not None

    def start(self) -> None:
        """Begin to look after them, all having come, in a thread."""
        self.gathered = True
        if self._remote is not None:
            threading.Thread(target=self._watch, args=(self._remote,), name="jobkit-peers", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closing.set()

    def _watch(self, remote: Remote) -> None:
        name = contract.broken_file(self._attempt)
        while self.lost is None and not self._closing.wait(_ASK_S):
            try:
                if is_claimed(remote, self._attempt + 1):
                    self.lost = "superseded", f"attempt {self._attempt + 1} has begun"
                    continue
                content = remote.read(name)
                word = decode.json_object(content) or {}
                if word.get("process") != self._index:
                    self._store.write(name, content)  # for the program, which asks nobody (group.py:lost_process)
                    self.lost = "peer", f"process {word.get('process')} ended: {word.get('reason')}"
            except (JobkitError, FileNotFoundError):
                continue  # none has; and a bucket that does not answer tells nothing of the others

    def break_up(self, reason: str) -> None:
        """Tell the others that this process has ended badly, unless one has before."""
        if self._remote is not None:
            break_up(self._remote, self._attempt, self._index, reason)

    def wait(self, *, seconds: float = PARTING_S) -> None:
        """Stay, as process 0, until all others have said how they ended, or are lost; what they wrote is on the URL."""
        if self._remote is None or self._index or not self.gathered:
            return
        others = {*range(1, self._count)}
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(JobkitError):
                if is_claimed(self._remote, self._attempt + 1):  # nobody waits for this one any more
                    return
                if others <= whole.left(self._remote, self._attempt, others):
                    return
            if time.monotonic() >= deadline:
                return
            time.sleep(min(_ASK_S, max(0.1, deadline - time.monotonic())))

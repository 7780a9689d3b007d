"""Named points at which a drill or a test makes this process die.

`JOBKIT_FAULT=before_rename:2` sends SIGKILL to the process the second time it passes `before_rename`. Without
the variable a point costs one dictionary look-up. The points lie where a real SIGKILL hurts most; keeping them
in the product lets `jobkit drill` certify a user's own script with the same means as our tests.
"""

import os
import signal
from collections import Counter

from jobkit.contract import ENV_FAULT

POINTS = (
    "before_write",
    "during_write",
    "after_data",
    "before_rename",
    "after_rename",
    "before_retention",
    "during_retention",
    "during_restore",
)

_passes: Counter[str] = Counter()


def reach(point: str) -> None:
    """Pass a named point; die there by SIGKILL if the environment asks for it."""
    wanted = os.environ.get(ENV_FAULT)
    if not wanted:
        return
    name, _, count = wanted.partition(":")
    if name == point:
        _passes[point] += 1
        if _passes[point] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)

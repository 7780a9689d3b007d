"""Named points at which a drill or a test sends this process a signal.

`JOBKIT_FAULT=before_rename:2` sends SIGKILL to the process the second time it passes `before_rename`;
`during_write:3@0=TERM` sends SIGTERM the third time, in attempt 0 alone; `finished@0=KILL+0.5` half a second after it
was passed. Without the variable a point costs one dictionary look-up. The points lie where a real signal hurts most;
keeping them in the product lets `jobkit drill` certify a user's own script with the same means as our tests.
"""

import os
import re
import signal
import threading
from collections import Counter

from jobkit.contract import ENV_ATTEMPT, ENV_FAULT

POINTS = (
    "before_write",
    "during_write",
    "after_data",
    "before_rename",
    "after_rename",
    "before_retention",
    "during_retention",
    "during_restore",
    "resumed",
    "finished",
    "before_create",
    "after_create",
    "before_join",
    "after_join",
    "before_gathered",
    "after_gathered",
    "before_part",
    "after_part",
)
"""The last two are passed by supervisors that carry a process's part of a step to the run's URL, the four before them
by supervisors that gather, the two before these by a submit to a batch service, and by a job that submits its
successor. In a drill there is `step`, too: the beginning of each.
"""

FAULT = re.compile(r"(\w+)(?::(\d+))?(?:@(\d+))?(?:=([A-Z0-9]+))?(?:\+(\d+\.?\d*))?")
"""POINT[:COUNT][@ATTEMPT][=SIGNAL][+SECONDS]"""
_passes: Counter[str] = Counter()


def reach(point: str) -> None:
    """Pass a named point; take a signal there if the environment asks for it."""
    wanted = os.environ.get(ENV_FAULT)
    if not wanted:
        return
    fault = FAULT.fullmatch(wanted)
    if fault is None or fault[1] != point:
        return
    _passes[point] += 1
    if _passes[point] != int(fault[2] or 1) or fault[3] not in (None, os.environ.get(ENV_ATTEMPT)):
        return
    number = signal.Signals[f"SIG{fault[4] or 'KILL'}"]
    if fault[5] is None:
        os.kill(os.getpid(), number)
        return
    later = threading.Timer(float(fault[5]), os.kill, (os.getpid(), number))
    later.daemon = True
    later.start()

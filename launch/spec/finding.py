"""What `jobkit doctor` says of a place where runs are to go, whatever the place is."""

import msgspec

UNCHECKED = "not checked"


class Finding(msgspec.Struct, frozen=True):
    """One thing that a person should know.

    Args:
        topic: What it is about: 'preemption', 'bucket', ...
        text: A sentence.
        verdict: 'ok', 'warning' (a promise holds, but not as well as it could), 'fail' (a promise cannot be kept) or
            'not checked'.
        mend: The command that mends it, or that checks what could not be checked; empty where there is none.
    """

    topic: str
    text: str
    verdict: str = "ok"
    mend: str = ""

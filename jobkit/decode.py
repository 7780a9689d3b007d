"""What a file of a run says, which anybody may have written: JSON of a sane depth, with fields of the type they have.

A ledger is torn by a SIGKILL, an outcome edited by hand, a whole run copied from a stranger. What is read here is text
that can be printed, numbers that can be counted with and no structure that runs a reader out of its stack, or nothing.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

_DEEPEST = 50
_LONGEST_BYTES = 1 << 26
"""Of one line of a ledger; the longest of ours name every leaf of a model once."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def json_object(content: bytes, *, deepest: int = _DEEPEST, text: bool = True) -> dict[str, Any] | None:
    """Read a JSON object; None if it is none, or one that only makes trouble.

    Args:
        content: The bytes of a file, or of a line.
        deepest: How deep objects and lists may lie in one another.
        text: Whether people read it: then half a surrogate pair, which nothing prints, becomes a question mark.
    """
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or (
        content.count(b"[") + content.count(b"{") > deepest and _too_deep(value, deepest)
    ):
        return None
    if text and _SURROGATE.search(content):
        value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    return value  # type: ignore[no-any-return]


def event(line: bytes) -> dict[str, Any] | None:
    """Read one line of a ledger; None if it is torn, or is no event."""
    if len(line) > _LONGEST_BYTES:
        return None
    value = json_object(line)
    if value is None:
        return None
    entry = fields(value)
    return entry if _NEEDED.get(entry.get("event", ""), _NONE) <= entry.keys() >= _ALWAYS else None


def fields(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object without the fields that are null, or not of the type they have everywhere in a run."""
    return {name: content for name, content in value.items() if name not in _KINDS or _fits(name, content)}


def _fits(name: str, value: object) -> bool:
    kind = _KINDS[name]
    if kind is float:
        return _is_number(value)
    if kind is int:
        return _is_number(value) and isinstance(value, int)
    if name in ("values", "metrics", "longest_s"):
        return isinstance(value, dict) and all(type(one) is float or _counts(one) for one in value.values())
    return isinstance(value, kind)


def _counts(value: object) -> bool:
    """Tell whether a metric can be drawn; what is not finite is in a commit as text."""
    return value is None or isinstance(value, str) or _is_number(value)


def _is_number(value: object) -> bool:
    """Tell whether a value is a number that every reader can calculate with: no epoch of ours has 16 digits."""
    return type(value) in (int, float) and abs(value) < 1e15 and not math.isnan(value)  # type: ignore[arg-type]


def _too_deep(value: object, deepest: int) -> bool:
    level = [value]
    for _ in range(deepest):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True


_KINDS: dict[str, type] = (
    dict.fromkeys(
        (
            "step", "committed_step", "pid", "exit_code", "attempt", "process", "processes", "bytes", "lost_steps",
            "tries", "misses", "hits", "version", "total",
        ),
        int,
    )
    | dict.fromkeys(
        (
            "t", "at", "since", "seconds", "blocking_s", "durable_s", "waited_s", "budget_s", "deadline_s", "age_s",
            "started", "ended", "silent_since", "notice_to_commit_s", "after_s", "compile_s", "usual_s",
            "duration_s",
        ),
        float,
    )
    | dict.fromkeys(
        (
            "event", "source", "reason", "outcome", "node", "phase", "frame", "error", "host", "backend", "array",
            "how", "why", "choice", "word", "state", "target",
        ),
        str,
    )
    | {"values": dict, "metrics": dict, "longest_s": dict, "notice": dict, "leaves": list, "slow": list}
)  # fmt: skip
"""The fields that readers rely on; each is of one type wherever it is, or null."""
_ALWAYS = frozenset({"event", "t"})
_NONE: frozenset[str] = frozenset()
_NEEDED = {
    "saved": {"step"}, "restored": {"step"}, "rehearsed": {"step"}, "verified": {"step"}, "damaged": {"step"},
    "set_aside": {"step"}, "probed": {"step"}, "donated": {"step", "leaves"}, "metrics": {"step", "values"},
    "job": {"id"}, "step_times": {"usual_s", "slow"},
}  # fmt: skip
"""What an event has in any case, by its name."""

"""What a job asks SLURM itself: how long a preemption leaves it, where the program cannot be through at once.

SIGTERM comes KillWait before SIGKILL; of a preemption with a grace period it comes that much earlier still, and looks
the same. A program that stops at its next step needs to know neither. Where a step takes longer, SLURM is asked, so
that the step in progress is not given up too soon. At the end of the grace SLURM says SIGTERM again.
"""

import calendar
import os
import re
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

_SHARE = 1 / 3
"""Asked when so much of the least time there is has gone by: most programs have left by then, and nobody is asked."""
_ANSWER_S = 10.0
_LONGEST_S = 24 * 3600.0
"""A longer grace is none: of a job that ends in the year 9999, say."""
_SAFE_S = 1.0
"""SLURM tells whole seconds."""


def parse_pairs(printed: str) -> dict[str, str]:
    """Read one line of `Name=value Name=value`; values with spaces end before the next name.

    The first of equal names counts: what SLURM itself says of a job comes before the user's own text, such as the
    SubmitLine that 26.05 prints, which may hold anything.
    """
    pairs = re.findall(r"(\S+?)=(.*?)(?=\s+[A-Za-z][A-Za-z0-9/:_-]*=|\s*$)", printed.splitlines()[0] if printed else "")
    return dict(reversed(pairs))


def parse_time(text: str) -> float | None:
    """Read SLURM's local time, such as 2026-11-24T01:02:03; None for Unknown and the like."""
    parsed = _parse(text)
    return None if parsed is None else time.mktime(parsed)


def _parse(text: str) -> time.struct_time | None:
    try:
        return time.strptime(text, "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return None


def preemption_s(job: Mapping[str, str], partition: Callable[[], Mapping[str, str]]) -> float | None:
    """Return how long after the notice SLURM ends a job that it preempts; None if it is not being preempted so.

    By SLURM's own clock alone, which may differ from ours. Of a job without a time limit it does not tell the end.

    Args:
        job: Names and values of `scontrol -o show job`.
        partition: Returns those of the job's partition.
    """
    begun = _parse(job.get("PreemptTime", ""))
    if job.get("JobState") not in ("RUNNING", "SIGNALING") or begun is None:
        return None
    end = _parse(job.get("EndTime", ""))
    if end is not None:  # as a clock shows them: where it is put back or forward between them, the less
        return max(0.0, float(calendar.timegm(end) - calendar.timegm(begun)))
    grace = partition().get("GraceTime", "")
    return float(grace) if grace.isdecimal() else None


class DeadlineExtension:
    """Asks SLURM once, on a thread of its own, how long a signal that has come leaves.

    Args:
        environ: Of a job of SLURM's; elsewhere there is nobody to ask.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._job = environ.get("SLURM_JOB_ID") if shutil.which("scontrol") else None
        self._answers: deque[float] = deque()  # filled by the thread

    def begin(self, least_s: float | None) -> None:
        """Ask a little after a signal.

        Args:
            least_s: How long it leaves at least; None where nobody said.
        """
        job, self._job = self._job, None
        if job is not None and least_s is not None:
            threading.Thread(target=self._ask, args=(job, least_s), name="jobkit-slurm-grace", daemon=True).start()

    def deadline_at(self) -> float | None:
        """Return, once, when the program is killed, on the clock of `time.monotonic`; None while nobody has said."""
        return self._answers.popleft() if self._answers else None

    def _ask(self, job: str, least_s: float) -> None:
        came_at = time.monotonic()
        time.sleep(least_s * _SHARE)
        fields = _show("job", job)
        left_s = preemption_s(fields, lambda: _graces(fields.get("Partition", "")))
        if left_s is not None and left_s <= _LONGEST_S:
            self._answers.append(came_at + left_s + least_s - _SAFE_S)


def _graces(partition: str) -> dict[str, str]:
    """Return what SLURM says of a partition; nothing where its QOS decides how a job is preempted."""
    return {} if "preempt/qos" in _ask("show", "config") else _show("partition", partition)


def _show(kind: str, name: str) -> dict[str, str]:
    return parse_pairs(_ask("-o", "show", kind, name))


def _ask(*words: str) -> str:
    """Return what scontrol says; nothing where it does not answer."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True, timeout=_ANSWER_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout

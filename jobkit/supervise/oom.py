"""How much memory there is, and whether the kernel has killed for want of it: an OOM kill looks like any SIGKILL.

The kernel counts its kills in each control group (docs.kernel.org: cgroup-v2, memory.events; cgroup-v1, oom_control)
and for the whole machine (/proc/vmstat).
"""

import contextlib
from pathlib import Path

from jobkit.units import show_size


class Memory:
    """Counts kills from now on, in the control group that this process and its children are in.

    Args:
        proc: /proc.
        cgroups: Where control groups are mounted.
    """

    def __init__(self, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        self._counter = next((path for path in _counters(proc, cgroups) if _count(path) is not None), None)
        self._before = _count(self._counter) or 0
        self._proc = proc

    def killed(self) -> bool:
        """Tell whether the kernel has killed since; False where it does not say."""
        return (_count(self._counter) or 0) > self._before

    def limit(self) -> str:
        """Say the limit of the control group, ' (limit 536.9 MB)'; empty where there is none that can be read."""
        limit = self._number("memory.max", "memory.limit_in_bytes")
        return "" if limit is None else f" (limit {show_size(limit)})"

    def spare_bytes(self) -> int:
        """Return how much is left, of the machine's and of the control group's; 0 where it is not told."""
        try:
            lines = (self._proc / "meminfo").read_text().splitlines()
            left = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        except (OSError, ValueError, StopIteration):
            return 0
        limit = self._number("memory.max", "memory.limit_in_bytes")
        if limit is not None:
            left = min(left, limit - (self._number("memory.current", "memory.usage_in_bytes") or limit))
        return max(0, left)

    def _number(self, *names: str) -> int | None:
        """Read a number of the control group, by its name in either version; None where there is none."""
        for name in names:
            with contextlib.suppress(OSError, ValueError):  # no such file, or 'max'
                number = int((self._counter.parent / name).read_text()) if self._counter else 0
                if 0 < number < 1 << 60:  # version 1 says "none" with a number near 2^63
                    return number
        return None


def _counters(proc: Path, cgroups: Path) -> list[Path]:
    """Return where the kills may be counted, the most exact first.

    In a container the path that /proc tells may be the host's, while its own group is what is mounted.
    """
    counters = []
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = cgroups, "memory.events"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.oom_control"
        else:
            continue
        counters += [root / path.lstrip("/") / name, root / name]
    return [*counters, proc / "vmstat"]


def _count(counter: Path | None) -> int | None:
    """Read the number of kills, None where it is not told."""
    try:
        lines = counter.read_text().splitlines() if counter else []
        return next((int(line.split()[1]) for line in lines if line.split()[0] == "oom_kill"), None)
    except (OSError, ValueError, IndexError):
        return None

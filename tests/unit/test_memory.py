"""Kills for want of memory, as the kernel counts them in either version of its control groups."""

from pathlib import Path

import pytest

from jobkit.supervise.oom import Memory

V2 = "0::/jobs/1\n"
V1 = "5:cpu:/jobs/1\n3:hugetlb,memory:/jobs/1\n0::/init\n"


@pytest.mark.parametrize(
    ("group", "counter", "limit"),
    [
        (V2, "jobs/1/memory.events", "memory.max"),
        (V2, "memory.events", "memory.max"),  # in a container: its own group is what is mounted
        (V1, "memory/jobs/1/memory.oom_control", "memory.limit_in_bytes"),
        (V1, "memory/memory.oom_control", "memory.limit_in_bytes"),
    ],
)
def test_kills_are_counted(group: str, counter: str, limit: str, tmp_path: Path) -> None:
    """A count that has risen since tells, whichever version of control groups there is."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text(group)
    (tmp_path / "vmstat").write_text("oom_kill 99\n")
    path = tmp_path / counter
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("low 3\noom 4\noom_kill 2\n")
    (path.parent / limit).write_text("536870912\n")
    memory = Memory(tmp_path, tmp_path)
    assert not memory.killed()
    path.write_text("low 3\noom 5\noom_kill 3\n")
    assert memory.killed()
    assert memory.limit() == " (limit 536.9 MB)"
    (tmp_path / "meminfo").write_text("MemTotal: 4194304 kB\nMemAvailable: 2097152 kB\n")
    used = "memory.current" if group == V2 else "memory.usage_in_bytes"
    (path.parent / used).write_text("436870912\n")
    assert memory.spare_bytes() == 100_000_000
    (path.parent / limit).write_text("max\n" if group == V2 else "9223372036854771712\n")
    assert memory.limit() == ""
    assert memory.spare_bytes() == 1 << 31


def test_without_control_groups(tmp_path: Path) -> None:
    """The machine's own count is what is left; without it nothing is said."""
    assert not Memory(tmp_path, tmp_path).killed()
    (tmp_path / "vmstat").write_text("nr_free_pages 1\noom_kill 7\n")
    memory = Memory(tmp_path, tmp_path)
    assert not memory.killed()
    (tmp_path / "vmstat").write_text("nr_free_pages 1\noom_kill 8\n")
    assert memory.killed()
    assert memory.limit() == ""

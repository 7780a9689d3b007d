"""What `status`, `explain` and `report` cost for a run of thousands of attempts: CPU seconds and peak memory.

Run: python -m tests.benchmarks.attempts [--attempts N]
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.rows import Row, main, parser
from tests.harness import ledgers

COMMANDS = (("status",), ("ls",), ("explain",), ("report",), ("report", "--html"))
PARSER = parser(__doc__, attempts=2_000)


def measured(words: list[str], cwd: Path) -> tuple[float, float]:
    """Return the CPU seconds and the peak megabytes of a command."""
    pid = os.fork()
    if pid == 0:
        os.chdir(cwd)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.execv(words[0], words)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def claims(given: argparse.Namespace) -> list[Row]:
    """Measure and print; there is nothing that is claimed of it."""
    attempts = given.attempts
    with tempfile.TemporaryDirectory() as place:
        run = ledgers.many(Path(place) / "run", attempts)
        table = Table("command", "CPU", "memory", title=f"a run of {attempts:,} attempts, 200 events each")
        for command, *more in COMMANDS:
            where = place if command == "ls" else str(run.path)
            page = [*more, f"{place}/report.html"] if more else []
            words = [f"{sys.prefix}/bin/jobkit", command, where, *page]
            seconds, megabytes = measured(words, Path(place))
            table.add_row(" ".join([command, *more]), f"{seconds:.2f} s", f"{megabytes:.0f} MB")
        Console().print(table)
    return []


if __name__ == "__main__":
    main(PARSER, claims)

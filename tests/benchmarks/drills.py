"""What a drill costs: seconds of `jobkit drill`, quick and with every scenario, as a multiple of the undisturbed run.

The program is jobkit.examples.text as it stands. The undisturbed run is the program alone, started by hand, before and
after each drill; all begin without anything compiled.

Run: python -m tests.benchmarks.drills [STEPS]
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent.parent
LIMITS = {"--quick": 4.0, "every scenario": 12.0}


def _seconds(place: str, *command: str) -> float:
    """Return how long a command takes that has to exit with 0."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", *command], cwd=place, env=environ, check=True, capture_output=True)
    return time.monotonic() - begun


def main(steps: str = "500") -> int:
    """Measure and print; return 1 if a drill costs more than its limit."""
    program = ["jobkit.examples.text", "--steps", steps]
    drill = ["launch", "drill", "--json"]
    table = Table("", "seconds", "as a multiple", "limit", title=f"jobkit.examples.text, {steps} steps")
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="jobkit-bench-") as place:
        alone = [_seconds(place, *program, "--run", "alone")]
        for name, limit in LIMITS.items():
            quick = ["--quick"] if name == "--quick" else []
            seconds = _seconds(place, *drill, *quick, "--", "python", "-m", *program)
            alone.append(_seconds(place, *program, "--run", f"alone-{len(alone)}"))
            multiple = seconds / statistics.mean(alone[-2:])
            worst = max(worst, multiple / limit)
            table.add_row(name, f"{seconds:.1f}", f"{multiple:.1f}", f"{limit:.0f}")
    table.add_row("undisturbed", ", ".join(f"{seconds:.1f}" for seconds in alone), "1", "")
    Console().print(table)
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

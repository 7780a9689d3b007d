"""What a drill costs: seconds of `jobkit drill`, quick and with every scenario, as a multiple of the undisturbed run.

The program is jobkit.examples.text as it stands. The undisturbed run is the program alone, started by hand, before and
after each drill; all begin without anything compiled.

Run: python -m tests.benchmarks.drills [--quick] [--steps N]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.rows import Row, main, parser

ROOT = Path(__file__).parent.parent.parent
MUST = {"--quick": 4.0, "every scenario": 12.0}
PARSER = parser(__doc__, steps=500)


def _seconds(place: str, *command: str) -> float:
    """Return how long a command takes that has to exit with 0."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", *command], cwd=place, env=environ, check=True, capture_output=True)
    return time.monotonic() - begun


def claims(given: argparse.Namespace) -> list[Row]:
    """Measure and print."""
    program = ["jobkit.examples.text", "--steps", str(given.steps)]
    drill = ["launch", "drill", "--json"]
    table = Table("", "seconds", "as a multiple", title=f"jobkit.examples.text, {given.steps} steps")
    listed = []
    with tempfile.TemporaryDirectory(prefix="jobkit-bench-") as place:
        alone = [_seconds(place, *program, "--run", "alone")]
        for name, must in MUST.items():
            if given.quick and name != "--quick":
                continue
            quick = ["--quick"] if name == "--quick" else []
            seconds = _seconds(place, *drill, *quick, "--", "python", "-m", *program)
            alone.append(_seconds(place, *program, "--run", f"alone-{len(alone)}"))
            multiple = seconds / statistics.mean(alone[-2:])
            listed.append(Row(f"a drill, {name}", "the undisturbed run", [multiple], must))
            table.add_row(name, f"{seconds:.1f}", f"{multiple:.1f}")
    table.add_row("undisturbed", ", ".join(f"{seconds:.1f}" for seconds in alone), "1")
    Console().print(table)
    return listed


if __name__ == "__main__":
    main(PARSER, claims)

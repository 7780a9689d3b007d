"""Work per step when nothing is due: `steps()` beside what Orbax's CheckpointManager does when asked every step.

Interleaved in one process, many rounds, medians and quartiles. Run: python -m tests.benchmarks.steps
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table

import jobkit
from jobkit.run.boundary import Loop

STEPS, ROUNDS, LIMIT_US = 20_000, 21, 5.0


def _floor(steps: int) -> float:
    begun = time.perf_counter()
    for _ in range(steps):
        pass
    return (time.perf_counter() - begun) / steps * 1e6


def _jobkit(run: jobkit.Run, steps: int) -> float:
    total = run.step + steps
    loop = run.steps(10**9)
    next(loop)
    begun = time.perf_counter()
    for step in loop:
        if step >= total:
            break
    taken = (time.perf_counter() - begun) / steps * 1e6
    run._boundary.loop = Loop.LEFT
    return taken


def _orbax(manager: ocp.CheckpointManager, state: object, steps: int, save: bool) -> float:
    begun = time.perf_counter()
    for step in range(1, steps + 1):
        if save:
            manager.save(step, args=ocp.args.StandardSave(state))
        else:
            manager.should_save(step)
    return (time.perf_counter() - begun) / steps * 1e6


def main() -> int:
    """Measure, print a table of microseconds per step, fail above the limit."""
    root = Path(tempfile.mkdtemp())
    state = {"w": jnp.ones(10)}
    options = ocp.CheckpointManagerOptions(save_interval_steps=10**9)
    rows: dict[str, list[float]] = {}
    with (
        ocp.CheckpointManager(root / "orbax", options=options) as manager,
        jobkit.Run(root / "run", save_every="1h") as run,
    ):
        manager.save(0, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        run.resume(net=state, optimizer=None)
        _jobkit(run, 1000)
        for _ in range(ROUNDS):
            for name, figure in (
                ("for range (floor)", _floor(STEPS)),
                ("jobkit steps()", _jobkit(run, STEPS)),
                ("Orbax should_save()", _orbax(manager, state, STEPS // 40, save=False)),
                ("Orbax save(), not due", _orbax(manager, state, STEPS // 40, save=True)),
            ):
                rows.setdefault(name, []).append(figure)
    table = Table("per step, nothing due", "median us", "quartiles us", title=f"{ROUNDS} interleaved rounds")
    for name, figures in rows.items():
        low, middle, high = statistics.quantiles(figures, n=4)
        table.add_row(name, f"{middle:.2f}", f"{low:.2f} .. {high:.2f}")
    Console().print(table)
    ours = statistics.median(rows["jobkit steps()"])
    if ours > LIMIT_US:
        print(f"jobkit steps() takes {ours:.2f} us per step, more than {LIMIT_US} us", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

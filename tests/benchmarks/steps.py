"""Work per step when nothing is due: `steps()` beside what Orbax's CheckpointManager does when asked every step.

Interleaved in one process, many rounds, medians and quartiles. Run: python -m tests.benchmarks.steps [--quick]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table

import jobkit
from jobkit.run.boundary import Loop
from tests.benchmarks.rows import Row, main, parser

STEPS, ROUNDS, QUICK = 20_000, 21, 7
MUST_US = 0.58
PARSER = parser(__doc__)


def _floor(steps: int) -> float:
    begun = time.perf_counter()
    for _ in range(steps):
        pass
    return (time.perf_counter() - begun) / steps * 1e6


def _jobkit(run: jobkit.Run, steps: int) -> float:
    run.state.net = {"w": run.state.net["w"] + 1}  # a run whose state never changes is ended
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


def claims(given: argparse.Namespace) -> list[Row]:
    """Measure, and print a table of microseconds per step."""
    rounds = QUICK if given.quick else ROUNDS
    root = Path(tempfile.mkdtemp())
    state = {"w": jnp.ones(10)}
    options = ocp.CheckpointManagerOptions(save_interval_steps=10**9)
    taken: dict[str, list[float]] = {}
    with (
        ocp.CheckpointManager(root / "orbax", options=options) as manager,
        jobkit.Run(root / "run", save_every="1h") as run,
    ):
        manager.save(0, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        run.resume(net=state, optimizer=None)
        _jobkit(run, 1000)
        for _ in range(rounds):
            for name, figure in (
                ("for range (floor)", _floor(STEPS)),
                ("jobkit steps()", _jobkit(run, STEPS)),
                ("Orbax should_save()", _orbax(manager, state, STEPS // 40, save=False)),
                ("Orbax save(), not due", _orbax(manager, state, STEPS // 40, save=True)),
            ):
                taken.setdefault(name, []).append(figure)
    table = Table("per step, nothing due", "median us", "quartiles us", title=f"{rounds} interleaved rounds")
    for name, figures in taken.items():
        low, middle, high = statistics.quantiles(figures, n=4)
        table.add_row(name, f"{middle:.2f}", f"{low:.2f} .. {high:.2f}")
    Console().print(table)
    return [Row("work per step, nothing due", "us", taken["jobkit steps()"], MUST_US)]


if __name__ == "__main__":
    main(PARSER, claims)

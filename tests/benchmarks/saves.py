"""What an async save costs: the training thread, the processor, and until it is durable; on the local disk.

    raw          one file written and synced: the floor
    Orbax        the async CheckpointManager with its defaults
    through Orbax  a run with `writer="orbax"`: what jobkit did before it wrote the layout itself
    jobkit       a run

One process, interleaved rounds, medians with quartiles; ratios are taken round by round. `blocking` is the time of the
call, `CPU` that of the process until the step is durable. The first round is left out: it touches memory for the first
time. `memory` is the most that a save takes beyond what the process has, as a multiple of the state; `donated` where
the next step gives the arrays away meanwhile. A picture is drawn.

Run: python -m tests.benchmarks.saves [--quick] [--pictures DIRECTORY]
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from rich.console import Console
from rich.table import Table

import jobkit
from tests.benchmarks.rows import Row, main, median, parser, ratios

ROUNDS, QUICK = 7, 3
SIZES = ((0.2, 16), (1.2, 50), (3, 122), (16, 1_000), (40, 4_000), (104, 64), (1_000, 64))
"""Megabytes and leaves."""
NNX = (40, 4_000)
MUST = {
    "16 MB, 1000 leaves": {"blocking": 0.3, "CPU": 0.2, "durable": 5.0},
    "40 MB, 4000 leaves": {"blocking": 0.3, "durable": 5.0},
    "40 MB, 4000 leaves of a model": {"blocking": 0.5},
    "104 MB, 64 leaves": {"blocking": 0.6, "durable": 2.0},
    "1000 MB, 64 leaves": {"durable": 2.0},
}
FIGURES = {"blocking": (0, "Orbax"), "CPU": (1, "Orbax"), "durable": (2, "raw")}
"""Place in what is measured, and the peer."""
MEMORY, DONATED = 0.3, 1.05
PARSER = parser(__doc__)
NAMES = ("raw", "Orbax", "through Orbax", "jobkit")

Figures = tuple[float, float, float]
"""Seconds: blocking, of the processor, until durable."""


def state_of(megabytes: float, leaves: int = 64) -> dict[str, jax.Array]:
    """Return random arrays of one size."""
    count = max(1, int(megabytes * 1_000_000 / 4 / leaves))
    random = np.random.default_rng(0)
    return {f"layer{index}": jnp.asarray(random.normal(size=count).astype(np.float32)) for index in range(leaves)}


def _measured(start: Callable[[], Any], wait: Callable[[], Any]) -> Figures:
    begun, worked = time.perf_counter(), time.process_time()
    start()
    blocking = time.perf_counter() - begun
    wait()
    return blocking, time.process_time() - worked, time.perf_counter() - begun


def _raw(root: Path, state: dict[str, jax.Array], step: int) -> Figures:
    def write() -> None:
        with open(root / f"raw-{step}", "wb") as file:
            for leaf in state.values():
                file.write(np.asarray(leaf).data)
            file.flush()
            os.fsync(file.fileno())

    figures = _measured(write, lambda: None)
    (root / f"raw-{step}").unlink()
    return figures


def _orbax(manager: ocp.CheckpointManager, state: Any, step: int) -> Figures:
    tree = nnx.state(state) if isinstance(state, nnx.Module) else state
    args = ocp.args.StandardSave(tree)
    return _measured(lambda: manager.save(step, args=args), manager.wait_until_finished)


def _jobkit(run: jobkit.Run, step: int, model: nnx.Module | None) -> Figures:
    # A run whose state never changes is ended. 1.001 keeps the entropy of the values.
    if model is not None:
        nnx.update(model, jax.tree.map(lambda value: value * 1.001, nnx.state(model)))
    else:
        run.state.net = jax.block_until_ready(jax.tree.map(lambda value: value * 1.001, run.state.net))  # type: ignore[no-untyped-call]

    def wait() -> None:
        while run.committed_step < step:
            time.sleep(0.0005)

    figures = _measured(lambda: run.save(step), wait)
    run._session.checkpoints.wait()  # retention and the rehearsal are no part of a save: not in the next round
    return figures


class _Model(nnx.Module):
    def __init__(self, state: dict[str, jax.Array]) -> None:
        for name, value in state.items():
            setattr(self, name, nnx.Param(value))


def measure(megabytes: float, leaves: int, rounds: int, *, model: bool = False) -> dict[str, list[Figures]]:
    """Return what each contender took in each round.

    Args:
        megabytes: Of the state.
        leaves: So many arrays of one size.
        rounds: How many.
        model: Whether the state is an NNX model rather than a dict.
    """
    root = Path(tempfile.mkdtemp())
    state = state_of(megabytes, leaves)
    tree: Any = _Model(state) if model else state
    taken: dict[str, list[Figures]] = {name: [] for name in NAMES}
    with (
        ocp.CheckpointManager(root / "orbax", options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager,
        jobkit.Run(root / "before", save_every=None, keep=1, writer="orbax") as before,
        jobkit.Run(root / "run", save_every=None, keep=1) as run,
    ):
        for one in before, run:
            one.resume(net=tree, optimizer=None)
            one._session.checkpoints.wait()
        contenders: dict[str, Callable[[int], Figures]] = {
            "raw": lambda step: _raw(root, state, step),
            "Orbax": lambda step: _orbax(manager, tree, step),
            "through Orbax": lambda step: _jobkit(before, step, tree if model else None),
            "jobkit": lambda step: _jobkit(run, step, tree if model else None),
        }
        for step in range(1, rounds + 2):
            for name, contender in contenders.items():
                figures = contender(step)
                if step > 1:
                    taken[name].append(figures)
    shutil.rmtree(root)
    return taken


def compared(taken: dict[str, list[Figures]], name: str, other: str, place: int) -> list[float]:
    """Return one figure of a contender as a multiple of another's, round by round."""
    return ratios((mine[place] for mine in taken[name]), (theirs[place] for theirs in taken[other]))


def memory(rounds: int, megabytes: int = 104) -> tuple[list[float], list[float]]:
    """Return the memory that saves take beyond the state, as multiples of it: without donation, and with it."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    step_on = jax.jit(lambda tree: jax.tree.map(lambda value: value * 1.001, tree), donate_argnums=0)
    root = Path(tempfile.mkdtemp())
    taken: tuple[list[float], list[float]] = ([], [])
    with jobkit.Run(root / "run", save_every=None, keep=1) as run:
        run.resume(net=state_of(megabytes), optimizer=None)
        for step in range(2, 2 * rounds + 4):
            run.state.net = jax.block_until_ready(step_on(run.state.net))  # type: ignore[no-untyped-call]
            run._session.checkpoints.wait()
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            before = status("VmRSS")
            run.save(step)
            if step % 2:
                run.state.net = jax.block_until_ready(step_on(run.state.net))  # type: ignore[no-untyped-call]
            run._session.checkpoints.wait()
            if step > 3:
                taken[step % 2].append((status("VmHWM") - before) / megabytes / 1e6)
    shutil.rmtree(root)
    return taken


def picture(table: dict[str, dict[str, list[Figures]]], path: Path) -> None:
    """Draw blocking and durable time of every contender and size."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for axis, place, title in zip(axes, (0, 2), ("blocking", "until durable"), strict=True):
        for shift, name in enumerate(NAMES if place else NAMES[1:]):
            values = [statistics.median(row[place] for row in taken[name]) * 1e3 for taken in table.values()]
            axis.bar(np.arange(len(table)) + shift * 0.2 - 0.3, values, 0.19, label=name)
        axis.set(yscale="log", ylabel="ms", title=title)
        axis.set_xticks(range(len(table)), list(table), rotation=30, ha="right")
        axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def claims(given: argparse.Namespace) -> list[Row]:
    """Measure, and print the table."""
    rounds = QUICK if given.quick else ROUNDS
    shown = Table(
        "state",
        "blocking ms",
        "blocking / Orbax",
        "before / Orbax",
        "CPU / Orbax",
        "durable ms",
        "durable / raw",
        "before / raw",
        title=f"a save, {rounds} interleaved rounds: medians (quartiles)",
    )
    states = {f"{megabytes:g} MB, {leaves} leaves": (megabytes, leaves, False) for megabytes, leaves in SIZES}
    states["40 MB, 4000 leaves of a model"] = (*NNX, True)
    table: dict[str, dict[str, list[Figures]]] = {}
    claimed = []
    for label, (megabytes, leaves, model) in states.items():
        if given.quick and (label not in MUST or megabytes >= 1_000):
            continue
        taken = table[label] = measure(megabytes, leaves, rounds, model=model)
        shown.add_row(
            label,
            f"{statistics.median(row[0] for row in taken['jobkit']) * 1e3:.1f}",
            median(compared(taken, "jobkit", "Orbax", 0)),
            median(compared(taken, "through Orbax", "Orbax", 0)),
            median(compared(taken, "jobkit", "Orbax", 1)),
            f"{statistics.median(row[2] for row in taken['jobkit']) * 1e3:.0f}",
            median(compared(taken, "jobkit", "raw", 2)),
            median(compared(taken, "through Orbax", "raw", 2)),
        )
        for figure, must in MUST.get(label, {}).items():
            place, peer = FIGURES[figure]
            before, now = (compared(taken, name, peer, place) for name in ("through Orbax", "jobkit"))
            claimed.append(Row(f"{figure}, {label}", peer, now, must, before))
    Console(width=160).print(shown)
    picture(table, given.pictures / "saves.png")
    alone, donated = memory(rounds)
    claimed.append(Row("memory of a save, 104 MB", "the state", alone, MEMORY))
    claimed.append(Row("memory of a save, 104 MB, donated", "the state", donated, DONATED))
    return claimed


if __name__ == "__main__":
    main(PARSER, claims)

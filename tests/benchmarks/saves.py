"""What an async save costs the training thread and when it is durable, beside Orbax alone, on the local disk.

One process, interleaved rounds; default Orbax, tuned Orbax (as we set it), jobkit, and the floor of one flat write with
fsync. Run: python -m tests.benchmarks.saves [MEGABYTES]
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table

import jobkit

ROUNDS, LEAVES = 7, 64


def _state(megabytes: int) -> dict[str, jax.Array]:
    count = megabytes * 1_000_000 // 4 // LEAVES
    random = np.random.default_rng(0)
    return {f"layer{index}": jnp.asarray(random.normal(size=count).astype(np.float32)) for index in range(LEAVES)}


def _flat(root: Path, state: dict[str, jax.Array], step: int) -> tuple[float, float]:
    begun = time.perf_counter()
    with open(root / f"flat-{step}", "wb") as file:
        for leaf in state.values():
            file.write(np.asarray(leaf).data)
        file.flush()
        os.fsync(file.fileno())
    taken = time.perf_counter() - begun
    (root / f"flat-{step}").unlink()
    return taken, taken


def _orbax(manager: ocp.CheckpointManager, args: Any, step: int) -> tuple[float, float]:
    begun = time.perf_counter()
    manager.save(step, args=args)
    blocking = time.perf_counter() - begun
    manager.wait_until_finished()
    return blocking, time.perf_counter() - begun


def _jobkit(run: jobkit.Run, step: int) -> tuple[float, float]:
    begun = time.perf_counter()
    run.save(step)
    blocking = time.perf_counter() - begun
    while run.committed_step < step:
        time.sleep(0.0005)
    durable = time.perf_counter() - begun
    run._session.checkpoints.wait()  # retention and the rehearsal are no part of a save: not in the next round
    return blocking, durable


def main() -> int:
    """Measure and print milliseconds, and ratios to default Orbax round by round."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 104
    root = Path(tempfile.mkdtemp())
    state = _state(megabytes)
    keep = ocp.CheckpointManagerOptions(max_to_keep=1)
    tuned = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
    rows: dict[str, list[tuple[float, float]]] = {}
    with (
        ocp.CheckpointManager(root / "default", options=keep) as default,
        ocp.CheckpointManager(root / "tuned", item_handlers=tuned, options=keep) as tuned_manager,
        jobkit.Run(root / "run", save_every=None, keep=1) as run,
    ):
        run.resume(net=state, optimizer=None)
        run._session.checkpoints.wait()
        contenders: dict[str, Callable[[int], tuple[float, float]]] = {
            "flat write + fsync (floor)": lambda step: _flat(root, state, step),
            "Orbax default": lambda step: _orbax(default, ocp.args.StandardSave(state), step),
            "Orbax tuned": lambda step: _orbax(
                tuned_manager, ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=64 << 20), step
            ),
            "jobkit": lambda step: _jobkit(run, step),
        }
        for step in range(1, ROUNDS + 2):
            for name, measure in contenders.items():
                figures = measure(step)
                if step > 1:  # the first of each touches memory and imports for the first time
                    rows.setdefault(name, []).append(figures)
    table = Table(
        f"{megabytes} MB, {LEAVES} leaves",
        "blocking ms",
        "durable ms",
        "durable / Orbax default",
        title=f"{ROUNDS} interleaved rounds, medians",
    )
    for name, figures in rows.items():
        ratio = statistics.median(
            mine[1] / theirs[1] for mine, theirs in zip(figures, rows["Orbax default"], strict=True)
        )
        blocking, durable = (statistics.median(pair[index] for pair in figures) * 1e3 for index in (0, 1))
        table.add_row(name, f"{blocking:.1f}", f"{durable:.0f}", f"{ratio:.2f}")
    Console().print(table)
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())

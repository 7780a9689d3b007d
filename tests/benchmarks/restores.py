"""What a restore takes, beside Orbax's own and beside reading the bytes.

    raw      the files read in parallel, crc32c of each byte, and one copy: the floor
    Orbax    StandardRestore of what its async CheckpointManager wrote, with its defaults
    jobkit   the newest step found, checked and put into the program's parts

Interleaved rounds, medians with quartiles of the ratios round by round; `cold` drops the files from the page cache
first (posix_fadvise).

Run: python -m tests.benchmarks.restores [--quick]
"""

import concurrent.futures
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table

import jobkit
from tests.benchmarks.saves import QUICK, ROUNDS, _median, _state

SIZES = ((3, 122), (16, 1_000), (104, 266), (350, 330))


def _forget(root: Path) -> None:
    """Drop the files from the page cache."""
    for path in root.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _raw(root: Path) -> float:
    def one(path: Path) -> np.ndarray:
        content = path.read_bytes()
        google_crc32c.value(content)
        return np.frombuffer(content, np.uint8).copy()

    begun = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(one, [path for path in root.rglob("*") if path.is_file()]))
    return time.perf_counter() - begun


def _orbax(root: Path, like: Any) -> float:
    with ocp.CheckpointManager(root) as manager:
        begun = time.perf_counter()
        jax.block_until_ready(manager.restore(1, args=ocp.args.StandardRestore(like)))  # type: ignore[no-untyped-call]
        return time.perf_counter() - begun


def _jobkit(root: Path, state: dict[str, jax.Array]) -> float:
    with jobkit.Run(root, save_every=None) as run:
        begun = time.perf_counter()
        values = run.resume(net=state, optimizer=None)
        jax.block_until_ready(values.net)  # type: ignore[no-untyped-call]
        return time.perf_counter() - begun


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print the table."""
    given = sys.argv[1:] if arguments is None else arguments
    rounds = QUICK if "--quick" in given else ROUNDS
    shown = Table(
        "state", "page cache", "jobkit ms", "jobkit / Orbax", "jobkit / raw", title=f"a restore, {rounds} rounds"
    )
    for megabytes, leaves in SIZES[: 3 if "--quick" in given else None]:
        root = Path(tempfile.mkdtemp())
        state = _state(megabytes, leaves)
        with ocp.CheckpointManager(root / "orbax") as manager:
            manager.save(1, args=ocp.args.StandardSave(state))
        with jobkit.Run(root / "run", save_every=None) as run:
            run.resume(net=state, optimizer=None)
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        zeros = {name: jnp.zeros_like(leaf) for name, leaf in state.items()}
        contenders: dict[str, Callable[[], float]] = {
            "raw": lambda root=root: _raw(root / "run" / "checkpoints"),  # type: ignore[misc]
            "Orbax": lambda root=root, like=like: _orbax(root / "orbax", like),  # type: ignore[misc]
            "jobkit": lambda root=root, zeros=zeros: _jobkit(root / "run", zeros),  # type: ignore[misc]
        }
        for cold in (True, False):
            rows: dict[str, list[float]] = {name: [] for name in contenders}
            for turn in range(rounds + 1):
                for name, contender in contenders.items():
                    if cold:
                        _forget(root)
                    taken = contender()
                    if turn:
                        rows[name].append(taken)
            pairs = {
                other: [mine / theirs for mine, theirs in zip(rows["jobkit"], rows[other], strict=True)]
                for other in ("Orbax", "raw")
            }
            shown.add_row(
                f"{megabytes:g} MB, {leaves} leaves",
                "cold" if cold else "warm",
                f"{statistics.median(rows['jobkit']) * 1e3:.0f}",
                _median(pairs["Orbax"]),
                _median(pairs["raw"]),
            )
        shutil.rmtree(root)
    Console(width=140).print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())

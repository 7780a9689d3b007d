"""What a restore takes, beside Orbax's own and beside reading the bytes.

    raw      the files read in parallel, crc32c of each byte, and one copy: the floor
    Orbax    StandardRestore of what its async CheckpointManager wrote, with its defaults
    jobkit   the newest step found, checked and put into the program's parts

Interleaved rounds, medians with quartiles of the ratios round by round; `cold` drops the files from the page cache
first (posix_fadvise).

Run: python -m tests.benchmarks.restores [--quick]
"""

import argparse
import concurrent.futures
import os
import shutil
import statistics
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
from tests.benchmarks.rows import Row, main, median, parser, ratios
from tests.benchmarks.saves import QUICK, ROUNDS, state_of

SIZES = ((3, 122), (16, 1_000), (104, 266), (350, 330))
MUST = 0.3
CLAIMED = (16, 350)
PARSER = parser(__doc__)


def forget(root: Path) -> None:
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


def claims(given: argparse.Namespace) -> list[Row]:
    """Measure, and print the table."""
    rounds = QUICK if given.quick else ROUNDS
    claimed = []
    shown = Table(
        "state", "page cache", "jobkit ms", "jobkit / Orbax", "jobkit / raw", title=f"a restore, {rounds} rounds"
    )
    for megabytes, leaves in SIZES:
        if given.quick and megabytes not in CLAIMED:
            continue
        root = Path(tempfile.mkdtemp())
        state = state_of(megabytes, leaves)
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
            seconds: dict[str, list[float]] = {name: [] for name in contenders}
            for turn in range(rounds + 1):
                for name, contender in contenders.items():
                    if cold:
                        forget(root)
                    taken = contender()
                    if turn:
                        seconds[name].append(taken)
            pairs = {other: ratios(seconds["jobkit"], seconds[other]) for other in ("Orbax", "raw")}
            label, cache = f"{megabytes:g} MB, {leaves} leaves", "cold" if cold else "warm"
            shown.add_row(
                label,
                cache,
                f"{statistics.median(seconds['jobkit']) * 1e3:.0f}",
                median(pairs["Orbax"]),
                median(pairs["raw"]),
            )
            if megabytes in CLAIMED:
                claimed.append(Row(f"restore, {label}, {cache}", "Orbax", pairs["Orbax"], MUST))
        shutil.rmtree(root)
    Console(width=140).print(shown)
    return claimed


if __name__ == "__main__":
    main(PARSER, claims)

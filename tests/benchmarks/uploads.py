"""Save to a bucket until it is committed there: jobkit beside default and tuned Orbax and the bare wire.

The GCS server of the tests runs in a process of its own with 50 ms per request, 12.5 MB/s per stream and 100 MB/s in
all; contenders take turns. Run: python -m tests.benchmarks.uploads [--quick] [--megabytes N] [--pictures DIRECTORY]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.rows import Row, main, parser, ratios
from tests.fakes.gcs_server import control, environment

ROUNDS, QUICK, LATENCY_S, PER_STREAM, IN_ALL = 5, 2, 0.05, 12.5e6, 100e6
MUST = {"Orbax default": 0.35, "wire": 1.38}
PARSER = parser(__doc__, megabytes=104)


def _state(megabytes: int) -> dict[str, Any]:
    import jax.numpy as jnp
    import numpy as np

    random = np.random.default_rng(0)
    count = megabytes * 1_000_000 // 4 // 64
    return {f"layer{index}": jnp.asarray(random.normal(size=count).astype(np.float32)) for index in range(64)}


def _wire(url: str, megabytes: int, step: int) -> float:
    """Upload the same bytes as sixteen objects at once: what the limits leave."""
    from jobkit.rundir.remote import PARALLEL, Remote

    remote, part = Remote(url), os.urandom(megabytes * 1_000_000 // PARALLEL)
    begun = time.perf_counter()
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(lambda index: remote.write(f"{step}/{index}", part), range(PARALLEL)))
    return time.perf_counter() - begun


def _orbax(manager: Any, args: Any, step: int) -> float:
    begun = time.perf_counter()
    manager.save(step, args=args)
    manager.wait_until_finished()
    return time.perf_counter() - begun


def _jobkit(run: Any, step: int) -> float:
    import jax

    from jobkit.rundir import remote_steps
    from jobkit.rundir.ledger import Ledger

    # A run whose state never changes is ended.
    run.state.net = jax.block_until_ready(jax.tree.map(lambda value: value * 1.001, run.state.net))  # type: ignore[no-untyped-call]
    begun = time.perf_counter()
    run.save(step, wait=True)
    ledger = Ledger(run._store.file("bench.jsonl"))
    assert remote_steps.push(run._store, step, attempt=run.attempt, ledger=ledger)
    return time.perf_counter() - begun


def _measure(megabytes: int, rounds: int) -> dict[str, list[float]]:
    import orbax.checkpoint as ocp

    import jobkit

    state = _state(megabytes)
    keep = ocp.CheckpointManagerOptions(max_to_keep=None)
    tuned_handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
    taken: dict[str, list[float]] = {}
    with (
        ocp.CheckpointManager("gs://bucket/default", options=keep) as default,
        ocp.CheckpointManager("gs://bucket/tuned", item_handlers=tuned_handler, options=keep) as tuned,
        jobkit.Run("gs://bucket/run", save_every=None, keep=100) as run,
    ):
        run.resume(net=state, optimizer=None)
        assert run._session.uploader is not None
        run._session.uploader._closing.set()  # the benchmark itself uploads, to see when it ends
        for step in range(1, rounds + 1):
            for name, figure in (
                ("wire", _wire("gs://bucket/wire", megabytes, step)),
                ("Orbax default", _orbax(default, ocp.args.StandardSave(state), step)),
                (
                    "Orbax tuned",
                    _orbax(tuned, ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=8 << 20), step),
                ),
                ("jobkit", _jobkit(run, step)),
            ):
                taken.setdefault(name, []).append(figure)
    return taken


def _draw(taken: dict[str, list[float]], megabytes: int, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    names = list(taken)
    medians = [statistics.median(taken[name]) for name in names]
    colours = ["#9aa0a6", "#c58f6b", "#d9b38c", "#2a6f97"]
    axes.barh(names, medians, color=colours)
    for name, figures in taken.items():
        axes.plot(figures, [name] * len(figures), ".", color="black", markersize=4)
    axes.bar_label(axes.containers[0], [f" {median:.1f} s" for median in medians], padding=14)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds until committed")
    axes.set_title(f"{megabytes} MB to gs://, 50 ms per request, 12.5 MB/s per stream, 100 MB/s in all", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def claims(given: argparse.Namespace) -> list[Row]:
    """Measure, print and draw."""
    megabytes, rounds, picture = given.megabytes, QUICK if given.quick else ROUNDS, given.pictures / "uploads.png"
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.gcs_server", "--port", "0", "--bucket", "bucket"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        control(url, latency_s=LATENCY_S, bandwidth_per_stream=PER_STREAM, bandwidth_total=IN_ALL)
        os.environ.update(environment(url))
        with tempfile.TemporaryDirectory() as home:
            os.environ["JOBKIT_HOME"] = home
            taken = _measure(megabytes, rounds)
    finally:
        server.terminate()
        server.wait()
    table = Table(f"{megabytes} MB", "median s", "of Orbax default", title=f"{rounds} interleaved rounds")
    for name, figures in taken.items():
        multiple = statistics.median(ratios(figures, taken["Orbax default"]))
        table.add_row(name, f"{statistics.median(figures):.2f}", f"{multiple:.2f}")
    Console().print(table)
    _draw(taken, megabytes, picture)
    print(picture)
    ours = taken["jobkit"]
    return [Row(f"{megabytes} MB to a bucket", peer, ratios(ours, taken[peer]), must) for peer, must in MUST.items()]


if __name__ == "__main__":
    main(PARSER, claims)

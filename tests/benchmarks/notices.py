"""What a notice costs: SIGTERM right behind a save in flight, and SIGTERM until the loop knows.

    behind   SIGTERM comes when a save of 1 GB has just begun: seconds until the newest step is committed, as a
             multiple of an undisturbed save, the median of three in the same round; beside Orbax alone, which finishes
             the first save and then makes the second. In memory (/dev/shm), interleaved rounds.
    known    SIGTERM at a random moment: milliseconds until the loop knows, beside JAX's own notifier. Processes of
             their own, since JAX's works once.

Run: python -m tests.benchmarks.notices [--quick] [--megabytes N]
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table

import jobkit
from jobkit.rundir.ledger import attempt_events
from jobkit.rundir.store import Store
from tests.benchmarks.rows import Row, main, parser
from tests.benchmarks.saves import state_of
from tests.harness import training

ROUNDS, QUICK, MUST = 5, 2, 1.1
ALONE = 3
"""Undisturbed saves in a round: one alone takes now half, now twice as long."""
SAMPLES, QUICK_SAMPLES, MUST_MS = 20, 3, 5.0
PARSER = parser(__doc__, megabytes=1_000)


def _ours(root: Path, state: dict[str, jax.Array]) -> tuple[float, float]:
    """Return the seconds of one save, and from SIGTERM behind a save in flight to the commit of the newest step."""
    with (
        contextlib.suppress(jobkit.Preempted),
        contextlib.redirect_stderr(open(os.devnull, "w")),
        jobkit.Run(root / "run", save_every="2 steps", keep=1) as run,
    ):
        values = run.resume(net=state, optimizer=None)
        run._session.checkpoints.wait()
        for step in run.steps(100):
            values.net = values.net | {"layer0": values.net["layer0"] * 1.001}  # else the run is ended
            if step in range(2, 2 * ALONE + 1, 2):
                run._session.checkpoints.wait()
            elif step == 2 * ALONE + 2:
                assert run._session.checkpoints.saving_step == step
                os.kill(os.getpid(), signal.SIGTERM)
    events = attempt_events(Store(root / "run"), 0)
    alone = [event["durable_s"] for event in events if event["event"] == "saved" and event["reason"] == "interval"]
    (stopped,) = [event for event in events if event["event"] == "stopped"]
    assert (len(alone), stopped["step"]) == (ALONE, 2 * ALONE + 3)
    shutil.rmtree(root / "run")
    return statistics.median(alone), stopped["notice_to_commit_s"]


def _orbax(root: Path, state: dict[str, jax.Array], *, tuned: bool) -> tuple[float, float]:
    """The same with a CheckpointManager."""
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False) if tuned else None
    options = ocp.CheckpointManagerOptions(max_to_keep=1)

    def save(step: int) -> None:
        if tuned:
            manager.save(step, args=ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=64 << 20))
        else:
            manager.save(step, args=ocp.args.StandardSave(state))

    with ocp.CheckpointManager(root / "orbax", item_handlers=handler, options=options) as manager:
        save(0)
        manager.wait_until_finished()
        alone = []
        for number in range(ALONE):
            begun = time.perf_counter()
            save(1 + number)
            manager.wait_until_finished()
            alone.append(time.perf_counter() - begun)
        save(1 + ALONE)
        begun = time.perf_counter()  # SIGTERM
        save(2 + ALONE)
        manager.wait_until_finished()
        behind = time.perf_counter() - begun
    shutil.rmtree(root / "orbax")
    return statistics.median(alone), behind


def behind(megabytes: int, rounds: int) -> list[float]:
    """Measure and print the first table; return jobkit's multiples."""
    shared = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="jobkit-bench-", dir=shared if shared.is_dir() else None))
    state = state_of(megabytes)
    taken: dict[str, list[tuple[float, float]]] = {}
    try:
        for number in range(rounds + 1):
            for name, figures in (
                ("Orbax default", _orbax(root, state, tuned=False)),
                ("Orbax tuned", _orbax(root, state, tuned=True)),
                ("jobkit", _ours(root, state)),
            ):
                if number:  # the first round touches memory and imports for the first time
                    taken.setdefault(name, []).append(figures)
    finally:
        shutil.rmtree(root)
    table = Table(
        f"{megabytes} MB, SIGTERM behind a save",
        "one save s",
        "to the commit s",
        "as a multiple",
        title=f"{rounds} interleaved rounds, medians",
    )
    for name, figures in taken.items():
        alone, after = (statistics.median(pair[index] for pair in figures) for index in (0, 1))
        ratio = statistics.median(pair[1] / pair[0] for pair in figures)
        table.add_row(name, f"{alone:.2f}", f"{after:.2f}", f"{ratio:.2f}")
    Console().print(table)
    return [pair[1] / pair[0] for pair in taken["jobkit"]]


def _shoot(sent: list[float]) -> None:
    """Send SIGTERM to this process at a random moment soon, and write down when."""

    def shoot() -> None:
        time.sleep(random.uniform(0.05, 0.15))
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=shoot).start()


def _ours_known(url: str, out: str) -> None:
    taken = []
    for number in range(SAMPLES):
        sent: list[float] = []
        with contextlib.suppress(SystemExit), jobkit.Run(f"{url}-{number}", save_every=None) as run:
            run.resume(total=0, optimizer=None)
            _shoot(sent)
            while not run.should_stop:
                time.sleep(0.0005)
            taken.append(time.monotonic() - sent[0])
    Path(out).write_text(json.dumps(taken))


def _jax_known(url: str, out: str) -> None:
    from jax.experimental import multihost_utils

    from jobkit.supervise.processes import free_port

    jax.config.update("jax_enable_preemption_service", True)  # type: ignore[no-untyped-call]
    jax.distributed.initialize(f"127.0.0.1:{free_port()}", 1, 0)
    sent: list[float] = []
    _shoot(sent)
    step = 0
    while not multihost_utils.reached_preemption_sync_point(step):
        time.sleep(0.0005)
        step += 1
    Path(out).write_text(json.dumps([time.monotonic() - sent[0]]))


def known(samples: int) -> float:
    """Measure and print the second table; return jobkit's 95th percentile in milliseconds.

    Args:
        samples: How many of JAX's notifier.
    """
    root = Path(tempfile.mkdtemp(prefix="jobkit-bench-"))
    table = Table("SIGTERM until the loop knows", "samples", "median ms", "p95 ms")
    found: dict[str, list[float]] = {}
    for number in range(samples):
        for name, function in ("JAX's notifier", _jax_known), ("jobkit", _ours_known):
            if name in found and name == "jobkit":
                continue
            out = root / f"{name[0]}{number}"
            code, printed = training.attempt(root / f"run-{name[0]}{number}", function=function, out=str(out))
            assert code == 0, printed
            found.setdefault(name, []).extend(json.loads(out.read_text()))
    shutil.rmtree(root)
    for name, figures in found.items():
        p95 = statistics.quantiles(figures, n=20)[-1]
        table.add_row(name, str(len(figures)), f"{statistics.median(figures) * 1e3:.2f}", f"{p95 * 1e3:.2f}")
    Console().print(table)
    return statistics.quantiles(found["jobkit"], n=20)[-1] * 1e3


def claims(given: argparse.Namespace) -> list[Row]:
    """Measure both."""
    multiples = behind(given.megabytes, QUICK if given.quick else ROUNDS)
    return [
        Row(f"SIGTERM behind a save in flight, {given.megabytes} MB", "one save", multiples, MUST),
        Row("SIGTERM until the loop knows, p95", "ms", [known(QUICK_SAMPLES if given.quick else SAMPLES)], MUST_MS),
    ]


if __name__ == "__main__":
    main(PARSER, claims)

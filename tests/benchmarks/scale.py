"""What very many processes cost that share nothing but a bucket: how they meet, save, and are told to stop.

All that jobkit does for them, but JAX and the arrays, is the real code: claims, gathering, parts, uploads, the commit,
retention, what is asked of the run, status, the end. Each process is one of this machine, forked from one that has
imported everything, with a home of its own; what they tell each other through JAX's own channel they tell each other
through memory here. The bucket answers after 30 ms and has the limits that object stores publish: one write a second
to one object, 1,000 writes and 5,000 reads a second in all, 429 beyond. All of them and the bucket share the cores of
one machine, so that with very many the times are the machine's; the requests and the processor's time are theirs.

Run: python -m tests.benchmarks.scale [--quick] [--processes 16,64,256] [PICTURE.png]
"""

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import multiprocessing.synchronize
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.fakes.gcs_server import control, environment

COUNTS, QUICK = (16, 64, 256), (4, 16)
SAVES, PART_BYTES = 3, 64 << 10
LATENCY_S, OBJECT_WRITES_S, WRITES_S, READS_S = 0.03, 1.0, 1000.0, 5000.0
START_S, TICK_S, TICKS_S = 2.0, 0.25, 0.5
"""Machines start within two seconds; a supervisor looks four times a second."""
PHASES = ("meet", "save", "stop", "end")
URL = "gs://bucket/run"
_FORK = multiprocessing.get_context("fork")
_asked: Counter[str] = Counter()


def _count_requests() -> None:
    """Count what this process asks of the bucket, and its children, which begin at nothing."""
    from gcsfs.core import GCSFileSystem

    asked = GCSFileSystem._request.__wrapped__

    async def request(self: Any, method: str, *given: Any, **named: Any) -> Any:
        _asked[method] += 1
        return await asked(self, method, *given, **named)

    GCSFileSystem._request.__wrapped__ = request


class _Channel:
    """What processes have from JAX: they wait for each other, and process 0 has the checksums of all parts."""

    def __init__(self, count: int) -> None:
        self._barrier = _FORK.Barrier(count + 1)
        self.checksums = _FORK.RawArray(ctypes.c_char, 9 * count)
        self.figures = _FORK.RawArray(ctypes.c_double, 16)
        self.attempt = _FORK.RawValue(ctypes.c_int, -1)

    def wait(self) -> None:
        self._barrier.wait(900)

    def put(self, index: int, checksum: str) -> None:
        self.checksums[9 * index : 9 * index + 8] = checksum.encode()

    def get(self, index: int) -> str:
        return bytes(self.checksums[9 * index : 9 * index + 8]).decode()


MEET, WORK, WORK_CPU, STOP, STATUS, STATUS_REQUESTS = range(6)


class _Figures:
    """Requests and seconds of one process by phase."""

    def __init__(self) -> None:
        self._phases: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        asked, cpu, begun = _asked.total(), time.process_time(), time.monotonic()
        yield
        self._phases[phase] = {
            "requests": _asked.total() - asked,
            "cpu_s": time.process_time() - cpu,
            "seconds": time.monotonic() - begun,
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self._phases))


def _live(base: Path, index: int, count: int, channel: _Channel) -> None:
    """Be one process, from the start of its machine to its end."""
    from jobkit import contract
    from jobkit.rundir import mirror
    from jobkit.rundir.control import Control
    from jobkit.rundir.ledger import Ledger
    from jobkit.rundir.store import Store
    from jobkit.rundir.uploader import Uploader
    from jobkit.supervise.together import gathering
    from jobkit.supervise.together.peers import Peers

    os.environ |= {
        contract.ENV_PROCESS: str(index),
        contract.ENV_PROCESSES: str(count),
        contract.ENV_HOME: str(base / f"home-{index}"),
        contract.ENV_COORDINATOR: "127.0.0.1:1",
    }
    figures, store = _Figures(), Store(URL)
    channel.wait()
    begun = time.monotonic()
    time.sleep(START_S * index / count)
    with figures.of("meet"):
        control_of = Control.of_attempt(store, None) if index == 0 else None
        if index == 0:
            number = mirror.claim(store)
        else:
            while (opened := gathering.open_attempt(store.bucket, index)) is None:
                time.sleep(2.0)
            number = opened
        place = gathering.Gathering(store, number, index, count)
        while place.look() is None:
            time.sleep(TICK_S)
        channel.wait()
    if index == 0:
        channel.figures[MEET] = time.monotonic() - begun
        channel.attempt.value = number
    peers = Peers(store, number, index, count)
    peers.start()
    ledger = Ledger(store.file(contract.events_file(number, contract.of_process("supervisor", index) or "supervisor")))
    uploader = Uploader(store, number, ledger, process=(index, count))
    uploader.start()
    if index == 0:
        store.write(contract.STRATEGY, json.dumps({"keep": 1}))
    with figures.of("save"):
        for step in range(1, SAVES + 1):
            _save(store, number, step, index, count, channel)
    with figures.of("stop"):
        channel.wait()
        while control_of is not None and control_of.new(contract.CANCEL) is None:
            time.sleep(TICK_S)
        if index == 0:
            channel.figures[STOP] = time.monotonic() - channel.figures[STOP]
        channel.wait()
    with figures.of("end"):
        uploader.close(deadline_s=600)
        store.write(contract.process_outcome(number, index), json.dumps({"outcome": "preempted"}))
        uploader.upload_files()
        peers.wait(seconds=600)
        peers.close()
    figures.write(base / f"figures-{index}.json")
    channel.wait()


def _save(store: Any, number: int, step: int, index: int, count: int, channel: _Channel) -> None:
    """Have a part in the home, and as process 0 all of the step; wait until the URL has it."""
    from jobkit import contract
    from jobkit.rundir import commits
    from jobkit.rundir.apart import parts

    stage = commits.new_stage(store, step, number)
    name = f"{contract.ORBAX_ITEM}/ocdbt.process_{index}/d/{step:032x}"
    (stage / name).parent.mkdir(parents=True)
    (stage / name).write_bytes(os.urandom(PART_BYTES))
    files = commits.measure(stage, [name])
    if index:
        part = parts.Part(step=step, attempt=number, process=index, files=files)
        channel.put(index, parts.publish(store, stage, part))
    channel.wait()
    if index == 0:
        named = {parts.name_of(step, other): channel.get(other) for other in range(1, count)}
        record = next(iter(files.values()))
        measured = {f"{contract.ORBAX_ITEM}/ocdbt.process_{other}/d/{step:032x}": record for other in range(1, count)}
        commit = commits.Commit(
            step=step,
            attempt=number,
            at=time.time(),
            reason="interval",
            files={},
            topology={"process_count": count},
            parts=named,
        )
        cpu, begun = time.process_time(), time.monotonic()
        commits.publish(store, stage, state={}, commit=commit, measured=measured)
        while not _is_up(store, step):
            time.sleep(TICK_S)
        channel.figures[WORK] = max(channel.figures[WORK], time.monotonic() - begun)
        channel.figures[WORK_CPU] = max(channel.figures[WORK_CPU], time.process_time() - cpu)
    channel.wait()
    time.sleep(TICKS_S)


def _is_up(store: Any, step: int) -> bool:
    """Tell whether a supervisor has written down that it has committed a step: process 0's, or one that took over."""
    own, *others = [store.path, *(path for path in store.path.parent.parent.glob("home-*/*"))]
    for home in (own, *(others if time.monotonic() % 5 < TICK_S else ())):
        for ledger in home.glob("attempts/*/events-supervisor*.jsonl"):
            lines = (json.loads(line) for line in ledger.read_text().splitlines())
            if any(line["event"] == "uploaded" and line["step"] == step for line in lines):
                return True
    return False


def _watch(base: Path, channel: _Channel) -> None:
    """Be a person at another machine, who asks how the run is, and stops it."""
    from jobkit import contract
    from jobkit.rundir import mirror
    from jobkit.rundir.store import Store

    os.environ[contract.ENV_HOME] = str(base / "home-of-a-person")
    store = Store(URL)
    channel.wait()
    channel.wait()
    for _ in range(SAVES):
        channel.wait()
        channel.wait()
    begun, asked = time.monotonic(), _asked.total()
    mirror.refresh(store)
    channel.figures[STATUS], channel.figures[STATUS_REQUESTS] = time.monotonic() - begun, _asked.total() - asked
    channel.wait()
    channel.figures[STOP] = time.monotonic()
    store.bucket.write(contract.CANCEL, b'{"word": "stopped", "by": "a person"}')
    channel.wait()
    channel.wait()


def _measure(count: int) -> dict[str, float]:
    """Return the figures of one life of so many processes."""
    with tempfile.TemporaryDirectory(prefix="jobkit-scale-") as made:
        base = Path(made)
        server = subprocess.Popen([sys.executable, "-m", "tests.fakes.gcs_server"], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            os.environ |= environment(url)
            limits = {"object_writes_s": OBJECT_WRITES_S, "writes_s": WRITES_S, "reads_s": READS_S}
            control(url, latency_s=LATENCY_S, **limits)
            channel = _Channel(count)
            lives = [_FORK.Process(target=_live, args=(base, index, count, channel)) for index in range(count)]
            lives.append(_FORK.Process(target=_watch, args=(base, channel)))
            for life in lives:
                life.start()
            for life in lives:
                life.join()
            if any(life.exitcode for life in lives):
                raise RuntimeError(f"processes failed: {Counter(life.exitcode for life in lives)}")
            told = control(url)
            lived = [json.loads((base / f"figures-{index}.json").read_text()) for index in range(count)]
        finally:
            server.terminate()
            server.wait()
    others = lived[1:]
    row: dict[str, float] = {
        "processes": count,
        "refused": told["fired"].get("limited", 0),
        "bucket cpu": told["cpu_s"],
    }
    for phase in PHASES:
        row[f"{phase} requests"] = statistics.median(one[phase]["requests"] for one in others)
        row[f"{phase} most"] = max(one[phase]["requests"] for one in others)
        row[f"{phase} of 0"] = lived[0][phase]["requests"]
        row[f"{phase} seconds"] = lived[0][phase]["seconds"]
    row |= {
        "whole": channel.figures[MEET],
        "commit": channel.figures[WORK],
        "commit cpu": channel.figures[WORK_CPU],
        "stop": channel.figures[STOP],
        "status": channel.figures[STATUS],
        "status requests": channel.figures[STATUS_REQUESTS],
    }
    return row


ROWS = (
    ("all have met, s", "whole", "{:.1f}"),
    ("  requests of one of them", "meet requests", "{:.0f}"),
    ("  requests of process 0", "meet of 0", "{:.0f}"),
    (f"{SAVES} saves: requests of one of them", "save requests", "{:.0f}"),
    (f"{SAVES} saves: requests of process 0", "save of 0", "{:.0f}"),
    ("one save, from the last part to the commit there, s", "commit", "{:.1f}"),
    ("  processor's time of process 0, s", "commit cpu", "{:.2f}"),
    ("a stop is known to process 0 after, s", "stop", "{:.1f}"),
    ("status from elsewhere, s", "status", "{:.1f}"),
    ("  its requests", "status requests", "{:.0f}"),
    ("the end, s", "end seconds", "{:.1f}"),
    ("  requests of one of them", "end requests", "{:.0f}"),
    ("refused by the bucket's limits (429)", "refused", "{:.0f}"),
    ("processor's time of the bucket itself, s", "bucket cpu", "{:.0f}"),
)


def _draw(rows: list[dict[str, float]], picture: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    counts = [row["processes"] for row in rows]
    for name, label in (("whole", "all have met"), ("commit", "one save"), ("end seconds", "the end")):
        left.plot(counts, [row[name] for row in rows], "o-", label=label)
    for name, label in (
        ("meet requests", "to meet"),
        ("save requests", f"{SAVES} saves"),
        ("end requests", "the end"),
    ):
        right.plot(counts, [row[name] for row in rows], "o-", label=label)
    left.set(title="seconds", xlabel="processes", xscale="log", ylim=(0, None))
    right.set(title="requests of one process, median", xlabel="processes", xscale="log", ylim=(0, None))
    for axes in (left, right):
        axes.legend()
    figure.savefig(picture, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Print the table and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few processes")
    parser.add_argument("--processes", help="how many, as 16,256,1024")
    parser.add_argument("picture", nargs="?", help="PNG to write")
    given = parser.parse_args(arguments)
    named = tuple(map(int, given.processes.split(","))) if given.processes else ()
    counts = named or (QUICK if given.quick else COUNTS)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.environ |= environment("")  # read as it is imported
    import gcsfs  # noqa: F401 - warm for all that are forked

    import jobkit.rundir.uploader
    import jobkit.supervise.together.peers  # noqa: F401

    _count_requests()
    rows = []
    for count in counts:
        rows.append(_measure(count))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    table = Table("", *(f"{count}" for count in counts), title="processes that share nothing but a bucket")
    for label, name, form in ROWS:
        table.add_row(label, *(form.format(row[name]) for row in rows))
    Console().print(table)
    picture = given.picture or str(Path(tempfile.mkdtemp()) / "scale.png")
    _draw(rows, picture)
    print(f"picture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

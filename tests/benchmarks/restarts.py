"""What a restart and a notice cost for an 8-layer transformer, whose state with AdamW's is 353 MB.

    bare            a script that saves, and restores at its start, with Orbax's CheckpointManager and its defaults
    through Orbax   the same as a run with `writer="orbax"`, under its supervisor: jobkit before it wrote by itself
    jobkit          the same as a run
    raw             so many bytes written to one file and synced

Every contender has a compile cache. `cold` begins without what that and the page cache hold, `warm` with both; the
contenders take turns. `to first step` is from the spawn to the end of the first step, `open` (of the run, or of the
manager) and `restore` parts of it; `SIGTERM to commit` begins when the step in progress has ended; `memory` is the most
that the process had, with all that it imports. A picture is drawn.

Run: python -m tests.benchmarks.restarts [--quick] [--pictures DIRECTORY]
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.restores import forget
from tests.benchmarks.rows import Row, main, median, parser, ratios

ROOT = Path(__file__).parent.parent.parent
ROUNDS, QUICK = 5, 1
CONTENDERS = ("bare", "through Orbax", "jobkit")
FIGURES = ("to first step", "open", "restore", "SIGTERM to commit", "memory")
OPEN_S = 0.05
NBYTES = 353_000_000
PARSER = parser(__doc__)

_PROGRAM = """
import json, os, resource, signal, sys, time
place, kind, out = sys.argv[1:]
marks = {}
import jax, jax.numpy as jnp, optax
from flax import nnx

class Block(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.LayerNorm(512, rngs=rngs), nnx.LayerNorm(512, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(8, 512, decode=False, rngs=rngs)
        self.wide, self.narrow = nnx.Linear(512, 2048, rngs=rngs), nnx.Linear(2048, 512, rngs=rngs)
    def __call__(self, x):
        x = x + self.attention(self.one(x))
        return x + self.narrow(nnx.gelu(self.wide(self.two(x))))

class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(8192, 512, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(8)])
    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x)

@nnx.jit
def update(model, optimizer, tokens):
    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()
    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss

model = Model(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
tokens = jnp.asarray(jax.random.randint(jax.random.key(0), (2, 33), 0, 8192))
jax.block_until_ready(nnx.state(optimizer))

def train():
    jax.block_until_ready(update(model, optimizer, tokens))
    marks["step"] = time.time()
    marks.setdefault("first", time.time())

def done():
    marks["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with open(out, "w") as file:
        json.dump(marks, file)

if kind == "bare":
    import orbax.checkpoint as ocp
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    parts = {"model": model, "optimizer": optimizer}
    marks["built"] = time.time()
    manager = ocp.CheckpointManager(place, options=ocp.CheckpointManagerOptions(max_to_keep=1))
    step = manager.latest_step() or 0
    marks["opened"] = time.time()
    if step:
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, {name: nnx.state(part) for name, part in parts.items()})
        for name, state in manager.restore(step, args=ocp.args.StandardRestore(like)).items():
            nnx.update(parts[name], state)
        jax.block_until_ready(nnx.state(optimizer))
    marks["restored"] = time.time()
    while True:
        train()
        step += 1
        open(out + ".on", "w").close()
        if stopped:
            break
    manager.save(step, args=ocp.args.StandardSave({name: nnx.state(part) for name, part in parts.items()}))
    manager.wait_until_finished()
    marks["committed"] = time.time()
    done()
    sys.exit(75)

import jobkit
jobkit.Run  # which brings Orbax in, as the import of the bare script has
marks["built"] = time.time()
with jobkit.Run(save_every=None, keep=1, trackers=(), writer="orbax" if kind == "through Orbax" else "jobkit") as run:
    marks["opened"] = time.time()
    run.resume(model=model, optimizer=optimizer)
    jax.block_until_ready(nnx.state(optimizer))
    marks["restored"] = time.time()
    try:
        for step in run.steps(10**9):
            train()
            open(out + ".on", "w").close()
    except jobkit.Preempted:
        last = run._session.checkpoints.last
        marks["committed"] = time.time() - time.monotonic() + last.begun + last.durable_s
        raise
    finally:
        done()
"""


def _life(place: Path, kind: str) -> dict[str, float]:
    """Live one attempt, which is told to stop once it steps; return its figures."""
    script, out, on = place / "train.py", place / "marks.json", place / "marks.json.on"
    script.write_text(_PROGRAM)
    on.unlink(missing_ok=True)
    command = [sys.executable, str(script), str(place / "saved"), kind, str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if kind == "bare":
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(place / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    else:
        environment["JOBKIT_RUN"] = str(place / "saved")
        command = [sys.executable, "-m", "jobkit.supervise", "--", *command]
    with (place / "log").open("w") as log:
        begun = time.time()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while not on.exists():
            if process.poll() is not None:
                raise RuntimeError((place / "log").read_text()[-3000:])
            time.sleep(0.01)
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        if process.wait() != 75:
            raise RuntimeError((place / "log").read_text()[-3000:])
    marks = json.loads(out.read_text())
    return {
        "to first step": marks["first"] - begun,
        "open": marks["opened"] - marks["built"],
        "restore": marks["restored"] - marks["opened"],
        "SIGTERM to commit": marks["committed"] - marks["step"],
        "memory": marks["memory"] / 1e9,
    }


def _raw(place: Path) -> float:
    content = os.urandom(NBYTES)
    begun = time.perf_counter()
    with (place / "raw").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    (place / "raw").unlink()
    return seconds


def picture(taken: dict[str, dict[str, dict[str, list[float]]]], path: Path) -> None:
    """Draw the seconds of every contender."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, name in zip(axes, ("to first step", "restore", "SIGTERM to commit"), strict=True):
        for shift, (cache, by_kind) in enumerate(taken.items()):
            values = [statistics.median(by_kind[kind][name]) for kind in CONTENDERS]
            axis.bar([at + shift * 0.4 for at in range(len(CONTENDERS))], values, 0.38, label=cache)
        axis.set(title=name, ylabel="s")
        axis.set_xticks([at + 0.2 for at in range(len(CONTENDERS))], CONTENDERS)
        axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def claims(given: argparse.Namespace) -> list[Row]:
    """Measure, and print the table."""
    rounds = QUICK if given.quick else ROUNDS
    root = Path(tempfile.mkdtemp(prefix="jobkit-restarts-"))
    taken: dict[str, dict[str, dict[str, list[float]]]] = {
        cache: {kind: {name: [] for name in FIGURES} for kind in CONTENDERS} for cache in ("cold", "warm")
    }
    raw = []
    for kind in CONTENDERS:
        (root / kind).mkdir()
        _life(root / kind, kind)
    for _ in range(rounds):
        raw.append(_raw(root))
        for cache, by_kind in taken.items():
            for kind, figures in by_kind.items():
                if cache == "cold":
                    for place in (root / kind / "cache", root / kind / "saved" / "cache"):
                        with contextlib.suppress(FileNotFoundError):
                            shutil.rmtree(place)
                    forget(root / kind)
                for name, value in _life(root / kind, kind).items():
                    figures[name].append(value)
    shutil.rmtree(root)
    shown = Table("caches", "", *(f"{name} s" for name in FIGURES[:-1]), "memory GB", title=f"{rounds} rounds, medians")
    for cache, by_kind in taken.items():
        for kind, figures in by_kind.items():
            shown.add_row(cache, kind, *(f"{statistics.median(figures[name]):.2f}" for name in FIGURES))
    Console(width=160).print(shown)
    print(f"raw: {median(raw)} s")
    picture(taken, given.pictures / "restarts.png")
    return [*_claimed(taken["warm"], raw), *_opening(taken)]


def _claimed(warm: dict[str, dict[str, list[float]]], raw: list[float]) -> list[Row]:
    bare, before, now = (warm[kind] for kind in CONTENDERS)
    opened, opened_before = (
        ratios(map(sum, zip(figures["open"], figures["restore"], strict=True)), bare["restore"])
        for figures in (now, before)
    )
    listed = [Row("open + restore, 353 MB, warm", "Orbax's restore alone", opened, 0.6, opened_before)]
    for name, peer, theirs, must in (
        ("SIGTERM to commit", "raw", raw, 2.5),
        ("to first step", "bare", bare["to first step"], 0.85),
    ):
        figures, earlier = ratios(now[name], theirs), ratios(before[name], theirs)
        listed.append(Row(f"{name}, 353 MB, warm", peer, figures, must, earlier))
    return listed


def _opening(taken: dict[str, dict[str, dict[str, list[float]]]]) -> list[Row]:
    return [
        Row(f"opening a Run, {cache}", "s", by_kind["jobkit"]["open"], OPEN_S, by_kind["through Orbax"]["open"])
        for cache, by_kind in taken.items()
    ]


if __name__ == "__main__":
    main(PARSER, claims)

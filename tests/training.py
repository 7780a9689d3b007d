"""A small real training that the tests interrupt: NNX with BatchNorm and Dropout, AdamW, shuffled Grain batches.

`attempt` runs one attempt of it in a process of its own. The processes come from a fork server that has imported jax,
flax and orbax but started no backend, so that a test can afford dozens of them.
"""

import atexit
import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from jobkit import contract

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.training_imports"])

_CACHE = tempfile.mkdtemp(prefix="jobkit-test-cache-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

STEPS = 60


def train(
    url: str,
    *,
    steps: int = STEPS,
    save_every: Any = "10 steps",
    keep: int = 2,
    at: dict[int, str] | None = None,
    pause_s: float = 0.0,
    width: int = 8,
    seed: int = 0,
    hook: Any = None,
) -> None:
    """Train, and send this process signals at given steps.

    Args:
        at: Step in progress -> name of a signal, sent when that step's update is done.
        pause_s: Sleep per step, for tests that shoot from outside.
        hook: Called as hook(point, run) at 'opened', 'resumed', 'step', 'ended'.
    """
    import time

    import grain
    import numpy as np
    import optax
    from flax import nnx

    import jobkit

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.hidden = nnx.Linear(4, width, rngs=rngs)
            self.norm = nnx.BatchNorm(width, rngs=rngs)
            self.dropout = nnx.Dropout(0.2, rngs=rngs)
            self.out = nnx.Linear(width, 1, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))

    @nnx.jit
    def update(model: Model, optimizer: nnx.Optimizer[Any], x: Any) -> Any:
        def loss_of(model: Model) -> Any:
            return ((model(x) - x.sum(-1, keepdims=True)) ** 2).mean()

        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    rows = np.random.default_rng(7).normal(size=(64, 4)).astype(np.float32)
    data = iter(grain.MapDataset.source(rows).seed(3).shuffle().repeat().batch(8).to_iter_dataset())
    model = Model(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adamw(optax.cosine_decay_schedule(1e-2, steps)), wrt=nnx.Param)
    noise = np.random.default_rng(seed)
    hook = hook or (lambda point, run: None)
    with jobkit.Run(url, save_every=save_every, keep=keep) as run:
        hook("opened", run)
        run.resume(model=model, optimizer=optimizer, data=data, noise=noise, seen=0)
        hook("resumed", run)
        for step in run.steps(steps):
            batch = next(data) + noise.normal(size=(8, 4)).astype(np.float32) * 0.1
            run.state.seen += 8
            run.log(loss=update(model, optimizer, batch))
            if at and step in at:
                os.kill(os.getpid(), getattr(signal, at[step]))
            if pause_s:
                time.sleep(pause_s)
            hook("step", run)
        hook("ended", run)


def _child(
    function: Any, log: str, cache: str, environment: dict[str, str], arguments: tuple[Any, ...], named: Any
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    try:
        function(*arguments, **named)
    except SystemExit:
        raise
    except BaseException as error:
        # What the interpreter would do at top level: multiprocessing has its own idea of exit codes.
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as leave:
            code = leave.code
        else:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code or 0))


def start(
    function: Any, *arguments: Any, log: Path, environment: dict[str, str] | None = None, **named: Any
) -> multiprocessing.process.BaseProcess:
    """Start `function` in a process of its own; its output goes to `log`."""
    clean = {contract.ENV_RUN: "", contract.ENV_ATTEMPT: "", contract.ENV_SUPERVISOR: "", contract.ENV_FAULT: ""}
    process = _SERVER.Process(
        target=_child, args=(function, str(log), _CACHE, clean | (environment or {}), arguments, named), daemon=True
    )
    process.start()
    return process


def attempt(
    url: Path | str,
    *,
    fault: str = "",
    timeout_s: float = 60.0,
    function: Any = train,
    environment: dict[str, str] | None = None,
    log: Path | None = None,
    **named: Any,
) -> tuple[int, str]:
    """Run one attempt to its end; return its exit code (negative for a signal) and what it printed."""
    log = log or Path(url).with_name(Path(url).name + ".log")
    before = log.stat().st_size if log.exists() else 0
    process = start(function, str(url), log=log, environment={contract.ENV_FAULT: fault} | (environment or {}), **named)
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"still running after {timeout_s} s: {log.read_text()[before:]}")
    return process.exitcode, log.read_text()[before:]


def digest(url: Path | str, step: int | None = None) -> str:
    """Return a digest of everything a committed step holds: leaf names, kinds, bytes and object states."""
    import numpy as np
    import orbax.checkpoint as ocp

    from jobkit import commits, state
    from jobkit.ledger import read_json
    from jobkit.storage import Store

    store = Store(url)
    step = commits.steps(store)[-1] if step is None else step
    assert commits.problems(store, step) == []
    table = (read_json(store, f"{contract.step_dir(step)}/{contract.STATE}") or {})["parts"]
    tree = ocp.PyTreeCheckpointer().restore(store.file(contract.step_dir(step)) / contract.ORBAX_ITEM)
    total = hashlib.sha256(repr((step, table)).encode())
    for path in sorted(state.stored_paths(table)):
        node = tree
        for name in path:
            node = node[name]
        total.update(repr(path).encode() + np.asarray(node).tobytes())
    return total.hexdigest()

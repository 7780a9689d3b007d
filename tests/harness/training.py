"""A small real training that the tests interrupt: NNX with BatchNorm and Dropout, AdamW, shuffled Grain batches.

`attempt` runs one attempt of it in a process of its own. The processes come from a fork server that has imported jax,
flax and orbax but started no backend, so that a test can afford dozens of them.
"""

import atexit
import functools
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
_SERVER.set_forkserver_preload(["tests.harness.training_imports"])

STEPS = 60


@functools.cache
def _cache() -> str:
    """Make the directory of what this process's trainings compile; they import this module too, and need none."""
    made = tempfile.mkdtemp(prefix="jobkit-test-cache-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


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
    trackers: Any = (),
    writer: Any = "jobkit",
) -> None:
    """Train, and send this process signals at given steps.

    Args:
        at: Step in progress -> name of a signal, sent when that step's update is done.
        pause_s: Sleep per step, for tests that shoot from outside.
        hook: Called as hook(point, run) at 'opened', 'resumed', 'begin' (of a step), 'step' (its end), 'ended'.
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
    with jobkit.Run(url, save_every=save_every, keep=keep, trackers=trackers, writer=writer) as run:
        hook("opened", run)
        run.resume(model=model, optimizer=optimizer, data=data, noise=noise, seen=0)
        hook("resumed", run)
        for step in run.steps(steps):
            hook("begin", run)
            batch = next(data) + noise.normal(size=(8, 4)).astype(np.float32) * 0.1
            run.state.seen += 8
            run.log(loss=update(model, optimizer, batch))
            if at and step in at:
                os.kill(os.getpid(), getattr(signal, at[step]))
            if pause_s:
                time.sleep(pause_s)
            hook("step", run)
        hook("ended", run)


def _leave_in_order() -> None:
    """Do what JAX does when the interpreter ends: multiprocessing leaves without."""
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def train_many(
    url: str,
    *,
    steps: int = STEPS,
    save_every: Any = "10 steps",
    own_data: bool = True,
    pause_s: float = 0.0,
    hook: Any = None,
    writer: Any = "jobkit",
) -> None:
    """Train in several processes: sharded and replicated arrays, and what belongs to each process alone.

    Args:
        own_data: Whether each process draws its part of a batch itself, from a generator of its own; else all draw the
            same whole batch and take their part.
        pause_s: Sleep per step, for tests that shoot from outside.
        hook: Called as hook(point, run) at 'opened', 'restoring' (in the middle of `resume`), 'resumed', 'begin' (of a
            step), 'step' (its end), 'ended'.
    """
    import time

    import jobkit

    jobkit.initialize()
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    start = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)

    def placed(value: Any, sharding: Any) -> Any:
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    params = {"w": placed(start, rows), "b": placed(np.zeros(16, np.float32), whole)}
    tx = optax.adam(1e-2)
    opt = jax.jit(tx.init)(params)

    @jax.jit
    def update(params: Any, opt: Any, key: Any, x: Any) -> Any:
        def loss_of(params: Any) -> Any:
            kept = jax.random.bernoulli(key, 0.8, x.shape)
            return ((jnp.where(kept, x, 0) @ params["w"] + params["b"] - x.sum(-1, keepdims=True)) ** 2).mean()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, opt = tx.update(gradients, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    count, index = jax.process_count(), jax.process_index()
    data = np.random.default_rng(100 + index if own_data else 100)
    hook = hook or (lambda point, run: None)

    class Watch:
        """Something whose position is restored in the middle of a resume."""

        def get_state(self) -> int:
            return 0

        def set_state(self, state: int) -> None:
            hook("restoring", run)

    with jobkit.Run(url, save_every=save_every, keep=2, writer=writer) as run:
        hook("opened", run)
        run.resume(params=params, opt=opt, data=data, key=jax.random.key(1), seen=0, watch=Watch())
        hook("resumed", run)
        for _ in run.steps(steps):
            hook("begin", run)
            share = data.normal(size=(8 // count if own_data else 8, 8)).astype(np.float32)
            own = share if own_data else share[index * (8 // count) : (index + 1) * (8 // count)]
            x = jax.make_array_from_process_local_data(rows, own)
            run.state.key, key = jax.random.split(run.state.key)
            run.state.params, run.state.opt, loss = update(run.state.params, run.state.opt, key, x)
            run.state.seen += 8
            run.log(loss=loss)
            if pause_s:
                time.sleep(pause_s)
            hook("step", run)
        hook("ended", run)


def train_changing(url: str, *, steps: int) -> None:
    """Train in several processes from numpy weights, which become arrays across all; each keeps a list of its own."""
    import jobkit

    jobkit.initialize()
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, out_shardings=(whole, rows))
    def update(w: Any, x: Any) -> Any:
        return jnp.float32(w) * 0.9 + x.sum(0), x * 1.5

    with jobkit.Run(url, save_every="4 steps", keep=9) as run:
        run.resume(w=np.random.default_rng(0).normal(size=4), best=None, steps=[], optimizer=None)
        for step in run.steps(steps):
            x = jax.make_array_from_callback((8, 4), rows, lambda index: np.ones((8, 4), np.float32)[index])
            run.state.w, wide = update(run.state.w, x)
            run.state.best = {"wide": wide}
            run.state.steps.append(step)


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
        _leave_in_order()
    except SystemExit:
        _leave_in_order()
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
    ours = ("RUN", "ATTEMPT", "SUPERVISOR", "FAULT", "PROCESS", "PROCESSES", "COORDINATOR")
    clean = dict.fromkeys([f"JOBKIT_{name}" for name in ours], "")
    process = _SERVER.Process(
        target=_child, args=(function, str(log), _cache(), clean | (environment or {}), arguments, named), daemon=True
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


def processes(count: int, *, devices: int = 1) -> list[dict[str, str]]:
    """Return the environment of each of several processes of one attempt, as a launcher would set it."""
    from jobkit.supervise.processes import free_port

    shared = {
        contract.ENV_PROCESSES: str(count),
        contract.ENV_COORDINATOR: f"127.0.0.1:{free_port()}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    return [shared | {contract.ENV_PROCESS: str(index)} for index in range(count)]


def start_many(
    url: Path | str, count: int, *, devices: int = 1, environment: dict[str, str] | None = None, **named: Any
) -> list[multiprocessing.process.BaseProcess]:
    """Start one attempt of `train_many` in so many processes; their logs are beside the run directory."""
    return [
        start(
            named.get("function", train_many),
            str(url),
            log=Path(f"{url}-{index}.log"),
            environment=own | (environment or {}),
            **{name: value for name, value in named.items() if name != "function"},
        )
        for index, own in enumerate(processes(count, devices=devices))
    ]


def join_many(started: list[multiprocessing.process.BaseProcess], timeout_s: float = 90.0) -> list[int | None]:
    """Wait for several processes; return their exit codes: negative for a signal, None for one that hung."""
    import time

    deadline = time.monotonic() + timeout_s
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def values(url: Path | str, step: int, part: str = "params") -> dict[str, Any]:
    """Return the arrays of one part of a committed step, by their names."""
    from jobkit.checkpoint import orbax_io, state
    from jobkit.rundir.store import Store

    store = Store(url)
    wanted = [path for path in state.stored_paths(state.table_of(store, step)) if path[0] == part]
    return {
        path[1]: array.tolist() for path, array in sorted(orbax_io.read(store, step, dict.fromkeys(wanted)).items())
    }


def digest(url: Path | str, step: int | None = None, *, arrays_only: bool = False) -> str:
    """Return a digest of everything a committed step holds: leaf names, kinds, bytes and object states.

    Args:
        arrays_only: Only the arrays that belong to all processes together.
    """
    import numpy as np

    from jobkit.checkpoint import orbax_io, state
    from jobkit.rundir import commits
    from jobkit.rundir.store import Store

    store = Store(url)
    step = commits.steps(store)[-1] if step is None else step
    assert commits.problems(store, step) == []
    directory = store.file(contract.step_dir(step))
    table = state.table_of(store, step)
    total = hashlib.sha256(b"" if arrays_only else repr((step, table)).encode())
    found = orbax_io.read(store, step, dict.fromkeys(state.stored_paths(table)))
    for path in sorted(found):
        total.update(repr(path).encode() + np.asarray(found[path]).tobytes())
    if arrays_only:
        return total.hexdigest()
    for path in [*sorted(directory.glob("local*.bin")), *sorted(directory.glob("state-*.json"))]:
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()

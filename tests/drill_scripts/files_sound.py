"""It writes a table of losses, a line a step, a log with times, and its result."""

import time
from pathlib import Path

import jax.numpy as jnp

import jobkit

with jobkit.Run() as run:
    state = run.resume(w=jnp.zeros(3), optimizer=None)
    with Path(run.url, "losses.csv").open("a") as table, Path(run.url, "times.log").open("a") as log:
        for step in run.steps(30):
            state.w = 0.9 * state.w + jnp.sin(step)
            print(step, float(state.w[0]), file=table, flush=True)
            print(time.time(), file=log, flush=True)
Path(run.url, "result.txt").write_text(str(state.w.tolist()))

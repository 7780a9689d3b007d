"""A counter in a file goes on where a kill left it, although the steps are done again."""

from pathlib import Path

import jax.numpy as jnp

import jobkit

with jobkit.Run() as run:
    state = run.resume(w=jnp.zeros(3), optimizer=None)
    path = Path(run.url, "counter.txt")
    for _ in run.steps(30):
        count = int(path.read_text()) if path.exists() else 0
        path.write_text(str(count + 1))
        state.w = state.w + 1 / (count + 1)

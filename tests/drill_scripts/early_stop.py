"""Early stopping with `break`; how often in a row it did not get better is a part."""

import jax.numpy as jnp

import jobkit

with jobkit.Run() as run:
    state = run.resume(w=jnp.zeros(3), bad=0, optimizer=None)
    for step in run.steps(1000):
        state.w = state.w + 1
        if step % 4 == 3:
            state.bad += 1
            if state.bad >= 8:
                break

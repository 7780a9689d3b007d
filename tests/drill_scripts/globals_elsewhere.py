"""A module of its own counts its calls in a global."""

import jax.numpy as jnp
from counting import rate

import jobkit

with jobkit.Run() as run:
    state = run.resume(w=jnp.zeros(3), optimizer=None)
    for step in run.steps(30):
        state.w = state.w + rate() * jnp.sin(step)

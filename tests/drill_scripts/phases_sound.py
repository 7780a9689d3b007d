"""Two phases in one run: the second one goes on from the first one's parameters."""

import jax.numpy as jnp

import jobkit

with jobkit.Run() as run:
    state = run.resume(teacher=jnp.zeros(3), student=jnp.zeros(3), optimizer=None)
    for step in run.steps(14):
        state.teacher = 0.9 * state.teacher + jnp.sin(step)
    for step in run.steps(30):
        state.student = state.student + 0.1 * (state.teacher - state.student) * step

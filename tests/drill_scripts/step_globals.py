"""A global and a closure that follow from the step alone, made anew at each."""

import jax
import jax.numpy as jnp

import jobkit

progress = 0.0
grad = jax.jit(jax.grad(lambda w, x: ((x @ w - x.sum(-1)) ** 2).mean()))


def schedule(step: int):
    """Return what says the learning rate."""
    return lambda: 0.1 * (1 - step / 40)


with jobkit.Run() as run:
    run.resume(w=jnp.zeros(4), optimizer=None)
    for step in run.steps(40):
        progress, rate = step / 40, schedule(step)
        x = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (8, 4))
        run.state.w -= rate() * (1 - progress) * grad(run.state.w, x)

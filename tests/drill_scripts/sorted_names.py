"""Goes through a set of names in sorted order."""

import jax
import jax.numpy as jnp

import jobkit

NAMES = {"encoder", "decoder", "head", "embedding"}
grad = jax.jit(jax.grad(lambda w, x: ((x @ w - x.sum(-1)) ** 2).mean()))
with jobkit.Run() as run:
    run.resume(**{name: jnp.full(4, 0.1) for name in sorted(NAMES)}, optimizer=None)
    for step in run.steps(40):
        for place, name in enumerate(sorted(NAMES)):
            x = jax.random.normal(jax.random.fold_in(jax.random.key(place), step), (8, 4))
            setattr(run.state, name, getattr(run.state, name) - 0.05 * grad(getattr(run.state, name), x))

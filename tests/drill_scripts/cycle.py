"""itertools.cycle in a local begins anew."""

import itertools

import jax
import jax.numpy as jnp

import jobkit

grad = jax.jit(jax.grad(lambda w, x: ((x @ w - x.sum(-1)) ** 2).mean()))
with jobkit.Run() as run:
    run.resume(w=jnp.zeros(4), optimizer=None)
    rates = itertools.cycle([0.1, 0.01, 0.03, 0.05, 0.02, 0.07, 0.04])
    for step in run.steps(40):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (8, 4))
        run.state.w -= next(rates) * grad(run.state.w, x)

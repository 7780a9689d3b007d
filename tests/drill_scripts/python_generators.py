"""Python's and NumPy's generators of its own, both parts."""

import random

import jax
import jax.numpy as jnp
import numpy as np

import jobkit

grad = jax.jit(jax.grad(lambda w, x: ((x @ w - x.sum(-1)) ** 2).mean()))
coin, noise = random.Random(0), np.random.default_rng(0)
with jobkit.Run() as run:
    run.resume(w=jnp.zeros(4), coin=coin, noise=noise, optimizer=None)
    for _ in run.steps(40):
        x = noise.normal(size=(8, 4)).astype(np.float32)
        if coin.random() < 0.8:
            run.state.w -= 0.05 * grad(run.state.w, x)

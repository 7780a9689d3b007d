"""What the environment says is the same for every attempt; the host's name and the attempt are only printed."""

import os
import socket

import jax
import jax.numpy as jnp

import jobkit

RATE = float(os.environ.get("RATE", "0.05"))
grad = jax.jit(jax.grad(lambda w, x: ((x @ w - x.sum(-1)) ** 2).mean()))
with jobkit.Run() as run:
    print(f"attempt {run.attempt} on {socket.gethostname()}, process {os.getpid()}")
    run.resume(w=jnp.zeros(4), optimizer=None)
    for step in run.steps(40):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (8, 4))
        run.state.w -= RATE * grad(run.state.w, x)

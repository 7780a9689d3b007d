"""How far a thread has counted by then decides what is added."""

import threading
import time

import jax.numpy as jnp

import jobkit

counted = [0]


def count() -> None:
    while True:
        counted[0] += 1
        time.sleep(1e-4)


with jobkit.Run() as run:
    state = run.resume(w=jnp.zeros(3), optimizer=None)
    threading.Thread(target=count, daemon=True).start()
    for _ in run.steps(30):
        time.sleep(0.002)
        state.w = 0.9 * state.w + counted[0]

"""A thread makes the batches ahead; which one is next is known from the step alone."""

import queue
import threading

import jax.numpy as jnp
import numpy as np

import jobkit


def ahead(first: int, into: "queue.Queue[np.ndarray]") -> None:
    for number in range(first, 30):
        into.put(np.random.default_rng(number).normal(size=3).astype(np.float32))


with jobkit.Run() as run:
    state = run.resume(w=jnp.zeros(3), optimizer=None)
    batches: "queue.Queue[np.ndarray]" = queue.Queue(4)
    threading.Thread(target=ahead, args=(run.step, batches), daemon=True).start()
    for _ in run.steps(30):
        state.w = 0.9 * state.w + batches.get()

"""Epochs in a loop of its own; the order of the data is made from the epoch's number."""

import jax.numpy as jnp
import numpy as np

import jobkit

rows = np.random.default_rng(0).normal(size=16).astype(np.float32)


def main() -> None:
    with jobkit.Run() as run:
        state = run.resume(w=jnp.zeros(()), epoch=0, optimizer=None)
        for epoch in run.through(range(state.epoch, 12)):
            for row in rows[np.random.default_rng(epoch).permutation(16)]:
                state.w = 0.9 * state.w + row
            state.epoch = epoch + 1
            run.save(epoch + 1)


main()

"""Epochs in a loop of its own; each shuffles the data once more, and neither the data nor the generator is a part."""

import jax.numpy as jnp
import numpy as np

import jobkit


def main() -> None:
    rows = np.random.default_rng(0).normal(size=16).astype(np.float32)
    with jobkit.Run() as run:
        state = run.resume(w=jnp.zeros(()), epoch=0, optimizer=None)
        for epoch in run.through(range(state.epoch, 12)):
            rows = rows[np.random.default_rng(epoch).permutation(16)]
            for row in rows:
                state.w = 0.9 * state.w + row
            state.epoch = epoch + 1
            run.save(epoch + 1)


main()

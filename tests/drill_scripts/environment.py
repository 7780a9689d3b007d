"""The noise is scaled by what the environment says of the attempt."""

import os

import jax.numpy as jnp

import jobkit


def main() -> None:
    scale = 1.0 / (1 + int(os.environ.get("JOBKIT_ATTEMPT", "0")))
    with jobkit.Run() as run:
        state = run.resume(w=jnp.zeros(3), optimizer=None)
        for step in run.steps(30):
            state.w = state.w + scale * jnp.sin(step)


main()

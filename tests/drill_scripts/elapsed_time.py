"""The learning rate falls with the seconds since the start, which no clock that stands still can stop."""

import time

import jax.numpy as jnp

import jobkit


def main() -> None:
    began = time.monotonic()
    with jobkit.Run() as run:
        state = run.resume(w=jnp.zeros(3), optimizer=None)
        for step in run.steps(30):
            state.w = state.w + jnp.sin(step) / (1 + time.monotonic() - began)


main()

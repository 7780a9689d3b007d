"""A schedule that remembers, in its closure, how often it was asked."""

from collections.abc import Callable

import jax.numpy as jnp

import jobkit


def schedule() -> Callable[[], float]:
    asked = 0

    def rate() -> float:
        nonlocal asked
        asked += 1
        return 0.9**asked

    return rate


def main() -> None:
    rate = schedule()
    with jobkit.Run() as run:
        state = run.resume(w=jnp.zeros(3), optimizer=None)
        for step in run.steps(30):
            state.w = state.w + rate() * jnp.sin(step)


main()

"""It trains a copy of what it resumed: every checkpoint holds the state of the start."""

import jax
import jax.numpy as jnp

import jobkit


def main() -> None:
    """Train."""
    update = jax.jit(lambda w: w - 0.1 * (w - 3.0))
    with jobkit.Run() as run:
        w = run.resume(w=jnp.zeros(64), optimizer=None).w
        for _ in run.steps(40):
            w = update(w)


main()

"""The Grain iterator is no part: after a restart it begins anew."""

import jax.numpy as jnp
from grain_sound import batches

import jobkit


def main() -> None:
    data = batches()
    with jobkit.Run() as run:
        run.resume(w=jnp.zeros(()), optimizer=None)
        for _ in run.steps(30):
            run.state.w = 0.9 * run.state.w + next(data).mean()


main()

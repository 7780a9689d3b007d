"""An epoch's mean loss, in a local, sets the learning rate of the next epoch."""

import jax.numpy as jnp

import jobkit


def main() -> None:
    total, count, rate = 0.0, 0, 0.1
    with jobkit.Run() as run:
        state = run.resume(w=jnp.zeros(3), rate=rate, optimizer=None)
        for step in run.steps(30):
            loss = ((state.w - jnp.sin(step)) ** 2).mean()
            state.w = state.w - state.rate * (state.w - jnp.sin(step))
            total, count = total + float(loss), count + 1
            if step % 10 == 9:
                state.rate = 0.1 / (1 + total / count)
                total, count = 0.0, 0


main()

"""The pool of earlier samples, an attribute of the trainer's, is no part."""

import jax
import jax.numpy as jnp
from gan_sound import train_step, tx

import jobkit


class Trainer:
    """Holds what the training needs."""

    def __init__(self) -> None:
        self._pool = [jnp.zeros(4)]

    def train(self) -> None:
        """Train."""
        generator, critic = jnp.full(4, 0.1), jnp.full(4, 0.2)
        with jobkit.Run() as run:
            state = run.resume(generator=generator, critic=critic, opts=(tx.init(generator), tx.init(critic)))
            for step in run.steps(30):
                noise = jax.random.normal(jax.random.key(step), (4,))
                state.generator, state.critic, state.opts, fake = train_step(
                    state.generator, state.critic, state.opts, noise, sum(self._pool) / len(self._pool)
                )
                self._pool = [*self._pool[-9:], fake]


Trainer().train()

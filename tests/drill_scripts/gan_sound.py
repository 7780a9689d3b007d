"""Two models that learn from each other, with an optimizer each, and the pool of samples that one draws from."""

import jax
import jax.numpy as jnp
import optax

import jobkit

tx = optax.adam(1e-2)


@jax.jit
def train_step(generator, critic, opts, noise, pool):
    fake = jnp.tanh(noise * generator)

    def critic_loss(critic):
        return jnp.mean(critic * pool) - jnp.mean(critic * jnp.sin(noise))

    updates, critic_opt = tx.update(jax.grad(critic_loss)(critic), opts[1])
    critic = optax.apply_updates(critic, updates)
    gradient = jax.grad(lambda generator: -jnp.mean(critic * jnp.tanh(noise * generator)))(generator)
    updates, generator_opt = tx.update(gradient, opts[0])
    return optax.apply_updates(generator, updates), critic, (generator_opt, critic_opt), fake


def main() -> None:
    generator, critic = jnp.full(4, 0.1), jnp.full(4, 0.2)
    with jobkit.Run() as run:
        state = run.resume(
            generator=generator, critic=critic, opts=(tx.init(generator), tx.init(critic)), pool=jnp.zeros(4)
        )
        for step in run.steps(30):
            noise = jax.random.normal(jax.random.key(step), (4,))
            state.generator, state.critic, state.opts, fake = train_step(
                state.generator, state.critic, state.opts, noise, state.pool
            )
            state.pool = 0.5 * state.pool + 0.5 * fake


if __name__ == "__main__":
    main()

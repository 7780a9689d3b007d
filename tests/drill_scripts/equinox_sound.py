"""An Equinox model, a value that each step makes anew."""

import equinox
import jax
import jax.numpy as jnp
import optax

import jobkit

tx = optax.adam(1e-2)


@equinox.filter_jit
def train_step(model, opt, x):
    def loss_of(model):
        return ((jax.vmap(model)(x) - x.sum(-1, keepdims=True)) ** 2).mean()

    loss, gradients = equinox.filter_value_and_grad(loss_of)(model)
    updates, opt = tx.update(gradients, opt)
    return equinox.apply_updates(model, updates), opt, loss


def main() -> None:
    model = equinox.nn.MLP(4, 1, 8, 1, key=jax.random.key(0))
    with jobkit.Run() as run:
        run.resume(model=model, opt=tx.init(equinox.filter(model, equinox.is_array)))
        for step in run.steps(30):
            x = jnp.full((8, 4), jnp.sin(step))
            run.state.model, run.state.opt, loss = train_step(run.state.model, run.state.opt, x)
            run.log(loss=loss)


if __name__ == "__main__":
    main()

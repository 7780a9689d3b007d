"""A Linen model in a TrainState, taken out of the run and put back at each step."""

import jax
import jax.numpy as jnp
import optax
from flax import linen
from flax.training.train_state import TrainState

import jobkit

model = linen.Dense(1)


@jax.jit
def train_step(state, x):
    def loss_of(params):
        return ((state.apply_fn({"params": params}, x) - x.sum(-1, keepdims=True)) ** 2).mean()

    return state.apply_gradients(grads=jax.grad(loss_of)(state.params))


def new_state() -> TrainState:
    params = model.init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-2))


if __name__ == "__main__":
    state = new_state()
    with jobkit.Run() as run:
        run.resume(params=state.params, opt=state.opt_state)
        for step in run.steps(30):
            state = state.replace(step=step, params=run.state.params, opt_state=run.state.opt)
            state = train_step(state, jnp.full((8, 4), jnp.sin(step)))
            run.state.params, run.state.opt = state.params, state.opt_state

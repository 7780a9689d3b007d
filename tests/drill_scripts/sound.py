"""A small training that does everything right; the scripts beside it have one mistake each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jobkit


class Batches:
    """Batches without end, with a position."""

    def __init__(self) -> None:
        self.position = 0

    def __next__(self) -> np.ndarray:
        self.position += 1
        return np.random.default_rng(self.position).normal(size=(8, 4)).astype(np.float32)

    def get_state(self) -> dict[str, int]:
        """Return the position."""
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        """Go back to a position."""
        self.position = state["position"]


def new_params() -> dict[str, jax.Array]:
    return {"w": jnp.full((4, 1), 0.1), "b": jnp.zeros(1)}


tx = optax.adam(1e-2)


@jax.jit
def train_step(params, opt, x, noise, scale=1.0):
    """Return new parameters, optimizer state and the loss."""

    def loss_of(params):
        return ((x @ params["w"] + params["b"] - x.sum(-1, keepdims=True) + 0.1 * noise) ** 2).mean()

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, opt = tx.update(jax.tree.map(lambda g: g * scale, gradients), opt, params)
    return optax.apply_updates(params, updates), opt, loss


def main() -> None:
    params = new_params()
    data = Batches()
    with jobkit.Run(save_every="10m") as run:
        run.resume(params=params, opt=tx.init(params), data=data, key=jax.random.key(0))
        for _ in run.steps(60):
            batch = next(data)
            run.state.key, key = jax.random.split(run.state.key)
            noise = jax.random.normal(key, (8, 1))
            run.state.params, run.state.opt, loss = train_step(run.state.params, run.state.opt, batch, noise)
            run.log(loss=loss)


if __name__ == "__main__":
    main()

"""An NNX model with dropout, its optimizer and its generators, all of them parts."""

import jax.numpy as jnp
import optax
from flax import nnx

import jobkit


class Net(nnx.Module):
    """Two layers, with dropout between them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner, self.outer = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        """Return the prediction."""
        return self.outer(self.dropout(nnx.relu(self.inner(x))))


@nnx.jit
def train_step(model, optimizer, x):
    loss, gradients = nnx.value_and_grad(lambda model: ((model(x) - x.sum(-1, keepdims=True)) ** 2).mean())(model)
    optimizer.update(model, gradients)
    return loss


if __name__ == "__main__":
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.01), wrt=nnx.Param)
    loss = 0.0
    with jobkit.Run() as run:
        run.resume(model=model, optimizer=optimizer)
        for step in run.steps(30):
            loss = train_step(model, optimizer, jnp.full((8, 4), jnp.sin(step)))
            run.log(loss=loss)
    print(loss)

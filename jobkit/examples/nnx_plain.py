"""Train a small classifier in Flax NNX, with BatchNorm and Dropout, on points drawn from a seed."""

from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
import optax
from flax import nnx


class Classifier(nnx.Module):
    """A perceptron of one hidden layer."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(8, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map points (batch, 8) to logits (batch, 2)."""
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def loss_of(model: Classifier, batch: Any) -> jax.Array:
    """Return the mean cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer[Any], batch: Any) -> jax.Array:
    """Update the model in place and return the loss."""
    loss, grads = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, grads)
    return loss


def make_data() -> tuple[Any, Iterator[Any]]:
    """Return all points, and shuffled batches of them without end."""
    x = np.random.default_rng(0).normal(size=(1024, 8)).astype(np.float32)
    y = (np.sin(x).sum(axis=1) > 0).astype(np.int32)
    points = [{"x": x[i], "y": y[i]} for i in range(len(x))]
    batches = grain.MapDataset.source(points).shuffle(seed=0).repeat().batch(32).to_iter_dataset()
    return {"x": x, "y": y}, iter(batches)


def main() -> None:
    """Train, then print the loss over all points."""
    everything, batches = make_data()
    model = Classifier(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    for _ in range(200):
        train_step(model, optimizer, next(batches))

    model.eval()
    print(f"final loss {float(loss_of(model, everything))!r}")


if __name__ == "__main__":
    main()

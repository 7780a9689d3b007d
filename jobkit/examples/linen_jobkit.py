"""Train a small classifier in Flax Linen, with BatchNorm and Dropout, on points drawn from a seed."""

from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state

import jobkit


class Classifier(nn.Module):
    """A perceptron of one hidden layer."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map points (batch, 8) to logits (batch, 2)."""
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(32)(x)))
        return nn.Dense(2)(nn.Dropout(0.2, deterministic=not train)(x))


class TrainState(train_state.TrainState):
    """The usual state, with BatchNorm's statistics and the dropout key."""

    batch_stats: Any
    key: jax.Array


def make_state() -> TrainState:
    """Return the state before the first step."""
    model = Classifier()
    init_key, key = jax.random.split(jax.random.key(0))
    variables = model.init(init_key, np.zeros((1, 8), np.float32), train=False)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.adamw(1e-2),
        batch_stats=variables["batch_stats"],
        key=key,
    )


@jax.jit
def train_step(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
    """Return the next state, and the loss."""

    def loss_of(params: Any) -> Any:
        logits, changed = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["x"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(state.key, state.step)},
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
        return loss, changed["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


def evaluate(state: TrainState, batch: Any) -> float:
    """Return the loss without dropout."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, batch["x"], train=False)
    return float(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean())


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
    state = make_state()

    with jobkit.Run(save_every="20 steps") as run:
        run.resume(train=state, data=batches)
        for _ in run.steps(200):
            run.state.train, loss = train_step(run.state.train, next(batches))
            run.log(loss=loss)

    print(f"final loss {evaluate(run.state.train, everything)!r}")


if __name__ == "__main__":
    main()

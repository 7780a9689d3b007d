"""Every checkpoint strategy, each as a whole training: `python -m jobkit.examples.strategies DIRECTORY`.

What is usually a page of checkpoint code (which step, which directory, what goes in, what is best, what to delete,
waiting for the write, putting it back) is the arguments of `Run`. A strategy's run survives preemption and kills
whatever it saves besides, since a notice always commits the state first.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import jobkit

EPOCH = 16
"""Steps per epoch."""
STEPS = 10 * EPOCH


class Model(nnx.Module):
    """A small regression, with BatchNorm and Dropout: state that is no parameter."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(8, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map points (batch, 8) to values (batch,)."""
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))[:, 0]


def loss_of(model: Model, batch: Any) -> jax.Array:
    """Return the mean squared error."""
    return ((model(batch["x"]) - batch["y"]) ** 2).mean()


@nnx.jit
def train_step(model: Model, optimizer: nnx.Optimizer[Any], batch: Any) -> jax.Array:
    """Update the model in place and return the loss."""
    loss, grads = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, grads)
    return loss


class Training(NamedTuple):
    """All that a step depends on, and a held-out set."""

    model: Model
    optimizer: nnx.Optimizer[Any]
    batches: Iterator[Any]
    held_out: Any

    def evaluate(self) -> float:
        """Return the loss on the held-out set, without dropout."""
        return float(loss_of(nnx.view(self.model, deterministic=True, use_running_average=True), self.held_out))


def make(learning_rate: float = 1e-2) -> Training:
    """Make a training from its seeds.

    Args:
        learning_rate: Of AdamW.
    """
    x = np.random.default_rng(0).normal(size=(16 * EPOCH + 64, 8)).astype(np.float32)
    y = np.sin(x).sum(axis=1)
    points = [{"x": x[i], "y": y[i]} for i in range(len(x) - 64)]
    batches = iter(grain.MapDataset.source(points).shuffle(seed=0).repeat().batch(16).to_iter_dataset())
    model = Model(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(learning_rate), wrt=nnx.Param)
    return Training(model, optimizer, batches, {"x": x[-64:], "y": y[-64:]})


def periodic(url: str) -> Training:
    """Save every two epochs and keep the newest three; with `save_every="10m"` by the clock."""
    training = make()
    with jobkit.Run(url, save_every=f"{2 * EPOCH} steps", keep=3) as run:
        run.resume(model=training.model, optimizer=training.optimizer, data=training.batches)
        for _ in run.steps(STEPS):
            run.log(loss=train_step(training.model, training.optimizer, next(training.batches)))
    return training


def best_only(url: str) -> Training:
    """Save only what improves on the held-out loss, and end with the best model."""
    training = make()
    with jobkit.Run(url, save_every="best", keep=1, keep_best=("val_loss", "min")) as run:
        run.resume(model=training.model, optimizer=training.optimizer, data=training.batches)
        for step in run.steps(STEPS):
            run.log(loss=train_step(training.model, training.optimizer, next(training.batches)))
            if (step + 1) % EPOCH == 0:
                run.save(val_loss=training.evaluate())
        run.restore("best")
    return training


def combined(url: str) -> Training:
    """Save each epoch and every ten minutes; keep the newest three to resume from, and the best."""
    training = make()
    with jobkit.Run(url, save_every="10m", keep=3, keep_best=("val_loss", "min")) as run:
        run.resume(model=training.model, optimizer=training.optimizer, data=training.batches)
        for step in run.steps(STEPS):
            run.log(loss=train_step(training.model, training.optimizer, next(training.batches)))
            if (step + 1) % EPOCH == 0:
                run.save(val_loss=training.evaluate())
        run.restore("best")
    return training


def own_loop(url: str) -> Training:
    """Keep a loop of one's own, epochs and all, with the public parts of `Run`."""
    training = make()
    with jobkit.Run(url, save_every=None) as run:
        progress = run.resume(
            model=training.model, optimizer=training.optimizer, data=training.batches, epoch=0, best=float("inf")
        )
        for epoch in run.through(range(progress.epoch, STEPS // EPOCH)):
            for _ in range(EPOCH):
                train_step(training.model, training.optimizer, next(training.batches))
            progress.epoch = epoch + 1
            progress.best = min(progress.best, training.evaluate())
            run.save(progress.epoch * EPOCH)
    return training


def load_elsewhere(url: str) -> Training:
    """Load a finished run's best model alone, into a model that was made from another seed."""
    training = make()._replace(model=Model(rngs=nnx.Rngs(42)))
    jobkit.load(url, step="best", model=training.model)
    return training


def export(url: str, out: str) -> Any:
    """Export the best parameters for deployment; plain Orbax reads them, without jobkit."""
    jobkit.export_params(url, out, step="best")
    with ocp.StandardCheckpointer() as plain:
        return plain.restore(Path(out).absolute())


def main(directory: str) -> None:
    """Run every strategy in a directory of its own and print what each one kept."""
    for strategy in (periodic, best_only, combined, own_loop):
        url = f"{directory}/{strategy.__name__}"
        val_loss = strategy(url).evaluate()
        kept = sorted(int(path.parent.name) for path in Path(url).glob("checkpoints/*/commit.json"))
        print(f"{strategy.__name__:10} val_loss {val_loss:.4f}, checkpoints {kept}")
    print(f"loaded     val_loss {load_elsewhere(f'{directory}/combined').evaluate():.4f}")
    print(f"exported   {sorted(export(f'{directory}/combined', f'{directory}/exported'))}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/strategies")

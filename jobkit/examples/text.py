"""Train a small character transformer on the English text that every Python carries (`pydoc_data.topics`).

    python -m jobkit.examples.text --run runs/text

Everything that decides the next step is a part of the run: the weights, AdamW's moments and schedule, the dropout
generator and the position in the shuffled text. So the run may be preempted or killed at any instant and still ends
with the same bits.
"""

import argparse
from collections.abc import Iterator, Sequence
from pydoc_data import topics
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jobkit

CONTEXT = 64
BATCH = 24
WIDTH = 96
LAYERS = 2
HEADS = 4


class Block(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, *, deterministic: bool) -> jax.Array:
        """Map (batch, time, WIDTH) to the same shape."""
        x = x + self.dropout(self.attention(self.norm1(x), mask=mask), deterministic=deterministic)
        hidden = nnx.gelu(self.up(self.norm2(x)))
        return x + self.dropout(self.down(hidden), deterministic=deterministic)


class Transformer(nnx.Module):
    """Predict each next character from those before it."""

    def __init__(self, vocabulary: int, *, rngs: nnx.Rngs) -> None:
        self.characters = nnx.Embed(vocabulary, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array, *, deterministic: bool = False) -> jax.Array:
        """Map tokens (batch, time) to logits (batch, time, vocabulary)."""
        x = self.characters(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask, deterministic=deterministic)
        return self.head(self.norm(x))


def loss_of(model: Transformer, batch: jax.Array, deterministic: bool = False) -> jax.Array:
    """Return the mean cross entropy, in nats per character, of windows (batch, CONTEXT + 1)."""
    logits = model(batch[:, :-1], deterministic=deterministic)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


@nnx.jit
def train_step(model: Transformer, optimizer: nnx.Optimizer[Any], batch: jax.Array) -> jax.Array:
    """Update the model in place on one batch and return its loss."""
    loss, grads = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def evaluate(model: Transformer, batch: jax.Array) -> jax.Array:
    """Return the loss without dropout."""
    return loss_of(model, batch, True)


def read_text() -> tuple[np.ndarray[Any, Any], int]:
    """Return the text as character numbers, and how many different characters it has."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    alphabet, numbers = np.unique(np.array(list(text)), return_inverse=True)
    return numbers.astype(np.int32), len(alphabet)


class Windows:
    """Every stretch of CONTEXT + 1 characters of a text, as a random-access source for Grain."""

    def __init__(self, numbers: np.ndarray[Any, Any]) -> None:
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers) - CONTEXT

    def __getitem__(self, index: int) -> np.ndarray[Any, Any]:
        return self._numbers[index : index + CONTEXT + 1]


def batches_of(numbers: np.ndarray[Any, Any], seed: int) -> Iterator[Any]:
    """Return shuffled batches without end; the iterator knows its position and can be set back to it."""
    windows = grain.MapDataset.source(Windows(numbers)).shuffle(seed=seed).repeat().batch(BATCH)
    return iter(windows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the last loss to its last bit."""
    parser = argparse.ArgumentParser(prog="python -m jobkit.examples.text", description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="run directory (default: the one of the launcher)")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    numbers, vocabulary = read_text()
    held_out = len(numbers) // 20
    validation = jnp.asarray(np.stack([Windows(numbers[:held_out])[i * 100] for i in range(4 * BATCH)]))
    batches = batches_of(numbers[held_out:], options.seed)
    model = Transformer(vocabulary, rngs=nnx.Rngs(options.seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, options.steps // 10, options.steps, 4e-4)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)

    with jobkit.Run(options.run, save_every="40 steps", keep=3, keep_best=("val_loss", "min")) as run:
        run.resume(model=model, optimizer=optimizer, data=batches)
        for step in run.steps(options.steps):
            loss = train_step(model, optimizer, next(batches))
            run.log(loss=loss)
            if (step + 1) % 50 == 0:
                val_loss = float(evaluate(model, validation))
                run.log(val_loss=val_loss)
                run.save(val_loss=val_loss)
                print(f"step {step + 1}: loss {float(loss):.4f}, val_loss {val_loss:.4f}", flush=True)
    print(f"final val_loss {float(evaluate(model, validation))!r}", flush=True)


if __name__ == "__main__":
    main()

"""Epochs whose length only their data knows, far more of them than a drill goes through, behind a short other loop."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

import jobkit


def make_epoch(seed: int, epoch: int) -> Iterator[np.ndarray]:
    order = np.random.default_rng(seed)
    for _ in range(5 + epoch % 2):
        yield order.normal(size=4).astype(np.float32)


def main() -> None:
    batches = jobkit.Batches(make_epoch)
    with jobkit.Run() as run:
        state = run.resume(w=jnp.zeros(4), batches=batches, optimizer=None)
        for step in run.steps(10):
            state.w = state.w + step
        for epoch in run.epochs(100_000, batches):
            for batch in epoch:
                state.w = 0.9 * state.w + batch


main()

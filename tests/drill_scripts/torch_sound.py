"""PyTorch's DataLoader: the order of an epoch is made from its number, and what was taken of it is passed over."""

import itertools
from collections.abc import Iterator

import jax.numpy as jnp
import torch
from torch.utils.data import DataLoader

import jobkit


def batches(step: int) -> Iterator[list[float]]:
    epoch, taken = divmod(step, 8)
    while True:
        order = torch.Generator().manual_seed(epoch)
        rows = [float(row) for row in range(32)]
        loader = DataLoader(rows, batch_size=4, shuffle=True, generator=order, collate_fn=list)
        yield from itertools.islice(loader, taken, None)
        epoch, taken = epoch + 1, 0


def main() -> None:
    with jobkit.Run() as run:
        run.resume(w=jnp.zeros(()), optimizer=None)
        data = batches(run.step)
        for _ in run.steps(30):
            run.state.w = 0.9 * run.state.w + jnp.array(next(data)).mean()


main()

"""PyTorch's DataLoader without an end, as loops that count steps have it: after a restart it begins anew."""

from collections.abc import Iterator

import jax.numpy as jnp
import torch
from torch.utils.data import DataLoader

import jobkit


def forever(loader: DataLoader) -> Iterator[list[float]]:
    while True:
        yield from loader


def main() -> None:
    torch.manual_seed(0)
    loader = DataLoader([float(row) for row in range(32)], batch_size=4, shuffle=True, collate_fn=list)
    data = forever(loader)
    with jobkit.Run() as run:
        run.resume(w=jnp.zeros(()), optimizer=None)
        for _ in run.steps(30):
            run.state.w = 0.9 * run.state.w + jnp.array(next(data)).mean()


main()

"""PyTorch's global generator shuffles the DataLoader, seeded, and nothing saves it."""

import jax.numpy as jnp
import torch
from torch.utils.data import DataLoader

import jobkit


def main() -> None:
    torch.manual_seed(0)
    loader = DataLoader([float(row) for row in range(32)], batch_size=4, shuffle=True, collate_fn=list)
    with jobkit.Run() as run:
        state = run.resume(w=jnp.zeros(()), epoch=0, optimizer=None)
        for epoch in run.through(range(state.epoch, 12)):
            for batch in loader:
                state.w = 0.9 * state.w + jnp.array(batch).mean()
            state.epoch = epoch + 1
            run.save(epoch + 1)


main()

"""The generator that shuffles PyTorch's DataLoader is seeded and is no part: after a restart the orders begin anew."""

import jax.numpy as jnp
import torch
from torch.utils.data import DataLoader

import jobkit


def main() -> None:
    order = torch.Generator().manual_seed(0)
    rows = [float(row) for row in range(32)]
    loader = DataLoader(rows, batch_size=4, shuffle=True, generator=order, collate_fn=list)
    with jobkit.Run() as run:
        state = run.resume(w=jnp.zeros(()), epoch=0, optimizer=None)
        for epoch in run.through(range(state.epoch, 12)):
            for batch in loader:
                state.w = 0.9 * state.w + jnp.array(batch).mean()
            state.epoch = epoch + 1
            run.save(epoch + 1)


main()

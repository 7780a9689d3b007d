"""Epochs of Batches with a mean, a validation and early stopping, whose patience is a part."""

import sys
import time

import jax.numpy as jnp
import numpy as np

import jobkit

pace_s = float(sys.argv[1]) if sys.argv[1:] else 0.0
rows = np.random.default_rng(0).normal(size=40).astype(np.float32)


def main() -> None:
    batches, stopping = jobkit.Batches(rows, batch_size=4), jobkit.EarlyStopping(patience=4)
    with jobkit.Run() as run:
        state = run.resume(w=jnp.zeros(()), batches=batches, stopping=stopping, optimizer=None)
        for epoch in run.epochs(30, batches):
            for batch in epoch:
                state.w = 0.9 * state.w + batch.sum()
                batches.add(loss=state.w)
                time.sleep(pace_s)
            run.log(**batches.means(), epoch=epoch)
            validated = abs(float(state.w))
            run.save(val_loss=validated)
            if stopping.update(validated):
                break


main()

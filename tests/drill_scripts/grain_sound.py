"""A Grain iterator as a part; the script keeps the time and the losses of the last steps for a person to read."""

import time

import grain
import jax.numpy as jnp
import numpy as np

import jobkit


def batches() -> grain.DatasetIterator:
    rows = np.arange(64, dtype=np.float32)
    return iter(grain.MapDataset.source(rows).shuffle(seed=0).repeat().batch(4).to_iter_dataset())


def main() -> None:
    data = batches()
    began, shown = time.time(), 0.0
    with jobkit.Run() as run:
        run.resume(w=jnp.zeros(()), data=data, optimizer=None)
        for step in run.steps(30):
            batch = next(data)
            run.state.w = 0.9 * run.state.w + batch.mean()
            if step % 5 == 4:
                print(step, shown, time.time() - began)
                began, shown = time.time(), time.time()


if __name__ == "__main__":
    main()

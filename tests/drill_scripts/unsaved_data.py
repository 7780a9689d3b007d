"""The batches come from a plain generator: after a restart it begins with the first one again."""

from collections.abc import Iterator

import numpy as np
from sound import new_params, train_step, tx

import jobkit


def batches() -> Iterator[np.ndarray]:
    for seed in range(10_000):
        yield np.random.default_rng(seed).normal(size=(8, 4)).astype(np.float32)


def main() -> None:
    params = new_params()
    data = batches()
    noise = np.zeros((8, 1), np.float32)
    with jobkit.Run() as run:
        run.resume(params=params, opt=tx.init(params))
        for _ in run.steps(60):
            batch = next(data)
            run.state.params, run.state.opt, loss = train_step(run.state.params, run.state.opt, batch, noise)
            run.log(loss=loss)


if __name__ == "__main__":
    main()

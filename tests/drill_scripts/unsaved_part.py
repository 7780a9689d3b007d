"""A moving average of the parameters pulls on them, and is no part of the run."""

import jax
import numpy as np
from sound import Batches, new_params, train_step, tx

import jobkit


def main() -> None:
    params = new_params()
    data = Batches()
    average = params
    noise = np.zeros((8, 1), np.float32)
    with jobkit.Run() as run:
        run.resume(params=params, opt=tx.init(params), data=data)
        for _ in run.steps(60):
            new, run.state.opt, loss = train_step(run.state.params, run.state.opt, next(data), noise)
            average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, new)
            run.state.params = jax.tree.map(lambda p, a: 0.99 * p + 0.01 * a, new, average)
            run.log(loss=loss)


if __name__ == "__main__":
    main()

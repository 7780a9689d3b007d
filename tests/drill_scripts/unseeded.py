"""A generator without a seed: it is saved and restored, but no two runs begin alike."""

import numpy as np
from sound import Batches, new_params, train_step, tx

import jobkit


def main() -> None:
    params = new_params()
    data = Batches()
    generator = np.random.default_rng()
    with jobkit.Run() as run:
        run.resume(params=params, opt=tx.init(params), data=data, generator=generator)
        for _ in run.steps(60):
            noise = generator.normal(size=(8, 1)).astype(np.float32)
            run.state.params, run.state.opt, loss = train_step(run.state.params, run.state.opt, next(data), noise)
            run.log(loss=loss)


if __name__ == "__main__":
    main()

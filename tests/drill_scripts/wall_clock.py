"""The noise is seeded with the time of day."""

import time

import jax
from sound import Batches, new_params, train_step, tx

import jobkit


def main() -> None:
    params = new_params()
    data = Batches()
    with jobkit.Run() as run:
        run.resume(params=params, opt=tx.init(params), data=data)
        for step in run.steps(60):
            key = jax.random.fold_in(jax.random.key(int(time.time() * 1000) % 2**31), step)
            noise = jax.random.normal(key, (8, 1))
            run.state.params, run.state.opt, loss = train_step(run.state.params, run.state.opt, next(data), noise)
            run.log(loss=loss)


if __name__ == "__main__":
    main()

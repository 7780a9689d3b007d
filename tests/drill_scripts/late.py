"""A mistake that shows after so many steps alone, 50,000 by default: a counter then lets the learning rate drop."""

import sys
import time

from sound import Batches, jax, new_params, train_step, tx

import jobkit


def main() -> None:
    params, data, beyond = new_params(), Batches(), 0
    late = int(sys.argv[1]) if sys.argv[1:] else 50_000
    with jobkit.Run() as run:
        run.resume(params=params, opt=tx.init(params), data=data, key=jax.random.key(0))
        for step in run.steps(100_000):
            beyond += step >= late
            run.state.key, key = jax.random.split(run.state.key)
            noise, scale = jax.random.normal(key, (8, 1)), 1 / (1 + beyond)
            run.state.params, run.state.opt, _ = train_step(run.state.params, run.state.opt, next(data), noise, scale)
            time.sleep(0.01)


if __name__ == "__main__":
    main()

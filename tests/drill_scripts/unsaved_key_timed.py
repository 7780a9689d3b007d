"""The random key is a variable of its own, and how long a step took is logged: the time is no excuse for the key."""

import time

import jax
from sound import Batches, new_params, train_step, tx

import jobkit


def main() -> None:
    params = new_params()
    data = Batches()
    key = jax.random.key(0)
    with jobkit.Run() as run:
        run.resume(params=params, opt=tx.init(params), data=data)
        for _ in run.steps(60):
            began = time.perf_counter()
            key, now = jax.random.split(key)
            noise = jax.random.normal(now, (8, 1))
            run.state.params, run.state.opt, loss = train_step(run.state.params, run.state.opt, next(data), noise)
            run.log(loss=loss, step_s=time.perf_counter() - began)


if __name__ == "__main__":
    main()

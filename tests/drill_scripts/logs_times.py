"""It does everything right, and logs how long a step took."""

import time

import jax
from sound import Batches, new_params, train_step, tx

import jobkit


def main() -> None:
    params = new_params()
    data = Batches()
    with jobkit.Run(save_every="10m") as run:
        run.resume(params=params, opt=tx.init(params), data=data, key=jax.random.key(0))
        for _ in run.steps(60):
            began = time.perf_counter()
            run.state.key, now = jax.random.split(run.state.key)
            noise = jax.random.normal(now, (8, 1))
            run.state.params, run.state.opt, loss = train_step(run.state.params, run.state.opt, next(data), noise)
            run.log(loss=loss, step_s=time.perf_counter() - began)


if __name__ == "__main__":
    main()

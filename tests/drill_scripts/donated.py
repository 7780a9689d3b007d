"""The state is donated to the step, and what comes back is put into the run only every fifth step."""

import jax
import numpy as np
from sound import Batches, new_params, train_step, tx

import jobkit

donating = jax.jit(train_step, donate_argnums=(0, 1))


def main() -> None:
    params = new_params()
    data = Batches()
    noise = np.zeros((8, 1), np.float32)
    with jobkit.Run() as run:
        run.resume(params=params, opt=tx.init(params), data=data)
        params, opt = run.state.params, run.state.opt
        for step in run.steps(60):
            params, opt, loss = donating(params, opt, next(data), noise)
            if step % 5 == 4 or step == 0:
                run.state.params, run.state.opt = params, opt
            run.log(loss=loss)


if __name__ == "__main__":
    main()

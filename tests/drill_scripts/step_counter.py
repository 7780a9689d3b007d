"""The learning rate falls with a counter of the program's own, which begins at zero after a restart."""

import numpy as np
from sound import Batches, new_params, train_step, tx

import jobkit


def main() -> None:
    params = new_params()
    data = Batches()
    count = 0
    noise = np.zeros((8, 1), np.float32)
    with jobkit.Run() as run:
        run.resume(params=params, opt=tx.init(params), data=data)
        for _ in run.steps(60):
            count += 1
            scale = 0.97**count
            run.state.params, run.state.opt, loss = train_step(
                run.state.params, run.state.opt, next(data), noise, scale
            )
            run.log(loss=loss * scale)


if __name__ == "__main__":
    main()

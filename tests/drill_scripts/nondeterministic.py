"""Noise from the operating system: no two runs are the same."""

import os

import numpy as np
from sound import Batches, new_params, train_step, tx

import jobkit


def main() -> None:
    params = new_params()
    data = Batches()
    with jobkit.Run() as run:
        run.resume(params=params, opt=tx.init(params), data=data)
        for _ in run.steps(60):
            noise = np.frombuffer(os.urandom(8), np.uint8).reshape(8, 1).astype(np.float32) / 255
            run.state.params, run.state.opt, loss = train_step(run.state.params, run.state.opt, next(data), noise)
            run.log(loss=loss)


if __name__ == "__main__":
    main()
